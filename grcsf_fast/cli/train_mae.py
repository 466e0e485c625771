"""``grcsf-fast train-mae``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError
from ..networks.mae import MaskedAutoencoder
from ..pretrained.bundle import BundleError, ResidualMapSettings, check_channels, load_bundle
from ..runtime.processes import World
from .labels import used_channels
from .listed import check_fold, chosen_cases, fold_of_card
from .options import number, ratios
from .shared import AT_LEAST_1, about_arguments, new_command, printable
from .training import (
    RESUMES,
    add_preprocessing,
    add_training,
    begin_training,
    check_sizes,
    folder_source,
    in_processes,
    listed_sources,
    model_card,
    preprocessing_of,
    with_default_jitter,
    workers_of,
)

__all__ = ["add"]


def add(commands: Any) -> None:
    command = new_command(commands, "train-mae", run, "Train the masked autoencoder.", RESUMES)
    add_training(
        command,
        {"batch_size": 48, "learning_rate": 1e-3, "weight_decay": 0.05, "augment": "none",
         "cache_size": 32, "replace_every": 12, "steps": 4000, "warmup_steps": 200,
         "lesion_fraction": None, "loss": None, "score_weight": None, "channels_last": None},
        "-i", "its cases are left out, those of the other folds are trained on (default: every case, also without a "
        "mask, but for a test set that has masks)", "--initial",
    )  # fmt: skip
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
    for name, default in _MAE_DEFAULTS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=AT_LEAST_1, default=default, help=_MAE_HELP[name])


# Small, as it sees only slices of 2 mm.
_MAE_DEFAULTS = {
    "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4,
    "decoder_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4,
}  # fmt: skip
_MAE_HELP = {
    "patch_size": "edge in voxels of the patches that are hidden or seen; edges of crops are multiples of it",
    "embed_dim": "width of the encoder, numbers per seen patch; a multiple of --num-heads",
    "depth": "transformer blocks of the encoder, which sees the patches that are not hidden",
    "num_heads": "attention heads in each block of the encoder",
    "decoder_dim": "width of the decoder, numbers per patch; a multiple of --decoder-num-heads",
    "decoder_depth": "transformer blocks of the decoder, which draws the hidden patches",
    "decoder_num_heads": "attention heads in each block of the decoder",
}


def run(options: argparse.Namespace) -> int:
    return in_processes(options, _train)


def _train(options: argparse.Namespace, world: World, device: torch.device) -> int:
    from ..training.autoencoder import train_mae
    from ..training.settings import TrainingRun
    from ..training.synthetic import SEEDS_A_RUN, TRAINING_SEEDS, SyntheticSource, drawing_spacings

    chosen = chosen_cases(options, "images")
    settings = begin_training(options)
    initial = load_bundle(options.initial) if options.initial else None
    check_fold(options, chosen, initial, "initial")
    channels = used_channels(options, initial, options.initial)
    preprocessing = preprocessing_of(options, initial, len(channels))
    if len(channels) > 1 and not (options.images or chosen):
        raise ArgumentError("--channels: expected --images or --cases, synthetic subjects having one channel; got none")
    torch.manual_seed(settings.seed)
    if initial is not None:
        mae = initial.mae
        if mae is None:
            raise BundleError(f"{options.initial}: expected a bundle with an autoencoder, found none in it")
        check_channels(initial, options.initial)
        if mae.restores and (options.images or chosen):
            raise ArgumentError(
                "--initial: expected an autoencoder that does not restore, as cases of --images and --cases have no "
                f"healthy twin, got {options.initial}"
            )
        check_sizes(options, mae, _MAE_DEFAULTS | {"neighbours": None}, world)
    else:
        slices = len(settings.crop_size) == 2
        neighbours = options.neighbours if options.neighbours is not None else 2 if slices else 0
        with about_arguments():
            mae = MaskedAutoencoder(
                len(settings.crop_size), len(channels), **{name: getattr(options, name) for name in _MAE_DEFAULTS},
                neighbours=neighbours, restore=not (options.images or chosen),
            )  # fmt: skip
    settings = with_default_jitter(options, settings, mae.patch_size)
    _check_crops(settings, mae)
    if chosen is not None:
        source: Any = listed_sources(options, *chosen, preprocessing, False, world, channels)[0]
    elif options.images:
        source = folder_source(options.images, None, preprocessing, world, len(channels))
    else:
        with about_arguments():
            source = SyntheticSource(
                preprocessing,
                TRAINING_SEEDS + SEEDS_A_RUN * settings.seed,
                healthy=True,
                drawn_at=drawing_spacings(preprocessing.spacing[0]),
            )
    residual = ResidualMapSettings(options.mask_ratios, options.rounds, seed=0)
    data = "volumes of a folder" if options.images else "synthetic subjects, drawn without their lesions"
    data = "volumes of a list of cases" if chosen is not None else data
    card = model_card(options, data, preprocessing, initial=initial) | fold_of_card(options, chosen)
    where = TrainingRun(
        Path(options.output), settings, preprocessing, residual, device, options.resume, card,
        initial.weights_sha256 if initial is not None else None, workers_of(options, world, device),
        options.tensorboard, world, channels,
    )  # fmt: skip
    folder = train_mae(mae, source, where)
    if world.rank == 0:
        print(printable(f"wrote {folder}"))
    return 0


def _check_crops(settings: Any, mae: MaskedAutoencoder) -> None:
    """See that crops of every size are of whole patches, before cases are read."""
    crop, jitter = settings.crop_size, settings.crop_size_jitter  # which is a multiple where it is not given
    if len(crop) != mae.spatial_dims:
        raise ArgumentError(f"--crop-size: expected {mae.spatial_dims} edge lengths for this autoencoder, got {crop}")
    if any(edge % mae.patch_size for edge in (*crop, jitter)):
        raise ArgumentError(
            f"--crop-size and --crop-size-jitter: expected multiples of the patch of {mae.patch_size}, got "
            f"{','.join(map(str, crop))} and {jitter}"
        )
