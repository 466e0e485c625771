"""Convolutions of a training by our kernel and by PyTorch's, layer by layer: ``python -m benchmarks.layers``.

A layer's forward and backward, the two in turns; the ratios are medians over pairs. Where they fall below 1 is where
``grcsf_fast.functional.internal`` leaves a layer to PyTorch. bfloat16 is that of autocast: images are, weights are not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import processor
from grcsf_fast.functional import internal
from grcsf_fast.ops import stages

# (B, C, O, height, width): the default network's on 2x1x128x128, and the packaged one's on the crops of its training.
LAYERS = (
    (4, 16, 32, 128, 128), (2, 32, 32, 128, 128), (2, 64, 32, 128, 128), (2, 32, 64, 64, 64), (2, 64, 64, 64, 64),
    (2, 128, 64, 64, 64), (2, 64, 128, 32, 32), (2, 128, 128, 32, 32), (2, 256, 128, 32, 32), (2, 128, 256, 16, 16),
    (2, 256, 256, 16, 16), (2, 512, 256, 16, 16), (2, 256, 512, 8, 8), (2, 512, 512, 8, 8),
    (8, 16, 16, 96, 112), (8, 32, 32, 48, 56), (8, 64, 64, 24, 28), (8, 128, 128, 12, 14), (8, 128, 128, 6, 7),
)  # fmt: skip
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def by_pytorch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        return F.conv2d(x, weight, bias, padding=1)


def seconds(run: Callable[[Tensor, Tensor, Tensor], Tensor], given: tuple[Tensor, ...], incoming: Tensor) -> float:
    began = time.perf_counter()
    torch.autograd.grad(run(*given), given, incoming)
    return time.perf_counter() - began


def compare(layer: tuple[int, ...], dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Seconds of ours, and how many times as long PyTorch's took; medians."""
    batch, channels, outputs, *size = layer
    weight = 0.05 * torch.randn(outputs, channels, 3, 3)
    given = tuple(one.requires_grad_() for one in (torch.randn(batch, channels, *size, dtype=dtype), weight,
                                                   torch.zeros(outputs)))  # fmt: skip
    incoming = torch.randn(batch, outputs, *size, dtype=dtype)
    pairs = [
        tuple(seconds(run, given, incoming) for run in (stages.convolution, by_pytorch)) for _ in range(rounds + 2)
    ]
    kept = pairs[2:]  # the first calls prepare
    return statistics.median(ours for ours, _ in kept), statistics.median(theirs / ours for ours, theirs in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{processor()}, {options.threads} threads, medians of {options.rounds} rounds in turns\n")
    print("| layer: BxCxO of the images' size | pixels a channel | " +
          " | ".join(f"{name}: ours, ms | PyTorch / ours" for name in PRECISIONS) + " |")  # fmt: skip
    print("|---" * (2 + 2 * len(PRECISIONS)) + "|")
    for layer in LAYERS:
        batch, channels, outputs, *size = layer
        pixels = batch * size[0] * size[1] / max(channels, outputs)
        cells = [f"{batch}x{channels}x{outputs} of {size[0]}x{size[1]}", f"{pixels:.3g}"]
        for dtype in PRECISIONS.values():
            ours, ratio = compare(layer, dtype, options.rounds)
            cells += [f"{1000 * ours:.1f}", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nOurs serves from {internal.FEWEST_PIXELS_A_CHANNEL} pixels a channel in float32, and never in bfloat16.")


if __name__ == "__main__":
    main()
