"""Folds for cross-validation: by subject, alike in lesion volume and site; or those that nnU-Net has drawn."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data.reports import read_json
from ..errors import ArgumentError
from .cases_file import CaseList, CasesError, ListedCase, check_subjects
from .folders import subject_of

__all__ = ["hold_out", "with_folds", "with_splits"]

MOST_NAMED = 3  # subjects in a message


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
        shown = ", ".join([*list(subjects)[:MOST_NAMED], *(["..."] if len(subjects) > MOST_NAMED else [])])
        known = f"{len(subjects)}, the subjects with masks ({shown})"
        raise ArgumentError(f"--folds: expected at most {known}, got {count}")
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


def with_splits(listing: CaseList, path: str | Path) -> CaseList:
    """The list with the folds of a ``splits_final.json`` of nnU-Net: of each split the cases under ``val``.

    Args:
        listing: whose cases have the names that nnU-Net has for them.
        path: of the file, ``[{"train": [name, ...], "val": [name, ...]}, ...]``.

    Raises:
        FileNotFoundError: no such file.
        CasesError: other content, a case with a mask that is not under ``val`` exactly once, a name that no such case
            has, or a subject in several folds; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a splits_final.json of nnU-Net, found none")
    try:
        text = read_json(path)
        folds = [[str(name) for name in split["val"]] for split in text]
    except (ValueError, TypeError, KeyError) as error:
        raise CasesError(f'{path}: expected [{{"train": [...], "val": [...]}}, ...], found other content') from error
    held = [(name, fold) for fold, names in enumerate(folds) for name in names]
    counts = Counter(name for name, _ in held)
    known = {case.name for case in listing.cases if case.masks and not case.test}
    if wrong := sorted(name for name in known if counts[name] != 1):
        raise CasesError(
            f'{path}: expected every case with a mask once under "val", found {wrong[0]} {counts[wrong[0]]} times'
            + (f" and {len(wrong) - 1} more so" if len(wrong) > 1 else "")
        )
    if strange := sorted(counts.keys() - known):
        raise CasesError(f'{path}: expected cases with a mask under "val", found {strange[0]}, which is none')
    found = dict(held)
    cases = tuple(replace(case, fold=found.get(case.name)) for case in listing.cases)
    check_subjects(path, cases)
    return replace(listing, cases=cases, folds=len(folds), seed=None)


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
