"""Other ways to compute the two ops, which the kernels have to beat: what a user could write in PyTorch in an hour."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from grcsf_fast import reference
from grcsf_fast.reference import from_patches, to_patches

__all__ = ["OPS", "flex_attention", "peers_of", "sdpa_attention"]


def _attention(
    x: Tensor, keys: Tensor, values: Tensor, query_weight: Tensor, query_bias: Tensor, output_weight: Tensor,
    output_bias: Tensor, score_weight: Tensor, score_context: Tensor, score_vector: Tensor, score_bias: Tensor,
    patch_size: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Op 2 around an attention of (B*P, M*h, T, R) queries, keys and values."""
    spatial = tuple(x.shape[2:])
    dims = len(spatial)
    batch = x.shape[0]
    maps, heads, width, _ = query_weight.shape
    tokens = to_patches(x, patch_size, dims)  # (B,C,P,T)
    hidden = torch.einsum("sc,bcp->bps", score_weight, tokens.mean(-1)) + score_context[:, None]
    score = torch.sigmoid(torch.relu(hidden) @ score_vector + score_bias)  # (B,P)
    queries = torch.einsum("mhrc,bcpt->bpmhtr", query_weight, tokens) + query_bias[:, :, None]
    patches, length = queries.shape[1], queries.shape[4]

    def spread(volume: Tensor) -> Tensor:
        split = to_patches(volume, patch_size, dims).permute(0, 3, 1, 4, 2)  # (B,P,M,T,R)
        split = split[:, :, :, None].expand(-1, -1, -1, heads, -1, -1)
        return split.reshape(batch * patches, maps * heads, length, width)

    attended = attend(queries.reshape(batch * patches, maps * heads, length, width), spread(keys), spread(values))
    attended = attended.reshape(batch, patches, maps, heads, length, width)
    update = torch.einsum("mhcr,bpmhtr->bcpt", output_weight, attended) + output_bias[:, None, None]
    out = x + from_patches(score[:, None, :, None] * update, patch_size, spatial)
    return out, score.reshape(batch, 1, *(size // patch_size for size in spatial))


def sdpa_attention(
    x: Tensor, keys: Tensor, values: Tensor, query_weight: Tensor, query_bias: Tensor, position_bias: Tensor,
    *others: Tensor, patch_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Op 2 on :func:`torch.nn.functional.scaled_dot_product_attention`."""
    bias = position_bias.repeat(query_weight.shape[0], 1, 1).to(x.dtype)
    return _attention(
        x, keys, values, query_weight, query_bias, *others, patch_size,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
    )  # fmt: skip


def flex_attention(
    x: Tensor, keys: Tensor, values: Tensor, query_weight: Tensor, query_bias: Tensor, position_bias: Tensor,
    *others: Tensor, patch_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Op 2 on FlexAttention; to be compiled."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    bias = position_bias.repeat(query_weight.shape[0], 1, 1)

    def add_bias(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query, key]

    return _attention(
        x, keys, values, query_weight, query_bias, *others, patch_size,
        lambda q, k, v: flex(q, k, v, score_mod=add_bias),
    )  # fmt: skip


OPS = ("global_compensation", "patch_cross_attention")


def peers_of(op: str) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """The contestants of an op that are not ours; arguments as for :mod:`grcsf_fast.reference`."""
    compiled = {"dynamic": False}
    if op == "global_compensation":
        return {
            "reference": reference.global_compensation,
            "compiled reference": torch.compile(reference.global_compensation, **compiled),
        }
    return {
        "reference": reference.patch_cross_attention,
        "compiled reference": torch.compile(reference.patch_cross_attention, **compiled),
        "SDPA": sdpa_attention,
        "compiled SDPA": torch.compile(sdpa_attention, **compiled),
        "FlexAttention": torch.compile(flex_attention, **compiled),
    }
