"""Options that say which channels images have and which labels are told apart."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from ..data.labels import Labels
from ..datasets.cases_file import CaseList
from ..errors import ArgumentError
from ..pretrained.bundle import Bundle

__all__ = [
    "add_channels",
    "add_labels",
    "check_listed",
    "check_meanings",
    "check_places",
    "labels_of",
    "used_channels",
    "used_labels",
]


def add_channels(command: argparse.ArgumentParser, otherwise: str) -> None:
    """Add ``--channels``.

    Args:
        command: to add it to.
        otherwise: which options give the channels without it.
    """
    command.add_argument(
        "--channels", type=_names, metavar="NAME,NAME", default=argparse.SUPPRESS,
        help="names of the images of a case that the networks see together, such as T1w,FLAIR: of a list those under "
        "these names, of a folder NAME_0000, NAME_0001 or the fourth axis of a file in this order (default: those of "
        f"{otherwise}, or a single image)",
    )  # fmt: skip


def add_labels(command: argparse.ArgumentParser, otherwise: str) -> None:
    """Add ``--classes`` and ``--regions``.

    Args:
        command: to add them to.
        otherwise: what becomes of labels without them.
    """
    command.add_argument(
        "--classes", type=_text_of(True), metavar="NAME=N,NAME=N",
        help="labels that exclude each other and their numbers in masks, such as oedema=1,core=2, or one alone, core=2 "
        f"(default: {otherwise})",
    )  # fmt: skip
    command.add_argument(
        "--regions", type=_text_of(False), metavar="NAME=N+N,...",
        help="regions that may overlap and the numbers that each joins, such as whole=1+2,core=2",
    )  # fmt: skip


def labels_of(options: argparse.Namespace) -> Labels | None:
    """What the options say; None: lesion alone.

    Raises:
        ArgumentError: both options.
    """
    if options.classes is not None and options.regions is not None:
        raise ArgumentError("expected --classes or --regions, got both")
    if options.classes is not None:
        return _read(options.classes, True)
    return _read(options.regions, False) if options.regions is not None else None


def used_labels(options: argparse.Namespace, initial: Bundle | None) -> Labels | None:
    """Those of the options; without them those of a bundle whose network is trained on."""
    given = labels_of(options)
    return initial.labels if given is None and initial is not None else given


def check_listed(labels: Labels | None, listing: CaseList, name: str) -> None:
    """See that labels do not contradict a list of cases.

    Args:
        labels: that are told apart; None: none are.
        listing: of the cases.
        name: of its file, for messages.

    Raises:
        ArgumentError: a name that the list has for another number, or a number that the list leaves out.
    """
    if labels is None:
        return
    named: dict[str, set[int]] = {}
    for number, text in listing.label_names.items():
        for one in {text, *text.split(" and ")}:  # of regions of nnU-Net, one number has the names of several
            named.setdefault(one, set()).add(number)
    check_meanings(labels, named, name)
    if listing.labels is not None and (left_out := sorted(set(labels.every) - set(listing.labels))):
        chosen, needed = (",".join(map(str, sorted(one))) for one in (listing.labels, {*listing.labels, *left_out}))
        owner = next(one for one, own in zip(labels.names, labels.numbers, strict=True) if left_out[0] in own)
        raise ArgumentError(
            f"{_option(labels)}: expected numbers among {chosen}, which {name} was made with (`cases --labels "
            f"{chosen}`), got {left_out[0]} in {owner}; make the list again with --labels {needed}, or without it"
        )


def check_meanings(labels: Labels, named: Mapping[str, Collection[int]], where: str) -> None:
    """See that labels mean by a name what others mean by it, however it is written in capitals.

    Args:
        labels: by the options.
        named: numbers by name.
        where: these stand, for messages.

    Raises:
        ArgumentError: a name is of other numbers there.
    """
    known = {name.strip().casefold(): (name, set(numbers)) for name, numbers in named.items()}
    for name, numbers in zip(labels.names, labels.numbers, strict=True):
        held, own = known.get(name.strip().casefold(), (name, set(numbers)))
        if not own & set(numbers):
            there, given = ("+".join(map(str, sorted(one))) for one in (own, numbers))
            raise ArgumentError(
                f"{_option(labels)}: expected {name}={there}, as {where} has {held}, got {name}={given}; numbers are "
                "those of the masks: give this one, or another name"
            )


def _option(labels: Labels) -> str:
    return "--classes" if labels.exclusive else "--regions"


def used_channels(
    options: argparse.Namespace, bundle: Bundle | None, name: str | None, adapts: bool = False
) -> tuple[str, ...]:
    """Those of the options, or of a bundle whose networks are used on: other names for the same images will do.

    Args:
        options: of the command.
        bundle: of the networks; None: there are none yet.
        name: of the bundle, for messages.
        adapts: a network, which is adapted to another number; False: an autoencoder, which is not.

    Raises:
        ArgumentError: both, and their number differs, or their order.
    """
    if bundle is None:
        return getattr(options, "channels", ("image",))
    given = getattr(options, "channels", bundle.channels)
    if len(given) != len(bundle.channels) and not adapts:
        raise ArgumentError(
            f"--channels: expected {len(bundle.channels)}, those of {name} ({', '.join(bundle.channels)}), "
            f"got {', '.join(given)}: an autoencoder keeps its channels; `grcsf-fast train-mae --channels "
            f"{','.join(given)}` without --initial trains one of these"
        )
    check_places(given, bundle, name)
    return given


def check_places(channels: Sequence[str], bundle: Bundle, name: str | None) -> None:
    """See that channels by the names of a bundle's are where its networks know them.

    Raises:
        ArgumentError: they are elsewhere.
    """
    held = bundle.channels
    if len(channels) == len(held) and set(channels) == set(held) and tuple(channels) != held:
        raise ArgumentError(
            f"--channels: expected the order of {name} ({', '.join(held)}), which its networks know them by, got "
            f"{', '.join(channels)}"
        )
    moved = [one for one in channels if one in held and list(channels).index(one) != held.index(one)]
    if len(channels) != len(held) and moved:
        raise ArgumentError(
            f"--channels: expected {moved[0]} in place {held.index(moved[0]) + 1}, where {name} has it "
            f"({', '.join(held)}), got {', '.join(channels)}"
        )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names separated by commas, got {text!r}")
    return names


def _text_of(exclusive: bool) -> Callable[[str], str]:
    """Checks the text and gives it back, so that a card or a recipe can hold it."""

    def checked(text: str) -> str:
        try:
            _read(text, exclusive)
        except ArgumentError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return checked


def _read(text: str, exclusive: bool) -> Labels:
    parts = [re.fullmatch(r"\s*(.+?)\s*=\s*(\d{1,3}(?:\+\d{1,3})*)\s*", part) for part in text.split(",")]
    if not all(parts):
        form = "NAME=N,NAME=N" if exclusive else "NAME=N+N,NAME=N"
        raise ArgumentError(f"expected {form}, got {text!r}")
    found: Sequence[re.Match[str]] = [part for part in parts if part is not None]
    numbers = tuple(tuple(map(int, part[2].split("+"))) for part in found)
    return Labels(tuple(part[1] for part in found), numbers, exclusive)
