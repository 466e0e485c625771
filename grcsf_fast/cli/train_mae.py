"""``grcsf-fast train-mae``."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..errors import ArgumentError
from ..networks.mae import MaskedAutoencoder
from ..pretrained.bundle import Bundle, BundleError, ResidualMapSettings, check_channels
from ..runtime.processes import World
from ..training.settings import TrainSettings
from .labels import used_channels
from .listed import ChosenCases, chosen_cases
from .options import number, ratios
from .shared import AT_LEAST_1, about_arguments, new_command, printable
from .training import in_processes, training_run
from .training_bundles import GivenBundles, check_sizes, load_bundles
from .training_cases import CaseContents, training_cases
from .training_options import RESUMES, add_training, begin_training, with_default_jitter
from .training_preprocessing import add_preprocessing, preprocessing_of

__all__ = ["add"]

# Where they differ from those of a network; None: an autoencoder has none.
SETTINGS: dict[str, int | float | str | None] = {
    "batch_size": 48, "learning_rate": 1e-3, "weight_decay": 0.05, "augment": "none", "cache_size": 32,
    "replace_every": 12, "steps": 4000, "warmup_steps": 200, "lesion_fraction": None, "loss": None,
    "score_weight": None, "channels_last": None,
}  # fmt: skip
# Small, as it sees only slices of 2 mm.
MAE_DEFAULTS = {
    "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4,
    "decoder_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4,
}  # fmt: skip
MAE_HELP = {
    "patch_size": "edge in voxels of the patches that are hidden or seen; edges of crops are multiples of it",
    "embed_dim": "width of the encoder, numbers per seen patch; a multiple of --num-heads",
    "depth": "transformer blocks of the encoder, which sees the patches that are not hidden",
    "num_heads": "attention heads in each block of the encoder",
    "decoder_dim": "width of the decoder, numbers per patch; a multiple of --decoder-num-heads",
    "decoder_depth": "transformer blocks of the decoder, which draws the hidden patches",
    "decoder_num_heads": "attention heads in each block of the decoder",
}


def add(commands: Any) -> None:
    command = new_command(commands, "train-mae", run, "Train the masked autoencoder.", RESUMES)
    add_training(
        command,
        defaults=SETTINGS,
        instead="-i",
        fold_help="its cases are left out, those of the other folds are trained on (default: every case, also without "
        "a mask, but for a test set that has masks)",
        bundles="--initial",
    )
    add_preprocessing(command)
    command.add_argument(
        "--mask-ratios", type=ratios, default=(0.5, 0.75),
        help="shares of the patches that are hidden, one of them in each step; each gives a residual map",
    )  # fmt: skip
    command.add_argument("--rounds", type=AT_LEAST_1, default=1, help="maskings averaged in a residual map")
    command.add_argument(
        "--neighbours", type=number(int, least=0),
        help="slices on either side that the autoencoder sees beside the one it draws (default: 2, with boxes 0)",
    )  # fmt: skip
    for name, default in MAE_DEFAULTS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=AT_LEAST_1, default=default, help=MAE_HELP[name])


def run(options: argparse.Namespace) -> int:
    return in_processes(options, _train)


def _train(options: argparse.Namespace, world: World, device: torch.device) -> int:
    """Train the autoencoder, as one of the processes that train together; the exit code."""
    from ..training.autoencoder import train_mae

    chosen = chosen_cases(options, "images")
    settings = begin_training(options)
    bundles = load_bundles(options, chosen)
    contents = _contents(options, chosen, bundles)
    torch.manual_seed(settings.seed)  # of the weights; steps have generators of their own
    mae = _autoencoder(options, settings, contents, bundles, world)
    settings = with_default_jitter(options, settings, mae.patch_size)
    _check_crops(settings, mae)
    cases = training_cases(options, settings, chosen, contents, world)
    residual_maps = ResidualMapSettings(options.mask_ratios, options.rounds, seed=0)
    where = training_run(options, settings, contents, cases, bundles, residual_maps, world, device)
    folder = train_mae(mae, cases.training, where)
    if world.rank == 0:
        print(printable(f"wrote {folder}"))
    return 0


def _contents(options: argparse.Namespace, chosen: ChosenCases | None, bundles: GivenBundles) -> CaseContents:
    """What the autoencoder sees of a case.

    Raises:
        ArgumentError: channels or preprocessing that contradict the bundle, or that synthetic subjects do not have.
    """
    channels = used_channels(options, bundles.initial, options.initial)
    preprocessing = preprocessing_of(options, bundles.initial, len(channels))
    if len(channels) > 1 and not (options.images or chosen):
        raise ArgumentError("--channels: expected --images or --cases, synthetic subjects having one channel; got none")
    return CaseContents(preprocessing, channels, masked=False)


def _autoencoder(
    options: argparse.Namespace, settings: TrainSettings, contents: CaseContents, bundles: GivenBundles, world: World
) -> MaskedAutoencoder:
    """The autoencoder to train: that of ``--initial``, or a new one; of synthetic subjects it learns to restore.

    Raises:
        BundleError: a bundle without an autoencoder, or that contradicts itself.
        ArgumentError: sizes that it cannot have, or other ones than those of ``--initial``; or it restores, for which
            cases of files have no healthy twin.
    """
    of_files = bool(options.images or options.cases)
    if bundles.initial is not None:
        return _initial_autoencoder(options, bundles.initial, of_files, world)
    slices = len(settings.crop_size) == 2
    neighbours = options.neighbours if options.neighbours is not None else 2 if slices else 0
    with about_arguments():
        return MaskedAutoencoder(
            len(settings.crop_size), len(contents.channels),
            **{name: getattr(options, name) for name in MAE_DEFAULTS}, neighbours=neighbours, restore=not of_files,
        )  # fmt: skip


def _initial_autoencoder(
    options: argparse.Namespace, initial: Bundle, of_files: bool, world: World
) -> MaskedAutoencoder:
    """That of ``--initial``."""
    mae = initial.mae
    if mae is None:
        raise BundleError(f"{options.initial}: expected a bundle with an autoencoder, found none in it")
    check_channels(initial, options.initial)
    if mae.restores and of_files:
        raise ArgumentError(
            "--initial: expected an autoencoder that does not restore, as cases of --images and --cases have no "
            f"healthy twin, got {options.initial}"
        )
    check_sizes(options, mae, MAE_DEFAULTS | {"neighbours": None}, world)
    return mae


def _check_crops(settings: TrainSettings, mae: MaskedAutoencoder) -> None:
    """See that crops of every size are of whole patches, before cases are read."""
    crop, jitter = settings.crop_size, settings.crop_size_jitter  # which is a multiple where it is not given
    if len(crop) != mae.spatial_dims:
        raise ArgumentError(f"--crop-size: expected {mae.spatial_dims} edge lengths for this autoencoder, got {crop}")
    if any(edge % mae.patch_size for edge in (*crop, jitter)):
        raise ArgumentError(
            f"--crop-size and --crop-size-jitter: expected multiples of the patch of {mae.patch_size}, got "
            f"{','.join(map(str, crop))} and {jitter}"
        )
