"""``grcsf-fast cases``."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.files import check_writable
from ..data.masks import number_of
from ..datasets.cases_file import UNNAMED, CaseList, write_cases
from ..datasets.layouts import LAYOUTS, list_cases_of
from ..errors import ArgumentError
from ..runtime.progress import bar
from .options import number, numbers
from .shared import AT_LEAST_1, new_command, printable

__all__ = ["add"]


def add(commands: Any) -> None:
    layouts = ", ".join(f"{name} ({folders})" for name, (folders, _) in LAYOUTS.items())
    command = new_command(
        commands, "cases", run,
        "List the cases of a data set as it lies on disk, with folds by subject, for train, predict and evaluate; or "
        "scans in folders of their own. Every mask is read once; nothing is copied.",
    )  # fmt: skip
    command.add_argument("layout", choices=list(LAYOUTS), metavar="LAYOUT", help=f"and what it takes: {layouts}")
    command.add_argument(
        "roots", nargs="+", metavar="ROOT",
        help="the folder, or folders, of the data set; of scans also how their names end, such as '*_T1w.nii.gz'; of "
        "pairs and scans, for each of several channels FLAIR='*_FLAIR.nii.gz' T1w='*_T1w.nii.gz', of 4-D files "
        "FLAIR,T1w='*.nii.gz'",
    )  # fmt: skip
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="the list to write, such as cases.json")
    drawn = command.add_mutually_exclusive_group()
    drawn.add_argument(
        "--folds", type=number(int, least=2), default=argparse.SUPPRESS, metavar="N",
        help="for cross-validation (default: 5)",
    )  # fmt: skip
    drawn.add_argument(
        "--splits", metavar="FILE", default=argparse.SUPPRESS,
        help="take the folds of nnU-Net's splits_final.json (default: draw them)",
    )  # fmt: skip
    command.add_argument(
        "--seed", type=number(int, least=0), default=argparse.SUPPRESS, metavar="N", help="of drawn folds (default: 0)"
    )
    command.add_argument(
        "--labels", type=numbers(AT_LEAST_1), metavar="N,N", default=argparse.SUPPRESS,
        help="values of the masks that are lesion (default: as the data set says, or all but 0)",
    )  # fmt: skip
    command.add_argument(
        "--ignored", type=numbers(AT_LEAST_1), metavar="N,N", default=argparse.SUPPRESS,
        help="values of the masks for voxels that nobody annotated, which count neither as lesion nor as none "
        "(default: as the data set says)",
    )  # fmt: skip
    command.add_argument(
        "--mask", metavar="PATTERN", default=argparse.SUPPRESS,
        help="of bids and pairs: how the names of lesion masks end, such as '*_label-WMH_mask.nii.gz' (default: of "
        "bids lesion, label-lesion, label-L, desc-lesion or _msk in them, of pairs the names of the cases)",
    )  # fmt: skip
    command.add_argument(
        "--channel", type=number(int, least=0), metavar="N", default=argparse.SUPPRESS,
        help="list only this image of each case, from 0 (default: all)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    output = Path(options.output)
    if output.suffix.lower() != ".json" or output.is_dir():
        raise ArgumentError(f"--output: expected the name of a file ending in .json, got {output}")
    check_writable(output.parent)
    labels, channel = getattr(options, "labels", None), getattr(options, "channel", None)
    folds, seed, splits = getattr(options, "folds", 5), getattr(options, "seed", 0), getattr(options, "splits", None)
    if splits is not None and hasattr(options, "seed"):
        raise ArgumentError("--seed: expected none beside --splits, whose folds are drawn already")
    mask, ignored, roots = getattr(options, "mask", None), getattr(options, "ignored", ()), options.roots
    listing, found = list_cases_of(
        options.layout, roots, labels, channel, folds, seed, splits, bar("reading masks"), mask, ignored
    )
    write_cases(output, listing)
    cases = listing.cases
    without = sum(not case.masks for case in cases)
    test = sum(case.test for case in cases)
    print(
        f"{len(cases)} cases of {len({case.subject for case in cases})} subjects: "
        f"{sum(bool(case.lesion_ml) for case in cases)} with lesion, "
        f"{sum(case.lesion_ml == 0 for case in cases)} without, {without} without a mask and in no fold"
        + (f", {test} of a test set and in no fold" if test else "")
    )
    sizes = Counter(case.fold for case in cases)
    if listing.folds:
        print(f"cases per fold: {', '.join(f'{sizes[fold]}' for fold in range(listing.folds))}")
    if without < len(cases):
        lesion = [value for value in found if listing.labels is None or number_of(value) in listing.labels]
        others = [value for value in found if value not in lesion and number_of(value) not in listing.ignored]
        print(printable(f"lesion: {_named(lesion, listing) or 'none in any mask'}"))
        if listing.ignored:
            print(printable(f"not annotated: {_named(listing.ignored, listing)}"))
        if others:
            print(printable(f"background{' by --labels' if labels else ''}: {_named(others, listing)}"))
    if len(listing.channels) > 1:
        named = ", ".join(f"{place} {name}" for place, name in enumerate(listing.channels))
        print(printable(f"images of a case: {named}; the networks take one, which --channel chooses, or several"))
    elif listing.channels != UNNAMED:
        print(printable(f"image of a case: {', '.join(listing.channels)}"))
    print(printable(f"wrote {output}"))
    return 0


def _named(values: Sequence[float], listing: CaseList) -> str:
    return ", ".join(f"{value:g} {listing.label_names.get(round(value), '')}".strip() for value in values)
