"""The largest and the mean of each 2 x 2 (x 2) pixels: a launch forward, a launch backward.

A program has a tile of coarse pixels and a block of channels, of tensors of any strides (grouped.py):

    forward:   the largest and the mean of the fine pixels of each
    backward:  which of them is the largest, as PyTorch decides it; then the gradient of each of them

Which one it is is not kept, as PyTorch keeps it in eight bytes, but found again in x, which the stage before keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped import Launch, addresses, at, channels_of, layout, pixels_of, read

__all__ = ["backward", "forward"]

PIXELS = 64  # coarse ones of a tile, at most


@triton.jit
def _tile(numbers, UNITS: tl.constexpr, TILES: tl.constexpr, FINE: tl.constexpr):
    """Image, place of the coarse pixels and who there is of them and the (1, C) channels, the same with two columns for
    each, and the channels."""
    CHANNELS: tl.constexpr = TILES[0][0]
    sizes = layout(numbers, UNITS, 0, 0)
    blocks = tl.cdiv(sizes[1], CHANNELS)
    number = tl.program_id(0) // blocks
    image, place, inside = pixels_of(number, sizes, TILES, 0)
    _, twice, both = pixels_of(number, (sizes[0], sizes[1], sizes[2], sizes[3], 2 * sizes[4]), FINE, 0)
    channel, present = channels_of(tl.program_id(0) % blocks * CHANNELS, sizes[1], TILES, 0)
    return image, place, inside & present, twice, both & present, channel


@triton.jit
def _columns(pair):
    """(2P, C) -> two of (P, C): the even rows and the odd ones."""
    return tl.split(tl.permute(tl.reshape(pair, (pair.shape[0] // 2, 2, pair.shape[1])), (0, 2, 1)))


@triton.jit
def _at_row(twice, row: tl.constexpr, VOLUME: tl.constexpr):
    """Fine pixels of a row of 2 x 2 (x 2)."""
    return (2 * twice[0] + row // 2 if VOLUME else twice[0]), 2 * twice[1] + row % 2, twice[2]


@triton.jit
def _row(x, strides, twice, row: tl.constexpr, mask, VOLUME: tl.constexpr):
    """Two of (P, C): the even and the odd pixels of a row of 2 x 2 (x 2). They lie side by side: read as one."""
    return _columns(read(x + at(strides, _at_row(twice, row, VOLUME)), mask))


@triton.jit
def _forward_kernel(
    largest, mean, x,  # (B, C, *S/2) twice, (B, C, *S)
    numbers, bounds, UNITS: tl.constexpr, TILES: tl.constexpr, VOLUME: tl.constexpr, SCALES: tl.constexpr,  # see Launch
    FINE: tl.constexpr,  # TILES with two columns for one
):  # fmt: skip
    image, place, mask, twice, both, channel = _tile(numbers, UNITS, TILES, FINE)
    strides = layout(numbers, UNITS, 0, 3)
    x_at = x + image * strides[0] + channel * strides[1]
    ROWS: tl.constexpr = 4 if VOLUME else 2
    best = tl.full(mask.shape, float("-inf"), tl.float32)
    total = tl.zeros(mask.shape, tl.float32)
    for row in tl.static_range(ROWS):
        even, odd = _row(x_at, strides, twice, row, both, VOLUME)
        best = tl.where((even > best) | (even != even), even, best)
        best = tl.where((odd > best) | (odd != odd), odd, best)
        total += even + odd
    for_largest, for_mean = layout(numbers, UNITS, 0, 1), layout(numbers, UNITS, 0, 2)
    tl.store(addresses(largest, for_largest, image, place) + channel * for_largest[1], best, mask=mask)
    tl.store(addresses(mean, for_mean, image, place) + channel * for_mean[1], total / (2 * ROWS), mask=mask)


@triton.jit
def _backward_kernel(
    largest_grad, mean_grad, x, x_grad,  # (B, C, *S/2) twice, (B, C, *S) twice
    numbers, bounds, UNITS: tl.constexpr, TILES: tl.constexpr, VOLUME: tl.constexpr, SCALES: tl.constexpr,
    FINE: tl.constexpr,
):  # fmt: skip
    image, place, mask, twice, both, channel = _tile(numbers, UNITS, TILES, FINE)
    strides, out_strides = layout(numbers, UNITS, 0, 3), layout(numbers, UNITS, 0, 4)
    x_at = x + image * strides[0] + channel * strides[1]
    ROWS: tl.constexpr = 4 if VOLUME else 2
    best = tl.full(mask.shape, float("-inf"), tl.float32)
    which = tl.zeros(mask.shape, tl.int32)
    for row in tl.static_range(ROWS):
        even, odd = _row(x_at, strides, twice, row, both, VOLUME)
        better = (even > best) | (even != even)
        best, which = tl.where(better, even, best), tl.where(better, 2 * row, which)
        better = (odd > best) | (odd != odd)
        best, which = tl.where(better, odd, best), tl.where(better, 2 * row + 1, which)
    for_largest, for_mean = layout(numbers, UNITS, 0, 1), layout(numbers, UNITS, 0, 2)
    d_largest = read(addresses(largest_grad, for_largest, image, place) + channel * for_largest[1], mask)
    share = read(addresses(mean_grad, for_mean, image, place) + channel * for_mean[1], mask) / (2 * ROWS)
    out_at = x_grad + image * out_strides[0] + channel * out_strides[1]
    for row in tl.static_range(ROWS):
        even = tl.where(which == 2 * row, d_largest, 0.0) + share
        odd = tl.where(which == 2 * row + 1, d_largest, 0.0) + share
        pair = tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (2 * even.shape[0], even.shape[1]))
        tl.store(out_at + at(out_strides, _at_row(twice, row, VOLUME)), pair, mask=both)


def forward(x: Tensor, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """The largest and the mean, in this memory format."""
    shape = (*x.shape[:2], *(size // 2 for size in x.shape[2:]))
    largest, mean = (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format) for _ in range(2))
    _start(_forward_kernel, largest, mean, x)
    return largest, mean


def backward(largest_grad: Tensor, mean_grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, laid out as x."""
    x_grad = torch.empty_like(x)
    _start(_backward_kernel, largest_grad, mean_grad, x, x_grad)
    return x_grad


def _start(kernel: triton.JITFunction, *tensors: Tensor) -> None:
    launch = Launch([tensors], PIXELS, by_block=True)
    fine = tuple((*tile[:3], 2 * tile.columns, tile.wide) for tile in launch.tiles)
    launch.start(kernel, *tensors, FINE=fine, num_warps=4)
