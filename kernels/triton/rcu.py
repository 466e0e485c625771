"""Patch cross-attention with importance scoring: one launch forward; the backward is in rcu_backward.py.

What it means: grcsf_fast/reference.py. A program has a patch, and X (rows, C) of its tokens:

    over blocks of channels:   means of the patch, and from them the score; below the threshold X is passed on
    over heads and maps:       Q = X Wq;  P = softmax(Q K / sqrt(R) + position bias);  O = P V
    over blocks of channels:   X + score (O Wo + bias)

X is read again and again, from the nearest cache: kept in registers it would leave no room for other programs.

Products run on the matrix units in the dtype of x with sums in float32; float32 itself as three tf32 products, which
keep its accuracy. The softmax is base 2. Tensors are read and written by their strides, without a copy.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped import is_wide
from .patches import (
    LOG2_E,
    Launch,
    channels_of,
    load_tile,
    logits_of,
    place_of,
    position_of,
    project,
    put,
    read,
    score_of,
    store_tile,
    strides_in,
    strides_of,
    tokens_at,
    weight_of,
)  # fmt: skip

__all__ = ["forward"]


@triton.jit
def _forward_kernel(
    x, keys, values,  # (B, C, *S), (B, M, R, *S) twice
    query_weight, query_bias, position_bias,  # (M, h, R, C), (M, h, R), (h, T, T); these and the next six dense
    output_weight, output_bias,  # (M, h, C, R), (C,)
    score_weight, score_context, score_vector, score_bias,  # (H, C), (B, H), (H,), ()
    out, score,  # (B, C, *S), (B, 1, *S/p), the second dense
    numbers, UNITS: tl.constexpr,  # strides of x, keys, values and out, see strides_in
    threshold, scale, grid, channels, residual, hidden_units,  # scale 1/sqrt(R), grid the patches along each axis
    MAPS: tl.constexpr, HEADS: tl.constexpr, PATCH: tl.constexpr, VOLUME: tl.constexpr, T: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = MAPS * HEADS
    D: tl.constexpr = x.dtype.element_ty
    x_strides, out_strides = strides_in(numbers, UNITS, 0, 5), strides_in(numbers, UNITS, 3, 5)
    k, v = strides_in(numbers, UNITS, 1, 6), strides_in(numbers, UNITS, 2, 6)
    # The rows of a patch side by side: what they share, they find in a cache.
    number, start = tl.program_id(0) // (TOKENS // ROWS), tl.program_id(0) % (TOKENS // ROWS) * ROWS
    image, place = place_of(number, grid, PATCH, VOLUME)
    there, row_there = tl.arange(0, TOKENS) < T, start + tl.arange(0, ROWS) < T
    r = tl.arange(0, RESIDUAL)
    x += image * x_strides[0]
    out += image * out_strides[0]
    x_at = tokens_at(start, place, x_strides[2], x_strides[3], x_strides[4], ROWS, PATCH, VOLUME, WIDE)
    out_at = tokens_at(start, place, out_strides[2], out_strides[3], out_strides[4], ROWS, PATCH, VOLUME, WIDE)
    all_at = tokens_at(0, place, x_strides[2], x_strides[3], x_strides[4], TOKENS, PATCH, VOLUME, WIDE)

    means = ()
    for _ in tl.static_range(BLOCKS):
        means = means + (tl.zeros([CHANNELS], tl.float32),)
    # Of as many steps as are known at run time, so that not all blocks are in registers at once, but two are.
    for block in tl.range(0, tl.cdiv(channels, CHANNELS), disable_licm=True, loop_unroll_factor=2):
        channel, present = channels_of(block, channels, CHANNELS, WIDE)
        tile = load_tile(x, all_at, there, channel, present, x_strides[1])
        means = put(means, block, tl.sum(tile.to(tl.float32), 0) / T, BLOCKS)
    value = score_of(
        means, score_weight, score_context + image * hidden_units, score_vector, score_bias, None, channels,
        hidden_units, BLOCKS, CHANNELS, HIDDEN,
    )  # fmt: skip
    tl.store(score + number, value, mask=start == 0)
    if (value >= threshold) | (threshold <= 0):
        k_at = tokens_at(0, place, k[3], k[4], k[5], TOKENS, PATCH, VOLUME, WIDE)
        v_at = tokens_at(0, place, v[3], v[4], v[5], TOKENS, PATCH, VOLUME, WIDE)
        r_of, r_there = channels_of(0, residual, RESIDUAL, WIDE)
        outcomes = ()
        for _ in tl.static_range(COUNT):
            outcomes = outcomes + (tl.zeros([ROWS, RESIDUAL], D),)
        for head in tl.range(0, HEADS, disable_licm=True):
            bias = position_of(position_bias, head, start, T, ROWS, TOKENS)
            for m in tl.range(0, MAPS, disable_licm=True):
                of = m * HEADS + head
                query = project(
                    x, x_at, row_there, x_strides[1], query_weight, of, channels, residual, 1, channels,
                    ROWS, RESIDUAL, CHANNELS, BLOCKS, WIDE, PRECISION,
                )  # fmt: skip
                query += read(query_bias + of * residual + r, r < residual).to(tl.float32)[None, :]
                key = load_tile(keys + image * k[0] + m * k[1], k_at, there, r_of, r_there, k[2])
                logits = logits_of(query * (scale * LOG2_E), key, bias, PRECISION)
                exponentials = tl.exp2(logits - tl.max(logits, 1)[:, None])
                seen = load_tile(values + image * v[0] + m * v[1], v_at, there, r_of, r_there, v[2])
                outcome = tl.dot(exponentials.to(D), seen, input_precision=PRECISION)
                outcomes = put(outcomes, of, (outcome / tl.sum(exponentials, 1)[:, None]).to(D), COUNT)
        for part in tl.range(0, BLOCKS, disable_licm=True):
            channel_of, channel_there = channels_of(part, channels, CHANNELS, WIDE)
            update = tl.zeros([ROWS, CHANNELS], tl.float32)
            for one in tl.static_range(COUNT):
                weight = weight_of(
                    output_weight, one, channel_of, channel_there, channels, residual, residual, 1, RESIDUAL
                )
                update = tl.dot(outcomes[one], tl.trans(weight.to(D)), acc=update, input_precision=PRECISION)
            update += read(output_bias + channel_of, channel_there).to(tl.float32)[None, :]
            before = load_tile(x, x_at, row_there, channel_of, channel_there, x_strides[1])
            after = before.to(tl.float32) + value * update
            store_tile(out, after, out_at, row_there, channel_of, channel_there, out_strides[1])
    else:
        for part in tl.range(0, BLOCKS, disable_licm=True):
            channel_of, channel_there = channels_of(part, channels, CHANNELS, WIDE)
            before = load_tile(x, x_at, row_there, channel_of, channel_there, x_strides[1])
            store_tile(out, before, out_at, row_there, channel_of, channel_there, out_strides[1])


def forward(
    x: Tensor, keys: Tensor, values: Tensor, weights: Any, patch: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """``(out, score)``, the first laid out as x; ``weights`` is an AttentionWeights of dense tensors."""
    launch = Launch(x, weights, patch)
    out = torch.empty_like(x)
    score = x.new_empty(x.shape[0], 1, *(size // patch for size in x.shape[2:]), dtype=torch.float32)
    tensors = x, keys, values, out
    if launch.patches:
        _forward_kernel[(launch.patches * (launch.blocks["TOKENS"] // launch.blocks["ROWS"]),)](
            x, keys, values, *weights, out, score, *strides_of(tensors, launch.dims), threshold, *launch.sizes,
            WIDE=any(map(is_wide, tensors)), **launch.blocks, **launch.options("forward"),
        )  # fmt: skip
    return out, score
