"""Labels of a list of cases that count, in predictions that tell labels apart too."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..data.files import case_name, find_cases
from ..data.labels import Labels
from ..data.masks import ANY_LABEL, number_of, read_masks
from ..data.reports import REPORT, read_report
from ..datasets.cases_file import CaseList

__all__ = ["Reported", "chosen_by_list", "named_by_list", "reported"]


class Reported(NamedTuple):
    """The mask of a prediction and what its report says, empty without one."""

    path: Path
    report: dict[str, Any]


def reported(predicted: str | Path, names: Collection[str] = ()) -> dict[str, Reported]:
    """Mask and report of each prediction, by case.

    Args:
        predicted: file or folder.
        names: of the cases, where they are known; others are left out then.
    """
    with warnings.catch_warnings():  # the comparison gives them, and says what is wrong with the folder
        warnings.simplefilter("ignore")
        try:
            found, _ = find_cases(predicted, names)
        except (OSError, ValueError):
            return {}
    kept = {}
    for name, path in found.items():
        if not names or name in names:
            report = read_report(path.with_name(case_name(path, found) + REPORT))
            kept[name] = Reported(path, report if path.name in report.get("outputs", {}) else {})
    return kept


def chosen_by_list(listing: CaseList, predictions: Mapping[str, Reported]) -> Labels | None:
    """The labels that a list has chosen, where predictions tell labels apart; None: all that they mark counts.

    Reports say whether they do. Without any, they do if a mask holds other numbers than 0 and 1, or 255, which stands
    for 1 as often: a mask of 1 alone may hold the first of several labels, so the folder is asked, and not the mask.
    """
    if listing.labels is None:
        return None
    if reports := [report for _, report in predictions.values() if report]:
        apart = any("labels" in report for report in reports)
    else:
        apart = any(_tells_apart(path) for path, _ in predictions.values())
    return Labels(("lesion",), (listing.labels,), exclusive=False) if apart else None


def _tells_apart(path: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read_masks([path]).marked(ANY_LABEL).labels
        except (OSError, ValueError):  # the comparison says so
            return False
    numbers = {number_of(label) if len(found) == 1 else round(label) for label in found}
    return bool(numbers - {1, 255})


def named_by_list(listing: CaseList) -> Labels | None:
    """The labels that a list has chosen, by the names that it has for them."""
    named: dict[str, tuple[int, ...]] = {}
    for number in listing.labels or ():
        if name := listing.label_names.get(number):
            named[name] = (*named.get(name, ()), number)
    return Labels(tuple(named), tuple(named.values()), exclusive=False) if named else None
