"""``grcsf-fast train``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.files import replace_when_done
from ..errors import ArgumentError
from ..networks.grcsf import GRCSF
from ..networks.mae import MaskedAutoencoder
from ..pretrained.bundle import check_channels
from ..runtime.processes import World
from ..training.settings import TrainSettings
from .labels import add_labels, check_listed, check_places, used_channels, used_labels
from .listed import ChosenCases, chosen_cases
from .options import number, numbers
from .recipes import by_hand
from .shared import AT_LEAST_1, about_arguments, new_command, printable
from .training import in_processes, training_run
from .training_bundles import GivenBundles, adapted_network, check_adaptable, check_sizes, load_bundles
from .training_cases import CaseContents, training_cases
from .training_options import RESUMES, add_training, begin_training, with_default_jitter
from .training_preprocessing import add_preprocessing, preprocessing_of

__all__ = ["NETWORK_DEFAULTS", "add"]

HELD_OUT_NAME = "held_out.json"
# Multiples of which edges of crops are made longer and shorter where it is not said: networks pad what they need.
EDGES = 8
NETWORK_DEFAULTS: dict[str, Any] = {
    "features": (16, 32, 64, 128, 128), "neighbours": None, "patch_size": 4, "rcu_levels": (1, 2), "gcu": True,
    "downsample": "max",
}  # fmt: skip


def add(commands: Any) -> None:
    command = new_command(commands, "train", run, "Train the segmentation network.", RESUMES)
    add_training(
        command,
        defaults={},
        instead="-i and -l",
        fold_help="its cases are held out for validation, those of the other folds are trained on (default: every case "
        "with a mask, but for a test set, is trained on, and none is held out)",
        bundles="--mae or --initial",
    )
    command.add_argument("-l", "--labels", metavar="FOLDER", help="lesion masks, named like the images")
    add_labels(command, "all that masks mark is one kind of lesion")
    command.add_argument("--mae", metavar="FOLDER", help="bundle of train-mae; gives preprocessing and residual maps")
    command.add_argument(
        "--validation", type=number(int, least=0), metavar="N", default=argparse.SUPPRESS,
        help="cases held out for validation, at most half of all, or a few more, as subjects are held out whole "
        "(default: 6); of a fold, how many are measured, drawn by chance (default: all)",
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
    """Train the network, as one of the processes that train together; the exit code."""
    from ..training.network import train_network

    chosen = chosen_cases(options, "images", "labels")
    _check_cases(options)
    settings = with_default_jitter(options, begin_training(options), EDGES)
    bundles = load_bundles(options, chosen)
    contents = _contents(options, chosen, bundles)
    torch.manual_seed(settings.seed)  # of the weights; steps have generators of their own
    network = _network(options, settings, contents, bundles, world)
    mae = _autoencoder(settings, network, bundles)
    cases = training_cases(options, settings, chosen, contents, world)
    where = training_run(options, settings, contents, cases, bundles, bundles.residual_maps, world, device)
    folder = train_network(network, mae, cases.training, cases.validation, where)
    if world.rank == 0:
        if cases.held_out is not None:
            _write_held_out(where.output, cases.held_out)
        print(printable(f"wrote {folder}"))
    return 0


def _check_cases(options: argparse.Namespace) -> None:
    """See that options for cases go together.

    Raises:
        ArgumentError: images without masks or masks without images, or a validation on cases of a list without a fold.
    """
    if bool(options.images) != bool(options.labels):
        raise ArgumentError("expected --images and --labels together, or neither for synthetic subjects")
    held_out = getattr(options, "validation", 0)
    if options.cases and options.fold is None and held_out and by_hand(options, "validation"):
        raise ArgumentError(f"--validation: expected --fold with what is held out of --cases, got {held_out} alone")


def _contents(options: argparse.Namespace, chosen: ChosenCases | None, bundles: GivenBundles) -> CaseContents:
    """What the networks see of a case and learn to tell apart.

    Raises:
        BundleError: a bundle that contradicts itself, or an initial one without a network.
        ArgumentError: channels, preprocessing or labels that contradict the bundles or the list, or that synthetic
            subjects do not have.
    """
    channels = _channels(options, bundles)
    preprocessing = preprocessing_of(options, bundles.base, len(channels))
    labels = used_labels(options, bundles.initial)
    if chosen is not None:
        check_listed(labels, chosen.listing, options.cases)
    if (len(channels) > 1 or labels is not None) and not (options.images or chosen):
        raise ArgumentError(
            "--channels, --classes and --regions: expected --images or --cases, as synthetic subjects have one channel "
            "and one kind of lesion, got none"
        )
    return CaseContents(preprocessing, channels, masked=True, labels=labels)


def _channels(options: argparse.Namespace, bundles: GivenBundles) -> tuple[str, ...]:
    """Those of the options or of the bundles, for which the bundles have what is needed."""
    initial, base_name = bundles.initial, options.mae or options.initial
    for bundle, name in ((initial, options.initial), (bundles.base, base_name)):
        if bundle is not None:
            check_channels(bundle, name)
    channels = used_channels(options, bundles.base, base_name, adapts=bundles.mae is None)
    if initial is not None:
        check_places(channels, initial, options.initial)
        check_adaptable(initial, options.initial, bundles.mae, channels)
    return channels


def _network(
    options: argparse.Namespace, settings: TrainSettings, contents: CaseContents, bundles: GivenBundles, world: World
) -> GRCSF:
    """The network to train: that of ``--initial``, or a new one.

    Raises:
        ArgumentError: sizes that it cannot have, or other ones than those of ``--initial``.
    """
    initial = bundles.initial
    if initial is None:
        network = _new_network(options, settings, contents, bundles)
    else:
        assert initial.network is not None  # was checked
        check_sizes(options, initial.network, NETWORK_DEFAULTS, world)
        network = adapted_network(initial, contents.channels, contents.labels, world)
    if len(settings.crop_size) != network.spatial_dims:
        raise ArgumentError(
            f"--crop-size: expected {network.spatial_dims} edge lengths, as the network of --initial takes, got "
            f"{','.join(map(str, settings.crop_size))}"
        )
    return network


def _new_network(
    options: argparse.Namespace, settings: TrainSettings, contents: CaseContents, bundles: GivenBundles
) -> GRCSF:
    """A network with weights by chance, in as many dimensions as the crops have."""
    dims, labels = len(settings.crop_size), contents.labels
    neighbours = options.neighbours if options.neighbours is not None else int(dims == 2)
    with about_arguments():
        return GRCSF(
            dims, len(contents.channels), labels.outputs if labels is not None else 1, options.features,
            options.patch_size, rcu_levels=options.rcu_levels, mask_ratios=bundles.residual_maps.mask_ratios,
            gcu=options.gcu, downsample=options.downsample, neighbours=neighbours,
        )  # fmt: skip


def _autoencoder(settings: TrainSettings, network: GRCSF, bundles: GivenBundles) -> MaskedAutoencoder | None:
    """The autoencoder that makes residual maps for a network; None for one without RCU.

    Raises:
        ArgumentError: there is none, or one that does not fit the network.
    """
    if not network.rcu:
        return None
    mae = bundles.base.mae if bundles.base is not None else None
    if mae is None:
        raise ArgumentError("--mae: expected the bundle of an autoencoder for a network with RCU, got none")
    if mae.spatial_dims != network.spatial_dims:
        edges = ",".join(map(str, settings.crop_size))
        form = ["X,Y", "X,Y,Z"][network.spatial_dims - 2]
        raise ArgumentError(
            f"--mae: expected an autoencoder of {network.spatial_dims} dimensions, as --crop-size {edges} is, got "
            f"one of {mae.spatial_dims}; train one with `grcsf-fast train-mae --crop-size {form}`"
        )
    if network.mask_ratios != bundles.residual_maps.mask_ratios:
        raise ArgumentError(
            f"--mae: expected ratios {network.mask_ratios}, those of the network, got "
            f"{bundles.residual_maps.mask_ratios}"
        )
    return mae


def _write_held_out(output: Path, names: Sequence[str]) -> None:
    with replace_when_done(output / HELD_OUT_NAME) as (part,):
        part.write_text(json.dumps(list(names), indent=1) + "\n")
