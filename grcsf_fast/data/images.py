"""Opening and reading volumes, one rule for images and masks: what a file is, where it lies, and every byte of it.

The bytes decide, not the name: a gzip stream is unpacked whatever the file is called, and read to its end, so that its
checksum counts.
"""

from __future__ import annotations

import gzip
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from ..runtime.memory import memory_budget
from .files import header_and_voxels, holds_dicom
from .geometry import VolumeError, header_geometry, image_geometry
from .itk import NRRD, open_nrrd, open_series
from .metaimage import METAIMAGE, open_metaimage

__all__ = [
    "OneChannel",
    "OpenImage",
    "VolumeError",
    "bytes_to_read",
    "check_memory",
    "examine",
    "open_image",
    "read_voxels",
]

MAX_OFFSET = 2**24  # bytes before the voxels
MAX_DEFLATION = 1032  # deflate cannot make more bytes out of one
HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
IMAGES = {nib.Nifti1Header: nib.Nifti1Image, nib.Nifti2Header: nib.Nifti2Image}
GZIP = b"\x1f\x8b"
PIECE = 2**20  # bytes of a file read at once
MAPS_BYTES = 3  # of a voxel: which are no numbers, which are lesion
OTHERS = {
    b"BZh": "a bzip2 file; unpack it first",
    b"\x28\xb5\x2f\xfd": "a Zstandard file; unpack it first",
    b"\xfd7zXZ": "an xz file; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x00\x05\x16\x07": "an AppleDouble file, which macOS keeps beside the file itself",
    b"\x89HDF": "an HDF5 file (MINC?); convert it to NIfTI",
    b"version https://git-lfs": "a pointer of Git LFS in its place; fetch the file itself",
}  # fmt: skip


@dataclass(frozen=True)
class OneChannel:
    """A volume that is one channel of a 4-D file.

    Attributes:
        path: of the file.
        channel: its place along the fourth axis, from 0.
    """

    path: Path
    channel: int

    def __str__(self) -> str:
        return f"{self.path} (channel {self.channel})"


@dataclass(frozen=True)
class OpenImage:
    """An image of which the header is read and checked, and no voxel.

    Attributes:
        image: nibabel's, as it was given, or made of the file, of NIfTI without affine; :func:`read_voxels` reads it.
        shape: (3,) voxels, axes of length 1 beyond the third dropped.
        affine: (4, 4) float64, voxel to RAS mm whatever the file's unit.
        name: for messages, the path as given.
        header: as it lies in the file, before nibabel repairs it.
        remarks: what is doubtful about its geometry, a sentence each.
        channel: the one to be read of a file of several; None: the file holds one volume.
    """

    image: nib.Nifti1Pair
    shape: tuple[int, int, int]
    affine: np.ndarray
    name: str
    header: Any
    remarks: tuple[str, ...]
    channel: int | None = None


def open_image(source: str | Path | OneChannel | nib.spatialimages.SpatialImage) -> OpenImage:
    """Read and check the header of an image or mask; one warning for each doubt about its geometry.

    Args:
        source: path of a NIfTI file (``.nii``, ``.nii.gz``, or either file of an ``.hdr`` and ``.img`` pair), of a
            MetaImage (``.mhd``, ``.mha``), of an NRRD file (``.nrrd``) or of a folder with one DICOM series; one
            channel of a NIfTI file; or a nibabel image.

    Raises:
        VolumeError: none of these, not 3-D, empty, colours or complex numbers, larger than its file, or no form of the
            affine can be true.
        FileNotFoundError: no such file.
    """
    opened = examine(source)
    for remark in opened.remarks:
        warnings.warn(f"{opened.name}: {remark}", stacklevel=3)
    return opened


def examine(source: str | Path | OneChannel | nib.spatialimages.SpatialImage) -> OpenImage:
    """:func:`open_image` without warnings."""
    channel = source.channel if isinstance(source, OneChannel) else None
    if isinstance(source, str | Path | OneChannel):
        name = str(source)
        image, header = _open_file(source.path if isinstance(source, OneChannel) else Path(source), name)
    else:
        image, header = source, getattr(source, "header", None)
        name = image.get_filename() if isinstance(image, nib.filebasedimages.FileBasedImage) else None
        name = name or "<nibabel image>"
        if not isinstance(image, nib.Nifti1Pair):
            raise VolumeError(f"{name}: expected a path or a NIfTI image of nibabel, found {type(image).__name__}")
    shape = _shape(image, name, channel)
    _check_type(image.dataobj.dtype, name)
    if isinstance(source, str | Path | OneChannel):
        affine, remarks = header_geometry(header, shape, name)
    else:
        affine, remarks = image_geometry(image, shape, name)
    opened = OpenImage(image, shape, affine, name, header, tuple(remarks), channel)
    _check_size(opened)
    return opened


def read_voxels(opened: OpenImage, dtype: Any = None, remarks: list[str] | None = None) -> np.ndarray:
    """The voxels of an open image with the file's scaling applied.

    A file is read to its end: a checksum of gzip that does not fit is an error, and so is a stream that ends early.

    Args:
        opened: from :func:`open_image`.
        dtype: of the result; None: the file's own in this machine's byte order, or float64 where it scales.
        remarks: gets the warnings too, a sentence each.

    Returns:
        (X, Y, Z).

    Raises:
        VolumeError: the file ends early, is damaged, or holds over twice what its header says.
    """
    proxy = opened.image.dataobj
    path = _path(proxy)
    rest = 0
    try:
        # Overflow in scale factors that no scanner writes gives infinite voxels, which callers look for.
        with np.errstate(all="ignore"):
            if path is None:
                data = np.asarray(proxy, dtype=dtype)
            else:
                with _stream(path) as stream:
                    spec = (proxy.shape, proxy.dtype, proxy.offset, proxy.slope, proxy.inter)
                    data = np.asarray(ArrayProxy(_InPieces(stream), spec, mmap=False), dtype=dtype)
                    rest = _rest(stream, _claimed(opened))
    # zlib.error and nibabel's own errors derive from Exception directly; all mean a file that ends early or lies.
    except Exception as error:
        # An error without words is often one of memory.
        reason = "there is not enough memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
        raise VolumeError(
            f"{opened.name}: expected {np.prod(opened.shape)} voxels, reading them failed: {reason}"
        ) from error
    if rest > _claimed(opened):
        raise VolumeError(
            f"{opened.name}: expected {_claimed(opened)} bytes of voxels of shape {proxy.shape} and type "
            f"{proxy.dtype}, found over twice as many; the header is not that of the voxels"
        )
    if rest:
        remark = f"{rest} bytes beyond the voxels were ignored"
        warnings.warn(f"{opened.name}: {remark}", stacklevel=3)
        if remarks is not None:
            remarks.append(remark)
    if opened.channel is not None:
        data = data[:, :, :, opened.channel].copy(order="K")  # so that the other channels do not stay in memory
    data = data.reshape(opened.shape, order="F" if data.flags.f_contiguous else "C")
    return data if data.dtype.isnative else data.astype(data.dtype.newbyteorder("="))


def bytes_to_read(opened: OpenImage) -> int:
    """About how much memory the voxels take as they are read and looked at, from the header alone."""
    proxy = opened.image.dataobj
    scaled = (getattr(proxy, "slope", 1), getattr(proxy, "inter", 0)) != (1, 0)
    voxels = int(np.prod(opened.shape, dtype=object))
    return _claimed(opened) + voxels * (MAPS_BYTES + 8 * scaled)


def check_memory(*opened: OpenImage) -> None:
    """See that there is memory for the voxels of files that are read for one work.

    Raises:
        VolumeError: they take more than :func:`grcsf_fast.runtime.memory.memory_budget`, by their headers.
    """
    needed, free = sum(map(bytes_to_read, opened)), memory_budget()
    if needed > free:
        largest = max(opened, key=bytes_to_read)
        raise VolumeError(
            f"{largest.name}: expected voxels that memory has room for, {free / 2**30:.3g} GiB, found shape "
            f"{largest.shape}, which takes {needed / 2**30:.3g} GiB"
            + (" with the other files of its case" if len(opened) > 1 else "")
        )


def _open_file(path: Path, name: str) -> tuple[nib.Nifti1Pair, Any]:
    """The image, whose header nibabel has repaired where it can, and the header as it is."""
    if not path.is_file() and not holds_dicom(path):
        raise FileNotFoundError(f"{name}: expected a NIfTI file, found {'a folder' if path.is_dir() else 'none'}")
    if (other := _other_format(path)) is not None:
        kind, read = other
        try:
            image = read(path)
        except (OSError, ValueError) as error:
            raise VolumeError(f"{name}: expected {kind}, could not read it: {error}") from error
        return image, image.header
    header_path, voxel_path = header_and_voxels(path)
    for part in (header_path, voxel_path):
        if not part.is_file():
            raise VolumeError(f"{name}: expected its other half {part.name} beside it, found none")
    try:
        header = _read_header(header_path)
        repaired = header.copy()
        repaired.check_fix()
        single = header["magic"].item().startswith(b"n+")
        if single != (header_path == voxel_path):
            raise ValueError("its header is that of " + ("a single file" if single else "a pair of .hdr and .img"))
        offset = int(repaired.get_data_offset())
        if offset > MAX_OFFSET:
            raise ValueError(f"expected at most {MAX_OFFSET} bytes before the voxels, found {offset}")
        # Not mapped: a file that shrinks while it is at work would end the process.
        proxy = ArrayProxy(str(voxel_path), repaired, mmap=False)
        return IMAGES[type(header)](proxy, None, repaired), header
    # A rotten gzip stream raises zlib.error, an unknown data type nibabel's own; only Exception is their base.
    except Exception as error:
        raise VolumeError(f"{name}: expected a NIfTI volume, could not read it: {error}") from error


def _other_format(path: Path) -> tuple[str, Callable[[Path], nib.Nifti1Image]] | None:
    """What it is and who opens it; None: NIfTI, or nothing that is read."""
    if path.is_dir():
        return "a DICOM series", open_series
    with path.open("rb") as file:
        start = file.read(len(METAIMAGE))
    if start == METAIMAGE:
        return "a MetaImage", open_metaimage
    return ("an NRRD file", open_nrrd) if start.startswith(NRRD) else None


def _read_header(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(64)
    for magic, what in OTHERS.items():
        if start.startswith(magic):
            raise ValueError(f"this is {what}")
    with _stream(path) as stream:
        raw = stream.read(540)
    for size, header in HEADERS.items():
        for order in "<>":
            if len(raw) >= size and struct.unpack(f"{order}i", raw[:4])[0] == size:
                if size == 348 and raw[344:347] not in (b"n+1", b"ni1"):
                    raise ValueError("this is an ANALYZE 7.5 header, which does not tell left from right")
                return header(raw[:size], order, check=False)
    if raw[:4] == b"\0\0\0\1":  # its version, the most significant byte first
        raise ValueError("this is an MGH file of FreeSurfer; convert it to NIfTI, with mri_convert for instance")
    if raw[128:132] == b"DICM":
        raise ValueError("this is a DICOM file; give the folder with its series")
    raise ValueError(f"its first {len(raw)} bytes are no NIfTI header")


def _stream(path: Path) -> BinaryIO:
    """The unpacked bytes."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
    if not packed:
        return path.open("rb")
    try:
        from isal import igzip
    except ImportError:  # it comes with the programs; reading alone needs no more than nibabel
        return gzip.open(path)
    return igzip.open(path)


class _InPieces:
    """A stream that fills a buffer piece by piece: gzip's own ``readinto`` holds all of it a second time."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def readinto(self, buffer: Any) -> int:
        view, filled = memoryview(buffer), 0
        while filled < len(view) and (piece := self._stream.read(min(PIECE, len(view) - filled))):
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled


def _path(proxy: Any) -> Path | None:
    """Of the file with the voxels; None where they are in memory."""
    name = getattr(proxy, "file_like", None)
    return Path(name) if isinstance(name, str | Path) else None


def _shape(image: nib.Nifti1Pair, name: str, channel: int | None) -> tuple[int, int, int]:
    shape = tuple(int(size) for size in image.shape)
    if channel is not None:
        if len(shape) < 4 or not 0 <= channel < shape[3] or any(size != 1 for size in shape[4:]):
            raise VolumeError(f"{name}: expected a file with this channel, found shape {shape}")
        shape = shape[:3]
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        frames = int(np.prod(shape[3:], dtype=object))
        more = f" ({frames} volumes; split them first)" if len(shape) > 3 and frames > 1 else ""
        raise VolumeError(f"{name}: expected one 3-D volume, found shape {shape}{more}")
    if min(shape) < 1:
        raise VolumeError(f"{name}: expected voxels, found an empty volume of shape {shape[:3]}")
    return shape[:3]


def _check_type(dtype: np.dtype, name: str) -> None:
    if dtype.names:
        raise VolumeError(f"{name}: expected one number a voxel, found colours ({', '.join(dtype.names)})")
    if dtype.kind == "c":
        raise VolumeError(f"{name}: expected real numbers, found complex ones ({dtype})")
    if dtype.kind not in "iufb":
        raise VolumeError(f"{name}: expected integers or floating-point numbers, found {dtype}")


def _claimed(opened: OpenImage) -> int:
    return int(np.prod(opened.image.dataobj.shape, dtype=object)) * opened.image.dataobj.dtype.itemsize


def _check_size(opened: OpenImage) -> None:
    """A header may claim anything; the file's size says whether it can be true before memory is asked for."""
    path = _path(opened.image.dataobj)
    if path is None:
        return
    voxels = np.prod(opened.image.dataobj.shape, dtype=object)
    claim = f"{opened.name}: expected {voxels} voxels of {_claimed(opened)} bytes"
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
    size = path.stat().st_size
    if packed and _claimed(opened) > MAX_DEFLATION * size:
        raise VolumeError(f"{claim}, which no compressed file of {size} bytes can hold")
    size = max(0, size - int(opened.image.dataobj.offset))
    if not packed and _claimed(opened) > size:
        raise VolumeError(f"{claim}, found {size} bytes")


def _rest(stream: BinaryIO, limit: int) -> int:
    """Reads on to the end of a file, or until there are more bytes than ``limit``; returns how many there were."""
    rest = 0
    while rest <= limit and (chunk := stream.read(PIECE)):
        rest += len(chunk)
    return rest
