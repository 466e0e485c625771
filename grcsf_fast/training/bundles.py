"""What a training writes as bundles, and which of its weights they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..pretrained.bundle import Bundle, save_bundle
from ..runtime.precision import Choice
from .settings import TrainingRun, TrainSettings

__all__ = ["BEST", "best_dice", "how_trained", "write_bundle"]

BEST = "best"  # folder, in that of a training


def how_trained(
    settings: TrainSettings, precision: Choice, step: int | None = None, dice: float | None = None
) -> dict[str, Any]:
    """For the card of a bundle: which weights it holds, and the precision that was taken.

    Args:
        settings: of the training.
        precision: of its forward passes.
        step: after which the weights were so; None: the last.
        dice: mean of the validation that chose them; None: nothing did.
    """
    kind = f"moving average with decay {settings.ema:g}" if settings.ema else "of the optimiser"
    chosen = "the last step" if step is None else "the highest mean Dice of a validation so far"
    said = {"kind": kind, "chosen": chosen, "step": settings.steps if step is None else step}
    weights = said | ({"validation_dice": dice} if dice is not None else {})
    return {"weights": weights, "precision": precision.precision, "precision_reason": precision.reason}


def best_dice(output: Path) -> float:
    """Of the validation that chose the best weights which are kept; below 0 where there are none that can be read."""
    try:
        return float(json.loads((output / BEST / "config.json").read_text())["card"]["weights"]["validation_dice"])
    except (OSError, ValueError, TypeError, KeyError):
        return -1.0


def write_bundle(bundle: Bundle, run: TrainingRun, name: str) -> Path:
    """Write it into the training's folder, in the first of its processes; returns the bundle's folder."""
    folder = run.output / name
    return save_bundle(bundle, folder) if run.world.rank == 0 else folder
