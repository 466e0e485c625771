"""Volumes on other grids: linear resampling along their axes, and axes in another order."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.transfers import fetch, to_device

__all__ = ["reoriented", "resampling", "resampling_matrix", "resize"]

MOST_SHRUNK = 64  # times along an axis on a GPU, whose antialiased filter runs out of shared memory somewhat above


def resize(volume: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Linear resampling between grids that cover the same box: (X, Y, Z) -> shape, float32.

    Where it shrinks, a triangle filter of the new voxel's width keeps fine detail from turning into noise.
    """
    if tuple(volume.shape) == tuple(shape):
        return volume.float()
    volume = volume.float()
    if volume.device.type == "cuda" and any(n > MOST_SHRUNK * m for n, m in zip(volume.shape, shape, strict=True)):
        return to_device(resize(fetch({"volume": volume})["volume"], shape), volume.device)
    # The antialiased filter exists for two axes: first y and z of every x, then x with (y, z) as one axis.
    planes = F.interpolate(volume[:, None], size=shape[1:], mode="bilinear", align_corners=False, antialias=True)[:, 0]
    lines = planes.reshape(1, 1, volume.shape[0], -1)
    lines = F.interpolate(lines, size=(shape[0], lines.shape[3]), mode="bilinear", align_corners=False, antialias=True)
    return lines.reshape(shape)


def reoriented(values: Tensor, orientation: np.ndarray) -> Tensor:
    """As nibabel's ``apply_orientation``, of a tensor: (X, Y, Z), contiguous."""
    turned = [axis for axis in range(3) if orientation[axis, 1] < 0]
    order = [int(axis) for axis in np.argsort(orientation[:, 0])]
    return (values.flip(turned) if turned else values).permute(order).contiguous()


@functools.lru_cache(maxsize=64)
def resampling(size: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Linear resampling along one axis: a (target, size) matrix and, a row, its first and last column that is not 0."""
    matrix = torch.eye(size, dtype=torch.float32, device="cpu")
    if target != size:
        matrix = resize(matrix[None], (1, size, target))[0].T.contiguous()
    used = matrix != 0
    first = used.int().argmax(1)
    return matrix, first, size - 1 - used.flip(1).int().argmax(1)


@functools.lru_cache(maxsize=64)
def resampling_matrix(size: int, target: int, device: torch.device) -> Tensor:
    """The matrix of :func:`resampling` on a device; not to be written to."""
    return to_device(resampling(size, target)[0], device)
