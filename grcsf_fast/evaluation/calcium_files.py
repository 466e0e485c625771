"""Predicted calcifications in files against those of a list of cases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import case_name, find_cases
from ..data.images import check_memory, examine
from ..data.labels import Labels
from ..data.masks import ANY_LABEL, Mask, check_grid, read_masks
from ..data.volumes import load_volume
from ..datasets.cases_file import CaseList, ListedCase, only_image
from ..datasets.lesions import load_ignored, load_lesion
from ..errors import GrcsfError
from ..runtime.control_groups import usable_cores
from ..runtime.memory import is_out_of_memory
from ..runtime.threads import in_order
from .calcium import compare_calcium
from .chosen_labels import Reported, chosen_by_list, reported
from .folders import bytes_to_compare, described
from .predictions import failed_before

__all__ = ["arteries_of", "evaluate_calcium"]


def arteries_of(listing: CaseList) -> dict[int, str]:
    """Names of the arteries whose labels the list keeps, by label: of all, or of those it was made with."""
    return {
        label: name for label, name in listing.label_names.items() if listing.labels is None or label in listing.labels
    }


def evaluate_calcium(
    predicted: str | Path,
    listing: CaseList,
    cases: Sequence[ListedCase],
    progress: Callable[[list[ListedCase]], Iterable[ListedCase]] = lambda cases: cases,
    labels: Labels | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Compare the calcifications of a list's cases with the predictions of their names.

    Args:
        predicted: folder of masks.
        listing: the cases belong to; its ``label_names`` are the arteries.
        cases: each with one image in Hounsfield units and masks.
        progress: wraps the list of cases.
        labels: of the predictions; None: those of their reports, or none. Where they tell all arteries apart, the
            figures of each count its own label alone. Of arteries that the list leaves out nothing counts then, nor
            where :func:`chosen_by_list` says so.

    Returns:
        By case what :func:`grcsf_fast.evaluation.calcium.compare_calcium` says, and errors by case, of those whose
        image or truth cannot be used. A prediction that is missing or cannot be used, or belongs to a case that
        ``predict`` failed at since, counts as an empty one; ``missing`` or ``failed`` is 1 then.

    Raises:
        ArgumentError: a case of several images.
        FileNotFoundError: no predictions.
    """
    known = {case.name for case in cases}
    predictions, problems = find_cases(predicted, known)
    failed = failed_before(Path(predicted), known) | {
        case_name(entry, known): str(one) for entry, one in problems.items()
    }
    arteries = arteries_of(listing)
    reports = reported(predicted, known)
    said = _numbers_said(reports.values())
    labelled = any(_tells_apart(arteries, own) for own in (said, [] if labels is None else labels.numbers))
    numbers: Container[int] | None = None
    if labelled:
        numbers = ANY_LABEL if listing.labels is None else listing.labels
    elif labels is None and (chosen := chosen_by_list(listing, reports)) is not None:
        numbers = chosen.every
    images = {case.name: only_image(case, listing) for case in cases}
    rows: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}

    def compare(case: ListedCase) -> dict[str, Any] | Exception:
        try:
            image = images[case.name]
            check_memory(*map(examine, (image, *case.masks)))
            volume = load_volume(image)
            truth = load_lesion(case, listing, volume, ANY_LABEL if listing.labels is None else listing.labels)
            check_grid(truth, volume.name, volume.data.shape, volume.affine)
            found = _prediction(predictions, failed, case.name, truth, numbers, arteries if labelled else ())
            flags = {"missing": int(case.name not in predictions and case.name not in failed), "failed": 0}
            if found is None:
                flags["failed"] = 1 - flags["missing"]
                found = np.zeros(truth.shape, dtype=bool)
            true = truth.voxels if arteries else truth.voxels > 0
            if (ignored := load_ignored(case, listing)) is not None:  # also where another mask of the case marks lesion
                found, true = found * ~ignored.voxels, true * ~ignored.voxels
            return compare_calcium(found, true, volume.data, volume.affine, arteries, labelled) | flags
        except Exception as error:
            if not isinstance(error, GrcsfError | OSError | Warning) and not is_out_of_memory(error):
                raise
            return error  # warnings are errors under -W error

    def bytes_of(case: ListedCase) -> int:
        prediction = [predictions[case.name]] if case.name in predictions else []
        return bytes_to_compare([images[case.name], *case.masks, *prediction])

    with closing(in_order(compare, cases, usable_cores(), bytes_of)) as compared:
        for case, row in zip(progress(list(cases)), compared, strict=True):
            if isinstance(row, Exception):
                failures[case.name] = described(case.masks[0], row)
            else:
                rows[case.name] = row
    return rows, failures


def _numbers_said(predictions: Iterable[Reported]) -> list[Collection[int]]:
    """The numbers of each label by the reports of predictions that have one; none where they do not agree."""
    held = [report.get("labels") for _, report in predictions if report]
    named = [[own.get("numbers", []) for own in one.values()] if isinstance(one, dict) else [] for one in held]
    return named[0] if named and all(one == named[0] for one in named) else []


def _tells_apart(arteries: Collection[int], labels: Sequence[Collection[int]]) -> bool:
    """Whether labels of these numbers show each artery, and none like another."""
    shown = {artery: frozenset(place for place, own in enumerate(labels) if artery in own) for artery in arteries}
    return bool(shown) and all(shown.values()) and len(set(shown.values())) == len(shown)


def _prediction(
    predictions: Mapping[str, Path],
    failed: Collection[str],
    name: str,
    truth: Mask,
    numbers: Container[int] | None,
    arteries: Collection[int],
) -> np.ndarray | None:
    """The predicted voxels of these numbers, None: of any; with those of arteries that are to be told apart.

    None where there is no prediction to use, as the comparison of masks reports.
    """
    if name in failed:
        return None
    try:
        stored = read_masks([predictions[name]], truth)
        found = stored.marked(numbers).voxels
        if arteries:
            other = next(number for number in range(1, 256) if number not in arteries)
            found = np.where(found, np.uint8(other), np.uint8(0))
            for artery in arteries:
                found[stored.marked([artery]).voxels] = artery
        return found
    except (KeyError, GrcsfError, OSError, Warning, MemoryError):
        return None
