"""The path that the engine replaced, kept to be compared with: one volume after another through plain PyTorch.

Reference ops, eager float32, all processor threads inside an operation, slice batches of one volume, residual maps one
masking pass after another, everything brought to the file's grid at once, nothing overlapped, nibabel's own writer.
``python -m benchmarks.plain IMAGES OUTPUT`` writes masks, residual maps, pictures and reports as `predict` does.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grcsf_fast import use_backend
from grcsf_fast.data.files import list_cases
from grcsf_fast.data.volumes import Prepared, like, load_volume, prepare, resize
from grcsf_fast.inference.overlay import ShownMap, save_overlay
from grcsf_fast.inference.report import lesion_mask, lesion_report
from grcsf_fast.networks.mae import MaskedAutoencoder
from grcsf_fast.networks.residual_maps import complementary_masks, covering_masks
from grcsf_fast.pretrained.bundle import Bundle, load_bundle

BATCH = 16


def residual_map(
    slices: Tensor, mae: MaskedAutoencoder, ratio: float, generator: torch.Generator, signed: bool = True
) -> Tensor:
    """(Z,seen_channels,X,Y) -> (Z,X,Y), one pass over the whole batch after another."""
    padding = [side for size in reversed(slices.shape[2:]) for side in (0, -size % mae.patch_size)]
    padded = F.pad(slices, padding, mode="replicate")
    passes = covering_masks if mae.restores else complementary_masks
    masks = passes(padded.shape[2] * padded.shape[3] // mae.patch_size**2, ratio, generator)
    found = []
    for chunk in padded.split(BATCH):
        patches = mae.patchify(chunk[:, : mae.in_channels])
        total, times = torch.zeros_like(patches), torch.zeros(patches.shape[1])
        for visible in masks:
            shown = visible.expand(len(chunk), -1)
            counted = torch.zeros_like(times).scatter(0, visible, 1.0)
            if mae.restores:
                healthy = mae(chunk, shown, restored=True)
                error = torch.zeros_like(patches)
                error[:, visible] = patches[:, visible] - healthy
            else:
                counted = 1 - counted
                error = patches - mae.patchify(mae(chunk, shown))
            total += (error if signed else error.abs()) * counted[:, None]
            times += counted
        found.append(mae.unpatchify(total / times[:, None], chunk.shape[2:]).mean(1))
    return torch.cat(found)[:, : slices.shape[2], : slices.shape[3]]


def probability_of(bundle: Bundle, volume: Tensor, residual: Tensor) -> Tensor:
    """(X,Y,Z) and (M,X,Y,Z) -> (X,Y,Z), averaged over the bundle's views."""
    inputs = torch.cat([volume[None], residual])
    total = torch.zeros_like(volume)
    views = [
        (zoom, turned) for zoom in bundle.tta_scales for turned in ((False, True) if bundle.tta_flip else (False,))
    ]
    for zoom, turned in views:
        view = inputs.flip(1) if turned else inputs
        shape = (*(round(size * zoom) for size in volume.shape[:2]), volume.shape[2])
        view = F.interpolate(view[None], size=shape, mode="trilinear", align_corners=False)[0]
        stacked = bundle.network.stack(view[0], torch.arange(view.shape[-1]))
        slices = torch.cat([stacked, view[1:].permute(3, 0, 1, 2)], 1)  # (Z,2n+1+M,X,Y)
        seen = bundle.network.seen_channels
        logits = torch.cat([bundle.network(part[:, :seen], part[:, seen:]) for part in slices.split(BATCH)])
        found = logits[:, 0].permute(1, 2, 0).sigmoid()
        found = F.interpolate(found[None, None], size=volume.shape, mode="trilinear", align_corners=False)[0, 0]
        total += found.flip(0) if turned else found
    return total / len(views)


def restored(values: Tensor, prepared: Prepared) -> np.ndarray:
    full = torch.zeros(prepared.resampled_shape)
    full[prepared.box] = values
    return np.ascontiguousarray(nib.apply_orientation(resize(full, prepared.ras_shape).numpy(), prepared.orientation))


@torch.no_grad()
def predict(bundle: Bundle, path: Path, output: Path, name: str) -> dict[str, float]:
    """Segment one 2-D bundle's volume and write its files; seconds a stage."""
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[stage], began = now - began, now

    volume = load_volume(path)
    lap("read")
    prepared = prepare(volume, bundle.preprocessing)
    lap("prepare")
    data = prepared.data.to(bundle.network.dtype)
    slices = bundle.mae.stack(data, torch.arange(data.shape[2]))
    generator = torch.Generator().manual_seed(bundle.residual_maps.seed)
    maps = [
        residual_map(slices, bundle.mae, ratio, generator, bundle.residual_maps.signed).permute(1, 2, 0)
        for ratio in bundle.residual_maps.mask_ratios
    ]
    lap("residual_maps")
    probability = probability_of(bundle, data, torch.stack(maps))
    lap("segmentation")
    found = restored(probability, prepared)
    if bundle.above_hu is not None:  # what is not above it reaches no threshold
        found[volume.data <= bundle.above_hu] = -1
    mask = lesion_mask(found, bundle.probability_threshold, bundle.hysteresis_threshold)
    mask_image = like(mask.astype(np.uint8), volume)
    map_images = {
        ratio: like(restored(one, prepared), volume)
        for ratio, one in zip(bundle.residual_maps.mask_ratios, maps, strict=True)
    }
    report = lesion_report(mask, volume.affine)
    lap("restore")
    output.mkdir(parents=True, exist_ok=True)
    for ratio, image in map_images.items():
        nib.save(image, output / f"{name}_residual{round(100 * ratio)}.nii.gz")
    (output / f"{name}_report.json").write_text(json.dumps(report))
    shown = ShownMap(
        f"residual{round(100 * bundle.residual_maps.mask_ratios[-1])}", maps[-1], bundle.residual_maps.signed
    )
    save_overlay(output / f"{name}_overlay.png", prepared, mask_image, [shown])
    nib.save(mask_image, output / f"{name}.nii.gz")
    lap("save")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    began = time.perf_counter()
    bundle = load_bundle(options.model)
    seconds: dict[str, float] = {"load the bundle": time.perf_counter() - began}
    with use_backend("reference"):
        for name, path in list_cases(options.images).items():
            for stage, value in predict(bundle, path, options.output, name).items():
                seconds[stage] = seconds.get(stage, 0.0) + value
    print(json.dumps({stage: round(value, 3) for stage, value in seconds.items()}))


if __name__ == "__main__":
    main()
