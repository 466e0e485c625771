"""How long each variant takes, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time

import numpy as np
import torch
from torch import nn

from benchmarks.accuracy import forms
from benchmarks.accuracy.cases import SUBJECTS, TESTS, Size, load_cases, maps_of
from benchmarks.accuracy.train import batches, built, predict, step
from benchmarks.accuracy.variants import VARIANTS
from grcsf_fast.pretrained.bundle import Bundle
from grcsf_fast.training.losses import GRCSFLoss

__all__ = ["MAPS", "measure"]

REPEATS = 5
# Stands for the making of the residual maps among the variants.
MAPS = "residual maps"


def measure(variants: Sequence[str], folder: Path, size: Size, bundle: Bundle) -> dict[str, dict[str, float]]:
    """Seconds of the processor, one thread, on the CPU: medians of rounds in which each variant has its turn.

    Args:
        variants: names of them.
        folder: that has the subjects.
        size: of the trainings.
        bundle: with the autoencoder.

    Returns:
        By variant ``"a step"`` of training, crops apart, and ``"a volume"`` of a test subject, maps apart; of ``MAPS``
        ``"a volume"``.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        for name in variants:
            calls[name, "a step"], calls[name, "a volume"] = _calls(name, folder, size, bundle.weights_sha256[:8])
        if any(VARIANTS[name].residual for name in variants):
            image = SUBJECTS[TESTS[0]](bundle.preprocessing, 0, size.test).image
            slices = load_cases(folder, TESTS[0], 1, "none", "")[0].image.shape[-1]
            kept = np.linspace(0, image.shape[-1] - 1, slices).astype(int).tolist()
            calls[MAPS, "a volume"] = lambda: maps_of(image, kept, bundle)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for _ in range(REPEATS + 1):
            for key, call in calls.items():
                began = process_time()
                call()
                seconds[key].append(process_time() - began)
    finally:
        torch.set_num_threads(threads)
    found: dict[str, dict[str, float]] = {}
    for (name, what), all_of_them in seconds.items():
        found.setdefault(name, {})[what] = float(np.median(all_of_them[1:]))  # the first warms up
    return found


def _calls(name: str, folder: Path, size: Size, mae: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """A step of training and the segmentation of a test subject."""
    variant = VARIANTS[name]
    (case,) = load_cases(folder, TESTS[0], 1, variant.shown, mae)
    batch = next(batches([case], 0, size))
    network, tested = built(variant, 0).train(), built(variant, 0).eval()
    criterion: nn.Module = GRCSFLoss(variant.score_weight, forms.PATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    return (
        lambda: step(network, criterion, optimizer, batch),
        lambda: predict(tested, case, size.batch_size),
    )
