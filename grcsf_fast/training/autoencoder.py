"""Training of the masked autoencoder; the loop is :mod:`.loop`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..datasets.cases import CaseSource
from ..errors import ArgumentError
from ..networks.mae import MaskedAutoencoder
from ..pretrained.bundle import Bundle, check_storable
from ..runtime.processes import summed
from .augmentation import augmentation
from .bundles import how_trained, write_bundle
from .cases import case_cache, moved, ramp
from .compiling import compiled
from .loop import Step, fit
from .sampling import sample_crops
from .settings import TrainingRun

__all__ = [
    "train_mae",
]

# Share of the crops whose neighbouring slices are unknown, so that an image by itself has maps too.
ALONE = 0.1


def train_mae(mae: MaskedAutoencoder, source: CaseSource, run: TrainingRun) -> Path:
    """Train a masked autoencoder on crops of a source and write a bundle.

    Args:
        mae: trained in place.
        source: of the training cases. Where they have a healthy twin, it is what the autoencoder learns to draw:
            the head without the lesions that it sees.
        run: each step draws one of its masking ratios.

    Returns:
        The bundle's folder.

    Raises:
        TrainError: a checkpoint that is in the way or of another training; another training that runs in the folder; a
            gradient that is not finite at once.
        UnfinishedError: an error that is no bug after the first step; what was done is saved, unless it diverged.
        ArgumentError: cases without a healthy twin for an autoencoder that restores.
        Interrupted: a signal; the running step was finished and saved first.
        OSError: the output cannot be written.
    """
    settings, residual, device = run.settings, run.residual_maps, run.device
    mae.to(device)
    check_storable(Bundle(None, mae, run.preprocessing, residual, channels=run.channels))
    pool = case_cache(source, run)
    augment = augmentation(mae.spatial_dims, settings.augment, run.preprocessing.spacing)
    stack = mae.stack if mae.neighbours else None
    own = run.own_crops
    own_loss = compiled(mae.loss, settings)

    def reconstruct(image: Tensor, healthy: Tensor | None, ratio: float, order: np.ndarray) -> Tensor:
        patches = int(np.prod(mae.grid(image.shape[2:])))
        shown = max(1, int(patches * (1 - ratio)))
        visible = moved(torch.from_numpy(order[:, :patches].argsort(1)[:, :shown]), device)
        return own_loss(image, visible, healthy)

    def loss(step: Step) -> dict[str, Tensor]:
        rng = step.rng
        cases = pool.at(step.number, lambda missing: step.watched("preparing cases", missing))
        count, crop = settings.batch_size, settings.crop_of_step(rng)
        batch = sample_crops(cases, count, crop, 0.0, rng, stack, own)
        seen = {name: batch[name] for name in ("image", "healthy") if name in batch}
        if mae.restores and "healthy" not in seen:
            # Without them it would learn that lesions are to stay, and its maps would go out in silence.
            raise ArgumentError(
                f"source: expected healthy twins for an autoencoder that restores, got none of {cases[0].name}"
            )
        if mae.neighbours:
            # The distance from the top is no intensity; the same all over a slice, it stays as slices are turned.
            seen["image"], distance = seen["image"].split((mae.seen_channels - 1, 1), 1)
        batch = augment(seen, int(rng.integers(2**31)), own.start)
        if mae.neighbours:
            batch["image"] = torch.cat([batch["image"], distance], 1)
            lonely = torch.from_numpy(rng.random(count)[own] < ALONE)
            batch["image"][lonely] = mae.alone(batch["image"][lonely, : mae.in_channels])
        batch = {name: moved(values, device) for name, values in batch.items()}
        ratio = residual.mask_ratios[int(rng.integers(len(residual.mask_ratios)))]
        order = rng.random((count, int(np.prod(mae.grid(tuple(crop))))))[own]
        with step.autocast():
            part = reconstruct(batch["image"], batch.get("healthy"), ratio, order)
        # All crops hide as many patches: the mean over the processes is that over the batch.
        return {"loss": summed(run.world, part / run.world.size)}

    def trial() -> Tensor:
        return reconstruct(
            ramp(2, mae.seen_channels, *settings.crop_size).to(device),
            None,
            max(residual.mask_ratios),
            np.random.default_rng(0).random((2, int(np.prod(mae.grid(settings.crop_size))))),
        )

    describes = {
        "mae": mae.config,
        "residual_maps": asdict(residual),
        "preprocessing": run.preprocessing.as_json(),
        "initial_sha256": run.initial_sha256,
    }
    with closing(pool):
        trained = fit(run, mae, source, loss, None, trial, describes)
    mae.load_state_dict(trained.weights.state_dict())
    mae.image_size = settings.largest_crop
    card = {**run.card, **how_trained(settings, trained.precision)}
    bundle = Bundle(None, mae, run.preprocessing, residual, channels=run.channels, card=card)
    return write_bundle(bundle, run, "bundle")
