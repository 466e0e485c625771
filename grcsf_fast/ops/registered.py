"""Both ops as ``torch.library`` ops with gradients, under the names and signatures of :mod:`grcsf_fast.reference`.

``register_autograd`` makes the ``torch.autograd.Function`` of an op, so that ``torch.compile`` and ``torch.export``
keep an op whole and still differentiate it. Gradients of gradients are the reference's alone. Which kernels run is an
argument of the op: its backward takes the same, whatever thread it runs in and whatever is asked for by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import AttentionWeights
from ..runtime.dtypes import accumulation_dtype
from . import cpp
from .adapters import kernels, laid_out
from .library import differentiable, registered

__all__ = [
    "attend", "convolve", "linear_gelu", "multiscale_compensation", "normalize_activate", "patch_cross_attention",
    "pool", "pool_with_mean", "transform_filters", "upsample",
]  # fmt: skip


@registered("multiscale_compensation")
def _compensate(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float,
    backend: str,
) -> list[Tensor]:
    """The compensated features of all scales, then the residuals."""
    pairs = kernels(features[0], backend).gcu_forward(features, coarse, feature_gates, coarse_gates, strengths, eps)
    return [pair[index] for index in range(2) for pair in pairs]


@torch.library.register_fake(_compensate)
def _(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float,
    backend: str,
) -> list[Tensor]:
    return [
        *(laid_out(one, backend) for one in features),
        *(one.new_empty((one.shape[0], 1, *one.shape[2:])) for one in features),
    ]


@registered("multiscale_compensation_backward")
def _compensate_backward(
    grads: Sequence[Tensor],
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float,
    backend: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Those gradients of all features, coarse features, gates and strengths that are ``needed``."""
    scales = len(features)
    wanted = [needed[scale::scales] for scale in range(scales)]
    found = kernels(features[0], backend).gcu_backward(
        grads[:scales], grads[scales:], features, coarse, feature_gates, coarse_gates, strengths, eps, wanted
    )
    return [five[index] for index in range(5) for five in found if five[index] is not None]


@torch.library.register_fake(_compensate_backward)
def _(
    grads: Sequence[Tensor],
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float,
    backend: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    large, small = (*features, *coarse), (*feature_gates, *coarse_gates, *strengths)
    grads = *(laid_out(one, backend) for one in large), *(one.new_empty(one.shape) for one in small)
    return [grad for grad, wanted in zip(grads, needed, strict=True) if wanted]


def _save_compensation(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*(one for each in tensors for one in each))


def _compensation_grads(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor | None] | None, ...]:
    scales = len(grads) // 2
    needed = [wanted for each in ctx.needs_input_grad[:5] for wanted in each]
    found: list[Tensor | None] = [None] * len(needed)
    if any(needed):
        saved = ctx.saved_tensors
        tensors = [list(saved[index * scales : (index + 1) * scales]) for index in range(5)]
        found = _spread(_compensate_backward(grads, *tensors, ctx.eps, ctx.backend, needed), needed)
    return (*(found[index * scales : (index + 1) * scales] for index in range(5)), None, None)


differentiable(_compensate, _compensation_grads, _save_compensation)
differentiable(_compensate_backward)


@registered("patch_cross_attention")
def _attend(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Sequence[Tensor],
    patch_size: int,
    threshold: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``weights`` are those of :class:`AttentionWeights`, in its order."""
    run = kernels(x, backend).rcu_forward
    return run(x, keys, values, AttentionWeights(*weights), patch_size, threshold)


@torch.library.register_fake(_attend)
def _(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Sequence[Tensor],
    patch_size: int,
    threshold: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    scores = (x.shape[0], 1, *(size // patch_size for size in x.shape[2:]))
    return laid_out(x, backend), x.new_empty(scores, dtype=accumulation_dtype(x.dtype))


@registered("patch_cross_attention_backward")
def _attend_backward(
    out_grad: Tensor,
    score_grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Sequence[Tensor],
    patch_size: int,
    threshold: float,
    backend: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Those gradients of x, keys, values and the weights that are ``needed``."""
    run = kernels(x, backend).rcu_backward
    grads = run(out_grad, score_grad, x, keys, values, AttentionWeights(*weights), patch_size, threshold, needed)
    return [grad for grad in grads if grad is not None]


@torch.library.register_fake(_attend_backward)
def _(
    out_grad: Tensor,
    score_grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Sequence[Tensor],
    patch_size: int,
    threshold: float,
    backend: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    grads = *(laid_out(one, backend) for one in (x, keys, values)), *(one.new_empty(one.shape) for one in weights)
    return [grad for grad, wanted in zip(grads, needed, strict=True) if wanted]


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, keys, values, weights, ctx.patch_size, ctx.threshold, ctx.backend = inputs
    ctx.save_for_backward(x, keys, values, *weights)


def _attention_grads(ctx: Any, out_grad: Tensor, score_grad: Tensor) -> tuple[Any, ...]:
    needed = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[3]]
    if not any(needed):
        return (None,) * 7
    x, keys, values, *weights = ctx.saved_tensors
    settings = (ctx.patch_size, ctx.threshold, ctx.backend, needed)
    grads = _spread(_attend_backward(out_grad, score_grad, x, keys, values, weights, *settings), needed)
    return (*grads[:3], grads[3:], None, None, None)


differentiable(_attend, _attention_grads, _save_attention)
differentiable(_attend_backward)


@registered("normalize_activate", ("cpu",))
def normalize_activate(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    """See :func:`grcsf_fast.functional.internal.normalize_activate`; without gradients."""
    return cpp.normalize_activate(x, weight, bias, eps, slope)


@torch.library.register_fake(normalize_activate)
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    return x.new_empty(x.shape)


@registered("pool", ("cpu",))
def pool(x: Tensor) -> Tensor:
    """See :func:`grcsf_fast.functional.internal.pool`; without gradients."""
    return cpp.pool(x)


@torch.library.register_fake(pool)
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], *(size // 2 for size in x.shape[2:])))


@registered("pool_with_mean", ("cpu",))
def pool_with_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.functional.internal.pool_with_mean`; without gradients."""
    return cpp.pool_forward(x)


@torch.library.register_fake(pool_with_mean)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    half = (*x.shape[:2], *(size // 2 for size in x.shape[2:]))
    return x.new_empty(half), x.new_empty(half)


@registered("transform_filters", ("cpu",))
def transform_filters(weight: Tensor, turned: bool = False) -> Tensor:
    """See :func:`grcsf_fast.ops.cpp.transform_filters`."""
    return cpp.transform_filters(weight, turned)


@torch.library.register_fake(transform_filters)
def _(weight: Tensor, turned: bool = False) -> Tensor:
    return cpp.empty_filters(weight, turned)


@registered("convolve", ("cpu",))
def convolve(x: Tensor, filters: Tensor, bias: Tensor, more: Tensor | None = None) -> Tensor:
    """See :func:`grcsf_fast.ops.cpp.convolve`."""
    return cpp.convolve(x, filters, bias, more)


@torch.library.register_fake(convolve)
def _(x: Tensor, filters: Tensor, bias: Tensor, more: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], bias.shape[0], *x.shape[2:]))


@registered("upsample", ("cpu",))
def upsample(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """See :func:`grcsf_fast.ops.cpp.upsample`."""
    return cpp.upsample(x, filters, bias)


@torch.library.register_fake(upsample)
def _(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], bias.shape[0], *(2 * size for size in x.shape[2:])))


@registered("attend", ("cpu",))
def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """See :func:`grcsf_fast.functional.internal.attend`; without gradients."""
    return cpp.attend(queries, keys, values, heads)


@torch.library.register_fake(attend)
def _(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    return queries.new_empty(queries.shape)


@registered("linear_gelu", ("cpu",))
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`grcsf_fast.functional.internal.linear_gelu`; without gradients."""
    return cpp.linear_gelu(x, weight, bias)


@torch.library.register_fake(linear_gelu)
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


for _op in (normalize_activate, pool, pool_with_mean, transform_filters, convolve, upsample, attend, linear_gelu):
    differentiable(_op)


def _spread(grads: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients there are, at the places of the inputs that need them."""
    left = iter(grads)
    return [next(left) if wanted else None for wanted in needed]


def multiscale_compensation(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float = 1e-6,
    *,
    backend: str,
) -> list[tuple[Tensor, Tensor]]:
    """See :func:`grcsf_fast.functional.multiscale_compensation`; ``backend`` is "cpp" or "triton"."""
    scales = [list(each) for each in (features, coarse, feature_gates, coarse_gates, strengths)]
    outputs = _compensate(*scales, eps, backend)
    return list(zip(outputs[: len(features)], outputs[len(features) :], strict=True))


def patch_cross_attention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: AttentionWeights,
    patch_size: int,
    threshold: float = 0.0,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.functional.patch_cross_attention`; ``backend`` is "cpp" or "triton"."""
    return _attend(x, keys, values, list(weights), patch_size, threshold, backend)
