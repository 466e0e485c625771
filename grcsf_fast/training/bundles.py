"""What a training writes as bundles, and which of its weights they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pretrained.bundle import Bundle, save_bundle
from .settings import TrainingRun, TrainSettings

__all__ = ["which_weights", "write_bundle"]


def which_weights(settings: TrainSettings, step: int | None = None, dice: float | None = None) -> dict[str, Any]:
    """For the card of a bundle.

    Args:
        settings: of the training.
        step: after which the weights were so; None: the last.
        dice: mean of the validation that chose them; None: nothing did.
    """
    kind = f"moving average with decay {settings.ema:g}" if settings.ema else "of the optimiser"
    chosen = "the last step" if step is None else "the highest mean Dice of a validation so far"
    said = {"kind": kind, "chosen": chosen, "step": settings.steps if step is None else step}
    return {"weights": said | ({"validation_dice": dice} if dice is not None else {})}


def write_bundle(bundle: Bundle, run: TrainingRun, name: str) -> Path:
    """Write it into the training's folder, in the first of its processes; returns the bundle's folder."""
    folder = run.output / name
    return save_bundle(bundle, folder) if run.world.rank == 0 else folder
