"""The two ops as contests: shapes, inputs, what a call needs at the least, and exact results."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Contest, Contestant
from benchmarks.peers import OPS, peers_of
from benchmarks.plan import Plan
from grcsf_fast import functional, reference, use_backend
from grcsf_fast.ops.examples import grouped

__all__ = [
    "HEADS", "MAPS", "RESIDUAL", "SHAPES", "TOLERANCES", "arguments_of", "exact_results", "make_inputs", "op_contest",
    "operations", "patch_of", "shape_name",
]  # fmt: skip

Shape = tuple[int, int, tuple[int, ...]]

SHAPES: tuple[Shape, ...] = (
    (8, 32, (224, 224)),
    (8, 64, (112, 112)),
    (8, 128, (56, 56)),
    (8, 256, (28, 28)),
    (2, 32, (96, 96, 96)),
    (2, 64, (48, 48, 48)),
)
MAPS, HEADS, RESIDUAL = 2, 2, 16
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
# Arguments without a batch axis.
WEIGHTS = {
    "strength", "query_weight", "query_bias", "position_bias", "output_weight", "output_bias", "score_weight",
    "score_vector",
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
            "strength": normal(channels),
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


def shape_name(shape: Shape) -> str:
    batch, channels, spatial = shape
    return f"{batch}xC{channels}x{'x'.join(map(str, spatial))}"


def operations(op: str, batch: int, channels: int, spatial: tuple[int, ...]) -> float:
    """Multiplications and additions of a forward."""
    pixels = batch * math.prod(spatial)
    if op == "global_compensation":
        return pixels * channels * (2 * 4 + 6 + 4)  # two-tap interpolations, three sums, what is given back
    tokens = patch_of(spatial) ** len(spatial)
    return pixels * 4 * MAPS * HEADS * RESIDUAL * (channels + tokens)


def least_bytes(op: str, shape: Shape, dtype: torch.dtype) -> float:
    """Of a forward: every large input read once, every output written once."""
    batch, channels, spatial = shape
    pixels = batch * math.prod(spatial)
    if op == "global_compensation":
        values = pixels * (2 * channels + channels / 2 ** len(spatial) + 1)
    else:
        values = pixels * (2 * channels + 2 * MAPS * RESIDUAL)
    return values * dtype.itemsize


def arguments_of(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    """The tensors of an op as it takes them."""
    return grouped(inputs) if "query_weight" in inputs else tuple(inputs.values())


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
            part = tensor.detach()[image : image + 1] if name in by_image else tensor.detach()
            part = part.chunk(cuts, part.dim() - dims)[cut] if name in of_space else part
            leaves[name] = part.cpu().double().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            outputs = getattr(reference, op)(*arguments_of(leaves), **settings)
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


def steps_of(
    run: Callable[..., Sequence[Tensor]], inputs: dict[str, Tensor], settings: dict[str, Any], backward: bool
) -> list[Callable[..., Any]]:
    """A forward alone, or one that keeps what its backward needs and then the backward, all gradients asked for."""
    if not backward:

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return run(*arguments_of(inputs), **settings)

        return [forward]
    leaves = list(inputs.values())

    def gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(outputs, leaves, [torch.ones_like(one) for one in outputs])
        return [*(one.detach() for one in outputs), *found]

    return [lambda: run(*arguments_of(inputs), **settings), gradients]


def on_backend(op: str, backend: str) -> Callable[..., Sequence[Tensor]]:
    """An op as users call it, on one backend."""

    def run(*arguments: Any, **settings: Any) -> Sequence[Tensor]:
        with use_backend(backend):
            return getattr(functional, op)(*arguments, **settings)

    return run


def op_contest(
    op: str, shape: Shape, dtype: str, backward: bool, plan: Plan, compiled: bool = True, **more: Any
) -> Contest:
    """Ours against every peer; without the compiled ones where compiling would take longer than it tells."""
    kind = getattr(torch, dtype)
    batch, channels, spatial = shape
    settings = {} if op == OPS[0] else {"patch_size": patch_of(spatial)}
    runs = {plan.backend: on_backend(op, plan.backend), **peers_of(op, compiled)}

    def entries() -> dict[str, Contestant]:
        inputs = {
            name: tensor.to(plan.device).requires_grad_(backward)
            for name, tensor in make_inputs(op, batch, channels, spatial, kind).items()
        }
        exact = functools.partial(exact_results, op, inputs, settings, backward)
        return {
            name: Contestant(
                functools.partial(steps_of, run, inputs, settings, backward),
                exact,
                TOLERANCES[dtype],
                ours=name == plan.backend,
            )
            for name, run in runs.items()
        }

    return Contest(
        what=f"op {1 + OPS.index(op)}",
        shape=shape_name(shape),
        dtype=dtype,
        passes=("backward", "both") if backward else ("forward",),
        names=tuple(runs),
        entries=entries,
        reference="reference",
        threads=plan.threads,
        device=plan.device,
        work=None if backward else lambda: (least_bytes(op, shape, kind), operations(op, *shape)),
        **more,
    )
