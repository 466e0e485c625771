"""A mask against the truth: overlap, volumes, lesion-wise detection and distances."""

from __future__ import annotations

import math
from typing import Any

import nibabel as nib
import numpy as np
import torch

from ..data.masks import mark_lesion
from ..data.volumes import bounding_box
from ..errors import ArgumentError, ArgumentTypeError
from ..runtime.memory import memory_budget

__all__ = [
    "MIN_LESION_ML",
    "as_affine",
    "as_voxels",
    "box_around",
    "check_min_lesion",
    "evaluate_masks",
]

MIN_LESION_ML = 0.1
ROUNDING = 1e-6  # relative, of volumes, areas and scores: headers keep sizes of voxels in float32
BOX_BYTES = 8  # of a voxel of the box around both masks: their copies, and the labels of one or its surface
PIECE = 2**20  # labels counted at once
MOST_OF_TORCH = 2**24  # values of which torch makes a quantile
MOST_SHEAR = 1e-3  # cosine of the angle between two axes


def evaluate_masks(
    predicted: np.ndarray,
    truth: np.ndarray,
    affine: np.ndarray,
    min_lesion_ml: float = MIN_LESION_ML,
    *,
    distances: bool = True,
) -> dict[str, float]:
    """Compare two masks of one grid.

    Lesions are the connected regions (26 neighbours) of a mask. A true lesion is found if any predicted voxel lies in
    it; a predicted lesion without a true voxel is false. Both count from ``min_lesion_ml`` up.

    Args:
        predicted: (X, Y, Z) mask; :func:`grcsf_fast.data.masks.mark_lesion` says which values are lesion.
        truth: (X, Y, Z) mask, likewise.
        affine: (4, 4), voxel to mm; gives spacing and volumes.
        min_lesion_ml: smallest lesion that counts in the lesion-wise figures.
        distances: with ``hausdorff95_mm``, which takes most of the time.

    Returns:
        ``dice`` (1 where both are empty), ``predicted_ml``, ``truth_ml``, ``volume_difference_ml`` (predicted less
        truth), ``lesions_true``, ``lesions_predicted``, ``lesions_found``, ``lesions_false``,
        ``lesion_count_difference`` (predicted less true), ``lesion_f1`` (NaN where neither mask has a lesion that
        counts), ``hausdorff95_mm`` (as MONAI's; NaN where a mask is empty) and ``grid_diagonal_mm``, which no distance
        exceeds. Distances are between centres of voxels on the surfaces.

    Raises:
        ArgumentError: no masks, other shapes, an affine that is none, or a smallest lesion that is no volume.
        ArgumentTypeError: an image of nibabel for a mask.
        MemoryError: the box around both masks needs more than there is; the message says how much.
    """
    check_min_lesion(min_lesion_ml)
    predicted, truth, affine = as_voxels(predicted, "predicted"), as_voxels(truth, "truth"), as_affine(affine)
    if truth.ndim != 3:
        raise ArgumentError(f"truth: expected a mask of three axes, got shape {truth.shape}")
    if predicted.shape != truth.shape:
        raise ArgumentError(f"predicted: expected the truth's shape {truth.shape}, got {predicted.shape}")
    (predicted, _), (truth, _) = mark_lesion(predicted, "predicted"), mark_lesion(truth, "truth")
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    diagonal = _diagonal(truth.shape, affine)
    # Outside of the box around both there is nothing to count.
    box = box_around(predicted, truth)
    needed, free = BOX_BYTES * math.prod(part.stop - part.start for part in box), memory_budget()
    if needed > free:
        raise MemoryError(
            f"the box around both masks takes {needed / 2**30:.3g} GiB to compare, {free / 2**30:.3g} are free"
        )
    predicted, truth = (np.ascontiguousarray(mask[box]) for mask in (predicted, truth))
    predicted_voxels, truth_voxels, both = map(int, map(np.count_nonzero, (predicted, truth, predicted & truth)))

    # A volume written down as 0.1 mL must not be lost to rounding; headers keep affines in float32.
    least_ml = min_lesion_ml * (1 - ROUNDING)
    lesions_true, found = _lesions(truth, predicted, voxel_ml, least_ml)
    lesions_predicted, right = _lesions(predicted, truth, voxel_ml, least_ml)
    false, missed = lesions_predicted - right, lesions_true - found
    decisions = 2 * found + false + missed
    return {
        # Two counts that are there already; MONAI's would need tensors of the whole grid again.
        "dice": 2 * both / (predicted_voxels + truth_voxels) if predicted_voxels or truth_voxels else 1.0,
        "predicted_ml": float(predicted_voxels) * voxel_ml,
        "truth_ml": float(truth_voxels) * voxel_ml,
        "volume_difference_ml": (float(predicted_voxels) - float(truth_voxels)) * voxel_ml,
        "lesions_true": lesions_true,
        "lesions_predicted": lesions_predicted,
        "lesions_found": found,
        "lesions_false": false,
        "lesion_count_difference": lesions_predicted - lesions_true,
        "lesion_f1": 2 * found / decisions if decisions else float("nan"),
        **({"hausdorff95_mm": _hausdorff95(predicted, truth, affine)} if distances else {}),
        "grid_diagonal_mm": diagonal,
    }


def as_voxels(values: Any, name: str) -> np.ndarray:
    """An argument as an array.

    Raises:
        ArgumentTypeError: it is an image of nibabel, whose voxels are meant.
    """
    if isinstance(values, nib.spatialimages.SpatialImage):
        raise ArgumentTypeError(
            f"{name}: expected an array, got an image of nibabel: np.asarray(image.dataobj) are its voxels, "
            "image.affine is its affine"
        )
    return np.asarray(values)


def as_affine(affine: Any) -> np.ndarray:
    """An argument ``affine`` as a (4, 4) float64 matrix.

    Raises:
        ArgumentError: it is none that is finite and can be inverted.
    """
    try:
        matrix = np.asarray(affine, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"affine: expected a (4, 4) matrix, got {type(affine).__name__}") from error
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not np.linalg.det(matrix[:3, :3]):
        raise ArgumentError(f"affine: expected a finite, invertible (4, 4) matrix, got {matrix.tolist()}")
    return matrix


def box_around(*masks: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box around what is not 0 in (X, Y, Z) masks of one grid; of one voxel where everything is."""
    boxes = [box for mask in masks if (box := bounding_box(mask)) is not None]
    if not boxes:
        return slice(0, 1), slice(0, 1), slice(0, 1)
    x, y, z = (
        slice(min(part.start for part in parts), max(part.stop for part in parts)) for parts in zip(*boxes, strict=True)
    )
    return x, y, z


def _lesions(mask: np.ndarray, other: np.ndarray, voxel_ml: float, least_ml: float) -> tuple[int, int]:
    """Lesions of a mask that count, and how many of them hold a voxel of another one; (X, Y, Z) bool in C order."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    labels, other = labels.ravel(), other.ravel()
    sizes, touched = np.zeros(count + 1, np.int64), np.zeros(count + 1, bool)
    # Piece by piece: counting all at once would copy the labels in 64 bits.
    step = max(PIECE, count)
    for start in range(0, len(labels), step):
        piece = labels[start : start + step]
        sizes += np.bincount(piece, minlength=count + 1)
        touched[piece[other[start : start + step]]] = True
    counts = sizes * voxel_ml >= least_ml
    counts[0] = False
    return int(counts.sum()), int((counts & touched).sum())


def check_min_lesion(min_lesion_ml: float) -> None:
    if not 0 <= min_lesion_ml < math.inf:
        raise ArgumentError(f"min_lesion_ml: expected mL from 0 up, got {min_lesion_ml}")


def _hausdorff95(predicted: np.ndarray, truth: np.ndarray, affine: np.ndarray) -> float:
    """MONAI's, which has tensors of the whole box and silences warnings for the whole process, where cases are compared
    side by side; tests hold this one to it."""
    if not predicted.any() or not truth.any():
        return float("nan")
    if _sheared(affine):
        return _hausdorff95_sheared(predicted, truth, affine)
    spacing = nib.affines.voxel_sizes(affine)
    surfaces = [_surface(mask) * spacing for mask in (predicted, truth)]
    return max(_percentile95(apart.astype(np.float32)) for apart in _apart(*surfaces))


def _percentile95(values: np.ndarray) -> float:
    if len(values) > MOST_OF_TORCH:
        return float(np.percentile(values, 95))
    with torch.device("cpu"):  # whatever the default is
        return float(torch.quantile(torch.from_numpy(values), 0.95))


def _sheared(affine: np.ndarray) -> bool:
    """Whether the axes are not at right angles, as of a CT with a tilted gantry: distances need more than spacing."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > MOST_SHEAR)


def _hausdorff95_sheared(predicted: np.ndarray, truth: np.ndarray, affine: np.ndarray) -> float:
    """As MONAI's, between places in mm."""
    surfaces = [_surface(mask) @ affine[:3, :3].T for mask in (predicted, truth)]
    return max(float(np.percentile(apart, 95)) for apart in _apart(*surfaces))


def _surface(mask: np.ndarray) -> np.ndarray:
    """(N, 3) voxels with a face to what is no lesion, or to the edge, counted from 1 as MONAI has them in its rim."""
    from scipy import ndimage

    return np.argwhere(mask & ~ndimage.binary_erosion(mask)) + 1


def _apart(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (M,): from each of (N, 3) places to the closest of (M, 3) others, and back."""
    from scipy import spatial

    return tuple(spatial.KDTree(ends, leafsize=32).query(starts)[0] for starts, ends in ((one, other), (other, one)))


def _diagonal(shape: tuple[int, ...], affine: np.ndarray) -> float:
    """The longest of a grid's box, mm."""
    ends = np.array([(1, one, other) for one in (-1, 1) for other in (-1, 1)]) * shape
    return float(np.linalg.norm(ends @ affine[:3, :3].T, axis=1).max())
