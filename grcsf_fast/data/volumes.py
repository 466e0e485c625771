"""NIfTI in and out: reading with checks, reorientation to RAS, spacing, intensity recipes, and the way back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Prepared",
    "Preprocessing",
    "Volume",
    "VolumeError",
    "like",
    "load_volume",
    "prepare",
    "prepare_mask",
    "resize",
    "restore",
    "scaled_affine",
]

MAX_VOXELS = 2**29  # of the networks' grid: a metre cubed at 1.25 mm
MAX_BAD_SHARE = 0.01  # of voxels that are NaN or infinite; above it a volume is refused


class VolumeError(ValueError):
    """A volume that cannot be used; the message names the file, what was expected and what was found."""


@dataclass(frozen=True)
class Preprocessing:
    """How a volume becomes what the networks saw in training; stored in the bundle.

    Attributes:
        spacing: (3,) mm, x, y, z after reorientation to RAS.
        modality: ``"mri"``: cut at the upper percentile, then z-score within the head; ``"ct"``: cut at ``hu_window``
            and scaled to [-1, 1].
        percentiles: lower and upper, of the voxels above an eighth of the mean; the mean between them sets what
            counts as head; MRI only.
        hu_window: lower and upper Hounsfield units; CT only.
        margin: voxels kept around the head's box.
    """

    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0)
    modality: str = "mri"
    percentiles: tuple[float, float] = (0.5, 99.5)
    hu_window: tuple[float, float] = (-160.0, 240.0)
    margin: int = 2

    def __post_init__(self) -> None:
        if self.modality not in ("mri", "ct"):
            raise ValueError(f"modality: expected 'mri' or 'ct', got {self.modality!r}")
        if len(self.spacing) != 3 or not all(step > 0 for step in self.spacing):
            raise ValueError(f"spacing: expected three numbers above 0 in mm, got {self.spacing}")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles: expected 0 <= lower < upper <= 100, got {self.percentiles}")
        if not self.hu_window[0] < self.hu_window[1]:
            raise ValueError(f"hu_window: expected lower < upper, got {self.hu_window}")


@dataclass(frozen=True)
class Volume:
    """A checked volume as it lies in its file.

    Attributes:
        data: (X, Y, Z) float32, finite.
        affine: (4, 4) float64.
        header: of the file; outputs copy its codes and units.
        name: for messages, the path as given.
    """

    data: np.ndarray
    affine: np.ndarray
    header: Any
    name: str


@dataclass(frozen=True)
class Prepared:
    """A volume on the networks' grid, with what is needed to get back.

    Attributes:
        data: (X, Y, Z) float32 tensor: RAS, resampled, normalised, cut to the head's box.
        box: three slices of the resampled RAS grid.
        ras_shape: of the volume after reorientation, before resampling.
        resampled_shape: after resampling, before the cut.
        orientation: from the RAS axes back to the file's.
        affine: (4, 4) float64 of ``data``.
        volume: the volume it came from.
    """

    data: Tensor
    box: tuple[slice, slice, slice]
    ras_shape: tuple[int, int, int]
    resampled_shape: tuple[int, int, int]
    orientation: np.ndarray
    affine: np.ndarray
    volume: Volume


def load_volume(source: str | Path | nib.spatialimages.SpatialImage) -> Volume:
    """Read and check one volume.

    Args:
        source: a path to a ``.nii`` or ``.nii.gz``, or a nibabel image. A fourth axis of length 1 is dropped.

    Returns:
        The volume; up to 1 % of voxels that are NaN or infinite are set to 0 with a warning.

    Raises:
        VolumeError: not NIfTI, truncated, not 3-D, empty or constant, more bad voxels, or an unusable affine.
        FileNotFoundError: no such file.
    """
    if isinstance(source, str | Path):
        name = str(source)
        if not Path(source).is_file():
            raise FileNotFoundError(f"{name}: expected a NIfTI file, found none")
        try:
            image = nib.load(source)
        # A rotten gzip stream raises zlib.error, an unknown data type nibabel's own; only Exception is their base.
        except Exception as error:
            raise VolumeError(f"{name}: expected a NIfTI volume, could not read it: {error}") from error
    else:
        image = source
        name = image.get_filename() or "<nibabel image>"
    if not isinstance(image, nib.Nifti1Image):
        raise VolumeError(f"{name}: expected a NIfTI volume, found {type(image).__name__}")
    shape = image.shape
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3:
        raise VolumeError(f"{name}: expected one 3-D volume, found shape {image.shape}")
    if 0 in shape:
        raise VolumeError(f"{name}: expected voxels, found an empty volume of shape {shape}")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all():
        raise VolumeError(f"{name}: expected a finite affine, found {affine.tolist()}")
    if (unit := int(image.header["xyzt_units"]) & 7) in (1, 3):
        raise VolumeError(f"{name}: expected millimetres, found {'metres' if unit == 1 else 'micrometres'}")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise VolumeError(f"{name}: expected an invertible affine, found {affine.tolist()}")
    try:
        data = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    # zlib.error and nibabel's own errors derive from Exception directly; all mean a file that ends early or lies.
    except Exception as error:
        raise VolumeError(f"{name}: expected {np.prod(shape)} voxels, reading them failed: {error}") from error
    finite = np.isfinite(data)
    bad = data.size - int(finite.sum())
    if bad > MAX_BAD_SHARE * data.size:
        raise VolumeError(
            f"{name}: expected at most {MAX_BAD_SHARE:.0%} NaN or infinite voxels, found {bad} of {data.size} "
            f"({bad / data.size:.1%})"
        )
    if bad:
        warnings.warn(f"{name}: {bad} NaN or infinite voxels of {data.size} were set to 0", stacklevel=2)
        data = np.where(finite, data, np.float32(0))
    if data.min() == data.max():
        raise VolumeError(f"{name}: expected an image, found a constant volume of value {data.flat[0]:g}")
    return Volume(data, affine, image.header, name)


def resize(volume: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Linear resampling between grids that cover the same box: (X, Y, Z) -> shape, float32.

    Where it shrinks, a triangle filter of the new voxel's width keeps fine detail from turning into noise.
    """
    if tuple(volume.shape) == tuple(shape):
        return volume.float()
    volume = volume.float()
    # The antialiased filter exists for two axes: first y and z of every x, then x with (y, z) as one axis.
    planes = F.interpolate(volume[:, None], size=shape[1:], mode="bilinear", align_corners=False, antialias=True)[:, 0]
    lines = planes.reshape(1, 1, volume.shape[0], -1)
    lines = F.interpolate(lines, size=(shape[0], lines.shape[3]), mode="bilinear", align_corners=False, antialias=True)
    return lines.reshape(shape)


def scaled_affine(affine: np.ndarray, shape: tuple[int, ...], target: tuple[int, ...]) -> np.ndarray:
    """Affine of a grid of ``target`` voxels over the same box as ``shape`` voxels under ``affine``."""
    ratio = np.array(shape) / np.array(target)
    scaled = affine.copy()
    scaled[:3, :3] = affine[:3, :3] * ratio
    scaled[:3, 3] = affine[:3, 3] + affine[:3, :3] @ ((ratio - 1) / 2)
    return scaled


def prepare(volume: Volume, preprocessing: Preprocessing) -> Prepared:
    """Reorient to RAS, resample, normalise and cut to the head.

    The axes are flipped and permuted to the closest of right, anterior and superior and then scaled along themselves:
    an oblique scan keeps its own planes. The box covered stays exactly the same, so the spacing reached differs from
    the one asked for by under half a voxel over the whole axis.

    Raises:
        VolumeError: nothing that looks like a head.
    """
    source = nib.io_orientation(volume.affine)
    data = nib.apply_orientation(volume.data, source)
    affine = volume.affine @ nib.orientations.inv_ornt_aff(source, volume.data.shape)
    ras_shape = tuple(data.shape)
    steps = nib.affines.voxel_sizes(affine)
    target = tuple(
        max(1, round(n * step / goal)) for n, step, goal in zip(ras_shape, steps, preprocessing.spacing, strict=True)
    )
    if np.prod(target, dtype=float) > MAX_VOXELS:
        raise VolumeError(
            f"{volume.name}: {ras_shape} voxels of {steps} mm make {target} of {preprocessing.spacing} mm"
        )
    resampled = resize(torch.from_numpy(np.ascontiguousarray(data)), target)
    normalised, head = _normalise(resampled, preprocessing, volume.name)
    box = _head_box(head, preprocessing.margin)
    new_affine = scaled_affine(affine, ras_shape, target)
    new_affine[:3, 3] += new_affine[:3, :3] @ np.array([part.start for part in box])
    return Prepared(
        normalised[box].contiguous(),
        box,
        ras_shape,
        target,
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), source),
        new_affine,
        volume,
    )


def prepare_mask(mask: np.ndarray, prepared: Prepared) -> Tensor:
    """Bring a mask of the same file grid to the grid of ``prepared``: (X, Y, Z) bool, at least half covered."""
    data = nib.apply_orientation(mask.astype(np.float32), nib.io_orientation(prepared.volume.affine))
    return resize(torch.from_numpy(np.ascontiguousarray(data)), prepared.resampled_shape)[prepared.box] >= 0.5


def restore(values: Tensor, prepared: Prepared) -> np.ndarray:
    """Bring (X, Y, Z) values of the networks' grid back to the file's own grid: float32, 0 outside the box."""
    full = torch.zeros(prepared.resampled_shape)
    full[prepared.box] = values.float().cpu()
    data = resize(full, prepared.ras_shape).numpy()
    return np.ascontiguousarray(nib.apply_orientation(data, prepared.orientation))


def like(data: np.ndarray, volume: Volume) -> nib.Nifti1Image:
    """A NIfTI image of ``data`` on the grid, affine, codes and units of ``volume``."""
    image = nib.Nifti1Image(data, volume.affine)
    image.header["xyzt_units"] = volume.header["xyzt_units"]
    qform, sform = int(volume.header["qform_code"]), int(volume.header["sform_code"])
    image.set_sform(volume.affine, sform if sform or qform else 1)
    try:
        quaternion = volume.header.get_qform() if qform else volume.affine
    except (ValueError, nib.spatialimages.HeaderDataError):
        quaternion = volume.affine  # the file's own is no rotation; its sform is what places the volume
    image.set_qform(quaternion, qform)
    return image


def _normalise(data: Tensor, preprocessing: Preprocessing, name: str) -> tuple[Tensor, Tensor]:
    """Normalised intensities and the head's mask, both (X, Y, Z)."""
    if preprocessing.modality == "ct":
        low, high = preprocessing.hu_window
        return (data.clamp(low, high) - low) / (high - low) * 2 - 1, data > -300
    # SPM's global: the voxels above an eighth of the mean are the object.
    data = data - min(float(data.min()), 0.0)
    object_ = data[data > data.mean() / 8]
    if object_.numel() < 64:
        raise VolumeError(f"{name}: expected a head, found {object_.numel()} voxels above the background")
    low, high = (_percentile(object_, share) for share in preprocessing.percentiles)
    if not high > low:
        raise VolumeError(f"{name}: expected a head, found one intensity ({high:g}) in almost all of it")
    data = data.clamp(max=high)
    head = data > 0.25 * object_.clamp(low, high).mean()
    inside = data[head]
    return (data - inside.mean()) / inside.std().clamp_min(1e-6), head


def _percentile(values: Tensor, share: float) -> float:
    # torch.quantile refuses more than 2**24 values.
    return float(np.percentile(values.numpy(), share))


def _head_box(head: Tensor, margin: int) -> tuple[slice, slice, slice]:
    """The box of the head with a margin; planes with under 1 % of head are noise."""
    box = []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        share = head.float().mean(others)
        found = (share > 0.01).nonzero().flatten()
        if not len(found):
            found = torch.arange(head.shape[axis])
        first, last = int(found[0]) - margin, int(found[-1]) + 1 + margin
        box.append(slice(max(0, first), min(head.shape[axis], last)))
    return tuple(box)
