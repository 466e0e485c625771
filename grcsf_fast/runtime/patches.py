"""Volumes as patches and back."""

from __future__ import annotations

from torch import Tensor

__all__ = ["from_patches", "to_patches"]


def to_patches(volume: Tensor, patch_size: int, spatial_dims: int) -> Tensor:
    """(*lead, *S) -> (*lead, P, T): patches in row-major order, and tokens in row-major order inside each."""
    lead = volume.shape[: volume.dim() - spatial_dims]
    counts = [size // patch_size for size in volume.shape[len(lead) :]]
    split = volume.reshape(*lead, *[n for count in counts for n in (count, patch_size)])
    first = len(lead)
    order = [*range(first), *range(first, split.dim(), 2), *range(first + 1, split.dim(), 2)]
    # The sizes are spelled out: -1 cannot be inferred when the batch is empty.
    patches = 1
    for count in counts:
        patches *= count
    return split.permute(order).reshape(*lead, patches, patch_size**spatial_dims)


def from_patches(patches: Tensor, patch_size: int, spatial_shape: tuple[int, ...]) -> Tensor:
    """(*lead, P, T) -> (*lead, *S), the inverse of :func:`to_patches`."""
    lead = patches.shape[:-2]
    spatial_dims = len(spatial_shape)
    counts = [size // patch_size for size in spatial_shape]
    split = patches.reshape(*lead, *counts, *[patch_size] * spatial_dims)
    first = len(lead)
    order = [*range(first)]
    for axis in range(spatial_dims):
        order += [first + axis, first + spatial_dims + axis]
    return split.permute(order).reshape(*lead, *spatial_shape)
