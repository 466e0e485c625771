"""Axial slices of a volume with those below and above them, as channels of 2-D networks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..runtime.transfers import CPU, to_device

__all__ = ["check_neighbours", "stack_slices"]


def check_neighbours(neighbours: int, spatial_dims: int) -> None:
    """See that a network can have them.

    Raises:
        ArgumentError: neighbours in 3-D, where the network sees them anyway.
    """
    if neighbours and spatial_dims != 2:
        raise ArgumentError(f"neighbours: expected 0 in 3-D, got {neighbours}")


def stack_slices(volume: Tensor, slices: Tensor, neighbours: int) -> Tensor:
    """Slices as channels.

    Args:
        volume: (X, Y, Z), or (C, X, Y, Z) of several channels.
        slices: (N,) int64, their numbers.
        neighbours: n, slices on either side.

    Returns:
        (N, (2n + 1) C, X, Y), all channels of a slice together: the slice, its neighbours from near to far, the lower
        one first; beyond the volume's ends its last slices are repeated.

    Raises:
        ArgumentError: numbers, on the CPU, that the volume does not have.
    """
    depth = volume.shape[-1]
    if slices.device.type == "cpu" and slices.numel() and not 0 <= int(slices.min()) <= int(slices.max()) < depth:
        raise ArgumentError(f"slices: expected numbers from 0 to {depth - 1}, got {slices.tolist()}")
    steps = [step for distance in range(1, neighbours + 1) for step in (-distance, distance)]
    offsets = to_device(torch.tensor([0, *steps], device=CPU), slices.device)
    near = (slices[:, None] + offsets).clamp(0, depth - 1)  # (N,2n+1)
    if volume.dim() == 4:
        return volume.permute(3, 0, 1, 2)[near].flatten(1, 2)
    return volume.permute(2, 0, 1)[near]
