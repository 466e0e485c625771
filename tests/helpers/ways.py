"""A prepared volume's way to what its mask is made of, on any device."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import nibabel as nib
import numpy as np
import torch
from heads import SPACING, noise, tiny_bundle
from streams import together
from torch import Tensor

from grcsf_fast import MaskedAutoencoder
from grcsf_fast.data.labels import Labels
from grcsf_fast.data.volumes import Prepared, Preprocessing, Volume, load_volume, prepare
from grcsf_fast.inference.report import Levels, levels_on_grid
from grcsf_fast.networks.stream import Stream
from grcsf_fast.networks.whole_volume import reconstruct, reconstruction_stage, segment_views, segmentation_stage
from grcsf_fast.pretrained.bundle import Bundle
from grcsf_fast.runtime.transfers import CPU

KINDS = ("slices", "neighbours", "windows", "classes", "regions")
CLASSES = Labels(("core", "rim"), ((1,), (2,)))
REGIONS = Labels(("whole", "core"), ((1, 2), (2,)), exclusive=False)


def head() -> Volume:
    """Of 34x40x31 voxels of 4 mm, its axes in another order than RAS."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, size) for size in (34, 40, 31)], indexing="ij")
    data = np.where(x**2 + y**2 + z**2 < 0.8, 60, 0) + 10 * noise(34, 40, 31)
    affine = np.array([[-4.0, 0, 0, 60], [0, 0, 4, -70], [0, -4, 0, 70], [0, 0, 0, 1]])
    return load_volume(nib.Nifti1Image(data.astype(np.float32), affine))


def prepared_head(device: torch.device = CPU, **preprocessing: Any) -> Prepared:
    return prepare(head(), Preprocessing(SPACING, **preprocessing), device)


def bundle_of(kind: str) -> Bundle:
    """Random weights; of one of ``KINDS``."""
    if kind == "windows":
        bundle = tiny_bundle()
        network = type(bundle.network)(3, 1, 1, features=(4, 8), patch_size=4, rcu_levels=(), residual_channels=4)
        return replace(
            bundle, network=network, mae=MaskedAutoencoder(3, 1, 4, 24, 1, 2, 24, 1, 2), roi_size=(16, 16, 16)
        )
    if kind == "neighbours":
        bundle = tiny_bundle(neighbours=1)
        return replace(bundle, mae=MaskedAutoencoder(2, 1, 8, 16, 1, 2, 16, 1, 2, neighbours=1))
    labels = {"classes": CLASSES, "regions": REGIONS}.get(kind)
    if labels is None:
        return tiny_bundle()
    bundle = tiny_bundle()
    arguments = bundle.network.config | {"out_channels": labels.outputs}
    return replace(bundle, network=type(bundle.network)(**arguments), labels=labels)


def on_device(bundle: Bundle, device: torch.device) -> Bundle:
    """A copy with its networks there, in evaluation mode."""
    network, mae = (copy.deepcopy(one).eval().to(device) for one in (bundle.network, bundle.mae))
    return replace(bundle, network=network, mae=mae)


@torch.no_grad()
def to_the_mask(bundle: Bundle, prepared: Prepared, batch_size: int = 8) -> tuple[Tensor, Tensor, Levels]:
    """Residual maps, probability and levels, on the device of the networks and of the prepared volume."""
    network, mae, labels = bundle.network, bundle.mae, bundle.labels
    scales = (1.0,) if network.spatial_dims == 3 else (1.0, 1.2)
    stages = segmentation_stage(network, batch_size, bundle.roi_size, labels=labels)
    stages |= reconstruction_stage(mae, network.spatial_dims, batch_size, bundle.residual_maps)

    def work() -> Any:
        maps = yield from reconstruct(prepared.data, prepared.foreground, mae, bundle.residual_maps.mask_ratios)
        probability, _ = yield from segment_views(
            prepared.data, prepared.foreground, maps, network, bundle.roi_size, True, scales, labels
        )
        return maps, probability, levels_on_grid(probability, prepared, 0.3, 0.5, labels)

    (found,) = together(Stream(stages), [work()])
    if isinstance(found, Exception):
        raise found
    return found
