"""Train GRCSF in a MONAI loop: their data, transforms, loader and inferer; our network and loss.

By default on a few small synthetic images: ``python examples/monai_training.py``, with ``--dims 3`` on volumes. Your
own images go into ``cases``: a dictionary each, of an image and its lesion mask, or of their paths with ``LoadImaged``
as first transform.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from monai.data import DataLoader, Dataset
from monai.inferers import sliding_window_inference
from monai.metrics import DiceMetric
from monai.transforms import Compose, NormalizeIntensityd, RandCropByPosNegLabeld, RandFlipd, ToTensord

from grcsf_fast import GRCSF, GRCSFLoss

# By the number of spatial axes: edges of the images and of the crops in voxels, and the network.
SIZE, CROP = {2: 96, 3: 40}, {2: 64, 3: 32}
NETWORK = {2: {"features": (16, 32, 64, 64)}, 3: {"features": (8, 16, 32)}}


def synthetic_cases(count: int, dims: int) -> list[dict[str, torch.Tensor]]:
    """Noise with a brighter ball in it: image and mask (1, \\*S) each."""
    generator = torch.Generator().manual_seed(0)
    edge = SIZE[dims]
    cases = []
    for _ in range(count):
        centre = edge * (0.2 + 0.6 * torch.rand(dims, generator=generator))
        radius = 6 + 6 * torch.rand(1, generator=generator)
        voxels = torch.stack(torch.meshgrid([torch.arange(edge)] * dims, indexing="ij"), -1)
        mask = ((voxels - centre).square().sum(-1) < radius**2).float()[None]
        cases.append({"image": torch.randn(mask.shape, generator=generator) + 2 * mask, "mask": mask})
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/monai"), help="folder of the trained network")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--dims", type=int, default=2, choices=(2, 3), help="slices or volumes")
    options = parser.parse_args()
    torch.manual_seed(0)

    cases, crop = synthetic_cases(12, options.dims), (CROP[options.dims],) * options.dims
    transform = Compose(
        [
            NormalizeIntensityd("image"),
            RandCropByPosNegLabeld(["image", "mask"], label_key="mask", spatial_size=crop, num_samples=2),
            RandFlipd(["image", "mask"], prob=0.5, spatial_axis=0),
            ToTensord(["image", "mask"], track_meta=False),
        ]
    )
    loader = DataLoader(Dataset(cases[:8], transform), batch_size=2, shuffle=True)
    network = GRCSF(options.dims, in_channels=1, out_channels=1, patch_size=4, **NETWORK[options.dims])
    criterion = GRCSFLoss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)

    for epoch in range(options.epochs):
        network.train()
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            # With residual maps: network(image, residual_maps, return_maps=True).
            loss = criterion(network(batch["image"], return_maps=True), batch["mask"])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}", flush=True)

    network.eval()
    dice = DiceMetric()
    with torch.no_grad():
        for case in Dataset(cases[8:], NormalizeIntensityd("image")):
            logits = sliding_window_inference(case["image"][None], crop, 4, network, overlap=0.25)
            dice((logits > 0).float(), case["mask"][None])
    print(f"Dice of held-out images: {dice.aggregate().item():.3f}")
    print(f"saved to {network.save_pretrained(options.output)}; GRCSF.from_pretrained loads it")


if __name__ == "__main__":
    main()
