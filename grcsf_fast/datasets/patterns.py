"""Images of several channels by a pattern for each, as in ``FLAIR='*_FLAIR.nii.gz' T1w='*_T1w.nii.gz'``."""

from __future__ import annotations

import re
import shlex
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path, PurePath

from ..data.images import OneChannel, examine
from ..errors import ArgumentError
from .cases_file import CaseList, ListedCase
from .folders import LayoutError, subject_of, without_ending
from .scans import find_scans

__all__ = [
    "Place",
    "called",
    "check_single",
    "find_channels",
    "find_scans_of_channels",
    "lacking",
    "left_open",
    "own_name",
    "path_name",
    "subjects_of",
]

NAME = r"[A-Za-z][\w-]*"  # of a channel
NAMED = re.compile(rf"({NAME}(?:,{NAME})*)=(.+)", re.DOTALL)  # pattern of a channel, or of several
MOST_NAMED = 10  # cases in a message

Image = Path | OneChannel
Place = tuple[tuple[str, ...], str]  # what a pattern leaves open of a path: of its folders, and of the name


def find_scans_of_channels(root: Path, *patterns: Path) -> CaseList:
    """The scans below a folder: see :func:`find_scans`, or of several channels by the pattern of each.

    A warning names the cases that lack an image, which are left out.

    Args:
        root: the folder.
        patterns: one as of :func:`find_scans`; or NAME=PATTERN for each channel, as of :func:`find_channels`.

    Raises:
        ArgumentError: patterns without names, several of one name, or one that is no end of a path.
        LayoutError: as :func:`find_scans` and :func:`find_channels`; or no case with an image of each channel.
    """
    if len(patterns) == 1 and not _is_named(str(patterns[0])):
        return find_scans(root, patterns[0])
    names, cases = find_channels(
        root, patterns, "scans: expected one pattern in quotes, or one for each of several channels"
    )
    whole = {place: own for place, own in cases.items() if len(own) == len(names)}
    if len(whole) < len(cases):
        shown = lacking(root, names, cases)
        if not whole:
            raise LayoutError(
                f"{root}: expected images of {' and '.join(names)} with paths that are alike but for what the patterns "
                f"say, found none: {shown}"
            )
        warnings.warn(f"{root}: left out are {len(cases) - len(whole)} of {len(cases)} cases: {shown}", stacklevel=2)
    every = called(root, list(whole))
    found = zip(every, whole.values(), subjects_of(every, list(whole)), strict=True)
    return CaseList(
        "scans",
        tuple(ListedCase(name, tuple(own[one] for one in names), (), subject) for name, own, subject in found),
        names,
    )


def find_channels(
    root: Path, patterns: Sequence[Path], expected: str
) -> tuple[tuple[str, ...], dict[Place, dict[str, Image]]]:
    """Images below a folder by a pattern for each channel.

    They are of one case where all that their patterns leave open is alike: the folder, and what stands for ``*``,
    ``sub-1`` of ``sub-1_T1w.nii.gz`` and ``sub-1_FLAIR.nii.gz``.

    Args:
        root: the folder.
        patterns: NAME=PATTERN, ``T1w=*_T1w.nii.gz``, with a pattern as of :func:`find_scans`; of files whose fourth
            axis are several channels NAME,NAME=PATTERN.
        expected: first words of a message about patterns that are none of these.

    Returns:
        The names in their order; and by what their paths leave open the images of each case by their names, of
        incomplete ones too.

    Raises:
        ArgumentError: patterns without names, names that channels cannot have, several of one name, or a pattern that
            is no end of a path.
        LayoutError: no image of a pattern, two of one case, one of two channels, or a file of other channels.
    """
    for pattern in map(str, patterns):
        wrong = [name for name in pattern.partition("=")[0].split(",") if re.fullmatch(NAME, name) is None]
        if "=" in pattern and wrong:
            raise ArgumentError(
                f"{pattern}: expected as name of a channel first a letter, then letters, digits, _ or -, got "
                f"{wrong[0]!r}"
            )
    named = [NAMED.fullmatch(str(pattern)) for pattern in patterns]
    by_names = [(tuple(found[1].split(",")), found[2]) for found in named if found is not None]
    every = tuple(name for names, _ in by_names for name in names)
    if len(by_names) < len(patterns) or len(set(every)) < len(every):
        raise ArgumentError(
            f"{expected} with a name of its own, as in FLAIR='*_FLAIR.nii.gz' T1w='*_T1w.nii.gz', or of 4-D "
            f"files FLAIR,T1w='*.nii.gz', got {' '.join(map(str, patterns))}"
        )
    cases: dict[Place, dict[str, Image]] = {}
    for names, pattern in by_names:
        with warnings.catch_warnings():
            # Of one name here are images of several cases, which are called otherwise.
            warnings.filterwarnings("ignore", message=".*: several are called ")
            paths = [Path(str(case.images[0])) for case in find_scans(root, pattern).cases]
        for path in paths:
            own = cases.setdefault(left_open(path.relative_to(root), pattern), {})
            if names[0] in own:
                raise LayoutError(f"{root}: expected one {names[0]} of each case, found {own[names[0]]} and {path}")
            of_it = (channel for channel, image in own.items() if path == getattr(image, "path", image))
            if (other := next(of_it, None)) is not None:
                raise LayoutError(
                    f"{root}: expected an image of its own as {names[0]}, found {path} as {other}; channels of 4-D "
                    f"files are named together, {other},{names[0]}='{pattern}'"
                )
            own.update(zip(names, _channels(path, names), strict=True))
    return every, cases


def _channels(path: Path, names: Sequence[str]) -> tuple[Image, ...]:
    """The images in a file.

    Raises:
        LayoutError: it holds another number of them.
    """
    if len(names) == 1:
        return (path,)
    if (count := _images_in(path)) not in (None, len(names)):
        raise LayoutError(
            f"{path}: expected {len(names)} channels ({', '.join(names)}) as the fourth axis, found {count}"
        )
    return tuple(OneChannel(path, number) for number in range(len(names)))


def _images_in(path: Path) -> int | None:
    """Length of a file's fourth axis, 1 without one; None of what cannot be read, of which whoever reads it speaks."""
    with suppress(OSError, ValueError):
        return examine(OneChannel(path, 0)).image.dataobj.shape[3]
    with suppress(OSError, ValueError):
        examine(path)
        return 1
    return None


def check_single(listing: CaseList, roots: Sequence[str | Path], mask: str | None = None) -> None:
    """See that no file that is listed as one image holds several, before networks meet it.

    Args:
        listing: channels of files are not looked at, and neither are folders with DICOM files.
        roots: what it was made of: folders, and patterns.
        mask: the pattern of masks, if there was one.

    Raises:
        LayoutError: some do; where patterns can name the channels, the message has the command.
    """
    counts: dict[str, set[int]] = {}
    several: dict[Path, int] = {}
    for case in listing.cases:
        for channel, image in zip(listing.channels, case.images, strict=False):
            if isinstance(image, Path) and not image.is_dir() and (count := _images_in(image)) is not None:
                counts.setdefault(channel, set()).add(count)
                several |= {image: count} if count > 1 else {}
    if several:
        path, count = next(iter(several.items()))
        more = f" and {len(several) - 1} more files of several" if len(several) > 1 else ""
        hint = "make a file of each"
        hint += ", or give a pattern that leaves them out" if listing.layout == "scans" else ""
        if listing.layout != "nnunet" and all(len(found) == 1 for found in counts.values()):
            folders = 2 if listing.layout == "pairs" else 1
            ending = path.name.removeprefix(without_ending(path.name))
            words = [shlex.join(["grcsf-fast", "cases", listing.layout, *map(str, roots[:folders])])]
            for pattern in map(str, roots[folders:] or (f"*{ending}",)):
                names, end = pattern.split("=", 1) if _is_named(pattern) else (listing.channels[0], pattern)
                whole = (_numbered(name, max(counts.get(name, {1}))) for name in names.split(","))
                words.append(f"{','.join(whole)}={shlex.quote(end)}")
            words += [f"--mask {shlex.quote(mask)}"] if mask is not None else []
            hint = f"channels have to be named: `{' '.join(words)} -o cases.json`"
        raise LayoutError(f"{path}: expected one image, found {count} along its fourth axis{more}; {hint}")


def _is_named(pattern: str) -> bool:
    """Whether a pattern has the name of a channel in front, or what is meant for one."""
    return re.match(r"[\w,-]+=", pattern) is not None


def _numbered(name: str, count: int) -> str:
    """Names of the images of a file, where it holds several."""
    return name if count == 1 else ",".join(f"{name}_{number}" for number in range(count))


def lacking(root: Path, names: Sequence[str], cases: Mapping[Place, Mapping[str, Image]]) -> str:
    """Which cases lack which channels, the first ten of them."""
    texts = [
        f"{'/'.join([*folders, own]) or root} lacks {', '.join(name for name in names if name not in images)}"
        for (folders, own), images in sorted(cases.items())
        if len(images) < len(names)
    ]
    return "; ".join(texts[:MOST_NAMED]) + ("; ..." if len(texts) > MOST_NAMED else "")


def own_name(root: Path, place: Place) -> str:
    """What a file's name leaves open, or else its folder."""
    folders, own = place
    return own or "_".join(folders) or root.resolve().name


def path_name(root: Path, place: Place) -> str:
    """All that a path leaves open, in one."""
    folders, own = place
    return "_".join(filter(None, [*folders, own])) or root.resolve().name


def called(root: Path, places: Sequence[Place]) -> list[str]:
    """Names of cases; by their paths, with a warning, where several have one name.

    Raises:
        LayoutError: two have one name by their paths too.
    """
    names = [own_name(root, place) for place in places]
    if (again := _twice(names)) is not None:
        warnings.warn(f"{root}: several are called {again}, so all cases are called by their paths", stacklevel=3)
        names = [path_name(root, place) for place in places]
        if (again := _twice(names)) is not None:
            raise LayoutError(f"{root}: expected a name of its own for every case, found {again} several times")
    return names


def subjects_of(names: Sequence[str], places: Sequence[Place]) -> list[str]:
    """Subjects of cases: by their names as in BIDS; or else, where cases share the first of the folders in which their
    paths differ, as sessions of a patient do, that folder; or else each case is one."""
    levels = zip(*(folders for folders, _ in places), strict=False)
    shared = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    first = [next(iter(folders[shared:]), None) for folders, _ in places]
    counts = Counter(filter(None, first))
    by_folder = len(counts) > 1 and max(counts.values()) > 1
    return [
        (folder if by_folder and subject_of(name) == name else None) or subject_of(name)
        for name, folder in zip(names, first, strict=True)
    ]


def _twice(names: Sequence[str]) -> str | None:
    name, count = Counter(names).most_common(1)[0]
    return name if count > 1 else None


def left_open(path: PurePath, pattern: str) -> Place:
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
