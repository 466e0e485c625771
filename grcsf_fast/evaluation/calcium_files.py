"""Predicted calcifications in files against those of a list of cases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import case_name, find_cases
from ..data.images import check_memory, examine
from ..data.masks import ANY_LABEL, Mask, check_grid, load_mask
from ..data.volumes import load_volume
from ..datasets.cases_file import CaseList, ListedCase, load_lesion, only_image
from ..errors import GrcsfError
from ..runtime.control_groups import usable_cores
from ..runtime.memory import is_out_of_memory
from ..runtime.threads import in_order
from .calcium import compare_calcium
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
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Compare the calcifications of a list's cases with the predictions of their names.

    Args:
        predicted: folder of masks.
        listing: the cases belong to; its ``label_names`` are the arteries.
        cases: each with one image in Hounsfield units and masks.
        progress: wraps the list of cases.

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
            found = _prediction(predictions, failed, case.name, truth)
            flags = {"missing": int(case.name not in predictions and case.name not in failed), "failed": 0}
            if found is None:
                flags["failed"] = 1 - flags["missing"]
                found = np.zeros(truth.shape, dtype=bool)
            labels = truth.voxels if arteries else truth.voxels > 0
            return compare_calcium(found, labels, volume.data, volume.affine, arteries) | flags
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


def _prediction(predictions: Mapping[str, Path], failed: Collection[str], name: str, truth: Mask) -> np.ndarray | None:
    """The predicted voxels; None where there is no prediction to use, as the comparison of masks reports."""
    if name in failed:
        return None
    try:
        opened = examine(predictions[name])
        check_grid(opened, truth.name, truth.shape, truth.affine)
        check_memory(opened)
        return load_mask(predictions[name]).voxels
    except (KeyError, GrcsfError, OSError, Warning, MemoryError):
        return None
