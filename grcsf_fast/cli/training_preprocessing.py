"""The preprocessing of a training: that of its options, or of the bundle that it begins from."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Mapping
from typing import Any

from ..data.intensities import Intensities
from ..data.volumes import Preprocessing
from ..datasets.cases_file import CaseList
from ..errors import ArgumentError
from ..pretrained.bundle import Bundle
from .options import modalities, number, numbers, windows
from .recipes import by_hand
from .shared import about_arguments, printable

__all__ = ["PREPROCESSING_OPTIONS", "add_preprocessing", "held_value", "preprocessing_of", "warn_of_ct"]

# Options that a bundle's preprocessing stands for.
PREPROCESSING_OPTIONS = ("spacing", "modality", "hu_window")


def add_preprocessing(command: argparse.ArgumentParser) -> None:
    """Add the options of the preprocessing; none has a default, as a bundle's stands for those that are not given."""
    given = argparse.SUPPRESS
    command.add_argument(
        "--spacing", type=numbers(number(float, above=0), (3,)), default=given, help="x,y,z in mm (default: 2,2,2)"
    )
    command.add_argument(
        "--modality", type=modalities, metavar="NAME", default=given,
        help="intensity recipe, mri or ct; one for each of several channels where they differ: mri,ct (default: mri)",
    )  # fmt: skip
    command.add_argument(
        "--hu-window", type=windows, metavar="LOW,HIGH", default=given,
        help="CT only; one for each of several channels where they differ: -160,240/0,80 (default: -160,240)",
    )  # fmt: skip


def preprocessing_of(options: argparse.Namespace, bundle: Bundle | None, channels: int = 1) -> Preprocessing:
    """The options', or that of a bundle whose networks are used on; both would contradict each other.

    Args:
        options: of the command.
        bundle: of the networks; None: there are none yet.
        channels: number of images of a case.

    Raises:
        ArgumentError: options by hand beside a bundle, other numbers of values than of channels, or a window without
            a CT.
    """
    given = {name: getattr(options, name) for name in PREPROCESSING_OPTIONS if hasattr(options, name)}
    if bundle is None:
        _check_window(options, given)
        with about_arguments():
            return Preprocessing(**_of_channels(given, channels))
    if own := [name for name in given if by_hand(options, name)]:
        flag = own[0].replace("_", "-")
        raise ArgumentError(f"expected no --{flag} beside --mae or --initial, whose preprocessing holds")
    for name, value in given.items():
        if (held := held_value(bundle.preprocessing, name)) != value:
            print(printable(f"{name} {held} of the bundle holds; the recipe has {value}"))
    return bundle.preprocessing


def _check_window(options: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """See that a window of Hounsfield units is given with a CT, which alone has them.

    Raises:
        ArgumentError: it would be ignored.
    """
    modality = given.get("modality", "mri")
    if "hu_window" not in given or "ct" in ([modality] if isinstance(modality, str) else modality):
        return
    if not by_hand(options, "hu_window") and "modality" in given and by_hand(options, "modality"):
        return  # of a recipe for CT, whose modality another one takes the place of
    said = "--modality " + (modality if isinstance(modality, str) else ",".join(modality))
    said += "" if "modality" in given else ", the default"
    raise ArgumentError(f"--hu-window: expected --modality ct beside it, as MRI has no Hounsfield units, got {said}")


def _of_channels(given: dict[str, Any], channels: int) -> dict[str, Any]:
    """Arguments of :class:`Preprocessing`; what is given once holds for every channel."""
    modality, window = given.get("modality", "mri"), given.get("hu_window", Preprocessing.hu_window)
    modalities = [modality] * channels if isinstance(modality, str) else modality
    windows = window if isinstance(window[0], tuple) else [window] * channels
    for name, values in (("modality", modalities), ("hu-window", windows)):
        if len(values) != channels:
            many = "one" if channels == 1 else f"one, or {channels} for as many channels"
            raise ArgumentError(f"--{name}: expected {many}, got {len(values)}")
    if len(set(modalities)) == 1 and len(set(windows)) == 1:
        return given | {"modality": modalities[0], "hu_window": windows[0]}
    others = tuple(Intensities(one, hu_window=own) for one, own in zip(modalities[1:], windows[1:], strict=True))
    return given | {"modality": modalities[0], "hu_window": windows[0], "others": others}


def held_value(preprocessing: Preprocessing, name: str) -> Any:
    """As an option says it: one value, or one per channel where they differ."""
    first = getattr(preprocessing, name)
    values = (first, *(getattr(other, name, first) for other in preprocessing.others))
    return first if len(set(values)) == 1 else values


def warn_of_ct(
    options: argparse.Namespace, listing: CaseList, preprocessing: Preprocessing, channels: tuple[str, ...]
) -> None:
    """Say if a channel that the list calls CT is taken for MRI, unless it was asked for by hand."""
    if by_hand(options, "modality"):
        return
    names = listing.channels if len(listing.channels) == len(channels) == 1 else channels
    held = [preprocessing.of_channel(number).modality for number in range(len(names))]
    wanted = ["ct" if re.fullmatch(r"ct(_\d+)?", name.lower()) else one for name, one in zip(names, held, strict=True)]
    if wanted != held:
        text = wanted[0] if len(set(wanted)) == 1 else ",".join(wanted)
        warnings.warn(
            f"--cases: expected Hounsfield units in the channel CT, which is taken for MRI; is --modality {text} "
            "missing?", stacklevel=2,
        )  # fmt: skip
