"""A mask against the truth: overlap, volumes, lesion-wise detection and distances."""

from __future__ import annotations

import math
import warnings

import nibabel as nib
import numpy as np
import torch

from ..data.masks import mark_lesion
from ..errors import ArgumentError

__all__ = [
    "MIN_LESION_ML",
    "check_min_lesion",
    "evaluate_masks",
]

MIN_LESION_ML = 0.1
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

    Lesions are the connected regions (26 neighbours) of a mask. A true lesion is found if any predicted voxel touches
    it; a predicted lesion that touches no true one is false. Both count from ``min_lesion_ml`` up.

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
        counts), ``hausdorff95_mm`` (MONAI's; NaN where a mask is empty) and ``grid_diagonal_mm``, which no distance
        exceeds. Distances are between centres of voxels on the surfaces.

    Raises:
        ValueError: no masks, other shapes, an affine that is none, or a smallest lesion that is no volume.
    """
    from scipy import ndimage

    check_min_lesion(min_lesion_ml)
    predicted, truth, affine = np.asarray(predicted), np.asarray(truth), np.asarray(affine, dtype=np.float64)
    if truth.ndim != 3:
        raise ArgumentError(f"truth: expected a mask of three axes, got shape {truth.shape}")
    if predicted.shape != truth.shape:
        raise ArgumentError(f"predicted: expected the truth's shape {truth.shape}, got {predicted.shape}")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.linalg.det(affine[:3, :3]):
        raise ArgumentError(f"affine: expected a finite, invertible (4, 4) matrix, got {affine.tolist()}")
    (predicted, _), (truth, _) = mark_lesion(predicted, "predicted"), mark_lesion(truth, "truth")
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    both, total = int((predicted & truth).sum()), int(predicted.sum()) + int(truth.sum())

    labels = {}
    counted = {}
    for name, mask in (("predicted", predicted), ("true", truth)):
        labels[name], _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(labels[name].ravel())
        # A volume written down as 0.1 mL must not be lost to rounding.
        counted[name] = {
            index for index in range(1, len(sizes)) if sizes[index] * voxel_ml >= min_lesion_ml * (1 - 1e-9)
        }
    found = counted["true"] & set(np.unique(labels["true"][predicted]).tolist())
    false = counted["predicted"] - set(np.unique(labels["predicted"][truth]).tolist())
    missed = len(counted["true"]) - len(found)
    decisions = 2 * len(found) + len(false) + missed
    return {
        # Two sums that are there already; MONAI's would need tensors of the whole grid again.
        "dice": 2 * both / total if total else 1.0,
        "predicted_ml": float(predicted.sum()) * voxel_ml,
        "truth_ml": float(truth.sum()) * voxel_ml,
        "volume_difference_ml": (float(predicted.sum()) - float(truth.sum())) * voxel_ml,
        "lesions_true": len(counted["true"]),
        "lesions_predicted": len(counted["predicted"]),
        "lesions_found": len(found),
        "lesions_false": len(false),
        "lesion_count_difference": len(counted["predicted"]) - len(counted["true"]),
        "lesion_f1": 2 * len(found) / decisions if decisions else float("nan"),
        **({"hausdorff95_mm": _hausdorff95(predicted, truth, affine)} if distances else {}),
        "grid_diagonal_mm": _diagonal(truth.shape, affine),
    }


def check_min_lesion(min_lesion_ml: float) -> None:
    if not 0 <= min_lesion_ml < math.inf:
        raise ArgumentError(f"min_lesion_ml: expected mL from 0 up, got {min_lesion_ml}")


def _hausdorff95(predicted: np.ndarray, truth: np.ndarray, affine: np.ndarray) -> float:
    from monai.metrics import compute_hausdorff_distance

    if not predicted.any() or not truth.any():
        return float("nan")
    # Only the box around both matters, with a rim so that no surface lies on its edge.
    where = np.argwhere(predicted | truth)
    box = tuple(slice(low, high + 1) for low, high in zip(where.min(0), where.max(0), strict=True))
    predicted, truth = (np.pad(mask[box], 1) for mask in (predicted, truth))
    if _sheared(affine):
        return _hausdorff95_sheared(predicted, truth, affine)
    pair = [torch.from_numpy(mask)[None, None] for mask in (predicted, truth)]
    spacing = [float(size) for size in nib.affines.voxel_sizes(affine)]
    # MONAI makes tensors on torch's default device and warns of its own deprecated arguments.
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"monai\.")
        return float(compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing))


def _sheared(affine: np.ndarray) -> bool:
    """Whether the axes are not at right angles, as of a CT with a tilted gantry: distances need more than spacing."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > MOST_SHEAR)


def _hausdorff95_sheared(predicted: np.ndarray, truth: np.ndarray, affine: np.ndarray) -> float:
    """As MONAI's, between places in mm."""
    from scipy import ndimage, spatial

    surfaces = [np.argwhere(mask & ~ndimage.binary_erosion(mask)) @ affine[:3, :3].T for mask in (predicted, truth)]
    directed = [np.percentile(spatial.KDTree(other).query(one)[0], 95) for one, other in (surfaces, surfaces[::-1])]
    return float(max(directed))


def _diagonal(shape: tuple[int, ...], affine: np.ndarray) -> float:
    """The longest of a grid's box, mm."""
    ends = np.array([(1, one, other) for one in (-1, 1) for other in (-1, 1)]) * shape
    return float(np.linalg.norm(ends @ affine[:3, :3].T, axis=1).max())
