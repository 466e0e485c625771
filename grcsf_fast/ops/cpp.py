"""The C++ kernels as functions of tensors: dense inputs, allocated outputs, one call into the compiled module."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import AttentionWeights
from ..runtime.dtypes import accumulation_dtype
from .dense import attention_shapes, dense

try:
    from ..kernels import _cpu
except ImportError as error:
    _cpu = None
    _import_error = str(error)

__all__ = [
    "DTYPES", "attend", "convolve", "gcu_backward", "gcu_forward", "instruction_sets", "linear_gelu", "norm_backward",
    "norm_forward", "normalize_activate", "pool", "pool_backward", "pool_forward", "problem", "rcu_backward",
    "rcu_forward", "transform_filters", "upsample",
]  # fmt: skip

ISA_VARIABLE = "GRCSF_CPU_ISA"
# In the order of the kernels' enumeration.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CPU = torch.device("cpu")


def problem() -> str | None:
    """Why the kernels cannot run here, or None."""
    if _cpu is None:
        return (
            f"the compiled kernels cannot be imported ({_import_error}); "
            "install the package again where there is a C++ compiler with OpenMP"
        )
    return None


def instruction_sets() -> list[str]:
    """Those the kernels were compiled for and this processor has, the best last."""
    return _cpu.instruction_sets()


def _instruction_set() -> int:
    """Number of the best instruction set, or of the one that ``$GRCSF_CPU_ISA`` names.

    Raises:
        ValueError: a name that there is not, or of a set that this processor lacks.
    """
    known = instruction_sets()
    name = os.environ.get(ISA_VARIABLE, known[-1])
    if name not in known:
        raise ValueError(
            f"environment variable {ISA_VARIABLE}: expected one of {known} on this processor, got {name!r}"
        )
    return known.index(name)


def _threads() -> int:
    """PyTorch's number; 1 in a process that was forked.

    GNU's OpenMP hangs there on more than one thread once its threads have run in the parent. So do PyTorch's own
    operations, which ``torch.set_num_threads(1)`` in the child helps (the workers of a DataLoader call it), or the
    start method "spawn".
    """
    return 1 if _forked else torch.get_num_threads()


def _note_fork() -> None:
    global _forked
    _forked = True


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _head(dtype: torch.dtype) -> tuple[int, int, int]:
    """What every call of a kernel begins with."""
    return _instruction_set(), DTYPES.index(dtype), _threads()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(**tensors: Tensor | None) -> dict[str, int]:
    """By the names of the kernel's structure. The caller keeps the tensors until the kernel is done: an address does
    not."""
    return {name: _address(tensor) for name, tensor in tensors.items()}


def _sizes(spatial: Sequence[int]) -> dict[str, int]:
    """An image of two axes has depth 1 and is planar."""
    depth, height, width = (1, *spatial) if len(spatial) == 2 else spatial
    return {"depth": depth, "height": height, "width": width, "planar": int(len(spatial) == 2)}


def _sum_parts(parts: Tensor, shape: Sequence[int]) -> Tensor:
    """(units, ..., padded) -> shape: summed in order, so that the threads do not matter, and unpadded."""
    total = parts.new_empty(parts.shape[1:])
    _cpu.sum_parts(parts.dtype == torch.float64, parts.shape[0], total.numel(), _address(parts), _address(total))
    return total[tuple(slice(0, size) for size in shape)]


def _by_image(parts: Tensor, batch: int, units: int) -> Tensor:
    """(batch * units, N) -> (units, batch, N): what is summed image by image."""
    return parts.reshape(batch, units, parts.shape[-1]).transpose(0, 1).contiguous()


def gcu_forward(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float,
) -> list[tuple[Tensor, Tensor]]:
    """See :func:`grcsf_fast.reference.global_compensation`; a call a scale, which costs microseconds."""
    pairs = []
    for tensors in zip(features, coarse, feature_gates, coarse_gates, strengths, strict=True):
        call = _Gcu(*tensors)
        compensated = torch.empty_like(call.features)
        residual = call.features.new_empty((call.features.shape[0], 1, *call.features.shape[2:]))
        _cpu.gcu_forward(*call.head(), eps, call.inputs | _addresses(compensated=compensated, residual=residual))
        pairs.append((compensated, residual))
    return pairs


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
    out_grads = zip(compensated_grads, residual_grads, strict=True)
    tensors = zip(features, coarse, feature_gates, coarse_gates, strengths, strict=True)
    return [
        _gcu_backward(*grads, *five, eps, wanted)
        for grads, five, wanted in zip(out_grads, tensors, needed, strict=True)
    ]


def _gcu_backward(
    compensated_grad: Tensor,
    residual_grad: Tensor,
    features: Tensor,
    coarse: Tensor,
    feature_gate: Tensor,
    coarse_gate: Tensor,
    strength: Tensor,
    eps: float,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    call = _Gcu(features, coarse, feature_gate, coarse_gate, strength)
    batch, channels, *spatial = features.shape
    compensated_grad = dense("compensated_grad", compensated_grad, features.shape, features.dtype, CPU)
    residual_grad = dense("residual_grad", residual_grad, (batch, 1, *spatial), features.dtype, CPU)
    units = _cpu.gcu_units(call.sizes)
    parts = [
        torch.empty(batch * units, channels, dtype=call.wide, device="cpu") if wanted else None for wanted in needed[2:]
    ]
    grads = [
        torch.empty_like(tensor) if wanted else None
        for tensor, wanted in zip((call.features, call.coarse), needed[:2], strict=True)
    ]
    outputs = _addresses(
        compensated_grad=compensated_grad, residual_grad=residual_grad, features_grad=grads[0], coarse_grad=grads[1],
        feature_gate_parts=parts[0], coarse_gate_parts=parts[1], strength_parts=parts[2],
    )  # fmt: skip
    _cpu.gcu_backward(*call.head(), eps, call.inputs | outputs)
    gates = [
        None if part is None else _sum_parts(_by_image(part, batch, units), gate.shape).to(gate.dtype)
        for part, gate in zip(parts[:2], (feature_gate, coarse_gate), strict=True)
    ]
    strength_grad = None if parts[2] is None else _sum_parts(parts[2], strength.shape).to(strength.dtype)
    return (*grads, *gates, strength_grad)


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
    addresses = _addresses(x=x, weight=weight, bias=bias, out=out, statistics=statistics)
    _cpu.norm_forward(*_head(x.dtype), _planes(x), eps, slope, addresses)
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
    addresses = _addresses(
        out_grad=out_grad, x=x, weight=wide_weight, bias=wide_bias, statistics=statistics, x_grad=x_grad,
        weight_parts=parts[0], bias_parts=parts[1],
    )  # fmt: skip
    _cpu.norm_backward(*_head(x.dtype), _planes(x), slope, addresses)
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
    _cpu.pool_forward(*_head(x.dtype), _pooled(x), _addresses(x=x, out=out, mean=mean))


def pool_backward(largest_grad: Tensor, mean_grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x."""
    x = dense("x", x, x.shape, x.dtype, CPU)
    half = (*x.shape[:2], *(size // 2 for size in x.shape[2:]))
    grads = [
        dense(name, one, half, x.dtype, CPU) for name, one in (("largest_grad", largest_grad), ("mean_grad", mean_grad))
    ]
    x_grad = torch.empty_like(x)
    addresses = _addresses(largest_grad=grads[0], mean_grad=grads[1], x=x, x_grad=x_grad)
    _cpu.pool_backward(*_head(x.dtype), _pooled(x), addresses)
    return x_grad


def _pooled(x: Tensor) -> dict[str, int]:
    batch, channels, *spatial = x.shape
    return {"planes": batch * channels} | _sizes(spatial)


class _Call:
    """What every call begins with; subclasses hold the dense inputs, whose addresses are in ``inputs``."""

    dtype: torch.dtype
    sizes: dict[str, int]
    inputs: dict[str, int]

    def head(self) -> tuple[int, int, int, dict[str, int]]:
        return *_head(self.dtype), self.sizes


class _Gcu(_Call):
    def __init__(
        self, features: Tensor, coarse: Tensor, feature_gate: Tensor, coarse_gate: Tensor, strength: Tensor
    ) -> None:
        batch, channels, *spatial = features.shape
        self.dtype = features.dtype
        self.wide = accumulation_dtype(features.dtype)
        half = [size // 2 for size in spatial]
        self.features = dense("features", features, features.shape, self.dtype, CPU)
        self.coarse = dense("coarse", coarse, (batch, channels, *half), self.dtype, CPU)
        self.gates = [
            dense(name, gate.to(self.wide), (batch, channels), self.wide, CPU)
            for name, gate in (("feature_gate", feature_gate), ("coarse_gate", coarse_gate))
        ]
        self.strength = dense("strength", strength.to(self.wide), (channels,), self.wide, CPU)
        self.sizes = {"batch": batch, "channels": channels} | _sizes(spatial)
        self.inputs = _addresses(
            features=self.features, coarse=self.coarse, feature_gate=self.gates[0], coarse_gate=self.gates[1],
            strength=self.strength,
        )  # fmt: skip


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """See :func:`grcsf_fast.ops.plain.attend`."""
    batch, wanted, width = queries.shape
    rows = [one if one.stride(2) == 1 else one.contiguous() for one in (queries, keys, values)]
    out = queries.new_empty(queries.shape)
    sizes = {"batch": batch, "heads": heads, "width": width // heads, "wanted": wanted, "tokens": keys.shape[1]}
    for name, one in zip(("query", "key", "value"), rows, strict=True):
        sizes[f"{name}_image"], sizes[f"{name}_row"] = one.stride()[:2]
    addresses = _addresses(queries=rows[0], keys=rows[1], values=rows[2], out=out)
    _cpu.attention_forward(*_head(queries.dtype), sizes, addresses)
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
    _cpu.bias_gelu_forward(*_head(product.dtype), sizes, _addresses(x=product, bias=bias))
    return product


def transform_filters(weight: Tensor, turned: bool = False) -> Tensor:
    """A convolution's weight (O, C, 3, 3) or (O, C, 3, 3, 3) as :func:`convolve` takes it; computed in float64.

    Args:
        weight: of any float dtype.
        turned: for the gradient of what went into the convolution, itself a convolution from O to C channels.

    Returns:
        (36, panels, inputs, channels of a panel), float64 for a float64 weight and float32 otherwise.

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", arXiv:1509.09308; the points are ours.
    """
    weight = weight.to(accumulation_dtype(weight.dtype))
    weight = dense("weight", weight, weight.shape, weight.dtype, CPU)
    out_channels, in_channels, *taps = weight.shape
    inputs, outputs = (out_channels, in_channels) if turned else (in_channels, out_channels)
    planes = 1 if len(taps) == 2 else 3
    filters = weight.new_empty((36, -(-outputs // _cpu.conv_panel), planes * inputs, _cpu.conv_panel))
    sizes = {"in_channels": in_channels, "out_channels": out_channels, "planar": planes == 1, "turned": turned}
    _cpu.conv_filters(*_head(weight.dtype), sizes, _addresses(weight=weight, filters=filters))
    return filters


def convolve(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """Convolution with three taps an axis and zeros around: (B, C, \\*S) to (B, O, \\*S) in the dtype of ``x``.

    Args:
        x: of the dtype of the weight, or half precision beside float32.
        filters: from :func:`transform_filters`.
        bias: (O,), of the filters' dtype.
    """
    x = dense("x", x, x.shape, x.dtype, CPU)
    batch, channels, *spatial = x.shape
    out = x.new_empty((batch, bias.shape[0], *spatial))
    sizes = {"batch": batch, "in_channels": channels, "out_channels": bias.shape[0]} | _sizes(spatial)
    _cpu.conv_forward(*_head(x.dtype), sizes, _addresses(x=x, weight=filters, bias=bias, out=out))
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
    out = x.new_empty((batch, bias.shape[0], *(2 * size for size in spatial)))
    sizes = {"batch": batch, "in_channels": channels, "out_channels": bias.shape[0]} | _sizes(spatial)
    _cpu.upsample_forward(*_head(x.dtype), sizes, _addresses(x=x, weight=filters, bias=bias, out=out))
    return out


def rcu_forward(
    x: Tensor, keys: Tensor, values: Tensor, weights: AttentionWeights, patch_size: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.reference.patch_cross_attention`."""
    call = _Rcu(x, keys, values, weights, patch_size)
    out = torch.empty_like(call.tensors[0])
    score = torch.empty(call.score_shape, dtype=call.wide, device="cpu")
    _cpu.rcu_forward(*call.head(), threshold, call.inputs | _addresses(out=out, score=score))
    return out, score


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
    """Gradients of x, keys, values and the weights, None for those not needed."""
    call = _Rcu(x, keys, values, weights, patch_size)
    batch, channels = x.shape[:2]
    maps, heads, residual, _ = weights.query_weight.shape
    units = _cpu.rcu_units(call.sizes)
    out_grad = dense("out_grad", out_grad, x.shape, x.dtype, CPU)
    score_grad = dense("score_grad", score_grad.to(call.wide), call.score_shape, call.wide, CPU)
    grads = [
        torch.empty_like(tensor) if wanted else None for tensor, wanted in zip(call.tensors, needed[:3], strict=True)
    ]
    # As the kernel sums them; the last axis comes padded.
    shapes = attention_shapes(x, weights, patch_size)._replace(
        query_weight=(maps * heads * residual, channels),
        query_bias=(maps * heads * residual,),
        output_weight=(channels, maps * heads * residual),
        score_context=weights.score_vector.shape,
        score_bias=(1,),
    )
    padded = {name: _padded(shape[-1]) for name, shape in shapes._asdict().items()}
    padded["position_bias"] = _cpu.rcu_padded_tokens(weights.position_bias.shape[1])
    parts = {
        name: torch.zeros(batch * units, *shape[:-1], padded[name], dtype=call.wide, device="cpu")
        for (name, shape), wanted in zip(shapes._asdict().items(), needed[3:], strict=True)
        if wanted
    }
    outputs = _addresses(
        out_grad=out_grad, score_grad=score_grad, x_grad=grads[0], keys_grad=grads[1], values_grad=grads[2],
        **{f"{name}_parts": parts.get(name) for name in AttentionWeights._fields},
    )  # fmt: skip
    _cpu.rcu_backward(*call.head(), threshold, call.inputs | outputs)
    if "score_context" in parts:
        # The context has a row per image.
        parts["score_context"] = _by_image(parts["score_context"], batch, units)
        shapes = shapes._replace(score_context=weights.score_context.shape)
    sums = {name: _sum_parts(part, getattr(shapes, name)) for name, part in parts.items()}
    for name in ("query_weight", "query_bias"):
        if name in sums:
            sums[name] = sums[name] * residual**-0.5
    if "position_bias" in sums:
        sums["position_bias"] = sums["position_bias"].transpose(1, 2)
    if "output_weight" in sums:
        sums["output_weight"] = sums["output_weight"].reshape(channels, maps, heads, residual).permute(1, 2, 0, 3)
    finished = [
        sums[name].reshape(weight.shape).to(weight.dtype).contiguous() if name in sums else None
        for name, weight in weights._asdict().items()
    ]
    return (*grads, *finished)


def _padded(count: int) -> int:
    return -(-count // 16) * 16


class _Rcu(_Call):
    def __init__(self, x: Tensor, keys: Tensor, values: Tensor, weights: AttentionWeights, patch_size: int) -> None:
        batch, channels, *spatial = x.shape
        maps, heads, residual, _ = weights.query_weight.shape
        tokens = patch_size ** len(spatial)
        self.dtype = x.dtype
        self.wide = accumulation_dtype(x.dtype)
        volume = (batch, maps, residual, *spatial)
        self.tensors = [
            dense(name, tensor, shape, self.dtype, CPU)
            for name, tensor, shape in (("x", x, x.shape), ("keys", keys, volume), ("values", values, volume))
        ]
        wide = AttentionWeights(*(weight.to(self.wide) for weight in weights))
        padded = _cpu.rcu_padded_tokens(tokens)
        wide = wide._replace(
            query_weight=wide.query_weight * residual**-0.5,
            query_bias=wide.query_bias * residual**-0.5,
            position_bias=F.pad(wide.position_bias.transpose(1, 2), (0, padded - tokens)),
            output_weight=wide.output_weight.permute(2, 0, 1, 3),
        )
        shapes = attention_shapes(x, weights, patch_size)._replace(
            position_bias=(heads, tokens, padded), output_weight=(channels, maps, heads, residual)
        )
        self.weights = AttentionWeights(
            *(
                dense(name, weight, shape, self.wide, CPU)
                for name, weight, shape in zip(AttentionWeights._fields, wide, shapes, strict=True)
            )
        )
        self.score_shape = (batch, 1, *(size // patch_size for size in spatial))
        self.sizes = {
            "batch": batch, "channels": channels, "maps": maps, "residual": residual, "heads": heads,
            "width_of_scorer": weights.score_weight.shape[0], "patch": patch_size,
        } | _sizes(spatial)  # fmt: skip
        x, keys, values = self.tensors
        self.inputs = _addresses(x=x, keys=keys, values=values, **self.weights._asdict())
