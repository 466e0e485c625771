"""Folders of masks against folders of true ones, or against those of a list of cases."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.failures import FAILURES_NAME
from ..data.files import case_name, find_cases
from ..data.images import OneChannel, bytes_to_read, check_memory, examine
from ..data.labels import Labels
from ..data.masks import ANY_LABEL, MOST_OF_A_VOLUME, Mask, check_grid, number_of, read_masks
from ..data.names import is_map
from ..data.volumes import VolumeError
from ..datasets.cases_file import CaseList, ListedCase
from ..datasets.lesions import read_lesions
from ..errors import ArgumentError, GrcsfError
from ..runtime.control_groups import usable_cores
from ..runtime.memory import is_out_of_memory
from ..runtime.threads import in_order
from .chosen_labels import chosen_by_list, reported
from .metrics import BOX_BYTES, MIN_LESION_ML, check_min_lesion, evaluate_masks
from .predictions import doubts, failed_before

__all__ = [
    "Comparison",
    "bytes_to_compare",
    "described",
    "evaluate_cases",
    "evaluate_folders",
    "left_over",
    "predictions_without_truth",
]


Rows = dict[str, dict[str, float]]
Marked = Callable[[Container[int] | None], Mask]  # a mask of these numbers in files that were read
Cut = Callable[[Mask], Mask]  # what a truth counts of a prediction


class Comparison(NamedTuple):
    """Masks compared with the truth.

    Attributes:
        results: by case, of every truth that can be read. Beside the figures of :func:`evaluate_masks`, ``missing`` is
            1 where there is no prediction and ``failed`` is 1 where it cannot be used; the figures are then those of
            an empty one, with a Dice of 0 even where the truth is empty. Several labels count as one.
        failures: errors by case.
        by_label: the same as ``results`` by label; empty where none are told apart.
        chosen: the labels of a list that alone count in its predictions; None: all that they mark, or given ones.
    """

    results: Rows
    failures: dict[str, str]
    by_label: dict[str, Rows]
    chosen: Labels | None = None


def evaluate_folders(
    predicted: str | Path,
    truth: str | Path,
    min_lesion_ml: float = MIN_LESION_ML,
    progress: Callable[[list[str]], Iterable[str]] = lambda names: names,
    labels: Labels | None = None,
) -> Comparison:
    """Compare every mask of a folder (or one file) with the prediction of the same name.

    Args:
        predicted: file or folder; :func:`predictions_without_truth` names those that are left.
        truth: file or folder.
        min_lesion_ml: see :func:`evaluate_masks`.
        progress: wraps the list of names.
        labels: whose numbers count as lesion; each is measured by itself too. None: all numbers are one kind of lesion.

    Raises:
        FileNotFoundError: nothing to compare.
        ValueError: a file against a folder, no prediction with the name of a truth, or a smallest lesion that is no
            volume.
    """
    check_min_lesion(min_lesion_ml)
    for path in map(Path, (predicted, truth)):
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected a file or a folder of masks, found nothing")
    if Path(predicted).is_file() != Path(truth).is_file():
        raise ArgumentError(f"expected two files or two folders, got {predicted} and {truth}")
    (predictions, unusable), (truths, bad) = find_cases(predicted), find_cases(truth)
    if Path(truth).is_file():
        predictions = dict(zip(truths, predictions.values(), strict=True))
    _check_common(predicted, predictions, truths, f" in {truth}")
    loads = {name: _Truth(path, (path,), partial(_read_alone, path)) for name, path in truths.items()}
    compared = _evaluate(predicted, predictions, unusable, loads, min_lesion_ml, progress, labels)
    compared.failures.update({entry: str(error) for entry, error in bad.items()})
    return compared


def evaluate_cases(
    predicted: str | Path,
    listing: CaseList,
    cases: Sequence[ListedCase],
    min_lesion_ml: float = MIN_LESION_ML,
    progress: Callable[[list[str]], Iterable[str]] = lambda names: names,
    labels: Labels | None = None,
) -> Comparison:
    """Compare the masks of a list's cases with the predictions of their names.

    Where the list counts lesion above a threshold alone, as for calcium, predictions are cut there too; what it ignores
    counts in neither.

    Args:
        predicted: folder.
        listing: the cases belong to.
        cases: each with masks.
        min_lesion_ml: see :func:`evaluate_masks`.
        progress: wraps the list of names.
        labels: as for :func:`evaluate_folders`; None: of the truth the numbers of the list count, and of predictions
            too, where these tell labels apart: by their reports or, without any, if one holds other numbers than 1, or
            255. Otherwise all that predictions mark counts.

    Raises:
        FileNotFoundError: no predictions.
        ValueError: a file, no prediction with the name of a case, or a smallest lesion that is no volume.
    """
    check_min_lesion(min_lesion_ml)
    if Path(predicted).is_file():
        raise ArgumentError(f"{predicted}: expected a folder with predictions of the list's cases, got a file")
    predictions, unusable = find_cases(predicted, {case.name for case in cases})
    images = {case.name: case.images[:1] if listing.above_hu is not None else () for case in cases}
    loads = {
        case.name: _Truth(case.masks[0], (*case.masks, *images[case.name]), partial(read_lesions, case, listing))
        for case in cases
    }
    _check_common(predicted, predictions, loads, " of the list")
    chosen = chosen_by_list(listing, reported(predicted, loads)) if labels is None else None
    compared = _evaluate(
        predicted, predictions, unusable, loads, min_lesion_ml, progress, labels or chosen,
        apart=chosen is None, listed=listing.labels,
    )  # fmt: skip
    return compared._replace(chosen=chosen)


class _Truth(NamedTuple):
    """Of a case: the file to name in messages, all files that are read, and what reads them."""

    path: Path
    files: tuple[Path | OneChannel, ...]
    load: Callable[[], tuple[Marked, Cut]]


def _read_alone(path: Path) -> tuple[Marked, Cut]:
    return read_masks([path]).marked, lambda mask: mask


def bytes_to_compare(files: Iterable[Path | OneChannel]) -> int:
    """About how much memory a case with these files takes at most, from their headers; those without say nothing."""
    found = []
    for path in files:
        # Whatever is wrong with it is said where it is read.
        with suppress(Exception):
            opened = examine(path)
            found.append((bytes_to_read(opened), math.prod(opened.shape)))
    return sum(size for size, _ in found) + BOX_BYTES * max((voxels for _, voxels in found), default=0)


def _check_common(predicted: str | Path, predictions: Collection[str], truths: Collection[str], where: str) -> None:
    if not set(predictions) & set(truths):
        raise ArgumentError(
            f"{predicted}: expected predictions of the names of {', '.join(sorted(truths)[:3])}, ...{where}, "
            f"found {', '.join(sorted(predictions)[:3])}, ..."
        )


class _Compared(NamedTuple):
    """Of one case: the figures of all labels as one and of each, where the truth can be read; what its masks hold."""

    row: dict[str, float] | None
    rows: Rows
    error: str | None
    true: set[int]
    predicted: set[int]


def _evaluate(
    predicted: str | Path,
    predictions: Mapping[str, Path],
    unusable: Mapping[str, Exception],
    truths: Mapping[str, _Truth],
    min_lesion_ml: float,
    progress: Callable[[list[str]], Iterable[str]],
    labels: Labels | None,
    apart: bool = True,
    listed: Collection[int] | None = None,
) -> Comparison:
    """Each file is read once, whatever the labels. Of entries of the folder of predictions that are no masks there is
    an error by name.

    Args:
        apart: each label is measured by itself too.
        listed: numbers that a list of the cases has chosen, and others thereby not.
    """
    every = None if labels is None else labels.every
    failed = _failed(Path(predicted), predictions)
    for doubt in doubts({name: path for name, path in predictions.items() if name in truths}):
        warnings.warn(doubt, stacklevel=3)
    problems = {case_name(entry, truths): error for entry, error in unusable.items()}
    parts = {} if labels is None or not apart else dict(zip(labels.names, labels.numbers, strict=True))

    def found_in(name: str, grid: Mask) -> Marked:
        """The prediction of a case."""
        if name in problems:
            raise problems[name]
        if name not in predictions:
            path = truths[name].path
            called = path.name if case_name(path) == name else name
            raise VolumeError(f"{predicted}: expected a prediction of the name of {called}, found none")
        if name in failed:
            raise VolumeError(
                f"{predictions[name]}: expected the result of the last run, which failed for this case "
                f"({failed[name]}); found one from before; run predict again, or remove {FAILURES_NAME} if the "
                "mask is good"
            )
        return read_masks([predictions[name]], grid).marked

    def compare(name: str) -> _Compared:
        try:
            return compare_with(truths[name], name)
        except Exception as error:
            return _Compared(None, {}, described(truths[name].path, error), set(), set())

    def compare_with(truth: _Truth, name: str) -> _Compared:
        check_memory(*map(examine, truth.files))
        true, cut = truth.load()
        whole = _plausible(true(every), MOST_OF_A_VOLUME)
        true_numbers = set() if labels is None else _numbers_of(true(ANY_LABEL))
        try:
            found = found_in(name, whole)
            row = _compare(cut(_plausible(found(every), 1)), whole, min_lesion_ml)
            rows = {label: _compare(cut(found(own)), true(own), min_lesion_ml) for label, own in parts.items()}
            numbers = set() if labels is None else _numbers_of(found(ANY_LABEL))
            error, flags = None, {"missing": 0, "failed": 0}
        # One bad pair must not stop the others.
        except Exception as problem:
            error, numbers = described(predictions.get(name, Path(predicted)), problem), set()
            missing = int(name not in predictions and name not in problems)
            row = _with_nothing(whole, min_lesion_ml)
            rows = {label: _with_nothing(true(own), min_lesion_ml) for label, own in parts.items()}
            flags = {"missing": missing, "failed": 1 - missing}
        return _Compared(row | flags, {label: own | flags for label, own in rows.items()}, error, true_numbers, numbers)

    def bytes_of(name: str) -> int:
        return bytes_to_compare([*truths[name].files, *([predictions[name]] if name in predictions else [])])

    numbers = _Numbers()
    compared = Comparison({}, {}, {name: {} for name in parts})
    with closing(in_order(compare, list(truths), usable_cores(), bytes_of)) as cases:
        for name, case in zip(progress(list(truths)), cases, strict=True):
            numbers.true |= case.true
            numbers.predicted |= case.predicted
            if case.error is not None:
                compared.failures[name] = case.error
            if case.row is not None:
                compared.results[name] = case.row
            for label, own in case.rows.items():
                compared.by_label[label][name] = own
    if labels is not None and compared.results:
        numbers.check(labels, listed)
    return compared


@dataclass
class _Numbers:
    """What masks hold beside 0."""

    true: set[int] = field(default_factory=set)
    predicted: set[int] = field(default_factory=set)

    def check(self, labels: Labels, listed: Collection[int] | None) -> None:
        """Warn of labels that no truth has, whose figures say nothing, and of numbers that belong to no label, but for
        those that a list leaves out of its truths.
        """
        left_out = set() if listed is None else self.true - set(listed)
        for name, own in zip(labels.names, labels.numbers, strict=True):
            if not self.true & set(own):
                warnings.warn(
                    f"{name}: expected voxels of its number {' or '.join(map(str, own))} in some truth, found "
                    f"{_joined(self.true)}; a prediction without it counts as right", stacklevel=2,
                )  # fmt: skip
        for kind, found in (("true", self.true), ("predicted", self.predicted)):
            if others := found - set(labels.every) - left_out:
                warnings.warn(
                    f"{kind} masks: expected the numbers {_joined(labels.every)} of the labels, found "
                    f"{_joined(others)} too, which count as background", stacklevel=2,
                )  # fmt: skip


def _numbers_of(mask: Mask) -> set[int]:
    """Of a mask of one label that a scale factor made a fraction: 1."""
    return {number_of(label) if len(mask.labels) == 1 else round(label) for label in mask.labels}


def _joined(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"


def _failed(predicted: Path, predictions: Mapping[str, Path]) -> dict[str, str]:
    """By the names of truths, of which that of a single mask may be another than its own."""
    failed = failed_before(predicted, predictions)
    if predicted.is_file():
        return {name: failed[case_name(path)] for name, path in predictions.items() if case_name(path) in failed}
    return failed


def predictions_without_truth(predicted: str | Path, truth: str | Path) -> list[str]:
    """Names in a folder of predictions that no truth has, but for the residual maps that ``predict`` writes beside."""
    if Path(truth).is_file():
        return []
    return left_over(predicted, find_cases(truth)[0])


def left_over(predicted: str | Path, truths: Collection[str]) -> list[str]:
    """Names in a folder of predictions but for these, and but for residual maps."""
    names, _ = find_cases(predicted, truths)
    cases = names.keys() | set(truths)
    maps = {name for name in names if is_map(name, cases)}
    return sorted(names.keys() - set(truths) - maps)


def _plausible(mask: Mask, most: float) -> Mask:
    if mask.share > most or mask.share == 1:
        warnings.warn(f"{mask.name}: {mask.share:.0%} of the volume are marked as lesion", stacklevel=2)
    return mask


def _compare(predicted: Mask, truth: Mask, min_lesion_ml: float) -> dict[str, float]:
    check_grid(predicted, truth.name, truth.shape, truth.affine)
    return evaluate_masks(predicted.voxels, truth.voxels, truth.affine, min_lesion_ml)


def _with_nothing(truth: Mask, min_lesion_ml: float) -> dict[str, float]:
    """What a prediction that is missing or cannot be used counts as."""
    return evaluate_masks(np.zeros_like(truth.voxels), truth.voxels, truth.affine, min_lesion_ml) | {"dice": 0.0}


def described(path: Path, error: Exception) -> str:
    """An error about a file in one line; of one that nobody foresaw the traceback."""
    if isinstance(error, GrcsfError | OSError | Warning):  # warnings are errors under -W error
        return str(error)
    if is_out_of_memory(error):
        return f"{path}: not enough memory to compare it" + (f": {error}" if str(error) else "")
    return f"{path}: unexpected error\n{''.join(traceback.format_exception(error))}"
