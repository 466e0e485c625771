"""Global compensation of all scales of a network in one launch; its backward in three.

What it means: DESIGN section 3 and grcsf_fast/reference.py, whose letters these are: F features, D coarse features, E
the up-sampled D, a and b the gates, g the strength, U = a F, V = b E. The loops:

    forward, a program per tile of pixels:    over blocks of channels: sum UV, U^2, V^2; RM
                                              over blocks of channels: F + g RM (F - E)
    backward A, a program per tile of pixels: the same two loops: sums, then F's gradient and sums for a, b and g;
                                              three numbers per pixel for B: p, q and RM
    backward B, a program per tile of coarse pixels and block of channels: over the fine pixels that are interpolated
                                              from each: D's gradient
    backward, sums of tiles:                  over tiles in their order: gradients of a, b and g

What is read twice comes from a cache. Nothing is added by atomics: the same bits in every run. Tensors are read and
written by their strides. Each stride is passed as a runtime number times a constant unit, at most 16, that tells the
compiler how rows are aligned; Triton makes a stride of 1 a constant by itself, and loads along that axis vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

__all__ = ["Entry", "Tile", "backward", "forward", "tile_of"]

SUM_TILES, SUM_CHANNELS = 512, 16  # block of the last kernel


@triton.jit
def _layout(numbers, UNITS: tl.constexpr, scale: tl.constexpr, which: tl.constexpr):
    """Five numbers of a tensor, which the compiler knows to be multiples of their units: strides of image, channel,
    plane, row and column, or, for ``which`` 0, the sizes of the features."""
    unit: tl.constexpr = UNITS[scale][which]
    five = numbers[which]
    return five[0] * unit[0], five[1] * unit[1], five[2] * unit[2], five[3] * unit[3], five[4] * unit[4]


@triton.jit
def _pixels(tile, depth, height, width, TILE: tl.constexpr, scale: tl.constexpr):
    """(P,) planes, rows and columns of a tile's pixels, and which of them there are."""
    PLANES: tl.constexpr = TILE[scale][1]
    ROWS: tl.constexpr = TILE[scale][2]
    COLUMNS: tl.constexpr = TILE[scale][3]
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    lane = tl.arange(0, PLANES * ROWS * COLUMNS)
    x = tile % across * COLUMNS + lane % COLUMNS
    y = tile // across % down * ROWS + lane // COLUMNS % ROWS
    z = tile // (across * down) * PLANES + lane // (COLUMNS * ROWS)
    inside = (x < width) & (y < height) & (z < depth)
    if TILE[scale][4]:  # offsets in 64 bits
        x, y, z = x.to(tl.int64), y.to(tl.int64), z.to(tl.int64)
    return z, y, x, inside


@triton.jit
def _channels(start, channels, TILE: tl.constexpr, scale: tl.constexpr):
    """(C, 1) channels of a block, and which of them there are."""
    channel = start + tl.arange(0, TILE[scale][0])[:, None]
    present = channel < channels
    if TILE[scale][4]:
        channel = channel.to(tl.int64)
    return channel, present


@triton.jit
def _at(strides, z, y, x):
    """(1, P) offsets of pixels."""
    return (z * strides[2] + y * strides[3] + x * strides[4])[None, :]


@triton.jit
def _read(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _neighbour(fine, FAR: tl.constexpr, size):
    """The coarse pixel, of ``size``, that is mixed into a fine one with a weight of 3/4, or with 1/4."""
    near = fine // 2
    if FAR:
        near = tl.minimum(tl.maximum(near + fine % 2 * 2 - 1, 0), size - 1)
    return near


@triton.jit
def _upsampled(coarse, strides, z, y, x, depth, height, width, mask, VOLUME: tl.constexpr):
    """(C, P) E; ``coarse`` are the addresses of the channels (C, 1), the sizes those of the features."""
    total = tl.zeros(mask.shape, tl.float32)
    for corner in tl.static_range(8 if VOLUME else 4):
        far_x: tl.constexpr = corner % 2
        far_y: tl.constexpr = corner // 2 % 2
        far_z: tl.constexpr = corner // 4
        plane = z
        if VOLUME:
            plane = _neighbour(z, far_z, depth // 2)
        row, column = _neighbour(y, far_y, height // 2), _neighbour(x, far_x, width // 2)
        far: tl.constexpr = far_x + far_y + far_z
        weight: tl.constexpr = 0.25**far * 0.75 ** ((3 if VOLUME else 2) - far)
        total += weight * _read(coarse + _at(strides, plane, row, column), mask)
    return total


@triton.jit
def _forward_scale(
    number,  # of the program
    features, coarse,  # (B, C, *S), (B, C, *S/2)
    feature_gate, coarse_gate, strength,  # (B, C), (B, C), (C,); dense
    compensated, residual,  # (B, C, *S), (B, 1, *S); the second dense
    numbers, floor, UNITS: tl.constexpr, TILE: tl.constexpr, VOLUME: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """One tile of one scale."""
    CHANNELS: tl.constexpr = TILE[scale][0]
    tiles, channels, depth, height, width = _layout(numbers, UNITS, scale, 0)
    features_strides, coarse_strides = _layout(numbers, UNITS, scale, 1), _layout(numbers, UNITS, scale, 2)
    out_strides = _layout(numbers, UNITS, scale, 3)
    image = (number // tiles).to(tl.int64)
    z, y, x, inside = _pixels(number % tiles, depth, height, width, TILE, scale)
    features += image * features_strides[0] + _at(features_strides, z, y, x)
    coarse += image * coarse_strides[0]
    compensated += image * out_strides[0] + _at(out_strides, z, y, x)

    # A single block of channels is read once and kept.
    KEPT: tl.constexpr = TILE[scale][5]
    f = tl.zeros([CHANNELS, inside.shape[0]], tl.float32)
    e = f
    uv = tl.zeros([inside.shape[0]], tl.float32)
    uu, vv = uv, uv
    for start in tl.range(0, channels, CHANNELS):
        channel, present = _channels(start, channels, TILE, scale)
        mask = present & inside[None, :]
        f = _read(features + channel * features_strides[1], mask)
        e = _upsampled(coarse + channel * coarse_strides[1], coarse_strides, z, y, x, depth, height, width, mask, VOLUME)
        u = _read(feature_gate + image * channels + channel, present) * f
        v = _read(coarse_gate + image * channels + channel, present) * e
        uv += tl.sum(u * v, 0)
        uu += tl.sum(u * u, 0)
        vv += tl.sum(v * v, 0)
    energy = uu * vv
    rm = 1 - uv / tl.sqrt_rn(tl.where(energy < floor, floor, energy))  # so that NaN goes through
    residual += image * depth * height * width + (z * height + y) * width + x
    tl.store(residual, rm.to(residual.dtype.element_ty), mask=inside)
    for start in tl.range(0, channels, CHANNELS):
        channel, present = _channels(start, channels, TILE, scale)
        mask = present & inside[None, :]
        if not KEPT:
            f = _read(features + channel * features_strides[1], mask)
            e = _upsampled(
                coarse + channel * coarse_strides[1], coarse_strides, z, y, x, depth, height, width, mask, VOLUME
            )
        g = _read(strength + channel, present)
        out = f + g * rm[None, :] * (f - e)
        tl.store(compensated + channel * out_strides[1], out.to(compensated.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    features, coarse, feature_gate, coarse_gate, strength, compensated, residual, numbers, ends, floor,
    UNITS: tl.constexpr, TILE: tl.constexpr, VOLUME: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Tuples with an entry per scale; ``ends`` are the numbers of programs up to and with each."""
    # From the last one on: the coarsest scale has the most channels, so that its programs take longest.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    for scale in tl.static_range(SCALES):
        begin = 0 if scale == 0 else ends[scale - 1]
        if (program >= begin) & (program < ends[scale]):
            _forward_scale(
                program - begin, features[scale], coarse[scale], feature_gate[scale], coarse_gate[scale],
                strength[scale], compensated[scale], residual[scale], numbers[scale], floor, UNITS, TILE, VOLUME, scale,
            )  # fmt: skip


@triton.jit
def _fine_scale(
    number,
    compensated_grad, residual_grad, features, coarse,  # (B, C, *S), (B, 1, *S), (B, C, *S), (B, C, *S/2)
    feature_gate, coarse_gate, strength,  # (B, C), (B, C), (C,); dense
    features_grad,  # (B, C, *S)
    pixels,  # (B, 3, *S), dense: p, q, RM
    parts,  # (tiles of all images, 3, C), dense: what each adds to the gradients of a, b and g
    numbers, floor, UNITS: tl.constexpr, TILE: tl.constexpr, VOLUME: tl.constexpr, NEEDED: tl.constexpr,
    scale: tl.constexpr,
):  # fmt: skip
    """A: one tile of one scale. With dU = p V - (..) U and dV = p U - q V the gradients that come through the cosine."""
    CHANNELS: tl.constexpr = TILE[scale][0]
    tiles, channels, depth, height, width = _layout(numbers, UNITS, scale, 0)
    features_strides, coarse_strides = _layout(numbers, UNITS, scale, 1), _layout(numbers, UNITS, scale, 2)
    grad_strides, residual_strides = _layout(numbers, UNITS, scale, 3), _layout(numbers, UNITS, scale, 4)
    out_strides = _layout(numbers, UNITS, scale, 5)
    image = (number // tiles).to(tl.int64)
    z, y, x, inside = _pixels(number % tiles, depth, height, width, TILE, scale)
    features += image * features_strides[0] + _at(features_strides, z, y, x)
    coarse += image * coarse_strides[0]
    compensated_grad += image * grad_strides[0] + _at(grad_strides, z, y, x)
    residual_grad += image * residual_strides[0] + z * residual_strides[2] + y * residual_strides[3]
    features_grad += image * out_strides[0] + _at(out_strides, z, y, x)

    KEPT: tl.constexpr = TILE[scale][5]
    f = tl.zeros([CHANNELS, inside.shape[0]], tl.float32)
    e, d_out = f, f
    uv = tl.zeros([inside.shape[0]], tl.float32)
    uu, vv = uv, uv
    d_rm = _read(residual_grad + x * residual_strides[4], inside)
    for start in tl.range(0, channels, CHANNELS):
        channel, present = _channels(start, channels, TILE, scale)
        mask = present & inside[None, :]
        f = _read(features + channel * features_strides[1], mask)
        e = _upsampled(coarse + channel * coarse_strides[1], coarse_strides, z, y, x, depth, height, width, mask, VOLUME)
        d_out = _read(compensated_grad + channel * grad_strides[1], mask)
        u = _read(feature_gate + image * channels + channel, present) * f
        v = _read(coarse_gate + image * channels + channel, present) * e
        uv += tl.sum(u * v, 0)
        uu += tl.sum(u * u, 0)
        vv += tl.sum(v * v, 0)
        d_rm += tl.sum(_read(strength + channel, present) * d_out * (f - e), 0)
    energy = uu * vv
    length = tl.sqrt_rn(tl.where(energy < floor, floor, energy))
    cosine = uv / length
    rm = 1 - cosine
    p = -d_rm / length
    # Where the floor is in force, the denominator is a constant.
    of_uu = tl.where(energy < floor, 0.0, -d_rm * cosine / uu)
    q = tl.where(energy < floor, 0.0, -d_rm * cosine / vv)
    size = depth * height * width
    pixels += image * 3 * size + (z * height + y) * width + x
    if NEEDED[scale][1]:
        tl.store(pixels, p, mask=inside)
        tl.store(pixels + size, q, mask=inside)
        tl.store(pixels + size + size, rm, mask=inside)
    parts += number.to(tl.int64) * 3 * channels
    for start in tl.range(0, channels, CHANNELS):
        channel, present = _channels(start, channels, TILE, scale)
        mask = present & inside[None, :]
        if not KEPT:
            f = _read(features + channel * features_strides[1], mask)
            e = _upsampled(
                coarse + channel * coarse_strides[1], coarse_strides, z, y, x, depth, height, width, mask, VOLUME
            )
            d_out = _read(compensated_grad + channel * grad_strides[1], mask)
        a = _read(feature_gate + image * channels + channel, present)
        b = _read(coarse_gate + image * channels + channel, present)
        u, v = a * f, b * e
        d_u = p[None, :] * v - of_uu[None, :] * u
        if NEEDED[scale][0]:
            g = _read(strength + channel, present)
            d_f = d_out * (1 + g * rm[None, :]) + a * d_u
            tl.store(features_grad + channel * out_strides[1], d_f.to(features_grad.dtype.element_ty), mask=mask)
        if NEEDED[scale][2]:
            d_v = p[None, :] * u - q[None, :] * v
            tl.store(parts + channel, tl.sum(f * d_u, 1, keep_dims=True), mask=present)
            tl.store(parts + channels + channel, tl.sum(e * d_v, 1, keep_dims=True), mask=present)
            d_g = tl.sum(rm[None, :] * d_out * (f - e), 1, keep_dims=True)
            tl.store(parts + 2 * channels + channel, d_g, mask=present)


@triton.jit
def _share(fine, coarse, size):
    """How much of a coarse pixel is in a fine one, along an axis of ``size`` coarse pixels."""
    near, far = _neighbour(fine, 0, size), _neighbour(fine, 1, size)
    return tl.where(near == coarse, 0.75, 0.0) + tl.where(far == coarse, 0.25, 0.0)


@triton.jit
def _coarse_scale(
    number,
    compensated_grad, features, coarse,  # (B, C, *S), (B, C, *S), (B, C, *S/2)
    feature_gate, coarse_gate, strength,  # (B, C), (B, C), (C,); dense
    pixels,  # (B, 3, *S), dense: p, q, RM
    coarse_grad,  # (B, C, *S/2)
    numbers, UNITS: tl.constexpr, TILE: tl.constexpr, VOLUME: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """B: one tile of coarse pixels and one block of channels of one scale; sizes are those of the coarse features.

    dE = b (p U - q V) - g RM dF^, and D's gradient is the sum of dE over the fine pixels that D is in, by its share.
    V is itself a sum of neighbours in D: their weights are summed first, which no channel enters.
    """
    tiles, channels, depth, height, width = _layout(numbers, UNITS, scale, 0)
    features_strides, coarse_strides = _layout(numbers, UNITS, scale, 1), _layout(numbers, UNITS, scale, 2)
    grad_strides, out_strides = _layout(numbers, UNITS, scale, 3), _layout(numbers, UNITS, scale, 4)
    blocks = tl.cdiv(channels, TILE[scale][0])
    image = (number // (tiles * blocks)).to(tl.int64)
    z, y, x, inside = _pixels(number % tiles, depth, height, width, TILE, scale)
    channel, present = _channels(number // tiles % blocks * TILE[scale][0], channels, TILE, scale)
    features += image * features_strides[0] + channel * features_strides[1]
    coarse += image * coarse_strides[0] + channel * coarse_strides[1]
    compensated_grad += image * grad_strides[0] + channel * grad_strides[1]
    size = (8 if VOLUME else 4) * depth * height * width
    pixels += image * 3 * size

    of_u = tl.zeros([TILE[scale][0], inside.shape[0]], tl.float32)
    of_v, of_out = of_u, of_u
    for line in tl.range(16 if VOLUME else 4):  # rows of fine pixels
        fine_y = 2 * y + line % 4 - 1
        share = _share(fine_y, y, height)
        there = inside & (fine_y >= 0) & (fine_y < 2 * height)
        fine_z = z
        if VOLUME:
            fine_z = 2 * z + line // 4 - 1
            share *= _share(fine_z, z, depth)
            there = there & (fine_z >= 0) & (fine_z < 2 * depth)
        for place in tl.static_range(-1, 3):
            fine_x = 2 * x + place
            inner = there & (fine_x >= 0) & (fine_x < 2 * width)
            weight = share * _share(fine_x, x, width)
            at = (fine_z * (2 * height) + fine_y) * (2 * width) + fine_x
            p, rm = _read(pixels + at, inner), _read(pixels + size + size + at, inner)
            mask = present & inner[None, :]
            of_u += (weight * p)[None, :] * _read(features + _at(features_strides, fine_z, fine_y, fine_x), mask)
            of_out += (weight * rm)[None, :] * _read(compensated_grad + _at(grad_strides, fine_z, fine_y, fine_x), mask)
    for line in tl.range(9 if VOLUME else 3):  # rows of neighbours in D
        step_y, step_z = line % 3 - 1, line // 3 - 1
        # q of the fine pixels that both are in, summed by their shares: left neighbour, itself, right neighbour.
        left, own, right = tl.zeros(x.shape, tl.float32), tl.zeros(x.shape, tl.float32), tl.zeros(x.shape, tl.float32)
        other_z = z
        if VOLUME:
            other_z = z + step_z
        for fine_line in tl.range(16 if VOLUME else 4):
            fine_y = 2 * y + fine_line % 4 - 1
            share = _share(fine_y, y, height) * _share(fine_y, y + step_y, height)
            there = inside & (fine_y >= 0) & (fine_y < 2 * height)
            fine_z = z
            if VOLUME:
                fine_z = 2 * z + fine_line // 4 - 1
                share *= _share(fine_z, z, depth) * _share(fine_z, other_z, depth)
                there = there & (fine_z >= 0) & (fine_z < 2 * depth)
            for place in tl.static_range(-1, 3):
                fine_x = 2 * x + place
                inner = there & (fine_x >= 0) & (fine_x < 2 * width) & (share > 0)
                at = (fine_z * (2 * height) + fine_y) * (2 * width) + fine_x
                shared = share * _share(fine_x, x, width) * _read(pixels + size + at, inner)
                left += shared * _share(fine_x, x - 1, width)
                own += shared * _share(fine_x, x, width)
                right += shared * _share(fine_x, x + 1, width)
        there = inside & (y + step_y >= 0) & (y + step_y < height) & (other_z >= 0) & (other_z < depth)
        for step in tl.static_range(-1, 2):
            inner = there & (x + step >= 0) & (x + step < width)
            weight = left if step == -1 else own if step == 0 else right
            mask = present & inner[None, :]
            of_v += weight[None, :] * _read(coarse + _at(coarse_strides, other_z, y + step_y, x + step), mask)
    a = _read(feature_gate + image * channels + channel, present)
    b = _read(coarse_gate + image * channels + channel, present)
    g = _read(strength + channel, present)
    d_d = b * (a * of_u - b * of_v) - g * of_out
    coarse_grad += image * out_strides[0] + channel * out_strides[1] + _at(out_strides, z, y, x)
    tl.store(coarse_grad, d_d.to(coarse_grad.dtype.element_ty), mask=present & inside[None, :])


@triton.jit
def _fine_kernel(
    compensated_grad, residual_grad, features, coarse, feature_gate, coarse_gate, strength, features_grad, pixels,
    parts, numbers, ends, floor,
    UNITS: tl.constexpr, TILE: tl.constexpr, VOLUME: tl.constexpr, NEEDED: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """See :func:`_forward_kernel`."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    for scale in tl.static_range(SCALES):
        begin = 0 if scale == 0 else ends[scale - 1]
        if (program >= begin) & (program < ends[scale]):
            _fine_scale(
                program - begin, compensated_grad[scale], residual_grad[scale], features[scale], coarse[scale],
                feature_gate[scale], coarse_gate[scale], strength[scale], features_grad[scale], pixels[scale],
                parts[scale], numbers[scale], floor, UNITS, TILE, VOLUME, NEEDED, scale,
            )  # fmt: skip


@triton.jit
def _coarse_kernel(
    compensated_grad, features, coarse, feature_gate, coarse_gate, strength, pixels, coarse_grad, numbers, ends,
    UNITS: tl.constexpr, TILE: tl.constexpr, VOLUME: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """See :func:`_forward_kernel`."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    for scale in tl.static_range(SCALES):
        begin = 0 if scale == 0 else ends[scale - 1]
        if (program >= begin) & (program < ends[scale]):
            _coarse_scale(
                program - begin, compensated_grad[scale], features[scale], coarse[scale], feature_gate[scale],
                coarse_gate[scale], strength[scale], pixels[scale], coarse_grad[scale], numbers[scale], UNITS, TILE,
                VOLUME, scale,
            )  # fmt: skip


@triton.jit
def _sums_kernel(
    parts,  # (tiles of all images, 3, C) per scale
    sums,  # (2 B + 1, C) per scale: gradients of a, of b and of g
    sizes,  # (B, tiles of an image, C) per scale
    ends, TILES: tl.constexpr, CHANNELS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """A row of sums and a block of channels per program."""
    program = tl.program_id(0)
    for scale in tl.static_range(SCALES):
        begin = 0 if scale == 0 else ends[scale - 1]
        if (program >= begin) & (program < ends[scale]):
            batch, tiles, channels = sizes[scale][0], sizes[scale][1], sizes[scale][2]
            blocks = tl.cdiv(channels, CHANNELS)
            row = (program - begin) // blocks
            channel = (program - begin) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
            of_strength = row == 2 * batch
            which = tl.where(of_strength, 2, row // tl.maximum(batch, 1))
            first = tl.where(of_strength, 0, row % tl.maximum(batch, 1) * tiles)
            last = tl.where(of_strength, batch * tiles, first + tiles)
            total = tl.zeros([TILES, CHANNELS], tl.float32)
            for start in tl.range(first, last, TILES):
                tile = start + tl.arange(0, TILES)[:, None]
                at = (tile.to(tl.int64) * 3 + which) * channels + channel
                total += tl.load(parts[scale] + at, mask=(tile < last) & (channel < channels), other=0.0)
            at = row * channels + channel
            tl.store(sums[scale] + at, tl.sum(total, 0, keep_dims=True), mask=channel < channels)


class Tile(NamedTuple):
    """Block shape of a scale, powers of two: channels, and planes, rows and columns of pixels.

    ``wide``: whether offsets inside an image need 64 bits. ``kept``: whether all channels are in one block.
    """

    channels: int
    planes: int
    rows: int
    columns: int
    wide: bool
    kept: bool


class Entry(NamedTuple):
    """Pixels of a tile, at most, and warps; a backward has half of both for coarse pixels."""

    pixels: int
    warps: int


FORWARD, BACKWARD = Entry(64, 4), Entry(128, 8)


def tile_of(channels: int, spatial: Sequence[int], pixels: int, wide: bool = False) -> Tile:
    """For planes, rows and columns of an image, 16 or 32 columns, whichever wastes less; low in two axes, because the
    coarse rows around a tile are shared by its rows."""
    block = min(32, triton.next_power_of_2(channels))
    padded = [triton.next_power_of_2(size) for size in spatial]
    columns = min(padded[2], *sorted((32, 16), key=lambda one: -(-spatial[2] // one) * one)[:1])
    rows = min(padded[1], max(1, pixels // columns) if spatial[0] == 1 else 4)
    planes = min(padded[0], max(1, pixels // (columns * rows)))
    return Tile(block, planes, rows, columns, wide, channels <= block)


def _spatial(tensor: Tensor) -> tuple[int, int, int]:
    """Planes, rows and columns; an image is a volume of one plane."""
    sizes = tuple(tensor.shape[2:])
    return sizes if len(sizes) == 3 else (1, *sizes)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of image, channel, plane, row and column."""
    strides = tensor.stride()
    return strides if len(strides) == 5 else (*strides[:2], 0, *strides[2:])


def _is_wide(tensors: Sequence[Tensor]) -> bool:
    """Whether offsets inside an image of one of them do not fit 32 bits."""
    spans = (
        sum((size - 1) * abs(stride) for size, stride in zip(one.shape[1:], one.stride()[1:], strict=True))
        for one in tensors
    )
    return max(spans) >= 2**31


class _Launch:
    """What a grouped launch over the pixels of the ``tensors`` (a group per scale, its first gives the sizes) needs.

    Attributes:
        numbers, units: per scale the sizes and the strides of its tensors, see :func:`_layout`.
        tiles: block shapes.
        ends: numbers of programs up to and with each scale.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], pixels: int, coarse: bool = False) -> None:
        numbers, units, self.tiles, self.counts, ends = [], [], [], [], []
        for tensors in groups:
            # The coarse pixels are half as many along every axis.
            channels, spatial = tensors[0].shape[1], _spatial(tensors[1] if coarse else tensors[0])
            tile = tile_of(channels, spatial, pixels, _is_wide(tensors))
            count = math.prod(-(-size // edge) for size, edge in zip(spatial, tile[1:4], strict=True))
            table = [(count, channels, *spatial), *(_strides(one) for one in tensors)]
            unit = tuple(tuple(math.gcd(number, 16) for number in row) for row in table)
            units.append(unit)
            numbers.append(
                tuple(
                    tuple(number // of for number, of in zip(row, one, strict=True))
                    for row, one in zip(table, unit, strict=True)
                )
            )
            self.tiles.append(tile)
            self.counts.append(count)
            blocks = -(-channels // tile.channels) if coarse else 1
            ends.append((ends[-1] if ends else 0) + tensors[0].shape[0] * count * blocks)
        self.numbers, self.units, self.ends = tuple(numbers), tuple(units), tuple(ends)

    def constants(self, tensor: Tensor) -> dict[str, Any]:
        return {
            "UNITS": self.units, "TILE": tuple(tuple(tile) for tile in self.tiles), "VOLUME": tensor.dim() == 5,
            "SCALES": len(self.units),
        }  # fmt: skip


def _neighbours(entry: Entry) -> list[Entry]:
    """A step away from the table's entry."""
    pixels, warps = entry
    return [Entry(pixels, warps // 2), Entry(pixels, warps * 2), Entry(pixels // 2, warps), Entry(pixels * 2, warps)]


def _chosen_entry(features: Sequence[Tensor], entry: Entry, run: Callable[[Entry], Any]) -> Entry:
    if not any(one.numel() for one in features):
        return entry
    first = features[0]
    key = (
        "global_compensation", entry, tuple(one.shape[1] for one in features), first.dim(), first.dtype,
        first.stride(1) == 1, tuning.architecture(),
    )  # fmt: skip
    return tuning.chosen(key, entry, lambda: _neighbours(entry), run)


def _floor(eps: float) -> float:
    """Least denominator squared, as in the reference."""
    return max(eps * eps, torch.finfo(torch.float32).tiny)


def forward(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float,
) -> list[tuple[Tensor, Tensor]]:
    """``(compensated, residual)`` of each scale. Features and coarse, of one dtype, may have any strides, which the
    compensated features take over; gates and strengths are dense."""

    def run(entry: Entry) -> list[tuple[Tensor, Tensor]]:
        compensated = [torch.empty_like(one) for one in features]
        residual = [one.new_empty(one.shape[0], 1, *one.shape[2:]) for one in features]
        launch = _Launch(list(zip(features, coarse, compensated, strict=True)), entry.pixels)
        if launch.ends[-1]:
            _forward_kernel[(launch.ends[-1],)](
                tuple(features), tuple(coarse), tuple(feature_gates), tuple(coarse_gates), tuple(strengths),
                tuple(compensated), tuple(residual), launch.numbers, launch.ends, _floor(eps),
                **launch.constants(features[0]), num_warps=entry.warps,
            )  # fmt: skip
        return list(zip(compensated, residual, strict=True))

    return run(_chosen_entry(features, FORWARD, run))


def backward(
    compensated_grads: Sequence[Tensor],
    residual_grads: Sequence[Tensor],
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float,
    needed: Sequence[Sequence[bool]],
) -> list[tuple[Tensor | None, ...]]:
    """Gradients of the five tensors of each scale, None where not needed; those of gates and strengths are float32.

    Args:
        needed: for each scale, which of its five tensors' gradients are wanted.
    """

    def run(entry: Entry) -> list[tuple[Tensor | None, ...]]:
        # What is not wanted gets a tensor that no kernel touches: a pointer of the right type.
        high = [torch.empty_like(one) if want[0] else one[:0] for one, want in zip(features, needed, strict=True)]
        low = [torch.empty_like(one) for one in coarse]
        of_sums = [any(want[2:]) for want in needed]
        fine = _Launch(
            list(zip(features, coarse, compensated_grads, residual_grads, high, strict=True)), entry.pixels
        )
        pixels = [
            one.new_empty((one.shape[0], 3, *one.shape[2:]) if want[1] else 0, dtype=torch.float32)
            for one, want in zip(features, needed, strict=True)
        ]
        parts = [
            one.new_empty((one.shape[0] * count, 3, one.shape[1]) if want else 0, dtype=torch.float32)
            for one, count, want in zip(features, fine.counts, of_sums, strict=True)
        ]
        gates = tuple(feature_gates), tuple(coarse_gates), tuple(strengths)
        if fine.ends[-1]:
            _fine_kernel[(fine.ends[-1],)](
                tuple(compensated_grads), tuple(residual_grads), tuple(features), tuple(coarse), *gates, tuple(high),
                tuple(pixels), tuple(parts), fine.numbers, fine.ends, _floor(eps), **fine.constants(features[0]),
                NEEDED=tuple((bool(w[0]), bool(w[1]), any_sum) for w, any_sum in zip(needed, of_sums, strict=True)),
                num_warps=entry.warps,
            )  # fmt: skip
        of_coarse = [number for number, want in enumerate(needed) if want[1]]
        if of_coarse:

            def some(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
                return tuple(tensors[number] for number in of_coarse)

            groups = list(zip(*map(some, (features, coarse, compensated_grads, low)), strict=True))
            launch = _Launch(groups, entry.pixels // 2, coarse=True)
            if launch.ends[-1]:
                _coarse_kernel[(launch.ends[-1],)](
                    some(compensated_grads), some(features), some(coarse), *map(some, gates), some(pixels), some(low),
                    launch.numbers, launch.ends, **launch.constants(features[0]), num_warps=entry.warps // 2,
                )  # fmt: skip
        sums = _sums(parts, fine.counts, features) if any(of_sums) else [None] * len(features)
        results = []
        for number, want in enumerate(needed):
            batch = features[number].shape[0]
            found = (high[number], low[number], None, None, None)
            if of_sums[number]:
                total = sums[number]
                found = (*found[:2], total[:batch], total[batch : 2 * batch], total[2 * batch])
            results.append(tuple(one if wanted else None for one, wanted in zip(found, want, strict=True)))
        return results

    return run(_chosen_entry(features, BACKWARD, run))


def _sums(parts: Sequence[Tensor], counts: Sequence[int], features: Sequence[Tensor]) -> list[Tensor]:
    """(2 B + 1, C) per scale."""
    sums, sizes, ends = [], [], []
    for one, count in zip(features, counts, strict=True):
        batch, channels = one.shape[:2]
        sums.append(one.new_empty(2 * batch + 1, channels, dtype=torch.float32))
        sizes.append((batch, count, channels))
        ends.append((ends[-1] if ends else 0) + (2 * batch + 1) * -(-channels // SUM_CHANNELS))
    _sums_kernel[(ends[-1],)](
        tuple(parts), tuple(sums), tuple(sizes), tuple(ends), SUM_TILES, SUM_CHANNELS, len(features), num_warps=8
    )
    return sums
