"""The C++ kernels as functions of tensors: dense inputs, allocated outputs, one call into ``grcsf_fast.kernels._cpu``."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import accumulation_dtype

try:
    from ..kernels import _cpu
except ImportError as error:
    _cpu = None
    _import_error = str(error)

__all__ = ["DTYPES", "gcu_backward", "gcu_forward", "instruction_sets", "problem", "rcu_backward", "rcu_forward"]

ISA_VARIABLE = "GRCSF_CPU_ISA"
# In the order of the kernels' enumeration.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


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
        raise ValueError(f"environment variable {ISA_VARIABLE}: expected one of {known} on this processor, got {name!r}")
    return known.index(name)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """The caller keeps the tensors until the kernel is done: an address does not."""
    return [_address(tensor) for tensor in tensors]


def _sizes(spatial: Sequence[int]) -> tuple[int, int, int]:
    """(depth, height, width); an image of two axes has depth 1."""
    return (1, *spatial) if len(spatial) == 2 else tuple(spatial)


def _sum_parts(parts: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """(units, ..., padded) -> shape: summed in order, so that the threads do not matter, and unpadded."""
    if parts is None:
        return None
    total = torch.empty(parts.shape[1:], dtype=parts.dtype)
    _cpu.sum_parts(parts.dtype == torch.float64, parts.shape[0], total.numel(), _address(parts), _address(total))
    return total[tuple(slice(0, size) for size in shape)]


def gcu_forward(
    features: Tensor, coarse: Tensor, feature_gate: Tensor, coarse_gate: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.reference.global_compensation`."""
    call = _Gcu(features, coarse, feature_gate, coarse_gate)
    compensated = torch.empty_like(call.features)
    residual = features.new_empty(features.shape[0], 1, *features.shape[2:])
    _cpu.gcu_forward(
        _instruction_set(), call.dtype, call.sizes, eps, call.inputs + _addresses((compensated, residual))
    )
    return compensated, residual


def gcu_backward(
    compensated_grad: Tensor,
    residual_grad: Tensor,
    features: Tensor,
    coarse: Tensor,
    feature_gate: Tensor,
    coarse_gate: Tensor,
    eps: float,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the four tensors, None for those not needed."""
    call = _Gcu(features, coarse, feature_gate, coarse_gate)
    out_grads = (compensated_grad.contiguous(), residual_grad.contiguous())
    parts = (_cpu.gcu_units(call.sizes), features.shape[1])
    grads = [
        torch.empty_like(call.features) if needed[0] else None,
        torch.empty_like(call.coarse) if needed[1] else None,
        *(torch.empty(parts, dtype=call.wide) if wanted else None for wanted in needed[2:]),
    ]
    _cpu.gcu_backward(_instruction_set(), call.dtype, call.sizes, eps, call.inputs + _addresses((*out_grads, *grads)))
    for index, gate in ((2, feature_gate), (3, coarse_gate)):
        if grads[index] is not None:
            # (B * units, C) -> (B, C), image by image: units lie first.
            per_image = grads[index].reshape(features.shape[0], -1, features.shape[1]).transpose(0, 1).contiguous()
            grads[index] = _sum_parts(per_image, gate.shape).to(gate.dtype)
    return tuple(grads)


class _Gcu:
    """Dense inputs of op 1 and what a call needs to know about them."""

    def __init__(self, features: Tensor, coarse: Tensor, feature_gate: Tensor, coarse_gate: Tensor) -> None:
        self.dtype = DTYPES.index(features.dtype)
        self.wide = accumulation_dtype(features.dtype)
        self.features = features.contiguous()
        self.coarse = coarse.contiguous()
        self.gates = [gate.to(self.wide).contiguous() for gate in (feature_gate, coarse_gate)]
        self.sizes = [*features.shape[:2], *_sizes(features.shape[2:]), int(features.dim() == 4)]
        self.inputs = _addresses((self.features, self.coarse, *self.gates))


def rcu_forward(
    x: Tensor, keys: Tensor, values: Tensor, weights: Sequence[Tensor], patch_size: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.reference.patch_cross_attention`; ``weights`` are its arguments 4 to 12."""
    call = _Rcu(x, keys, values, weights, patch_size)
    out = torch.empty_like(call.x)
    score = torch.empty(x.shape[0], 1, *(size // patch_size for size in x.shape[2:]), dtype=call.wide)
    _cpu.rcu_forward(_instruction_set(), call.dtype, call.sizes, threshold, call.inputs + _addresses((out, score)))
    return out, score


def rcu_backward(
    out_grad: Tensor,
    score_grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Sequence[Tensor],
    patch_size: int,
    threshold: float,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the twelve tensors, None for those not needed."""
    call = _Rcu(x, keys, values, weights, patch_size)
    units = _cpu.rcu_units(call.sizes)
    maps, heads, residual, channels = weights[0].shape
    scorer, tokens = weights[5].shape[0], weights[2].shape[1]
    shapes = (
        (maps * heads * residual, channels),
        (maps * heads * residual,),
        (heads, tokens, tokens),
        (channels, maps * heads * residual),
        (channels,),
        (scorer, channels),
        (scorer,),
        (scorer,),
        (1,),
    )
    dense = [torch.empty_like(t) if wanted else None for t, wanted in zip(call.tensors, needed, strict=False)]
    parts = [
        torch.zeros(units, *shape[:-1], _padded(shape[-1]), dtype=call.wide) if wanted else None
        for shape, wanted in zip(shapes, needed[3:], strict=True)
    ]
    out_grads = (out_grad.contiguous(), score_grad.to(call.wide).contiguous())
    addresses = _addresses((*out_grads, *dense, *parts))
    _cpu.rcu_backward(_instruction_set(), call.dtype, call.sizes, threshold, call.inputs + addresses)
    if parts[6] is not None:
        # The context has a row an image: its parts are summed image by image.
        per_image = parts[6].reshape(x.shape[0], -1, parts[6].shape[-1]).transpose(0, 1).contiguous()
        parts[6], shapes = per_image, (*shapes[:6], (x.shape[0], scorer), *shapes[7:])
    sums = [_sum_parts(part, shape) for part, shape in zip(parts, shapes, strict=True)]
    scale = residual**-0.5
    for index in (0, 1):
        if sums[index] is not None:
            sums[index] = sums[index] * scale
    if sums[2] is not None:
        sums[2] = sums[2].transpose(1, 2)
    if sums[3] is not None:
        sums[3] = sums[3].reshape(channels, maps, heads, residual).permute(1, 2, 0, 3)
    finished = [
        None if total is None else total.reshape(weight.shape).to(weight.dtype).contiguous()
        for total, weight in zip(sums, weights, strict=True)
    ]
    return (*dense, *finished)


def _padded(count: int) -> int:
    return -(-count // 16) * 16


class _Rcu:
    """Dense inputs of op 2, its weights as the kernel reads them, and what a call needs to know about them."""

    def __init__(self, x: Tensor, keys: Tensor, values: Tensor, weights: Sequence[Tensor], patch_size: int) -> None:
        self.dtype = DTYPES.index(x.dtype)
        self.wide = accumulation_dtype(x.dtype)
        self.tensors = [tensor.contiguous() for tensor in (x, keys, values)]
        self.x = self.tensors[0]
        wide = [weight.to(self.wide) for weight in weights]
        maps, heads, residual, channels = weights[0].shape
        scale = residual**-0.5
        wide[0], wide[1] = wide[0] * scale, wide[1] * scale
        tokens = weights[2].shape[1]
        wide[2] = F.pad(wide[2].transpose(1, 2), (0, _padded(tokens) - tokens))
        wide[3] = wide[3].permute(2, 0, 1, 3)
        self.weights = [weight.contiguous() for weight in wide]
        planar = x.dim() == 4
        self.sizes = [
            x.shape[0], channels, maps, residual, heads, weights[5].shape[0],
            *_sizes(x.shape[2:]), patch_size, int(planar),
        ]  # fmt: skip
        self.inputs = _addresses((*self.tensors, *self.weights))
