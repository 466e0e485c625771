"""MetaImage, the format of ITK: a text header (``.mhd``) with voxels in a file beside it, or both in one (``.mha``).

https://itk.org/Wiki/ITK/MetaIO/Documentation
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from .files import metaimage_fields

__all__ = ["METAIMAGE", "open_metaimage"]

METAIMAGE = b"ObjectType"  # how such a header begins
TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
MAX_DEFLATION = 1032  # deflate cannot make more bytes out of one


@dataclass(frozen=True)
class Voxels:
    """The voxels of a file, read when they are asked for; to nibabel an array.

    Attributes:
        path: of the file.
        offset: bytes before the voxels.
        shape: (X, Y, Z).
        dtype: with the file's byte order.
        packed: by zlib.
    """

    path: Path
    offset: int
    shape: tuple[int, int, int]
    dtype: np.dtype
    packed: bool
    ndim: int = 3

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        claimed = int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(self.offset)
            raw = file.read()
        if self.packed:
            unpacking = zlib.decompressobj()
            raw = unpacking.decompress(raw, claimed + 1)
            unpacking.decompress(unpacking.unconsumed_tail, 1)
            if len(raw) == claimed and not unpacking.eof:
                raise ValueError(f"the zlib stream in {self.path.name} ends early")
        if len(raw) != claimed:
            more = "more" if len(raw) > claimed else len(raw)
            raise ValueError(f"expected {claimed} bytes in {self.path.name}, found {more}")
        values = np.frombuffer(raw, self.dtype).reshape(self.shape, order="F")
        # Copied, as an array over bytes cannot be written to.
        return np.array(values, dtype or self.dtype.newbyteorder("="), order="F")


def open_metaimage(path: Path) -> nib.Nifti1Image:
    """Read a header, and no voxel.

    Returns:
        A NIfTI image of it, with an affine to RAS mm; the file's own coordinates are LPS.

    Raises:
        ValueError: a header that cannot be used, or a file that cannot hold what it says.
        FileNotFoundError: the voxels are not beside it.
    """
    fields, after = metaimage_fields(path)
    for key, value in (("ObjectType", "Image"), ("NDims", "3"), ("ElementNumberOfChannels", "1")):
        if fields.get(key, value).lower() != value.lower():
            raise ValueError(f"expected {key} = {value}, found {fields[key]}")
    if "BinaryData" in fields and not _flag(fields, "BinaryData"):
        raise ValueError(f"expected BinaryData = True, found {fields['BinaryData']}")
    if (unit := fields.get("DistanceUnits", "?")) not in ("mm", "?"):
        raise ValueError(f"expected mm as DistanceUnits, found {unit}")
    x, y, z = (int(size) for size in _numbers(fields, 3, "DimSize"))
    shape = (x, y, z)
    if min(shape) < 1:
        raise ValueError(f"expected sizes of 1 and more as DimSize, found {shape}")
    kind = fields.get("ElementType", "")
    if kind not in TYPES:
        raise ValueError(f"expected one of {', '.join(TYPES)} as ElementType, found {kind or 'none'}")
    largest_first = _flag(fields, "BinaryDataByteOrderMSB") or _flag(fields, "ElementByteOrderMSB")
    dtype = np.dtype(TYPES[kind]).newbyteorder(">" if largest_first else "<")
    local = fields["ElementDataFile"].upper() == "LOCAL"
    voxel_path = path if local else path.parent / fields["ElementDataFile"]
    if not voxel_path.is_file():
        raise FileNotFoundError(f"expected its voxels {fields['ElementDataFile']} beside it, found none")
    voxels = Voxels(voxel_path, after if local else 0, shape, dtype, _flag(fields, "CompressedData"))
    claimed, size = int(np.prod(shape, dtype=object)) * dtype.itemsize, voxel_path.stat().st_size
    if not local and not voxels.packed and "HeaderSize" in fields:
        before = int(fields["HeaderSize"])
        voxels = Voxels(voxel_path, size - claimed if before == -1 else before, shape, dtype, False)
    held = (size - voxels.offset) * (MAX_DEFLATION if voxels.packed else 1)
    if not 0 <= voxels.offset <= size or claimed > held:
        raise ValueError(f"expected {claimed} bytes of voxels, which {voxel_path.name} of {size} bytes cannot hold")
    image = nib.Nifti1Image(voxels, _affine(fields))
    image.header.set_xyzt_units("mm")
    return image


def _affine(fields: Mapping[str, str]) -> np.ndarray:
    """(4, 4), voxel to RAS mm. Each row of the matrix is the direction of an axis, as ITK reads it, in LPS."""
    spacing = _numbers(fields, 3, "ElementSpacing", "ElementSize")
    directions = np.reshape(_numbers(fields, 9, "TransformMatrix", "Orientation", "Rotation"), (3, 3))
    # Here, as nibabel makes a quaternion of them, and not every matrix has one.
    if spacing.min() <= 0 or abs(np.linalg.det(directions)) < 1e-3:
        raise ValueError(
            f"expected steps above 0 and axes of their own, found {spacing} mm along {directions.tolist()}"
        )
    affine = np.eye(4)
    affine[:3, :3] = directions.T * spacing
    affine[:3, 3] = _numbers(fields, 3, "Offset", "Position", "Origin")
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _numbers(fields: Mapping[str, str], count: int, *keys: str) -> np.ndarray:
    key = next((key for key in keys if key in fields), keys[0])
    try:
        values = np.array([float(part) for part in fields.get(key, "").split()])
    except ValueError:
        values = np.zeros(0)
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"expected {count} numbers as {key}, found {fields.get(key, 'none')}")
    return values


def _flag(fields: Mapping[str, str], key: str) -> bool:
    """As ITK reads it."""
    return fields.get(key, "False")[:1] in ("T", "t", "1")
