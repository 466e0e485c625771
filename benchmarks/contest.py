"""What the benchmarks of the two ops share: shapes, inputs, exact results, and contestants that are right."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import OPS, peers_of
from grcsf_fast import functional, reference, use_backend

__all__ = [
    "HEADS", "MAPS", "RESIDUAL", "SHAPES", "contestants_of", "exact_results", "make_inputs", "median_seconds",
    "operations", "patch_of",
]  # fmt: skip

SHAPES = (
    (8, 32, (224, 224)),
    (8, 64, (112, 112)),
    (8, 128, (56, 56)),
    (8, 256, (28, 28)),
    (2, 32, (96, 96, 96)),
    (2, 64, (48, 48, 48)),
)
MAPS, HEADS, RESIDUAL = 2, 2, 16
# Arguments without a batch axis.
WEIGHTS = {
    "query_weight", "query_bias", "position_bias", "output_weight", "output_bias", "score_weight", "score_vector",
}  # fmt: skip


def make_inputs(op: str, batch: int, channels: int, spatial: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of an op, seeded; float32 weights."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    if op == "global_compensation":
        half = [size // 2 for size in spatial]
        return {
            "features": normal(batch, channels, *spatial).to(dtype),
            "coarse": normal(batch, channels, *half).to(dtype),
            "feature_gate": normal(batch, channels).sigmoid(),
            "coarse_gate": normal(batch, channels).sigmoid(),
        }
    tokens, width = patch_of(spatial) ** len(spatial), channels // 2
    fan_in = MAPS * HEADS * RESIDUAL
    return {
        "x": normal(batch, channels, *spatial).to(dtype),
        "keys": normal(batch, MAPS, RESIDUAL, *spatial).to(dtype),
        "values": normal(batch, MAPS, RESIDUAL, *spatial).to(dtype),
        "query_weight": normal(MAPS, HEADS, RESIDUAL, channels, scale=channels**-0.5),
        "query_bias": normal(MAPS, HEADS, RESIDUAL),
        "position_bias": normal(HEADS, tokens, tokens),
        "output_weight": normal(MAPS, HEADS, channels, RESIDUAL, scale=fan_in**-0.5),
        "output_bias": normal(channels),
        "score_weight": normal(width, channels, scale=channels**-0.5),
        "score_context": normal(batch, width),
        "score_vector": normal(width, scale=width**-0.5),
        "score_bias": normal(),
    }


def patch_of(spatial: tuple[int, ...]) -> int:
    return 8 if len(spatial) == 2 else 4


def operations(op: str, batch: int, channels: int, spatial: tuple[int, ...]) -> float:
    """Multiplications and additions of a forward."""
    pixels = batch * math.prod(spatial)
    if op == "global_compensation":
        return pixels * channels * (2 * 4 + 6 + 1)  # two-tap interpolations, three sums, the scaling
    tokens = patch_of(spatial) ** len(spatial)
    return pixels * 4 * MAPS * HEADS * RESIDUAL * (channels + tokens)


def exact_results(op: str, inputs: dict[str, Tensor], settings: dict[str, Any], backward: bool) -> list[Tensor]:
    """Outputs, and gradients where asked for, by the float64 reference; in pieces, for its memory.

    A piece is an image, and for op 2, whose patches know nothing of each other, a quarter of one along its first axis
    where patches allow it.
    """
    first = next(iter(inputs.values()))
    dims = first.dim() - 2
    by_image = {name for name, tensor in inputs.items() if tensor.dim() and name not in WEIGHTS}
    of_space = {name for name in by_image if inputs[name].dim() > 2}
    cuts = 4 if op == OPS[1] and first.shape[2] % (4 * settings["patch_size"]) == 0 else 1

    def piece(image: int, cut: int) -> list[Tensor]:
        leaves = {}
        for name, tensor in inputs.items():
            part = tensor[image : image + 1] if name in by_image else tensor
            part = part.chunk(cuts, part.dim() - dims)[cut] if name in of_space else part
            leaves[name] = part.double().requires_grad_(backward)
        outputs = getattr(reference, op)(**leaves, **settings)
        if not backward:
            return list(outputs)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(one) for one in outputs])
        return [*(one.detach() for one in outputs), *gradients]

    def joined(parts: list[Tensor], axis: int | None) -> Tensor:
        return torch.stack(parts).sum(0) if axis is None else torch.cat(parts, axis)

    names = [None, None, *(inputs if backward else ())]
    images = [
        [
            joined(list(parts), parts[0].dim() - dims if name is None or name in of_space else None)
            for name, parts in zip(names, zip(*(piece(image, cut) for cut in range(cuts)), strict=True), strict=True)
        ]
        for image in range(first.shape[0])
    ]
    return [
        joined(list(parts), 0 if name is None or name in by_image else None)
        for name, parts in zip(names, zip(*images, strict=True), strict=True)
    ]


def contestants_of(
    op: str, inputs: dict[str, Tensor], settings: dict[str, Any], backward: bool, backend: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Those that are right, ready to run, and why the others are not among them."""

    def ours(*arguments: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        with use_backend(backend):
            return getattr(functional, op)(*arguments, **settings)

    exact = exact_results(op, inputs, settings, backward)
    bound = 1e-4 if next(iter(inputs.values())).dtype == torch.float32 else 5e-2
    ready: dict[str, Callable[[], Any]] = {}
    absent: dict[str, str] = {}
    leaves = [tensor.requires_grad_(backward) for tensor in inputs.values()]
    for name, run in {backend: ours, **peers_of(op)}.items():

        def call(run: Any = run) -> tuple[Tensor, ...]:
            outputs = run(*leaves, **settings)
            if not backward:
                return outputs
            gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(one) for one in outputs])
            return (*(one.detach() for one in outputs), *gradients)

        try:
            results = call()
        # A peer that cannot do it is reported in the table; whatever it raises is its reason.
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
            continue
        worst = max(
            float((one.double() - other).abs().max() / (1 + other.abs().max()))
            for one, other in zip(results, exact, strict=True)
        )
        del results  # the next contestant needs the memory
        if worst < bound:
            ready[name] = call
        else:
            absent[name] = f"wrong by {worst:.1e}"
    return ready, absent


def _wall_seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median_seconds(
    contestants: dict[str, Callable[[], Any]],
    rounds: int,
    seconds_of: Callable[[Callable[[], Any]], float] = _wall_seconds,
) -> dict[str, float]:
    """Interleaved, in another order each round; one round beforehand does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = seconds_of(contestants[name])
            if turn:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}
