"""Volumes through SimpleITK: NRRD files, folders with one DICOM series, and masks in formats of ITK.

SimpleITK leaves DICOM files out that it cannot read, goes on over a missing slice, and checks no checksum of a packed
NRRD file; where a file says nothing of where its voxels lie, it invents that. So this is looked at here.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np

from ..errors import ArgumentError
from .files import is_dicom, seen_files

__all__ = ["NRRD", "open_nrrd", "open_series", "simple_itk", "write_volume"]

NRRD = b"NRRD000"  # how such a file begins
MAX_HEADER = 2**20  # bytes of an NRRD file's
MAX_DEFLATION = 1032  # deflate cannot make more bytes out of one
# Spaces of NRRD that mean a patient's sides; of others ITK takes the numbers as they are.
SPACES = {"left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "lps", "ras", "las"}
MAX_APART = 0.05  # of the step between slices, that one may lie off its place
SHOWN = 5  # series in a message
# Where the pixels of an image lie, and what a slice alone extends over: its thickness, or else the step to the next.
PLACES = {"0028|0030": "PixelSpacing", "0020|0032": "ImagePositionPatient", "0020|0037": "ImageOrientationPatient"}
THICKNESSES = ("0018|0050", "0018|0088")
DICOM_ENDINGS = {".dcm", ".ima"}
TYPES = {
    "UInt8": "u1", "Int8": "i1", "UInt16": "u2", "Int16": "i2", "UInt32": "u4", "Int32": "i4", "UInt64": "u8",
    "Int64": "i8", "Float32": "f4", "Float64": "f8",
}  # fmt: skip
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from LPS, and back


@dataclass(frozen=True)
class Voxels:
    """The voxels of a volume, read when they are asked for; to nibabel an array.

    Attributes:
        read: gives (Z, Y, X), of one's own.
        shape: (X, Y, Z).
        dtype: as they are read.
    """

    read: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype
    ndim: int = 3

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.read().T
        if values.shape != self.shape:
            raise ValueError(f"expected voxels of shape {self.shape}, found {values.shape}")
        return values.astype(dtype or self.dtype, order="F", copy=False)


def open_nrrd(path: Path) -> nib.Nifti1Image:
    """Read the header of an NRRD file, and no voxel.

    Returns:
        A NIfTI image of it, with an affine to RAS mm.

    Raises:
        ValueError: a header that cannot be used, a file that cannot hold what it says, or no SimpleITK.
    """
    fields, after = _nrrd_fields(path)
    space, units = fields.get("space", "none"), fields.get("space units", "mm")
    if space.lower() not in SPACES or "space directions" not in fields:
        raise ValueError(
            f"expected its space and space directions, by the patient's sides, found {space} with "
            f"{fields.get('space directions', 'none')}"
        )
    if not set(units.replace('"', " ").split()) <= {"mm", "millimeter", "millimetre"}:
        raise ValueError(f"expected mm as space units, found {units}")
    encoding = fields.get("encoding", "none").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise ValueError(f"expected raw or gzip as encoding, found {encoding}")
    for key in ("data file", "datafile", "line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(key, "0") != "0":
            raise ValueError(f"expected all of it in one file, found {key}: {fields[key]}")
    sitk = simple_itk("read an NRRD file")
    reader = _reader(sitk, path, "NrrdImageIO")
    size = reader.GetSize()
    if len(size) != 3 or reader.GetNumberOfComponents() != 1:
        raise ValueError(
            f"expected three axes and one number a voxel, found sizes {fields.get('sizes')} and kinds "
            f"{fields.get('kinds', 'none')}"
        )
    for key, count in (("space directions", 9), ("space origin", 3)):  # of what is not there ITK makes steps of 1 and 0
        if not _are_numbers(fields.get(key, "").replace("none", " "), count):  # of an axis that is none of space
            raise ValueError(f"expected {count} numbers as its {key}, found {fields.get(key, 'none')}")
    dtype = _dtype(sitk, reader.GetPixelID())
    packed, claimed = encoding != "raw", int(np.prod(size, dtype=object)) * dtype.itemsize
    held = (path.stat().st_size - after) * (MAX_DEFLATION if packed else 1)
    if claimed > held:
        raise ValueError(f"expected {claimed} bytes of voxels, which {path.name} cannot hold")

    def read() -> np.ndarray:
        found = _bytes_after(path, after, packed, claimed)
        if found != claimed:
            raise ValueError(f"expected {claimed} bytes of voxels, found {'more' if found > claimed else found}")
        return sitk.GetArrayFromImage(_executed(_reader(sitk, path, "NrrdImageIO")))

    affine = _affine(reader.GetOrigin(), reader.GetSpacing(), np.reshape(reader.GetDirection(), (3, 3)))
    return _image(Voxels(read, tuple(size), dtype), affine)


def open_series(folder: Path) -> nib.Nifti1Image:
    """Read the headers of a folder with one DICOM series, and no voxel.

    Returns:
        A NIfTI image of it, with an affine to RAS mm, its third axis along the slices.

    Raises:
        ValueError: several series, files that belong to none, slices that do not lie one behind the other at equal
            distances, colours, or no SimpleITK.
    """
    sitk = simple_itk("read DICOM")
    with _errors_of_itk():
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        names = {one: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), one) for one in series}
    if len(names) != 1:
        named = [_named_series(sitk, one, files) for one, files in names.items()]
        more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        raise ValueError(
            f"expected one series, found {len(named) or 'none'}{': ' if named else ''}{', '.join(named[:SHOWN])}{more}"
            f"{'; put each into a folder of its own' if named else ''}"
        )
    ((identifier, files),) = names.items()
    known = {Path(file).name for file in files} | {"DICOMDIR"}
    # Also what has lost its beginning, or all of it, on the way.
    endings = {Path(file).suffix.lower() for file in files} & DICOM_ENDINGS
    unread = [
        path.name
        for path in seen_files(folder)
        if path.name not in known and (is_dicom(path) or path.suffix.lower() in endings or path.stat().st_size == 0)
    ]
    if unread:
        raise ValueError(
            f"expected images of the series {identifier} alone, found {len(unread)} files that are damaged or none, "
            f"the first of them {unread[0]}"
        )
    readers = [_reader(sitk, Path(file), "GDCMImageIO") for file in files]
    first, kinds = readers[0], {reader.GetPixelID() for reader in readers}
    if any(reader.GetNumberOfComponents() != 1 for reader in readers):
        raise ValueError("expected one number a voxel, found colours")
    for file, reader in zip(files, readers, strict=True):
        _check_placed(Path(file).name, reader)
    # Scale factors may differ from slice to slice.
    kind = first.GetPixelID() if len(kinds) == 1 else sitk.sitkFloat64
    dtype = _dtype(sitk, kind)
    if len(readers) == 1:
        size, origin, direction = first.GetSize(), first.GetOrigin(), np.reshape(first.GetDirection(), (3, 3))
        spacing = (*first.GetSpacing()[:2], _thickness(first))
    else:
        size, origin, spacing, direction = _stacked(readers)

    def read() -> np.ndarray:
        reader = sitk.ImageFileReader() if len(files) == 1 else sitk.ImageSeriesReader()
        if len(files) == 1:
            reader.SetFileName(files[0])
        else:
            reader.SetFileNames(files)
        reader.SetImageIO("GDCMImageIO")
        reader.SetOutputPixelType(kind)
        return sitk.GetArrayFromImage(_executed(reader))

    return _image(Voxels(read, tuple(size), dtype), _affine(origin, spacing, direction))


def _check_placed(name: str, reader: Any) -> None:
    """See that a file says itself where its pixels lie: GDCM takes 1 mm and the axes of the body where it does not, and
    where it says what cannot be."""
    if reader.GetDimension() > 2 and reader.GetSize()[2] > 1:
        raise ValueError(
            f"expected a file for each slice, found {reader.GetSize()[2]} frames in {name}, whose places are not read; "
            "convert it, with dcm2niix for instance"
        )
    if absent := [what for tag, what in PLACES.items() if not _text_of(reader, tag)]:
        raise ValueError(
            f"expected an image with a place in the body, found {name} without {' and '.join(absent)}, as of a screen "
            "shot or after an anonymiser"
        )
    direction = np.reshape(reader.GetDirection(), (3, 3))
    taken = (reader.GetSpacing()[1::-1], reader.GetOrigin(), direction[:, :2].T.ravel())
    for (tag, what), found in zip(PLACES.items(), taken, strict=True):
        if not _is_taken(_text_of(reader, tag), found):
            raise ValueError(f"expected {what} that can be used, found {_text_of(reader, tag)} in {name}")


def _is_taken(text: str, found: Sequence[float] | np.ndarray) -> bool:
    """Whether numbers of a file are those that GDCM found; of six, two directions, the lengths may differ."""
    with suppress(ValueError), np.errstate(all="ignore"):
        stated = np.array([float(part) for part in text.split("\\")])
        if len(stated) == 6:
            stated = np.concatenate([one / np.linalg.norm(one) for one in (stated[:3], stated[3:])])
        return len(stated) == len(found) and np.allclose(stated, found, atol=1e-3)
    return False


def _text_of(reader: Any, tag: str) -> str:
    return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""


def _thickness(reader: Any) -> float:
    """Of a slice that has none beside it, in mm; GDCM takes 1 for that of a CT."""
    for tag in THICKNESSES:
        with suppress(ValueError):
            return float(_text_of(reader, tag))
    raise ValueError("expected the SliceThickness of a single slice, found none: its volume is not known")


def write_volume(path: str | Path, data: np.ndarray, affine: np.ndarray) -> None:
    """Write a volume packed, in the format of the file's ending.

    Args:
        path: ending in ``.mha`` or ``.nrrd``.
        data: (X, Y, Z), bool or numbers.
        affine: (4, 4), voxel to RAS mm; no column may be 0.

    Raises:
        ArgumentError: no SimpleITK.
        OSError: the file cannot be written.
    """
    sitk = simple_itk(f"write a file ending in {Path(path).suffix}")
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    lps = TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    with _errors_of_itk(kind=OSError):
        sitk.WriteImage(image, str(path), useCompression=True)


def simple_itk(purpose: str) -> ModuleType:
    """The package.

    Raises:
        ArgumentError: it is missing, for this purpose.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise ArgumentError(
            f"expected the package SimpleITK, to {purpose}, found none; in a checkout of grcsf-fast: "
            'pip install ".[io]"'
        ) from error
    return SimpleITK


def _reader(sitk: ModuleType, path: Path, image_io: str) -> Any:
    """Of one file, its header read."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    with _errors_of_itk(f"{path.name}: "):
        reader.ReadImageInformation()
    return reader


def _executed(reader: Any) -> Any:
    with _errors_of_itk():
        return reader.Execute()


@contextmanager
def _errors_of_itk(where: str = "", kind: type[Exception] = ValueError) -> Iterator[None]:
    """Its messages begin with places in its sources: of their lines the last."""
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise kind(f"{where}{lines[-1] if lines else 'SimpleITK failed'}") from error


def _dtype(sitk: ModuleType, kind: int) -> np.dtype:
    for name, dtype in TYPES.items():
        if kind == getattr(sitk, f"sitk{name}"):
            return np.dtype(dtype)
    raise ValueError(f"expected integers or floating-point numbers, found {sitk.GetPixelIDValueAsString(kind)}")


def _image(voxels: Voxels, affine: np.ndarray) -> nib.Nifti1Image:
    # The type by name, as nibabel asks for where it is one of 64 bits.
    image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    image.header.set_xyzt_units("mm")
    return image


def _affine(origin: Sequence[float], spacing: Sequence[float], direction: np.ndarray) -> np.ndarray:
    """(4, 4), voxel to RAS mm, of what ITK says in LPS; each column of (3, 3) is the direction of an axis."""
    if min(spacing) <= 0 or not abs(np.linalg.det(direction)) > 1e-3:
        raise ValueError(f"expected steps above 0 and axes of their own, found {spacing} mm along {direction.tolist()}")
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = origin
    return TO_RAS @ affine


def _stacked(readers: Sequence[Any]) -> tuple[Sequence[int], Sequence[float], Sequence[float], np.ndarray]:
    """Size, origin, spacing and direction of slices in their order."""
    first, count = readers[0], len(readers)
    expected = (*first.GetSize()[:2], 1)
    directions = np.array([reader.GetDirection() for reader in readers])
    spacings = np.array([reader.GetSpacing()[:2] for reader in readers])
    if any(reader.GetSize() != expected for reader in readers) or np.ptp(spacings, axis=0).max() > 1e-4:
        raise ValueError(f"expected slices of one size, as of the first of them {expected[:2]}, found others")
    if np.ptp(directions, axis=0).max() > 1e-3:
        raise ValueError("expected parallel slices, found several directions, as of a localiser")
    origins = np.array([reader.GetOrigin() for reader in readers])
    step = (origins[-1] - origins[0]) / (count - 1)
    length = float(np.linalg.norm(step))
    off = np.linalg.norm(origins - origins[0] - np.arange(count)[:, None] * step, axis=1).max()
    if not length or off > MAX_APART * length:
        raise ValueError(
            f"expected {count} slices at equal distances, found one {off:.3g} mm off its place at steps of "
            f"{length:.3g} mm: a slice is missing, or there are several volumes"
        )
    direction = np.reshape(first.GetDirection(), (3, 3)).copy()
    direction[:, 2] = step / length
    return (*expected[:2], count), origins[0].tolist(), (*first.GetSpacing()[:2], length), direction


def _named_series(sitk: ModuleType, identifier: str, files: Sequence[str]) -> str:
    reader = _reader(sitk, Path(files[0]), "GDCMImageIO")
    description = _text_of(reader, "0008|103e")
    return f"{identifier} ({f'{description}, ' if description else ''}{len(files)} files)"


def _nrrd_fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields of an NRRD header, their names in lower case, and the place in bytes where it ends."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while line := file.readline(MAX_HEADER).strip():
            key, colon, value = line.decode(errors="replace").partition(": ")
            if colon and not key.startswith("#"):
                fields[key.strip().lower()] = value.strip()
            if file.tell() > MAX_HEADER:
                raise ValueError(f"expected an empty line at the end of its header, found none in {MAX_HEADER} bytes")
        return fields, file.tell()


def _are_numbers(text: str, count: int) -> bool:
    """Whether vectors, such as ``(1,0,0) (0,1,0)``, hold so many finite numbers and nothing else."""
    with suppress(ValueError):
        values = [float(part) for part in re.findall(r"[^\s(),]+", text)]
        return len(values) == count and bool(np.isfinite(values).all())
    return False


def _bytes_after(path: Path, offset: int, packed: bool, limit: int) -> int:
    """How many there are, unpacked, or a number above ``limit``; a packed stream is read to its checksum."""
    if not packed:
        return path.stat().st_size - offset
    try:
        from isal import igzip as unpacking
    except ImportError:
        unpacking = gzip
    count = 0
    with path.open("rb") as file:
        file.seek(offset)
        with unpacking.GzipFile(fileobj=file) as stream:
            while count <= limit and (chunk := stream.read(2**20)):
                count += len(chunk)
    return count
