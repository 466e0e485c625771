"""What the backward of patch cross-attention makes of dQ and score O, for a block of channels and some patches:

    dX = dOut + dQ Wq + what the means add;  dWq += X dQ;  dWo += dOut (score O)

Where channels are few, the program that made dQ goes on with them; where they are many, programs that share them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .patches import channels_of, load_kept, load_rows, place_of, read, store_tile, strides_in, tokens_at


@triton.jit
def add_part(at, value, mask, again):
    """To a program's own sums, which stay in a cache; the first time there are none."""
    tl.store(at, read(at, mask & again) + value, mask=mask)


@triton.jit
def _channels_kernel(
    x, out_grad,  # (B, C, *S) twice
    query_weight,  # (M, h, R, C), dense
    query_grads, reads, factors,  # (places, T, M * h * RESIDUAL) twice, (patches,): as _patches_kernel left them
    hidden, logit_grads, score_weight, score_vector,  # (patches, H), (patches,), (H, C), (H,), dense
    unit_grads, vector_parts,  # (patches, H) twice, dense: of the hidden units and, to be summed, of score_vector
    x_grad,  # (B, C, *S)
    weights_parts,  # (parts, M, h, R, C), (parts, M, h, C, R), (parts, M, h, R), (parts, C), dense: also of the biases
    own,  # patch, block of channels, and place and part of a program that goes on; None where this is a launch
    numbers, UNITS: tl.constexpr, STRIDES: tl.constexpr,  # see strides_in; which are those of x, out_grad and x_grad
    patches, grid, channels, residual, hidden_units,
    PATCH: tl.constexpr, VOLUME: tl.constexpr, T: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr, COUNT: tl.constexpr, STACK: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    NEED_X: tl.constexpr, NEED_WEIGHTS: tl.constexpr, PASSES: tl.constexpr,  # gradients of both; one pass, or one each
):  # fmt: skip
    D: tl.constexpr = x.dtype.element_ty
    x_strides, out_strides = strides_in(numbers, UNITS, STRIDES[0], 5), strides_in(numbers, UNITS, STRIDES[1], 5)
    g = strides_in(numbers, UNITS, STRIDES[2], 5)
    if own is not None:
        first, block, part = own
        step, count = 0, 1
    else:  # from where _patches_kernel ended, which is still in a cache
        block, part, step = tl.program_id(0), tl.program_id(1), -tl.num_programs(1)
        first, count = patches - 1 - part, tl.cdiv(patches - part, tl.num_programs(1))
    column = tl.arange(0, STACK * RESIDUAL)
    of, r = column // RESIDUAL, column % RESIDUAL
    r_there = (column < COUNT * RESIDUAL) & (r < residual)
    channel, present = channels_of(block, channels, COLUMNS, WIDE)
    weights_at = channel[:, None] + ((of * residual + r) * channels)[None, :]
    weights_mask = present[:, None] & r_there[None, :]
    query_weight_grad = tl.zeros([COLUMNS, STACK * RESIDUAL], tl.float32)
    output_weight_grad = tl.zeros([COLUMNS, STACK * RESIDUAL], tl.float32)
    query_bias_grad = tl.zeros([STACK * RESIDUAL], tl.float32)
    output_bias_grad = tl.zeros([COLUMNS], tl.float32)
    for one in tl.range(0, count, disable_licm=True):
        number = first + one * step
        kept_place = number if own is None else part
        image, place = place_of(number, grid, PATCH, VOLUME)
        x_of, out_of = x + image * x_strides[0], out_grad + image * out_strides[0]
        mean_grad = tl.zeros([COLUMNS], tl.float32)
        for unit_start in tl.range(0, hidden_units, HIDDEN, disable_licm=True):
            unit = unit_start + tl.arange(0, HIDDEN)
            there, unit_at = unit < hidden_units, number * hidden_units + unit
            before, logit_grad = read(hidden + unit_at, there), tl.load(logit_grads + number)
            vector = read(score_vector + unit, there).to(tl.float32)
            # Written so that NaN goes through.
            unit_grad = tl.where(before <= 0, 0.0, logit_grad * vector)
            vector_part = logit_grad * tl.where(before <= 0, 0.0, before)
            tl.store(unit_grads + unit_at, unit_grad, mask=there & (block == 0))
            tl.store(vector_parts + unit_at, vector_part, mask=there & (block == 0))
            if NEED_X:
                weight_at = score_weight + unit[:, None] * channels + channel[None, :]
                weight = read(weight_at, there[:, None] & present[None, :]).to(tl.float32)
                mean_grad += tl.sum(unit_grad[:, None] * weight, 0) / T
        for which in tl.static_range(PASSES):
            for start in tl.range(0, TOKENS, ROWS, disable_licm=True):
                query_grad = load_kept(query_grads, kept_place, start, column, T, ROWS, COUNT * RESIDUAL)
                grad = load_rows(out_of, out_strides, place, start, channel, present, T, ROWS, PATCH, VOLUME, WIDE)
                if NEED_WEIGHTS and which == 0:
                    tile = load_rows(x_of, x_strides, place, start, channel, present, T, ROWS, PATCH, VOLUME, WIDE)
                    query_weight_grad = tl.dot(tl.trans(tile), query_grad, query_weight_grad, input_precision=PRECISION)
                    query_bias_grad += tl.sum(query_grad.to(tl.float32), 0)
                    attended = load_kept(reads, kept_place, start, column, T, ROWS, COUNT * RESIDUAL)
                    output_weight_grad = tl.dot(tl.trans(grad), attended, output_weight_grad, input_precision=PRECISION)
                    output_bias_grad += tl.load(factors + number) * tl.sum(grad.to(tl.float32), 0)
                if NEED_X and which == PASSES - 1:
                    weights = read(query_weight + weights_at, weights_mask).to(D)
                    total = tl.trans(tl.dot(weights, tl.trans(query_grad), input_precision=PRECISION))
                    total += grad.to(tl.float32) + mean_grad[None, :]
                    at = tokens_at(start, place, g[2], g[3], g[4], ROWS, PATCH, VOLUME, WIDE)
                    there = tl.arange(0, ROWS) < T - start
                    store_tile(x_grad + image * g[0], total, at, there, channel, present, g[1])
    if NEED_WEIGHTS:
        before, again = part.to(tl.int64) * COUNT * residual * channels, (own is not None) & (first > part)
        add_part(weights_parts[0] + before + weights_at, query_weight_grad, weights_mask, again)
        output_at = (channel * residual)[:, None] + (of * channels * residual + r)[None, :]
        add_part(weights_parts[1] + before + output_at, output_weight_grad, weights_mask, again)
        bias_at = weights_parts[2] + part * COUNT * residual + of * residual + r
        add_part(bias_at, query_bias_grad, r_there & (block == 0), again)
        add_part(weights_parts[3] + part * channels + channel, output_bias_grad, present, again)
