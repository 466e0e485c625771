"""Scans in folders of their own, without masks: to be segmented, or for the training of an autoencoder."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from ..data.files import CHANNEL, FOREIGN, SUFFIXES, case_name, holds_dicom
from ..data.reports import REPORT, read_report
from ..errors import ArgumentError
from .cases_file import CaseList, ListedCase
from .folders import LayoutError, check_all_found, check_folder, files_below, leads_nowhere, subject_of, to_nothing

__all__ = ["find_scans"]

DERIVED = ("derivatives", "sourcedata")  # of BIDS: other forms of the scans


def find_scans(root: Path, pattern: str | Path) -> CaseList:
    """The scans anywhere below a folder whose path ends as a pattern says; hidden files and folders are left out.

    A case has the name of its file. Where two would have the same name, all are called by their path below the folder,
    its parts joined by ``_``, and a warning says so. Another one says how many that match are left out: results of a
    prediction, which its reports name; what lies in BIDS's ``derivatives`` and ``sourcedata``, unless the pattern names
    them; formats that are not read; and links to nothing.

    Args:
        root: the folder.
        pattern: such as ``*_T1w.nii.gz``, or ``anat/*_T1w.nii.gz`` with the folder; of a folder with DICOM files the
            folder's, such as ``T1_MPRAGE``. Case matters.

    Raises:
        ArgumentError: a pattern that is no end of a path.
        LayoutError: no folder, no such scan, several channels of a case, or two scans that would have one name.
    """
    wanted = PurePath(pattern)
    if not wanted.parts or wanted.is_absolute() or "**" in wanted.parts or ".." in wanted.parts:
        raise ArgumentError(
            f"scans: expected how the paths of scans end, '*_T1w.nii.gz' or 'anat/*_T1w.nii.gz', got {str(pattern)!r}"
        )
    expected = f"scans called {wanted} in it or below it"
    check_folder(root, expected)
    files = list(files_below(root))
    below = sorted({*files, *(file.parent for file in files)} - {root})
    matching = [path for path in below if path.relative_to(root).match(str(wanted))]
    results = set(_results({path.parent for path in matching}))
    derived = {name for name in DERIVED if name not in wanted.parts}
    is_series = functools.cache(holds_dicom)
    found, links, left = list[Path](), list[Path](), Counter[str]()
    for path in matching:
        name = path.name.lower()
        foreign = path.is_file() and name.endswith(FOREIGN) and not is_series(path.parent)
        link = leads_nowhere(path)
        if not (foreign or (name.endswith(SUFFIXES) if link or path.is_file() else is_series(path))):
            continue
        if path in results:
            left["results of predictions"] += 1
        elif not derived.isdisjoint(path.relative_to(root).parts[:-1]):
            left[" or ".join(DERIVED)] += 1
        elif foreign:
            left["of formats that are not read"] += 1
        elif link:
            links.append(path.relative_to(root))
        else:
            found.append(path)
    if left or links:
        counts = ", ".join(
            [*(f"{count} {reason}" for reason, count in sorted(left.items())), *([to_nothing(links)] if links else [])]
        )
        warnings.warn(f"{root}: left out of what is called {wanted}: {counts}", stacklevel=2)
    check_all_found(root, expected, [path.relative_to(root) for path in found], [], files)
    names = _names(root, found)
    return CaseList(
        "scans",
        tuple(ListedCase(name, (path,), (), subject_of(name)) for name, path in zip(names, found, strict=True)),
    )


def _results(folders: set[Path]) -> Iterator[Path]:
    """What predictions have written into these folders, by their reports."""
    for folder in folders:
        for report in folder.glob(f"*{REPORT}"):
            yield from (folder / name for name in read_report(report).get("outputs", {}))


def _names(root: Path, scans: Sequence[Path]) -> list[str]:
    """Of the cases, each different."""
    own = {path: case_name(path) for path in scans}
    in_folders = {(path.parent, name) for path, name in own.items()}
    for path, name in own.items():
        channel = CHANNEL.fullmatch(name)
        if channel and (path.parent, channel[1]) in in_folders:
            raise LayoutError(f"{path}: expected one image of each case, found channels of {channel[1]} by their names")
    names = list(own.values())
    if len(counts := Counter(names)) < len(names):
        again = counts.most_common(1)[0][0]
        warnings.warn(f"{root}: several are called {again}, so all cases are called by their paths", stacklevel=3)
        names = [case_name("_".join(path.relative_to(root).parts)) for path in scans]
    first: dict[str, Path] = {}
    for name, path in zip(names, scans, strict=True):
        if first.setdefault(name, path) != path:
            raise LayoutError(
                f"{root}: expected a name of its own for every case, found {name} of {first[name]} and {path}"
            )
    return names
