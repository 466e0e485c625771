"""A volume's way to the networks' grid, by reorientation to RAS, spacing, intensities and the head's box, and back.

The way back to the file's grid goes block by block in the order of the file, so that a result on a fine grid is never
held whole in float32: :func:`blocks_on_grid` makes the blocks, :func:`save_on_grid` writes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentTypeError
from ..runtime.transfers import CPU, fetch, to_device
from .geometry import header_geometry, unit_in_mm
from .images import OneChannel, VolumeError, examine, open_image, read_voxels
from .intensities import Preprocessing, head_box, normalise, sound, without_outliers
from .resampling import reoriented, resampling, resampling_matrix, resize

__all__ = [
    "Prepared",
    "Preprocessing",
    "Volume",
    "VolumeError",
    "as_pair",
    "axial_slices",
    "blocks_on_grid",
    "bounding_box",
    "bytes_needed",
    "like",
    "load_volume",
    "mask_shares",
    "prepare",
    "prepare_mask",
    "resize",
    "restore",
    "save_on_grid",
    "scaled_affine",
]

MAX_VOXELS = 2**29  # of the networks' grid: a metre cubed at 1.25 mm
BLOCK_BYTES = 2**22  # of a block on its way to the file's grid; larger ones leave the caches
# Fields of a header that say where its voxels lie.
FORMS = ("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d")
FORMS += ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")


@dataclass(frozen=True)
class Volume:
    """A checked volume as it lies in its file.

    Attributes:
        data: (X, Y, Z) float32, finite.
        affine: (4, 4) float64, voxel to RAS mm.
        header: as it lies in the file; outputs copy its forms and unit.
        name: for messages, the path as given.
        sha256: of the file it was read from, where somebody asked for it.
        others: further channels on the same grid, each as ``data``.
        remarks: what was doubtful about the file, and what became of it, a sentence each; all were warnings.
    """

    data: np.ndarray
    affine: np.ndarray
    header: Any
    name: str
    sha256: str | None = None
    others: tuple[np.ndarray, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A volume on the networks' grid, with what is needed to get back.

    Attributes:
        data: (X, Y, Z) float32 tensor: RAS, resampled, normalised, cut to the head's box; (C, X, Y, Z) of several
            channels. On the device that it was prepared on.
        box: three slices of the resampled RAS grid.
        ras_shape: of the volume after reorientation, before resampling.
        resampled_shape: after resampling, before the cut.
        foreground: (X, Y, Z) bool tensor on the CPU: voxels of ``data`` that count as head in any channel, by the
            rule that sets its box.
        orientation: from the RAS axes back to the file's.
        affine: (4, 4) float64 of ``data``.
        volume: the volume it came from.
        remarks: those of the volume, and what was doubtful about its intensities.
    """

    data: Tensor
    foreground: Tensor
    box: tuple[slice, slice, slice]
    ras_shape: tuple[int, int, int]
    resampled_shape: tuple[int, int, int]
    orientation: np.ndarray
    affine: np.ndarray
    volume: Volume
    remarks: tuple[str, ...] = ()


def bytes_needed(
    source: str | Path | OneChannel | nib.spatialimages.SpatialImage, preprocessing: Preprocessing, a_voxel: float = 120
) -> int:
    """About how much memory a case takes at its peak, from the header alone; 0 where that cannot be read.

    The volume as stored and in float32, a few byte maps and the labels of lesions; and what the networks are given and
    give back, which is ``a_voxel`` bytes for a voxel of theirs.
    """
    try:
        opened = examine(source)
    except (VolumeError, OSError):
        return 0
    voxels = float(np.prod(opened.shape, dtype=float))
    others = float(np.prod(opened.image.dataobj.shape, dtype=float)) - voxels  # channels read beside the one asked for
    ratio = np.prod(nib.affines.voxel_sizes(opened.affine)) / np.prod(preprocessing.spacing)
    stored = opened.image.dataobj.dtype.itemsize
    needed = voxels * (12 + stored) + others * (4 + stored) + min(voxels * ratio, MAX_VOXELS) * a_voxel
    return int(needed) if np.isfinite(needed) else 0


def load_volume(source: str | Path | OneChannel | nib.spatialimages.SpatialImage) -> Volume:
    """Read and check one volume.

    Args:
        source: a path, one channel of a file, or a nibabel image; see :func:`open_image`.

    Returns:
        The volume. With a warning, voxels that are NaN or infinite get the median of their neighbours if they are up to
        1 %, and NaN all around a head becomes background; see :func:`grcsf_fast.data.intensities.sound`.

    Raises:
        VolumeError: as :func:`open_image` and :func:`read_voxels`; a constant volume, or more bad voxels.
        FileNotFoundError: no such file.
    """
    opened = open_image(source)
    name = opened.name
    remarks = list(opened.remarks)
    data = read_voxels(opened, np.float32, remarks)
    data, remark = sound(data, name)
    if remark:
        warnings.warn(f"{name}: {remark}", stacklevel=2)
        remarks.append(remark)
    low, high = float(data.min()), float(data.max())
    if low == high:
        raise VolumeError(f"{name}: expected an image, found a constant volume of value {low:g}")
    return Volume(data, opened.affine, opened.header, name, remarks=tuple(remarks))


def scaled_affine(affine: np.ndarray, shape: tuple[int, ...], target: tuple[int, ...]) -> np.ndarray:
    """Affine of a grid of ``target`` voxels over the same box as ``shape`` voxels under ``affine``."""
    ratio = np.array(shape) / np.array(target)
    scaled = affine.copy()
    scaled[:3, :3] = affine[:3, :3] * ratio
    scaled[:3, 3] = affine[:3, 3] + affine[:3, :3] @ ((ratio - 1) / 2)
    return scaled


def prepare(volume: Volume, preprocessing: Preprocessing, device: torch.device = CPU) -> Prepared:
    """Reorient to RAS, resample, normalise and cut to the head.

    The axes are flipped and permuted to the closest of right, anterior and superior and then scaled along themselves:
    an oblique scan keeps its own planes. The box covered stays exactly the same, so the spacing reached differs from
    the one asked for by under half a voxel over the whole axis. Each channel is normalised by itself.

    On a GPU the volume is copied there once. The processor waits for where the head lies, and for each channel of an
    MRI five times before: for the minimum, a sample, the object, its percentiles and the head's voxels.

    Args:
        volume: as it was read.
        preprocessing: of the networks.
        device: to work on, see :func:`grcsf_fast.runtime.transfers.volumes_on`.

    Raises:
        VolumeError: nothing that looks like a head, or another number of channels than there are intensities for.
        ArgumentTypeError: no volume, a path say, or no preprocessing.
    """
    if not isinstance(volume, Volume):
        raise ArgumentTypeError(
            f"volume: expected a Volume, got {type(volume).__name__}; load_volume reads one from a file"
        )
    if not isinstance(preprocessing, Preprocessing):
        raise ArgumentTypeError(f"preprocessing: expected a Preprocessing, got {type(preprocessing).__name__}")
    if len(preprocessing.others) not in (0, len(volume.others)):
        raise VolumeError(
            f"{volume.name}: expected {1 + len(preprocessing.others)} channels, as there are intensities for, "
            f"found {1 + len(volume.others)}"
        )
    source = nib.io_orientation(volume.affine)
    affine = volume.affine @ nib.orientations.inv_ornt_aff(source, volume.data.shape)
    places = [int(place) for place in source[:, 0]]  # of the file's axes among the RAS axes
    ras_shape = tuple(volume.data.shape[places.index(axis)] for axis in range(3))
    steps = nib.affines.voxel_sizes(affine)
    target = tuple(
        max(1, round(n * step / goal)) for n, step, goal in zip(ras_shape, steps, preprocessing.spacing, strict=True)
    )
    if np.prod(target, dtype=float) > MAX_VOXELS:
        raise VolumeError(
            f"{volume.name}: {ras_shape} voxels of {steps} mm make {target} of {preprocessing.spacing} mm"
        )

    noted = list(volume.remarks)

    def on_grid(data: np.ndarray, channel: int = 0) -> tuple[Tensor, Tensor]:
        intensities = preprocessing.of_channel(channel)
        name = f"{volume.name}, channel {channel}" if channel else volume.name
        data, remarks = without_outliers(data, intensities, name)
        for remark in remarks:
            warnings.warn(f"{name}: {remark}", stacklevel=3)
            noted.append(f"channel {channel}: {remark}" if volume.others else remark)
        # Small first, then turned; with the file's slowest axis first, as its voxels lie in memory.
        turned = tuple(target[place] for place in reversed(places))
        small = resize(to_device(torch.from_numpy(np.ascontiguousarray(data.T)), device), turned)
        return normalise(reoriented(small.permute(2, 1, 0), source), intensities, name)

    normalised, head = on_grid(volume.data)
    if volume.others:
        others = [on_grid(other, channel) for channel, other in enumerate(volume.others, start=1)]
        normalised = torch.stack([normalised, *(data for data, _ in others)])
        head = torch.stack([head, *(also for _, also in others)]).any(0)
    # The processor decides what is computed, and of which size.
    head = fetch({"head": head})["head"]
    box = head_box(head, preprocessing.margin, preprocessing.constant_background)
    new_affine = scaled_affine(affine, ras_shape, target)
    new_affine[:3, 3] += new_affine[:3, :3] @ np.array([part.start for part in box])
    return Prepared(
        normalised[(..., *box)].contiguous(),
        head[box].contiguous(),
        box,
        ras_shape,
        target,
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), source),
        new_affine,
        volume,
        tuple(noted),
    )


def prepare_mask(mask: np.ndarray, prepared: Prepared) -> Tensor:
    """Bring a mask to the grid of ``prepared``: the voxels of which lesion covers at least half.

    What is covered is counted exactly, in whole numbers: a lesion of half a voxel stays however thin it is, and no
    voxel depends on rounding.

    Args:
        mask: (X, Y, Z), lesion where not 0; on the grid of the file that ``prepared`` was read from.
        prepared: the volume it belongs to.

    Returns:
        (X, Y, Z) bool.

    Raises:
        ValueError: another shape.
    """
    shares, whole = mask_shares(mask, prepared)
    covered = 2 * shares >= whole
    return torch.from_numpy(np.ascontiguousarray(covered[prepared.box]))


def mask_shares(mask: np.ndarray, prepared: Prepared) -> tuple[np.ndarray, int]:
    """How much of each voxel of the resampled RAS grid a mask covers; arguments and errors as for :func:`prepare_mask`.

    Returns:
        (X, Y, Z), exact whole numbers, and the number that stands for all of a voxel.
    """
    turned = nib.apply_orientation(np.asarray(mask) != 0, nib.io_orientation(prepared.volume.affine))
    sizes, targets = prepared.ras_shape, prepared.resampled_shape
    if turned.shape != sizes:
        raise ValueError(f"mask: expected the shape of {prepared.volume.name}, got {np.shape(mask)}")
    box = bounding_box(turned)
    if box is None:
        return np.zeros(targets, np.float32), 1
    shares, whole = turned[box], 1
    for axis, (size, target) in enumerate(zip(sizes, targets, strict=True)):
        whole *= size
        # As long as whole numbers are exact in it, the smaller type is the faster one.
        dtype = np.float32 if whole < 2**24 else np.float64
        overlaps = _overlaps(size, target)[:, box[axis]].astype(dtype)
        shares = np.moveaxis(np.tensordot(overlaps, shares.astype(dtype), (1, axis)), 0, axis)
    return shares, whole


def _overlaps(size: int, target: int) -> np.ndarray:
    """(target, size): how far voxels of two grids over one box overlap, in units of 1 / (size * target) of the box."""
    ends, steps = np.arange(target)[:, None] * size, np.arange(size) * target
    return (np.minimum(ends + size, steps + target) - np.maximum(ends, steps)).clip(0)


def blocks_on_grid(values: Tensor, prepared: Prepared) -> Iterator[tuple[int, Tensor]]:
    """Bring values of the networks' grid to the file's grid, some planes at a time.

    Our own code, as a library's resampling makes the whole volume at once, in float32 or wider.

    Args:
        values: (X, Y, Z) on the grid of ``prepared``; 0 outside its box.
        prepared: the volume they belong to.

    Yields:
        The number of the first plane and planes of the file's grid, float32 (planes, second axis, first axis): in the
        order of the file, whose third axis is the slowest. On the device of ``values``, which nobody waits for.
    """
    full = torch.zeros(prepared.resampled_shape, dtype=torch.float32, device=values.device)
    full[prepared.box] = values.float()
    # From RAS to the file's axes: each goes to its place and is turned where the file runs the other way.
    places = [int(place) for place in prepared.orientation[:, 0]]
    axes = [places.index(axis) for axis in range(3)]
    matrices = []
    for axis in axes:
        sizes = prepared.resampled_shape[axis], prepared.ras_shape[axis]
        _, first, last = resampling(*sizes)
        matrix = resampling_matrix(*sizes, values.device)
        turned = prepared.orientation[axis, 1] < 0
        matrices.append((matrix.flip(0), first.flip(0), last.flip(0)) if turned else (matrix, first, last))
    (to_x, _, _), (to_y, _, _), (to_z, first, last) = matrices
    planes = full.permute(axes[2], axes[1], axes[0]) @ to_x.T  # (z,y,X)
    planes = to_y @ planes  # (z,Y,X)
    height, width = planes.shape[1:]
    step = max(1, BLOCK_BYTES // (4 * height * width))
    for start in range(0, len(to_z), step):
        rows = slice(start, start + step)
        used = slice(int(first[rows].min()), int(last[rows].max()) + 1)
        block = to_z[rows, used] @ planes[used].reshape(-1, height * width)
        yield start, block.reshape(-1, height, width)


def restore(values: Tensor, prepared: Prepared) -> np.ndarray:
    """Bring (X, Y, Z) values of the networks' grid back to the file's own grid: float32, 0 outside the box."""
    result = np.empty(prepared.volume.data.shape, np.float32, order="F")
    for start, block in blocks_on_grid(values.cpu(), prepared):
        result[:, :, start : start + len(block)] = block.numpy().transpose(2, 1, 0)
    return result


def axial_slices(values: Tensor, prepared: Prepared, numbers: Sequence[int]) -> list[np.ndarray]:
    """Some slices of the file's grid in RAS orientation, (X, Y) float32, of (X, Y, Z) on the networks' grid."""
    full = torch.zeros(prepared.resampled_shape, dtype=torch.float32, device="cpu")
    full[prepared.box] = values.float().cpu()
    (to_x, *_), (to_y, *_), (to_z, first, last) = (
        resampling(size, target) for size, target in zip(prepared.resampled_shape, prepared.ras_shape, strict=True)
    )
    found = []
    for number in numbers:
        used = slice(int(first[number]), int(last[number]) + 1)
        found.append((to_x @ (full[..., used] @ to_z[number, used]) @ to_y.T).numpy())
    return found


def bounding_box(values: np.ndarray) -> tuple[slice, slice, slice] | None:
    """The smallest box around what is not 0 in (X, Y, Z); None where everything is."""
    box = []
    for axis in range(3):
        found = np.flatnonzero(values.any(tuple(other for other in range(3) if other != axis)))
        if not found.size:
            return None
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(box)


def save_on_grid(path: str | Path, values: Tensor, prepared: Prepared) -> None:
    """Write (X, Y, Z) values of the networks' grid as a float32 ``.nii.gz`` on the file's grid, block by block.

    The bytes depend on the values alone: no time and no name goes into the file.
    """
    from isal import igzip

    empty = np.broadcast_to(np.float32(0), prepared.volume.data.shape)
    header = like(empty, prepared.volume).header.copy()
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    header.set_data_offset(352)
    with Path(path).open("wb") as file, igzip.IGzipFile("", "wb", 1, file, mtime=0) as packed:
        packed.write(header.binaryblock + bytes(4))
        for _, block in blocks_on_grid(values.cpu(), prepared):
            packed.write(memoryview(block.numpy()).cast("B"))


class _KeepsForms:
    """An image that keeps its header's forms, also such as nibabel would replace when it saves."""

    _own: np.ndarray | None = None

    def update_header(self) -> None:
        # Images that nibabel derives from this one, reoriented for instance, are not on the file's grid.
        unchanged = self._own is not None and np.array_equal(self._own, self.affine)
        kept = {field: self.header[field].copy() for field in FORMS} if unchanged else {}
        if kept:
            self.header.set_sform(self.affine, 1)  # so that nibabel asks for no form that cannot be read
        super().update_header()
        for field, value in kept.items():
            self.header[field] = value


class _OnFilesGrid(_KeepsForms, nib.Nifti1Image):
    pass


class _PairOnFilesGrid(_KeepsForms, nib.Nifti1Pair):
    pass


def like(data: np.ndarray, volume: Volume) -> nib.Nifti1Image:
    """A NIfTI image of ``data`` on the grid of ``volume``, with the forms, codes, voxel sizes and unit of its file.

    Its affine is in the file's unit. A header that does not say where the volume lies gets an sform.
    """
    factor = 1 / unit_in_mm(volume.header)
    affine = np.diag([factor, factor, factor, 1.0]) @ volume.affine
    image = _OnFilesGrid(data, affine)
    image.header["xyzt_units"] = volume.header["xyzt_units"]
    try:
        stated, _ = header_geometry(volume.header, volume.data.shape, volume.name)
    except VolumeError:
        stated = None
    if stated is None or not np.allclose(stated, volume.affine):
        image.set_sform(affine, 1)
        return image
    for field in FORMS:
        image.header[field] = volume.header[field]
    image._own = affine
    return image


def as_pair(image: nib.Nifti1Image) -> nib.Nifti1Pair:
    """An image of :func:`like` that nibabel saves as ``.hdr`` and ``.img``, with the same forms, codes and unit."""
    pair = _PairOnFilesGrid(np.asarray(image.dataobj), image.affine)
    for field in FORMS:
        pair.header[field] = image.header[field]
    pair._own = image.affine
    return pair
