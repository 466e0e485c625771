"""Tensors of several scales in one launch: their sizes, strides and tiles of pixels, on either side of it.

An image is a volume of one plane. Each size and stride is passed as a runtime number times a constant unit, at most
16, that tells the compiler how rows are aligned; Triton makes a stride of 1 a constant by itself, and accesses along
that axis vectors. Strides of the GCU's kernels go as odd numbers where their unit is 16, see ``passed``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "Launch", "Tile", "addresses", "at", "channels_of", "crowded", "is_wide", "layout", "passed", "pixels_of", "read",
    "tile_of", "unit_of",
]  # fmt: skip

# Set while a kernel's first use is checked, on small inputs: a program then has several patches one after another, as
# at the sizes of networks.
crowded: ContextVar[bool] = ContextVar("crowded", default=False)


class Tile(NamedTuple):
    """Block shape of a scale, powers of two: channels, and planes, rows and columns of pixels.

    ``wide``: whether offsets inside an image need 64 bits.
    """

    channels: int
    planes: int
    rows: int
    columns: int
    wide: bool


def tile_of(channels: int, spatial: Sequence[int], pixels: int, wide: bool = False, most: int = 32) -> Tile:
    """The block shape for images of so many planes, rows and columns, of at most ``pixels`` and ``most`` channels.

    Of 32 columns, or 16 where that wastes less, 16 in a volume; rows and planes share the coarse pixels around them.
    """
    block = min(most, triton.next_power_of_2(channels))
    planes, rows, columns = (triton.next_power_of_2(size) for size in spatial)
    narrow = spatial[0] > 1 or -(-spatial[2] // 16) * 16 < -(-spatial[2] // 32) * 32
    columns = min(columns, 16 if narrow else 32, pixels)
    rows = min(rows, max(1, pixels // columns // (1 if planes == 1 else 2)))
    planes = min(planes, max(1, pixels // (columns * rows)))
    return Tile(block, planes, rows, columns, wide)


class Launch:
    """A launch over the pixels of the tensors of several scales.

    Args:
        groups: per scale tensors (B, C, *S) or (B, 1, *S); a program has a tile of pixels of the first one.
        pixels, by_block: most of a tile, and whether a program has one block of channels instead of all.
        channels: most of a block.

    Attributes:
        tiles, counts: block shapes, and tiles of an image.
        numbers: per scale (tiles, C, *sizes) and the strides of each tensor, as they are passed.
        bounds: first program of each scale, then the number of programs.
    """

    def __init__(
        self, groups: Sequence[Sequence[Tensor]], pixels: int, by_block: bool = False, channels: int = 32
    ) -> None:
        self.volume = groups[0][0].dim() == 5
        self.tiles, self.counts, tables, bounds = [], [], [], [0]
        for tensors in groups:
            batch, all_channels = tensors[0].shape[:2]
            spatial = tensors[0].shape[2:] if self.volume else (1, *tensors[0].shape[2:])
            tile = tile_of(all_channels, spatial, pixels, any(map(is_wide, tensors)), channels)
            count = math.prod(-(-size // edge) for size, edge in zip(spatial, tile[1:4], strict=True))
            tables.append([(count, all_channels, *spatial), *map(_strides, tensors)])
            self.tiles.append(tile)
            self.counts.append(count)
            bounds.append(bounds[-1] + batch * count * (-(-all_channels // tile.channels) if by_block else 1))
        # Made odd, sizes would have four scales' backward spill (sm_90), and strides the pooling (sm_86, sm_100).
        pairs = [
            [[passed(one, odd=row > 0 and not by_block) for one in numbers] for row, numbers in enumerate(table)]
            for table in tables
        ]
        self.numbers = tuple(tuple(tuple(number for number, _ in row) for row in table) for table in pairs)
        self.units = tuple(tuple(unit for row in table for _, unit in row) for table in pairs)
        self.bounds = tuple(bounds)

    def start(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """The kernel, unless there is nothing to do; it takes the numbers and bounds after its own arguments."""
        if self.bounds[-1]:
            tiles = tuple(map(tuple, self.tiles))
            constants |= {"UNITS": self.units, "TILES": tiles, "VOLUME": self.volume, "SCALES": len(tiles)}
            kernel[(self.bounds[-1],)](*arguments, self.numbers, self.bounds, **constants)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of image, channel, plane, row and column."""
    strides = tensor.stride()
    return strides if len(strides) == 5 else (*strides[:2], 0, *strides[2:])


def is_wide(tensor: Tensor) -> bool:
    """Whether offsets inside an image need 64 bits."""
    return sum((size - 1) * one for size, one in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) >= 2**31


@triton.jit
def _number(one, UNIT: tl.constexpr):
    """The size or stride that was :func:`passed`."""
    return (one >> 1) * (-UNIT) if UNIT < 0 else one * UNIT


@triton.jit
def layout(numbers, UNITS: tl.constexpr, scale: tl.constexpr, which: tl.constexpr):
    """``which`` 0 of a scale are (tiles, C, planes, rows, columns), the next ones the strides of its tensors."""
    five = numbers[scale][which]
    first: tl.constexpr = 5 * which
    return (
        _number(five[0], UNITS[scale][first]), _number(five[1], UNITS[scale][first + 1]),
        _number(five[2], UNITS[scale][first + 2]), _number(five[3], UNITS[scale][first + 3]),
        _number(five[4], UNITS[scale][first + 4]),
    )  # fmt: skip


@triton.jit
def pixels_of(number, sizes, TILES: tl.constexpr, scale: tl.constexpr):
    """The image of a tile, (P,) planes, rows and columns of its pixels, and (P, 1) which of them there are."""
    PLANES: tl.constexpr = TILES[scale][1]
    ROWS: tl.constexpr = TILES[scale][2]
    COLUMNS: tl.constexpr = TILES[scale][3]
    tile = number % sizes[0]
    across, down = tl.cdiv(sizes[4], COLUMNS), tl.cdiv(sizes[3], ROWS)
    lane = tl.arange(0, PLANES * ROWS * COLUMNS)
    x = tile % across * COLUMNS + lane % COLUMNS
    y = tile // across % down * ROWS + lane // COLUMNS % ROWS
    z = tile // (across * down) * PLANES + lane // (COLUMNS * ROWS)
    inside = (x < sizes[4]) & (y < sizes[3]) & (z < sizes[2])
    if TILES[scale][4]:
        x, y, z = x.to(tl.int64), y.to(tl.int64), z.to(tl.int64)
    return (number // sizes[0]).to(tl.int64), (z, y, x), inside[:, None]


@triton.jit
def channels_of(start, channels, TILES: tl.constexpr, scale: tl.constexpr):
    """(1, C) channels of a block, and which of them there are."""
    channel = start + tl.arange(0, TILES[scale][0])[None, :]
    present = channel < channels
    if TILES[scale][4]:
        channel = channel.to(tl.int64)
    return channel, present


@triton.jit
def at(strides, place):
    """(P, 1) offsets of pixels (planes, rows, columns)."""
    return (place[0] * strides[2] + place[1] * strides[3] + place[2] * strides[4])[:, None]


@triton.jit
def addresses(tensor, strides, image, place):
    """(P, 1) of pixels in the first channel of an image."""
    return tensor + image * strides[0] + at(strides, place)


@triton.jit
def read(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


def unit_of(number: int) -> int:
    """What a size or stride is divided by; 1 beyond 32 bits, in which a kernel would multiply a part that fits."""
    return math.gcd(number, 16) if number < 2**31 else 1


def passed(number: int, odd: bool) -> tuple[int, int]:
    """A size or stride as a kernel gets it, and its unit: divided by the unit or, if ``odd`` and the unit is 16, twice
    that and 1, with the unit below 0.

    Triton compiles a kernel once more for numbers that 16 divides, in tuples whatever one asks for, and for 1; with the
    unit known, nothing is gained by that.
    """
    unit = unit_of(number)
    return (2 * (number // unit) + 1, -unit) if odd and unit == 16 else (number // unit, unit)
