"""Masks against the truth: overlap, volumes, lesion-wise detection and distances, a case and over all cases."""

from __future__ import annotations

import csv
import json
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from .data.datasets import load_mask
from .data.files import list_cases, replace_when_done
from .data.volumes import VolumeError

__all__ = ["evaluate_folders", "evaluate_masks", "summarize", "write_results"]

MIN_LESION_ML = 0.1


def evaluate_masks(
    predicted: np.ndarray, truth: np.ndarray, affine: np.ndarray, min_lesion_ml: float = MIN_LESION_ML
) -> dict[str, float]:
    """Compare two masks of one grid.

    Lesions are the connected regions (26 neighbours) of a mask. A true lesion is found if any predicted voxel touches
    it; a predicted lesion that touches no true one is false. Both count from ``min_lesion_ml`` up.

    Args:
        predicted: (X, Y, Z), above 0 where lesion.
        truth: (X, Y, Z), above 0 where lesion.
        affine: (4, 4), voxel to mm; gives spacing and volumes.
        min_lesion_ml: smallest lesion that counts in the lesion-wise figures.

    Returns:
        ``dice`` (1 where both are empty), ``predicted_ml``, ``truth_ml``, ``volume_difference_ml`` (predicted less
        truth), ``lesions_true``, ``lesions_predicted``, ``lesions_found``, ``lesions_false``,
        ``lesion_count_difference`` (predicted less true), ``lesion_f1`` (NaN where neither mask has a lesion that
        counts) and ``hausdorff95_mm`` (MONAI's; NaN where a mask is empty).

    Raises:
        ValueError: other shapes.
    """
    from scipy import ndimage

    if predicted.shape != truth.shape:
        raise ValueError(f"predicted: expected the truth's shape {truth.shape}, got {predicted.shape}")
    predicted, truth = predicted > 0, truth > 0
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
    }


def _hausdorff95(predicted: np.ndarray, truth: np.ndarray, affine: np.ndarray) -> float:
    from monai.metrics import compute_hausdorff_distance

    if not predicted.any() or not truth.any():
        return float("nan")
    # Only the box around both matters, with a rim so that no surface lies on its edge.
    where = np.argwhere(predicted | truth)
    box = tuple(slice(low, high + 1) for low, high in zip(where.min(0), where.max(0), strict=True))
    pair = [torch.from_numpy(np.pad(mask[box], 1))[None, None] for mask in (predicted, truth)]
    spacing = [float(size) for size in nib.affines.voxel_sizes(affine)]
    return float(compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing))


def evaluate_folders(
    predicted: str | Path,
    truth: str | Path,
    min_lesion_ml: float = MIN_LESION_ML,
    progress: Callable[[list[str]], Iterable[str]] = lambda names: names,
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Compare every mask of a folder (or one file) with the prediction of the same name; other files are ignored.

    Args:
        predicted: file or folder.
        truth: file or folder.
        min_lesion_ml: see :func:`evaluate_masks`.
        progress: wraps the list of names.

    Returns:
        Results by case, and errors by case.

    Raises:
        FileNotFoundError: nothing to compare.
        ValueError: a file against a folder.
    """
    if Path(predicted).is_file() != Path(truth).is_file():
        raise ValueError(f"expected two files or two folders, got {predicted} and {truth}")
    predictions, truths = list_cases(predicted), list_cases(truth)
    if Path(truth).is_file():
        predictions = dict(zip(truths, predictions.values(), strict=True))
    results: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    for name in progress(list(truths)):
        if name not in predictions:
            failures[name] = f"{predicted}: expected a prediction of the name of {truths[name].name}, found none"
            continue
        try:
            results[name] = _evaluate_files(predictions[name], truths[name], min_lesion_ml)
        except (VolumeError, OSError) as error:
            failures[name] = str(error)
        # One bad pair must not stop the others; the traceback goes into the report.
        except Exception:
            failures[name] = f"{predictions[name]}: unexpected error\n{traceback.format_exc()}"
    return results, failures


def _evaluate_files(predicted: Path, truth: Path, min_lesion_ml: float) -> dict[str, float]:
    ours, theirs = load_mask(predicted), load_mask(truth)
    if ours.shape != theirs.shape:
        raise VolumeError(f"{predicted}: expected the grid of {truth} {theirs.shape}, found shape {ours.shape}")
    if not np.allclose(ours.affine, theirs.affine, atol=1e-3):
        raise VolumeError(
            f"{predicted}: expected the affine of {truth} {theirs.affine.tolist()}, found {ours.affine.tolist()}"
        )
    return evaluate_masks(np.asarray(ours.dataobj), np.asarray(theirs.dataobj), theirs.affine, min_lesion_ml)


def summarize(results: Mapping[str, Mapping[str, float]]) -> dict[str, float | dict[str, float]]:
    """Mean, standard deviation, median and number of finite values of each figure, and the pooled lesion-wise F1."""
    summary: dict[str, float | dict[str, float]] = {"cases": len(results)}
    if not results:
        return summary
    for name in next(iter(results.values())):
        values = np.array([row[name] for row in results.values()], dtype=float)
        values = values[np.isfinite(values)]
        if values.size:
            summary[name] = {
                "mean": float(values.mean()),
                "sd": float(values.std(ddof=1)) if values.size > 1 else 0.0,
                "median": float(np.median(values)),
                "n": int(values.size),
            }
    found, false, true = (
        sum(row[name] for row in results.values()) for name in ("lesions_found", "lesions_false", "lesions_true")
    )
    decisions = found + false + true
    summary["pooled_lesion_f1"] = 2 * found / decisions if decisions else float("nan")
    return summary


def _undefined(value: object) -> bool:
    return isinstance(value, float) and not np.isfinite(value)


def write_results(
    folder: str | Path, results: Mapping[str, Mapping[str, float]], summary: Mapping[str, float | dict[str, float]]
) -> list[Path]:
    """Write ``cases.csv`` and ``summary.json`` (null where undefined); returns their paths."""
    targets = [Path(folder) / "cases.csv", Path(folder) / "summary.json"]
    with replace_when_done(*targets) as (table, totals):
        with table.open("w", newline="") as file:
            columns = ["case", *next(iter(results.values()), {})]
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({"case": name} | dict(row) for name, row in results.items())
        finite = {name: value if not _undefined(value) else None for name, value in summary.items()}
        totals.write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n")
    return targets
