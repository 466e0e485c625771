"""``grcsf-fast train``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.files import replace_when_done
from ..data.labels import Labels
from ..errors import ArgumentError
from ..networks.adapted import adapted
from ..networks.grcsf import GRCSF
from ..pretrained.bundle import Bundle, BundleError, ResidualMapSettings, check_channels, load_bundle
from ..runtime.processes import World
from .labels import add_labels, check_listed, check_places, used_channels, used_labels
from .listed import check_fold, chosen_cases, fold_of_card
from .options import number, numbers
from .shared import AT_LEAST_1, about_arguments, new_command, printable
from .training import (
    RESUMES,
    add_preprocessing,
    add_training,
    begin_training,
    by_hand,
    check_sizes,
    folder_source,
    in_processes,
    listed_sources,
    model_card,
    preprocessing_of,
    with_default_jitter,
    workers_of,
)

__all__ = ["NETWORK_DEFAULTS", "add"]


# Of a synthetic subject in the training of a 2-D network. Whole subjects would be few at a time, and few are learnt by
# heart.
SLICES_A_SUBJECT = 32
HELD_OUT_NAME = "held_out.json"


# Multiples of which edges of crops are made longer and shorter where it is not said: networks pad what they need.
EDGES = 8
# Share of the synthetic subjects with many lesions in the training of a network.
CROWDED = 0.5


NETWORK_DEFAULTS: dict[str, Any] = {
    "features": (16, 32, 64, 128, 128), "neighbours": None, "patch_size": 4, "rcu_levels": (1, 2), "gcu": True,
    "downsample": "max",
}  # fmt: skip


def add(commands: Any) -> None:
    command = new_command(commands, "train", run, "Train the segmentation network.", RESUMES)
    add_training(
        command, {}, "-i and -l",
        "its cases are held out for validation, those of the other folds are trained on (default: every case with a "
        "mask, but for a test set, is trained on, and none is held out)", "--mae or --initial",
    )  # fmt: skip
    command.add_argument("-l", "--labels", metavar="FOLDER", help="lesion masks, named like the images")
    add_labels(command, "all that masks mark is one kind of lesion")
    command.add_argument("--mae", metavar="FOLDER", help="bundle of train-mae; gives preprocessing and residual maps")
    command.add_argument(
        "--validation", type=number(int, least=0), metavar="N", default=argparse.SUPPRESS,
        help="cases held out for validation, by subject and at most half of all (default: 6); of a fold, how many are "
        "measured, drawn by chance (default: all)",
    )  # fmt: skip
    command.add_argument(
        "--features",
        type=numbers(AT_LEAST_1),
        default=NETWORK_DEFAULTS["features"],
        help="channels of each stage",
    )
    command.add_argument(
        "--neighbours", type=number(int, least=0), default=NETWORK_DEFAULTS["neighbours"],
        help="slices on either side that the network sees beside the one it segments (default: 1, and 0 for boxes)",
    )  # fmt: skip
    command.add_argument(
        "--patch-size", type=AT_LEAST_1, default=NETWORK_DEFAULTS["patch_size"],
        help="edge of the RCU's patches in voxels of its level, each level halving the resolution",
    )  # fmt: skip
    command.add_argument(
        "--rcu-levels", type=numbers(number(int, least=0), range(9)), default=NETWORK_DEFAULTS["rcu_levels"],
        help="levels with an RCU; '' for none",
    )  # fmt: skip
    command.add_argument(
        "--gcu", action=argparse.BooleanOptionalAction, default=NETWORK_DEFAULTS["gcu"],
        help="with the GCU or without",
    )  # fmt: skip
    command.add_argument(
        "--downsample", choices=("conv", "avg", "max"), default=NETWORK_DEFAULTS["downsample"],
        help="how the resolution is halved between the stages: by a convolution, by averages or by maxima",
    )  # fmt: skip
    add_preprocessing(command)


def run(options: argparse.Namespace) -> int:
    return in_processes(options, _train)


def _train(options: argparse.Namespace, world: World, device: torch.device) -> int:
    from ..datasets.cases import Chosen
    from ..datasets.folds import hold_out
    from ..datasets.survey import some
    from ..training.network import train_network
    from ..training.settings import TrainingRun
    from ..training.synthetic import SEEDS_A_RUN, TRAINING_SEEDS, VALIDATION_SEEDS, SyntheticSource, drawing_spacings

    chosen = chosen_cases(options, "images", "labels")
    if bool(options.images) != bool(options.labels):
        raise ArgumentError("expected --images and --labels together, or neither for synthetic subjects")
    held_out = getattr(options, "validation", 6)
    if options.cases and options.fold is None and held_out and by_hand(options, "validation"):
        raise ArgumentError(f"--validation: expected --fold with what is held out of --cases, got {held_out} alone")
    settings = with_default_jitter(options, begin_training(options), EDGES)
    initial = load_bundle(options.initial) if options.initial else None
    given_mae = load_bundle(options.mae) if options.mae else None
    check_fold(options, chosen, initial, "initial")
    check_fold(options, chosen, given_mae, "mae")
    trained = given_mae or initial
    for bundle, name in ((initial, options.initial), (trained, options.mae or options.initial)):
        if bundle is not None:
            check_channels(bundle, name)
    channels = used_channels(options, trained, options.mae or options.initial, adapts=given_mae is None)
    if initial is not None:
        check_places(channels, initial, options.initial)
        _check_kept(initial, options.initial, given_mae, channels)
    preprocessing = preprocessing_of(options, trained, len(channels))
    labels = used_labels(options, initial)
    if chosen is not None:
        check_listed(labels, chosen[0], options.cases)
    if (len(channels) > 1 or labels is not None) and not (options.images or chosen):
        raise ArgumentError(
            "--channels, --classes and --regions: expected --images or --cases, as synthetic subjects have one channel "
            "and one kind of lesion, got none"
        )
    residual = trained.residual_maps if trained is not None else ResidualMapSettings()
    torch.manual_seed(settings.seed)
    if initial is not None:
        check_sizes(options, initial.network, NETWORK_DEFAULTS, world)
        network = _begun(initial, channels, labels, world)
    else:
        neighbours = options.neighbours if options.neighbours is not None else int(len(settings.crop_size) == 2)
        with about_arguments():
            network = GRCSF(
                len(settings.crop_size), len(channels), labels.outputs if labels is not None else 1, options.features,
                options.patch_size, rcu_levels=options.rcu_levels,
                mask_ratios=residual.mask_ratios, gcu=options.gcu, downsample=options.downsample, neighbours=neighbours,
            )  # fmt: skip
    if len(settings.crop_size) != network.spatial_dims:
        raise ArgumentError(
            f"--crop-size: expected {network.spatial_dims} edge lengths, as the network of --initial takes, got "
            f"{','.join(map(str, settings.crop_size))}"
        )
    mae = None
    if network.rcu:
        mae = trained.mae if trained is not None else None
        if mae is None:
            raise ArgumentError("--mae: expected the bundle of an autoencoder for a network with RCU, got none")
        if mae.spatial_dims != network.spatial_dims:
            edges = ",".join(map(str, settings.crop_size))
            form = ["X,Y", "X,Y,Z"][network.spatial_dims - 2]
            raise ArgumentError(
                f"--mae: expected an autoencoder of {network.spatial_dims} dimensions, as --crop-size {edges} is, got "
                f"one of {mae.spatial_dims}; train one with `grcsf-fast train-mae --crop-size {form}`"
            )
        if network.mask_ratios != residual.mask_ratios:
            raise ArgumentError(
                f"--mae: expected ratios {network.mask_ratios}, those of the network, got {residual.mask_ratios}"
            )
    source: Any
    validating: Any
    of_validation: dict[str, Any] = {}
    if chosen is not None:
        source, validating = listed_sources(options, *chosen, preprocessing, True, world, channels, labels)
        drawn = torch.randperm(len(validating), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        measured: Sequence[int] = sorted(drawn[: getattr(options, "validation", len(drawn))])
    elif options.images:
        everything = folder_source(options.images, options.labels, preprocessing, world, len(channels), labels)
        shuffled = torch.randperm(len(everything), generator=torch.Generator().manual_seed(settings.seed))
        order = [everything.names[index] for index in shuffled.tolist()]
        held, training = hold_out(order, min(held_out, len(order) // 2))
        source, validating = everything.part(training), everything.part(held)
        measured = range(len(held))
        of_validation = {"held_out_number": len(held)}  # no names, which may be those of patients
        if world.rank == 0:
            named = f": {some(sorted(held))}" if held else ""
            print(printable(f"{len(held)} of {len(order)} cases held out for validation{named}"))
    else:
        slices = SLICES_A_SUBJECT if len(settings.crop_size) == 2 else None
        finer = drawing_spacings(preprocessing.spacing[0])
        first_seed = TRAINING_SEEDS + SEEDS_A_RUN * settings.seed
        with about_arguments():
            source = SyntheticSource(preprocessing, first_seed, slices=slices, drawn_at=finer, crowded=CROWDED)
        measured = range(held_out)
        validating = SyntheticSource(preprocessing, VALIDATION_SEEDS, spread=held_out, drawn_at=finer[:1])
    validation = Chosen(validating, measured[world.rank :: world.size])
    data = "image/mask pairs of a folder" if options.images else "synthetic subjects with lesions"
    data = "cases of a list" if chosen is not None else data
    card = model_card(options, data, preprocessing, initial=initial, mae=given_mae)
    card |= fold_of_card(options, chosen) | of_validation
    where = TrainingRun(
        Path(options.output), settings, preprocessing, residual, device, options.resume, card,
        initial.weights_sha256 if initial is not None else None, workers_of(options, world, device),
        options.tensorboard, world, channels, labels,
    )  # fmt: skip
    folder = train_network(network, mae, source, validation, where)
    if world.rank == 0:
        if of_validation:
            with replace_when_done(where.output / HELD_OUT_NAME) as (part,):
                part.write_text(json.dumps(validating.names, indent=1) + "\n")
        print(printable(f"wrote {folder}"))
    return 0


def _check_kept(initial: Bundle, name: str, mae: Bundle | None, channels: Sequence[str]) -> None:
    """See that what an initial bundle cannot lend to a network of other channels is given.

    Args:
        initial: the bundle.
        name: as it was given.
        mae: that of ``--mae``; None: none was given.
        channels: of the network to be trained.

    Raises:
        BundleError: no segmentation network in it.
        ArgumentError: an autoencoder of these channels is missing, or their intensities are not known.
    """
    if initial.network is None:
        raise BundleError(f"{name}: expected a bundle with a segmentation network, found none in it")
    if mae is not None or len(channels) == len(initial.channels):
        return
    said, known = ", ".join(channels), ", ".join(initial.channels)
    if initial.network.rcu:
        raise ArgumentError(
            f"--mae: expected the bundle of an autoencoder of {said}, as that of {name} knows {len(initial.channels)} "
            f"({known}), got none; train it first: grcsf-fast train-mae --channels {','.join(channels)} -o MAE, then "
            "this command with --mae MAE/bundle"
        )
    if initial.preprocessing.others:
        raise ArgumentError(
            f"--channels: expected {len(initial.channels)}, as {name} prepares each of {known} in its own way, got "
            f"{said}"
        )


def _begun(initial: Bundle, channels: Sequence[str], labels: Labels | None, world: World) -> GRCSF:
    """The network of a bundle to train on, adapted to the channels and labels; the first process says what is new."""
    network = initial.network
    assert network is not None  # was checked
    said = []
    if network.importance_threshold:
        said.append(f"importance_threshold {network.importance_threshold:g} was for the bundle's weights: now 0")
        network.importance_threshold = 0.0
    before = network.in_channels
    if len(channels) != before or labels != initial.labels:
        network = adapted(network, len(channels), labels.outputs if labels is not None else 1)
    if len(channels) != before:
        kept, further = channels[:before], channels[before:]
        begin = f", those of {', '.join(further)} begin at 0" if further else ""
        said.append(f"weights of the first convolution: the bundle's for {', '.join(kept)}{begin}")
    if labels is not None and labels != initial.labels:
        assert isinstance(network.output, nn.Conv2d | nn.Conv3d)
        network.output.reset_parameters()  # its outputs meant others, even where they are as many
        said.append(f"labels {', '.join(labels.names)}: the last convolution is new")
    if world.rank == 0:
        for text in said:
            print(printable(text))
    return network
