"""What the ops mean, in plain PyTorch: the specification in code, and the oracle of every test.

Any device. float64 stays float64; float16 and bfloat16 are computed in float32 and the results rounded once.
The functions trust their arguments; :mod:`grcsf_fast.functional` is the checked entrance for users.

Letters: ``B`` batch, ``C`` channels, ``S`` spatial axes (2 or 3), ``M`` residual maps, ``R`` residual channels,
``h`` heads, ``p`` patch edge, ``T = p ** dims`` tokens of a patch, ``P`` patches of an image, ``Hs`` scorer width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime.transforms import transformed

__all__ = ["global_compensation", "multiscale_compensation", "normalize_activate", "patch_cross_attention", "pool"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def global_compensation(
    features: Tensor, coarse: Tensor, feature_gate: Tensor, coarse_gate: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.functional.global_compensation`."""
    dtype = features.dtype
    wide = accumulation_dtype(dtype)
    spatial_dims = features.dim() - 2
    per_channel = (..., *[None] * spatial_dims)  # (B,C) -> (B,C,1,1[,1])
    features = features.to(wide)
    gated = feature_gate.to(wide)[per_channel] * features  # (B,C,*S)
    upsampled = F.interpolate(
        coarse.to(wide), scale_factor=2, mode="bilinear" if spatial_dims == 2 else "trilinear", align_corners=False
    )
    upsampled = coarse_gate.to(wide)[per_channel] * upsampled  # (B,C,*S)
    dot = (gated * upsampled).sum(1, keepdim=True)  # (B,1,*S)
    energy = gated.square().sum(1, keepdim=True) * upsampled.square().sum(1, keepdim=True)
    # max(sqrt(e), eps) written so that its gradient is finite where e = 0.
    cosine = dot / energy.clamp_min(max(eps * eps, torch.finfo(wide).tiny)).sqrt()
    residual = 1 - cosine
    compensated = features * (1 + residual)
    return compensated.to(dtype), residual.to(dtype)


def multiscale_compensation(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    eps: float = 1e-6,
) -> list[tuple[Tensor, Tensor]]:
    """See :func:`grcsf_fast.functional.multiscale_compensation`."""
    scales = zip(features, coarse, feature_gates, coarse_gates, strict=True)
    return [global_compensation(*tensors, eps) for tensors in scales]


def normalize_activate(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, slope: float = 0.01) -> Tensor:
    """See :func:`grcsf_fast.functional.normalize_activate`."""
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


def pool(x: Tensor) -> Tensor:
    """See :func:`grcsf_fast.functional.pool`."""
    return F.max_pool2d(x, 2) if x.dim() == 4 else F.max_pool3d(x, 2)


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """See :func:`grcsf_fast.functional.attend`."""
    query, key, value = (one.unflatten(2, (heads, -1)).transpose(1, 2) for one in (queries, keys, values))
    if transformed():
        # PyTorch's fused attention has neither a forward-mode derivative nor a batching rule.
        logits = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
        return (logits.softmax(3) @ value).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`grcsf_fast.functional.linear_gelu`."""
    return F.gelu(F.linear(x, weight, bias))


def to_patches(volume: Tensor, patch_size: int, spatial_dims: int) -> Tensor:
    """(*lead, *S) -> (*lead, P, T): patches in row-major order, and tokens in row-major order inside each."""
    lead = volume.shape[: volume.dim() - spatial_dims]
    counts = [size // patch_size for size in volume.shape[len(lead) :]]
    split = volume.reshape(*lead, *[n for count in counts for n in (count, patch_size)])
    first = len(lead)
    order = [*range(first), *range(first, split.dim(), 2), *range(first + 1, split.dim(), 2)]
    # The sizes are spelled out: -1 cannot be inferred when the batch is empty.
    patches = 1
    for count in counts:
        patches *= count
    return split.permute(order).reshape(*lead, patches, patch_size**spatial_dims)


def from_patches(patches: Tensor, patch_size: int, spatial_shape: tuple[int, ...]) -> Tensor:
    """(*lead, P, T) -> (*lead, *S), the inverse of :func:`to_patches`."""
    lead = patches.shape[:-2]
    spatial_dims = len(spatial_shape)
    counts = [size // patch_size for size in spatial_shape]
    split = patches.reshape(*lead, *counts, *[patch_size] * spatial_dims)
    first = len(lead)
    order = [*range(first)]
    for axis in range(spatial_dims):
        order += [first + axis, first + spatial_dims + axis]
    return split.permute(order).reshape(*lead, *spatial_shape)


def patch_cross_attention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    position_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    score_weight: Tensor,
    score_context: Tensor,
    score_vector: Tensor,
    score_bias: Tensor,
    patch_size: int,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.functional.patch_cross_attention`."""
    dtype = x.dtype
    wide = accumulation_dtype(dtype)
    spatial_shape = tuple(x.shape[2:])
    spatial_dims = len(spatial_shape)
    (
        query_weight, query_bias, position_bias, output_weight, output_bias,
        score_weight, score_context, score_vector, score_bias,
    ) = (
        t.to(wide)
        for t in (
            query_weight, query_bias, position_bias, output_weight, output_bias,
            score_weight, score_context, score_vector, score_bias,
        )
    )  # fmt: skip
    residual_channels = query_weight.shape[2]

    tokens = to_patches(x.to(wide), patch_size, spatial_dims)  # (B,C,P,T)
    key_tokens = to_patches(keys.to(wide), patch_size, spatial_dims)  # (B,M,R,P,T)
    value_tokens = to_patches(values.to(wide), patch_size, spatial_dims)  # (B,M,R,P,T)

    hidden = torch.einsum("sc,bcp->bps", score_weight, tokens.mean(-1)) + score_context[:, None]  # (B,P,Hs)
    score = torch.sigmoid(torch.relu(hidden) @ score_vector + score_bias)  # (B,P)

    queries = torch.einsum("mhrc,bcpt->bmhptr", query_weight, tokens) + query_bias[:, :, None, None]
    logits = torch.einsum("bmhptr,bmrpj->bmhptj", queries, key_tokens) / residual_channels**0.5
    attention = torch.softmax(logits + position_bias[:, None], dim=-1)  # (B,M,h,P,T,T)
    attended = torch.einsum("bmhptj,bmrpj->bmhptr", attention, value_tokens)
    update = torch.einsum("mhcr,bmhptr->bcpt", output_weight, attended) + output_bias[:, None, None]  # (B,C,P,T)

    scaled = score[:, None, :, None] * update
    if threshold > 0:
        # Not a product with 0: a skipped patch passes x on even where its update is not finite.
        scaled = torch.where((score >= threshold)[:, None, :, None], scaled, torch.zeros_like(scaled))
    out = x.to(wide) + from_patches(scaled, patch_size, spatial_shape)
    score_map = score.reshape(score.shape[0], 1, *[size // patch_size for size in spatial_shape])
    return out.to(dtype), score_map.to(wide)  # narrower under autocast
