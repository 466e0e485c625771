"""What can be segmented: files, and images in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ..data.channels import Channels, load_image, parts_of
from ..data.files import case_name, volume_files, volume_sha256
from ..data.images import OneChannel
from ..data.volumes import Volume, VolumeError
from ..errors import ArgumentError

__all__ = [
    "Source",
    "as_source",
    "check_space",
    "file_of",
    "files_of",
    "name_of",
    "origin_of",
    "read_volume",
    "source_sha256",
]

# Tensors: MONAI's MetaTensor, which knows its affine.
Source = str | Path | OneChannel | Channels | Sequence | nib.spatialimages.SpatialImage | Tensor


def as_source(
    source: Source | np.ndarray, affine: Any = None, channels: int = 1
) -> str | Path | OneChannel | Channels | Sequence | nib.spatialimages.SpatialImage:
    """A path or an image of nibabel's, or several of them, from what users have.

    Args:
        source: path, channel of a file, nibabel image, a list of such, or an array or tensor (X, Y, Z) or
            (C, X, Y, Z) of real numbers.
        affine: (4, 4), voxel to RAS mm, of an array or tensor; None: the tensor's own attribute ``affine``.
        channels: C.

    Returns:
        The path, or the image, which knows the file that a ``MetaTensor`` was read from.

    Raises:
        ArgumentError: an array without affine, or anything else with one; no single volume; no real numbers; a
            ``MetaTensor`` of another space than RAS.
    """
    if not isinstance(source, np.ndarray | Tensor):
        if affine is not None:
            several = isinstance(source, list | tuple)
            own = "whose images have their own; an array (C, X, Y, Z) takes one" if several else "which has its own"
            raise ArgumentError(f"affine: expected none beside {type(source).__name__}, {own}")
        return source
    file = _file_of_tensor(source)
    if affine is None:
        affine = getattr(source, "affine", None)
    if affine is None:
        raise ArgumentError(
            "affine: expected a (4, 4) matrix from voxels to RAS mm beside an array: without it voxels have neither "
            "size nor orientation; nibabel.Nifti1Image(array, affine) holds both, for predict_many too"
        )
    if isinstance(source, Tensor):
        check_space(source)
        source = source.detach().as_subclass(Tensor).cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    matrix = np.asarray(affine.detach().cpu() if isinstance(affine, Tensor) else affine)
    if matrix.shape != (4, 4) or matrix.dtype.kind not in "fiu":
        raise ArgumentError(f"affine: expected a (4, 4) matrix, got {matrix.dtype} of shape {matrix.shape}")
    if source.dtype.kind not in "fiub":
        raise ArgumentError(f"source: expected real numbers, got {source.dtype}")
    data = source[0] if source.ndim == 4 and len(source) == 1 else source
    if channels > 1 and data.ndim == 4 and len(data) == channels:
        return _image(np.moveaxis(data, 0, 3), matrix, file)
    if channels > 1:
        last = "; numpy.moveaxis(source, 3, 0) makes it so" if data.ndim == 4 and data.shape[3] == channels else ""
        raise ArgumentError(f"source: expected ({channels}, X, Y, Z), got shape {source.shape}{last}")
    if data.ndim != 3:
        raise ArgumentError(f"source: expected (X, Y, Z) or (1, X, Y, Z), got shape {source.shape}")
    return _image(data, matrix, file)


def _image(data: np.ndarray, affine: np.ndarray, file: str | None) -> nib.Nifti1Image:
    image = nib.Nifti1Image(data.astype(np.float32), affine.astype(np.float64))
    image.file_map["image"].filename = file  # set_filename takes names of NIfTI alone
    return image


def _file_of_tensor(source: np.ndarray | Tensor) -> str | None:
    """The file that MONAI's ``MetaTensor`` was read from, of several channels the first; None: it does not say."""
    file = getattr(source, "meta", {}).get("filename_or_obj")
    file = file[0] if isinstance(file, list | tuple) and file else file
    return os.fspath(file) if isinstance(file, str | Path) and str(file) else None


def check_space(source: Tensor) -> None:
    """See that the affine of MONAI's ``MetaTensor`` leads to RAS mm, as its readers have it unless told otherwise.

    Raises:
        ArgumentError: it says that it leads elsewhere.
    """
    space = getattr(source, "meta", {}).get("space")
    spaces = space if isinstance(space, list | tuple) else [space]  # of a batch
    if any(one is not None and str(getattr(one, "value", one)).upper() != "RAS" for one in spaces):
        raise ArgumentError(
            f"affine: expected one from voxels to RAS mm, got a MetaTensor of the space {space}: read it by "
            "NibabelReader, or by ITKReader(affine_lps_to_ras=True)"
        )


def file_of(source: Source) -> Path | None:
    """The file that a volume, or its first channel, is read from; None of an image in memory."""
    source = parts_of(source)[0]
    if isinstance(source, OneChannel):
        return source.path
    return Path(source) if isinstance(source, str | Path) else None


def name_of(source: Source | np.ndarray, unnamed: str) -> str:
    """Of the case: that of the file that a volume, or its first channel, was read from; else ``unnamed``."""
    part = source[0] if isinstance(source, list | tuple) and source else parts_of(source)[0]
    if isinstance(part, nib.filebasedimages.FileBasedImage):
        file = part.get_filename()
    else:
        file = _file_of_tensor(part) if isinstance(part, np.ndarray | Tensor) else file_of(part)
    return case_name(os.path.abspath(file)) if file else unnamed  # a folder may be called "."


def files_of(source: Source) -> list[Path | None]:
    """The files that a source is read from, each once; None for what is in memory."""
    return list(dict.fromkeys(file_of(part) for part in parts_of(source)))


def source_sha256(source: Source) -> str:
    """Hash of the bytes of a source's file; of several channels those of all files."""
    hashes = [volume_sha256(file) for file in files_of(source) if file is not None]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def origin_of(source: Source, channels: Sequence[str] = (), name: str = "") -> dict[str, Any]:
    """What a report says of where a volume comes from; two volumes of one case name differ in it, or in their hash.

    Args:
        source: of the volume.
        channels: their names, where there are several.
        name: of a volume in memory.

    Returns:
        ``"input"``, the absolute path of its file; ``"input_channel"`` of a file with a fourth axis; and ``"inputs"``
        of several channels: name, file, and place along its fourth axis, of each.
    """
    file = file_of(source)
    origin: dict[str, Any] = {"input": name if file is None else os.path.abspath(file)}
    if isinstance(source, OneChannel):
        origin["input_channel"] = source.channel
    if isinstance(source, Channels):
        origin["inputs"] = [
            {"channel": called, "file": os.path.abspath(own) if (own := file_of(part)) else "<nibabel image>"}
            | ({"place": part.channel} if isinstance(part, OneChannel) else {})
            for called, part in zip(channels, parts_of(source), strict=True)
        ]
    return origin


def read_volume(source: str | Path | OneChannel | Channels | nib.spatialimages.SpatialImage) -> Volume:
    """The volume with the hash of the bytes it was read from; errors as for :func:`load_image`.

    Of an image in memory it is that of its voxels and its affine.
    """
    files = [file for file in files_of(source) if file is not None and volume_files(file)]
    if len(files) < len(files_of(source)):
        volume = load_image(source)
        return replace(volume, sha256=_voxels_sha256(volume))

    def state() -> list[tuple[int, int, int]]:
        found = [path.stat() for file in files for path in volume_files(file)]
        return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in found]

    before = state()
    digest = source_sha256(source)
    volume = load_image(source)
    if state() != before:
        raise VolumeError(f"{source}: expected a file at rest, it changed while it was read")
    return replace(volume, sha256=digest)


def _voxels_sha256(volume: Volume) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(volume.affine).tobytes())
    for data in (volume.data, *volume.others):
        digest.update(str(data.shape).encode())
        digest.update(np.ascontiguousarray(data.T))
    return digest.hexdigest()
