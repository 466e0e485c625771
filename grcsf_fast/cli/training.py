"""What ``train-mae`` and ``train`` have in common."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..data.intensities import Intensities
from ..data.labels import Labels
from ..data.volumes import Preprocessing
from ..datasets.case_warnings import case_warnings_counted, case_warnings_once
from ..datasets.cases_file import CaseList, ListedCase
from ..errors import ArgumentError
from ..pretrained.bundle import Bundle
from ..runtime.precision import choose_device
from ..runtime.processes import World, described_world, device_of, one_of_many, said_by_first
from ..runtime.progress import bar
from ..runtime.versions import versions
from .labels import add_channels
from .listed import FOLD, add_listed
from .options import modalities, number, numbers, windows
from .recipes import add_recipe
from .shared import AT_LEAST_1, about_arguments, add_device, printable

__all__ = [
    "RESUMES",
    "add_preprocessing",
    "add_training",
    "begin_training",
    "by_hand",
    "check_sizes",
    "folder_source",
    "in_processes",
    "listed_sources",
    "model_card",
    "preprocessing_of",
    "with_default_jitter",
    "workers_of",
]


MOST_JITTER = 16  # of an edge of crops
RESUMES = "the same command with --resume goes on from the checkpoint, or from the beginning if there is none yet"


def add_training(
    command: argparse.ArgumentParser, defaults: dict[str, Any], instead: str, fold_help: str, bundles: str
) -> None:
    """Add the options of a training.

    Args:
        command: to add them to.
        defaults: of settings, where they differ; None: no such option.
        instead: of which options a list of cases stands.
        fold_help: what becomes of a fold of the list.
        bundles: options whose bundles have channels.
    """
    command.add_argument("-o", "--output", required=True, metavar="FOLDER", help="for log, curves, checkpoint, bundle")
    command.add_argument(
        "-i", "--images", metavar="FOLDER", help="training volumes; without it and --cases synthetic subjects"
    )
    add_listed(command, instead, FOLD, fold_help)
    add_recipe(command)
    add_channels(command, bundles)
    command.add_argument("--initial", metavar="BUNDLE", help="start from the weights and network sizes of this bundle")
    command.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the output folder; with more --steps the "
        "learning rate follows the longer schedule from there on",
    )  # fmt: skip
    from ..training.settings import TrainSettings

    for item in fields(TrainSettings):
        default = defaults.get(item.name, item.default)
        if default is None:
            continue
        flag = f"--{item.name.replace('_', '-')}"
        if item.name == "crop_size_jitter":  # by the crop, unless it is given
            command.add_argument(flag, type=number(int), default=argparse.SUPPRESS, help=_HELP[item.name])
            continue
        if isinstance(default, bool):
            command.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=_HELP[item.name])
            continue
        kind = str
        if isinstance(default, tuple):
            kind = numbers(AT_LEAST_1, (2, 3))
        elif not isinstance(default, str):
            kind = number(type(default))
        command.add_argument(flag, type=kind, default=default, help=_HELP[item.name])
    command.add_argument(
        "--workers", type=number(int, least=0), metavar="N", default=argparse.SUPPRESS,
        help="processes that make cases ahead (default: by the cores); 0: cases are made between two steps",
    )  # fmt: skip
    command.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too")
    add_device(command)


_HELP = {
    "steps": "optimiser steps",
    "batch_size": "crops that go through the network at once, in all processes together",
    "accumulate": "batches per step, whose gradients are averaged",
    "crop_size": "edge lengths in voxels: two for axial slices, three for boxes",
    "crop_size_jitter": "each edge is longer or shorter by this in some steps; 0: never (default: of each axis 16, or "
    "what a quarter of its edge has room for)",
    "learning_rate": "peak of the cosine schedule",
    "weight_decay": "of AdamW",
    "warmup_steps": "steps of linear warm-up; where they are not less than --steps, the rate only rises",
    "ema": "decay per step of a moving average of the weights, which the bundle then holds; 0: the last weights",
    "compile": "run what is trained through torch.compile",
    "channels_last": "keep images and weights with the channels last in memory",
    "seed": "of everything random",
    "cache_size": "cases in memory",
    "replace_every": "steps after which one case in memory is replaced; 0: never",
    "lesion_fraction": "share of crops centred near lesion, of cases that hold it; the others are of any case",
    "loss": "of the segmentation: dice-focal, or focal alone",
    "score_weight": "weight of the score loss",
    "augment": "all: random flips, affine and intensity changes; flips: left and right alone; affine: rotation and "
    "scaling alone; none",
    "precision": "auto: bfloat16 where it is measured to be faster; float32; bfloat16",
    "log_every": "steps between log lines",
    "validate_every": "steps between validations and checkpoints",
    "checkpoint_minutes": "most minutes between two checkpoints",
}


def add_preprocessing(command: argparse.ArgumentParser) -> None:
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


def in_processes(options: argparse.Namespace, train: Callable[[argparse.Namespace, World, torch.device], int]) -> int:
    """Train in the processes that the environment describes, each on a device of its own."""
    device = choose_device(device_of(described_world(), options.device))
    with one_of_many(device) as world, case_warnings_once():
        return train(options, world, device)


def _surveyed(source: Any, world: World) -> Any:
    """What a source holds, found by the first process, which says what is odd about its cases."""
    with case_warnings_counted():
        return said_by_first(world, lambda: source.survey(bar("checking cases")))


def workers_of(options: argparse.Namespace, world: World, device: torch.device) -> int:
    from ..training.workers import default_workers

    return options.workers if hasattr(options, "workers") else default_workers(device, world)


def begin_training(options: argparse.Namespace) -> Any:
    """What can be said of a training before anything is read: its settings, and that it may write."""
    from ..training.checkpoint import check_output
    from ..training.log import check_tensorboard

    for flag, folder in (("--images", options.images), ("--labels", getattr(options, "labels", None))):
        if folder is not None and Path(folder).resolve() == Path(options.output).resolve():
            raise ArgumentError(f"--output: expected another folder than that of {flag}, got {folder} for both")
    settings = read_settings(options)
    if options.tensorboard:
        check_tensorboard()
    check_output(options.output, options.resume)
    return settings


def folder_source(
    images: str, masks: str | None, preprocessing: Preprocessing, world: World, channels: int = 1,
    labels: Labels | None = None,
) -> Any:  # fmt: skip
    """The cases of a folder, each of which was read once, now or before: none of them stops the training later."""
    from ..datasets.pairs import FolderSource

    with about_arguments():
        source = FolderSource(images, masks, preprocessing, None, channels, labels)
    survey = _surveyed(source, world)
    if world.rank == 0:
        print(printable(survey.text(masks is not None)))
    return source


def listed_sources(
    options: argparse.Namespace, listing: CaseList, chosen: list[ListedCase], preprocessing: Preprocessing,
    masked: bool, world: World, channels: tuple[str, ...] = ("image",), labels: Labels | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The cases of a list to train on, in an order by chance, and those that are held out: the chosen ones of a fold.

    Each of them was read once, now or before. With masks, cases that have none are left out; without a fold, none is
    held out. Those of a test set are always left out.
    """
    from ..datasets.sources import ListedSource

    if world.rank == 0:
        _warn_of_ct(options, listing, preprocessing, channels)
    usable = [case for case in listing.cases if (case.masks or not masked) and not case.test]
    names = {case.name for case in chosen} if options.fold is not None else set()
    held = [case for case in usable if case.name in names]
    training = [case for case in usable if case.name not in names and (options.fold is None or case.fold is not None)]
    if not training:
        which = "beside the fold" if options.fold is not None else "that have a mask" if masked else "of no test set"
        raise ArgumentError(f"{options.cases}: expected cases to train on {which}, found none")
    source = ListedSource(listing, training + held, preprocessing, masked, channels, labels)
    survey = _surveyed(source, world)
    text = survey.text(masked)
    if world.rank == 0:
        print(printable(f"{text}; fold {options.fold} holds {len(held)} of them out" if names else text))
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(options.seed)).tolist()
    return source.part([training[index].name for index in order]), source.part([case.name for case in held])


def read_settings(options: argparse.Namespace) -> Any:
    from ..training.settings import TrainSettings
    from ..training.synthetic import MAX_TRAINING_SEED

    if not (options.images or options.cases or 0 <= options.seed <= MAX_TRAINING_SEED):
        raise ArgumentError(
            f"--seed: expected 0 to {MAX_TRAINING_SEED}, got {options.seed}: further synthetic subjects are for "
            "validation and tests"
        )
    known = {item.name for item in fields(TrainSettings)}
    try:
        return TrainSettings(**{name: value for name, value in vars(options).items() if name in known})
    except ArgumentError as error:
        name, colon, text = str(error).partition(":")
        flag = f"--{name.replace('_', '-')}" if name in known else name
        raise ArgumentError(flag + colon + text) from error


def with_default_jitter(options: argparse.Namespace, settings: Any, multiple: int) -> Any:
    """Settings with a jitter of crops by their edges, where none is given, which the options then have too.

    Args:
        options: of the command.
        settings: of the training.
        multiple: that edges have to keep.
    """
    if hasattr(options, "crop_size_jitter"):
        return settings
    settings = settings.with_jitter(MOST_JITTER, multiple)
    options.crop_size_jitter = settings.crop_size_jitters or settings.crop_size_jitter  # for the card
    return settings


def by_hand(options: argparse.Namespace, name: str) -> bool:
    """Whether an option without default has a value that is not the recipe's."""
    return getattr(options, "recipe_values", {}).get(name) != getattr(options, name, None)


def _warn_of_ct(
    options: argparse.Namespace, listing: CaseList, preprocessing: Preprocessing, channels: tuple[str, ...]
) -> None:
    """Say if a channel that the list calls CT is taken for MRI, unless it was asked for by hand."""
    if by_hand(options, "modality"):
        return
    names = listing.channels if len(listing.channels) == len(channels) == 1 else channels
    held = [preprocessing.of_channel(number).modality for number in range(len(names))]
    wanted = ["ct" if name.lower() == "ct" else one for name, one in zip(names, held, strict=True)]
    if wanted != held:
        text = wanted[0] if len(set(wanted)) == 1 else ",".join(wanted)
        warnings.warn(
            f"--cases: expected Hounsfield units in the channel CT, which is taken for MRI; is --modality {text} "
            "missing?", stacklevel=2,
        )  # fmt: skip


# Options that a bundle's preprocessing stands for.
_PREPROCESSING = ("spacing", "modality", "hu_window")


def preprocessing_of(options: argparse.Namespace, bundle: Bundle | None, channels: int = 1) -> Preprocessing:
    """The options', or those of a bundle whose networks are used on; both would contradict each other."""
    given = {name: getattr(options, name) for name in _PREPROCESSING if hasattr(options, name)}
    if bundle is None:
        _check_window(options, given)
        with about_arguments():
            return Preprocessing(**_of_channels(given, channels))
    if own := [name for name in given if by_hand(options, name)]:
        flag = own[0].replace("_", "-")
        raise ArgumentError(f"expected no --{flag} beside --mae or --initial, whose preprocessing holds")
    for name, value in given.items():
        if (held := _held(bundle.preprocessing, name)) != value:
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


def check_sizes(options: argparse.Namespace, module: Any, defaults: Mapping[str, Any], world: World) -> None:
    """See that options for a network's sizes are those of the network of --initial, which holds.

    Args:
        options: a value of the recipe that differs is said; one given by hand is an error.
        module: the network.
        defaults: of the options, by the name that they have in the network's configuration too.
        world: the first process says it.

    Raises:
        ArgumentError: another size was given by hand.
    """
    for name, default in defaults.items():
        value, held = getattr(options, name), module.config[name]
        held = tuple(held) if isinstance(held, list) else held
        if value in (None, held):
            continue
        flag = name.replace("_", "-")
        if not by_hand(options, name):
            if world.rank == 0:
                print(printable(f"{flag} {held} of the bundle holds; the recipe has {value}"))
        elif value != default:
            raise ArgumentError(f"--{flag}: expected none beside --initial, whose network has {held}, got {value}")


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


def _held(preprocessing: Preprocessing, name: str) -> Any:
    """As an option says it: one value, or one per channel where they differ."""
    first = getattr(preprocessing, name)
    values = (first, *(getattr(other, name, first) for other in preprocessing.others))
    return first if len(set(values)) == 1 else values


# Where files lie, and what stands there under another name.
_NOT_IN_CARD = (
    "run", "output", "images", "labels", "cases", "mae", "initial", "resume", "device", "recipe_values", "workers",
    "tensorboard", "interrupted",
)  # fmt: skip


def model_card(
    options: argparse.Namespace, data: str, preprocessing: Preprocessing, **bundles: Bundle | None
) -> dict[str, Any]:
    """What the bundle says of its training.

    Args:
        options: of the command.
        data: what it was trained on.
        preprocessing: that holds, whatever the options say.
        bundles: that it was trained from, by their options; None: not given.
    """
    given = {name: value for name, value in vars(options).items() if name not in _NOT_IN_CARD}
    given |= {name: _held(preprocessing, name) for name in _PREPROCESSING if name in given}
    return {
        "trained_on": data,
        "command": options.command,
        "options": given,
        **{f"{name}_sha256": bundle.weights_sha256 for name, bundle in bundles.items() if bundle is not None},
        "versions": versions(),
        "notice": "Research software; not a medical device and not for clinical use.",
    }
