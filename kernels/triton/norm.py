"""Instance normalisation and leaky ReLU: two launches forward, two backward and a sum.

With x^ = (x - mean) / sqrt(variance + eps) of each channel of an image, z = w x^ + b and y = z or, below 0, slope z:

    forward, a program per tile of pixels and block of channels:
                                 the tile's mean and its sum of squared deviations
                                 those of the image from all tiles', in their order; then y
    backward, such programs:     what the tile adds to s = sum of dz and t = sum of dz x^
                                 s and t of the image; then dx = w (dz - (s + t x^) / pixels) / sqrt(variance + eps)

So x is read twice and nothing else that is as large is read or kept. Blocks are (pixels, channels): one channel of
many pixels where the pixels lie side by side, few pixels of many channels where the channels do. Deviations are taken
from the mean of their block and merged as Chan, Golub and LeVeque (1979) do, so that a large mean costs no digits.
Nothing is added by atomics: the same bits in every run.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped import read
from .patches import lanes

__all__ = ["backward", "forward"]

LOOPS = 8  # blocks of a tile, at least
# Tiles of an image, at most: each program reads what all of them have left, together the square of this number.
MOST_TILES = 256
PARTS = 32  # tiles whose results are read at once


class _Rows(NamedTuple):
    """How x lies: pixels of an image and channels, and the strides of images, channels and pixels."""

    pixels: int
    channels: int
    image_stride: int
    channel_stride: int
    pixel_stride: int


def _rows(x: Tensor) -> _Rows:
    pixels, channels = math.prod(x.shape[2:]), x.shape[1]
    side_by_side = (pixels, 1) if x.is_contiguous() else (1, channels)
    return _Rows(pixels, channels, pixels * channels, *side_by_side)


def _launch(rows: _Rows, batch: int, tensors: int) -> tuple[tuple[int], tuple[int, int], dict[str, Any]]:
    """Grid, tiles of an image and blocks of a tile, and the constants of a launch that reads so many tensors as large
    as the image."""
    if rows.pixel_stride == 1:
        block, channels, warps = min(1024, triton.next_power_of_2(rows.pixels)), 1, 4
    else:
        # 8 numbers a lane, of two tensors 4 each: with 8 each these spill in half precision (sm_80). Warps of 64 lanes
        # have 4 as they are. Of a large image there are few programs, so each has 8 warps, to read enough at once.
        block, channels, warps = (
            64 // (1 if lanes() == 64 else tensors),
            min(32, triton.next_power_of_2(rows.channels)),
            8,
        )
    blocks = -(-rows.pixels // block)
    loops = max(LOOPS, -(-blocks // MOST_TILES))
    tiles = -(-blocks // loops)
    grid = (batch * tiles * -(-rows.channels // channels),)
    return grid, (tiles, loops), {"PIXELS": block, "CHANNELS": channels, "num_warps": warps}


@triton.jit
def _place(rows, tiles, CHANNELS: tl.constexpr):
    """Image, tile, (1, C) channels and which of them there are, of a program."""
    blocks = tl.cdiv(rows[1], CHANNELS)
    program = tl.program_id(0)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    tile = program // blocks % tiles
    return (program // (blocks * tiles)).to(tl.int64), tile, channel, channel < rows[1]


@triton.jit
def _loops(rows, tile, loops, PIXELS: tl.constexpr):
    """Blocks of a tile; the last one of an image may have fewer."""
    return tl.minimum(tl.cdiv(rows[0] - tile * (loops * PIXELS), PIXELS), loops)


@triton.jit
def _block(rows, image, number, channel, present, PIXELS: tl.constexpr):
    """(P, C) offsets of a block of the image and which of them there are, and the number of its pixels."""
    first = number * PIXELS
    pixel = first + tl.arange(0, PIXELS)[:, None]
    # 64 bits where an image could need them: a pixel's stride is its channels'.
    offsets = image * rows[2] + channel.to(tl.int64) * rows[3] + pixel.to(tl.int64) * rows[4]
    count = tl.minimum(tl.maximum(rows[0] - first, 0), PIXELS).to(tl.float32)
    return offsets, (pixel < rows[0]) & present, count


@triton.jit
def _part(parts, rows, image, tiles, tile, channel, CHANNELS: tl.constexpr):
    """Addresses of the first numbers of tiles, and how far behind the second ones are.

    What a program reads of all tiles lies side by side: the channels of its block, or the tiles of its one channel.
    """
    step = tiles * rows[1]
    at = channel * tiles + tile if CHANNELS == 1 else tile * rows[1] + channel
    return parts + image * 2 * step + at, step


@triton.jit
def _of_the_image(
    parts, rows, image, tiles, loops, channel, present,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(1, C) mean and variance from the tiles' means and squared deviations."""
    weighted = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, tiles, PARTS):
        tile = start + tl.arange(0, PARTS)[:, None]
        count = tl.minimum(rows[0] - tile * (PIXELS * loops), PIXELS * loops).to(tl.float32)
        at, _ = _part(parts, rows, image, tiles, tile, channel, CHANNELS)
        weighted += tl.where(tile < tiles, count, 0.0) * read(at, (tile < tiles) & present)
    mean = tl.sum(weighted, 0, keep_dims=True) / rows[0]
    spread = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, tiles, PARTS):
        tile = start + tl.arange(0, PARTS)[:, None]
        count = tl.minimum(rows[0] - tile * (PIXELS * loops), PIXELS * loops).to(tl.float32)
        mask = (tile < tiles) & present
        at, step = _part(parts, rows, image, tiles, tile, channel, CHANNELS)
        off = tl.where(mask, read(at, mask) - mean, 0.0)
        spread += read(at + step, mask) + tl.where(tile < tiles, count, 0.0) * off * off
    return mean, tl.sum(spread, 0, keep_dims=True) / rows[0]


@triton.jit(do_not_specialize=["loops"])
def _statistics_kernel(
    x,  # (B, C, *S), of these rows, as all large tensors
    parts,  # (B, 2, tiles, C), or (B, 2, C, tiles) where x is in C order: means and squared deviations
    rows, tiles, loops, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, tile, channel, present = _place(rows, tiles, CHANNELS)
    mean = tl.zeros([1, CHANNELS], tl.float32)
    spread = mean
    counted = 0.0
    for loop in range(_loops(rows, tile, loops, PIXELS)):
        offsets, mask, count = _block(rows, image, tile * loops + loop, channel, present, PIXELS)
        values = read(x + offsets, mask)
        own = tl.sum(values, 0, keep_dims=True) / tl.maximum(count, 1.0)
        off = tl.where(mask, values - own, 0.0)
        share = count / tl.maximum(counted + count, 1.0)
        spread += tl.sum(off * off, 0, keep_dims=True) + (own - mean) * (own - mean) * counted * share
        mean += (own - mean) * share
        counted += count
    at, step = _part(parts, rows, image, tiles, tile, channel, CHANNELS)
    tl.store(at, mean, mask=present)
    tl.store(at + step, spread, mask=present)


@triton.jit(do_not_specialize=["loops"])
def _normalize_kernel(
    x, weight, bias,  # (B, C, *S), (C,), (C,)
    parts,  # of the kernel before
    out, statistics,  # (B, C, *S); (B, 2, C): mean and 1 / sqrt(variance + eps)
    rows, tiles, loops, eps, slope,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    image, tile, channel, present = _place(rows, tiles, CHANNELS)
    mean, variance = _of_the_image(parts, rows, image, tiles, loops, channel, present, PIXELS, CHANNELS, PARTS)
    scale = 1 / tl.sqrt_rn(variance + eps)
    if tile == 0:
        at = image * 2 * rows[1] + channel
        tl.store(statistics + at, mean, mask=present)
        tl.store(statistics + at + rows[1], scale, mask=present)
    w, b = read(weight + channel, present), read(bias + channel, present)
    for loop in range(_loops(rows, tile, loops, PIXELS)):
        offsets, mask, _ = _block(rows, image, tile * loops + loop, channel, present, PIXELS)
        z = w * ((read(x + offsets, mask) - mean) * scale) + b
        tl.store(out + offsets, tl.where(z > 0, z, slope * z), mask=mask)


@triton.jit
def _gradient(x, out_grad, offsets, mask, mean, scale, w, b, slope):
    """(P, C) dz and x^."""
    normed = (read(x + offsets, mask) - mean) * scale
    d_out = read(out_grad + offsets, mask)
    return tl.where(w * normed + b > 0, d_out, slope * d_out), tl.where(mask, normed, 0.0)


@triton.jit(do_not_specialize=["loops"])
def _sums_kernel(
    x, out_grad, weight, bias, statistics,  # (B, C, *S) twice, (C,) twice, (B, 2, C)
    grad_parts,  # as the parts of the forward: sums of dz and dz x^
    rows, tiles, loops, slope, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, tile, channel, present = _place(rows, tiles, CHANNELS)
    at = image * 2 * rows[1] + channel
    mean, scale = read(statistics + at, present), read(statistics + at + rows[1], present)
    w, b = read(weight + channel, present), read(bias + channel, present)
    s = tl.zeros([1, CHANNELS], tl.float32)
    t = s
    for loop in range(_loops(rows, tile, loops, PIXELS)):
        offsets, mask, _ = _block(rows, image, tile * loops + loop, channel, present, PIXELS)
        d_z, normed = _gradient(x, out_grad, offsets, mask, mean, scale, w, b, slope)
        s += tl.sum(d_z, 0, keep_dims=True)
        t += tl.sum(d_z * normed, 0, keep_dims=True)
    at, step = _part(grad_parts, rows, image, tiles, tile, channel, CHANNELS)
    tl.store(at, s, mask=present)
    tl.store(at + step, t, mask=present)


@triton.jit(do_not_specialize=["loops"])
def _x_grad_kernel(
    x, out_grad, weight, bias, statistics,  # as of the kernel before
    grad_parts, x_grad, sums,  # of the kernel before, (B, C, *S), (B, 2, C): s and t
    rows, tiles, loops, slope,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    image, tile, channel, present = _place(rows, tiles, CHANNELS)
    s = tl.zeros([PARTS, CHANNELS], tl.float32)
    t = s
    for start in range(0, tiles, PARTS):
        one = start + tl.arange(0, PARTS)[:, None]
        at, step = _part(grad_parts, rows, image, tiles, one, channel, CHANNELS)
        s += read(at, (one < tiles) & present)
        t += read(at + step, (one < tiles) & present)
    s, t = tl.sum(s, 0, keep_dims=True), tl.sum(t, 0, keep_dims=True)
    at = image * 2 * rows[1] + channel
    if tile == 0:
        tl.store(sums + at, s, mask=present)
        tl.store(sums + at + rows[1], t, mask=present)
    mean, scale = read(statistics + at, present), read(statistics + at + rows[1], present)
    w, b = read(weight + channel, present), read(bias + channel, present)
    for loop in range(_loops(rows, tile, loops, PIXELS)):
        offsets, mask, _ = _block(rows, image, tile * loops + loop, channel, present, PIXELS)
        d_z, normed = _gradient(x, out_grad, offsets, mask, mean, scale, w, b, slope)
        tl.store(x_grad + offsets, w * scale * (d_z - (s + t * normed) / rows[0]), mask=mask)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> tuple[Tensor, Tensor]:
    """y, and the statistics (B, 2, C) float32 for the backward; x in C order or ``channels_last``, which y is too."""
    batch = x.shape[0]
    out = torch.empty_like(x)
    statistics = x.new_empty((batch, 2, x.shape[1]), dtype=torch.float32)
    if x.numel():
        rows = _rows(x)
        grid, tiles, constants = _launch(rows, batch, 1)
        parts = statistics.new_empty((batch, 2, tiles[0] * rows.channels))
        _statistics_kernel[grid](x, parts, tuple(rows), *tiles, **constants)
        settings = tuple(rows), *tiles, eps, slope
        _normalize_kernel[grid](x, weight, bias, parts, out, statistics, *settings, PARTS=PARTS, **constants)
    return out, statistics


def backward(
    out_grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, laid out as x, of weight and of bias, these float32."""
    batch = x.shape[0]
    x_grad, sums = torch.empty_like(x), torch.empty_like(statistics)
    if x.numel():
        rows = _rows(x)
        grid, tiles, constants = _launch(rows, batch, 2)
        parts = statistics.new_empty((batch, 2, tiles[0] * rows.channels))
        given = x, out_grad, weight, bias, statistics, parts
        _sums_kernel[grid](*given, tuple(rows), *tiles, slope, **constants)
        _x_grad_kernel[grid](*given, x_grad, sums, tuple(rows), *tiles, slope, PARTS=PARTS, **constants)
    total = sums.sum(0)  # (2,C)
    return x_grad, total[1], total[0]
