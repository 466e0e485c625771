"""Random changes of a batch of crops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..runtime.defaults import fresh_defaults

__all__ = [
    "AUGMENTATIONS",
    "augmentation",
]

# What training may change in its crops; see augmentation().
AUGMENTATIONS = ("all", "flips", "none")


def augmentation(
    spatial_dims: int, keys: Sequence[str], kind: str = "all"
) -> Callable[[dict[str, Tensor], int], dict[str, Tensor]]:
    """Random changes of a batch from :func:`sample_crops`, by MONAI.

    Args:
        spatial_dims: 2 or 3.
        keys: entries of the batch; intensities change in ``image`` alone.
        kind: ``"all"``: left-right flips, rotation, scaling, gamma, shift and noise; ``"flips"`` or ``"none"``.

    Returns:
        A function of a batch and a seed; the same seed gives the same batch.
    """
    if kind not in AUGMENTATIONS:
        raise ArgumentError(f"kind: expected one of {AUGMENTATIONS}, got {kind!r}")
    if kind == "none":
        return lambda batch, seed: batch
    from monai.transforms import (
        Compose,
        RandAdjustContrastd,
        RandAffined,
        RandFlipd,
        RandGaussianNoised,
        RandScaleIntensityd,
        RandShiftIntensityd,
    )

    modes = ["nearest" if key == "lesion" else "bilinear" for key in keys]
    changes = [
        RandFlipd(keys, prob=0.5, spatial_axis=0),
        RandAffined(
            keys,
            prob=0.5,
            rotate_range=[0.25] * (1 if spatial_dims == 2 else 3),
            scale_range=[0.15] * spatial_dims,
            mode=modes,
            padding_mode="border",
        ),
        RandAdjustContrastd(["image"], prob=0.3, gamma=(0.7, 1.4)),
        RandScaleIntensityd(["image"], prob=0.3, factors=0.15),
        RandShiftIntensityd(["image"], prob=0.3, offsets=0.15),
        RandGaussianNoised(["image"], prob=0.2, std=0.1),
    ]
    transform = Compose(changes if kind == "all" else changes[:1])

    def augment(batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        transform.set_random_state(seed)
        count = len(batch["image"])
        with fresh_defaults():
            samples = [transform({key: batch[key][index] for key in keys}) for index in range(count)]
        # MONAI hands back MetaTensors, whose bookkeeping would go along through the whole network.
        return {key: torch.stack([sample[key].as_tensor() for sample in samples]) for key in keys}

    return augment
