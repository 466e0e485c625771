"""What is trained: the masked autoencoder, and the network with its losses; the loop is :mod:`.training_loop`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.volumes import Preprocessing
from ..errors import ArgumentError
from ..networks.grcsf import GRCSF
from ..networks.mae import MaskedAutoencoder
from ..networks.residual_maps import volume_residual_maps
from ..networks.whole_volume import segment
from ..pretrained.bundle import Bundle, ResidualMapSettings, save_bundle
from .checkpoint import TrainError, weights_digest
from .loop import Step, Watched, fit
from .sampling import Case, CasePool, Source, augmentation, sample_crops
from .settings import TrainSettings

__all__ = ["TrainError", "TrainSettings", "train_mae", "train_network"]


def train_mae(
    output: str | Path,
    source: Source,
    mae: MaskedAutoencoder,
    settings: TrainSettings,
    preprocessing: Preprocessing,
    residual: ResidualMapSettings,
    device: torch.device,
    resume: bool = False,
    card: Mapping[str, Any] | None = None,
    initial_sha256: str | None = None,
) -> Path:
    """Train a masked autoencoder on crops of a source and write ``output/bundle``.

    Args:
        output: folder for checkpoint, log, curves and bundle.
        source: of the training cases; lesions in them are not used.
        mae: trained in place.
        settings: see :class:`TrainSettings`; each step draws one of ``residual.mask_ratios``.
        preprocessing: stored in the bundle.
        residual: stored in the bundle.
        device: to train on.
        resume: go on from the checkpoint in ``output``.
        card: what the bundle says of the training.
        initial_sha256: of the bundle whose weights are trained on; None: of none.

    Returns:
        The bundle's folder.

    Raises:
        TrainError: a checkpoint that is in the way or of another training; a gradient that is not finite at once.
        UnfinishedError: an error that is no bug after the first step; what was done is saved, unless it diverged.
        Interrupted: a signal; the running step was finished and saved first.
        OSError: ``output`` cannot be written.
    """
    mae.to(device)
    pool = _pool(source, settings, lambda case: case)
    augment = augmentation(mae.spatial_dims, ["image"], settings.augment)

    def reconstruct(image: Tensor, ratio: float, rng: np.random.Generator) -> Tensor:
        patches = int(np.prod(mae.grid(image.shape[2:])))
        shown = max(1, int(patches * (1 - ratio)))
        visible = torch.from_numpy(rng.random((len(image), patches)).argsort(1)[:, :shown]).to(device)
        return mae.loss(image, visible)

    def loss(step: Step) -> dict[str, Tensor]:
        rng = step.rng
        cases = pool.at(step.number, lambda missing: step.watched("preparing cases", missing))
        batch = sample_crops(cases, settings.batch_size, settings.crop_of_step(rng), 0.0, rng)
        batch = augment({"image": batch["image"]}, int(rng.integers(2**31)))
        image = batch["image"].to(device)
        ratio = residual.mask_ratios[int(rng.integers(len(residual.mask_ratios)))]
        with step.autocast():
            return {"loss": reconstruct(image, ratio, rng)}

    def trial() -> Tensor:
        return reconstruct(
            _ramp(2, 1, *settings.crop_size).to(device), max(residual.mask_ratios), np.random.default_rng(0)
        )

    describes = {
        "mae": mae.config,
        "residual": asdict(residual),
        "preprocessing": asdict(preprocessing),
        "initial_sha256": initial_sha256,
    }
    fit(Path(output), mae, settings, source, loss, None, trial, device, resume, describes)
    bundle = Bundle(None, mae, preprocessing, residual, card=card or {})
    return save_bundle(bundle, Path(output) / "bundle")


def train_network(
    output: str | Path,
    source: Source,
    validation: Sequence[Case],
    network: GRCSF,
    mae: MaskedAutoencoder | None,
    settings: TrainSettings,
    preprocessing: Preprocessing,
    residual: ResidualMapSettings,
    device: torch.device,
    resume: bool = False,
    card: Mapping[str, Any] | None = None,
    initial_sha256: str | None = None,
) -> Path:
    """Train the segmentation network with Dice + focal loss and the score loss, and write ``output/bundle``.

    The bundle holds the weights after the last step: the cosine schedule ends at a learning rate of 0, where the last
    weights and the best ones are nearly the same.

    Args:
        output: folder for checkpoint, log, curves and bundle.
        source: of the training cases; each needs a lesion mask.
        validation: cases measured every ``validate_every`` steps; never trained on.
        network: trained in place.
        mae: makes the residual maps; None for a network that needs none.
        settings: see :class:`TrainSettings`.
        preprocessing: stored in the bundle.
        residual: how residual maps are made.
        device: to train on.
        resume: go on from the checkpoint in ``output``.
        card: what the bundle says of the training.
        initial_sha256: of the bundle whose weights are trained on; None: of none.

    Returns:
        The bundle's folder.

    Raises:
        TrainError: a checkpoint that is in the way or of another training; a gradient that is not finite at once.
        UnfinishedError: an error that is no bug after the first step; what was done is saved, unless it diverged.
        Interrupted: a signal; the running step was finished and saved first.
        OSError: ``output`` cannot be written.
    """
    from monai.losses import DiceFocalLoss

    if len(settings.crop_size) != network.spatial_dims:
        raise ArgumentError(
            f"crop_size: expected {network.spatial_dims} edge lengths for this network, got {settings.crop_size}"
        )
    network.to(device)
    if mae is not None:
        mae.to(device).eval()
    criterion = DiceFocalLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)

    def with_residual(case: Case) -> Case:
        if mae is None or case.residual is not None:
            return case
        maps = volume_residual_maps(case.image.to(device), mae, residual.mask_ratios, residual.rounds, residual.seed)
        return replace(case, residual=maps.cpu())

    pool = _pool(source, settings, with_residual)
    keys = ["image", "lesion"] + (["residual"] if mae is not None else [])
    augment = augmentation(network.spatial_dims, keys, settings.augment)

    def loss(step: Step) -> dict[str, Tensor]:
        rng = step.rng
        cases = pool.at(step.number, lambda missing: step.watched("preparing cases", missing))
        batch = sample_crops(cases, settings.batch_size, settings.crop_of_step(rng), settings.lesion_fraction, rng)
        batch = augment(batch, int(rng.integers(2**31)))
        lesion = batch["lesion"].to(device)
        maps = batch["residual"].to(device) if "residual" in batch else None
        with step.autocast():
            logits, seen = network(batch["image"].to(device), maps, return_maps=True)
        segmentation = criterion(logits.float(), lesion)
        parts = {"loss": segmentation, "segmentation_loss": segmentation}
        # Scores of a run that has diverged are no probabilities; the loop says so better than the loss would.
        if seen.patch_scores and torch.isfinite(segmentation):
            parts["score_loss"] = _score_loss(network, seen.patch_scores, lesion)
            parts["loss"] = segmentation + settings.score_weight * parts["score_loss"]
        return parts

    roi_size = settings.crop_size if network.spatial_dims == 3 else None
    prepared: list[Case] = []

    def trial() -> Tensor:
        image = _ramp(2, 1, *settings.crop_size).to(device)
        maps = image.expand(-1, len(network.mask_ratios), *settings.crop_size).contiguous() if network.rcu else None
        return network(image, maps).float().square().mean()

    def validate(watched: Watched) -> dict[str, float]:
        for case in watched("preparing validation", validation[len(prepared) :]):
            prepared.append(with_residual(case))
        dice = [_dice(network, case, device, roi_size) for case in watched("validation", prepared)]
        return {"validation_dice": float(np.mean(dice)), "validation_dice_median": float(np.median(dice))}

    describes = {
        "network": network.config,
        "residual": asdict(residual),
        "preprocessing": asdict(preprocessing),
        "mae_sha256": weights_digest(mae) if mae is not None else None,
        "initial_sha256": initial_sha256,
    }
    fit(
        Path(output), network, settings, source, loss, validate if validation else None, trial, device, resume,
        describes,
    )  # fmt: skip
    bundle = Bundle(network, mae, preprocessing, residual, roi_size=roi_size, card=card or {})
    return save_bundle(bundle, Path(output) / "bundle")


def _pool(source: Source, settings: TrainSettings, finish: Callable[[Case], Case]) -> CasePool:
    """The pool of a training; says so where the settings leave cases of a folder unseen."""
    count = len(source) if hasattr(source, "__len__") else None
    size = settings.cache_size if count is None else min(settings.cache_size, count)
    replace_every = 0 if size == count else settings.replace_every
    seen = size + (settings.steps // replace_every if replace_every else 0)
    if count is not None and seen < count:
        print(
            f"{seen} of {count} cases will be seen; lower --replace-every or raise --cache-size or --steps to see all"
        )
    return CasePool(source, size, replace_every, finish)


def _ramp(*shape: int) -> Tensor:
    """Values from -2 to 2: an image as good as any to measure speed with."""
    return torch.linspace(-2, 2, math.prod(shape)).reshape(shape)


def _score_loss(network: GRCSF, scores: Mapping[int, Tensor], lesion: Tensor) -> Tensor:
    """Binary cross-entropy of each patch's score against whether the patch holds lesion, averaged over the levels."""
    pool = F.max_pool2d if network.spatial_dims == 2 else F.max_pool3d
    losses = []
    for level, score in scores.items():
        step = network.rcu[str(level)].patch_size * 2**level
        target = pool(lesion, step, ceil_mode=True)
        losses.append(F.binary_cross_entropy(score.float(), target))
    return torch.stack(losses).mean()


@torch.no_grad()
def _dice(network: GRCSF, case: Case, device: torch.device, roi_size: tuple[int, ...] | None) -> float:
    was_training = network.training
    network.eval()
    maps = case.residual.float().to(device) if case.residual is not None else None
    probability = segment(network, case.image.to(device), maps, roi_size=roi_size).cpu()
    network.train(was_training)
    predicted = probability >= 0.5
    both = int(predicted.sum()) + int(case.lesion.sum())
    return 2 * int((predicted & case.lesion).sum()) / both if both else 1.0
