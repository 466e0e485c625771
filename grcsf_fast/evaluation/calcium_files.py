"""Predicted calcifications in files against those of a list of cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import list_cases
from ..data.images import open_image, read_voxels
from ..data.masks import Mask, check_grid, load_mask
from ..data.volumes import load_volume
from ..datasets.cases_file import CaseList, ListedCase, load_lesion, only_image
from ..errors import GrcsfError
from .calcium import compare_calcium

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
        image or truth cannot be used. A prediction that is missing or cannot be used counts as an empty one.

    Raises:
        ArgumentError: a case of several images.
        FileNotFoundError: no predictions.
    """
    predictions = list_cases(predicted)
    arteries = arteries_of(listing)
    rows: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for case in progress(list(cases)):
        image = only_image(case, listing)
        try:
            volume = load_volume(image)
            truth = load_lesion(case, listing, volume.data, volume.name)
            check_grid(truth, volume.name, volume.data.shape, volume.affine)
            labels = np.where(truth.voxels, _labels(case, arteries), 0)
        except (GrcsfError, OSError, Warning) as error:  # warnings are errors under -W error
            failures[case.name] = str(error)
            continue
        found = _prediction(predictions, case.name, truth)
        rows[case.name] = compare_calcium(found, labels, volume.data, volume.affine, arteries)
    return rows, failures


def _labels(case: ListedCase, arteries: Mapping[int, str]) -> np.ndarray:
    """The largest label of each voxel among the masks; without arteries 1 throughout."""
    if not arteries:
        return np.ones(1, np.int32)
    stored = [np.rint(read_voxels(open_image(mask))).astype(np.int32) for mask in case.masks]
    return np.maximum.reduce(stored)


def _prediction(predictions: Mapping[str, Path], name: str, truth: Mask) -> np.ndarray:
    """The predicted voxels; none where there is no prediction to use, as the comparison of masks reports."""
    try:
        mask = load_mask(predictions[name])
        check_grid(mask, truth.name, truth.shape, truth.affine)
    except (KeyError, GrcsfError, OSError, Warning):
        return np.zeros(truth.shape, dtype=bool)
    return mask.voxels
