"""One training and its test: the same loop for every variant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy import forms
from benchmarks.accuracy.cases import MORE, TESTS, Size, evenly, load_cases
from benchmarks.accuracy.variants import SETTINGS, VARIANTS, Variant
from grcsf_fast.datasets.cases import Case
from grcsf_fast.networks.grcsf import GRCSF
from grcsf_fast.training.augmentation import augmentation
from grcsf_fast.training.losses import GRCSFLoss
from grcsf_fast.training.sampling import sample_crops

__all__ = ["batches", "built", "dice", "predict", "run", "step", "train"]

LESION_FRACTION = 0.6
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 5.0


def batches(cases: Sequence[Case], seed: int, size: Size) -> Iterator[dict[str, Tensor]]:
    """The crops of every step; which they are comes from (seed, step) alone, whatever maps the cases have."""
    flips = augmentation(2, "flips")
    for step in range(size.steps):
        rng = np.random.default_rng([seed, step])
        crops = sample_crops(cases, size.batch_size, size.crop, LESION_FRACTION, rng)
        yield flips(crops, int(rng.integers(2**31)))


@torch.no_grad()
def built(variant: Variant, seed: int) -> nn.Module:
    """The variant with random weights, of which those that it shares with the backbone are the backbone's.

    Another start moves the mean Dice by as much as a unit does: without this a unit's further random numbers would
    deal the whole network other weights.
    """
    torch.manual_seed(seed)
    network = variant.build()
    if not isinstance(network, GRCSF):
        return network
    torch.manual_seed(seed)
    backbone = forms.grcsf().state_dict()
    own = network.state_dict()
    shared = {name: value for name, value in backbone.items() if own[name].shape == value.shape}
    network.load_state_dict(own | shared)
    first = network.encoder[0][0].weight
    if network.in_channels > 1:  # of the image; what lies beside it begins without effect
        first.zero_()
        first[:, :1] = backbone["encoder.0.0.weight"]
    return network


def rate_of(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to 0; 1 at the peak."""
    warmup = steps // 20
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def step(
    network: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> Tensor:
    """One step of the optimiser; returns the norm of the gradient before it was clipped."""
    output = network(batch["image"], batch.get("residual_maps"), return_maps=True)
    optimizer.zero_grad()
    criterion(output, batch["lesion"]).backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    return norm


def train(network: nn.Module, variant: Variant, cases: Sequence[Case], seed: int, size: Size) -> None:
    """All steps, AdamW, on the device of the network.

    Raises:
        ArithmeticError: a gradient was not finite.
    """
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    criterion = GRCSFLoss(variant.score_weight, forms.PATCH_SIZE)
    network.train()
    norms = []
    for number, batch in enumerate(batches(cases, seed, size)):
        for group in optimizer.param_groups:
            group["lr"] = variant.learning_rate * rate_of(number, size.steps)
        norms.append(step(network, criterion, optimizer, {name: values.to(device) for name, values in batch.items()}))
    finite = torch.stack(norms).isfinite()
    if not finite.all():
        raise ArithmeticError(f"step {int((~finite).nonzero()[0])}: the gradient is not finite")


@torch.no_grad()
def predict(network: nn.Module, case: Case, batch_size: int) -> Tensor:
    """The mask of a case, (X, Y, Z) bool, on the device of the network."""
    device = next(network.parameters()).device
    slices = case.image.to(device).permute(2, 0, 1)[:, None].contiguous()  # (Z,1,X,Y)
    seen = case.residual_maps
    maps = None if seen is None else seen.to(device).float().permute(3, 0, 1, 2).contiguous()
    logits = [
        network(slices[first : first + batch_size], None if maps is None else maps[first : first + batch_size])
        for first in range(0, len(slices), batch_size)
    ]
    return (torch.cat(logits)[:, 0] >= 0).permute(1, 2, 0)


def dice(predicted: Tensor, lesion: Tensor) -> float:
    """1 where both are empty."""
    both = int(predicted.sum()) + int(lesion.sum())
    return 2 * int((predicted & lesion).sum()) / both if both else 1.0


def run(
    setting: str, name: str, seed: int, folder: Path, size: Size, mae: str, device: str = "cpu"
) -> dict[str, Any]:  # fmt: skip
    """Train a variant and test it.

    Args:
        setting: a key of ``SETTINGS``.
        name: a key of ``VARIANTS``.
        seed: of weights and crops.
        folder: that has the subjects.
        size: of the training.
        mae: the start of the hash of the bundle that made the residual maps.
        device: to train and test on.

    Returns:
        ``dice`` of each test case by set, ``parameters`` that are trained, and what it was a run of.
    """
    variant = VARIANTS[name]
    drawn = load_cases(folder, "train", size.train, variant.shown, mae)
    cases = evenly(drawn, min(SETTINGS[setting], size.train))
    if variant.more:
        cases += load_cases(folder, MORE, size.more, variant.shown, mae)
    network = built(variant, seed).to(device)
    train(network, variant, cases, seed, size)
    network.eval()
    results = {
        test: [
            dice(predict(network, case, size.batch_size).cpu(), case.lesion)
            for case in load_cases(folder, test, size.test, variant.shown, mae)
        ]
        for test in TESTS
    }
    return {
        "setting": setting, "variant": name, "seed": seed, "steps": size.steps, "subjects": len(cases),
        "parameters": sum(one.numel() for one in network.parameters() if one.requires_grad),
        "dice": results, "mae": mae if variant.residual else None,
    }  # fmt: skip
