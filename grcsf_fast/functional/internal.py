"""What the networks do between the two ops; no promise to users.

There are C++ kernels for them, which serve on the CPU where the backend in force is the C++ one. Those of norm, of
pooling with the mean and of :func:`convolution` have a backward, as the Triton kernels of the first two for GPUs have;
the others serve where no gradients are wanted. Everywhere else PyTorch's own operations serve.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..ops import cpp, plain, registered, stages
from ..ops.backends import (
    BackendUnavailableError,
    kernels_for_inference,
    kernels_with_gradients,
    select_backend,
    stage_implementation,
)
from ..ops.plain import mean_pool
from ..runtime.dtypes import accumulation_dtype
from .checks import check_float, check_like, check_not_empty, check_same_dtype, check_shape, spatial_dims

__all__ = [
    "FEWEST_CHANNELS",
    "attend",
    "convolution",
    "convolve",
    "kernels_for_inference",
    "linear_gelu",
    "mean_pool",
    "normalize_activate",
    "pool",
    "pool_with_mean",
    "require_kernels",
    "transform_filters",
    "upsample",
]


# Of a convolution: fewer channels, and transforming the images costs more than it saves; fewer pixels, in all or a
# channel, and transforming the weight does.
FEWEST_CHANNELS = 8
FEWEST_PIXELS = 512
FEWEST_PIXELS_A_CHANNEL = 2


def normalize_activate(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, slope: float = 0.01) -> Tensor:
    """Instance normalisation and leaky ReLU in one step.

    Args:
        x: (B, C, \\*S), S of 2 or 3 axes and more than one pixel.
        weight: (C,), scale of each channel.
        bias: (C,), shift of each channel.
        eps: added to the variance.
        slope: of the activation below 0.

    Returns:
        (B, C, \\*S) in the dtype of ``x``.

    Raises:
        ArgumentTypeError: a tensor that is not floating-point.
        ArgumentError: a shape or device that does not fit.

    Source: the backbone is our decision.
    """
    spatial_dims("x", x)
    check_not_empty("x", x)
    for name, one in (("weight", weight), ("bias", bias)):
        check_like(name, one, "x", x)
        check_shape(name, one, (x.shape[1],), "(C,)")
    if x.numel() == x.shape[0] * x.shape[1] > 0:
        raise ArgumentError(f"x: expected more than one pixel a channel, got {tuple(x.shape)}")
    return stage_implementation("normalize_activate", (x, weight, bias))(x, weight, bias, eps, slope)


def pool(x: Tensor) -> Tensor:
    """The largest of each 2 x 2 (x 2) pixels.

    Args:
        x: (B, C, \\*S), S of 2 or 3 axes, each even.

    Returns:
        (B, C, \\*S/2) in the dtype of ``x``; NaN where one of the pixels is.

    Raises:
        ArgumentTypeError: ``x`` is not floating-point.
        ArgumentError: another number of axes, or an odd one.
    """
    _check_even(x)
    return stage_implementation("pool", (x,))(x)


def pool_with_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest and the mean of each 2 x 2 (x 2) pixels, read once; arguments and errors as of :func:`pool`.

    Returns:
        ``(largest, mean)``, (B, C, \\*S/2) each.
    """
    _check_even(x)
    return stage_implementation("pool_with_mean", (x,))(x)


def _check_even(x: Tensor) -> None:
    spatial_dims("x", x)
    check_not_empty("x", x)
    if any(size % 2 for size in x.shape[2:]):
        raise ArgumentError(f"x: expected even spatial axes, got {tuple(x.shape)}")


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Attention of several heads, their channels side by side.

    Args:
        queries: (B, W, D).
        keys: (B, N, D), dtype of the queries.
        values: (B, N, D), dtype of the queries.
        heads: divides D.

    Returns:
        (B, W, D) in the dtype of :func:`torch.nn.functional.scaled_dot_product_attention`: for each head,
        ``softmax(queries keys^T / sqrt(D / heads)) values``.

    Raises:
        ArgumentTypeError: tensors that are not floating-point or of several dtypes.
        ArgumentError: a shape, a device or a number of heads that does not fit.
    """
    check_float("queries", queries)
    if queries.dim() != 3:
        raise ArgumentError(f"queries: expected (B,W,D), got {queries.dim()} axes {tuple(queries.shape)}")
    batch, _, width = queries.shape
    for name, one in (("keys", keys), ("values", values)):
        check_like(name, one, "queries", queries)
        check_same_dtype(name, one, "queries", queries)
        check_shape(name, one, (batch, *keys.shape[1:2], width), "(B,N,D)")
    if heads < 1 or width % heads or not keys.shape[1]:
        raise ArgumentError(f"heads: expected a divisor of D = {width}, and one token or more, got {heads}")
    return stage_implementation("attend", (queries, keys, values))(queries, keys, values, heads)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer and the exact GELU behind it.

    Args:
        x: (..., D).
        weight: (H, D).
        bias: (H,).

    Returns:
        (..., H) in the dtype of :func:`torch.nn.functional.linear`.

    Raises:
        ArgumentTypeError: a tensor that is not floating-point.
        ArgumentError: a shape or device that does not fit.
    """
    check_float("x", x)
    if not x.dim():
        raise ArgumentError("x: expected (...,D), got a scalar")
    check_like("weight", weight, "x", x)
    check_shape("weight", weight, (*weight.shape[:1], x.shape[-1]), "(H,D)")
    check_like("bias", bias, "x", x)
    check_shape("bias", bias, tuple(weight.shape[:1]), "(H,)")
    return stage_implementation("linear_gelu", (x, weight, bias))(x, weight, bias)


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution with three taps per axis and zeros around, with gradients.

    In float32 on the CPU the kernel that needs a quarter of the multiplications serves where there are pixels enough to
    make up for transforming the weight, which each call does anew. Not in bfloat16: of images in batches of 8 PyTorch's
    kernels took two thirds of its time (python -m benchmarks.layers). Its errors are those of :func:`convolve`.

    Args:
        x: (B, C, \\*S).
        weight: (O, C, 3, 3) or (O, C, 3, 3, 3).
        bias: (O,).

    Returns:
        (B, O, \\*S).

    Raises:
        ArgumentError: a weight of another number of axes or taps.
    """
    if tuple(weight.shape[2:]) != (3,) * (x.dim() - 2):
        letters = "(O,C,3,3)" if x.dim() == 4 else "(O,C,3,3,3)"
        raise ArgumentError(f"weight: expected {letters}, got {tuple(weight.shape)}")
    pays = (
        kernels_with_gradients((x, weight, bias))  # first: sizes are symbols while something is compiled
        and x.dtype == weight.dtype == bias.dtype == torch.float32
        and x.is_contiguous()
        # Else PyTorch says what it expected.
        and x.shape[1] == weight.shape[1]
        and bias.shape == weight.shape[:1]
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and x.numel() >= max(FEWEST_PIXELS, FEWEST_PIXELS_A_CHANNEL * max(weight.shape[:2])) * x.shape[1]
    )
    return (stages if pays else plain).convolution(x, weight, bias)


def transform_filters(weight: Tensor) -> Tensor:
    """A convolution's weight as :func:`convolve` takes it; without gradients.

    Args:
        weight: (O, C, 3, 3) or (O, C, 3, 3, 3), of any float dtype, on the CPU.

    Returns:
        (36, panels, inputs, channels of a panel), float64 for a float64 weight and float32 otherwise.

    Raises:
        ValueError: another number of axes or taps.
    """
    return registered.transform_filters(weight)


def convolve(x: Tensor, filters: Tensor, bias: Tensor, more: Tensor | None = None) -> Tensor:
    """A convolution with three taps per axis and zeros around, by transformed filters; without gradients.

    Outputs come from tiles of 4 x 4, each from 6 x 6 pixels: errors are proportional to the largest magnitude among
    those, and a NaN or an infinity there spoils the tile.

    Args:
        x: (B, C, \\*S), on the CPU; of the filters' dtype, or half precision beside float32.
        filters: from :func:`transform_filters`.
        bias: (O,), of the filters' dtype.
        more: the last of the C channels, where ``x`` has not all of them; of its dtype.

    Returns:
        (B, O, \\*S) in the dtype of ``x``.

    Raises:
        RuntimeError: the C++ kernels do not serve ``x``, or gradients are wanted.
    """
    _check_served(x, filters)
    return registered.convolve(x, filters, bias, more)


def upsample(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """A transposed convolution that doubles every axis, with two taps per axis; without gradients.

    Args:
        x: (B, C, \\*S), on the CPU; of the filters' dtype, or half precision beside float32.
        filters: (taps, O, C), the taps in C order.
        bias: (O,), of the filters' dtype.

    Returns:
        (B, O, \\*2S) in the dtype of ``x``.

    Raises:
        RuntimeError: the C++ kernels do not serve ``x``, or gradients are wanted.
    """
    _check_served(x, filters)
    return registered.upsample(x, filters, bias)


def require_kernels(weights: Iterable[Tensor]) -> None:
    """See that the C++ kernels can serve a network of these weights.

    Raises:
        BackendUnavailableError: they are not built.
        ArgumentError: weights elsewhere than on the CPU.
    """
    if (reason := cpp.problem()) is not None:
        raise BackendUnavailableError(f"fused: {reason}")
    devices = {weight.device for weight in weights}
    if any(device.type != "cpu" for device in devices):
        raise ArgumentError(f"fused: expected a network on the CPU, got one on {', '.join(map(str, devices))}")


def _check_served(x: Tensor, filters: Tensor) -> None:
    if x.device.type != "cpu" or select_backend(x) != "cpp" or accumulation_dtype(x.dtype) != filters.dtype:
        raise RuntimeError(
            f"a network optimized for inference runs on the C++ kernels, made for {filters.dtype}; "
            f"got {x.dtype} on {x.device}, backend {select_backend(x)!r}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("a network optimized for inference has no gradients; use the network it was made from")
