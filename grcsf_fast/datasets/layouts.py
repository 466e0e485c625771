"""Layouts of data sets by name, and the way from a folder to a list of cases with volumes and folds."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data.images import OneChannel
from ..data.masks import ANY_LABEL, Mask, number_of
from ..data.names import too_long
from ..data.reports import rounded_ml
from ..errors import ArgumentError
from .atlas import find_atlas
from .bids import find_bids
from .cases_file import CaseList, CasesError, ListedCase
from .decathlon import find_decathlon
from .folds import with_folds, with_splits
from .lesions import read_lesions
from .nnunet import find_nnunet
from .orcascore import find_orcascore
from .pairs import find_pairs
from .patterns import check_single, find_scans_of_channels

__all__ = ["LAYOUTS", "list_cases_of"]

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
OF_CHANNELS = ("pairs", "scans")  # take a pattern for each channel
WITH_MASKS = ("bids", "pairs")  # take a pattern of masks
MOST_NAMED = 10  # cases in a message


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
    ignored: Sequence[int] = (),
) -> tuple[CaseList, tuple[float, ...]]:
    """Find the cases of a data set, read their masks and deal out folds.

    Args:
        layout: a name of :data:`LAYOUTS`.
        roots: the folders that it takes; of scans the folder and the pattern of their names, or one for each channel,
            which may follow the folders of pairs too.
        labels: values of masks that are lesion; None: as the data set says, or all but 0.
        channel: the only one to list, from 0; None: all.
        folds: their number.
        seed: of the folds.
        splits: a ``splits_final.json`` of nnU-Net, whose folds are taken instead of drawn ones.
        progress: wraps the list of cases while their masks are read.
        mask: of BIDS and pairs how the paths of lesion masks end, where they do not have the names that are known.
        ignored: values of masks whose voxels nobody annotated, beside those that the data set names.

    Returns:
        The list, and all values of its masks but 0, in order.

    Raises:
        LayoutError: the folders have another layout, or of nnU-Net, pairs and scans a listed file holds several
            images; the message says what was expected and what was found.
        ArgumentError: another number of folders than the layout takes, no such channel or label, a label that is
            ignored, none that is not, more folds than subjects, or ``mask`` of another layout.
        CasesError: two cases of one name, or of the same images and not of one subject, a name that is too long for
            files, or masks that cannot be read; the message names the first ten. Or splits of other cases.
        FileNotFoundError: no such splits.
    """
    expected, find = LAYOUTS[layout]
    if len(roots) < len(expected.split()) or (len(roots) > len(expected.split()) and layout not in OF_CHANNELS):
        raise ArgumentError(f"{layout}: expected {expected}, got {' '.join(map(str, roots))}")
    if mask is not None and layout not in WITH_MASKS:
        raise ArgumentError(f"--mask: expected none beside {layout}, whose masks have names of their own, got {mask}")
    listing = find(*map(Path, roots), **({} if mask is None else {"mask": mask}))
    counts = Counter(case.name for case in listing.cases)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise CasesError(f"{roots[0]}: expected a file name of its own for every case, found {twice[0]} several times")
    if long := next(filter(too_long, counts), None):
        raise CasesError(f"{roots[0]}: {too_long(long)}")
    _check_subjects_of_images(listing, roots[0])
    if channel is not None:
        listing = _with_channel(listing, channel)
    if layout in ("nnunet", "pairs", "scans"):
        check_single(listing, roots, mask)
    if ignored:
        listing = replace(listing, ignored=tuple(sorted({*listing.ignored, *ignored})))
    if both := sorted(set(labels or ()) & set(listing.ignored)):
        raise ArgumentError(
            f"--labels: expected values of lesions, got {both[0]}, which stands for voxels that nobody annotated"
        )
    if (counted := listing.labels if labels is None else labels) is not None:
        listing = replace(listing, labels=tuple(sorted(set(counted) - set(listing.ignored))))
    if splits is not None:  # before any mask is read, which takes a while
        listing = with_splits(listing, splits)
    listing, found = _measured(listing, progress)
    listing = replace(listing, labels=_chosen(listing, found, labels, ignored))
    ordered = replace(listing, cases=tuple(sorted(listing.cases, key=lambda case: case.name)))
    return with_folds(ordered, folds, seed) if splits is None else ordered, found


def _check_subjects_of_images(listing: CaseList, root: str | Path) -> None:
    """See that what a network is trained on is not in the fold that it is validated on under another name.

    Raises:
        CasesError: the same images are of two cases with masks that are not of one subject.
    """
    first: dict[tuple[str, ...], ListedCase] = {}
    for case in listing.cases:
        if not case.masks:
            continue
        files = (image.path if isinstance(image, OneChannel) else image for image in case.images)
        other = first.setdefault(tuple(os.path.realpath(file) for file in files), case)
        if other.subject != case.subject:
            raise CasesError(
                f"{root}: expected images of its own for every subject, found {case.images[0]} as that of {other.name} "
                f"and of {case.name}; list it once, or call both sub-NAME_..., which keeps them in one fold"
            )


def _with_channel(listing: CaseList, channel: int) -> CaseList:
    if channel >= len(listing.channels):
        known = ", ".join(f"{number} {name}" for number, name in enumerate(listing.channels))
        raise ArgumentError(f"--channel: expected one of {known}, got {channel}")
    cases = tuple(replace(case, images=(case.images[channel],)) for case in listing.cases)
    return replace(listing, cases=cases, channels=(listing.channels[channel],))


def _chosen(
    listing: CaseList, found: Sequence[float], labels: Sequence[int] | None, ignored: Sequence[int]
) -> tuple[int, ...] | None:
    """The labels of a list whose masks have been read: where some values are ignored they are always given.

    Raises:
        ArgumentError: values that were asked for and are in no mask, or all values of the masks are ignored.
    """
    values, numbers = ", ".join(f"{value:g}" for value in found) or "all 0", {number_of(value) for value in found}
    for option, asked in (("--labels", labels), ("--ignored", ignored)):
        if asked and not any(case.masks for case in listing.cases):
            raise ArgumentError(f"{option}: expected masks to choose values of, but no case has one")
        if absent := sorted(set(asked or ()) - numbers):
            raise ArgumentError(f"{option}: expected values of the masks, which are {values}, got {absent[0]}")
    if not listing.ignored:
        return listing.labels
    counted = tuple(sorted(numbers - set(listing.ignored))) if listing.labels is None else listing.labels
    if ignored and not counted:
        raise ArgumentError(
            f"--ignored: expected a value to be left that is lesion, of the masks' {values}, got "
            f"{','.join(map(str, ignored))}"
        )
    return counted


def _measured(listing: CaseList, progress: Callable[[list], Iterable]) -> tuple[CaseList, tuple[float, ...]]:
    """The list with the volume of every case's lesions, and all values of the masks but 0."""
    cases, problems, found = [], [], set[float]()
    for case in progress(list(listing.cases)):
        if case.masks:
            try:
                marked, _ = read_lesions(case, listing)
                mask = marked(None)
                found.update(mask.labels if listing.labels is None else marked(ANY_LABEL).labels)
            except (OSError, ValueError, Warning) as error:  # warnings are errors under -W error
                problems.append(str(error))
                continue
            case = replace(case, lesion_ml=_millilitres(mask))
        cases.append(case)
    if problems:
        more = f"\n  and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        listed = "".join(f"\n  {text}" for text in problems[:MOST_NAMED])
        raise CasesError(f"the masks of {len(problems)} of {len(listing.cases)} cases cannot be used:{listed}{more}")
    return replace(listing, cases=tuple(cases)), tuple(sorted(found))


def _millilitres(mask: Mask) -> float:
    voxel = abs(float(np.linalg.det(mask.affine[:3, :3])))
    return rounded_ml(float(mask.voxels.sum()) * voxel / 1000)
