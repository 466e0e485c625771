"""Training of the segmentation network with its losses; the loop is :mod:`.loop`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.labels import Labels, any_label
from ..datasets.cases import Case, CaseSource
from ..datasets.cases_file import CaseList
from ..errors import ArgumentError
from ..networks.grcsf import GRCSF
from ..networks.mae import MaskedAutoencoder
from ..networks.whole_volume import segment
from ..pretrained.bundle import Bundle, check_storable
from ..runtime.processes import gathered
from .augmentation import augmentation
from .bundles import BEST, how_trained, write_bundle
from .cases import KeptCases, WithMaps, case_cache, moved, ramp
from .checkpoint import describe_validation, weights_digest
from .compiling import compiled, convolution_format
from .loop import Step, Trained, Watched, fit
from .losses import GRCSFLoss
from .sampling import sample_crops
from .settings import TrainingRun

__all__ = [
    "train_network",
]


def train_network(
    network: GRCSF, mae: MaskedAutoencoder | None, source: CaseSource, validation: Sequence[Case], run: TrainingRun
) -> Path:
    """Train the segmentation network with its segmentation loss and the score loss, and write a bundle.

    The bundle holds the weights after the last step: the cosine schedule ends at a learning rate of 0, where the last
    weights and the best ones are nearly the same, and the best of many validations are so by chance too. Those of the
    highest mean Dice in a validation are kept beside it, in ``best``; where no case to validate on has lesion there is
    no Dice, which is warned of, and no ``best``.

    Args:
        network: trained in place.
        mae: makes the residual maps; None for a network that needs none.
        source: of the training cases; each needs a lesion mask.
        validation: cases measured every ``validate_every`` steps; never trained on. Each process has its own. Of a
            sequence that reads a case when it is asked for, as :class:`grcsf_fast.datasets.cases.Chosen`, those that do
            not fit a quarter of the memory are read again each time.
        run: see :class:`TrainingRun`.

    Returns:
        The bundle's folder.

    Raises:
        TrainError: a checkpoint that is in the way or of another training; another training that runs in the folder; a
            gradient that is not finite at once.
        UnfinishedError: an error that is no bug after the first step; what was done is saved, unless it diverged.
        Interrupted: a signal; the running step was finished and saved first.
        ArgumentError, BundleError: networks that do not fit each other or the run's channels and labels, or that could
            not be loaded again.
        OSError: the output cannot be written.
    """
    settings, residual, device = run.settings, run.residual_maps, run.device
    if len(settings.crop_size) != network.spatial_dims:
        raise ArgumentError(
            f"crop_size: expected {network.spatial_dims} edge lengths for this network, got {settings.crop_size}"
        )
    if mae is not None and mae.spatial_dims != network.spatial_dims:
        raise ArgumentError(
            f"mae: expected an autoencoder of {network.spatial_dims} dimensions as the network is, got one of "
            f"{mae.spatial_dims}"
        )
    check_storable(Bundle(network, mae, run.preprocessing, residual, channels=run.channels, labels=run.labels))
    form = convolution_format(settings)
    # Which torch documents and does not list among the forms of the call.
    network.to(device, memory_format=form)  # pyright: ignore[reportCallIssue]
    if mae is not None:
        mae.to(device).eval()
        network.requires_maps = True
        network.residual_map_settings = residual
    labels, above_hu = run.labels, _counted_above(source, run)
    softmax = labels is not None and labels.exclusive
    criterion = GRCSFLoss(settings.score_weight, network.config["patch_size"], settings.loss, softmax)
    criterion.world = run.world
    with_residual = WithMaps(mae, asdict(residual), device)
    pool = case_cache(source, run, with_residual)
    augment = augmentation(network.spatial_dims, settings.augment, run.preprocessing.spacing)
    stack = network.stack if network.neighbours else None
    forward = compiled(network, settings)
    own = run.own_crops

    def loss(step: Step) -> dict[str, Tensor]:
        rng = step.rng
        cases = pool.at(step.number, lambda missing: step.watched("preparing cases", missing))
        count, crop = settings.batch_size, settings.crop_of_step(rng)
        batch = sample_crops(cases, count, crop, settings.lesion_fraction, rng, stack, own)
        batch = augment(batch, int(rng.integers(2**31)), own.start)
        if labels is not None:
            batch["lesion"] = labels.target(batch["lesion"])
        batch = {name: moved(values, device) for name, values in batch.items()}
        with step.autocast():
            image = batch["image"].contiguous(memory_format=form)
            output = forward(image, batch.get("residual_maps"), return_maps=True)
        return criterion.parts(output, batch["lesion"], batch.get("ignored"))

    roi_size = settings.crop_size if network.spatial_dims == 3 else None
    kept = KeptCases(validation, with_residual)

    def trial() -> Tensor:
        image = ramp(2, network.seen_channels, *settings.crop_size).to(device)
        # Given where steps have some, from a case: else the network makes its own, or goes without.
        maps = (
            image[:, :1].repeat(1, len(network.mask_ratios), *[1] * network.spatial_dims) if mae is not None else None
        )
        logits, _ = forward(image.contiguous(memory_format=form), maps, return_maps=True)
        return logits.float().square().mean()

    measurable = True

    def validate(watched: Watched, weights: GRCSF) -> dict[str, float]:
        nonlocal measurable
        if not measurable:
            return {}
        cases = (kept[number] for number in watched("validation", range(len(kept))))
        own = [(_dice(weights, case, device, roi_size, labels), _has_lesion(case, labels)) for case in cases]
        found = [one for part in gathered(run.world, own) for one in part]
        measurable = any(has_lesion for _, has_lesion in found)
        if not measurable:
            if run.world.rank == 0:
                warnings.warn(
                    f"validation: none of the {len(found)} cases has lesion: there is no Dice, and the last weights "
                    "alone are kept",
                    stacklevel=2,
                )
            return {}
        dice = [one for one, _ in found if not np.isnan(one)]
        return {"validation_dice": float(np.mean(dice)), "validation_dice_median": float(np.median(dice))}

    describes = {
        "network": network.config,
        "residual_maps": asdict(residual),
        "preprocessing": run.preprocessing.as_json(),
        "mae_sha256": weights_digest(mae) if mae is not None else None,
        "initial_sha256": run.initial_sha256,
        "validation": describe_validation(validation, run.world),
        **({"labels": repr(labels)} if labels is not None else {}),
    }

    def write(module: GRCSF, name: str, said: dict[str, Any]) -> Path:
        bundle = Bundle(
            module, mae, run.preprocessing, residual, roi_size=roi_size, channels=run.channels, labels=labels,
            card={**run.card, **said}, above_hu=above_hu,
        )  # fmt: skip
        return write_bundle(bundle, run, name)

    def keep_best(trained: Trained[GRCSF], step: int, dice: float) -> None:
        write(trained.weights, BEST, how_trained(settings, trained.precision, step, dice))

    validated = any(gathered(run.world, bool(validation)))
    with closing(pool):
        trained = fit(run, network, source, loss, validate if validated else None, trial, describes, keep_best)
    network.load_state_dict(trained.weights.state_dict())
    return write(network, "bundle", how_trained(settings, trained.precision))


def _counted_above(source: CaseSource, run: TrainingRun) -> float | None:
    """The limit above which the list of the cases counts lesion, so that predictions are cut there as well.

    It is of the list's first image. A network that knows that one in another place, or not at all, could not go by it.
    """
    listing = getattr(source, "listing", None)
    if not isinstance(listing, CaseList) or listing.above_hu is None:
        return None
    named = set(run.channels) <= set(listing.channels)  # otherwise either side has a single one without a name
    if named and run.channels[0] != listing.channels[0]:
        if run.world.rank == 0:
            warnings.warn(
                f"channels: expected {listing.channels[0]} first, where the list counts lesion above "
                f"{listing.above_hu:g} HU alone, got {', '.join(run.channels)}: predictions will not be cut there",
                stacklevel=3,
            )
        return None
    return listing.above_hu


@torch.no_grad()
def _dice(
    network: GRCSF, case: Case, device: torch.device, roi_size: tuple[int, ...] | None, labels: Labels | None
) -> float:
    """Of several labels the mean of theirs; NaN where there is no lesion and none was found.

    What nobody annotated is left out, and of what is found where no lesion can be, as in a prediction.

    Such a case says nothing: counted as 1, it would make a network that finds nothing the best one of many healthy
    cases. Where lesion is invented it is 0.
    """
    assert case.lesion is not None  # as of every case to validate on
    was_training = network.training
    network.eval()
    maps = case.residual_maps.float().to(device) if case.residual_maps is not None else None
    probability = segment(network, case.image.to(device), maps, roi_size=roi_size, labels=labels).cpu()
    network.train(was_training)
    counted = torch.ones_like(case.lesion, dtype=torch.bool) if case.ignored is None else ~case.ignored
    kept = counted if case.dense is None else counted & case.dense  # as predictions are cut
    if labels is None:
        return _overlap((probability >= 0.5) & kept, case.lesion & counted)
    found = torch.where(any_label(probability, labels) >= 0.5, labels.chosen(probability), 0)
    masks = (found * kept, case.lesion * counted)
    pairs = [[torch.isin(mask, torch.tensor(one)) for mask in masks] for one in labels.numbers]
    dice = [one for pair in pairs if not np.isnan(one := _overlap(*pair))]
    return float(np.mean(dice)) if dice else np.nan


def _has_lesion(case: Case, labels: Labels | None) -> bool:
    """Where somebody annotated, of one of the labels."""
    assert case.lesion is not None  # as of every case to validate on
    lesion = case.lesion if case.ignored is None else case.lesion * ~case.ignored
    if labels is not None:
        lesion = torch.isin(lesion, torch.tensor([number for one in labels.numbers for number in one]))
    return bool(lesion.any())


def _overlap(predicted: Tensor, lesion: Tensor) -> float:
    both = int(predicted.sum()) + int(lesion.sum())
    return 2 * int((predicted & lesion).sum()) / both if both else np.nan
