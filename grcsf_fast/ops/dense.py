"""The one place where a tensor becomes what a kernel can read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import AttentionWeights

__all__ = ["attention_shapes", "dense", "fitting", "memory_format", "side_by_side"]


def dense(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor in C order, copied only if it must be; for kernels that take no strides.

    Raises:
        ValueError: see :func:`fitting`.
    """
    return fitting(name, tensor, shape, dtype, device).contiguous()


def fitting(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor as it is, a negated view as the numbers that it stands for; for kernels that take its strides.

    Raises:
        ValueError: a shape, dtype or device for which a kernel would read something else than the tensor.
    """
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name}: expected {dtype} of shape {tuple(shape)} on {device}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def memory_format(x: Tensor) -> torch.memory_format | None:
    """Of (B, C, \\*S): C order or channels last, both without gaps, or None."""
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return next((one for one in (torch.contiguous_format, last) if x.is_contiguous(memory_format=one)), None)


def side_by_side(x: Tensor) -> Tensor:
    """x, or a copy in C order where it has no memory format."""
    return x if memory_format(x) is not None else x.contiguous()


def attention_shapes(x: Tensor, weights: AttentionWeights, patch_size: int) -> AttentionWeights:
    """The shapes that belong to ``x``, in the places of the tensors."""
    batch, channels, *spatial = x.shape
    maps, heads, residual, _ = weights.query_weight.shape
    hidden, tokens = weights.score_weight.shape[0], patch_size ** len(spatial)
    return AttentionWeights(
        query_weight=(maps, heads, residual, channels),
        query_bias=(maps, heads, residual),
        position_bias=(heads, tokens, tokens),
        output_weight=(maps, heads, channels, residual),
        output_bias=(channels,),
        score_weight=(hidden, channels),
        score_context=(batch, hidden),
        score_vector=(hidden,),
        score_bias=(),
    )
