"""The backward of patch cross-attention: one launch or two, and one that adds up.

patches, each program some of them, one after another:
    over blocks of channels:   means of X, and from them the score
    over rows, heads and maps: P and O as forward;  G = dOut Wo;  dscore += O G;  dO = score G
                               dS = P (dO V - sum O dO);  dV += P dO;  dK += dS Q;  dQ = dS K
what follows from dQ and O, in rcu_channels.py: patch by patch in the same program, or in a second launch
sums of what each program has of position bias and weights, in their order: no atomics, the same bits in every run
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped import is_wide
from .patches import (
    LOG2_E,
    Launch,
    add_at,
    channels_of,
    load_rows,
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
    unrounded,
)  # fmt: skip
from .rcu_channels import _channels_kernel, add_part
from .sums import add_rows

__all__ = ["backward"]


@triton.jit
def _patches_kernel(
    x, keys, values,  # as forward, as are the next three lines
    query_weight, query_bias, position_bias,
    output_weight, output_bias,
    score_weight, score_context, score_vector, score_bias,
    out_grad, score_grad,  # (B, C, *S), (B, 1, *S/p), the second dense
    keys_grad, values_grad,  # (B, M, R, *S) twice
    query_grads, reads,  # (places, T, M * h * RESIDUAL), dense: dQ and score O
    position_parts,  # (programs, h, T, T), dense
    means, factors,  # (patches, C), (patches,), dense: the latter are the scores, 0 below the threshold
    hidden, logit_grads,  # (patches, H), (patches,), dense: of the scorer
    unit_grads, vector_parts,  # see _channels_kernel, as are x_grad and weights_parts: where FUSED
    x_grad, weights_parts,
    numbers, UNITS: tl.constexpr,  # strides of x, keys, values, out_grad, keys_grad, values_grad, x_grad: strides_in
    patches, threshold, scale, grid, channels, residual, hidden_units,
    MAPS: tl.constexpr, HEADS: tl.constexpr, PATCH: tl.constexpr, VOLUME: tl.constexpr, T: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, STACK: tl.constexpr, FUSED: tl.constexpr,  # of _channels_kernel, and whether it follows here
    NEEDED: tl.constexpr,  # whether dX, dK and dV, that of the position bias, those of the weights are to be made here
):  # fmt: skip
    D: tl.constexpr = x.dtype.element_ty
    x_strides, out_strides = strides_in(numbers, UNITS, 0, 5), strides_in(numbers, UNITS, 3, 5)
    k, v = strides_in(numbers, UNITS, 1, 6), strides_in(numbers, UNITS, 2, 6)
    row, t, r = tl.arange(0, ROWS), tl.arange(0, TOKENS), tl.arange(0, RESIDUAL)
    # From a block's first row: what holds for all lanes is added to the tensor, in few registers.
    width, there = tl.full([], MAPS * HEADS * RESIDUAL, tl.int64), t < T
    kept_at = row[:, None] * (MAPS * HEADS * RESIDUAL) + r[None, :]
    square_at = row[:, None] * T + t[None, :]
    r_of, r_there = channels_of(0, residual, RESIDUAL, WIDE)
    for number in tl.range(tl.program_id(0), patches, tl.num_programs(0), disable_licm=True):
        kept_place = tl.program_id(0) if FUSED else number
        image, place = place_of(number, grid, PATCH, VOLUME)
        x_of, out_of = x + image * x_strides[0], out_grad + image * out_strides[0]
        patch_means = ()
        for _ in tl.static_range(BLOCKS):
            patch_means = patch_means + (tl.zeros([CHANNELS], tl.float32),)
        shifted = tl.zeros([ROWS, CHANNELS], tl.float32)
        # Not unrolled: where the channels of all blocks lie would be in registers from one patch to the next.
        for block in tl.range(0, BLOCKS, disable_licm=True):
            channel, present = channels_of(block, channels, CHANNELS, WIDE)
            x_sum, grad_sum = tl.zeros([ROWS, CHANNELS], tl.float32), tl.zeros([ROWS, CHANNELS], tl.float32)
            for start in tl.range(0, TOKENS, ROWS, disable_licm=True):
                tile = load_rows(x_of, x_strides, place, start, channel, present, T, ROWS, PATCH, VOLUME, WIDE)
                x_sum += tile.to(tl.float32)
                tile = load_rows(out_of, out_strides, place, start, channel, present, T, ROWS, PATCH, VOLUME, WIDE)
                grad_sum += tile.to(tl.float32)
            mean = tl.sum(x_sum, 0) / T
            tl.store(means + number * channels + channel, mean, mask=present)
            patch_means = put(patch_means, block, mean, BLOCKS)
            shift = read(output_bias + channel, present).to(tl.float32)
            shifted += grad_sum * shift[None, :]
        score_grad_sum = tl.sum(shifted)
        value = score_of(
            patch_means, score_weight, score_context + image * hidden_units, score_vector, score_bias,
            hidden + number * hidden_units, channels, hidden_units, BLOCKS, CHANNELS, HIDDEN,
        )  # fmt: skip
        attended = (value >= threshold) | (threshold <= 0)
        factor = tl.where(attended, value, 0.0)
        tl.store(factors + number, factor)

        k_at = tokens_at(0, place, k[3], k[4], k[5], TOKENS, PATCH, VOLUME, WIDE)
        v_at = tokens_at(0, place, v[3], v[4], v[5], TOKENS, PATCH, VOLUME, WIDE)
        map_grads = ()  # (R, tokens) of keys and values, of one map after another
        for _ in tl.static_range(2 * MAPS):
            map_grads = map_grads + (tl.zeros([RESIDUAL, TOKENS], tl.float32),)
        along_sums = tl.zeros([ROWS], tl.float32)
        for start in tl.range(0, TOKENS, ROWS, disable_licm=True):
            row_there = row < T - start
            x_at = tokens_at(start, place, x_strides[2], x_strides[3], x_strides[4], ROWS, PATCH, VOLUME, WIDE)
            out_at = tokens_at(start, place, out_strides[2], out_strides[3], out_strides[4], ROWS, PATCH, VOLUME, WIDE)
            for head in tl.range(0, HEADS, disable_licm=True):
                bias_grad = tl.zeros([ROWS, TOKENS], tl.float32)
                for m in tl.range(0, MAPS, disable_licm=True):
                    of = m * HEADS + head
                    query = project(
                        x_of, x_at, row_there, x_strides[1], query_weight, of, channels, residual, 1, channels,
                        ROWS, RESIDUAL, CHANNELS, BLOCKS, WIDE, PRECISION,
                    )  # fmt: skip
                    query += read(query_bias + of * residual + r, r < residual).to(tl.float32)[None, :]
                    key = load_tile(keys + image * k[0] + m * k[1], k_at, there, r_of, r_there, k[2])
                    # For each map again: kept from one to the next, it would be in registers during the projections.
                    bias = position_of(position_bias, head, start, T, ROWS, TOKENS)
                    logits = logits_of(query * (scale * LOG2_E), key, bias, PRECISION)
                    exponentials = tl.exp2(logits - tl.max(logits, 1)[:, None])
                    probability = (exponentials / tl.sum(exponentials, 1)[:, None]).to(D)
                    seen = load_tile(values + image * v[0] + m * v[1], v_at, there, r_of, r_there, v[2])
                    result = tl.dot(probability, seen, input_precision=PRECISION)
                    grad = project(
                        out_of, out_at, row_there, out_strides[1], output_weight, of, channels, residual, residual, 1,
                        ROWS, RESIDUAL, CHANNELS, BLOCKS, WIDE, PRECISION,
                    )  # fmt: skip
                    along = tl.sum(result * grad, 1)
                    along_sums += along
                    # Not a product with 0: below the threshold nothing goes through, what is not finite neither.
                    grad = tl.where(attended, value * grad, 0.0)
                    through = tl.where(attended, value * along, 0.0)
                    kept = (kept_place * T + start) * width + of * RESIDUAL + kept_at
                    tl.store(reads + kept, (factor * result).to(D), mask=row_there[:, None])
                    narrow = grad.to(D)
                    inner = tl.dot(narrow, tl.trans(seen), input_precision=PRECISION)
                    logits_grad = probability.to(tl.float32) * (inner - through[:, None])
                    bias_grad += logits_grad
                    narrow_logits = logits_grad.to(D)
                    query_grad = tl.dot(narrow_logits, key, input_precision=PRECISION) * scale
                    tl.store(query_grads + kept, query_grad.to(D), mask=row_there[:, None])
                    if NEEDED[1]:
                        scaled = tl.trans((query * scale).to(D))
                        key_grad = tl.dot(scaled, narrow_logits, input_precision=PRECISION)
                        value_grad = tl.dot(tl.trans(narrow), probability, input_precision=PRECISION)
                        map_grads = add_at(map_grads, 2 * m, key_grad, 2 * MAPS)
                        map_grads = add_at(map_grads, 2 * m + 1, value_grad, 2 * MAPS)
                if NEEDED[2]:
                    line = (tl.program_id(0) * HEADS + head) * T + start
                    square = row_there[:, None] & there[None, :]
                    add_part(position_parts + line * T + square_at, bias_grad, square, number > tl.program_id(0))
        if NEEDED[1]:
            kg, vg = strides_in(numbers, UNITS, 4, 6), strides_in(numbers, UNITS, 5, 6)
            kg_at = tokens_at(0, place, kg[3], kg[4], kg[5], TOKENS, PATCH, VOLUME, WIDE)
            vg_at = tokens_at(0, place, vg[3], vg[4], vg[5], TOKENS, PATCH, VOLUME, WIDE)
            for m in tl.static_range(MAPS):
                keys_of, values_of = keys_grad + image * kg[0] + m * kg[1], values_grad + image * vg[0] + m * vg[1]
                store_tile(keys_of, tl.trans(map_grads[2 * m]), kg_at, there, r_of, r_there, kg[2])
                store_tile(values_of, tl.trans(map_grads[2 * m + 1]), vg_at, there, r_of, r_there, vg[2])
        score_grad_sum += tl.sum(along_sums, 0)
        logit_grad = tl.where(attended, score_grad_sum, 0.0) + tl.load(score_grad + number).to(tl.float32)
        tl.store(logit_grads + number, logit_grad * value * (1 - value))
        if FUSED:
            # What one lane has written, another one reads; then, after the next barrier, the places are written anew.
            tl.debug_barrier()
            for block in tl.range(0, tl.cdiv(channels, COLUMNS), disable_licm=True):
                _channels_kernel(
                    x, out_grad, query_weight, query_grads, reads, factors, hidden, logit_grads, score_weight,
                    score_vector, unit_grads, vector_parts, x_grad, weights_parts, (number, block, tl.program_id(0)),
                    numbers, UNITS, (0, 3, 6), patches, grid, channels, residual, hidden_units, PATCH, VOLUME, T,
                    TOKENS, ROWS, RESIDUAL, MAPS * HEADS, STACK, HIDDEN, COLUMNS, WIDE, PRECISION, NEEDED[0], NEEDED[3],
                    1,
                )  # fmt: skip
        if NEEDED[2] or FUSED:  # the next patch adds to what other lanes have stored in the sums
            tl.debug_barrier()


def backward(
    out_grad: Tensor, score_grad: Tensor, x: Tensor, keys: Tensor, values: Tensor, weights: Any, patch: int,
    threshold: float, needed: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the twelve tensors, None where not needed."""
    launch = Launch(x, weights, patch)
    if not launch.patches:
        tensors = x, keys, values, *weights
        return [torch.zeros_like(one) if wanted else None for one, wanted in zip(tensors, needed, strict=True)]
    batch, channels = x.shape[:2]
    maps, heads, residual, _ = weights.query_weight.shape
    count, patches, tokens = maps * heads, launch.patches, launch.tokens
    need_x, need_maps, need_position = bool(needed[0]), any(needed[1:3]), bool(needed[5])
    need_weights = any(needed[index] for index in (3, 4, 6, 7))
    need_channels = need_x or need_weights or any(needed[8:])  # what follows from dQ and O, and from the score

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    # What is not wanted gets a tensor that no kernel touches: a pointer of the right type.
    x_grad = torch.empty_like(x) if need_x else x
    keys_grad, values_grad = (torch.empty_like(one) if need_maps else one for one in (keys, values))
    means, factors, logit_grads = new(patches, channels), new(patches), new(patches, 1)
    hidden, unit_grads, vector_parts = (new(patches, len(weights.score_weight)) for _ in range(3))
    programs, fused, splits = launch.plan_backward(x.device)
    fused &= need_channels
    kept = programs if fused else patches, tokens, count * launch.blocks["RESIDUAL"]
    query_grads, reads = (new(*kept, dtype=x.dtype) for _ in range(2))
    position_parts = new(programs if need_position else 1, heads * tokens * tokens)
    sizes = [count * residual * channels] * 2 + [count * residual, channels]
    split_parts = tuple(new(splits if need_weights else 1, size) for size in sizes)
    tensors = x, keys, values, out_grad, keys_grad, values_grad, x_grad
    _patches_kernel[(programs,)](
        x, keys, values, *weights, out_grad, score_grad, keys_grad, values_grad, query_grads, reads,
        position_parts, means, factors, hidden, logit_grads, unit_grads, vector_parts, x_grad, split_parts,
        *strides_of(tensors, launch.dims), patches, threshold, *launch.sizes, WIDE=any(map(is_wide, tensors)),
        FUSED=fused, NEEDED=(fused and need_x, need_maps, need_position, fused and need_weights),
        **launch.backward_blocks, **launch.options("patches"),
    )  # fmt: skip
    if need_channels and not fused:
        tensors = x, out_grad, x_grad
        settings = {name: value for name, value in launch.backward_blocks.items() if name in _channels_kernel.arg_names}
        _channels_kernel[(-(-channels // launch.most_channels), splits)](
            x, out_grad, weights.query_weight, query_grads, reads, factors, hidden, logit_grads, weights.score_weight,
            weights.score_vector, unit_grads, vector_parts, x_grad, split_parts, None,
            *strides_of(tensors, launch.dims), (0, 1, 2), patches, *launch.sizes[1:], COUNT=count,
            WIDE=any(map(is_wide, tensors)), NEED_X=need_x, NEED_WEIGHTS=need_weights, **launch.options("channels"),
            **settings,
        )  # fmt: skip
    grads = [x_grad, keys_grad, values_grad, *(torch.empty_like(one) for one in weights)]
    # Of the weights in their order: what is summed, and into how many rows; those of score_weight are a product.
    query, output, query_bias, output_bias = split_parts
    parts = query, query_bias, position_parts, output, output_bias, None, unit_grads, vector_parts, logit_grads
    rows = 1, 1, 1, 1, 1, 1, batch, 1, 1
    pairs = [
        (part, grad.view(row, -1))
        for part, grad, row, wanted in zip(parts, grads[3:], rows, needed[3:], strict=True)
        if wanted and part is not None and part.numel()
    ]
    if pairs:
        add_rows(pairs)
    if needed[8]:
        grads[8] = torch.mm(*unrounded(unit_grads.T, means)).to(weights.score_weight.dtype)
    return [grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)]
