"""What the two ops mean, in plain PyTorch: the specification in code, and the oracle of every test.

Any device. float64 stays float64; float16 and bfloat16 are computed in float32 and the results rounded once.
The functions trust their arguments; :mod:`grcsf_fast.functional` is the checked entrance for users.

Letters: ``B`` batch, ``C`` channels, ``S`` spatial axes (2 or 3), ``M`` residual maps, ``R`` residual channels,
``h`` heads, ``p`` patch edge, ``T = p ** dims`` tokens of a patch, ``P`` patches of an image, ``Hs`` scorer width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime.dtypes import accumulation_dtype
from .runtime.patches import from_patches, to_patches

__all__ = ["AttentionWeights", "global_compensation", "multiscale_compensation", "patch_cross_attention"]


def global_compensation(
    features: Tensor,
    coarse: Tensor,
    feature_gate: Tensor,
    coarse_gate: Tensor,
    strength: Tensor,
    eps: float = 1e-6,
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
    gated_upsampled = coarse_gate.to(wide)[per_channel] * upsampled  # (B,C,*S)
    dot = (gated * gated_upsampled).sum(1, keepdim=True)  # (B,1,*S)
    energy = gated.square().sum(1, keepdim=True) * gated_upsampled.square().sum(1, keepdim=True)
    # max(sqrt(e), eps) written so that its gradient is finite where e = 0.
    cosine = dot / energy.clamp_min(max(eps * eps, torch.finfo(wide).tiny)).sqrt()
    residual = 1 - cosine
    lost = features - upsampled  # (B,C,*S)
    compensated = features + strength.to(wide)[per_channel] * residual * lost
    return compensated.to(dtype), residual.to(dtype)


def multiscale_compensation(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float = 1e-6,
) -> list[tuple[Tensor, Tensor]]:
    """See :func:`grcsf_fast.functional.multiscale_compensation`."""
    scales = zip(features, coarse, feature_gates, coarse_gates, strengths, strict=True)
    return [global_compensation(*tensors, eps) for tensors in scales]


class AttentionWeights(NamedTuple):
    """What :func:`patch_cross_attention` learns, and the context of its scorer.

    Attributes:
        query_weight: (M, h, R, C).
        query_bias: (M, h, R).
        position_bias: (h, T, T), added to the logits of query token t and key token j.
        output_weight: (M, h, C, R), the learned weights of the residual maps folded in.
        output_bias: (C,).
        score_weight: (Hs, C).
        score_context: (B, Hs), global information, a row per image.
        score_vector: (Hs,).
        score_bias: () scalar tensor.
    """

    query_weight: Tensor
    query_bias: Tensor
    position_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    score_weight: Tensor
    score_context: Tensor
    score_vector: Tensor
    score_bias: Tensor


def patch_cross_attention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: AttentionWeights,
    patch_size: int,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See :func:`grcsf_fast.functional.patch_cross_attention`."""
    dtype = x.dtype
    wide = accumulation_dtype(dtype)
    spatial_shape = tuple(x.shape[2:])
    spatial_dims = len(spatial_shape)
    weights = AttentionWeights(*(tensor.to(wide) for tensor in weights))
    residual_channels = weights.query_weight.shape[2]

    tokens = to_patches(x.to(wide), patch_size, spatial_dims)  # (B,C,P,T)
    key_tokens = to_patches(keys.to(wide), patch_size, spatial_dims)  # (B,M,R,P,T)
    value_tokens = to_patches(values.to(wide), patch_size, spatial_dims)  # (B,M,R,P,T)

    hidden = (
        torch.einsum("sc,bcp->bps", weights.score_weight, tokens.mean(-1)) + weights.score_context[:, None]
    )  # (B,P,Hs)
    score = torch.sigmoid(torch.relu(hidden) @ weights.score_vector + weights.score_bias)  # (B,P)

    queries = torch.einsum("mhrc,bcpt->bmhptr", weights.query_weight, tokens) + weights.query_bias[:, :, None, None]
    logits = torch.einsum("bmhptr,bmrpj->bmhptj", queries, key_tokens) / residual_channels**0.5
    attention = torch.softmax(logits + weights.position_bias[:, None], dim=-1)  # (B,M,h,P,T,T)
    attended = torch.einsum("bmhptj,bmrpj->bmhptr", attention, value_tokens)
    update = (
        torch.einsum("mhcr,bmhptr->bcpt", weights.output_weight, attended) + weights.output_bias[:, None, None]
    )  # (B,C,P,T)

    scaled = score[:, None, :, None] * update
    if threshold > 0:
        # Not a product with 0: a skipped patch passes x on even where its update is not finite.
        scaled = torch.where((score >= threshold)[:, None, :, None], scaled, torch.zeros_like(scaled))
    out = x.to(wide) + from_patches(scaled, patch_size, spatial_shape)
    score_map = score.reshape(score.shape[0], 1, *[size // patch_size for size in spatial_shape])
    return out.to(dtype), score_map.to(wide)  # narrower under autocast
