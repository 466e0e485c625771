"""Patch cross-attention with importance scoring, forward and backward; what it means: grcsf_fast/reference.py.

A program takes some groups of neighbouring patches, one group after another. A group is one patch, or as many as it
takes for a row of them to fill 32 bytes, the least that memory moves. Where the table says so ("resident"), a group
stays in registers from its score to its output and is read once: it is loaded in blocks of channels, split into its
patches, and each patch goes alone through queries, attention and output, one map and head after another, whose weights
are read again for each patch (they stay in the nearest cache). Otherwise x is read twice: each block of channels once
for the score and for the queries of all maps and heads, once for the output. Patches of more than 64 tokens go in
blocks of queries and keys with a running softmax; their queries take another reading, after the score.

The backward is three kernels, because one would need more registers than there are. The first goes through score and
attention and stores the gradients of the queries and what was read from the values; the second is the same for the
gradient of the position bias alone, whose sums stay in registers (those of large patches are added up in memory, in
half precision by the first); the third makes from what the first one stored the gradients of x and of the weights. Each
reads x and the output's gradient once.

Products run on the matrix units in the dtype of x with sums in float32; float32 itself as three tf32 products, which
keeps float32's accuracy. The softmax is base 2: log2(e) is folded into the queries' scale and into the position bias.
Loops say ``disable_licm``: what the compiler moves out of a loop is alive all through it, and would not fit.

Gradients of the weights are summed by each program over its patches and then over the programs, in order: no atomics,
the same bits in every run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

__all__ = ["Block", "backward", "block_of", "forward"]

LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True)
class Block:
    """Block shape of a kernel; every number is a power of two.

    Args:
        group: neighbouring patches that are loaded together.
        queries: query tokens of a block.
        keys: key tokens of a block.
        channels: channels of a block.
        scorer: hidden units of the scorer, all of them.
        warps: of a program.
        resident: whether a group stays in registers from its score to its output.
        by_head: whether each program of the position bias's kernel takes one head.
    """

    group: int
    queries: int
    keys: int
    channels: int
    scorer: int
    warps: int
    resident: bool = False
    by_head: bool = False


def block_of(kernel: str, channels: int, patch: int, dims: int, itemsize: int, scorer: int, architecture: str) -> Block:
    """The table of block shapes, for "forward" and the backward's "attention", "position" and "channels".

    What counts is that nothing spills of the 255 registers of a thread, 512 of AMD's lanes for programs of four warps.
    The attention takes about 150: a block of 64 queries and 64 keys is 16 registers for each of logits, probabilities
    and their gradients, and twice that as operand of a product, which every row of warps holds whole. A running softmax
    holds more, so larger patches go in blocks of 32 where 64 would spill (not above 256 tokens, where keys would be
    read too often). Float32, whose operands are two registers a number and whose products are three, takes the smallest
    blocks, and so does compute capability 8, whose matrix units take all operands from registers. Triton 3.7.1 cannot
    compile blocks of more than 32 rows inside nested loops for sm_100.
    """
    amd = architecture.startswith("gfx")
    warps = 4 if amd else 8
    single = itemsize == 4
    tokens = patch**dims
    edge = min(64, max(16, triton.next_power_of_2(tokens)))
    if tokens > edge and (architecture in ("sm_80", "sm_100") or (single and tokens <= 256 and not amd)):
        edge = 32
    width = max(16, triton.next_power_of_2(channels))
    if architecture == "sm_100" and not single and (kernel in ("attention", "position") or width > 128):
        edge = min(edge, 32)
    hidden = max(16, triton.next_power_of_2(scorer))
    if kernel == "channels":
        # It sums (channels, R of all maps and heads) twice, and reads the attention's results for each block again.
        if single:
            wide = width >= (64 if dims == 2 else 128)
            block = {"sm_80": 16, "sm_90": 64 if wide else 16, "sm_100": 64}.get(architecture, 128)
        else:
            block = 64 if architecture == "sm_80" else 128
        queries = 32 if architecture == "sm_80" and not single and width > 32 else edge
        # On sm_100 a block of 64 of which 32 are there takes fewer registers: its sums lie in tensor memory.
        least = 64 if architecture == "sm_100" and single else 16
        return Block(1, queries, edge, max(least, min(width, block)), hidden, warps)
    most = max(16, 8192 // hidden)  # weights of the scorer
    if kernel != "forward":
        # x is read once, block by block, so small ones cost nothing.
        return Block(1, edge, edge, min(32 if amd else 16, most), hidden, warps, by_head=architecture == "sm_80")
    # x in registers is 32 numbers a thread at most, a group of several patches is there twice while it is split.
    resident = tokens <= edge and width * edge <= (4096 if single and architecture == "sm_80" else 8192)
    group = 1
    if edge == tokens:
        limit = (8 if single or architecture == "sm_80" else 16) * 1024
        while group < 4 and group * patch * itemsize < 32 and 2 * group * width * edge * itemsize <= limit:
            group *= 2
    if architecture == "sm_80" or (not resident and (single or architecture == "sm_100")):
        block = 32
    else:
        block = 128 if single and architecture == "sm_90" else 64
    return Block(group, edge, edge, min(width, block, most), hidden, warps, resident)


@triton.jit
def _check_block(
    TOKENS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, RESIDENT: tl.constexpr
):
    """A block shape that the kernels would misread does not compile."""
    tl.static_assert(GROUP == 1 or QUERIES == TOKENS, "patches of a group are blocks of queries each")
    tl.static_assert(GROUP == 1 or RESIDENT, "a group of several patches stays in registers")
    tl.static_assert(not RESIDENT or TOKENS <= QUERIES, "a patch in registers is one block of queries")
    # Where a patch is one block, its keys are read at the offsets of its queries.
    tl.static_assert(
        QUERIES == KEYS or (TOKENS > QUERIES and TOKENS > KEYS), "a patch is one block of either or of none"
    )


@triton.jit
def _apart(tensor, COUNT: tl.constexpr):
    """(N, D, count) to a tuple of (N, D)."""
    N: tl.constexpr = tensor.shape[0]
    D: tl.constexpr = tensor.shape[1]
    if COUNT == 1:
        items = (tl.reshape(tensor, [N, D]),)
    else:
        halves = tl.permute(tl.reshape(tensor, [N, D, 2, COUNT // 2]), (0, 1, 3, 2))
        first, second = tl.split(halves)
        items = _apart(first, COUNT // 2) + _apart(second, COUNT // 2)
    return items


@triton.jit
def _together(items, COUNT: tl.constexpr):
    """The inverse of :func:`_apart`."""
    N: tl.constexpr = items[0].shape[0]
    D: tl.constexpr = items[0].shape[1]
    if COUNT == 1:
        tensor = tl.reshape(items[0], [N, D, 1])
    else:
        half: tl.constexpr = COUNT // 2
        halves = tl.join(_together(items[:half], half), _together(items[half:], half))
        tensor = tl.reshape(tl.permute(halves, (0, 1, 3, 2)), [N, D, COUNT])
    return tensor


@triton.jit
def _of_patches(columns, GROUP: tl.constexpr, PATCH: tl.constexpr):
    """(N, columns of a group) to a tuple of (N, tokens), a patch each."""
    N: tl.constexpr = columns.shape[0]
    TOKENS: tl.constexpr = columns.shape[1] // GROUP
    if GROUP == 1:
        patches = (columns,)
    else:
        parts = tl.permute(tl.reshape(columns, [N, TOKENS // PATCH, GROUP, PATCH]), (0, 1, 3, 2))
        patches = _apart(tl.reshape(parts, [N, TOKENS, GROUP]), GROUP)
    return patches


@triton.jit
def _of_group(patches, GROUP: tl.constexpr, PATCH: tl.constexpr):
    """The inverse of :func:`_of_patches`."""
    if GROUP == 1:
        columns = patches[0]
    else:
        N: tl.constexpr = patches[0].shape[0]
        TOKENS: tl.constexpr = patches[0].shape[1]
        together = tl.reshape(_together(patches, GROUP), [N, TOKENS // PATCH, PATCH, GROUP])
        columns = tl.reshape(tl.permute(together, (0, 1, 3, 2)), [N, TOKENS * GROUP])
    return columns


@triton.jit
def _columns(
    start, first, along, height, width,
    GROUP: tl.constexpr, PATCH: tl.constexpr, DIMS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Offsets of ``COUNT`` columns from the group's first pixel, and which of them there are.

    Columns of a group run along its rows: row of the patch, patch, pixel of the row. ``first`` is the number of the
    group's first patch in its row of ``along`` patches. Offsets of columns that are none lie beyond the group: taken
    from the mask alone, or the compiler could no longer see which offsets follow each other, and would move each
    number by itself.
    """
    column = start + tl.arange(0, COUNT)
    row = column // (GROUP * PATCH)
    ROWS: tl.constexpr = PATCH if DIMS == 2 else PATCH * PATCH
    offset = row % PATCH * width + column % (GROUP * PATCH)
    if DIMS == 3:
        offset += row // PATCH * (height * width)
    present = row < ROWS
    if GROUP > 1:
        present = present & (first + column // PATCH % GROUP < along)
    return offset, present


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
def _weight_at(
    channel, channels, residual, channel_stride, r_stride,
    COUNT: tl.constexpr, STACK: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of (channels, R of all maps and heads) in the query or output weights."""
    column = tl.arange(0, STACK * RESIDUAL)
    i, r = column // RESIDUAL, column % RESIDUAL
    at = channel[:, None] * channel_stride + (i * channels * residual + r * r_stride)[None, :]
    return at, (channel < channels)[:, None] & ((r < residual) & (i < COUNT))[None, :]


@triton.jit
def _query_biases(query_bias, residual, COUNT: tl.constexpr, STACK: tl.constexpr, RESIDUAL: tl.constexpr):
    """Offsets and mask of (R of all maps and heads)."""
    column = tl.arange(0, STACK * RESIDUAL)
    i, r = column // RESIDUAL, column % RESIDUAL
    return query_bias + i * residual + r, (r < residual) & (i < COUNT)


@triton.jit
def _position_at(head, query_start, key_start, QUERIES: tl.constexpr, KEYS: tl.constexpr, TOKENS: tl.constexpr):
    query, key = query_start + tl.arange(0, QUERIES), key_start + tl.arange(0, KEYS)
    at = (head * TOKENS + query)[:, None] * TOKENS + key[None, :]
    return at, (query < TOKENS)[:, None] & (key < TOKENS)[None, :]


@triton.jit
def _position(
    position_bias, head, query_start, key_start, QUERIES: tl.constexpr, KEYS: tl.constexpr, TOKENS: tl.constexpr
):
    """(queries, keys) in units of log2; minus infinity for keys that are none."""
    at, mask = _position_at(head, query_start, key_start, QUERIES, KEYS, TOKENS)
    bias = tl.load(position_bias + at, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    return tl.where((key_start + tl.arange(0, KEYS) < TOKENS)[None, :], bias, float("-inf"))


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
    at, pieces, channel, channels, pixels, first, along, height, width,
    GROUP: tl.constexpr, PATCH: tl.constexpr, DIMS: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A tuple of the channels' means, one a patch; ``pieces`` hold the first block of tokens."""
    means = ()
    for one in tl.static_range(GROUP):
        total = tl.sum(pieces[one].to(tl.float32), 1)
        if TOKENS > QUERIES:
            for start in range(QUERIES, TOKENS, QUERIES):
                offset, present = _columns(start, first, along, height, width, GROUP, PATCH, DIMS, QUERIES)
                total += tl.sum(_load(at, channel, channels, pixels, offset, present, WIDE).to(tl.float32), 1)
        means = means + (total / TOKENS,)
    return means


@triton.jit
def _hidden(hidden, means, score_weight, channel, channels, scorer, SCORER: tl.constexpr, GROUP: tl.constexpr):
    """Adds the part of some channels to the scorer's hidden layer, a tuple with an entry a patch."""
    s = tl.arange(0, SCORER)
    mask = (s < scorer)[:, None] & (channel < channels)[None, :]
    weights = tl.load(score_weight + s[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
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
def _run(items, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """``COUNT`` items of a tuple."""
    return items[FIRST : FIRST + COUNT]


@triton.jit
def _chosen(items, index, COUNT: tl.constexpr):
    """Of the items of a tuple the one whose number is known at run time alone."""
    item = items[0]
    for place in tl.static_range(1, COUNT):
        item = tl.where(index == place, items[place], item)
    return item


@triton.jit
def _replaced(items, index, item, COUNT: tl.constexpr):
    """A tuple of ``COUNT`` with another item at a place that is known at run time alone."""
    replaced = ()
    for place in tl.static_range(COUNT):
        replaced = replaced + (tl.where(index == place, item, items[place]),)
    return replaced


@triton.jit
def _added(items, index, item, COUNT: tl.constexpr):
    """A tuple of ``COUNT`` with an item added to the one at a place that is known at run time alone."""
    added = ()
    for place in tl.static_range(COUNT):
        added = added + (tl.where(index == place, items[place] + item, items[place]),)
    return added


@triton.jit
def _read(query, key, value, position, PRECISION: tl.constexpr):
    """What a patch reads from its values: (queries, R) in their dtype. ``query`` is scaled."""
    logits = tl.dot(query, key, input_precision=PRECISION) + position
    exponentials = tl.exp2(logits - tl.max(logits, 1)[:, None])
    attended = tl.dot(exponentials.to(value.dtype), tl.trans(value), input_precision=PRECISION)
    return (attended / tl.sum(exponentials, 1)[:, None]).to(value.dtype)


@triton.jit
def _read_in_blocks(
    query, keys, values, position_bias, head, start, residual, pixels, height, width, scale,
    PATCH: tl.constexpr, DIMS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, RESIDUAL: tl.constexpr,
    TOKENS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a block of queries reads from all values: maximum and sum of the softmax, and (queries, R), in float32."""
    r = tl.arange(0, RESIDUAL)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    attended = tl.zeros([QUERIES, RESIDUAL], tl.float32)
    for key_start in range(0, TOKENS, KEYS):
        offset, present = _columns(key_start, 0, 1, height, width, 1, PATCH, DIMS, KEYS)
        key = _load(keys, r, residual, pixels, offset, present, WIDE)
        value = _load(values, r, residual, pixels, offset, present, WIDE)
        logits = _dot_twice(query, key, tl.zeros([QUERIES, KEYS], tl.float32), PRECISION) * scale
        logits += _position(position_bias, head, start, key_start, QUERIES, KEYS, TOKENS)
        new_top = tl.maximum(top, tl.max(logits, 1))
        exponentials = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(exponentials, 1)
        attended = _dot_twice(exponentials, tl.trans(value), attended * shrink[:, None], PRECISION)
        top = new_top
    return top, total, attended / total[:, None]


@triton.jit
def _weight(
    tensor, i, channel, channels, residual, channel_stride, r_stride, RESIDUAL: tl.constexpr, DTYPE: tl.constexpr
):
    """(channels, R) of the query or output weights of one map and head."""
    r = tl.arange(0, RESIDUAL)
    at = i * channels * residual + channel[:, None] * channel_stride + r[None, :] * r_stride
    return tl.load(tensor + at, mask=(channel < channels)[:, None] & (r < residual)[None, :], other=0.0).to(DTYPE)


@triton.jit
def _asked(
    sums, piece, tensor, first_head, channel, channels, residual, channel_stride, r_stride,
    MAPS: tl.constexpr, HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds some channels' part to the queries, or to the gradients of what was read: (tokens, R) a map and head."""
    COUNT: tl.constexpr = MAPS * HEADS_HERE
    if COUNT > 1 and piece.dtype == tl.float32:
        # Three products each: one after another, or their operands would not fit.
        for here in tl.range(COUNT, disable_licm=True):
            i = here // HEADS_HERE * HEADS + first_head + here % HEADS_HERE
            weight = _weight(tensor, i, channel, channels, residual, channel_stride, r_stride, RESIDUAL, piece.dtype)
            sums = _added(sums, here, tl.dot(tl.trans(piece), weight, input_precision=PRECISION), COUNT)
    else:
        added = ()
        for here in tl.static_range(COUNT):
            i = here // HEADS_HERE * HEADS + first_head + here % HEADS_HERE
            weight = _weight(tensor, i, channel, channels, residual, channel_stride, r_stride, RESIDUAL, piece.dtype)
            added = added + (tl.dot(tl.trans(piece), weight, acc=sums[here], input_precision=PRECISION),)
        sums = added
    return sums


@triton.jit
def _updated(
    before, reads, factor, output_weight, output_bias, channel, channels, residual,
    COUNT: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """Some channels of the output, from x and what all maps and heads read."""
    update = tl.zeros([before.shape[0], before.shape[1]], tl.float32)
    if UNROLLED:
        for i in tl.static_range(COUNT):
            weight = _weight(output_weight, i, channel, channels, residual, residual, 1, RESIDUAL, before.dtype)
            update = tl.dot(weight, tl.trans(reads[i]), acc=update, input_precision=PRECISION)
    else:
        for i in tl.range(COUNT, disable_licm=True):
            weight = _weight(output_weight, i, channel, channels, residual, residual, 1, RESIDUAL, before.dtype)
            update = tl.dot(weight, tl.trans(_chosen(reads, i, COUNT)), acc=update, input_precision=PRECISION)
    shift = tl.load(output_bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    after = before.to(tl.float32) + factor * (update + shift[:, None])
    # Not a product with 0: a skipped patch passes x on even where its update is not finite.
    return tl.where(factor == float("-inf"), before.to(tl.float32), after).to(before.dtype)


@triton.jit
def _forward_kernel(
    x, keys, values, query_weight, query_bias, position_bias, output_weight, output_bias,
    score_weight, score_context, score_vector, score_bias, out, score,
    threshold, groups, groups_a_program, channels, residual, scorer, depth, height, width_units, logit_scale,
    MAPS: tl.constexpr, HEADS: tl.constexpr, RESIDUAL: tl.constexpr, PATCH: tl.constexpr, DIMS: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr,
    SCORER: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = PATCH * PATCH if DIMS == 2 else PATCH * PATCH * PATCH
    COLUMNS: tl.constexpr = QUERIES * GROUP
    COUNT: tl.constexpr = MAPS * HEADS
    _check_block(TOKENS, GROUP, QUERIES, KEYS, RESIDENT)
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
    r = tl.arange(0, RESIDUAL)
    vector = tl.load(score_vector + unit, mask=unit < scorer, other=0.0).to(tl.float32)
    bias = tl.load(score_bias).to(tl.float32)

    begin = tl.program_id(0) * groups_a_program
    for group in tl.range(begin, tl.minimum(begin + groups_a_program, groups), disable_licm=True):
        image, patch, first, origin = _place(group, depth, height, width, GROUP, PATCH, DIMS)
        x_at = x + (image * channels * pixels + origin)
        out_at = out + (image * channels * pixels + origin)
        map_at = image * (MAPS * residual) * pixels + origin
        offset, present = _columns(0, first, along, height, width, GROUP, PATCH, DIMS, COLUMNS)

        context = tl.load(score_context + image * scorer + unit, mask=unit < scorer, other=0.0).to(tl.float32)
        hidden = _copies(context, GROUP)
        queries = _copies(tl.zeros([QUERIES, RESIDUAL], tl.float32), COUNT)
        pieces = ()
        if RESIDENT:
            for chunk in tl.static_range(CHUNKS):
                scored = chunk * CHANNELS + block
                parts = _of_patches(_load(x_at, scored, channels, pixels, offset, present, WIDE), GROUP, PATCH)
                means = _means(
                    x_at, parts, scored, channels, pixels, first, along, height, width,
                    GROUP, PATCH, DIMS, QUERIES, TOKENS, WIDE,
                )  # fmt: skip
                hidden = _hidden(hidden, means, score_weight, scored, channels, scorer, SCORER, GROUP)
                pieces = pieces + parts
        else:
            for chunk_number in tl.range(CHUNKS, disable_licm=True):
                scored = chunk_number * CHANNELS + block
                parts = (_load(x_at, scored, channels, pixels, offset, present, WIDE),)
                means = _means(
                    x_at, parts, scored, channels, pixels, first, along, height, width,
                    GROUP, PATCH, DIMS, QUERIES, TOKENS, WIDE,
                )  # fmt: skip
                hidden = _hidden(hidden, means, score_weight, scored, channels, scorer, SCORER, GROUP)
                if TOKENS <= QUERIES:
                    queries = _asked(
                        queries, parts[0], query_weight, 0, scored, channels, residual, 1, channels,
                        MAPS, HEADS, HEADS, RESIDUAL, PRECISION,
                    )  # fmt: skip
        factors = ()
        wanted = first < 0
        for one in tl.static_range(GROUP):
            value = _score(hidden[one], vector, bias)
            attended = (value >= threshold) | (threshold <= 0)
            tl.store(score + (image * patches + patch + one), value, mask=first + one < along)
            factors = factors + (tl.where(attended, value, float("-inf")),)
            wanted = wanted | (attended & (first + one < along))

        for start in tl.range(0, TOKENS, QUERIES, disable_licm=True):
            block_offset, block_present = _columns(start, first, along, height, width, GROUP, PATCH, DIMS, COLUMNS)
            if wanted:
                key_pieces = ()
                value_pieces = ()
                if TOKENS <= KEYS:
                    for m in tl.static_range(MAPS):
                        m_at = map_at + (map_at * 0 + m) * residual * pixels
                        map_tile = _load(keys + m_at, r, residual, pixels, offset, present, WIDE)
                        key_pieces = key_pieces + _of_patches(map_tile, GROUP, PATCH)
                        map_tile = _load(values + m_at, r, residual, pixels, offset, present, WIDE)
                        value_pieces = value_pieces + _of_patches(map_tile, GROUP, PATCH)
                for which in tl.range(0, GROUP if GROUP == 1 else tl.minimum(along - first, GROUP), disable_licm=True):
                    factor = _chosen(factors, which, GROUP)
                    asked = queries
                    if TOKENS > QUERIES:
                        for chunk_number in tl.range(CHUNKS, disable_licm=True):
                            channel = chunk_number * CHANNELS + block
                            asked = _asked(
                                asked, _load(x_at, channel, channels, pixels, block_offset, block_present, WIDE),
                                query_weight, 0, channel, channels, residual, 1, channels,
                                MAPS, HEADS, HEADS, RESIDUAL, PRECISION,
                            )  # fmt: skip
                    reads = _copies(tl.zeros([QUERIES, RESIDUAL], DTYPE), COUNT)
                    for i in tl.range(COUNT, disable_licm=True):
                        shift = tl.load(query_bias + i * residual + r, mask=r < residual, other=0.0)
                        query = _chosen(asked, i, COUNT)
                        if RESIDENT:
                            for chunk in tl.static_range(CHUNKS):
                                (query,) = _asked(
                                    (query,), _chosen(_run(pieces, chunk * GROUP, GROUP), which, GROUP), query_weight,
                                    i, chunk * CHANNELS + block, channels, residual, 1, channels,
                                    1, 1, 1, RESIDUAL, PRECISION,
                                )  # fmt: skip
                        query += shift.to(tl.float32)[None, :]
                        if TOKENS <= KEYS:
                            read = _read(
                                (query * (logit_scale * LOG2_E)).to(DTYPE),
                                _chosen(key_pieces, i // HEADS * GROUP + which, MAPS * GROUP),
                                _chosen(value_pieces, i // HEADS * GROUP + which, MAPS * GROUP),
                                _position(position_bias, i % HEADS, 0, 0, QUERIES, KEYS, TOKENS), PRECISION,
                            )  # fmt: skip
                        else:
                            map_of = map_at + (map_at * 0 + i // HEADS) * residual * pixels
                            _, _, result = _read_in_blocks(
                                query, keys + map_of, values + map_of, position_bias, i % HEADS, start, residual,
                                pixels, height, width, logit_scale * LOG2_E, PATCH, DIMS, QUERIES, KEYS, RESIDUAL,
                                TOKENS, WIDE, PRECISION,
                            )  # fmt: skip
                            read = result.to(DTYPE)
                        reads = _replaced(reads, i, read, COUNT)
                    if RESIDENT:
                        for chunk in tl.static_range(CHUNKS):
                            channel = chunk * CHANNELS + block
                            after = _updated(
                                _chosen(_run(pieces, chunk * GROUP, GROUP), which, GROUP), reads, factor,
                                output_weight, output_bias, channel, channels, residual, COUNT, RESIDUAL, PRECISION,
                                False,
                            )  # fmt: skip
                            if GROUP == 1:
                                _store(out_at, after, channel, channels, pixels, block_offset, block_present, WIDE)
                            else:
                                pieces = _replaced(pieces, chunk * GROUP + which, after, CHUNKS * GROUP)
                    else:
                        for chunk_number in tl.range(CHUNKS, disable_licm=True):
                            channel = chunk_number * CHANNELS + block
                            after = _updated(
                                _load(x_at, channel, channels, pixels, block_offset, block_present, WIDE), reads,
                                factor, output_weight, output_bias, channel, channels, residual, COUNT, RESIDUAL,
                                PRECISION, True,
                            )  # fmt: skip
                            _store(out_at, after, channel, channels, pixels, block_offset, block_present, WIDE)
                if GROUP > 1:
                    for chunk in tl.static_range(CHUNKS):
                        tile = _of_group(_run(pieces, chunk * GROUP, GROUP), GROUP, PATCH)
                        _store(out_at, tile, chunk * CHANNELS + block, channels, pixels, offset, present, WIDE)
            else:
                for chunk in tl.static_range(CHUNKS):
                    channel = chunk * CHANNELS + block
                    if RESIDENT:
                        tile = _of_group(_run(pieces, chunk * GROUP, GROUP), GROUP, PATCH)
                    else:
                        tile = _load(x_at, channel, channels, pixels, block_offset, block_present, WIDE)
                    _store(out_at, tile, channel, channels, pixels, block_offset, block_present, WIDE)


@triton.jit
def _add_to(part, at, mask, value):
    """Adds to numbers that no other program touches; the barrier lets each thread see what another one stored."""
    tl.store(part + at, tl.load(part + at, mask=mask, other=0.0) + value, mask=mask)
    tl.debug_barrier()


@triton.jit
def _through(probability, grad, value, through, PRECISION: tl.constexpr):
    """Gradient of the logits; ``through`` is the sum over keys of probability times its gradient."""
    nothing = tl.zeros([probability.shape[0], probability.shape[1]], tl.float32)
    return probability * (_dot_twice(grad, value, nothing, PRECISION) - through[:, None])


@triton.jit
def _attention_backward_kernel(
    x, keys, values, query_weight, query_bias, position_bias, output_weight, output_bias,
    score_weight, score_context, score_vector, score_bias, out_grad, score_grad,
    query_grads, reads, keys_grad, values_grad, position_parts, logit_grad, means_of_patches, sums_of_grads,
    threshold, patches_in_all, patches_a_program, channels, residual, scorer, depth, height, width_units, logit_scale,
    MAPS: tl.constexpr, HEADS: tl.constexpr, RESIDUAL: tl.constexpr, PATCH: tl.constexpr, DIMS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr,
    SCORER: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    HEADS_HERE: tl.constexpr, MAIN: tl.constexpr, NEED_MAPS: tl.constexpr, NEED_POSITION: tl.constexpr,
):  # fmt: skip
    """Through score and attention: gradients of keys, values and position bias, and what the second kernel needs.

    ``MAIN`` is all but the position bias. Its gradient comes from a launch of its own, each program for some of the
    heads, where it is summed in registers or products are of float32, and from the same launch otherwise.
    """
    TOKENS: tl.constexpr = PATCH * PATCH if DIMS == 2 else PATCH * PATCH * PATCH
    COUNT: tl.constexpr = MAPS * HEADS
    COUNT_HERE: tl.constexpr = MAPS * HEADS_HERE
    _check_block(TOKENS, 1, QUERIES, KEYS, False)
    tl.static_assert(HEADS % HEADS_HERE == 0, "every program takes as many heads")
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
    first_head = tl.program_id(1) * HEADS_HERE
    position_base = program.to(tl.int64) * (HEADS * TOKENS * TOKENS)
    vector = tl.load(score_vector + unit, mask=unit < scorer, other=0.0).to(tl.float32)
    bias = tl.load(score_bias).to(tl.float32)
    position_sums = ()
    if NEED_POSITION and TOKENS <= KEYS:
        position_sums = _copies(tl.zeros([QUERIES, KEYS], tl.float32), HEADS_HERE)

    begin = program * patches_a_program
    for number in tl.range(begin, tl.minimum(begin + patches_a_program, patches_in_all), disable_licm=True):
        image, patch, first, origin = _place(number, depth, height, width, 1, PATCH, DIMS)
        x_at = x + (image * channels * pixels + origin)
        grad_at = out_grad + (image * channels * pixels + origin)
        map_at = image * (MAPS * residual) * pixels + origin
        patch_at = image * patches + patch
        offset, present = _columns(0, first, along, height, width, 1, PATCH, DIMS, QUERIES)

        hidden = (tl.load(score_context + image * scorer + unit, mask=unit < scorer, other=0.0).to(tl.float32),)
        score_part = tl.zeros([QUERIES], tl.float32)
        score_shift = 0.0
        queries = _copies(tl.zeros([QUERIES, RESIDUAL], tl.float32), COUNT_HERE)
        read_grads = queries
        for chunk in tl.range(CHUNKS, disable_licm=True):
            channel = chunk * CHANNELS + block
            piece = _load(x_at, channel, channels, pixels, offset, present, WIDE)
            means = _means(
                x_at, (piece,), channel, channels, pixels, first, along, height, width,
                1, PATCH, DIMS, QUERIES, TOKENS, WIDE,
            )  # fmt: skip
            hidden = _hidden(hidden, means, score_weight, channel, channels, scorer, SCORER, 1)
            grad_piece = _load(grad_at, channel, channels, pixels, offset, present, WIDE)
            if MAIN:
                grad_means = _means(
                    grad_at, (grad_piece,), channel, channels, pixels, first, along, height, width,
                    1, PATCH, DIMS, QUERIES, TOKENS, WIDE,
                )  # fmt: skip
                shift = tl.load(output_bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
                score_shift += tl.sum(grad_means[0] * shift, 0) * TOKENS
                tl.store(means_of_patches + (patch_at * channels + channel), means[0], mask=channel < channels)
                grad_sum = grad_means[0] * TOKENS
                tl.store(sums_of_grads + (patch_at * channels + channel), grad_sum, mask=channel < channels)
            if TOKENS <= QUERIES:
                queries = _asked(
                    queries, piece, query_weight, first_head, channel, channels, residual, 1, channels,
                    MAPS, HEADS, HEADS_HERE, RESIDUAL, PRECISION,
                )  # fmt: skip
                read_grads = _asked(
                    read_grads, grad_piece, output_weight, first_head, channel, channels, residual, residual, 1,
                    MAPS, HEADS, HEADS_HERE, RESIDUAL, PRECISION,
                )  # fmt: skip
        value = _score(hidden[0], vector, bias)
        attended = (value >= threshold) | (threshold <= 0)
        factor = tl.where(attended, value, 0.0)

        for start in tl.range(0, TOKENS, QUERIES, disable_licm=True):
            asked = queries
            asked_grads = read_grads
            if TOKENS > QUERIES:
                block_offset, block_present = _columns(start, first, along, height, width, 1, PATCH, DIMS, QUERIES)
                for chunk in tl.range(CHUNKS, disable_licm=True):
                    channel = chunk * CHANNELS + block
                    asked = _asked(
                        asked, _load(x_at, channel, channels, pixels, block_offset, block_present, WIDE),
                        query_weight, first_head, channel, channels, residual, 1, channels,
                        MAPS, HEADS, HEADS_HERE, RESIDUAL, PRECISION,
                    )  # fmt: skip
                    asked_grads = _asked(
                        asked_grads, _load(grad_at, channel, channels, pixels, block_offset, block_present, WIDE),
                        output_weight, first_head, channel, channels, residual, residual, 1,
                        MAPS, HEADS, HEADS_HERE, RESIDUAL, PRECISION,
                    )  # fmt: skip
            for m in tl.range(MAPS, disable_licm=True):
                m_at = map_at + (map_at * 0 + m) * residual * pixels
                if TOKENS <= KEYS:
                    key = _load(keys + m_at, r, residual, pixels, offset, present, WIDE)
                    value_piece = _load(values + m_at, r, residual, pixels, offset, present, WIDE)
                    key_grads = tl.zeros([KEYS, RESIDUAL], tl.float32)
                    value_grads = key_grads
                for here in tl.range(HEADS_HERE, disable_licm=True):
                    head = first_head + here
                    i = m * HEADS + head
                    shift = tl.load(query_bias + i * residual + r, mask=r < residual, other=0.0)
                    query = _chosen(asked, m * HEADS_HERE + here, COUNT_HERE) + shift.to(tl.float32)[None, :]
                    read_grad = _chosen(asked_grads, m * HEADS_HERE + here, COUNT_HERE)
                    grad = factor * read_grad
                    if TOKENS <= KEYS:
                        logits = tl.zeros([QUERIES, KEYS], tl.float32)
                        logits = _dot_twice(query, key, logits, PRECISION) * (logit_scale * LOG2_E)
                        logits += _position(position_bias, head, 0, 0, QUERIES, KEYS, TOKENS)
                        exponentials = tl.exp2(logits - tl.max(logits, 1)[:, None])
                        probability = exponentials / tl.sum(exponentials, 1)[:, None]
                        result = tl.zeros([QUERIES, RESIDUAL], tl.float32)
                        result = _dot_twice(probability, tl.trans(value_piece), result, PRECISION)
                        through = tl.sum(read_grad * result, 1)
                        logits_grad = _through(probability, grad, value_piece, factor * through, PRECISION)
                        scaled_grad = (logits_grad * logit_scale).to(DTYPE)
                        query_grad = tl.dot(scaled_grad, tl.trans(key), input_precision=PRECISION)
                        if NEED_POSITION:
                            position_sums = _added(position_sums, here, logits_grad, HEADS_HERE)
                        if NEED_MAPS:
                            key_grads = tl.dot(
                                tl.trans(scaled_grad), query.to(DTYPE), acc=key_grads, input_precision=PRECISION
                            )
                            value_grads = tl.dot(
                                tl.trans(probability.to(DTYPE)), grad.to(DTYPE), acc=value_grads,
                                input_precision=PRECISION,
                            )  # fmt: skip
                    else:
                        top, total, result = _read_in_blocks(
                            query, keys + m_at, values + m_at, position_bias, head, start, residual, pixels,
                            height, width, logit_scale * LOG2_E, PATCH, DIMS, QUERIES, KEYS, RESIDUAL, TOKENS,
                            WIDE, PRECISION,
                        )  # fmt: skip
                        through = tl.sum(read_grad * result, 1)
                        query_grad = tl.zeros([QUERIES, RESIDUAL], tl.float32)
                        for key_start in tl.range(0, TOKENS, KEYS, disable_licm=True):
                            key_offset, key_present = _columns(key_start, 0, 1, height, width, 1, PATCH, DIMS, KEYS)
                            key_block = _load(keys + m_at, r, residual, pixels, key_offset, key_present, WIDE)
                            value_block = _load(values + m_at, r, residual, pixels, key_offset, key_present, WIDE)
                            logits = tl.zeros([QUERIES, KEYS], tl.float32)
                            logits = _dot_twice(query, key_block, logits, PRECISION) * (logit_scale * LOG2_E)
                            logits += _position(position_bias, head, start, key_start, QUERIES, KEYS, TOKENS)
                            probability = tl.exp2(logits - top[:, None]) / total[:, None]
                            logits_grad = _through(probability, grad, value_block, factor * through, PRECISION)
                            scaled_grad = (logits_grad * logit_scale).to(DTYPE)
                            query_grad = tl.dot(
                                scaled_grad, tl.trans(key_block), acc=query_grad, input_precision=PRECISION
                            )
                            if NEED_POSITION:
                                at, mask = _position_at(head, start, key_start, QUERIES, KEYS, TOKENS)
                                _add_to(position_parts + position_base, at, mask, logits_grad)
                            if NEED_MAPS:
                                map_where, map_there = _at(r, residual, pixels, key_offset, key_present, WIDE)
                                key_grad = tl.dot(tl.trans(scaled_grad), query.to(DTYPE), input_precision=PRECISION)
                                _add_to(keys_grad + m_at, map_where, map_there, tl.trans(key_grad))
                                value_grad = tl.dot(
                                    tl.trans(probability.to(DTYPE)), grad.to(DTYPE), input_precision=PRECISION
                                )
                                _add_to(values_grad + m_at, map_where, map_there, tl.trans(value_grad))
                    if MAIN:
                        score_part += through
                        token = start + tl.arange(0, QUERIES)
                        kept_at = (patch_at * TOKENS + token)[:, None] * (COUNT * RESIDUAL)
                        kept_at += (i * RESIDUAL + r)[None, :]
                        kept = (token < TOKENS)[:, None] & (r >= 0)[None, :]
                        tl.store(query_grads + kept_at, query_grad.to(DTYPE), mask=kept)
                        tl.store(reads + kept_at, (factor * result).to(DTYPE), mask=kept)
                if NEED_MAPS and TOKENS <= KEYS:
                    _store(keys_grad + m_at, tl.trans(key_grads), r, residual, pixels, offset, present, WIDE)
                    _store(values_grad + m_at, tl.trans(value_grads), r, residual, pixels, offset, present, WIDE)

        if MAIN:
            incoming = tl.load(score_grad + patch_at)
            passed = tl.where(attended, score_shift + tl.sum(score_part, 0), 0.0)
            tl.store(logit_grad + patch_at, (incoming + passed) * value * (1 - value))

    if NEED_POSITION and TOKENS <= KEYS:
        for here in tl.static_range(HEADS_HERE):
            at, mask = _position_at(first_head + here, 0, 0, QUERIES, KEYS, TOKENS)
            tl.store(position_parts + position_base + at, position_sums[here], mask=mask)


@triton.jit
def _channels_backward_kernel(
    x, query_weight, out_grad, query_grads, reads, mean_grads, x_grad, query_weight_parts, query_bias_parts,
    output_weight_parts, groups, groups_a_program, channels, residual, depth, height, width_units,
    COUNT: tl.constexpr, STACK: tl.constexpr, RESIDUAL: tl.constexpr, PATCH: tl.constexpr, DIMS: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, NEED_X: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """From the gradients of the queries to those of x and of the weights, for the block of channels of the second
    program number."""
    TOKENS: tl.constexpr = PATCH * PATCH if DIMS == 2 else PATCH * PATCH * PATCH
    COLUMNS: tl.constexpr = QUERIES * GROUP
    DTYPE: tl.constexpr = x.dtype.element_ty
    tl.static_assert(GROUP == 1 or QUERIES == TOKENS, "patches of a group are blocks of queries each")
    tl.static_assert(COUNT <= STACK, "all maps and heads are one block")
    width = width_units * UNIT
    along = width // PATCH
    pixels = height * width
    patches = along * (height // PATCH)
    if DIMS == 3:
        pixels = pixels * depth
        patches = patches * (depth // PATCH)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    program = tl.program_id(0)
    kept = tl.arange(0, STACK * RESIDUAL)
    query_weight_sum = tl.zeros([CHANNELS, STACK * RESIDUAL], tl.float32)
    output_weight_sum = query_weight_sum
    query_bias_sum = tl.zeros([STACK * RESIDUAL], tl.float32)
    weight_at, weight_mask = _weight_at(channel, channels, residual, 1, channels, COUNT, STACK, RESIDUAL)

    begin = program * groups_a_program
    for group in tl.range(begin, tl.minimum(begin + groups_a_program, groups), disable_licm=True):
        image, patch, first, origin = _place(group, depth, height, width, GROUP, PATCH, DIMS)
        base = image * channels * pixels + origin
        for start in tl.range(0, TOKENS, QUERIES, disable_licm=True):
            offset, present = _columns(start, first, along, height, width, GROUP, PATCH, DIMS, COLUMNS)
            column = start + tl.arange(0, COLUMNS)
            which = column // PATCH % GROUP
            token = column // (GROUP * PATCH) * PATCH + column % PATCH
            if GROUP == 1:
                which = tl.zeros_like(column)
                token = column
            kept_at = ((image * patches + patch + which) * TOKENS + token)[:, None] * (COUNT * RESIDUAL) + kept[None, :]
            kept_mask = present[:, None] & (kept < COUNT * RESIDUAL)[None, :]
            query_grad = tl.load(query_grads + kept_at, mask=kept_mask, other=0.0)
            grad = _load(out_grad + base, channel, channels, pixels, offset, present, WIDE)
            if NEED_WEIGHTS:
                query_bias_sum += tl.sum(query_grad.to(tl.float32), 0)
                tile = _load(x + base, channel, channels, pixels, offset, present, WIDE)
                query_weight_sum = tl.dot(tile, query_grad, acc=query_weight_sum, input_precision=PRECISION)
                read = tl.load(reads + kept_at, mask=kept_mask, other=0.0)
                output_weight_sum = tl.dot(grad, read, acc=output_weight_sum, input_precision=PRECISION)
            if NEED_X:
                weight = tl.load(query_weight + weight_at, mask=weight_mask, other=0.0).to(DTYPE)
                total = tl.dot(weight, tl.trans(query_grad), input_precision=PRECISION) + grad.to(tl.float32)
                for one in tl.static_range(GROUP):
                    mean_at = (image * patches + patch + one) * channels + channel
                    mean_grad = tl.load(
                        mean_grads + mean_at, mask=(channel < channels) & (first + one < along), other=0.0
                    )
                    total += tl.where((which == one)[None, :], mean_grad[:, None], 0.0)
                _store(x_grad + base, total, channel, channels, pixels, offset, present, WIDE)

    if NEED_WEIGHTS:
        bias_at, bias_mask = _query_biases(
            query_bias_parts + program * COUNT * residual, residual, COUNT, STACK, RESIDUAL
        )
        tl.store(bias_at, query_bias_sum, mask=bias_mask & (tl.program_id(1) == 0))
        parts_at = program.to(tl.int64) * (COUNT * channels * residual)
        tl.store(query_weight_parts + parts_at + weight_at, query_weight_sum, mask=weight_mask)
        at, mask = _weight_at(channel, channels, residual, residual, 1, COUNT, STACK, RESIDUAL)
        tl.store(output_weight_parts + parts_at + at, output_weight_sum, mask=mask)


def _programs(groups: int, device: torch.device) -> int:
    """Two programs a multiprocessor, of which each takes its share of the groups; an H100's where there is none."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return max(1, min(groups, 2 * multiprocessors))


def _precision() -> str:
    """Of float32 products: three of tf32 on NVIDIA's matrix units; AMD's multiply float32 as it is."""
    if triton.knobs.runtime.interpret:
        return "tf32x3"
    return "ieee" if triton.runtime.driver.active.get_current_target().backend == "hip" else "tf32x3"


def _neighbours(blocks: tuple[Block, ...]) -> list[tuple[Block, ...]]:
    """A step away from entries of the table: half or twice the warps or the channels of one kernel."""
    found = []
    for place, block in enumerate(blocks):
        for name, least, most in (("warps", 2, 16), ("channels", 16, 128)):
            for number in (getattr(block, name) // 2, getattr(block, name) * 2):
                if least <= number <= most:
                    other = dataclasses.replace(block, **{name: number})
                    found.append((*blocks[:place], other, *blocks[place + 1 :]))
    return found


def _blocks(
    kernels: tuple[str, ...], x: Tensor, weights: Any, patch: int, run: Callable[[tuple[Block, ...]], Any]
) -> tuple[Block, ...]:
    """A block shape a kernel: the table's, or the one that is fastest where it is to be measured."""
    channels, dims, where = x.shape[1], x.dim() - 2, tuning.architecture()
    scorer = weights.score_weight.shape[0]
    blocks = tuple(block_of(one, channels, patch, dims, x.element_size(), scorer, where) for one in kernels)
    if not x.numel():
        return blocks
    key = ("patch_cross_attention", kernels[0], channels, patch, dims, x.dtype, where)
    return tuning.chosen(key, blocks, lambda: _neighbours(blocks), run)


class _Launch:
    """Sizes and block shape of a launch."""

    def __init__(self, x: Tensor, weights: Any, patch: int, block: Block) -> None:
        batch, channels, *spatial = x.shape
        maps, heads, residual, _ = weights.query_weight.shape
        self.maps, self.heads, self.residual = maps, heads, residual
        scorer = weights.score_weight.shape[0]
        depth, height, width = (1, *spatial) if len(spatial) == 2 else spatial
        self.block = block
        self.patches = math.prod(size // patch for size in spatial)
        rows = batch * math.prod(size // patch for size in spatial[:-1])
        self.groups = rows * -(-(width // patch) // block.group)
        self.programs = _programs(self.groups, x.device)
        groups_a_program = -(-self.groups // self.programs)
        self.programs = -(-self.groups // groups_a_program) if self.groups else 0
        unit = math.gcd(width, 16)
        self.sizes = (
            self.groups, groups_a_program, channels, residual, scorer, depth, height, width // unit, residual**-0.5,
        )  # fmt: skip
        self.blocks: dict[str, Any] = {
            "MAPS": maps, "HEADS": heads, "RESIDUAL": max(16, triton.next_power_of_2(residual)), "PATCH": patch,
            "DIMS": len(spatial), "GROUP": block.group, "QUERIES": block.queries, "KEYS": block.keys,
            "CHANNELS": block.channels, "CHUNKS": -(-channels // block.channels), "SCORER": block.scorer,
            "UNIT": unit, "WIDE": max(channels, maps * residual) * math.prod(spatial) >= 2**31,
            "PRECISION": _precision(), "RESIDENT": block.resident, "COUNT": maps * heads,
            "STACK": triton.next_power_of_2(maps * heads),
        }  # fmt: skip

    def settings(self, kernel: Any) -> dict[str, Any]:
        """What a kernel is compiled for."""
        known = {name: value for name, value in self.blocks.items() if name in kernel.arg_names}
        return known | {"num_warps": self.block.warps, "num_stages": 1}


def forward(
    x: Tensor, keys: Tensor, values: Tensor, weights: Any, patch: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """``(out, score)``; everything is dense, ``weights`` is an AttentionWeights."""

    def run(blocks: tuple[Block, ...]) -> tuple[Tensor, Tensor]:
        launch = _Launch(x, weights, patch, *blocks)
        out = torch.empty_like(x)
        score = x.new_empty(x.shape[0], 1, *(size // patch for size in x.shape[2:]), dtype=torch.float32)
        if launch.groups:
            _forward_kernel[(launch.programs,)](
                x, keys, values, *weights, out, score, threshold, *launch.sizes, **launch.settings(_forward_kernel)
            )
        return out, score

    return run(_blocks(("forward",), x, weights, patch, run))


def backward(
    out_grad: Tensor,
    score_grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Any,
    patch: int,
    threshold: float,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the twelve tensors, those of the weights in float32, None where not needed."""
    arguments = out_grad, score_grad, x, keys, values, weights, patch, threshold, needed

    def run(blocks: tuple[Block, ...]) -> list[Tensor | None]:
        return _backward(*arguments, *(_Launch(x, weights, patch, block) for block in blocks))

    return run(_blocks(("attention", "position", "channels"), x, weights, patch, run))


def _backward(
    out_grad: Tensor,
    score_grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Any,
    patch: int,
    threshold: float,
    needed: Sequence[bool],
    launch: _Launch,
    position_launch: _Launch,
    channels_launch: _Launch,
) -> list[Tensor | None]:
    batch, channels = x.shape[:2]
    maps, heads, residual = launch.maps, launch.heads, launch.residual
    tokens = patch ** (x.dim() - 2)
    need_maps, need_weights = any(needed[1:3]), any(needed[index] for index in (3, 4, 6))
    added = tokens > launch.block.keys  # block after block, in memory

    def sums(wanted: bool, launch: _Launch, *shape: int, in_blocks: bool = False) -> Tensor:
        make = torch.zeros if in_blocks else torch.empty
        return make((launch.programs, *shape) if wanted else 0, dtype=torch.float32, device=x.device)

    def map_grad(like: Tensor) -> Tensor:
        if not need_maps:
            return like.new_empty(0)
        return torch.zeros_like(like, dtype=torch.float32) if added else torch.empty_like(like)

    def of_patches(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch, launch.patches, *shape, dtype=dtype, device=x.device)

    x_grad = torch.empty_like(x) if needed[0] else x.new_empty(0)
    map_grads = [map_grad(keys), map_grad(values)]
    query_weight = sums(need_weights, channels_launch, maps, heads, residual, channels)
    output_weight = sums(need_weights, channels_launch, maps, heads, channels, residual)
    query_bias = sums(need_weights, channels_launch, maps, heads, residual)
    in_blocks = tokens > min(launch.block.keys, position_launch.block.keys)
    position = sums(needed[5], position_launch, heads, tokens, tokens, in_blocks=in_blocks)
    logit_grad, means, grad_sums = of_patches(), of_patches(channels), of_patches(channels)
    columns = maps * heads * launch.blocks["RESIDUAL"]
    query_grads, reads = (of_patches(tokens, columns, dtype=x.dtype) for _ in range(2))
    if launch.groups:
        apart = bool(needed[5]) and (not added or x.dtype == torch.float32)
        for one, main in ((launch, True), (position_launch, False))[: 1 + apart]:
            grads_here = map_grads if main else [x.new_empty(0)] * 2
            heads_here = 1 if one.block.by_head and not main else heads
            _attention_backward_kernel[(one.programs, heads // heads_here)](
                x, keys, values, *weights, out_grad, score_grad, query_grads, reads, *grads_here, position, logit_grad,
                means, grad_sums, threshold, *one.sizes, **one.settings(_attention_backward_kernel), MAIN=main,
                HEADS_HERE=heads_here, NEED_MAPS=need_maps and main, NEED_POSITION=bool(needed[5]) and main != apart,
            )  # fmt: skip
    score_weight, score_context, score_vector, score_bias = (
        one.float() for one in (weights.score_weight, weights.score_context, weights.score_vector, weights.score_bias)
    )
    # The scorer's own gradients are small products over patches.
    activation = torch.relu(means @ score_weight.T + score_context[:, None])
    hidden_grad = torch.where(activation > 0, logit_grad[..., None] * score_vector, 0.0)
    if launch.groups and (needed[0] or need_weights):
        _channels_backward_kernel[(channels_launch.programs, channels_launch.blocks["CHUNKS"])](
            x, weights.query_weight, out_grad, query_grads, reads, hidden_grad @ score_weight / tokens, x_grad,
            query_weight, query_bias, output_weight, *channels_launch.sizes[:4], *channels_launch.sizes[5:8],
            **channels_launch.settings(_channels_backward_kernel), NEED_X=bool(needed[0]), NEED_WEIGHTS=need_weights,
        )  # fmt: skip

    def output_bias() -> Tensor:
        score = torch.sigmoid(activation @ score_vector + score_bias)
        attended = score * (score >= threshold) if threshold > 0 else score
        return torch.einsum("bp,bpc->c", attended, grad_sums)

    grads: list[Callable[[], Tensor]] = [
        lambda: x_grad,
        lambda: map_grads[0].to(keys.dtype),
        lambda: map_grads[1].to(values.dtype),
        lambda: query_weight.sum(0),
        lambda: query_bias.sum(0),
        lambda: position.sum(0),
        lambda: output_weight.sum(0),
        output_bias,
        lambda: torch.einsum("bps,bpc->sc", hidden_grad, means),
        lambda: hidden_grad.sum(1),
        lambda: torch.einsum("bp,bps->s", logit_grad, activation),
        lambda: logit_grad.sum(),
    ]
    return [grad() if wanted else None for grad, wanted in zip(grads, needed, strict=True)]
