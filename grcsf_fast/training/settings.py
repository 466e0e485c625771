"""What a training does, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import ArgumentError
from .augmentation import AUGMENTATIONS

__all__ = ["TrainSettings"]


@dataclass(frozen=True)
class TrainSettings:
    """What a training does; the same settings and seed give the same weights on the same machine and threads.

    Attributes:
        steps: optimiser steps.
        batch_size: crops a step.
        crop_size: edge lengths in voxels; two: axial slices, three: boxes.
        crop_size_jitter: each edge of a step's crops is longer or shorter by this, or neither; a network with instance
            norms then learns heads that fill the picture more or less.
        learning_rate: peak of the cosine schedule.
        weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up.
        seed: of weights, crops, augmentation and masks.
        cache_size: cases held in memory.
        replace_every: steps after which one case of the pool is replaced; 0: never.
        lesion_fraction: share of crops that hold lesion.
        score_weight: weight of the score loss against Dice + focal.
        augment: ``"all"``: random flips, affine and intensity changes; ``"flips"``: left and right alone, for
            synthetic subjects, which vary in all else; or ``"none"``.
        autocast: ``"auto"``: bfloat16 where it is faster, see :func:`grcsf_fast.runtime.precision.choose_autocast`;
            ``"bf16"`` or ``"off"``.
        log_every: steps between log lines.
        validate_every: steps between validations and checkpoints.
        checkpoint_minutes: at most, between two checkpoints.
    """

    steps: int = 19000
    batch_size: int = 8
    crop_size: tuple[int, ...] = (96, 112)
    crop_size_jitter: int = 0
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup_steps: int = 200
    seed: int = 0
    cache_size: int = 64
    replace_every: int = 20
    lesion_fraction: float = 0.6
    score_weight: float = 0.2
    augment: str = "all"
    autocast: str = "auto"
    log_every: int = 25
    validate_every: int = 2000
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.autocast not in ("auto", "bf16", "off"):
            raise ArgumentError(f"autocast: expected 'auto', 'bf16' or 'off', got {self.autocast!r}")
        if self.augment not in AUGMENTATIONS:
            raise ArgumentError(f"augment: expected one of {AUGMENTATIONS}, got {self.augment!r}")
        for names, least in (
            (("steps", "batch_size", "cache_size", "log_every", "validate_every"), 1),
            (("warmup_steps", "replace_every", "seed"), 0),
        ):
            for name in names:
                if getattr(self, name) < least:
                    raise ArgumentError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        for name in ("learning_rate", "checkpoint_minutes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ArgumentError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "score_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ArgumentError(f"{name}: expected a number of 0 or more, got {getattr(self, name)}")
        if not 0 <= self.lesion_fraction <= 1:
            raise ArgumentError(f"lesion_fraction: expected a number in [0, 1], got {self.lesion_fraction}")
        if len(self.crop_size) not in (2, 3) or min(self.crop_size) < 1:
            raise ArgumentError(f"crop_size: expected two or three edge lengths, got {self.crop_size}")
        if not 0 <= self.crop_size_jitter < min(self.crop_size):
            raise ArgumentError(
                f"crop_size_jitter: expected 0 to less than an edge of the crop {self.crop_size}, "
                f"got {self.crop_size_jitter}"
            )

    def crop_of_step(self, rng: np.random.Generator) -> list[int]:
        """Edge lengths of one step's crops."""
        return [edge + self.crop_size_jitter * int(rng.integers(-1, 2)) for edge in self.crop_size]
