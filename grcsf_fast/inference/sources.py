"""What can be segmented: files, and images in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ..data.files import volume_files, volume_sha256
from ..data.images import OneChannel
from ..data.volumes import Volume, VolumeError, load_volume
from ..errors import ArgumentError

__all__ = ["Source", "as_source", "file_of", "read_volume"]

# Tensors: MONAI's MetaTensor, which knows its affine.
Source = str | Path | OneChannel | nib.spatialimages.SpatialImage | Tensor


def as_source(
    source: Source | np.ndarray, affine: Any = None
) -> str | Path | OneChannel | nib.spatialimages.SpatialImage:
    """A path or an image of nibabel's, from what users have.

    Args:
        source: path, channel of a file, nibabel image, or an array or tensor (X, Y, Z) or (1, X, Y, Z) of real numbers.
        affine: (4, 4), voxel to RAS mm, of an array or tensor; None: the tensor's own attribute ``affine``.

    Raises:
        ArgumentError: an array without affine, or anything else with one; no single volume; no real numbers.
    """
    if not isinstance(source, np.ndarray | Tensor):
        if affine is not None:
            raise ArgumentError(f"affine: expected none beside {type(source).__name__}, which has its own")
        return source
    if affine is None:
        affine = getattr(source, "affine", None)
    if affine is None:
        raise ArgumentError(
            "affine: expected a (4, 4) matrix from voxels to RAS mm beside an array: without it voxels have neither "
            "size nor orientation"
        )
    if isinstance(source, Tensor):
        source = source.detach().as_subclass(Tensor).cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    matrix = np.asarray(affine.detach().cpu() if isinstance(affine, Tensor) else affine)
    if matrix.shape != (4, 4) or matrix.dtype.kind not in "fiu":
        raise ArgumentError(f"affine: expected a (4, 4) matrix, got {matrix.dtype} of shape {matrix.shape}")
    if source.dtype.kind not in "fiub":
        raise ArgumentError(f"source: expected real numbers, got {source.dtype}")
    data = source[0] if source.ndim == 4 and len(source) == 1 else source
    if data.ndim != 3:
        raise ArgumentError(f"source: expected (X, Y, Z) or (1, X, Y, Z), got shape {source.shape}")
    return nib.Nifti1Image(data.astype(np.float32), matrix.astype(np.float64))


def file_of(source: Source) -> Path | None:
    """The file that a volume is read from; None of an image in memory."""
    if isinstance(source, OneChannel):
        return source.path
    return Path(source) if isinstance(source, str | Path) else None


def read_volume(source: str | Path | OneChannel | nib.spatialimages.SpatialImage) -> Volume:
    """The volume with the hash of the bytes it was read from; errors as for :func:`load_volume`."""
    file = file_of(source)
    if file is None or not volume_files(file):
        return load_volume(source)

    def state() -> list[tuple[int, int, int]]:
        found = [path.stat() for path in volume_files(file)]
        return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in found]

    before = state()
    digest = volume_sha256(file)
    volume = load_volume(source)
    if state() != before:
        raise VolumeError(f"{source}: expected a file at rest, it changed while it was read")
    return replace(volume, sha256=digest)
