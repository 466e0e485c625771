"""The Triton kernels as functions of tensors. Triton is imported on first use."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import os
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference import AttentionWeights
from .dense import attention_shapes, dense, fitting, memory_format, side_by_side

__all__ = [
    "DTYPES", "device_problem", "gcu_backward", "gcu_forward", "interpreted", "norm_backward", "norm_forward",
    "pool_backward", "pool_forward", "pooled_format", "problem", "rcu_backward", "rcu_forward", "too_far", "unserved",
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of op 2: pixels of a patch, beyond which logits and probabilities do not fit into registers; residual channels, beyond
# which products have 64 rows (kernels/triton/patches.py); and numbers a pixel over all maps and heads, each a power of
# two, beyond which they do not fit into the shared memory of consumer cards.
MOST_TOKENS, MOST_RESIDUAL, MOST_NUMBERS = 64, 32, 128


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of the CPU: for tests, in a process of its own."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def problem() -> str | None:
    """Why the kernels cannot run here, or None."""
    try:
        version = importlib.import_module("triton").__version__
        loop = importlib.import_module("triton.language").range
    except ImportError as error:
        return f"triton cannot be imported ({error}); it comes with the CUDA and ROCm builds of torch"
    if "disable_licm" not in inspect.signature(loop.__init__).parameters:
        return f"triton {version} is too old: its loops have no disable_licm; a newer torch brings a newer one"
    if interpreted():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA and ROCm"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    problems = [device_problem(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]
    return "; ".join(problems) if all(problems) else None


@functools.cache
def device_problem(device: torch.device, op: str = "", dtype: torch.dtype | None = None) -> str | None:
    """Why the kernels, or those of an op for tensors of a dtype, cannot run on this GPU, which need not be the current
    one, or None."""
    if torch.version.hip is not None and op == "patch_cross_attention":
        # Without matrix units for the dtype its products are loops: right, but far slower than the reference.
        units = "gfx9(08|0a|4|5)" if dtype == torch.float32 else "gfx(9(08|0a|4|5)|1[12])"
        architecture = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        if re.match(units, architecture) is None:
            return f"{device} ({architecture}) has no matrix units for {str(dtype).removeprefix('torch.')}"
    if torch.version.cuda is None or (capability := torch.cuda.get_device_capability(device)) >= (8, 0):
        return None
    name = torch.cuda.get_device_name(device)
    return f"{device} ({name}) has compute capability {capability[0]}.{capability[1]}, 8.0 or later is needed"


def unserved(op: str, dims: int, sizes: Sequence[tuple[str, Any]]) -> str | None:
    """Why there are no kernels for these sizes (:mod:`grcsf_fast.ops.examples`), or None."""
    if op != "patch_cross_attention":
        return None
    given = dict(sizes)
    tokens, residual = given["patches of"] ** dims, given["residual channels"]
    if tokens > MOST_TOKENS:
        return f"its kernels take patches of at most {MOST_TOKENS} pixels, got {tokens}"
    if residual > MOST_RESIDUAL:
        return f"its kernels take at most {MOST_RESIDUAL} residual channels, got {residual}"
    numbers = _power_of_2(given["maps"] * given["heads"]) * max(16, _power_of_2(residual))
    if numbers > MOST_NUMBERS:
        return (
            f"its kernels take at most {MOST_NUMBERS} numbers a pixel, got {numbers} of {given['maps']} maps with "
            f"{given['heads']} heads and {residual} residual channels"
        )
    return None


def too_far(op: str, tensors: Sequence[Tensor], backward: bool) -> str | None:
    """Why an offset would not fit into the 32 bits in which the kernels multiply numbers that fit, or None.

    Args:
        op: its name in :mod:`grcsf_fast.ops.registered`.
        tensors: its arguments, of all scales.
        backward: whether gradients may be asked for.
    """
    offsets = []
    if op == "multiscale_compensation" and backward:
        # Three numbers of each pixel wait from one launch to the next, image after image.
        offsets = [3 * math.prod(one.shape[2:]) for one in tensors[: len(tensors) // 5] if one.shape[0] > 1]
    elif op == "patch_cross_attention":
        x, maps, position_bias = tensors[0], tensors[1:3], tensors[5]
        # From map to map of what is given, and of its gradients, which may be dense instead.
        steps = [step for one in maps for step in (one.stride(1), math.prod(one.shape[2:]))]
        offsets = [(maps[0].shape[1] - 1) * step for step in steps if step < 2**31]
        if backward:
            # Means of the channels of all patches, hidden units of the scorer, tokens between two launches.
            numbers = max(x.shape[1], tensors[8].shape[0], position_bias.shape[1])
            offsets.append(x.numel() // (x.shape[1] * position_bias.shape[1]) * numbers)
    if (worst := max(offsets, default=0)) < 2**31:
        return None
    return f"its kernels take offsets below 2^31 between images, maps and patches, got {worst}"


def _power_of_2(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()


def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"grcsf_fast.kernels.triton.{name}")


def _check_launch(name: str, tensor: Tensor) -> None:
    """Raises what would otherwise fail inside the compiler, or be misread: positions in an image are 32-bit numbers."""
    if tensor.is_cuda and (problem := device_problem(tensor.device)) is not None:
        raise RuntimeError(f'{name}: {problem}; use_backend("reference") runs there')
    if math.prod(tensor.shape[2:]) >= 2**31:
        raise ValueError(
            f"{name}: expected fewer than 2^31 pixels per image, got {tuple(tensor.shape)}; cut the volume into parts"
        )


def _launched(name: str, tensor: Tensor) -> Tensor:
    """The tensor whose device and sizes a launch has, as kernels read it."""
    _check_launch(name, tensor)
    return fitting(name, tensor, tensor.shape, tensor.dtype, tensor.device)


def gcu_forward(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float,
) -> list[tuple[Tensor, Tensor]]:
    """See :func:`grcsf_fast.reference.global_compensation`; all scales in one launch.

    Features and coarse features of any strides are read as they are; the compensated features have those of the
    features.
    """
    scales = _scales(features, coarse, feature_gates, coarse_gates, strengths)
    with torch.cuda.device_of(features[0]):
        return _kernels("gcu").forward(scales, eps)


def gcu_backward(
    compensated_grads: Sequence[Tensor],
    residual_grads: Sequence[Tensor],
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float,
    needed: Sequence[Sequence[bool]],
) -> list[tuple[Tensor | None, ...]]:
    """Gradients of the five tensors of each scale, None for those not needed."""
    scales = _scales(features, coarse, feature_gates, coarse_gates, strengths)
    grads = [
        (
            fitting("compensated_grad", out_grad, one.shape, one.dtype, one.device),
            fitting("residual_grad", residual_grad, (one.shape[0], 1, *one.shape[2:]), one.dtype, one.device),
        )
        for out_grad, residual_grad, one in zip(compensated_grads, residual_grads, features, strict=True)
    ]
    with torch.cuda.device_of(features[0]):
        return _kernels("gcu").backward(grads, scales, eps, needed)


def _scales(*tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The five of each scale, checked; gates and strengths, which are small, dense."""
    scales = []
    for one, low, feature_gate, coarse_gate, strength in zip(*tensors, strict=True):
        one = _launched("features", one)
        batch, channels, *spatial = one.shape
        low = fitting("coarse", low, (batch, channels, *(size // 2 for size in spatial)), one.dtype, one.device)
        feature_gate, coarse_gate = (
            dense(name, gate, (batch, channels), gate.dtype, one.device)
            for name, gate in (("feature_gate", feature_gate), ("coarse_gate", coarse_gate))
        )
        strength = dense("strength", strength, (channels,), strength.dtype, one.device)
        scales.append((one, low, feature_gate, coarse_gate, strength))
    return scales


def rcu_forward(
    x: Tensor, keys: Tensor, values: Tensor, weights: AttentionWeights, patch_size: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.reference.patch_cross_attention`.

    x, keys and values of any strides are read as they are; the output has those of x.
    """
    inputs = _attention(x, keys, values, weights, patch_size)
    with torch.cuda.device_of(x):
        return _kernels("rcu").forward(*inputs, patch_size, threshold)


def rcu_backward(
    out_grad: Tensor,
    score_grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: AttentionWeights,
    patch_size: int,
    threshold: float,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the twelve tensors, None for those not needed."""
    inputs = _attention(x, keys, values, weights, patch_size)
    scores = (x.shape[0], 1, *(size // patch_size for size in x.shape[2:]))
    out_grads = (
        fitting("out_grad", out_grad, x.shape, x.dtype, x.device),
        dense("score_grad", score_grad, scores, torch.float32, x.device),
    )
    # Its products beside the launches would be rounded where the caller's autocast is on.
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        grads = _kernels("rcu_backward").backward(*out_grads, *inputs, patch_size, threshold, needed)
    return tuple(
        None if grad is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, (x, keys, values, *weights), strict=True)
    )


def _attention(
    x: Tensor, keys: Tensor, values: Tensor, weights: AttentionWeights, patch_size: int
) -> tuple[Tensor, Tensor, Tensor, AttentionWeights]:
    """The tensors, checked; weights, which are small, dense."""
    x = _launched("x", x)
    batch, _, *spatial = x.shape
    maps, _, residual, _ = weights.query_weight.shape
    volume = (batch, maps, residual, *spatial)
    shapes = attention_shapes(x, weights, patch_size)
    return (
        x,
        fitting("keys", keys, volume, x.dtype, x.device),
        fitting("values", values, volume, x.dtype, x.device),
        AttentionWeights(
            *(
                dense(name, weight, shape, weight.dtype, x.device)
                for name, weight, shape in zip(AttentionWeights._fields, weights, shapes, strict=True)
            )
        ),
    )


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.functional.internal.normalize_activate`; and the statistics that the backward takes."""
    x = _launched("x", x)
    weight, bias = (dense(name, one, x.shape[1:2], one.dtype, x.device) for name, one in _named(weight, bias))
    with torch.cuda.device_of(x):
        return _kernels("norm").forward(side_by_side(x), weight, bias, eps, slope)


def norm_backward(
    out_grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    x = side_by_side(_launched("x", x))
    out_grad = fitting("out_grad", out_grad, x.shape, x.dtype, x.device)
    out_grad = out_grad if out_grad.stride() == x.stride() else torch.empty_like(x).copy_(out_grad)
    dense_weight, dense_bias = (
        dense(name, one, x.shape[1:2], one.dtype, x.device) for name, one in _named(weight, bias)
    )
    statistics = dense("statistics", statistics, (x.shape[0], 2, x.shape[1]), torch.float32, x.device)
    with torch.cuda.device_of(x):
        grads = _kernels("norm").backward(out_grad, x, dense_weight, dense_bias, statistics, slope)
    return grads[0], grads[1].to(weight.dtype), grads[2].to(bias.dtype)


def _named(weight: Tensor, bias: Tensor) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    return ("weight", weight), ("bias", bias)


def pool_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.functional.internal.pool_with_mean`; x of any strides, the outputs of its memory format."""
    x = _launched("x", x)
    with torch.cuda.device_of(x):
        return _kernels("pooling").forward(x, pooled_format(x))


def pooled_format(x: Tensor) -> torch.memory_format:
    """Of the outputs of pooling: that of x or, of a view with gaps, of what is as large and laid out in its order.

    The fake kernel asks too: what it says has to be what is made.
    """
    kept = memory_format(x) or memory_format(torch.empty_like(x, device="meta"))
    return kept or torch.contiguous_format


def pool_backward(largest_grad: Tensor, mean_grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, of its layout."""
    x = _launched("x", x)
    half = (*x.shape[:2], *(size // 2 for size in x.shape[2:]))
    largest_grad, mean_grad = (
        fitting(name, one, half, x.dtype, x.device)
        for name, one in (("largest_grad", largest_grad), ("mean_grad", mean_grad))
    )
    with torch.cuda.device_of(x):
        return _kernels("pooling").backward(largest_grad, mean_grad, x)
