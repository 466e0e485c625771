"""Global compensation of all scales of a network in one launch, forward and backward.

What it means: grcsf_fast/reference.py. A program takes a tile of all channels and marches along the first axis of space
(rows of an image, planes of a volume), so that features are read once and stay in registers between the sums over the
channels and the scaling, and a plane of the coarse features is read once for the four fine ones it reaches. The
interpolation picks lanes of a coarse tile and of the columns beside it, instead of multiplying by a matrix: a NaN stays
where it is.

The gradient of the coarse features is summed tile by tile, the lanes beyond a tile's sides included, and a second
kernel adds what neighbouring tiles hold of the same pixel: no atomics, the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

__all__ = ["Tile", "backward", "forward", "tile_of"]


@dataclass(frozen=True)
class Tile:
    """Block shape of a scale: fine pixels of a plane, coarse planes of a strip. All but the strip are powers of two."""

    channels: int
    height: int
    width: int
    strip: int


def tile_of(channels: int, planar: bool, backward: bool) -> Tile:
    """The table of block shapes.

    A forward has about six tiles in registers, a backward about twice as many: of 2048 numbers in 2-D, with 4 and 8
    warps; of up to 8192 and 4096 in 3-D, with 8 warps, because a tile narrow in two axes would read the coarse features
    around it too often. Half of that from 128 and 64 channels on, where a thread's numbers lie in more channels, whose
    offsets and gates also take registers. Strips are longer in a backward, where what lies beyond their ends is also
    written.
    """
    padded = triton.next_power_of_2(channels)
    if planar:
        return Tile(padded, 1, min(128, max(4, 2048 // padded)), 16 if backward else 4)
    numbers = 4096 if backward else 8192
    if padded > (32 if backward else 64):
        numbers //= 2
    pixels = min(128, max(8, numbers // padded))
    width = 4 if pixels < 32 else 8 if pixels < 64 else 16
    return Tile(padded, pixels // width, width, 16 if backward else 8)


def warps_of(planar: bool, backward: bool) -> int:
    return 4 if planar and not backward else 8


@triton.jit
def _check_tile(HEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr, UNIT: tl.constexpr):
    """A block shape that the kernels would misread does not compile."""
    if HEIGHT > 1:
        tl.static_assert(HEIGHT % 2 == 0, "a tile of a volume is of whole coarse rows")
        tl.static_assert(HEIGHT // 2 + 2 <= ROWS, "a tile's coarse rows and one on either side fit their block")
    else:
        tl.static_assert(ROWS == 1, "an image has one row a plane")
    tl.static_assert(WIDTH >= 2 and WIDTH % 2 == 0, "a tile is of whole coarse columns")
    tl.static_assert(STRIP >= 1, "a strip has a coarse plane at the least")
    tl.static_assert(UNIT % 2 == 0, "rows have an exact half")


@triton.jit
def _pick(tile, at, AXIS: tl.constexpr):
    """Entries ``at`` along an axis, the same for all others."""
    return tl.gather(tile, tl.broadcast_to(at, tile.shape), axis=AXIS)


@triton.jit
def _pick_rows(tile, at, ROWS: tl.constexpr, AXES: tl.constexpr):
    """Rows ``at``, ``ROWS`` of them, of a tile (C, rows, columns) or of the columns beside one (C, rows)."""
    if AXES == 3:
        rows = tl.gather(tile, tl.broadcast_to(at[None, :, None], [tile.shape[0], ROWS, tile.shape[2]]), axis=1)
    else:
        rows = tl.gather(tile, tl.broadcast_to(at[None, :], [tile.shape[0], ROWS]), axis=1)
    return rows


@triton.jit
def _beside(tile, STEP: tl.constexpr):
    """The columns on the left (STEP -1) or on the right of each; the outermost repeats itself."""
    WIDTH: tl.constexpr = tile.shape[2]
    column = tl.arange(0, WIDTH)[None, None, :]
    return _pick(tile, tl.minimum(tl.maximum(column + STEP, 0), WIDTH - 1), 2)


@triton.jit
def _mixed(near, far):
    """Three quarters of a coarse tile and a quarter of another; a tile is its columns and those beside it."""
    return 0.75 * near[0] + 0.25 * far[0], 0.75 * near[1] + 0.25 * far[1], 0.75 * near[2] + 0.25 * far[2]


@triton.jit
def _upsample_rows(tile, ROWS: tl.constexpr, AXES: tl.constexpr):
    """Coarse rows, the first one before the tile, to ``ROWS`` fine ones."""
    row = tl.arange(0, ROWS)
    own = row // 2 + 1
    other = own + row % 2 * 2 - 1
    return 0.75 * _pick_rows(tile, own, ROWS, AXES) + 0.25 * _pick_rows(tile, other, ROWS, AXES)


@triton.jit
def _upsample(coarse, x, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A coarse tile (C, ROWS, WIDTH / 2) and what is beside it to (C, HEIGHT, WIDTH) fine pixels.

    ``x`` are the tile's columns in the image of ``columns`` columns, beyond whose edges the outermost repeats.
    """
    tile, left, right = coarse
    if HEIGHT > 1:
        tile = _upsample_rows(tile, HEIGHT, 3)
        left, right = _upsample_rows(left, HEIGHT, 2), _upsample_rows(right, HEIGHT, 2)
    lane = tl.arange(0, WIDTH // 2)[None, None, :]
    before = tl.where(lane == 0, left[:, :, None], _beside(tile, -1))
    after = tl.where(lane == WIDTH // 2 - 1, right[:, :, None], _beside(tile, 1))
    before = tl.where(x == 0, tile, before)
    after = tl.where(x == columns - 1, tile, after)
    both = tl.join(0.75 * tile + 0.25 * before, 0.75 * tile + 0.25 * after)
    return tl.reshape(both, [tile.shape[0], HEIGHT, WIDTH])


@triton.jit
def _rows_inside(tile, at, HEIGHT: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr):
    """Rows ``at``, ``ROWS`` of them, of a tile of ``HEIGHT``, 0 where they are outside it."""
    inside = (at >= 0) & (at < HEIGHT)
    rows = _pick_rows(tile, tl.where(inside, at, 0), ROWS, AXES)
    if AXES == 3:
        rows = tl.where(inside[None, :, None], rows, 0.0)
    else:
        rows = tl.where(inside[None, :], rows, 0.0)
    return rows


@triton.jit
def _downsample_rows(tile, HEIGHT: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr):
    """The transpose of :func:`_upsample_rows`: ``HEIGHT`` fine rows to ``ROWS`` coarse ones."""
    row = 2 * tl.arange(0, ROWS)
    near = _rows_inside(tile, row - 2, HEIGHT, ROWS, AXES) + _rows_inside(tile, row - 1, HEIGHT, ROWS, AXES)
    far = _rows_inside(tile, row, HEIGHT, ROWS, AXES) + _rows_inside(tile, row - 3, HEIGHT, ROWS, AXES)
    return 0.75 * near + 0.25 * far


@triton.jit
def _downsample(fine, x, columns, HEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The transpose of :func:`_upsample`: a coarse tile's gradient and that of the columns beside it."""
    even, odd = tl.split(tl.reshape(fine, [fine.shape[0], HEIGHT, WIDTH // 2, 2]))
    lane = tl.arange(0, WIDTH // 2)[None, None, :]
    # What the image's outermost columns would pass beyond its edges goes to themselves.
    from_left = tl.where(x == 0, even, tl.where(lane == 0, 0.0, _beside(odd, -1)))
    from_right = tl.where(x == columns - 1, odd, tl.where(lane == WIDTH // 2 - 1, 0.0, _beside(even, 1)))
    tile = 0.75 * (even + odd) + 0.25 * (from_left + from_right)
    left = 0.25 * tl.sum(tl.where(lane == 0, even, 0.0), 2)
    right = 0.25 * tl.sum(tl.where(lane == WIDTH // 2 - 1, odd, 0.0), 2)
    if HEIGHT > 1:
        tile = _downsample_rows(tile, HEIGHT, ROWS, 3)
        left, right = _downsample_rows(left, HEIGHT, ROWS, 2), _downsample_rows(right, HEIGHT, ROWS, 2)
    return tile, left, right


@triton.jit
def _place(
    number, planes, height, width,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Image, first coarse plane, first fine row and first fine column of a program."""
    across, down = tl.cdiv(width, WIDTH), tl.cdiv(height, HEIGHT)
    along = tl.cdiv(planes // 2, STRIP)
    tiles = across * down * along
    image, tile = number // tiles, number % tiles
    return image, tile // (across * down) * STRIP, tile // across % down * HEIGHT, tile % across * WIDTH


@triton.jit
def _fine_lanes(row, column, height, width, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(1, HEIGHT, WIDTH) offsets of a tile's pixels inside a plane, and which of them there are."""
    x = column + tl.arange(0, WIDTH)[None, None, :]
    y = row + tl.arange(0, HEIGHT)[None, :, None]
    return y * width + x, (x < width) & (y < height)


@triton.jit
def _coarse_rows(row, height, width, HEIGHT: tl.constexpr, ROWS: tl.constexpr):
    """(1, ROWS) offsets of a coarse tile's rows inside a plane, the first one before the tile, and which are needed.

    Beyond an edge the last row repeats. A 2-D image has one row a plane.
    """
    lane = tl.arange(0, ROWS)[None, :]
    if HEIGHT > 1:
        y = row // 2 - 1 + lane
        needed = (lane < HEIGHT // 2 + 2) & (y <= height // 2)
        y = tl.minimum(tl.maximum(y, 0), height // 2 - 1)
    else:
        y = lane
        needed = lane == 0
    return y * (width // 2), needed


@triton.jit
def _coarse_plane(coarse, rows, mask, first, columns, plane, planes, size, COLUMNS: tl.constexpr):
    """One plane of a coarse tile (C, rows, columns), and the columns beside it (C, rows); planes repeat at the ends."""
    plane = tl.minimum(tl.maximum(plane, 0), planes // 2 - 1)
    at = rows + (plane * size + first)
    x = tl.arange(0, COLUMNS)[None, None, :]
    tile = tl.load(coarse + (at[:, :, None] + x), mask=mask[:, :, None] & (first + x < columns), other=0.0)
    left = tl.load(coarse + (at - 1), mask=mask & (first > 0), other=0.0)
    right = tl.load(coarse + (at + COLUMNS), mask=mask & (first + COLUMNS < columns), other=0.0)
    return tile.to(tl.float32), left.to(tl.float32), right.to(tl.float32)


@triton.jit
def _channel_offsets(CHANNELS: tl.constexpr, size, WIDE: tl.constexpr):
    """Of the first pixel of each channel, in 64 bits where an image has 2^31 numbers or more."""
    channel = tl.arange(0, CHANNELS)
    if WIDE:
        offsets = channel.to(tl.int64) * size
    else:
        offsets = channel * size
    return offsets


@triton.jit
def _forward_scale(
    number, features, coarse, feature_gate, coarse_gate, compensated, residual, channels, planes, height, width_units,
    eps, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = HEIGHT if HEIGHT != 2 else 4
    _check_tile(HEIGHT, ROWS, WIDTH, STRIP, UNIT)
    width = width_units * UNIT  # so that the compiler knows how rows are aligned
    image, first, row, column = _place(number, planes, height, width, HEIGHT, WIDTH, STRIP)
    plane_size = height * width
    coarse_size = width_units * (UNIT // 2)
    if HEIGHT > 1:
        coarse_size = coarse_size * (height // 2)
    image = image.to(tl.int64)
    features += image * channels * planes * plane_size
    compensated += image * channels * planes * plane_size
    residual += image * planes * plane_size
    coarse += image * channels * (planes // 2) * coarse_size

    channel = tl.arange(0, CHANNELS)
    present = channel < channels
    gate_at = image * channels + channel
    feature_gates = tl.load(feature_gate + gate_at, mask=present, other=0.0).to(tl.float32)[:, None, None]
    coarse_gates = tl.load(coarse_gate + gate_at, mask=present, other=0.0).to(tl.float32)[:, None, None]
    lane, inside = _fine_lanes(row, column, height, width, HEIGHT, WIDTH)
    at = _channel_offsets(CHANNELS, planes * plane_size, WIDE)[:, None, None] + lane
    mask = present[:, None, None] & inside
    rows, needed = _coarse_rows(row, height, width, HEIGHT, ROWS)
    rows = _channel_offsets(CHANNELS, planes // 2 * coarse_size, WIDE)[:, None] + rows
    needed = present[:, None] & needed
    columns = width_units * (UNIT // 2)
    first_column = column // 2
    x = first_column + tl.arange(0, WIDTH // 2)[None, None, :]

    before = _coarse_plane(coarse, rows, needed, first_column, columns, first - 1, planes, coarse_size, WIDTH // 2)
    here = _coarse_plane(coarse, rows, needed, first_column, columns, first, planes, coarse_size, WIDTH // 2)
    for plane in tl.range(first, tl.minimum(first + STRIP, planes // 2), disable_licm=True):
        after = _coarse_plane(coarse, rows, needed, first_column, columns, plane + 1, planes, coarse_size, WIDTH // 2)
        for half in tl.static_range(2):
            mixed = _mixed(here, before if half == 0 else after)
            shift = (2 * plane + half) * plane_size
            value = tl.load(features + (at + shift), mask=mask, other=0.0).to(tl.float32)
            gated = feature_gates * value
            upsampled = coarse_gates * _upsample(mixed, x, columns, HEIGHT, WIDTH)
            dot = tl.sum(gated * upsampled, 0)
            energy = tl.sum(gated * gated, 0) * tl.sum(upsampled * upsampled, 0)
            # Written so that NaN goes through.
            energy = tl.where(energy < eps, eps, energy)
            rest = (1 - dot / tl.sqrt_rn(energy))[None, :, :]
            out = value * (1 + rest)
            tl.store(compensated + (at + shift), out.to(compensated.dtype.element_ty), mask=mask)
            tl.store(residual + (lane + shift), rest.to(residual.dtype.element_ty), mask=inside)
        before = here
        here = after


@triton.jit
def _forward_kernel(
    features, coarse, feature_gate, coarse_gate, compensated, residual, channels, planes, height, width_units, ends,
    eps, BLOCKS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Tuples with an entry a scale; ``ends`` are the numbers of programs up to and with each."""
    program = tl.program_id(0)
    for scale in tl.static_range(SCALES):
        begin = 0 if scale == 0 else ends[scale - 1]
        if (program >= begin) & (program < ends[scale]):
            _forward_scale(
                program - begin, features[scale], coarse[scale], feature_gate[scale], coarse_gate[scale],
                compensated[scale], residual[scale], channels[scale], planes[scale], height[scale], width_units[scale],
                eps, BLOCKS[scale][0], BLOCKS[scale][1], BLOCKS[scale][2], BLOCKS[scale][3], BLOCKS[scale][4],
                BLOCKS[scale][5],
            )  # fmt: skip


@triton.jit
def _backward_scale(
    number, features, coarse, feature_gate, coarse_gate, compensated_grad, residual_grad,
    features_grad, coarse_parts, feature_gate_parts, coarse_gate_parts, channels, planes, height, width_units, eps,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, FEATURES: tl.constexpr, COARSE: tl.constexpr, FEATURE_GATE: tl.constexpr,
    COARSE_GATE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = HEIGHT if HEIGHT != 2 else 4
    _check_tile(HEIGHT, ROWS, WIDTH, STRIP, UNIT)
    width = width_units * UNIT
    image, first, row, column = _place(number, planes, height, width, HEIGHT, WIDTH, STRIP)
    plane_size = height * width
    coarse_size = width_units * (UNIT // 2)
    if HEIGHT > 1:
        coarse_size = coarse_size * (height // 2)
    image = image.to(tl.int64)
    features += image * channels * planes * plane_size
    compensated_grad += image * channels * planes * plane_size
    features_grad += image * channels * planes * plane_size
    residual_grad += image * planes * plane_size
    coarse += image * channels * (planes // 2) * coarse_size

    channel = tl.arange(0, CHANNELS)
    present = channel < channels
    gate_at = image * channels + channel
    feature_gates = tl.load(feature_gate + gate_at, mask=present, other=0.0).to(tl.float32)[:, None, None]
    coarse_gates = tl.load(coarse_gate + gate_at, mask=present, other=0.0).to(tl.float32)[:, None, None]
    lane, inside = _fine_lanes(row, column, height, width, HEIGHT, WIDTH)
    at = _channel_offsets(CHANNELS, planes * plane_size, WIDE)[:, None, None] + lane
    mask = present[:, None, None] & inside
    rows, needed = _coarse_rows(row, height, width, HEIGHT, ROWS)
    rows = _channel_offsets(CHANNELS, planes // 2 * coarse_size, WIDE)[:, None] + rows
    needed = present[:, None] & needed
    columns = width_units * (UNIT // 2)
    first_column = column // 2
    x = first_column + tl.arange(0, WIDTH // 2)[None, None, :]

    # (C, STRIP + 2, rows, columns) numbers of this program's part of the coarse gradient.
    PART_WIDTH: tl.constexpr = WIDTH // 2 + 2
    PART_HEIGHT: tl.constexpr = HEIGHT // 2 + 2 if HEIGHT > 1 else 1
    part_row = tl.arange(0, ROWS)[None, :]
    part_at = channel[:, None] * ((STRIP + 2) * PART_HEIGHT * PART_WIDTH) + part_row * PART_WIDTH
    part_mask = present[:, None] & (part_row < PART_HEIGHT)
    coarse_parts += number.to(tl.int64) * channels * ((STRIP + 2) * PART_HEIGHT * PART_WIDTH)

    feature_gate_sum = tl.zeros([CHANNELS], tl.float32)
    coarse_gate_sum = tl.zeros([CHANNELS], tl.float32)
    nothing = tl.zeros([CHANNELS, ROWS, WIDTH // 2], tl.float32)
    nothing_beside = tl.zeros([CHANNELS, ROWS], tl.float32)
    # Of the two coarse planes that a fine one reaches.
    lower_grad = nothing, nothing_beside, nothing_beside
    upper_grad = nothing, nothing_beside, nothing_beside
    near = _coarse_plane(coarse, rows, needed, first_column, columns, first, planes, coarse_size, WIDTH // 2)
    last = tl.minimum(first + STRIP, planes // 2)
    for fine in tl.range(2 * first, 2 * last, disable_licm=True):
        # Even planes lie between their coarse plane and the one before, odd ones between it and the one after.
        plane, even = fine // 2, fine % 2 == 0
        other = plane + tl.where(even, -1, 1)
        far = _coarse_plane(coarse, rows, needed, first_column, columns, other, planes, coarse_size, WIDTH // 2)
        shift = fine * plane_size
        value = tl.load(features + (at + shift), mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(compensated_grad + (at + shift), mask=mask, other=0.0).to(tl.float32)
        rest_grad = tl.load(residual_grad + (lane + shift), mask=inside, other=0.0).to(tl.float32)
        upsampled = _upsample(_mixed(near, far), x, columns, HEIGHT, WIDTH)
        gated = feature_gates * value
        weighed = coarse_gates * upsampled
        dot = tl.sum(gated * weighed, 0)[None, :, :]
        feature_energy = tl.sum(gated * gated, 0)[None, :, :]
        coarse_energy = tl.sum(weighed * weighed, 0)[None, :, :]
        energy = feature_energy * coarse_energy
        floored = energy < eps
        energy = tl.where(floored, eps, energy)
        norm = tl.sqrt_rn(energy)
        cosine = dot / norm
        cosine_grad = -(rest_grad + tl.sum(grad * value, 0)[None, :, :])
        dot_grad = cosine_grad / norm
        energy_grad = tl.where(floored, 0.0, -cosine_grad * cosine / energy)
        if FEATURES or FEATURE_GATE:
            gated_grad = dot_grad * weighed + energy_grad * coarse_energy * gated
            if FEATURES:
                out = grad * (2 - cosine) + feature_gates * gated_grad
                tl.store(features_grad + (at + shift), out.to(features_grad.dtype.element_ty), mask=mask)
            if FEATURE_GATE:
                feature_gate_sum += tl.sum(tl.sum(value * gated_grad, 2), 1)
        if COARSE or COARSE_GATE:
            weighed_grad = dot_grad * gated + energy_grad * feature_energy * weighed
            if COARSE_GATE:
                coarse_gate_sum += tl.sum(tl.sum(tl.where(mask, upsampled * weighed_grad, 0.0), 2), 1)
            if COARSE:
                down = _downsample(coarse_gates * weighed_grad, x, columns, HEIGHT, ROWS, WIDTH)
                lower_grad = _added(lower_grad, down, tl.where(even, 0.25, 0.75))
                upper_grad = _added(upper_grad, down, tl.where(even, 0.75, 0.25))
                # After an even plane the lower coarse plane has all that this strip gives it.
                done = part_mask & even
                _store_part(coarse_parts, part_at, done, plane - first, lower_grad, PART_HEIGHT, PART_WIDTH)
                lower_grad = _chosen(even, upper_grad, lower_grad)
                upper_grad = _chosen(even, (nothing, nothing_beside, nothing_beside), upper_grad)
        near = _chosen(even, near, far)
    if COARSE:
        _store_part(coarse_parts, part_at, part_mask, last - first, lower_grad, PART_HEIGHT, PART_WIDTH)
        _store_part(coarse_parts, part_at, part_mask, last - first + 1, upper_grad, PART_HEIGHT, PART_WIDTH)
    if FEATURE_GATE:
        tl.store(feature_gate_parts + number.to(tl.int64) * channels + channel, feature_gate_sum, mask=present)
    if COARSE_GATE:
        tl.store(coarse_gate_parts + number.to(tl.int64) * channels + channel, coarse_gate_sum, mask=present)


@triton.jit
def _added(to, coarse, factor):
    return to[0] + factor * coarse[0], to[1] + factor * coarse[1], to[2] + factor * coarse[2]


@triton.jit
def _chosen(condition, first, second):
    return (
        tl.where(condition, first[0], second[0]),
        tl.where(condition, first[1], second[1]),
        tl.where(condition, first[2], second[2]),
    )


@triton.jit
def _store_part(parts, at, mask, plane, coarse, PART_HEIGHT: tl.constexpr, PART_WIDTH: tl.constexpr):
    at = at + plane * (PART_HEIGHT * PART_WIDTH)
    lane = tl.arange(0, PART_WIDTH - 2)[None, None, :]
    tl.store(parts + at, coarse[1], mask=mask)
    tl.store(parts + (at[:, :, None] + 1 + lane), coarse[0], mask=mask[:, :, None])
    tl.store(parts + (at + (PART_WIDTH - 1)), coarse[2], mask=mask)


@triton.jit
def _backward_kernel(
    features, coarse, feature_gate, coarse_gate, compensated_grad, residual_grad,
    features_grad, coarse_parts, feature_gate_parts, coarse_gate_parts,
    channels, planes, height, width_units, ends, eps,
    BLOCKS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for scale in tl.static_range(SCALES):
        begin = 0 if scale == 0 else ends[scale - 1]
        if (program >= begin) & (program < ends[scale]):
            _backward_scale(
                program - begin, features[scale], coarse[scale], feature_gate[scale], coarse_gate[scale],
                compensated_grad[scale], residual_grad[scale], features_grad[scale], coarse_parts[scale],
                feature_gate_parts[scale], coarse_gate_parts[scale], channels[scale], planes[scale], height[scale],
                width_units[scale], eps, BLOCKS[scale][0], BLOCKS[scale][1], BLOCKS[scale][2], BLOCKS[scale][3],
                BLOCKS[scale][4], BLOCKS[scale][5], BLOCKS[scale][6], BLOCKS[scale][7], BLOCKS[scale][8],
                BLOCKS[scale][9],
            )  # fmt: skip


@triton.jit
def _source(at, size, which: tl.constexpr, HALF: tl.constexpr, REPEATS: tl.constexpr):
    """Where a coarse pixel's gradient lies along an axis: tile, lane, and whether there is such a part.

    The first is the tile's own; the others are lanes beyond a side, of a neighbour or, along axes whose last pixel is
    repeated at the edges of the image, of the tile itself.
    """
    tile, lane = at // HALF, at % HALF + 1
    there = at >= 0
    if which == 1:
        at_edge = at == 0
        there = (lane == 1) & (tile > 0)
        if REPEATS:
            there = there | at_edge
        tile, lane = tl.where(at_edge, tile, tile - 1), tl.where(at_edge, 0, HALF + 1)
    if which == 2:
        at_edge = at == size - 1
        there = (lane == HALF) & (at < size - 1)
        if REPEATS:
            there = there | at_edge
        tile, lane = tl.where(at_edge, tile, tile + 1), tl.where(at_edge, lane + 1, 0)
    return tile, lane, there


@triton.jit
def _join_kernel(
    parts, coarse_grad, channels, planes, height, width, total,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums the parts of the coarse gradient; sizes are those of the coarse features."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = number < total
    x = (number % width).to(tl.int32)
    y = (number // width % height).to(tl.int32)
    plane = (number // width // height % planes).to(tl.int32)
    image_channel = number // width // height // planes
    image, channel = image_channel // channels, image_channel % channels
    HALF_Y: tl.constexpr = HEIGHT // 2 if HEIGHT > 1 else 1
    PART_WIDTH: tl.constexpr = WIDTH // 2 + 2
    PART_HEIGHT: tl.constexpr = HALF_Y + 2 if HEIGHT > 1 else 1
    across, down, along = tl.cdiv(width, WIDTH // 2), tl.cdiv(height, HALF_Y), tl.cdiv(planes, STRIP)
    total_grad = tl.zeros([BLOCK], tl.float32)
    for which_plane in tl.static_range(3):
        strip, lane_plane, has_plane = _source(plane, planes, which_plane, STRIP, True)
        for which_y in tl.static_range(3 if HEIGHT > 1 else 1):
            if HEIGHT > 1:
                tile_y, lane_y, has_y = _source(y, height, which_y, HALF_Y, True)
            else:
                tile_y, lane_y, has_y = y * 0, y * 0, y >= 0
            for which_x in tl.static_range(3):
                tile_x, lane_x, has_x = _source(x, width, which_x, WIDTH // 2, False)
                tile = ((image * along + strip) * down + tile_y) * across + tile_x
                at = ((tile * channels + channel) * (STRIP + 2) + lane_plane) * PART_HEIGHT + lane_y
                mask = inside & has_plane & has_y & has_x
                total_grad += tl.load(parts + (at * PART_WIDTH + lane_x), mask=mask, other=0.0)
    tl.store(coarse_grad + number, total_grad.to(coarse_grad.dtype.element_ty), mask=inside)


Entry = tuple[tuple[Tile, ...], int]
"""Tiles, one a scale, and warps of a grouped launch."""


def _entry(features: Sequence[Tensor], backward: bool) -> Entry:
    planar = features[0].dim() == 4
    return tuple(tile_of(one.shape[1], planar, backward) for one in features), warps_of(planar, backward)


def _neighbours(entry: Entry) -> list[Entry]:
    """A step away from the table's entry: half or twice the warps or the strips."""
    tiles, warps = entry
    shorter = tuple(replace(tile, strip=tile.strip // 2) for tile in tiles)
    longer = tuple(replace(tile, strip=tile.strip * 2) for tile in tiles)
    return [(tiles, warps // 2), (tiles, warps * 2), (shorter, warps), (longer, warps)]


def _chosen_entry(features: Sequence[Tensor], backward: bool, run: Callable[[Entry], Any]) -> Entry:
    entry = _entry(features, backward)
    if not any(one.numel() for one in features):
        return entry
    first = features[0]
    key = (
        "global_compensation", backward, tuple(one.shape[1] for one in features), first.dim() == 4, first.dtype,
        tuning.architecture(),
    )  # fmt: skip
    return tuning.chosen(key, entry, lambda: _neighbours(entry), run)


class _Launch:
    """Sizes and blocks of one grouped launch."""

    def __init__(self, features: Sequence[Tensor], entry: Entry) -> None:
        self.channels, self.planes, self.height, self.width_units = [], [], [], []
        self.blocks, self.programs = [], []
        self.tiles, self.warps = entry
        for tensor, tile in zip(features, self.tiles, strict=True):
            batch, channels, *spatial = tensor.shape
            planar = len(spatial) == 2
            planes, height, width = (spatial[0], 1, spatial[1]) if planar else spatial
            if (tile.height == 1) != planar:  # the kernels tell images from volumes by it
                raise ValueError(f"tiles have height 1 in an image and more in a volume, got {tile}")
            unit = math.gcd(width, 16)
            wide = channels * math.prod(spatial) >= 2**31
            self.channels.append(channels)
            self.planes.append(planes)
            self.height.append(height)
            self.width_units.append(width // unit)
            self.blocks.append((tile.channels, tile.height, tile.width, tile.strip, unit, wide))
            self.programs.append(
                batch * -(-width // tile.width) * -(-height // tile.height) * -(-(planes // 2) // tile.strip)
            )

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        ends = [sum(self.programs[: index + 1]) for index in range(len(self.programs))]
        return tuple(self.channels), tuple(self.planes), tuple(self.height), tuple(self.width_units), tuple(ends)


def _floor(eps: float) -> float:
    """Least denominator squared, as in the reference."""
    return max(eps * eps, torch.finfo(torch.float32).tiny)


def forward(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    eps: float,
) -> list[tuple[Tensor, Tensor]]:
    """``(compensated, residual)`` of each scale. Everything is dense; features and coarse have one dtype."""

    def run(entry: Entry) -> list[tuple[Tensor, Tensor]]:
        return _forward(features, coarse, feature_gates, coarse_gates, eps, _Launch(features, entry))

    return run(_chosen_entry(features, False, run))


def _forward(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    eps: float,
    launch: _Launch,
) -> list[tuple[Tensor, Tensor]]:
    compensated = [torch.empty_like(one) for one in features]
    residual = [one.new_empty(one.shape[0], 1, *one.shape[2:]) for one in features]
    if sum(launch.programs):
        _forward_kernel[(sum(launch.programs),)](
            tuple(features), tuple(coarse), tuple(feature_gates), tuple(coarse_gates), tuple(compensated),
            tuple(residual), *launch.sizes(), _floor(eps), tuple(launch.blocks), len(features), num_warps=launch.warps,
        )  # fmt: skip
    return list(zip(compensated, residual, strict=True))


def backward(
    compensated_grads: Sequence[Tensor],
    residual_grads: Sequence[Tensor],
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    eps: float,
    needed: Sequence[Sequence[bool]],
) -> list[tuple[Tensor | None, ...]]:
    """Gradients of the four tensors of each scale, None where not needed; those of the gates are float32.

    Args:
        needed: for each scale, which of its four tensors' gradients are wanted.
    """
    arguments = compensated_grads, residual_grads, features, coarse, feature_gates, coarse_gates, eps, needed

    def run(entry: Entry) -> list[tuple[Tensor | None, ...]]:
        return _backward(*arguments, _Launch(features, entry))

    return run(_chosen_entry(features, True, run))


def _backward(
    compensated_grads: Sequence[Tensor],
    residual_grads: Sequence[Tensor],
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    eps: float,
    needed: Sequence[Sequence[bool]],
    launch: _Launch,
) -> list[tuple[Tensor | None, ...]]:
    grads, parts = [], []
    for one, low, tile, programs, wanted in zip(features, coarse, launch.tiles, launch.programs, needed, strict=True):
        channels = one.shape[1]
        area = (tile.width // 2 + 2) * (tile.height // 2 + 2 if tile.height > 1 else 1)
        sizes = (programs, channels, tile.strip + 2, area), (programs, channels), (programs, channels)
        # What is not wanted gets a tensor that no kernel touches: a pointer of the right type.
        wanted_sizes = [size if want else 0 for size, want in zip(sizes, wanted[1:], strict=True)]
        parts.append([one.new_empty(size, dtype=torch.float32) for size in wanted_sizes])
        grads.append([torch.empty_like(one) if wanted[0] else one.new_empty(0), torch.empty_like(low)])
    if sum(launch.programs):
        blocks = tuple((*block, *map(bool, wanted)) for block, wanted in zip(launch.blocks, needed, strict=True))
        _backward_kernel[(sum(launch.programs),)](
            tuple(features), tuple(coarse), tuple(feature_gates), tuple(coarse_gates),
            tuple(compensated_grads), tuple(residual_grads), tuple(pair[0] for pair in grads),
            tuple(three[0] for three in parts), tuple(three[1] for three in parts), tuple(three[2] for three in parts),
            *launch.sizes(), _floor(eps), blocks, len(features), num_warps=launch.warps,
        )  # fmt: skip
    results: list[tuple[Tensor | None, ...]] = []
    for (high, low), three, tile, wanted in zip(grads, parts, launch.tiles, needed, strict=True):
        batch, channels = low.shape[:2]
        if wanted[1] and low.numel():
            planes, height, width = low.shape[2:] if low.dim() == 5 else (low.shape[2], 1, low.shape[3])
            block = 256
            _join_kernel[(-(-low.numel() // block),)](
                three[0], low, channels, planes, height, width, low.numel(),
                tile.height, tile.width, tile.strip, block, num_warps=4,
            )  # fmt: skip
        gates = [
            part.reshape(batch, part.shape[0] // max(batch, 1), channels).sum(1) if want else None
            for part, want in zip(three[1:], wanted[2:], strict=True)
        ]
        results.append((high if wanted[0] else None, low if wanted[1] else None, *gates))
    return results
