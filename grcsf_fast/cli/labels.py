"""Options that say which channels images have and which labels are told apart."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence

from ..data.labels import Labels
from ..errors import ArgumentError
from ..pretrained.bundle import Bundle

__all__ = ["add_channels", "add_labels", "labels_of", "used_channels", "used_labels"]


def add_channels(command: argparse.ArgumentParser) -> None:
    """Add ``--channels``."""
    command.add_argument(
        "--channels", type=_names, metavar="NAME,NAME", default=argparse.SUPPRESS,
        help="images of a case in the order of NAME_0000, NAME_0001, of the fourth axis of a file, or by their names "
        "in the list (default: those of --mae or --initial, or one)",
    )  # fmt: skip


def add_labels(command: argparse.ArgumentParser, otherwise: str) -> None:
    """Add ``--classes`` and ``--regions``.

    Args:
        command: to add them to.
        otherwise: what becomes of labels without them.
    """
    command.add_argument(
        "--classes", type=_text_of(True), metavar="NAME=N,NAME=N",
        help="labels that exclude each other and their numbers in masks, such as oedema=1,core=2 "
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


def used_labels(options: argparse.Namespace, initial: Bundle | None, name: str | None) -> Labels | None:
    """Those of the options, or of a bundle whose network is trained on.

    Raises:
        ArgumentError: both, and they differ.
    """
    given = labels_of(options)
    if initial is not None and given not in (None, initial.labels):
        raise ArgumentError(f"--classes and --regions: expected the labels of {name} or none, got others")
    return given if initial is None else initial.labels


def used_channels(options: argparse.Namespace, bundle: Bundle | None, name: str | None) -> tuple[str, ...]:
    """Those of the options, or of a bundle whose networks are used on: other names for the same images will do.

    Raises:
        ArgumentError: both, and their number differs, or their order.
    """
    if bundle is None:
        return getattr(options, "channels", ("image",))
    given = getattr(options, "channels", bundle.channels)
    if len(given) != len(bundle.channels):
        raise ArgumentError(
            f"--channels: expected {len(bundle.channels)}, those of {name} ({', '.join(bundle.channels)}), "
            f"got {', '.join(given)}"
        )
    if given != bundle.channels and set(given) == set(bundle.channels):
        raise ArgumentError(
            f"--channels: expected the order of {name} ({', '.join(bundle.channels)}), which its networks know them "
            f"by, got {', '.join(given)}"
        )
    return given


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
