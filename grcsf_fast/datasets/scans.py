"""Scans in folders of their own, without masks: to be segmented, or for the training of an autoencoder."""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from ..data.files import CHANNEL, FOREIGN, SUFFIXES, case_name, holds_dicom
from ..data.reports import REPORT, read_report
from ..errors import ArgumentError
from .cases_file import CaseList, ListedCase
from .folders import LayoutError, check_all_found, check_folder, files_below, subject_of, without_ending

__all__ = ["find_scans_of_channels"]

DERIVED = ("derivatives", "sourcedata")  # of BIDS: other forms of the scans
NAMED = re.compile(r"([A-Za-z][\w-]*)=(.+)", re.DOTALL)  # pattern of a channel
MOST_NAMED = 10  # cases in a message


def find_scans(root: Path, pattern: str | Path) -> CaseList:
    """The scans anywhere below a folder whose path ends as a pattern says; hidden files and folders are left out.

    A case has the name of its file. Where two would have the same name, all are called by their path below the folder,
    its parts joined by ``_``, and a warning says so. Another one says how many that match are left out: results of a
    prediction, which its reports name; what lies in BIDS's ``derivatives`` and ``sourcedata``, unless the pattern names
    them; and formats that are not read.

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
    found, left = list[Path](), Counter[str]()
    for path in matching:
        name = path.name.lower()
        foreign = path.is_file() and name.endswith(FOREIGN) and not is_series(path.parent)
        if not (foreign or (name.endswith(SUFFIXES) if path.is_file() else is_series(path))):
            continue
        if path in results:
            left["results of predictions"] += 1
        elif not derived.isdisjoint(path.relative_to(root).parts[:-1]):
            left[" or ".join(DERIVED)] += 1
        elif foreign:
            left["of formats that are not read"] += 1
        else:
            found.append(path)
    if left:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(left.items()))
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


def find_scans_of_channels(root: Path, *patterns: Path) -> CaseList:
    """The scans below a folder: see :func:`find_scans`, or of several channels by the pattern of each.

    Images are of one case where all that their patterns leave open is alike: the folder, and what stands for ``*``,
    ``sub-1`` of ``sub-1_T1w.nii.gz`` and ``sub-1_FLAIR.nii.gz``. That names the case. A warning names those that lack
    an image, which are left out.

    Args:
        root: the folder.
        patterns: one as of :func:`find_scans`; or for each channel NAME=PATTERN, such as ``T1w=*_T1w.nii.gz``.

    Raises:
        ArgumentError: patterns without names, several of one name, or one that is no end of a path.
        LayoutError: as :func:`find_scans`; no case with an image of each channel, two of one, or one of two.
    """
    named = [NAMED.fullmatch(str(pattern)) for pattern in patterns]
    if len(patterns) == 1 and named[0] is None:
        return find_scans(root, patterns[0])
    by_name = {found[1]: found[2] for found in named if found is not None}
    if len(by_name) < len(patterns):
        raise ArgumentError(
            "scans: expected one pattern in quotes, or one for each of several channels with a name of its own, as in "
            f"FLAIR='*_FLAIR.nii.gz' T1w='*_T1w.nii.gz', got {' '.join(map(str, patterns))}"
        )
    cases: dict[tuple[tuple[str, ...], str], dict[str, Path]] = {}
    for name, pattern in by_name.items():
        with warnings.catch_warnings():
            # Of one name here are images of several cases, which are called otherwise.
            warnings.filterwarnings("ignore", message=".*: several are called ")
            paths = [Path(str(case.images[0])) for case in find_scans(root, pattern).cases]
        for path in paths:
            own = cases.setdefault(_left_open(path.relative_to(root), pattern), {})
            if name in own:
                raise LayoutError(f"{root}: expected one {name} of each case, found {own[name]} and {path}")
            if path in own.values():
                other = next(channel for channel, image in own.items() if image == path)
                raise LayoutError(f"{root}: expected an image of its own as {name}, found {path} as {other}")
            own[name] = path
    whole = {key: own for key, own in cases.items() if len(own) == len(by_name)}
    lacking = [
        f"{'/'.join([*folders, own]) or root} lacks {', '.join(name for name in by_name if name not in images)}"
        for (folders, own), images in sorted(cases.items())
        if len(images) < len(by_name)
    ]
    shown = "; ".join(lacking[:MOST_NAMED]) + ("; ..." if len(lacking) > MOST_NAMED else "")
    if not whole:
        raise LayoutError(
            f"{root}: expected images of {' and '.join(by_name)} with paths that are alike but for what the patterns "
            f"say, found none: {shown}"
        )
    if lacking:
        warnings.warn(f"{root}: left out are {len(lacking)} of {len(cases)} cases: {shown}", stacklevel=2)
    in_folders = ["_".join(folders) or root.resolve().name for folders, _ in whole]
    names = [own or folder for (_, own), folder in zip(whole, in_folders, strict=True)]
    if len(set(names)) < len(names):
        again = Counter(names).most_common(1)[0][0]
        warnings.warn(f"{root}: several are called {again}, so all cases are called by their paths", stacklevel=2)
        names = ["_".join(filter(None, [*folders, own])) or root.resolve().name for folders, own in whole]
    images = [tuple(own[channel] for channel in by_name) for own in whole.values()]
    found = zip(names, images, strict=True)
    return CaseList("scans", tuple(ListedCase(name, own, (), subject_of(name)) for name, own in found), tuple(by_name))


def _left_open(path: PurePath, pattern: str) -> tuple[tuple[str, ...], str]:
    """What the pattern of a path's end does not say: folders, and what stands for ``*``, ``?`` and ``[]``, also of a
    folder, and in the last part apart."""
    wanted = PurePath(pattern).parts
    opened = list[str]()
    for part, own in zip(path.parts[-len(wanted) :], wanted, strict=True):
        pieces = re.split(r"(\*+|\?|\[!?\]?[^\]]*\])", own)
        forms = {"*": "(.*)", "?": "(.)"}
        whole = "".join(
            forms.get(piece[:1], f"({piece.replace('[!', '[^')})") if place % 2 else re.escape(piece)
            for place, piece in enumerate(pieces)
        )
        match = re.fullmatch(whole, part, re.DOTALL)
        texts = (
            without_ending(text.removesuffix(".gz")) for text in (match.groups() if match is not None else (part,))
        )
        opened.append("_".join(filter(None, (text.strip("_-. ") for text in texts))))
    return (*path.parts[: -len(wanted)], *filter(None, opened[:-1])), opened[-1]
