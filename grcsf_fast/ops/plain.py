"""What the networks do between the two ops, in PyTorch's own operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.dtypes import accumulation_dtype
from ..runtime.transforms import transformed

__all__ = [
    "attend", "convolution", "linear_gelu", "mean_of_windows", "mean_pool", "normalize_activate", "pool",
    "pool_with_mean",
]  # fmt: skip

# Numbers of all heads and images: 128 MiB in half precision.
LARGEST_LOGITS = 2**26


def normalize_activate(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, slope: float = 0.01) -> Tensor:
    """See :func:`grcsf_fast.functional.internal.normalize_activate`."""
    # PyTorch's instance norm refuses an empty batch, and the views in it fail in its compiler (2.13) where sizes are
    # symbols and a backward follows.
    if x.shape[0] == 0 or (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        wide = x.to(accumulation_dtype(x.dtype))
        pixels, per_channel = tuple(range(2, x.dim())), (..., *[None] * (x.dim() - 2))  # (C,) -> (C,1,1[,1])
        centred = wide - wide.mean(pixels, keepdim=True)
        normed = centred * (centred.square().mean(pixels, keepdim=True) + eps).rsqrt()
        normed = normed * weight[per_channel] + bias[per_channel]
        return F.leaky_relu(normed.to(x.dtype), slope)
    return F.leaky_relu(F.instance_norm(x, weight=weight, bias=bias, eps=eps), slope)


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`grcsf_fast.functional.internal.convolution`."""
    return (F.conv2d if x.dim() == 4 else F.conv3d)(x, weight, bias, padding=1)


def pool(x: Tensor) -> Tensor:
    """See :func:`grcsf_fast.functional.internal.pool`."""
    return F.max_pool2d(x, 2) if x.dim() == 4 else F.max_pool3d(x, 2)


def mean_pool(x: Tensor) -> Tensor:
    """The mean of each 2 x 2 (x 2) pixels: (B, C, \\*S) -> (B, C, \\*S/2)."""
    if x.dim() == 4:
        return F.avg_pool2d(x, 2)
    if x.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
        return mean_of_windows(x)  # the backward of PyTorch's pooling (2.13) raises there
    # PyTorch (2.13) has none of half precision for volumes on a CPU.
    wide = x.to(accumulation_dtype(x.dtype)) if x.device.type == "cpu" else x
    return F.avg_pool3d(wide, 2).to(x.dtype)


def mean_of_windows(x: Tensor) -> Tensor:
    """:func:`mean_pool` of volumes by operations whose backward is the same in every run on every device."""
    planes, rows, columns = (size // 2 for size in x.shape[2:])
    even = x[:, :, : 2 * planes, : 2 * rows, : 2 * columns]
    return even.unflatten(4, (columns, 2)).unflatten(3, (rows, 2)).unflatten(2, (planes, 2)).mean((3, 5, 7))


def pool_with_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.functional.internal.pool_with_mean`."""
    return pool(x), mean_pool(x)


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """See :func:`grcsf_fast.functional.internal.attend`."""
    query, key, value = (one.unflatten(2, (heads, -1)).transpose(1, 2) for one in (queries, keys, values))
    if transformed() or _slow_when_fused(query, key):
        # PyTorch's fused attention has neither a forward-mode derivative nor a batching rule.
        logits = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
        return (logits.softmax(3) @ value).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _slow_when_fused(query: Tensor, key: Tensor) -> bool:
    """In half precision on a CPU the fused backward (PyTorch 2.13) is slower than products, where logits are small."""
    logits = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.is_grad_enabled()
        and query.requires_grad
        and logits <= LARGEST_LOGITS
    )


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`grcsf_fast.functional.internal.linear_gelu`."""
    return F.gelu(F.linear(x, weight, bias))
