"""Whole networks as contests: one forward or one training step, ours and what a user would take instead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contest import Contest, Contestant, relative_error
from benchmarks.plan import Plan
from grcsf_fast import GRCSF, use_backend

__all__ = ["Variant", "grcsf", "network_contest", "shares"]

# Of the relative error, which is 1 for no result at all; largest seen of our networks 3e-6, 2e-2, 7e-4 and 8e-2, the
# last by rounding in the convolutions of the encoder: in plain PyTorch it is the same, as the suite prints.
OUR_TOLERANCES = {
    ("forward", "float32"): 1e-5, ("forward", "bfloat16"): 3e-2,
    ("training step", "float32"): 2e-3, ("training step", "bfloat16"): 1.2e-1,
}  # fmt: skip
# Of the others 7e-6, 7e-2, 9e-3 and 0.43: gradients of DynUNet on 128x128, whose last instance norm sees 16 pixels.
TOLERANCES = {
    ("forward", "float32"): 1e-4, ("forward", "bfloat16"): 1e-1,
    ("training step", "float32"): 2e-2, ("training step", "bfloat16"): 5e-1,
}  # fmt: skip
# Of a profile; the first match counts, by the start of the profiler's names.
KINDS = (
    ("the two ops, kernels", ("grcsf_fast::multiscale", "grcsf_fast::patch")),
    ("convolutions", (
        "aten::mkldnn_convolution", "aten::convolution", "aten::_convolution", "aten::conv", "grcsf_fast::convol",
        "grcsf_fast::upsample",
    )),
    ("instance norms and their activations", (
        "aten::native_batch_norm", "aten::instance_norm", "aten::batch_norm", "aten::_batch_norm",
        "grcsf_fast::normalize",
    )),
    ("activations", ("aten::leaky_relu", "aten::relu", "aten::sigmoid", "aten::threshold_backward")),
    ("pooling and joining", ("grcsf_fast::pool", "aten::max_pool", "aten::cat", "aten::slice", "aten::narrow")),
    ("matrix products", ("aten::bmm", "aten::mm", "aten::addmm", "aten::baddbmm")),
    ("softmax", ("aten::_softmax", "aten::softmax")),
    ("interpolation", ("aten::upsample",)),
    ("copies and conversions", ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::repeat")),
)  # fmt: skip


def grcsf(**arguments: Any) -> nn.Module:
    return GRCSF(2, 1, 1, **arguments)


@dataclass(frozen=True)
class Variant:
    """A network, and how it is run.

    Attributes:
        build: with random weights.
        backend: of our ops; None: a network without them, which gets the image alone.
        prepare: what is done to the network before its first call.
        passes: that it takes part in.
        ours: wrong is a failure.
    """

    build: Callable[[], nn.Module]
    backend: str | None = None
    prepare: Callable[[nn.Module], Any] = lambda network: network
    passes: tuple[str, ...] = ("forward", "training step")
    ours: bool = False


def shares(call: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of one call by kind of work; the profiler takes a little itself."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    found: dict[str, float] = {}
    for event in recorded.key_averages():
        kind = next((kind for kind, starts in KINDS if event.key.startswith(starts)), "the rest")
        found[kind] = found.get(kind, 0.0) + event.self_cpu_time_total / 1000
    return {"shares_ms": dict(sorted(found.items(), key=lambda item: -item[1]))}


def _on(backend: str | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else use_backend(backend)


@torch.no_grad()
def _network(build: Callable[[], nn.Module], device: str) -> nn.Module:
    """With both units at work, which start as the identity: else no check would see their ops or the residual maps."""
    torch.manual_seed(0)
    network = build()
    for name, parameter in network.named_parameters():
        if name.endswith(("strength", "output_weight")):
            fan_in = parameter[..., 0, :].numel() if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape) * fan_in**-0.5)
    return network.to(device)


def _inputs(count: int, batch: int, side: int, device: str) -> list[Tensor]:
    """The image, and the residual maps where two are asked for."""
    torch.manual_seed(0)
    image, maps = torch.randn(batch, 1, side, side), torch.rand(batch, 2, side, side)
    return [one.to(device) for one in (image, maps)[:count]]


@functools.lru_cache(maxsize=8)
def _exact(build: Callable[[], nn.Module], count: int, batch: int, side: int, training: bool) -> list[Tensor]:
    """In float64; kept, because the next contest may have another dtype alone."""
    exact = _network(build, "cpu").double().train(training)
    inputs = [one.double() for one in _inputs(count, batch, side, "cpu")]
    with use_backend("reference"), torch.set_grad_enabled(training):
        if not training:
            return [exact(*inputs)]
        exact(*inputs).square().mean().backward()
    return [parameter.grad for parameter in exact.parameters() if parameter.grad is not None]


def _forward_steps(variant: Variant, network: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Any]:
    network = network.eval()
    if dtype != torch.float32:
        network = (
            network.optimized_for_inference(dtype, fused=False) if isinstance(network, GRCSF) else network.to(dtype)
        )
    # Our networks take their image in float32 whatever their weights are.
    inputs = [one.to(dtype) if variant.backend is None or number else one for number, one in enumerate(inputs)]
    run = variant.prepare(network)

    def forward() -> list[Tensor]:
        with _on(variant.backend), torch.no_grad():
            return [run(*inputs)]

    return [forward]


def _training_steps(variant: Variant, network: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Any]:
    network = network.train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-5)
    run = variant.prepare(network)

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        with _on(variant.backend):
            with torch.autocast(inputs[0].device.type, dtype, enabled=dtype != torch.float32):
                loss = run(*inputs).float().square().mean()
            loss.backward()
        optimizer.step()
        return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]

    return [step]


def operations(build: Callable[[], nn.Module], batch: int, side: int) -> tuple[float, float]:
    """Multiplications and additions of a forward's convolutions and products; its bytes count for little."""
    with torch.device("meta"):
        network = build().eval()
        image, maps = torch.empty(batch, 1, side, side), torch.empty(batch, 2, side, side)
    with use_backend("reference"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image, maps)
    return 0.0, float(counter.get_total_flops())


def network_contest(
    variants: dict[str, Variant], passed: str, dtype: str, batch: int, side: int, plan: Plan, **more: Any
) -> Contest:
    """Of square images; ours get their residual maps ready-made.

    Variants with the same ``build`` start with the same weights.
    """
    chosen = {name: variant for name, variant in variants.items() if passed in variant.passes}
    kind = getattr(torch, dtype)
    steps_of = _forward_steps if passed == "forward" else _training_steps
    # The profiler looks at the processor alone.
    profiled = passed == "forward" and "scaling" not in more and plan.device == "cpu"

    def entries() -> dict[str, Contestant]:
        found = {}
        for name, variant in chosen.items():
            count = 1 if variant.backend is None else 2

            def build(variant: Variant = variant, count: int = count) -> list[Any]:
                network = _network(variant.build, plan.device)
                return steps_of(variant, network, _inputs(count, batch, side, plan.device), kind)

            found[name] = Contestant(
                build,
                functools.partial(_exact, variant.build, count, batch, side, passed != "forward"),
                (OUR_TOLERANCES if variant.backend is not None else TOLERANCES)[passed, dtype],
                ours=variant.ours,
                detail=shares if variant.backend is not None and profiled else None,
            )
        return found

    settings = {
        "what": "network",
        "shape": f"{batch}x1x{side}x{side}",
        "threads": plan.threads,
        "work": functools.partial(operations, grcsf, batch, side) if passed == "forward" else None,
    }
    return Contest(
        dtype=dtype,
        passes=(passed,),
        names=tuple(chosen),
        entries=entries,
        reference="reference",
        device=plan.device,
        error=relative_error,
        **settings | more,
    )
