"""Sums over what programs have left, in their order: many of them in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from .grouped import read

__all__ = ["add_rows"]

# Block of a program; four of them are read at once. 8 channels are the least that memory moves, and a large volume has
# so many tiles that what a program has to read takes longer than anything else: 64 KiB are asked for at once.
SUM_TILES, SUM_CHANNELS, WARPS = 512, 8, 16


@triton.jit
def _sums_kernel(
    parts,  # (rows times tiles of a row, C), dense: a tuple with an entry per sum
    sums,  # (rows, C)
    sizes,  # tiles of a row, C
    bounds, TILES: tl.constexpr, CHANNELS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """A row and a block of channels per program."""
    program = tl.program_id(0)
    for one in tl.static_range(SUMS):
        if (program >= bounds[one]) & (program < bounds[one + 1]):
            tiles, channels = sizes[one]
            number, blocks = program - bounds[one], tl.cdiv(channels, CHANNELS)
            row, channel = number // blocks, number % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
            total = tl.zeros([TILES, CHANNELS], tl.float32)
            for start in tl.range(0, tiles, TILES, loop_unroll_factor=4):
                tile = start + tl.arange(0, TILES)[:, None]
                mask = (tile < tiles) & (channel < channels)
                total += read(parts[one] + (row.to(tl.int64) * tiles + tile) * channels + channel, mask)
            tl.store(sums[one] + row * channels + channel, tl.sum(total, 0, keep_dims=True), mask=channel < channels)


def add_rows(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Into each second tensor (rows, C) or (C,), the sums of as many rows each of the first one (tiles, C)."""
    parts, sums = zip(*pairs, strict=True)
    rows = [out.numel() // out.shape[-1] for out in sums]
    sizes = tuple((len(part) // max(row, 1), part.shape[1]) for part, row in zip(parts, rows, strict=True))
    programs = (row * -(-channels // SUM_CHANNELS) for row, (_, channels) in zip(rows, sizes, strict=True))
    bounds = tuple(accumulate(programs, initial=0))
    _sums_kernel[(bounds[-1],)](parts, sums, sizes, bounds, SUM_TILES, SUM_CHANNELS, len(pairs), num_warps=WARPS)
