"""Folds for cross-validation: by subject, alike in lesion volume and site."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import ArgumentError
from .cases_file import CaseList, ListedCase
from .folders import subject_of

__all__ = ["hold_out", "with_folds"]


def with_folds(listing: CaseList, count: int = 5, seed: int = 0) -> CaseList:
    """The list with a fold for every case that has a mask, but for those of a test set.

    All cases of a subject are in one fold. Subjects are dealt out by chance, so that every fold has as many without
    lesion, with a small one and with a large one as another, overall and of each site. A small one is up to the median
    of the subjects that have lesion. The same list and seed give the same folds.

    Args:
        listing: whose cases have their ``lesion_ml``.
        count: of folds.
        seed: of the draw.

    Raises:
        ArgumentError: fewer subjects with masks than folds.
    """
    subjects: dict[str, list[ListedCase]] = {}
    for case in sorted(listing.cases, key=lambda case: case.name):
        if case.masks and not case.test:
            subjects.setdefault(case.subject, []).append(case)
    if not subjects:
        return replace(listing, folds=0, seed=seed)
    if len(subjects) < count:
        raise ArgumentError(f"--folds: expected at most {len(subjects)}, the subjects with masks, got {count}")
    sizes = _sizes(subjects)
    order = np.random.default_rng(seed).permutation(len(subjects))
    names = list(subjects)
    drawn = sorted((names[index] for index in order), key=lambda name: (sizes[name], subjects[name][0].site or ""))
    folds: dict[str, int] = {}
    taken: Counter[tuple] = Counter()
    for name in drawn:
        size, site = sizes[name], subjects[name][0].site
        # The emptiest fold of its kind; of several the emptiest of its volume, then of its site, then of all.
        kinds = (("both", size, site), ("size", size), ("site", site), ("all",))
        fold = min(range(count), key=lambda fold: [taken[fold, *kind] for kind in kinds])
        folds[name] = fold
        taken.update((fold, *kind) for kind in kinds)
    cases = tuple(
        replace(case, fold=folds[case.subject] if case.masks and not case.test else None) for case in listing.cases
    )
    return replace(listing, cases=cases, folds=count, seed=seed)


def hold_out(names: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Names of files that are held out, and those of the others, of which at least one subject is left.

    Args:
        names: in an order by chance; a subject is what :func:`subject_of` says.
        count: held out, or more where the last subject has several files.
    """
    subjects: dict[str, list[str]] = {}
    for name in names:
        subjects.setdefault(subject_of(name), []).append(name)
    held: list[str] = []
    for own in list(subjects.values())[:-1]:
        if len(held) >= count:
            break
        held += own
    return held, [name for name in names if name not in held]


def _sizes(subjects: dict[str, list[ListedCase]]) -> dict[str, int]:
    """By subject: 0 without lesion, 1 small, 2 large."""
    volumes = {name: sum(case.lesion_ml or 0.0 for case in cases) for name, cases in subjects.items()}
    found: Sequence[float] = [volume for volume in volumes.values() if volume > 0]
    middle = statistics.median(found) if found else 0.0
    return {name: 0 if volume == 0 else 1 if volume <= middle else 2 for name, volume in volumes.items()}
