"""Random changes of a batch of crops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError
from ..runtime.defaults import fresh_defaults

__all__ = [
    "AUGMENTATIONS",
    "augmentation",
]

# What training may change in its crops; see augmentation().
AUGMENTATIONS = ("all", "flips", "affine", "none")
# Between the spacings of a plane in which crops are turned: they turn by voxels, and in others anatomy would shear.
MOST_STRETCHED = 1.5


def augmentation(
    spatial_dims: int, kind: str = "all", spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> Callable[..., dict[str, Tensor]]:
    """Random changes of a batch from :func:`sample_crops`, by MONAI.

    Args:
        spatial_dims: 2 or 3.
        kind: ``"all"``: left-right flips, rotation, scaling, gamma, shift and noise; ``"flips"``: of these the
            first; ``"affine"``: rotation and scaling; ``"none"``.
            Intensities change in ``image`` alone, and not beside a ``healthy`` twin, which has the same.
        spacing: of the three axes; crops are turned about those alone whose other two differ by a factor of 1.5 at
            most.

    Returns:
        A function of a batch and a seed, and of the number of its first crop where it is a part of a batch: crop k
        of a seed comes out the same in any part.
    """
    if kind not in AUGMENTATIONS:
        raise ArgumentError(f"kind: expected one of {AUGMENTATIONS}, got {kind!r}")
    if kind == "none":
        return lambda batch, seed, first=0: batch
    if kind == "flips":
        return _flipped
    from monai.transforms import (
        Compose,
        RandAdjustContrastd,
        RandAffined,
        RandFlipd,
        RandGaussianNoised,
        RandScaleIntensityd,
        RandShiftIntensityd,
    )

    def changes(keys: tuple[str, ...]) -> list[Any]:
        modes = ["nearest" if key in ("lesion", "ignored") else "bilinear" for key in keys]
        flips = [RandFlipd(keys, prob=0.5, spatial_axis=0)]
        affine = RandAffined(
            keys,
            prob=0.5,
            rotate_range=[0.25 * _may_turn(spacing, axis) for axis in ((2,) if spatial_dims == 2 else (0, 1, 2))],
            scale_range=[0.15] * spatial_dims,
            mode=modes,
            padding_mode="border",
        )
        if kind == "affine":
            return [affine]
        intensities = [
            RandAdjustContrastd(["image"], prob=0.3, gamma=(0.7, 1.4)),
            RandScaleIntensityd(["image"], prob=0.3, factors=0.15),
            RandShiftIntensityd(["image"], prob=0.3, offsets=0.15),
            RandGaussianNoised(["image"], prob=0.2, std=0.1),
        ]
        return [*flips, affine, *([] if "healthy" in keys else intensities)]

    @functools.cache
    def transform_of(keys: tuple[str, ...]) -> Any:
        return Compose(changes(keys))

    def augment(batch: dict[str, Tensor], seed: int, first: int = 0) -> dict[str, Tensor]:
        transform = transform_of(tuple(batch))
        samples = []
        with fresh_defaults():
            for index in range(len(batch["image"])):
                own = np.random.default_rng([seed, first + index])
                transform.set_random_state(int(own.integers(2**31)))
                samples.append(transform({key: values[index] for key, values in batch.items()}))
        # MONAI hands back MetaTensors, whose bookkeeping would go along through the whole network.
        return {key: torch.stack([sample[key].as_tensor() for sample in samples]) for key in batch}

    return augment


def _may_turn(spacing: Sequence[float], axis: int) -> bool:
    """About this axis."""
    first, second = (step for other, step in enumerate(spacing) if other != axis)
    return max(first, second) <= MOST_STRETCHED * min(first, second)


def _flipped(batch: dict[str, Tensor], seed: int, first: int = 0) -> dict[str, Tensor]:
    """Left and right by chance. Without MONAI, whose bookkeeping takes longer than cutting the crops."""
    count = len(batch["image"])
    turned = [np.random.default_rng([seed, first + index]).random() < 0.5 for index in range(count)]
    return {
        key: torch.stack([one.flip(1) if turn else one for one, turn in zip(values, turned, strict=True)])
        for key, values in batch.items()
    }
