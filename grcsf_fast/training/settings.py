"""What a training does, checked, and where it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.labels import Labels
from ..data.volumes import Preprocessing
from ..errors import ArgumentError
from ..pretrained.bundle import ResidualMapSettings
from ..runtime.processes import World
from .augmentation import AUGMENTATIONS
from .losses import SEGMENTATION_LOSSES

__all__ = ["TrainSettings", "TrainingRun"]


@dataclass(frozen=True)
class TrainSettings:
    """What a training does; the same settings and seed give the same weights on the same processor and threads. On a
    GPU some of its kernels may sum in another order each time.

    Attributes:
        steps: optimiser steps.
        batch_size: crops that go through the network at once, in all processes together.
        accumulate: such batches per step, whose gradients are averaged; Dice is that of a batch.
        crop_size: edge lengths in voxels; two: axial slices, three: boxes.
        crop_size_jitter: each edge of a step's crops is longer or shorter by this, or neither; a network with instance
            norms then learns heads that fill the picture more or less.
        crop_size_jitters: the same for each axis where they differ, of which ``crop_size_jitter`` is the least; None:
            it holds for all.
        learning_rate: peak of the cosine schedule.
        weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up; from ``steps`` up, the rate only rises.
        ema: decay per step of a moving average of the weights, which is then validated and put into the bundle in
            place of the last step's; 0: none. Its first steps have a smaller one.
        seed: of weights, crops, augmentation and masks.
        cache_size: cases held in memory.
        replace_every: steps after which one case of the pool is replaced; 0: never.
        lesion_fraction: share of crops that lie near lesion, of cases that hold it.
        loss: of the segmentation: ``"dice-focal"``, or ``"focal"`` alone.
        score_weight: weight of the score loss against that.
        augment: ``"all"``: random flips, affine and intensity changes; ``"flips"``: left and right alone, for
            synthetic subjects, which vary in all else; ``"affine"``: rotation and scaling alone; or ``"none"``.
        precision: of the forward passes: ``"float32"``, ``"bfloat16"`` (autocast) or ``"auto"``: bfloat16 where it is
            faster, see :func:`grcsf_fast.runtime.precision.choose_training_precision`.
        compile: run what is trained through ``torch.compile``.
        channels_last: keep images and weights of convolutions with the channels last in memory.
        log_every: steps between log lines; on a GPU a gradient that is not finite is noticed then, or before the next
            checkpoint.
        validate_every: steps between validations and checkpoints.
        checkpoint_minutes: at most, between two checkpoints.
    """

    steps: int = 19000
    batch_size: int = 8
    accumulate: int = 1
    crop_size: tuple[int, ...] = (96, 112)
    crop_size_jitter: int = 0
    crop_size_jitters: tuple[int, ...] | None = None  # None as of checkpoints that do not know it
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup_steps: int = 200
    ema: float = 0.0
    seed: int = 0
    cache_size: int = 64
    replace_every: int = 20
    lesion_fraction: float = 0.6
    loss: str = "dice-focal"
    score_weight: float = 0.2
    augment: str = "all"
    precision: str = "auto"
    compile: bool = False
    channels_last: bool = False
    log_every: int = 25
    validate_every: int = 2000
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ArgumentError(f"precision: expected 'auto', 'float32' or 'bfloat16', got {self.precision!r}")
        if self.loss not in SEGMENTATION_LOSSES:
            raise ArgumentError(f"loss: expected one of {SEGMENTATION_LOSSES}, got {self.loss!r}")
        if self.augment not in AUGMENTATIONS:
            raise ArgumentError(f"augment: expected one of {AUGMENTATIONS}, got {self.augment!r}")
        for names, least in (
            (("steps", "batch_size", "accumulate", "cache_size", "log_every", "validate_every"), 1),
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
        if not 0 <= self.ema < 1:
            raise ArgumentError(f"ema: expected a number of 0 or more and below 1, got {self.ema}")
        if not 0 <= self.lesion_fraction <= 1:
            raise ArgumentError(f"lesion_fraction: expected a number in [0, 1], got {self.lesion_fraction}")
        if len(self.crop_size) not in (2, 3) or min(self.crop_size) < 1:
            raise ArgumentError(f"crop_size: expected two or three edge lengths, got {self.crop_size}")
        if not 0 <= self.crop_size_jitter < min(self.crop_size):
            raise ArgumentError(
                f"crop_size_jitter: expected 0 to less than an edge of the crop {self.crop_size}, "
                f"got {self.crop_size_jitter}"
            )
        own = self.crop_size_jitters
        if own is not None and (len(own) != len(self.crop_size) or min(own) != self.crop_size_jitter):
            raise ArgumentError(
                f"crop_size_jitters: expected one for each edge of the crop {self.crop_size}, the least of them "
                f"{self.crop_size_jitter}, got {own}"
            )
        if any(jitter >= edge for jitter, edge in zip(self.jitters, self.crop_size, strict=True)):
            raise ArgumentError(f"crop_size_jitters: expected less than the crop's edges {self.crop_size}, got {own}")

    @property
    def jitters(self) -> tuple[int, ...]:
        """By how much the edges of crops are longer or shorter, for each axis."""
        return self.crop_size_jitters or (self.crop_size_jitter,) * len(self.crop_size)

    @property
    def largest_crop(self) -> tuple[int, ...]:
        """Edge lengths of the largest crops."""
        return tuple(edge + jitter for edge, jitter in zip(self.crop_size, self.jitters, strict=True))

    def with_jitter(self, most: int, multiple: int) -> TrainSettings:
        """With a jitter of each axis of at most ``most`` and a quarter of its edge, in multiples of ``multiple``."""
        own = tuple(min(most, edge // 4) // multiple * multiple for edge in self.crop_size)
        return replace(self, crop_size_jitter=min(own), crop_size_jitters=own if len(set(own)) > 1 else None)

    def crop_of_step(self, rng: np.random.Generator) -> list[int]:
        """Edge lengths of one step's crops."""
        return [
            edge + jitter * int(rng.integers(-1, 2)) for edge, jitter in zip(self.crop_size, self.jitters, strict=True)
        ]


@dataclass(frozen=True)
class TrainingRun:
    """Where a training runs, by what settings, and what its bundle says of it.

    Attributes:
        output: folder for checkpoint, log, curves and bundle.
        settings: see :class:`TrainSettings`.
        preprocessing: of the cases; stored in the bundle.
        residual_maps: how they are made; stored in the bundle.
        device: to train on.
        resume: go on from the checkpoint in ``output``.
        card: what the bundle says of the training.
        initial_sha256: of the bundle whose weights are trained on; None: of none.
        workers: processes that make cases; 0: none. They change no weights.
        tensorboard: write the log for TensorBoard too.
        world: processes that train together, each with its share of every batch; the first one alone writes.
        channels: names of the images of a case; stored in the bundle.
        labels: that the network learns to tell apart; None: lesion alone. Stored in the bundle.

    Raises:
        ArgumentError: a batch that does not divide into equal shares.
    """

    output: Path
    settings: TrainSettings
    preprocessing: Preprocessing
    residual_maps: ResidualMapSettings
    device: torch.device
    resume: bool = False
    card: Mapping[str, Any] = field(default_factory=dict)
    initial_sha256: str | None = None
    workers: int = 0
    tensorboard: bool = False
    world: World = field(default_factory=World)
    channels: tuple[str, ...] = ("image",)
    labels: Labels | None = None

    def __post_init__(self) -> None:
        if self.settings.batch_size % self.world.size:
            raise ArgumentError(
                f"batch_size: expected a multiple of the {self.world.size} processes, got {self.settings.batch_size}"
            )

    @property
    def own_crops(self) -> slice:
        """Which crops of a batch are this process's."""
        share = self.settings.batch_size // self.world.size
        return slice(self.world.rank * share, (self.world.rank + 1) * share)
