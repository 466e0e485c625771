"""Layouts of data sets by name, and the way from a folder to a list of cases with volumes and folds."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePath

import numpy as np

from ..data.masks import Mask
from ..errors import ArgumentError
from .atlas import find_atlas
from .bids import find_bids
from .cases_file import CaseList, CasesError, ListedCase, load_lesion
from .decathlon import find_decathlon
from .folders import LayoutError, subject_of, without_ending
from .folds import with_folds, with_splits
from .nnunet import find_nnunet
from .orcascore import find_orcascore
from .pairs import find_pairs
from .scans import find_scans

__all__ = ["LAYOUTS", "list_cases_of"]

NAMED = re.compile(r"([A-Za-z][\w-]*)=(.+)", re.DOTALL)  # pattern of a channel
MOST_NAMED = 10  # cases in a message


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


# By name: what is to be given, and the function that looks for cases there.
LAYOUTS: dict[str, tuple[str, Callable[..., CaseList]]] = {
    "atlas-r2": ("ROOT", find_atlas),
    "bids": ("ROOT", find_bids),
    "decathlon": ("ROOT", find_decathlon),
    "nnunet": ("ROOT", find_nnunet),
    "orcascore": ("ROOT", find_orcascore),
    "pairs": ("IMAGES MASKS", find_pairs),
    "scans": ("ROOT PATTERN", find_scans_of_channels),
}


def list_cases_of(
    layout: str,
    roots: Sequence[str | Path],
    labels: Sequence[int] | None = None,
    channel: int | None = None,
    folds: int = 5,
    seed: int = 0,
    splits: str | Path | None = None,
    progress: Callable[[list], Iterable] = lambda cases: cases,
    mask: str | None = None,
) -> tuple[CaseList, tuple[float, ...]]:
    """Find the cases of a data set, read their masks and deal out folds.

    Args:
        layout: a name of :data:`LAYOUTS`.
        roots: the folders that it takes; of scans the folder and the pattern of their names, or one for each channel.
        labels: values of masks that are lesion; None: as the data set says, or all but 0.
        channel: the only one to list, from 0; None: all.
        folds: their number.
        seed: of the folds.
        splits: a ``splits_final.json`` of nnU-Net, whose folds are taken instead of drawn ones.
        progress: wraps the list of cases while their masks are read.
        mask: of BIDS how the paths of lesion masks end, where they do not have the names that are known.

    Returns:
        The list, and the values of masks that count as lesion in it, in order.

    Raises:
        LayoutError: the folders have another layout; the message says what was expected and what was found.
        ArgumentError: another number of folders than the layout takes, no such channel or label, more folds than
            subjects, or ``mask`` of another layout than BIDS.
        CasesError: two cases of one name, or masks that cannot be read; the message names the first ten. Or splits of
            other cases.
        FileNotFoundError: no such splits.
    """
    expected, find = LAYOUTS[layout]
    if len(roots) < len(expected.split()) or (len(roots) > len(expected.split()) and layout != "scans"):
        raise ArgumentError(f"{layout}: expected {expected}, got {' '.join(map(str, roots))}")
    if mask is not None and layout != "bids":
        raise ArgumentError(f"--mask: expected none beside {layout}, whose masks have names of their own, got {mask}")
    listing = find(*map(Path, roots), **({} if mask is None else {"mask": mask}))
    counts = Counter(case.name for case in listing.cases)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise CasesError(f"{roots[0]}: expected a file name of its own for every case, found {twice[0]} several times")
    if channel is not None:
        listing = _with_channel(listing, channel)
    if labels is not None:
        listing = replace(listing, labels=tuple(sorted(set(labels))))
    if splits is not None:  # before any mask is read, which takes a while
        listing = with_splits(listing, splits)
    listing, found = _measured(listing, progress)
    if labels and not any(case.masks for case in listing.cases):
        raise ArgumentError("--labels: expected masks to choose values of, but no case has one")
    if absent := sorted(set(labels or ()) - set(found)):
        values = ", ".join(f"{value:g}" for value in _measured(replace(listing, labels=None), progress)[1])
        raise ArgumentError(f"--labels: expected values of the masks, which are {values or 'all 0'}, got {absent[0]}")
    ordered = replace(listing, cases=tuple(sorted(listing.cases, key=lambda case: case.name)))
    return with_folds(ordered, folds, seed) if splits is None else ordered, found


def _with_channel(listing: CaseList, channel: int) -> CaseList:
    if channel >= len(listing.channels):
        known = ", ".join(f"{number} {name}" for number, name in enumerate(listing.channels))
        raise ArgumentError(f"--channel: expected one of {known}, got {channel}")
    cases = tuple(replace(case, images=(case.images[channel],)) for case in listing.cases)
    return replace(listing, cases=cases, channels=(listing.channels[channel],))


def _measured(listing: CaseList, progress: Callable[[list], Iterable]) -> tuple[CaseList, tuple[float, ...]]:
    """The list with the volume of every case's lesions, and the values that count as lesion."""
    cases, problems, found = [], [], set[float]()
    for case in progress(list(listing.cases)):
        if case.masks:
            try:
                mask = load_lesion(case, listing)
            except (OSError, ValueError, Warning) as error:  # warnings are errors under -W error
                problems.append(str(error))
                continue
            found.update(mask.labels)
            case = replace(case, lesion_ml=_millilitres(mask))
        cases.append(case)
    if problems:
        more = f"\n  and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        listed = "".join(f"\n  {text}" for text in problems[:MOST_NAMED])
        raise CasesError(f"the masks of {len(problems)} of {len(listing.cases)} cases cannot be used:{listed}{more}")
    return replace(listing, cases=tuple(cases)), tuple(sorted(found))


def _millilitres(mask: Mask) -> float:
    voxel = abs(float(np.linalg.det(mask.affine[:3, :3])))
    # Whole microlitres: enough to compare volumes, and easy to read in the list.
    return round(float(mask.voxels.sum()) * voxel / 1000, 3)
