"""The C++ kernels as functions of tensors: dense inputs, allocated outputs, one call into the compiled module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import AttentionWeights
from ..runtime.dtypes import accumulation_dtype
from .compiled import CPU, DTYPES, _cpu, address, addresses_of, description, head, instruction_sets, problem, sizes_of
from .cpp_stages import (
    attend,
    convolution_weight_grad,
    convolve,
    empty_filters,
    linear_gelu,
    norm_backward,
    norm_forward,
    normalize_activate,
    pool,
    pool_backward,
    pool_forward,
    transform_filters,
    upsample,
)
from .dense import attention_shapes, dense, fitting

__all__ = [
    "DTYPES", "attend", "convolution_weight_grad", "convolve", "description", "empty_filters", "gcu_backward",
    "gcu_forward", "instruction_sets", "linear_gelu", "norm_backward", "norm_forward", "normalize_activate",
    "pool", "pool_backward", "pool_forward", "problem", "rcu_backward", "rcu_forward", "transform_filters", "upsample",
]  # fmt: skip

REARRANGED = AttentionWeights._fields[:4]  # weights that the kernels want in another form


def _sum_parts(parts: Tensor, shape: Sequence[int]) -> Tensor:
    """(units, ..., padded) -> shape: summed in order, so that the threads do not matter, and unpadded."""
    total = parts.new_empty(parts.shape[1:])
    _cpu.sum_parts(parts.dtype == torch.float64, parts.shape[0], total.numel(), address(parts), address(total))
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
        _cpu.gcu_forward(*call.head(), eps, call.inputs | addresses_of(compensated=compensated, residual=residual))
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
    outputs = addresses_of(
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


class _Call:
    """What every call begins with; subclasses hold the dense inputs, whose addresses are in ``inputs``."""

    dtype: torch.dtype
    sizes: dict[str, int]
    inputs: dict[str, int]

    def head(self) -> tuple[int, int, int, dict[str, int]]:
        return *head(self.dtype), self.sizes


class _Gcu(_Call):
    def __init__(
        self, features: Tensor, coarse: Tensor, feature_gate: Tensor, coarse_gate: Tensor, strength: Tensor
    ) -> None:
        batch, channels, *spatial = features.shape
        if not channels or any(size % 2 or not size for size in spatial):
            raise ValueError(f"features: expected a channel and even spatial axes, got {tuple(features.shape)}")
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
        self.sizes = {"batch": batch, "channels": channels} | sizes_of(spatial)
        self.inputs = addresses_of(
            features=self.features, coarse=self.coarse, feature_gate=self.gates[0], coarse_gate=self.gates[1],
            strength=self.strength,
        )  # fmt: skip


def rcu_forward(
    x: Tensor, keys: Tensor, values: Tensor, weights: AttentionWeights, patch_size: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.reference.patch_cross_attention`."""
    call = _Rcu(x, keys, values, weights, patch_size)
    out = torch.empty_like(call.tensors[0])
    score = torch.empty(call.score_shape, dtype=call.wide, device="cpu")
    _cpu.rcu_forward(*call.head(), threshold, call.inputs | addresses_of(out=out, score=score))
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
        tensor.new_empty(tensor.shape) if wanted else None
        for tensor, wanted in zip(call.tensors, needed[:3], strict=True)
    ]
    # As the kernel sums them; the last axis comes padded.
    shapes = attention_shapes(x, weights, patch_size)._replace(
        query_weight=(maps * heads * residual, channels),
        query_bias=(maps * heads * residual,),
        output_weight=(channels, maps * heads * residual),
        score_context=weights.score_vector.shape,
        score_bias=(1,),
    )
    padded = {name: _cpu.padded(shape[-1]) for name, shape in shapes._asdict().items()}
    padded["position_bias"] = _cpu.rcu_padded_tokens(weights.position_bias.shape[1])
    parts = {
        name: torch.zeros(batch * units, *shape[:-1], padded[name], dtype=call.wide, device="cpu")
        for (name, shape), wanted in zip(shapes._asdict().items(), needed[3:], strict=True)
        if wanted
    }
    outputs = addresses_of(
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


def _map_by_map(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of equal strides, each map of an image in C order: as they are where they are so, as halves of one tensor are."""
    if keys.numel() and keys.stride() == values.stride() and keys[0, 0].is_contiguous():
        return keys, values
    return keys.contiguous(), values.contiguous()


class _Rcu(_Call):
    def __init__(self, x: Tensor, keys: Tensor, values: Tensor, weights: AttentionWeights, patch_size: int) -> None:
        batch, channels, *spatial = x.shape
        maps, heads, residual, _ = weights.query_weight.shape
        if patch_size < 1 or any(size % patch_size or not size for size in spatial):
            raise ValueError(f"patch_size: expected a divisor of every axis of {tuple(spatial)}, got {patch_size}")
        if not all(weights.query_weight.shape):
            raise ValueError(f"query_weight: expected no axis of 0, got {tuple(weights.query_weight.shape)}")
        tokens = patch_size ** len(spatial)
        self.dtype = x.dtype
        self.wide = accumulation_dtype(x.dtype)
        volume = (batch, maps, residual, *spatial)
        keys, values = (
            fitting(name, one, volume, self.dtype, CPU) for name, one in (("keys", keys), ("values", values))
        )
        for name, one in (("keys", keys), ("values", values), *zip(REARRANGED, weights, strict=False)):
            address(one, name)  # PyTorch's operations on one whose memory was freed may crash
        self.tensors = [dense("x", x, x.shape, self.dtype, CPU), *_map_by_map(keys, values)]
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
        } | sizes_of(spatial)  # fmt: skip
        x, keys, values = self.tensors
        self.sizes |= {"image_step": keys.stride(0), "map_step": keys.stride(1)}
        self.inputs = addresses_of(x=x, keys=keys, values=values, **self.weights._asdict())
