"""How ``train-mae`` and ``train`` run: in which processes, and what their bundles say of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..datasets.case_warnings import case_warnings_once
from ..pretrained.bundle import ResidualMapSettings
from ..runtime.precision import choose_device
from ..runtime.processes import World, described_world, device_of, one_of_many
from ..runtime.versions import versions
from ..training.settings import TrainingRun, TrainSettings
from ..training.workers import default_workers
from .training_bundles import GivenBundles
from .training_cases import CaseContents, TrainingCases
from .training_preprocessing import PREPROCESSING_OPTIONS, held_value

__all__ = ["in_processes", "training_run"]

# Where files lie, and what stands there under another name.
NOT_IN_CARD = (
    "run", "output", "images", "labels", "cases", "mae", "initial", "resume", "device", "recipe_values", "workers",
    "tensorboard", "interrupted",
)  # fmt: skip


def in_processes(options: argparse.Namespace, train: Callable[[argparse.Namespace, World, torch.device], int]) -> int:
    """Train in the processes that the environment describes, each on a device of its own; the exit code.

    Warnings of cases, which are read before a training, in it and by its workers, come once of a kind.
    """
    device = choose_device(device_of(described_world(), options.device))
    with one_of_many(device) as world, case_warnings_once():
        return train(options, world, device)


def training_run(
    options: argparse.Namespace,
    settings: TrainSettings,
    contents: CaseContents,
    cases: TrainingCases,
    bundles: GivenBundles,
    residual_maps: ResidualMapSettings,
    world: World,
    device: torch.device,
) -> TrainingRun:
    """Where and by what settings the training runs, and what its bundle will say of it.

    Args:
        options: of the command.
        settings: of the training.
        contents: of each case.
        cases: to train on.
        bundles: that it begins from.
        residual_maps: how they are made.
        world: processes that train together.
        device: of this process.

    Raises:
        ArgumentError: a batch that does not divide into equal shares.
    """
    return TrainingRun(
        output=Path(options.output),
        settings=settings,
        preprocessing=contents.preprocessing,
        residual_maps=residual_maps,
        device=device,
        resume=options.resume,
        card=_model_card(options, contents, cases, bundles),
        initial_sha256=bundles.initial.weights_sha256 if bundles.initial is not None else None,
        workers=options.workers if hasattr(options, "workers") else default_workers(device, world),
        tensorboard=options.tensorboard,
        world=world,
        channels=contents.channels,
        labels=contents.labels,
    )


def _model_card(
    options: argparse.Namespace, contents: CaseContents, cases: TrainingCases, bundles: GivenBundles
) -> dict[str, Any]:
    """What the bundle says of its training: the preprocessing is the one that holds, whatever the options say."""
    given = {name: value for name, value in vars(options).items() if name not in NOT_IN_CARD}
    given |= {name: held_value(contents.preprocessing, name) for name in PREPROCESSING_OPTIONS if name in given}
    begun_from = {"initial_sha256": bundles.initial, "mae_sha256": bundles.mae}
    return {
        "trained_on": cases.described,
        "command": options.command,
        "options": given,
        **{name: bundle.weights_sha256 for name, bundle in begun_from.items() if bundle is not None},
        "versions": versions(),
        "notice": "Research software; not a medical device and not for clinical use.",
        **cases.card,
    }
