"""Other ways to compute the two ops, which the kernels have to beat: what a user could write in PyTorch in an hour."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from grcsf_fast import reference
from grcsf_fast.reference import from_patches, to_patches

__all__ = ["OPS", "cosine_compensation", "flex_attention", "peers_of", "sdpa_attention"]


def _attention(
    x: Tensor, keys: Tensor, values: Tensor, query_weight: Tensor, query_bias: Tensor, position_bias: Tensor,
    output_weight: Tensor, output_bias: Tensor, score_weight: Tensor, score_context: Tensor, score_vector: Tensor,
    score_bias: Tensor, patch_size: int, attend: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Op 2 around ``attend(queries, keys, values, bias)``.

    The heads of a map share its keys and values, so their queries lie behind each other: (B*P, M, h*T, R) queries
    against (B*P, M, T, R) keys and values, and nothing is repeated.
    """
    (
        query_weight, query_bias, position_bias, output_weight, output_bias,
        score_weight, score_context, score_vector, score_bias,
    ) = (
        tensor.to(x.dtype)
        for tensor in (
            query_weight, query_bias, position_bias, output_weight, output_bias,
            score_weight, score_context, score_vector, score_bias,
        )
    )  # fmt: skip
    spatial = tuple(x.shape[2:])
    dims = len(spatial)
    batch = x.shape[0]
    maps, heads, width, _ = query_weight.shape
    tokens = to_patches(x, patch_size, dims)  # (B,C,P,T)
    hidden = torch.einsum("sc,bcp->bps", score_weight, tokens.mean(-1)) + score_context[:, None]
    score = torch.sigmoid(torch.relu(hidden) @ score_vector + score_bias)  # (B,P)
    queries = torch.einsum("mhrc,bcpt->bpmhtr", query_weight, tokens) + query_bias[:, :, None]
    patches, length = queries.shape[1], queries.shape[4]

    def split(volume: Tensor) -> Tensor:
        return to_patches(volume, patch_size, dims).permute(0, 3, 1, 4, 2).reshape(-1, maps, length, width)

    queries = queries.reshape(batch * patches, maps, heads * length, width)
    attended = attend(queries, split(keys), split(values), position_bias.reshape(heads * length, length))
    attended = attended.reshape(batch, patches, maps, heads, length, width)
    update = torch.einsum("mhcr,bpmhtr->bcpt", output_weight, attended) + output_bias[:, None, None]
    out = x + from_patches(score[:, None, :, None] * update, patch_size, spatial)
    return out, score.reshape(batch, 1, *(size // patch_size for size in spatial)).float()


def sdpa_attention(*arguments: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Op 2 on :func:`torch.nn.functional.scaled_dot_product_attention`."""
    return _attention(
        *arguments, patch_size, lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    )


def flex_attention(*arguments: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Op 2 on FlexAttention, compiled by itself: as part of a larger graph torch 2.13 fails to compile it on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled = torch.compile(flex, dynamic=False)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        def add_bias(score: Tensor, _batch: Tensor, _map: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + bias[query, key]

        return compiled(queries, keys, values, score_mod=add_bias)

    return _attention(*arguments, patch_size, attend)


def cosine_compensation(
    features: Tensor, coarse: Tensor, feature_gate: Tensor, coarse_gate: Tensor
) -> tuple[Tensor, Tensor]:
    """Op 1 on :func:`torch.nn.functional.cosine_similarity`."""
    dims = features.dim() - 2
    gates = (gate.to(features.dtype)[(..., *[None] * dims)] for gate in (feature_gate, coarse_gate))
    upsampled = F.interpolate(coarse, scale_factor=2, mode="bilinear" if dims == 2 else "trilinear")
    residual = 1 - F.cosine_similarity(features * next(gates), upsampled * next(gates), dim=1, eps=1e-6)[:, None]
    return features * (1 + residual), residual


OPS = ("global_compensation", "patch_cross_attention")


def peers_of(op: str) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """The contestants of an op that are not ours; arguments as for :mod:`grcsf_fast.reference`."""
    compiled = {"dynamic": False}
    if op == "global_compensation":
        return {
            "reference": reference.global_compensation,
            "compiled reference": torch.compile(reference.global_compensation, **compiled),
            "cosine_similarity": cosine_compensation,
            "compiled cosine_similarity": torch.compile(cosine_compensation, **compiled),
        }
    return {
        "reference": reference.patch_cross_attention,
        "compiled reference": torch.compile(reference.patch_cross_attention, **compiled),
        "SDPA": sdpa_attention,
        "compiled SDPA": torch.compile(sdpa_attention, **compiled),
        "FlexAttention": flex_attention,
    }
