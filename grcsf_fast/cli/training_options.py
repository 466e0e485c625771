"""Options that ``train-mae`` and ``train`` have in common, and the settings of a training that they say."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..training.checkpoint import check_output
from ..training.log import check_tensorboard
from ..training.settings import TrainSettings
from ..training.synthetic import MAX_TRAINING_SEED
from .labels import add_channels
from .listed import FOLD, add_listed
from .options import number, numbers
from .recipes import add_recipe
from .shared import AT_LEAST_1, add_device

__all__ = [
    "RESUMES",
    "add_training",
    "begin_training",
    "read_settings",
    "with_default_jitter",
]

MOST_JITTER = 16  # of an edge of crops
RESUMES = "the same command with --resume goes on from the checkpoint, or from the beginning if there is none yet"


def add_training(
    command: argparse.ArgumentParser,
    defaults: Mapping[str, int | float | str | None],
    instead: str,
    fold_help: str,
    bundles: str,
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
    for setting in fields(TrainSettings):
        default = defaults.get(setting.name, setting.default)
        if default is not None:
            _add_setting(command, setting, default)
    command.add_argument(
        "--workers", type=number(int, least=0), metavar="N", default=argparse.SUPPRESS,
        help="processes that make cases ahead (default: by the cores); 0: cases are made between two steps",
    )  # fmt: skip
    command.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too")
    add_device(command)


def _add_setting(command: argparse.ArgumentParser, setting: Field[Any], default: Any) -> None:
    """Add the option of one of :class:`TrainSettings`, which checks its value."""
    flag, said = f"--{setting.name.replace('_', '-')}", _HELP[setting.name]
    if setting.name == "crop_size_jitter":  # by the crop, unless it is given
        command.add_argument(flag, type=number(int), default=argparse.SUPPRESS, help=said)
    elif isinstance(default, bool):
        command.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=said)
    elif isinstance(default, tuple):
        command.add_argument(flag, type=numbers(AT_LEAST_1, (2, 3)), default=default, help=said)
    else:
        kind = str if isinstance(default, str) else number(type(default))
        command.add_argument(flag, type=kind, default=default, help=said)


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
    "validate_every": "steps between checkpoints, and of train between validations",
    "checkpoint_minutes": "most minutes between two checkpoints",
}


def begin_training(options: argparse.Namespace) -> TrainSettings:
    """What can be said of a training before anything is read: its settings, and that it may write.

    Raises:
        ArgumentError: settings or an output that cannot be; TensorBoard is missing.
        TrainError: another training's checkpoint is in the output.
    """
    for flag, folder in (("--images", options.images), ("--labels", getattr(options, "labels", None))):
        if folder is not None and Path(folder).resolve() == Path(options.output).resolve():
            raise ArgumentError(f"--output: expected another folder than that of {flag}, got {folder} for both")
    settings = read_settings(options)
    if options.tensorboard:
        check_tensorboard()
    check_output(options.output, options.resume)
    return settings


def read_settings(options: argparse.Namespace) -> TrainSettings:
    """The settings that options say.

    Raises:
        ArgumentError: a value that cannot be, by the name of its option; or a seed of synthetic subjects that are for
            validation and tests.
    """
    if not (options.images or options.cases or 0 <= options.seed <= MAX_TRAINING_SEED):
        raise ArgumentError(
            f"--seed: expected 0 to {MAX_TRAINING_SEED}, got {options.seed}: further synthetic subjects are for "
            "validation and tests"
        )
    known = {setting.name for setting in fields(TrainSettings)}
    try:
        return TrainSettings(**{name: value for name, value in vars(options).items() if name in known})
    except ArgumentError as error:
        name, colon, text = str(error).partition(":")
        flag = f"--{name.replace('_', '-')}" if name in known else name
        raise ArgumentError(flag + colon + text) from error


def with_default_jitter(options: argparse.Namespace, settings: TrainSettings, multiple: int) -> TrainSettings:
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
