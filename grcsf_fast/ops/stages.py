"""What the networks do between the two ops as ``torch.library`` ops with gradients.

Under the names and signatures of :mod:`.plain`, and the backend last where there are several; what serves inference
alone is in :mod:`.registered`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.dtypes import accumulation_dtype
from . import cpp, triton
from .adapters import kernels, laid_out
from .dense import side_by_side
from .library import differentiable, registered

__all__ = ["convolution", "normalize_activate", "pool_with_mean"]


@registered("normalize_activate_statistics")
def _normalize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float, backend: str
) -> tuple[Tensor, Tensor]:
    """And what the kernels of the backward take of each channel of an image, (B, 2, C)."""
    return kernels(x, backend).norm_forward(x, weight, bias, eps, slope)


@torch.library.register_fake(_normalize)
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float, backend: str) -> tuple[Tensor, Tensor]:
    statistics = x.new_empty((x.shape[0], 2, x.shape[1]), dtype=accumulation_dtype(x.dtype))
    return laid_out(side_by_side(x), backend), statistics


@registered("normalize_activate_backward")
def _normalize_backward(
    out_grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, slope: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels(x, backend).norm_backward(out_grad, x, weight, bias, statistics, slope)


@torch.library.register_fake(_normalize_backward)
def _(
    out_grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, slope: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return laid_out(side_by_side(x), backend), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save_normalization(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.slope, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, output[1])


def _normalization_grads(ctx: Any, out_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_normalize_backward(out_grad, *ctx.saved_tensors, ctx.slope, ctx.backend), None, None, None)


differentiable(_normalize, _normalization_grads, _save_normalization)
differentiable(_normalize_backward)


@registered("pool_with_mean_grad")
def _pool(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return kernels(x, backend).pool_forward(x)


@torch.library.register_fake(_pool)
def _(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    half = (*x.shape[:2], *(size // 2 for size in x.shape[2:]))
    kept = triton.pooled_format(laid_out(x, backend))
    largest, mean = (torch.empty(half, dtype=x.dtype, device=x.device, memory_format=kept) for _ in range(2))
    return largest, mean


@registered("pool_with_mean_backward")
def _pool_backward(largest_grad: Tensor, mean_grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return kernels(x, backend).pool_backward(largest_grad, mean_grad, x)


@torch.library.register_fake(_pool_backward)
def _(largest_grad: Tensor, mean_grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return laid_out(x, backend)


def _save_pooling(ctx: Any, inputs: tuple[Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _pooling_grads(ctx: Any, largest_grad: Tensor, mean_grad: Tensor) -> tuple[Tensor, None]:
    return _pool_backward(largest_grad, mean_grad, *ctx.saved_tensors, ctx.backend), None


differentiable(_pool, _pooling_grads, _save_pooling)
differentiable(_pool_backward)


@registered("convolution", ("cpu",))
def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return cpp.convolve(x, cpp.transform_filters(weight), bias.to(accumulation_dtype(x.dtype)))


@torch.library.register_fake(_convolve)
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:]))


@registered("convolution_input_backward", ("cpu",))
def _convolve_back(out_grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x, a convolution of the outputs' with the taps in the other order."""
    wide = accumulation_dtype(weight.dtype)
    return cpp.convolve(
        out_grad, cpp.transform_filters(weight, turned=True), weight.new_zeros(weight.shape[1], dtype=wide)
    )


@torch.library.register_fake(_convolve_back)
def _(out_grad: Tensor, weight: Tensor) -> Tensor:
    return out_grad.new_empty((out_grad.shape[0], weight.shape[1], *out_grad.shape[2:]))


@registered("convolution_weight_backward", ("cpu",))
def _convolve_weight_back(out_grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return cpp.convolution_weight_grad(out_grad, x).to(weight.dtype)


@torch.library.register_fake(_convolve_weight_back)
def _(out_grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


def _save_convolution(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _convolution_grads(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        _convolve_back(out_grad, weight) if needs_x else None,
        _convolve_weight_back(out_grad, x, weight.detach()) if needs_weight else None,
        out_grad.sum([0, *range(2, out_grad.dim())], dtype=weight.dtype) if needs_bias else None,
    )


differentiable(_convolve, _convolution_grads, _save_convolution)
differentiable(_convolve_back)
differentiable(_convolve_weight_back)


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`grcsf_fast.functional.internal.convolution`."""
    return _convolve(x, weight, bias)


def normalize_activate(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, slope: float = 0.01, *, backend: str
) -> Tensor:
    """See :func:`grcsf_fast.functional.internal.normalize_activate`."""
    return _normalize(x, weight, bias, eps, slope, backend)[0]


def pool_with_mean(x: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.functional.internal.pool_with_mean`."""
    return _pool(x, backend)
