"""Masks against the truth: overlap, volumes, lesion-wise detection and distances, a case and over all cases.

No mean gets better by a prediction that is left out: where one is missing or cannot be used, and where a figure is
undefined because one of both masks is empty, the worst value stands in the means: 0 for Dice and lesion-wise F1, the
diagonal of the grid for the Hausdorff distance. Beside each mean stands how many cases that concerns.
"""

from __future__ import annotations

import csv
import json
import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from ..data.files import list_cases, replace_when_done
from ..data.masks import MOST_OF_A_VOLUME, Mask, check_grid, load_mask, mark_lesion
from ..data.volumes import VolumeError
from ..errors import ArgumentError

__all__ = ["evaluate_folders", "evaluate_masks", "predictions_without_truth", "summarize", "write_results"]

MIN_LESION_ML = 0.1
# Columns of a case that say something about it, and are no figures to average.
NOT_AVERAGED = ("grid_diagonal_mm", "missing", "failed")
# What stands in the means for a case without prediction.
WORST: dict[str, Callable[[Mapping[str, float]], float]] = {
    "dice": lambda row: 0.0,
    "lesion_f1": lambda row: 0.0,
    "hausdorff95_mm": lambda row: row["grid_diagonal_mm"],
}


def evaluate_masks(
    predicted: np.ndarray, truth: np.ndarray, affine: np.ndarray, min_lesion_ml: float = MIN_LESION_ML
) -> dict[str, float]:
    """Compare two masks of one grid.

    Lesions are the connected regions (26 neighbours) of a mask. A true lesion is found if any predicted voxel touches
    it; a predicted lesion that touches no true one is false. Both count from ``min_lesion_ml`` up.

    Args:
        predicted: (X, Y, Z) mask; :func:`grcsf_fast.data.masks.mark_lesion` says which values are lesion.
        truth: (X, Y, Z) mask, likewise.
        affine: (4, 4), voxel to mm; gives spacing and volumes.
        min_lesion_ml: smallest lesion that counts in the lesion-wise figures.

    Returns:
        ``dice`` (1 where both are empty), ``predicted_ml``, ``truth_ml``, ``volume_difference_ml`` (predicted less
        truth), ``lesions_true``, ``lesions_predicted``, ``lesions_found``, ``lesions_false``,
        ``lesion_count_difference`` (predicted less true), ``lesion_f1`` (NaN where neither mask has a lesion that
        counts), ``hausdorff95_mm`` (MONAI's; NaN where a mask is empty) and ``grid_diagonal_mm``, which no distance
        exceeds.

    Raises:
        ValueError: no masks, other shapes, an affine that is none, or a smallest lesion that is no volume.
    """
    from scipy import ndimage

    _check_min_lesion(min_lesion_ml)
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
        "hausdorff95_mm": _hausdorff95(predicted, truth, affine),
        "grid_diagonal_mm": float(np.linalg.norm(np.array(truth.shape) * nib.affines.voxel_sizes(affine))),
    }


def _check_min_lesion(min_lesion_ml: float) -> None:
    if not 0 <= min_lesion_ml < math.inf:
        raise ArgumentError(f"min_lesion_ml: expected mL from 0 up, got {min_lesion_ml}")


def _hausdorff95(predicted: np.ndarray, truth: np.ndarray, affine: np.ndarray) -> float:
    from monai.metrics import compute_hausdorff_distance

    if not predicted.any() or not truth.any():
        return float("nan")
    # Only the box around both matters, with a rim so that no surface lies on its edge.
    where = np.argwhere(predicted | truth)
    box = tuple(slice(low, high + 1) for low, high in zip(where.min(0), where.max(0), strict=True))
    pair = [torch.from_numpy(np.pad(mask[box], 1))[None, None] for mask in (predicted, truth)]
    spacing = [float(size) for size in nib.affines.voxel_sizes(affine)]
    # MONAI makes tensors on torch's default device and warns of its own deprecated arguments.
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"monai\.")
        return float(compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing))


def evaluate_folders(
    predicted: str | Path,
    truth: str | Path,
    min_lesion_ml: float = MIN_LESION_ML,
    progress: Callable[[list[str]], Iterable[str]] = lambda names: names,
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Compare every mask of a folder (or one file) with the prediction of the same name.

    Args:
        predicted: file or folder; :func:`predictions_without_truth` names those that are left.
        truth: file or folder.
        min_lesion_ml: see :func:`evaluate_masks`.
        progress: wraps the list of names.

    Returns:
        Results by case, of every truth that can be read, and errors by case. Beside the figures of
        :func:`evaluate_masks`, ``missing`` is 1 where there is no prediction and ``failed`` is 1 where it cannot be
        used; the figures are then those of an empty one, with a Dice of 0 even where the truth is empty.

    Raises:
        FileNotFoundError: nothing to compare.
        ValueError: a file against a folder, no prediction with the name of a truth, or a smallest lesion that is no
            volume.
    """
    _check_min_lesion(min_lesion_ml)
    if Path(predicted).is_file() != Path(truth).is_file():
        raise ArgumentError(f"expected two files or two folders, got {predicted} and {truth}")
    predictions, truths = list_cases(predicted), list_cases(truth)
    if Path(truth).is_file():
        predictions = dict(zip(truths, predictions.values(), strict=True))
    if not predictions.keys() & truths.keys():
        raise ArgumentError(
            f"{predicted}: expected predictions of the names of {', '.join(sorted(truths)[:3])}, ... in {truth}, "
            f"found {', '.join(sorted(predictions)[:3])}, ..."
        )
    results: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    for name in progress(list(truths)):
        try:
            expected = _load(truths[name], MOST_OF_A_VOLUME)
        except Exception as error:
            failures[name] = _described(truths[name], error)
            continue
        missing = name not in predictions
        try:
            if missing:
                raise VolumeError(f"{predicted}: expected a prediction of the name of {truths[name].name}, found none")
            row = _compare(_load(predictions[name], 1), expected, min_lesion_ml)
            flags = {"missing": 0, "failed": 0}
        # One bad pair must not stop the others.
        except Exception as error:
            failures[name] = _described(predictions.get(name, Path(predicted)), error)
            nothing = np.zeros_like(expected.voxels)
            row = evaluate_masks(nothing, expected.voxels, expected.affine, min_lesion_ml) | {"dice": 0.0}
            flags = {"missing": int(missing), "failed": int(not missing)}
        results[name] = row | flags
    return results, failures


def predictions_without_truth(predicted: str | Path, truth: str | Path) -> list[str]:
    """Names in a folder of predictions that no truth has, but for the residual maps that ``predict`` writes beside."""
    if Path(truth).is_file():
        return []
    truths = list_cases(truth)
    names = list_cases(predicted)
    maps = {name for name in names if re.fullmatch(r"\d+", name.rpartition("_residual")[2])}
    maps = {name for name in maps if name.rpartition("_residual")[0] in names.keys() | truths.keys()}
    return sorted(names.keys() - truths.keys() - maps)


def _load(path: Path, plausible: float) -> Mask:
    mask = load_mask(path)
    if mask.share > plausible or mask.share == 1:
        warnings.warn(f"{mask.name}: {mask.share:.0%} of the volume are marked as lesion", stacklevel=2)
    return mask


def _compare(predicted: Mask, truth: Mask, min_lesion_ml: float) -> dict[str, float]:
    check_grid(predicted, truth.name, truth.shape, truth.affine)
    return evaluate_masks(predicted.voxels, truth.voxels, truth.affine, min_lesion_ml)


def _described(path: Path, error: Exception) -> str:
    if isinstance(error, VolumeError | OSError | Warning):  # warnings are errors under -W error
        return str(error)
    return f"{path}: unexpected error\n{''.join(traceback.format_exception(error))}"


def summarize(results: Mapping[str, Mapping[str, float]]) -> dict[str, float | dict[str, float]]:
    """Each figure over all cases, and the pooled lesion-wise F1.

    An empty, missing or unusable prediction never makes the mean of ``dice``, ``lesion_f1`` or ``hausdorff95_mm``
    better than another prediction would, unless the truth is empty too. The worst value stands in them for a missing
    or failed prediction, where the prediction alone is empty, and in ``hausdorff95_mm`` where the truth alone is. Other
    undefined figures are left out.

    Args:
        results: by case, from :func:`evaluate_masks` or :func:`evaluate_folders`; other figures may stand beside.

    Returns:
        ``cases``, ``missing`` and ``failed``: numbers of cases, of those without prediction and with one that cannot
        be used. By figure ``mean``, ``sd`` and ``median`` over ``n`` cases, and of all cases how many are
        ``undefined``, ``left_out`` (those of them that do not count in ``n``), ``missing`` and ``failed``.
        ``pooled_lesion_f1`` over the lesions of all cases, those without prediction counting as missed; as false
        lesions count in it, it may be lower with a prediction that found less than it invented than with none.
    """
    summary: dict[str, float | dict[str, float]] = {"cases": len(results)}
    if not results:
        return summary
    rows = list(results.values())
    absent = {flag: sum(int(row.get(flag, 0)) for row in rows) for flag in ("missing", "failed")}
    summary |= absent
    for name in rows[0]:
        if name in NOT_AVERAGED:
            continue
        counted = np.array([_counted(name, row) for row in rows], dtype=float)
        undefined = sum(not _without_prediction(row) and not math.isfinite(row[name]) for row in rows)
        values = counted[np.isfinite(counted)]
        summary[name] = {
            "mean": float(values.mean()) if values.size else math.nan,
            "sd": float(values.std(ddof=1)) if values.size > 1 else 0.0,
            "median": float(np.median(values)) if values.size else math.nan,
            "n": int(values.size),
            "undefined": undefined,
            "left_out": len(rows) - int(values.size),
            **absent,
        }
    found, false, true = (sum(row[name] for row in rows) for name in ("lesions_found", "lesions_false", "lesions_true"))
    decisions = found + false + true
    summary["pooled_lesion_f1"] = 2 * found / decisions if decisions else math.nan
    return summary


def _without_prediction(row: Mapping[str, float]) -> bool:
    return bool(row.get("missing", 0) or row.get("failed", 0))


def _counted(name: str, row: Mapping[str, float]) -> float:
    """What a case counts as in the mean of a figure; NaN: not at all."""
    if name not in WORST or (math.isfinite(row[name]) and not _without_prediction(row)):
        return row[name]
    missed = row["predicted_ml"] == 0 < row["truth_ml"]
    invented = name == "hausdorff95_mm" and row["truth_ml"] == 0 < row["predicted_ml"]
    return WORST[name](row) if _without_prediction(row) or missed or invented else math.nan


def write_results(
    folder: str | Path, results: Mapping[str, Mapping[str, float]], summary: Mapping[str, object]
) -> list[Path]:
    """Write ``cases.csv`` and ``summary.json`` (null where undefined); returns their paths."""
    targets = [Path(folder) / "cases.csv", Path(folder) / "summary.json"]
    with replace_when_done(*targets) as (table, totals):
        with table.open("w", newline="") as file:
            columns = ["case", *next(iter(results.values()), {})]
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({"case": name} | dict(row) for name, row in results.items())
        totals.write_text(json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n")
    return targets


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
