"""Randomness from one seed, in streams that do not disturb each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Random", "Streams"]


class Random:
    """Scalars from numpy, fields from torch, both from one seed."""

    def __init__(self, seed: int | np.random.SeedSequence) -> None:
        self.numpy = np.random.default_rng(seed)
        self.torch = torch.Generator().manual_seed(int(self.numpy.integers(2**62)))

    def uniform(self, low: float, high: float) -> float:
        return float(self.numpy.uniform(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self.numpy.random() < probability)

    def smooth(self, shape: tuple[int, ...], scale: float, channels: int = 1) -> Tensor:
        """(channels, *shape) noise of about unit variance at its nodes, which lie ``scale`` voxels apart."""
        nodes = [max(2, int(np.ceil(size / max(scale, 1.0))) + 2) for size in shape]
        coarse = torch.randn(channels, *nodes, generator=self.torch)
        # Trilinear interpolation as three matrix products, several times as fast as F.interpolate.
        x, y, z = (_interpolation(count, size) for count, size in zip(nodes, shape, strict=True))
        planes = y @ (coarse @ z.T)  # (channels, nodes, Y, Z)
        return (x @ planes.flatten(2)).unflatten(2, shape[1:])

    def white(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.torch)


@dataclass(frozen=True)
class Streams:
    """One stream per purpose: what one draws does not depend on how much another has drawn."""

    anatomy: Random
    contrast: Random
    skull: Random
    acquisition: Random
    lesions: Random
    distractors: Random

    @classmethod
    def of(cls, seed: int) -> Streams:
        # A new purpose goes to the end: the first children of a sequence stay what they are.
        return cls(*(Random(child) for child in np.random.SeedSequence(seed).spawn(6)))


def _interpolation(count: int, size: int) -> Tensor:
    """(size, count): linear interpolation from ``count`` nodes, the outer two at the ends of the axis."""
    return F.interpolate(torch.eye(count)[None], size=size, mode="linear", align_corners=True)[0].T
