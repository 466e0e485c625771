"""The C++ kernels of what networks do between the two ops, as functions of tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from ..runtime.dtypes import accumulation_dtype
from .compiled import CPU, _cpu, addresses_of, head, sizes_of
from .dense import dense, fitting

__all__ = [
    "attend", "convolution_weight_grad", "convolve", "empty_filters", "linear_gelu", "norm_backward", "norm_forward",
    "normalize_activate", "pool", "pool_backward", "pool_forward", "transform_filters", "upsample",
]  # fmt: skip


def normalize_activate(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    """See :func:`grcsf_fast.ops.plain.normalize_activate`."""
    return _norm_forward(x, weight, bias, eps, slope, None)


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> tuple[Tensor, Tensor]:
    """And, for :func:`norm_backward`, mean and deviation of each channel of an image, (B, 2, C)."""
    statistics = torch.empty(x.shape[0], 2, x.shape[1], dtype=accumulation_dtype(x.dtype), device="cpu")
    return _norm_forward(x, weight, bias, eps, slope, statistics), statistics


def _norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float, statistics: Tensor | None
) -> Tensor:
    x = dense("x", x, x.shape, x.dtype, CPU)
    weight, bias = _affine(x, weight, bias)
    out = torch.empty_like(x)
    addresses = addresses_of(x=x, weight=weight, bias=bias, out=out, statistics=statistics)
    _cpu.norm_forward(*head(x.dtype), _planes(x), eps, slope, addresses)
    return out


def norm_backward(
    out_grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    x = dense("x", x, x.shape, x.dtype, CPU)
    out_grad = dense("out_grad", out_grad, x.shape, x.dtype, CPU)
    wide_weight, wide_bias = _affine(x, weight, bias)
    statistics = dense("statistics", statistics, (x.shape[0], 2, x.shape[1]), wide_weight.dtype, CPU)
    x_grad = torch.empty_like(x)
    parts = [wide_weight.new_empty(x.shape[:2]) for _ in range(2)]
    addresses = addresses_of(
        out_grad=out_grad, x=x, weight=wide_weight, bias=wide_bias, statistics=statistics, x_grad=x_grad,
        weight_parts=parts[0], bias_parts=parts[1],
    )  # fmt: skip
    _cpu.norm_backward(*head(x.dtype), _planes(x), slope, addresses)
    return x_grad, parts[0].sum(0).to(weight.dtype), parts[1].sum(0).to(bias.dtype)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """In the dtype that the kernels compute in."""
    wide = accumulation_dtype(x.dtype)
    return [dense(name, one.to(wide), x.shape[1:2], wide, CPU) for name, one in (("weight", weight), ("bias", bias))]


def _planes(x: Tensor) -> dict[str, int]:
    batch, channels, *spatial = x.shape
    return {"batch": batch, "channels": channels, "pixels": math.prod(spatial)}


def pool(x: Tensor) -> Tensor:
    """See :func:`grcsf_fast.ops.plain.pool`."""
    batch, channels, *spatial = x.shape
    x = dense("x", x, x.shape, x.dtype, CPU)
    out = x.new_empty((batch, channels, *(size // 2 for size in spatial)))
    _pool(x, out, None)
    return out


def pool_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.ops.plain.pool_with_mean`."""
    batch, channels, *spatial = x.shape
    x = dense("x", x, x.shape, x.dtype, CPU)
    largest, mean = (x.new_empty((batch, channels, *(size // 2 for size in spatial))) for _ in range(2))
    _pool(x, largest, mean)
    return largest, mean


def _pool(x: Tensor, out: Tensor, mean: Tensor | None) -> None:
    _cpu.pool_forward(*head(x.dtype), _pooled(x), addresses_of(x=x, out=out, mean=mean))


def pool_backward(largest_grad: Tensor, mean_grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x."""
    x = dense("x", x, x.shape, x.dtype, CPU)
    half = (*x.shape[:2], *(size // 2 for size in x.shape[2:]))
    grads = [
        dense(name, one, half, x.dtype, CPU) for name, one in (("largest_grad", largest_grad), ("mean_grad", mean_grad))
    ]
    x_grad = torch.empty_like(x)
    addresses = addresses_of(largest_grad=grads[0], mean_grad=grads[1], x=x, x_grad=x_grad)
    _cpu.pool_backward(*head(x.dtype), _pooled(x), addresses)
    return x_grad


def _pooled(x: Tensor) -> dict[str, int]:
    """Its sizes.

    Raises:
        ArgumentError: sizes that the kernels would not read to their end, or beyond.
    """
    batch, channels, *spatial = x.shape
    if len(spatial) not in (2, 3) or any(size % 2 for size in spatial):
        raise ArgumentError(f"x: expected (B,C,H,W) or (B,C,D,H,W) of even spatial axes, got {tuple(x.shape)}")
    return {"planes": batch * channels} | sizes_of(spatial)


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """See :func:`grcsf_fast.ops.plain.attend`."""
    batch, wanted, width = queries.shape
    tokens = keys.shape[1]
    if heads < 1 or width % heads or not tokens:
        raise ValueError(f"heads: expected a divisor of {width}, and one token or more, got {heads} and {tokens}")
    given = (("queries", queries, wanted), ("keys", keys, tokens), ("values", values, tokens))
    rows = [fitting(name, one, (batch, count, width), queries.dtype, CPU) for name, one, count in given]
    rows = [one if one.stride(2) == 1 else one.contiguous() for one in rows]
    out = queries.new_empty(queries.shape)
    sizes = {"batch": batch, "heads": heads, "width": width // heads, "wanted": wanted, "tokens": tokens}
    for name, one in zip(("query", "key", "value"), rows, strict=True):
        sizes[f"{name}_image"], sizes[f"{name}_row"] = one.stride()[:2]
    addresses = addresses_of(queries=rows[0], keys=rows[1], values=rows[2], out=out)
    _cpu.attention_forward(*head(queries.dtype), sizes, addresses)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`grcsf_fast.ops.plain.linear_gelu`; the product is PyTorch's."""
    product = F.linear(x, weight).contiguous()
    if not product.numel():
        return product
    columns = product.shape[-1]
    wide = accumulation_dtype(product.dtype)  # not that of x where autocast is on
    bias = dense("bias", bias.to(wide), (columns,), wide, CPU)
    sizes = {"rows": product.numel() // columns, "columns": columns}
    _cpu.bias_gelu_forward(*head(product.dtype), sizes, addresses_of(x=product, bias=bias))
    return product


def transform_filters(weight: Tensor, turned: bool = False) -> Tensor:
    """A convolution's weight (O, C, 3, 3) or (O, C, 3, 3, 3) as :func:`convolve` takes it; computed in float64.

    Args:
        weight: of any float dtype.
        turned: for the gradient of what went into the convolution, itself a convolution from O to C channels.

    Returns:
        (36, panels, inputs, channels of a panel), float64 for a float64 weight and float32 otherwise.

    Raises:
        ValueError: another number of axes or taps.

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", arXiv:1509.09308; the points are ours.
    """
    filters = empty_filters(weight, turned)
    weight = weight.to(filters.dtype)
    weight = dense("weight", weight, weight.shape, weight.dtype, CPU)
    out_channels, in_channels, *taps = weight.shape
    sizes = {"in_channels": in_channels, "out_channels": out_channels, "planar": len(taps) == 2, "turned": turned}
    _cpu.conv_filters(*head(weight.dtype), sizes, addresses_of(weight=weight, filters=filters))
    return filters


def empty_filters(weight: Tensor, turned: bool) -> Tensor:
    """What :func:`transform_filters` writes to; arguments and errors as there."""
    if tuple(weight.shape[2:]) not in ((3, 3), (3, 3, 3)):
        raise ValueError(f"weight: expected (O,C,3,3) or (O,C,3,3,3), got {tuple(weight.shape)}")
    out_channels, in_channels, *taps = weight.shape
    inputs, outputs = (out_channels, in_channels) if turned else (in_channels, out_channels)
    planes = 1 if len(taps) == 2 else 3
    return weight.new_empty(
        (36, -(-outputs // _cpu.conv_panel), planes * inputs, _cpu.conv_panel), dtype=accumulation_dtype(weight.dtype)
    )


def convolution_weight_grad(out_grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a convolution's weight (O, C, 3, 3) or (O, C, 3, 3, 3), in the dtype that kernels compute in.

    Args:
        out_grad: (B, O, \\*S), the gradient of the outputs.
        x: (B, C, \\*S), of the same dtype.
    """
    x = dense("x", x, x.shape, x.dtype, CPU)
    batch, channels, *spatial = x.shape
    out_channels = out_grad.shape[1]
    out_grad = dense("out_grad", out_grad, (batch, out_channels, *spatial), x.dtype, CPU)
    grad = x.new_empty((out_channels, channels, *(3 for _ in spatial)), dtype=accumulation_dtype(x.dtype))
    sizes = {"batch": batch, "in_channels": channels, "out_channels": out_channels} | sizes_of(spatial)
    _cpu.conv_weight_grad(*head(x.dtype), sizes, addresses_of(out_grad=out_grad, x=x, weight_grad=grad))
    return grad


def convolve(x: Tensor, filters: Tensor, bias: Tensor, more: Tensor | None = None) -> Tensor:
    """Convolution with three taps an axis and zeros around: (B, C, \\*S) to (B, O, \\*S) in the dtype of ``x``.

    Args:
        x: of the dtype of the weight, or half precision beside float32.
        filters: from :func:`transform_filters`.
        bias: (O,), of the filters' dtype.
        more: the last of the C channels, where ``x`` has not all of them; of its dtype.
    """
    x = dense("x", x, x.shape, x.dtype, CPU)
    batch, first, *spatial = x.shape
    channels = first
    if more is not None:
        channels += more.shape[1]
        more = dense("more", more, (batch, more.shape[1], *spatial), x.dtype, CPU)
    wide, panel = accumulation_dtype(x.dtype), _cpu.conv_panel
    inputs = channels if len(spatial) == 2 else 3 * channels
    filters = dense("filters", filters, (36, -(-bias.shape[0] // panel), inputs, panel), wide, CPU)
    bias = dense("bias", bias, bias.shape[:1], wide, CPU)
    out = x.new_empty((batch, bias.shape[0], *spatial))
    sizes = {"batch": batch, "in_channels": channels, "out_channels": bias.shape[0]} | sizes_of(spatial)
    sizes["first_channels"] = first
    _cpu.conv_forward(*head(x.dtype), sizes, addresses_of(x=x, more=more, weight=filters, bias=bias, out=out))
    return out


def upsample(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """Transposed convolution with two taps an axis and steps of two: (B, C, \\*S) to (B, O, \\*2S), dtype of ``x``.

    Args:
        x: of the dtype of the filters, or half precision beside float32.
        filters: (taps, O, C), the taps in C order.
        bias: (O,), of the filters' dtype.
    """
    x = dense("x", x, x.shape, x.dtype, CPU)
    batch, channels, *spatial = x.shape
    wide = accumulation_dtype(x.dtype)
    filters = dense("filters", filters, (2 ** len(spatial), bias.shape[0], channels), wide, CPU)
    bias = dense("bias", bias, bias.shape[:1], wide, CPU)
    out = x.new_empty((batch, bias.shape[0], *(2 * size for size in spatial)))
    sizes = {"batch": batch, "in_channels": channels, "out_channels": bias.shape[0]} | sizes_of(spatial)
    sizes["first_channels"] = channels
    _cpu.upsample_forward(*head(x.dtype), sizes, addresses_of(x=x, more=None, weight=filters, bias=bias, out=out))
    return out
