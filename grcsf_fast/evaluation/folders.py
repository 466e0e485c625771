"""Folders of masks against folders of true ones, or against those of a list of cases."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ..data.files import case_name, list_cases
from ..data.masks import MOST_OF_A_VOLUME, Mask, check_grid, load_mask
from ..data.volumes import VolumeError
from ..datasets.cases_file import CaseList, ListedCase, load_lesion
from ..errors import ArgumentError
from .metrics import MIN_LESION_ML, check_min_lesion, evaluate_masks

__all__ = [
    "evaluate_cases",
    "evaluate_folders",
    "left_over",
    "predictions_without_truth",
]


def evaluate_folders(
    predicted: str | Path,
    truth: str | Path,
    min_lesion_ml: float = MIN_LESION_ML,
    progress: Callable[[list[str]], Iterable[str]] = lambda names: names,
    numbers: Collection[int] | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Compare every mask of a folder (or one file) with the prediction of the same name.

    Args:
        predicted: file or folder; :func:`predictions_without_truth` names those that are left.
        truth: file or folder.
        min_lesion_ml: see :func:`evaluate_masks`.
        progress: wraps the list of names.
        numbers: those of the masks that count as lesion; None: all.

    Returns:
        Results by case, of every truth that can be read, and errors by case. Beside the figures of
        :func:`evaluate_masks`, ``missing`` is 1 where there is no prediction and ``failed`` is 1 where it cannot be
        used; the figures are then those of an empty one, with a Dice of 0 even where the truth is empty.

    Raises:
        FileNotFoundError: nothing to compare.
        ValueError: a file against a folder, no prediction with the name of a truth, or a smallest lesion that is no
            volume.
    """
    check_min_lesion(min_lesion_ml)
    if Path(predicted).is_file() != Path(truth).is_file():
        raise ArgumentError(f"expected two files or two folders, got {predicted} and {truth}")
    predictions, truths = list_cases(predicted), list_cases(truth)
    if Path(truth).is_file():
        predictions = dict(zip(truths, predictions.values(), strict=True))
    _check_common(predicted, predictions, truths, f" in {truth}")
    loads = {name: (path, partial(load_mask, path, labels=numbers)) for name, path in truths.items()}
    return _evaluate(predicted, predictions, loads, min_lesion_ml, progress, numbers)


def evaluate_cases(
    predicted: str | Path,
    listing: CaseList,
    cases: Sequence[ListedCase],
    min_lesion_ml: float = MIN_LESION_ML,
    progress: Callable[[list[str]], Iterable[str]] = lambda names: names,
    numbers: Collection[int] | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Compare the masks of a list's cases with the predictions of their names.

    Args:
        predicted: folder.
        listing: the cases belong to.
        cases: each with masks.
        min_lesion_ml: see :func:`evaluate_masks`.
        progress: wraps the list of names.
        numbers: those of the masks that count as lesion; None: all of predictions, and of the truth those of the list.

    Returns:
        As :func:`evaluate_folders`.

    Raises:
        FileNotFoundError: no predictions.
        ValueError: a file, no prediction with the name of a case, or a smallest lesion that is no volume.
    """
    check_min_lesion(min_lesion_ml)
    if Path(predicted).is_file():
        raise ArgumentError(f"{predicted}: expected a folder with predictions of the list's cases, got a file")
    predictions = list_cases(predicted)
    if numbers is not None:
        listing = replace(listing, labels=tuple(numbers))
    loads = {case.name: (case.masks[0], partial(load_lesion, case, listing)) for case in cases}
    _check_common(predicted, predictions, loads, " of the list")
    return _evaluate(predicted, predictions, loads, min_lesion_ml, progress, numbers)


def _check_common(predicted: str | Path, predictions: Collection[str], truths: Collection[str], where: str) -> None:
    if not set(predictions) & set(truths):
        raise ArgumentError(
            f"{predicted}: expected predictions of the names of {', '.join(sorted(truths)[:3])}, ...{where}, "
            f"found {', '.join(sorted(predictions)[:3])}, ..."
        )


def _evaluate(
    predicted: str | Path,
    predictions: Mapping[str, Path],
    truths: Mapping[str, tuple[Path, Callable[[], Mask]]],
    min_lesion_ml: float,
    progress: Callable[[list[str]], Iterable[str]],
    numbers: Collection[int] | None,
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Results and errors by case; a truth is a file to name in messages and what reads it."""
    results: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    for name in progress(list(truths)):
        path, load = truths[name]
        try:
            expected = _plausible(load(), MOST_OF_A_VOLUME)
        except Exception as error:
            failures[name] = _described(path, error)
            continue
        missing = name not in predictions
        try:
            if missing:
                called = path.name if case_name(path) == name else name
                raise VolumeError(f"{predicted}: expected a prediction of the name of {called}, found none")
            row = _compare(_plausible(load_mask(predictions[name], labels=numbers), 1), expected, min_lesion_ml)
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
    return left_over(predicted, list_cases(truth))


def left_over(predicted: str | Path, truths: Collection[str]) -> list[str]:
    """Names in a folder of predictions but for these, and but for residual maps."""
    names = list_cases(predicted)
    maps = {name for name in names if re.fullmatch(r"\d+", name.rpartition("_residual")[2])}
    maps = {name for name in maps if name.rpartition("_residual")[0] in names.keys() | set(truths)}
    return sorted(names.keys() - set(truths) - maps)


def _plausible(mask: Mask, most: float) -> Mask:
    if mask.share > most or mask.share == 1:
        warnings.warn(f"{mask.name}: {mask.share:.0%} of the volume are marked as lesion", stacklevel=2)
    return mask


def _compare(predicted: Mask, truth: Mask, min_lesion_ml: float) -> dict[str, float]:
    check_grid(predicted, truth.name, truth.shape, truth.affine)
    return evaluate_masks(predicted.voxels, truth.voxels, truth.affine, min_lesion_ml)


def _described(path: Path, error: Exception) -> str:
    if isinstance(error, VolumeError | OSError | Warning):  # warnings are errors under -W error
        return str(error)
    return f"{path}: unexpected error\n{''.join(traceback.format_exception(error))}"
