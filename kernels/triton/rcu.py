"""Patch cross-attention with importance scoring, forward and backward; what it means: grcsf_fast/reference.py.

A program takes some groups of neighbouring patches, one group after another. Up to 128 channels and 64 tokens a patch
("resident") all of a group stays in registers between its score, its attention and its scaling, so that x is read once,
and the weights once a program; larger ones go in blocks of channels and of query tokens, and x is read again for each
use. A group is one patch, or as many as it takes for a row of them to fill 32 bytes, the least that memory moves.

Products run on the matrix units in the dtype of x with sums in float32; float32 itself as three tf32 products, which
keeps float32's accuracy. The softmax is base 2: log2(e) is folded into the queries' scale and into the position bias.

Gradients of the weights are summed by each program over its patches and then over the programs, in order: no atomics,
the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Block", "backward", "block_of", "forward"]

LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True)
class Block:
    """Block shape of a kernel; every number is a power of two.

    Args:
        group: neighbouring patches that are loaded together.
        queries: query tokens of a block.
        keys: key tokens, all of a patch.
        channels: channels of a block.
        scorer: hidden units of the scorer, all of them.
        warps: of a program.
    """

    group: int
    queries: int
    keys: int
    channels: int
    scorer: int
    warps: int


def block_of(channels: int, patch: int, dims: int, itemsize: int, scorer: int) -> Block:
    """The table of block shapes.

    The logits of a block are at most 8192 numbers, and so are a block of x (128 channels of 64 tokens) and of the
    scorer's weights: 32 registers of a thread each with 8 warps, of which a backward needs about five.
    """
    tokens = patch**dims
    keys = max(16, triton.next_power_of_2(tokens))
    queries = keys if keys <= 64 else max(16, 8192 // keys)
    group = min(4, max(1, 32 // (patch * itemsize))) if keys == tokens and keys <= 64 else 1
    hidden = max(16, triton.next_power_of_2(scorer))
    limit = min(8192 // queries, max(16, 8192 // hidden))
    return Block(group, queries, keys, min(max(16, triton.next_power_of_2(channels)), limit), hidden, 8)


@triton.jit
def _of_patches(columns, GROUP: tl.constexpr, PATCH: tl.constexpr):
    """(N, columns of a group) to a tuple of (N, tokens), a patch each."""
    N: tl.constexpr = columns.shape[0]
    TOKENS: tl.constexpr = columns.shape[1] // GROUP
    if GROUP == 1:
        patches = (columns,)
    else:
        parts = tl.permute(tl.reshape(columns, [N, TOKENS // PATCH, GROUP, PATCH]), (0, 1, 3, 2))
        if GROUP == 2:
            patches = tl.split(tl.reshape(parts, [N, TOKENS, 2]))
        else:
            first, second = tl.split(tl.reshape(parts, [N, TOKENS, 2, 2]))
            zero, two = tl.split(first)
            one, three = tl.split(second)
            patches = (zero, one, two, three)
    return patches


@triton.jit
def _of_group(patches, GROUP: tl.constexpr, PATCH: tl.constexpr):
    """The inverse of :func:`_of_patches`."""
    if GROUP == 1:
        columns = patches[0]
    else:
        N: tl.constexpr = patches[0].shape[0]
        TOKENS: tl.constexpr = patches[0].shape[1]
        if GROUP == 2:
            joined = tl.join(patches[0], patches[1])
        else:
            joined = tl.join(tl.join(patches[0], patches[2]), tl.join(patches[1], patches[3]))
        parts = tl.permute(tl.reshape(joined, [N, TOKENS // PATCH, PATCH, GROUP]), (0, 1, 3, 2))
        columns = tl.reshape(parts, [N, TOKENS * GROUP])
    return columns


@triton.jit
def _sums_of_patches(columns, GROUP: tl.constexpr, PATCH: tl.constexpr):
    """(N, columns of a group) to a tuple of (N,), the sums over a patch."""
    patches = _of_patches(columns, GROUP, PATCH)
    sums = ()
    for one in tl.static_range(GROUP):
        sums = sums + (tl.sum(patches[one], 1),)
    return sums


@triton.jit
def _spread(numbers, COUNT: tl.constexpr, GROUP: tl.constexpr, PATCH: tl.constexpr):
    """A tuple of scalars, one a patch, as one number a column."""
    which = tl.arange(0, COUNT) // PATCH % GROUP
    spread = tl.where(which == 0, numbers[0], 0.0)
    for one in tl.static_range(1, GROUP):
        spread = tl.where(which == one, numbers[one], spread)
    return spread


@triton.jit
def _columns(
    start, first, along, height, width,
    GROUP: tl.constexpr, PATCH: tl.constexpr, DIMS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Offsets of ``COUNT`` columns from the group's first pixel, and which of them there are.

    Columns of a group run along its rows: row of the patch, patch, pixel of the row. ``first`` is the number of the
    group's first patch in its row of ``along`` patches.
    """
    column = start + tl.arange(0, COUNT)
    which = column // PATCH % GROUP
    token = column // (GROUP * PATCH) * PATCH + column % PATCH
    TOKENS: tl.constexpr = PATCH * PATCH if DIMS == 2 else PATCH * PATCH * PATCH
    if GROUP == 1:
        which = tl.zeros_like(column)
        token = column
    there = token < TOKENS
    token = tl.where(there, token, 0)
    offset = token // PATCH % PATCH * width + token % PATCH + which * PATCH
    if DIMS == 3:
        offset += token // (PATCH * PATCH) * height * width
    return offset, there & (first + which < along)


@triton.jit
def _at(channel, channels, stride, offset, present, WIDE: tl.constexpr):
    """Offsets and mask of (channels, columns); in 64 bits where an image has 2^31 numbers or more."""
    rows = channel * stride
    if WIDE:
        rows = channel.to(tl.int64) * stride
    return rows[:, None] + offset[None, :], (channel < channels)[:, None] & present[None, :]


@triton.jit
def _load(tensor, channel, channels, stride, offset, present, WIDE: tl.constexpr):
    """(channels, columns) as stored; 0 where there is nothing."""
    at, mask = _at(channel, channels, stride, offset, present, WIDE)
    return tl.load(tensor + at, mask=mask, other=0.0)


@triton.jit
def _store(tensor, value, channel, channels, stride, offset, present, WIDE: tl.constexpr):
    at, mask = _at(channel, channels, stride, offset, present, WIDE)
    tl.store(tensor + at, value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _query_weights(
    query_weight, residual, channel, channels, COUNT: tl.constexpr, RESIDUAL: tl.constexpr, DTYPE: tl.constexpr
):
    """A tuple of (channels, R), one a map and a head."""
    r = tl.arange(0, RESIDUAL)
    mask = (r < residual)[None, :] & (channel < channels)[:, None]
    weights = ()
    for i in tl.static_range(COUNT):
        at = (i * residual + r)[None, :] * channels + channel[:, None]
        weights = weights + (tl.load(query_weight + at, mask=mask, other=0.0).to(DTYPE),)
    return weights


@triton.jit
def _query_biases(query_bias, residual, COUNT: tl.constexpr, RESIDUAL: tl.constexpr):
    """A tuple of (1, R), one a map and a head."""
    r = tl.arange(0, RESIDUAL)
    biases = ()
    for i in tl.static_range(COUNT):
        biases = biases + (
            tl.load(query_bias + i * residual + r, mask=r < residual, other=0.0).to(tl.float32)[None, :],
        )
    return biases


@triton.jit
def _output_weights(
    output_weight, residual, channel, channels, COUNT: tl.constexpr, RESIDUAL: tl.constexpr, DTYPE: tl.constexpr
):
    """A tuple of (R, channels), one a map and a head."""
    r = tl.arange(0, RESIDUAL)
    mask = (r < residual)[:, None] & (channel < channels)[None, :]
    weights = ()
    for i in tl.static_range(COUNT):
        at = (i * channels + channel)[None, :] * residual + r[:, None]
        weights = weights + (tl.load(output_weight + at, mask=mask, other=0.0).to(DTYPE),)
    return weights


@triton.jit
def _position_biases(
    position_bias, start, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TOKENS: tl.constexpr
):
    """A tuple of (queries, keys), one a head, in units of log2; minus infinity for keys that are none."""
    query, key = start + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    mask = (query < TOKENS)[:, None] & (key < TOKENS)[None, :]
    biases = ()
    for head in tl.static_range(HEADS):
        at = (head * TOKENS + query)[:, None] * TOKENS + key[None, :]
        bias = tl.load(position_bias + at, mask=mask, other=0.0).to(tl.float32) * LOG2_E
        biases = biases + (tl.where((key < TOKENS)[None, :], bias, float("-inf")),)
    return biases


@triton.jit
def _score_weights(score_weight, channel, channels, scorer, SCORER: tl.constexpr):
    """(scorer, channels) in float32."""
    s = tl.arange(0, SCORER)
    mask = (s < scorer)[:, None] & (channel < channels)[None, :]
    return tl.load(score_weight + s[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _place(group, depth, height, width, GROUP: tl.constexpr, PATCH: tl.constexpr, DIMS: tl.constexpr):
    """Image, number of the group's first patch in the image and in its row, offset of its first pixel in a channel."""
    along, down = width // PATCH, height // PATCH
    groups = tl.cdiv(along, GROUP)
    first = group % groups * GROUP
    row = group // groups
    y = row % down
    if DIMS == 3:
        deep = depth // PATCH
        z = row // down % deep
        image = row // (down * deep)
        patch = (z * down + y) * along + first
        origin = (z * PATCH * height + y * PATCH) * width + first * PATCH
    else:
        image = row // down
        patch = y * along + first
        origin = y * PATCH * width + first * PATCH
    return image.to(tl.int64), patch, first, origin


@triton.jit
def _means(
    x_at, tile, channel, channels, pixels, first, along, height, width,
    GROUP: tl.constexpr, PATCH: tl.constexpr, DIMS: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A tuple of the channels' means, one a patch; ``tile`` holds the first block of tokens."""
    sums = _sums_of_patches(tile.to(tl.float32), GROUP, PATCH)
    if TOKENS > QUERIES:
        total = sums[0]
        for start in range(QUERIES, TOKENS, QUERIES):
            offset, present = _columns(start, first, along, height, width, GROUP, PATCH, DIMS, QUERIES)
            total += tl.sum(_load(x_at, channel, channels, pixels, offset, present, WIDE).to(tl.float32), 1)
        sums = (total,)
    means = ()
    for one in tl.static_range(GROUP):
        means = means + (sums[one] / TOKENS,)
    return means


@triton.jit
def _hidden(hidden, means, weights, GROUP: tl.constexpr):
    """Adds the part of some channels to the scorer's hidden layer, a tuple with an entry a patch."""
    added = ()
    for one in tl.static_range(GROUP):
        added = added + (hidden[one] + tl.sum(weights * means[one][None, :], 1),)
    return added


@triton.jit
def _score(hidden, vector, bias):
    # Written so that NaN goes through.
    activation = tl.where(hidden < 0, 0.0, hidden)
    return 1 / (1 + tl.exp(-(tl.sum(activation * vector, 0) + bias)))


@triton.jit
def _copies(tensor, COUNT: tl.constexpr):
    """The same tensor ``COUNT`` times, as a tuple."""
    copies = ()
    for _ in tl.static_range(COUNT):
        copies = copies + (tensor,)
    return copies


@triton.jit
def _dot_twice(wide, narrow, sums, PRECISION: tl.constexpr):
    """Adds to ``sums`` the product of a float32 tensor that was computed here and one in the dtype of x.

    In half precision the first goes in two parts, itself rounded and the rest, so that it does not lose half of its
    digits; float32 goes as it is.
    """
    if narrow.dtype == tl.float32:
        sums = tl.dot(wide, narrow, acc=sums, input_precision=PRECISION)
    else:
        rounded = wide.to(narrow.dtype)
        sums = tl.dot(rounded, narrow, acc=sums)
        sums = tl.dot((wide - rounded.to(tl.float32)).to(narrow.dtype), narrow, acc=sums)
    return sums


@triton.jit
def _replaced(items, PLACE: tl.constexpr, item):
    """A tuple with another item at a place."""
    return items[:PLACE] + (item,) + items[PLACE + 1 :]


@triton.jit
def _maps(
    tensor, first, residual, pixels, offset, present, MAPS: tl.constexpr, RESIDUAL: tl.constexpr, WIDE: tl.constexpr
):
    """Keys or values of all maps: a tuple of (R, columns)."""
    r = tl.arange(0, RESIDUAL)
    tiles = ()
    for m in tl.static_range(MAPS):
        at = first + (first * 0 + m) * residual * pixels  # in 64 bits, as ``first`` is
        tiles = tiles + (_load(tensor + at, r, residual, pixels, offset, present, WIDE),)
    return tiles


@triton.jit
def _products(sums, tile, weights, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    """Adds tile' weight to each of some sums: (columns, R) from (channels, columns) and (channels, R)."""
    added = ()
    for i in tl.static_range(COUNT):
        added = added + (tl.dot(tl.trans(tile), weights[i], acc=sums[i], input_precision=PRECISION),)
    return added


@triton.jit
def _attend(
    queries, biases, key_tiles, value_tiles, positions, logit_scale,
    MAPS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, PATCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What every map and head reads from the values: a tuple of (columns, R) in the dtype of the keys."""
    read = ()
    for i in tl.static_range(MAPS * HEADS):
        scaled = ((queries[i] + biases[i]) * (logit_scale * LOG2_E)).to(key_tiles[0].dtype)
        query = _of_patches(tl.trans(scaled), GROUP, PATCH)
        key = _of_patches(key_tiles[i // HEADS], GROUP, PATCH)
        value = _of_patches(value_tiles[i // HEADS], GROUP, PATCH)
        patches = ()
        for one in tl.static_range(GROUP):
            logits = tl.dot(tl.trans(query[one]), key[one], input_precision=PRECISION) + positions[i % HEADS]
            exponentials = tl.exp2(logits - tl.max(logits, 1)[:, None])
            sums = tl.sum(exponentials, 1)
            attended = tl.dot(exponentials.to(value[one].dtype), tl.trans(value[one]), input_precision=PRECISION)
            patches = patches + (tl.trans((attended / sums[:, None]).to(value[one].dtype)),)
        read = read + (tl.trans(_of_group(patches, GROUP, PATCH)),)
    return read


@triton.jit
def _forward_kernel(
    x, keys, values, query_weight, query_bias, position_bias, output_weight, output_bias,
    score_weight, score_context, score_vector, score_bias, out, score,
    threshold, groups, groups_a_program, channels, residual, scorer, depth, height, width_units, logit_scale,
    MAPS: tl.constexpr, HEADS: tl.constexpr, RESIDUAL: tl.constexpr, PATCH: tl.constexpr, DIMS: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr,
    SCORER: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = PATCH * PATCH if DIMS == 2 else PATCH * PATCH * PATCH
    COUNT: tl.constexpr = MAPS * HEADS
    COLUMNS: tl.constexpr = QUERIES * GROUP
    RESIDENT: tl.constexpr = TOKENS <= QUERIES and CHUNKS == 1
    DTYPE: tl.constexpr = x.dtype.element_ty
    width = width_units * UNIT  # so that the compiler knows how rows are aligned
    along = width // PATCH
    pixels = height * width
    patches = along * (height // PATCH)
    if DIMS == 3:
        pixels = pixels * depth
        patches = patches * (depth // PATCH)
    block = tl.arange(0, CHANNELS)
    unit = tl.arange(0, SCORER)

    vector = tl.load(score_vector + unit, mask=unit < scorer, other=0.0).to(tl.float32)
    bias = tl.load(score_bias).to(tl.float32)
    query_biases = _query_biases(query_bias, residual, COUNT, RESIDUAL)
    if RESIDENT:
        query_weights = _query_weights(query_weight, residual, block, channels, COUNT, RESIDUAL, DTYPE)
        output_weights = _output_weights(output_weight, residual, block, channels, COUNT, RESIDUAL, DTYPE)
        output_biases = tl.load(output_bias + block, mask=block < channels, other=0.0).to(tl.float32)
        positions = _position_biases(position_bias, 0, HEADS, QUERIES, KEYS, TOKENS)
        score_weights = _score_weights(score_weight, block, channels, scorer, SCORER)

    begin = tl.program_id(0) * groups_a_program
    for group in range(begin, tl.minimum(begin + groups_a_program, groups)):
        image, patch, first, origin = _place(group, depth, height, width, GROUP, PATCH, DIMS)
        x_at = x + (image * channels * pixels + origin)
        out_at = out + (image * channels * pixels + origin)
        map_at = image * (MAPS * residual) * pixels + origin
        offset, present = _columns(0, first, along, height, width, GROUP, PATCH, DIMS, COLUMNS)

        context = tl.load(score_context + image * scorer + unit, mask=unit < scorer, other=0.0).to(tl.float32)
        hidden = _copies(context, GROUP)
        for chunk in tl.static_range(CHUNKS):
            scored = chunk * CHANNELS + block
            x_tile = _load(x_at, scored, channels, pixels, offset, present, WIDE)
            means = _means(
                x_at, x_tile, scored, channels, pixels, first, along, height, width,
                GROUP, PATCH, DIMS, QUERIES, TOKENS, WIDE,
            )  # fmt: skip
            if RESIDENT:
                hidden = _hidden(hidden, means, score_weights, GROUP)
            else:
                hidden = _hidden(hidden, means, _score_weights(score_weight, scored, channels, scorer, SCORER), GROUP)
        factors = ()
        wanted = first < 0
        for one in tl.static_range(GROUP):
            value = _score(hidden[one], vector, bias)
            attended = (value >= threshold) | (threshold <= 0)
            tl.store(score + (image * patches + patch + one), value, mask=first + one < along)
            factors = factors + (tl.where(attended, value, float("-inf")),)
            wanted = wanted | (attended & (first + one < along))

        if wanted:
            factor = _spread(factors, COLUMNS, GROUP, PATCH)[None, :]
            map_offset, map_present = _columns(0, first, along, height, width, GROUP, PATCH, DIMS, KEYS * GROUP)
            key_tiles = _maps(keys, map_at, residual, pixels, map_offset, map_present, MAPS, RESIDUAL, WIDE)
            value_tiles = _maps(values, map_at, residual, pixels, map_offset, map_present, MAPS, RESIDUAL, WIDE)
            for start in range(0, TOKENS, QUERIES):
                block_offset, block_present = _columns(start, first, along, height, width, GROUP, PATCH, DIMS, COLUMNS)
                queries = _copies(tl.zeros([COLUMNS, RESIDUAL], tl.float32), COUNT)
                if RESIDENT:
                    queries = _products(queries, x_tile, query_weights, COUNT, PRECISION)
                    biases = positions
                else:
                    for chunk in tl.static_range(CHUNKS):
                        asked = chunk * CHANNELS + block
                        queries = _products(
                            queries, _load(x_at, asked, channels, pixels, block_offset, block_present, WIDE),
                            _query_weights(query_weight, residual, asked, channels, COUNT, RESIDUAL, DTYPE),
                            COUNT, PRECISION,
                        )  # fmt: skip
                    biases = _position_biases(position_bias, start, HEADS, QUERIES, KEYS, TOKENS)
                read = _attend(
                    queries, query_biases, key_tiles, value_tiles, biases, logit_scale,
                    MAPS, HEADS, GROUP, PATCH, PRECISION,
                )  # fmt: skip
                for chunk in tl.static_range(CHUNKS):
                    channel = chunk * CHANNELS + block
                    if RESIDENT:
                        tile = x_tile
                        weights = output_weights
                        shift = output_biases
                    else:
                        tile = _load(x_at, channel, channels, pixels, block_offset, block_present, WIDE)
                        weights = _output_weights(output_weight, residual, channel, channels, COUNT, RESIDUAL, DTYPE)
                        shift = tl.load(output_bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
                    update = tl.zeros([COLUMNS, CHANNELS], tl.float32)
                    for i in tl.static_range(COUNT):
                        update = tl.dot(read[i], weights[i], acc=update, input_precision=PRECISION)
                    before = tile.to(tl.float32)
                    after = before + factor * (tl.trans(update) + shift[:, None])
                    # Not a product with 0: a skipped patch passes x on even where its update is not finite.
                    after = tl.where(factor == float("-inf"), before, after)
                    _store(out_at, after, channel, channels, pixels, block_offset, block_present, WIDE)
        else:
            for start in range(0, TOKENS, QUERIES):
                skip_offset, skip_present = _columns(start, first, along, height, width, GROUP, PATCH, DIMS, COLUMNS)
                for chunk in tl.static_range(CHUNKS):
                    channel = chunk * CHANNELS + block
                    if RESIDENT:
                        tile = x_tile
                    else:
                        tile = _load(x_at, channel, channels, pixels, skip_offset, skip_present, WIDE)
                    _store(out_at, tile, channel, channels, pixels, skip_offset, skip_present, WIDE)


@triton.jit
def _add_to(part, at, mask, value):
    """Adds to numbers that no other program touches; the barrier lets each thread see what another one stored."""
    tl.store(part + at, tl.load(part + at, mask=mask, other=0.0) + value, mask=mask)
    tl.debug_barrier()


@triton.jit
def _backward_kernel(
    x, keys, values, query_weight, query_bias, position_bias, output_weight, output_bias,
    score_weight, score_context, score_vector, score_bias, out_grad, score_grad,
    x_grad, keys_grad, values_grad, query_weight_parts, query_bias_parts, position_parts, output_weight_parts,
    output_bias_parts, logit_grad, means_of_patches,
    threshold, groups, groups_a_program, channels, residual, scorer, depth, height, width_units, logit_scale,
    MAPS: tl.constexpr, HEADS: tl.constexpr, RESIDUAL: tl.constexpr, PATCH: tl.constexpr, DIMS: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr,
    SCORER: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    NEED_X: tl.constexpr, NEED_MAPS: tl.constexpr, NEED_WEIGHTS: tl.constexpr, NEED_POSITION: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = PATCH * PATCH if DIMS == 2 else PATCH * PATCH * PATCH
    COUNT: tl.constexpr = MAPS * HEADS
    COLUMNS: tl.constexpr = QUERIES * GROUP
    RESIDENT: tl.constexpr = TOKENS <= QUERIES and CHUNKS == 1
    DTYPE: tl.constexpr = x.dtype.element_ty
    width = width_units * UNIT
    along = width // PATCH
    pixels = height * width
    patches = along * (height // PATCH)
    if DIMS == 3:
        pixels = pixels * depth
        patches = patches * (depth // PATCH)
    block = tl.arange(0, CHANNELS)
    unit = tl.arange(0, SCORER)
    r = tl.arange(0, RESIDUAL)
    program = tl.program_id(0)

    vector = tl.load(score_vector + unit, mask=unit < scorer, other=0.0).to(tl.float32)
    bias = tl.load(score_bias).to(tl.float32)
    query_biases = _query_biases(query_bias, residual, COUNT, RESIDUAL)
    if RESIDENT:
        query_weights = _query_weights(query_weight, residual, block, channels, COUNT, RESIDUAL, DTYPE)
        output_weights = _output_weights(output_weight, residual, block, channels, COUNT, RESIDUAL, DTYPE)
        positions = _position_biases(position_bias, 0, HEADS, QUERIES, KEYS, TOKENS)
        score_weights = _score_weights(score_weight, block, channels, scorer, SCORER)
        output_biases = tl.load(output_bias + block, mask=block < channels, other=0.0).to(tl.float32)

    # This program's sums; those of the weights stay in registers where all channels do.
    weight_parts = program.to(tl.int64) * COUNT * channels * residual
    query_weight_sums = _copies(tl.zeros([CHANNELS, RESIDUAL], tl.float32), COUNT)
    output_weight_sums = _copies(tl.zeros([CHANNELS, RESIDUAL], tl.float32), COUNT)
    position_sums = _copies(tl.zeros([QUERIES, KEYS], tl.float32), HEADS)
    query_bias_sums = _copies(tl.zeros([RESIDUAL], tl.float32), COUNT)
    output_bias_sum = tl.zeros([CHANNELS], tl.float32)

    begin = program * groups_a_program
    for group in range(begin, tl.minimum(begin + groups_a_program, groups)):
        image, patch, first, origin = _place(group, depth, height, width, GROUP, PATCH, DIMS)
        x_base = image * channels * pixels + origin
        map_at = image * (MAPS * residual) * pixels + origin
        offset, present = _columns(0, first, along, height, width, GROUP, PATCH, DIMS, COLUMNS)

        context = tl.load(score_context + image * scorer + unit, mask=unit < scorer, other=0.0).to(tl.float32)
        hidden = _copies(context, GROUP)
        for chunk in tl.static_range(CHUNKS):
            scored = chunk * CHANNELS + block
            x_tile = _load(x + x_base, scored, channels, pixels, offset, present, WIDE)
            means = _means(
                x + x_base, x_tile, scored, channels, pixels, first, along, height, width,
                GROUP, PATCH, DIMS, QUERIES, TOKENS, WIDE,
            )  # fmt: skip
            for one in tl.static_range(GROUP):
                mean_at = (image * patches + patch + one) * channels + scored
                tl.store(means_of_patches + mean_at, means[one], mask=(scored < channels) & (first + one < along))
            if RESIDENT:
                hidden = _hidden(hidden, means, score_weights, GROUP)
            else:
                hidden = _hidden(hidden, means, _score_weights(score_weight, scored, channels, scorer, SCORER), GROUP)
        scores = ()
        factors = ()
        attends = ()
        score_grads = ()
        for one in tl.static_range(GROUP):
            value = _score(hidden[one], vector, bias)
            attended = (value >= threshold) | (threshold <= 0)
            scores = scores + (value,)
            factors = factors + (tl.where(attended, value, 0.0),)
            attends = attends + (attended,)
            score_grads = score_grads + (
                tl.load(score_grad + (image * patches + patch + one), mask=first + one < along, other=0.0),
            )
        map_offset, map_present = _columns(0, first, along, height, width, GROUP, PATCH, DIMS, KEYS * GROUP)
        key_tiles = _maps(keys, map_at, residual, pixels, map_offset, map_present, MAPS, RESIDUAL, WIDE)
        value_tiles = _maps(values, map_at, residual, pixels, map_offset, map_present, MAPS, RESIDUAL, WIDE)
        key_sums = _copies(tl.zeros([KEYS, RESIDUAL], tl.float32), MAPS * GROUP)
        value_sums = _copies(tl.zeros([KEYS, RESIDUAL], tl.float32), MAPS * GROUP)

        for start in range(0, TOKENS, QUERIES):
            block_offset, block_present = _columns(start, first, along, height, width, GROUP, PATCH, DIMS, COLUMNS)
            queries = _copies(tl.zeros([COLUMNS, RESIDUAL], tl.float32), COUNT)
            read_grads = _copies(tl.zeros([COLUMNS, RESIDUAL], tl.float32), COUNT)
            for chunk in tl.static_range(CHUNKS):
                asked = chunk * CHANNELS + block
                grad_tile = _load(out_grad + x_base, asked, channels, pixels, block_offset, block_present, WIDE)
                if RESIDENT:
                    queries = _products(queries, x_tile, query_weights, COUNT, PRECISION)
                    ask_weights = output_weights
                    ask_biases = output_biases
                else:
                    queries = _products(
                        queries, _load(x + x_base, asked, channels, pixels, block_offset, block_present, WIDE),
                        _query_weights(query_weight, residual, asked, channels, COUNT, RESIDUAL, DTYPE),
                        COUNT, PRECISION,
                    )  # fmt: skip
                    ask_weights = _output_weights(output_weight, residual, asked, channels, COUNT, RESIDUAL, DTYPE)
                    ask_biases = tl.load(output_bias + asked, mask=asked < channels, other=0.0).to(tl.float32)
                turned = ()
                for i in tl.static_range(COUNT):
                    turned = turned + (tl.trans(ask_weights[i]),)
                read_grads = _products(read_grads, grad_tile, turned, COUNT, PRECISION)
                sums = _sums_of_patches(grad_tile.to(tl.float32), GROUP, PATCH)
                through_bias = ()
                for one in tl.static_range(GROUP):
                    part = tl.where(attends[one], tl.sum(sums[one] * ask_biases, 0), 0.0)
                    through_bias = through_bias + (score_grads[one] + part,)
                score_grads = through_bias
                if NEED_WEIGHTS:
                    bias_sum = tl.zeros([CHANNELS], tl.float32)
                    for one in tl.static_range(GROUP):
                        bias_sum += factors[one] * sums[one]
                    if RESIDENT:
                        output_bias_sum += bias_sum
                    else:
                        _add_to(output_bias_parts + program * channels, asked, asked < channels, bias_sum)
            if RESIDENT:
                biases = positions
            else:
                biases = _position_biases(position_bias, start, HEADS, QUERIES, KEYS, TOKENS)

            # Through the attention: gradients of the queries, and what was read from the values, times the score.
            query_grads = ()
            read = ()
            for i in tl.static_range(COUNT):
                scaled = queries[i] + query_biases[i]
                query_patches = _of_patches(tl.trans(scaled), GROUP, PATCH)
                grad_patches = _of_patches(tl.trans(read_grads[i]), GROUP, PATCH)
                key_patches = _of_patches(key_tiles[i // HEADS], GROUP, PATCH)
                value_patches = _of_patches(value_tiles[i // HEADS], GROUP, PATCH)
                patch_query_grads = ()
                patch_reads = ()
                new_score_grads = ()
                position_grad = tl.zeros([QUERIES, KEYS], tl.float32)
                for one in tl.static_range(GROUP):
                    logits = tl.zeros([QUERIES, KEYS], tl.float32)
                    logits = _dot_twice(tl.trans(query_patches[one]), key_patches[one], logits, PRECISION)
                    logits = logits * (logit_scale * LOG2_E) + biases[i % HEADS]
                    exponentials = tl.exp2(logits - tl.max(logits, 1)[:, None])
                    probability = exponentials / tl.sum(exponentials, 1)[:, None]
                    result = tl.zeros([QUERIES, RESIDUAL], tl.float32)
                    result = _dot_twice(probability, tl.trans(value_patches[one]), result, PRECISION)
                    grad = tl.trans(grad_patches[one])
                    through = tl.sum(grad * result, 1)
                    part = tl.where(attends[one], tl.sum(through, 0), 0.0)
                    new_score_grads = new_score_grads + (score_grads[one] + part,)
                    patch_reads = patch_reads + (tl.trans((factors[one] * result).to(DTYPE)),)
                    grad = factors[one] * grad
                    probability_grad = tl.zeros([QUERIES, KEYS], tl.float32)
                    probability_grad = _dot_twice(grad, value_patches[one], probability_grad, PRECISION)
                    logits_grad = probability * (probability_grad - (factors[one] * through)[:, None])
                    position_grad += logits_grad
                    scaled_grad = (logits_grad * logit_scale).to(DTYPE)
                    query_grad = tl.dot(scaled_grad, tl.trans(key_patches[one]), input_precision=PRECISION)
                    patch_query_grads = patch_query_grads + (tl.trans(query_grad),)
                    if NEED_MAPS:
                        key_sum = tl.dot(
                            tl.trans(scaled_grad), tl.trans(query_patches[one]).to(DTYPE),
                            acc=key_sums[i // HEADS * GROUP + one], input_precision=PRECISION,
                        )  # fmt: skip
                        value_sum = tl.dot(
                            tl.trans(probability.to(DTYPE)), grad.to(DTYPE), acc=value_sums[i // HEADS * GROUP + one],
                            input_precision=PRECISION,
                        )  # fmt: skip
                        key_sums = _replaced(key_sums, i // HEADS * GROUP + one, key_sum)
                        value_sums = _replaced(value_sums, i // HEADS * GROUP + one, value_sum)
                score_grads = new_score_grads
                if NEED_POSITION:
                    if RESIDENT:
                        position_sums = _replaced(position_sums, i % HEADS, position_sums[i % HEADS] + position_grad)
                    else:
                        query_token = start + tl.arange(0, QUERIES)
                        key_token = tl.arange(0, KEYS)
                        position_at = query_token[:, None] * TOKENS + key_token[None, :]
                        position_mask = (query_token < TOKENS)[:, None] & (key_token < TOKENS)[None, :]
                        position_base = (program.to(tl.int64) * HEADS + i % HEADS) * (TOKENS * TOKENS)
                        _add_to(position_parts + position_base, position_at, position_mask, position_grad)
                query_grads = query_grads + (tl.trans(_of_group(patch_query_grads, GROUP, PATCH)),)
                read = read + (tl.trans(_of_group(patch_reads, GROUP, PATCH)),)

            if NEED_WEIGHTS:
                bias_sums = ()
                for i in tl.static_range(COUNT):
                    bias_sums = bias_sums + (query_bias_sums[i] + tl.sum(query_grads[i], 0),)
                query_bias_sums = bias_sums

            # The gradient before the score's sigmoid is known once all tokens are; only then that of the means.
            if TOKENS <= QUERIES:
                logit_grads = _logit_grads(score_grads, scores, GROUP)
            for chunk in tl.static_range(CHUNKS):
                channel = chunk * CHANNELS + block
                if RESIDENT:
                    tile = x_tile
                    weights = query_weights
                    outer_tile = grad_tile
                else:
                    tile = _load(x + x_base, channel, channels, pixels, block_offset, block_present, WIDE)
                    weights = _query_weights(query_weight, residual, channel, channels, COUNT, RESIDUAL, DTYPE)
                    outer_tile = _load(out_grad + x_base, channel, channels, pixels, block_offset, block_present, WIDE)
                if NEED_X:
                    through_queries = tl.zeros([COLUMNS, CHANNELS], tl.float32)
                    for i in tl.static_range(COUNT):
                        through_queries = tl.dot(
                            query_grads[i].to(DTYPE), tl.trans(weights[i]), acc=through_queries,
                            input_precision=PRECISION,
                        )  # fmt: skip
                    total = outer_tile.to(tl.float32) + tl.trans(through_queries)
                    if TOKENS <= QUERIES:
                        if RESIDENT:
                            chunk_scorer = score_weights
                        else:
                            chunk_scorer = _score_weights(score_weight, channel, channels, scorer, SCORER)
                        which = tl.arange(0, COLUMNS) // PATCH % GROUP
                        for one in tl.static_range(GROUP):
                            mean_grad = _mean_grad(logit_grads[one], hidden[one], vector, chunk_scorer) / TOKENS
                            if GROUP == 1:
                                total += mean_grad[:, None]
                            else:
                                total += tl.where((which == one)[None, :], mean_grad[:, None], 0.0)
                    _store(x_grad + x_base, total, channel, channels, pixels, block_offset, block_present, WIDE)
                if NEED_WEIGHTS:
                    new_query_sums = ()
                    new_output_sums = ()
                    for i in tl.static_range(COUNT):
                        query_part = query_weight_sums[i] if RESIDENT else tl.zeros([CHANNELS, RESIDUAL], tl.float32)
                        query_part = tl.dot(tile, query_grads[i].to(DTYPE), acc=query_part, input_precision=PRECISION)
                        output_part = output_weight_sums[i] if RESIDENT else tl.zeros([CHANNELS, RESIDUAL], tl.float32)
                        output_part = tl.dot(outer_tile, read[i], acc=output_part, input_precision=PRECISION)
                        if RESIDENT:
                            new_query_sums = new_query_sums + (query_part,)
                            new_output_sums = new_output_sums + (output_part,)
                        else:
                            part_at = (i * channels + channel)[:, None] * residual + r[None, :]
                            part_mask = (channel < channels)[:, None] & (r < residual)[None, :]
                            _add_to(query_weight_parts + weight_parts, part_at, part_mask, query_part)
                            _add_to(output_weight_parts + weight_parts, part_at, part_mask, output_part)
                    if RESIDENT:
                        query_weight_sums = new_query_sums
                        output_weight_sums = new_output_sums

        finished = _logit_grads(score_grads, scores, GROUP)
        for one in tl.static_range(GROUP):
            tl.store(logit_grad + (image * patches + patch + one), finished[one], mask=first + one < along)
        if NEED_X and TOKENS > QUERIES:
            for chunk in tl.static_range(CHUNKS):
                late = chunk * CHANNELS + block
                late_grad = (
                    _mean_grad(
                        finished[0], hidden[0], vector, _score_weights(score_weight, late, channels, scorer, SCORER)
                    )
                    / TOKENS
                )
                for late_start in range(0, TOKENS, QUERIES):
                    late_offset, late_present = _columns(
                        late_start, first, along, height, width, GROUP, PATCH, DIMS, COLUMNS
                    )
                    tl.debug_barrier()
                    so_far = _load(x_grad + x_base, late, channels, pixels, late_offset, late_present, WIDE)
                    so_far = so_far.to(tl.float32) + late_grad[:, None]
                    _store(x_grad + x_base, so_far, late, channels, pixels, late_offset, late_present, WIDE)
        if NEED_MAPS:
            for m in tl.static_range(MAPS):
                key_columns = ()
                value_columns = ()
                for one in tl.static_range(GROUP):
                    key_columns = key_columns + (tl.trans(key_sums[m * GROUP + one]),)
                    value_columns = value_columns + (tl.trans(value_sums[m * GROUP + one]),)
                base = map_at + (map_at * 0 + m) * residual * pixels
                key_tile = _of_group(key_columns, GROUP, PATCH)
                value_tile = _of_group(value_columns, GROUP, PATCH)
                _store(keys_grad + base, key_tile, r, residual, pixels, map_offset, map_present, WIDE)
                _store(values_grad + base, value_tile, r, residual, pixels, map_offset, map_present, WIDE)

    if NEED_WEIGHTS:
        for i in tl.static_range(COUNT):
            bias_at = (program * COUNT + i) * residual + r
            tl.store(query_bias_parts + bias_at, query_bias_sums[i], mask=r < residual)
            if RESIDENT:
                final_at = (i * channels + block)[:, None] * residual + r[None, :]
                final_mask = (block < channels)[:, None] & (r < residual)[None, :]
                tl.store(query_weight_parts + (weight_parts + final_at), query_weight_sums[i], mask=final_mask)
                tl.store(output_weight_parts + (weight_parts + final_at), output_weight_sums[i], mask=final_mask)
        if RESIDENT:
            tl.store(output_bias_parts + (program * channels + block), output_bias_sum, mask=block < channels)
    if NEED_POSITION and RESIDENT:
        for head in tl.static_range(HEADS):
            q_token, k_token = tl.arange(0, QUERIES), tl.arange(0, KEYS)
            final_base = position_parts + (program.to(tl.int64) * HEADS + head) * (TOKENS * TOKENS)
            tl.store(
                final_base + (q_token[:, None] * TOKENS + k_token[None, :]), position_sums[head],
                mask=(q_token < TOKENS)[:, None] & (k_token < TOKENS)[None, :],
            )  # fmt: skip


@triton.jit
def _logit_grads(score_grads, scores, GROUP: tl.constexpr):
    """Through the score's sigmoid, a tuple with an entry a patch."""
    grads = ()
    for one in tl.static_range(GROUP):
        grads = grads + (score_grads[one] * scores[one] * (1 - scores[one]),)
    return grads


@triton.jit
def _mean_grad(logit_grad, hidden, vector, weights):
    """Gradient of some channels' means, through the scorer."""
    hidden_grad = tl.where(hidden > 0, logit_grad * vector, 0.0)
    return tl.sum(weights * hidden_grad[:, None], 0)


def _programs(groups: int, device: torch.device) -> int:
    """Two programs a multiprocessor, of which each takes its share of the groups; an H100's where there is none."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return max(1, min(groups, 2 * multiprocessors))


def _precision() -> str:
    """Of float32 products: three of tf32 on NVIDIA's matrix units; AMD's multiply float32 as it is."""
    if triton.knobs.runtime.interpret:
        return "tf32x3"
    return "ieee" if triton.runtime.driver.active.get_current_target().backend == "hip" else "tf32x3"


class _Launch:
    """Sizes and block shape of a launch."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor], patch: int) -> None:
        batch, channels, *spatial = x.shape
        maps, heads, residual, _ = weights[0].shape
        self.maps, self.heads, self.residual = maps, heads, residual
        scorer = weights[5].shape[0]
        depth, height, width = (1, *spatial) if len(spatial) == 2 else spatial
        block = block_of(channels, patch, len(spatial), x.element_size(), scorer)
        self.patches = math.prod(size // patch for size in spatial)
        rows = batch * math.prod(size // patch for size in spatial[:-1])
        self.groups = rows * -(-(width // patch) // block.group)
        self.programs = _programs(self.groups, x.device)
        self.groups_a_program = -(-self.groups // self.programs)
        self.programs = -(-self.groups // self.groups_a_program) if self.groups else 0
        unit = math.gcd(width, 16)
        self.sizes = (
            self.groups, self.groups_a_program, channels, residual, scorer, depth, height, width // unit,
            residual**-0.5,
        )  # fmt: skip
        self.blocks: dict[str, Any] = {
            "MAPS": maps, "HEADS": heads, "RESIDUAL": max(16, triton.next_power_of_2(residual)), "PATCH": patch,
            "DIMS": len(spatial), "GROUP": block.group, "QUERIES": block.queries, "KEYS": block.keys,
            "CHANNELS": block.channels, "CHUNKS": -(-channels // block.channels), "SCORER": block.scorer,
            "UNIT": unit, "WIDE": max(channels, maps * residual) * math.prod(spatial) >= 2**31,
            "PRECISION": _precision(), "num_warps": block.warps,
        }  # fmt: skip


def forward(
    x: Tensor, keys: Tensor, values: Tensor, weights: Sequence[Tensor], patch: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """``(out, score)``; everything is dense, ``weights`` are arguments 4 to 12 of the op."""
    launch = _Launch(x, weights, patch)
    out = torch.empty_like(x)
    score = x.new_empty(x.shape[0], 1, *(size // patch for size in x.shape[2:]), dtype=torch.float32)
    if launch.groups:
        _forward_kernel[(launch.programs,)](
            x, keys, values, *weights, out, score, threshold, *launch.sizes, **launch.blocks
        )
    return out, score


def backward(
    out_grad: Tensor,
    score_grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Sequence[Tensor],
    patch: int,
    threshold: float,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the twelve tensors, those of the weights in float32, None where not needed."""
    launch = _Launch(x, weights, patch)
    batch, channels = x.shape[:2]
    maps, heads, residual, programs = launch.maps, launch.heads, launch.residual, launch.programs
    tokens = patch ** (x.dim() - 2)
    need_maps, need_weights = any(needed[1:3]), any(needed[index] for index in (3, 4, 6, 7))

    def sums(wanted: bool, *shape: int) -> Tensor:
        return torch.zeros((programs, *shape) if wanted else 0, dtype=torch.float32, device=x.device)

    x_grad = torch.empty_like(x) if needed[0] else x.new_empty(0)
    map_grads = [torch.empty_like(one) if need_maps else one.new_empty(0) for one in (keys, values)]
    query_weight = sums(need_weights, maps * heads, channels, residual)
    output_weight = sums(need_weights, maps * heads, channels, residual)
    query_bias = sums(need_weights, maps * heads, residual)
    output_bias = sums(need_weights, channels)
    position = sums(needed[5], heads, tokens, tokens)
    logit_grad = torch.empty(batch, launch.patches, dtype=torch.float32, device=x.device)
    means = torch.empty(batch, launch.patches, channels, dtype=torch.float32, device=x.device)
    if launch.groups:
        _backward_kernel[(programs,)](
            x, keys, values, *weights, out_grad, score_grad, x_grad, *map_grads, query_weight, query_bias, position,
            output_weight, output_bias, logit_grad, means, threshold, *launch.sizes, **launch.blocks,
            NEED_X=bool(needed[0]), NEED_MAPS=need_maps, NEED_WEIGHTS=need_weights, NEED_POSITION=bool(needed[5]),
        )  # fmt: skip
    score_weight, score_context, score_vector = (weight.float() for weight in weights[5:8])
    # The scorer's own gradients are small products over patches.
    activation = torch.relu(means @ score_weight.T + score_context[:, None])
    hidden_grad = torch.where(activation > 0, logit_grad[..., None] * score_vector, 0.0)
    grads: list[Callable[[], Tensor]] = [
        lambda: x_grad,
        lambda: map_grads[0],
        lambda: map_grads[1],
        lambda: query_weight.sum(0).reshape(maps, heads, channels, residual).transpose(2, 3).contiguous(),
        lambda: query_bias.sum(0).reshape(maps, heads, residual),
        lambda: position.sum(0),
        lambda: output_weight.sum(0).reshape(maps, heads, channels, residual),
        lambda: output_bias.sum(0),
        lambda: torch.einsum("bps,bpc->sc", hidden_grad, means),
        lambda: hidden_grad.sum(1),
        lambda: torch.einsum("bp,bps->s", logit_grad, activation),
        lambda: logit_grad.sum(),
    ]
    return [grad() if wanted else None for grad, wanted in zip(grads, needed, strict=True)]
