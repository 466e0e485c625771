"""Training of the masked autoencoder; the loop is :mod:`.loop`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..datasets.cases import Source
from ..errors import ArgumentError
from ..networks.mae import MaskedAutoencoder
from ..pretrained.bundle import Bundle, save_bundle
from .augmentation import augmentation
from .cases import case_cache, ramp
from .loop import Step, fit
from .sampling import sample_crops
from .settings import TrainingRun

__all__ = [
    "train_mae",
]

# Share of the crops whose neighbouring slices are unknown, so that an image by itself has maps too.
ALONE = 0.1


def train_mae(mae: MaskedAutoencoder, source: Source, run: TrainingRun) -> Path:
    """Train a masked autoencoder on crops of a source and write a bundle.

    Args:
        mae: trained in place.
        source: of the training cases. Where they have a healthy twin, it is what the autoencoder learns to draw:
            the head without the lesions that it sees.
        run: each step draws one of its masking ratios.

    Returns:
        The bundle's folder.

    Raises:
        TrainError: a checkpoint that is in the way or of another training; a gradient that is not finite at once.
        UnfinishedError: an error that is no bug after the first step; what was done is saved, unless it diverged.
        ArgumentError: cases without a healthy twin for an autoencoder that restores.
        Interrupted: a signal; the running step was finished and saved first.
        OSError: the output cannot be written.
    """
    settings, residual, device = run.settings, run.residual_maps, run.device
    mae.to(device)
    pool = case_cache(source, settings, lambda case: case)
    augment = augmentation(mae.spatial_dims, settings.augment)
    stack = mae.stack if mae.neighbours else None

    def reconstruct(image: Tensor, healthy: Tensor | None, ratio: float, rng: np.random.Generator) -> Tensor:
        patches = int(np.prod(mae.grid(image.shape[2:])))
        shown = max(1, int(patches * (1 - ratio)))
        visible = torch.from_numpy(rng.random((len(image), patches)).argsort(1)[:, :shown]).to(device)
        return mae.loss(image, visible, healthy)

    def loss(step: Step) -> dict[str, Tensor]:
        rng = step.rng
        cases = pool.at(step.number, lambda missing: step.watched("preparing cases", missing))
        batch = sample_crops(cases, settings.batch_size, settings.crop_of_step(rng), 0.0, rng, stack)
        seen = {name: batch[name] for name in ("image", "healthy") if name in batch}
        if mae.restores and "healthy" not in seen:
            # Without them it would learn that lesions are to stay, and its maps would go out in silence.
            raise ArgumentError(
                f"source: expected healthy twins for an autoencoder that restores, got none of {cases[0].name}"
            )
        batch = {name: values.to(device) for name, values in augment(seen, int(rng.integers(2**31))).items()}
        if mae.neighbours:
            lonely = torch.from_numpy(rng.random(len(batch["image"])) < ALONE)
            batch["image"][lonely] = mae.alone(batch["image"][lonely, : mae.in_channels])
        ratio = residual.mask_ratios[int(rng.integers(len(residual.mask_ratios)))]
        with step.autocast():
            return {"loss": reconstruct(batch["image"], batch.get("healthy"), ratio, rng)}

    def trial() -> Tensor:
        return reconstruct(
            ramp(2, mae.seen_channels, *settings.crop_size).to(device),
            None,
            max(residual.mask_ratios),
            np.random.default_rng(0),
        )

    describes = {
        "mae": mae.config,
        "residual_maps": asdict(residual),
        "preprocessing": asdict(run.preprocessing),
        "initial_sha256": run.initial_sha256,
    }
    fit(run, mae, source, loss, None, trial, describes)
    bundle = Bundle(None, mae, run.preprocessing, residual, channels=run.channels, card=run.card)
    return save_bundle(bundle, run.output / "bundle")
