"""The cases of a training: of a list, of folders, or synthetic subjects."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.labels import Labels
from ..data.volumes import Preprocessing
from ..datasets.case_warnings import case_warnings_counted
from ..datasets.cases import Case, CaseSource, Chosen
from ..datasets.cases_file import ListedCase
from ..datasets.folds import hold_out
from ..datasets.pairs import FolderSource
from ..datasets.sources import FileSource, ListedSource
from ..datasets.survey import Survey, some
from ..errors import ArgumentError
from ..runtime.processes import World, said_by_first
from ..runtime.progress import bar
from ..training.settings import TrainSettings
from ..training.synthetic import SEEDS_A_RUN, TRAINING_SEEDS, VALIDATION_SEEDS, SyntheticSource, drawing_spacings
from .listed import ChosenCases, fold_of_card
from .shared import about_arguments, printable
from .training_preprocessing import warn_of_ct

__all__ = ["SLICES_A_SUBJECT", "CaseContents", "TrainingCases", "training_cases"]

HELD_OUT = 6  # cases, where --validation does not say
# Of a synthetic subject in the training of a 2-D network. Whole subjects would be few at a time, and few are learnt by
# heart.
SLICES_A_SUBJECT = 32
# Share of the synthetic subjects with many lesions in the training of a network.
CROWDED = 0.5


@dataclass(frozen=True)
class CaseContents:
    """What a training takes of each case.

    Attributes:
        preprocessing: of its images.
        channels: names of its images, in the order of the networks' channels.
        masked: with its lesion mask, for a segmentation network, and some cases are held out for validation; False:
            images alone, for an autoencoder, which is not validated.
        labels: to be told apart; None: lesion alone.
    """

    preprocessing: Preprocessing
    channels: tuple[str, ...]
    masked: bool
    labels: Labels | None = None


@dataclass(frozen=True)
class TrainingCases:
    """Where the cases of a training come from.

    Attributes:
        training: those to train on.
        described: what they are, for the card of the bundle.
        validation: this process's share of those that validations measure.
        card: what else the card says of them.
        held_out: names of the cases of folders that are held out for validation, by chance; None: a list says which,
            or subjects are synthetic, or none are to be held out as for an autoencoder.
    """

    training: CaseSource
    described: str
    validation: Sequence[Case] = ()
    card: Mapping[str, Any] = field(default_factory=dict)
    held_out: Sequence[str] | None = None


def training_cases(
    options: argparse.Namespace,
    settings: TrainSettings,
    chosen: ChosenCases | None,
    contents: CaseContents,
    world: World,
) -> TrainingCases:
    """The cases of a list, of folders, or synthetic subjects, as the options say.

    Each case of files was read once, now or before: none of them stops the training later.

    Args:
        options: of the command.
        settings: of the training; the seed decides which cases are trained on in which order.
        chosen: the list of ``--cases`` and the cases of its fold; None: not given.
        contents: of each case.
        world: processes that train together.

    Raises:
        ArgumentError: no case to train on, or a spacing that synthetic subjects cannot have.
        VolumeError: cases that cannot be used; the message names them.
        FileNotFoundError: no images, or images without a mask.
    """
    if chosen is not None:
        return _of_list(options, settings, chosen, contents, world)
    if options.images:
        return _of_folders(options, settings, contents, world)
    return _synthetic(options, settings, contents, world)


def _of_list(
    options: argparse.Namespace, settings: TrainSettings, chosen: ChosenCases, contents: CaseContents, world: World
) -> TrainingCases:
    """The cases of a list without those of the chosen fold, which are held out."""
    if world.rank == 0:
        warn_of_ct(options, chosen.listing, contents.preprocessing, contents.channels)
    training, held = _divided(options, chosen, contents.masked)
    source = ListedSource(
        chosen.listing, training + held, contents.preprocessing, contents.masked, contents.channels, contents.labels
    )
    text = _survey(source, world).text(contents.masked)
    if world.rank == 0:
        holds = options.fold is not None and chosen.cases
        print(printable(f"{text}; fold {options.fold} holds {len(held)} of them out" if holds else text))
    order = _by_chance(len(training), settings.seed)
    of_training = source.part([training[index].name for index in order])
    card = fold_of_card(options, chosen.listing)
    if not contents.masked:
        return TrainingCases(of_training, "volumes of a list of cases", card=card)
    measured = sorted(_by_chance(len(held), settings.seed)[: getattr(options, "validation", len(held))])
    validation = Chosen(source.part([case.name for case in held]), measured[world.rank :: world.size])
    return TrainingCases(of_training, "cases of a list", validation, card)


def _divided(
    options: argparse.Namespace, chosen: ChosenCases, masked: bool
) -> tuple[list[ListedCase], list[ListedCase]]:
    """The cases of a list to train on, and those that are held out: the chosen ones of a fold.

    With masks, cases that have none are left out; without a fold, none is held out. Those of a test set are always left
    out. Both are in the order of their names: whatever that of the list, seed and checkpoint mean the same cases.
    """
    ordered = sorted(chosen.listing.cases, key=lambda case: case.name)
    usable = [case for case in ordered if (case.masks or not masked) and not case.test]
    names = {case.name for case in chosen.cases} if options.fold is not None else set()
    held = [case for case in usable if case.name in names]
    training = [case for case in usable if case.name not in names and (options.fold is None or case.fold is not None)]
    if not training:
        which = "beside the fold" if options.fold is not None else "that have a mask" if masked else "of no test set"
        raise ArgumentError(f"{options.cases}: expected cases to train on {which}, found none")
    return training, held


def _of_folders(
    options: argparse.Namespace, settings: TrainSettings, contents: CaseContents, world: World
) -> TrainingCases:
    """The cases of a folder of images, with their masks in another, of which some are held out by chance."""
    masks = options.labels if contents.masked else None
    with about_arguments():
        source = FolderSource(
            options.images, masks, contents.preprocessing, None, len(contents.channels), contents.labels
        )
    text = _survey(source, world).text(contents.masked)
    if world.rank == 0:
        print(printable(text))
    order = [source.names[index] for index in _by_chance(len(source), settings.seed)]
    if not contents.masked:
        return TrainingCases(source.part(order), "volumes of a folder")
    held, training = hold_out(order, min(getattr(options, "validation", HELD_OUT), len(order) // 2))
    if world.rank == 0:
        named = f": {some(sorted(held))}" if held else ""
        print(printable(f"{len(held)} of {len(order)} cases held out for validation{named}"))
    validation = Chosen(source.part(held), range(len(held))[world.rank :: world.size])
    card = {"held_out_number": len(held)}  # no names, which may be those of patients
    return TrainingCases(source.part(training), "image/mask pairs of a folder", validation, card, held)


def _synthetic(
    options: argparse.Namespace, settings: TrainSettings, contents: CaseContents, world: World
) -> TrainingCases:
    """Synthetic subjects without end, other ones for each seed; and a few of the whole range of volumes to validate."""
    preprocessing = contents.preprocessing
    spacings = drawing_spacings(preprocessing.spacing[0])
    first_seed = TRAINING_SEEDS + SEEDS_A_RUN * settings.seed
    if not contents.masked:
        with about_arguments():
            source = SyntheticSource(preprocessing, first_seed, healthy=True, drawn_at=spacings)
        return TrainingCases(source, "synthetic subjects, drawn without their lesions")
    slices = SLICES_A_SUBJECT if len(settings.crop_size) == 2 else None
    with about_arguments():
        source = SyntheticSource(preprocessing, first_seed, slices=slices, drawn_at=spacings, crowded=CROWDED)
    count = getattr(options, "validation", HELD_OUT)
    measured = SyntheticSource(preprocessing, VALIDATION_SEEDS, spread=count, drawn_at=spacings[:1])
    validation = Chosen(measured, range(count)[world.rank :: world.size])
    return TrainingCases(source, "synthetic subjects with lesions", validation)


def _survey(source: FileSource, world: World) -> Survey:
    """What a source holds, found by the first process, which says what is odd about its cases."""
    with case_warnings_counted():
        return said_by_first(world, lambda: source.survey(bar("checking cases")))


def _by_chance(count: int, seed: int) -> list[int]:
    """So many numbers from 0, in an order that the seed decides."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
