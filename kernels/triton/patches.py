"""One patch of an image, as the attention's kernels see it: where its tokens lie, its score, its products, its launch.

A patch has T = p^dims tokens, in rows of p. All of them are a block of TOKENS, a power of two and at least 16, as the
matrix units want it; queries go in blocks of ROWS. What is beyond T reads as 0 and is not stored. An image is a volume
of one plane. Letters are those of reference.py.

No product has 64 rows or more, so that Triton takes the matrix instructions of a warp and not those of a group of
warps: for the latter it can place the fence between writing and reading shared memory behind the barrier (seen in the
code of 3.7.1), and kernels with them gave wrong gradients on an H200 (3.6), other ones in every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .grouped import crowded, unit_of

__all__ = [
    "LOG2_E", "BackwardPlan", "Launch", "add_at", "channels_of", "lanes", "load_kept", "load_rows", "load_tile",
    "logits_of", "on_amd", "place_of", "position_of", "project", "put", "read", "score_of", "store_tile", "strides_in",
    "strides_of", "tokens_at", "unrounded", "weight_of",
]  # fmt: skip

LOG2_E = tl.constexpr(math.log2(math.e))

# Of a program for a patch of 64 tokens. By times of their forerunners on an H200; in float32 "channels" had 8 there,
# and has 16 rows at a time now, not all.
WARPS = {"forward": 2, "patches": 4, "channels": 4}
PROGRAMS = 2  # of the backward, a multiprocessor, each with sums of its own
# With so few blocks of channels dQ and score O, 128 numbers a token, are used where they were made: passed on, they
# would be about half of what is moved, and sums of the weights' gradients for each program are small then.
FUSED_BLOCKS = 2

Numbers = tuple[tuple[int, ...], ...]


def strides_of(tensors: Sequence[Tensor], dims: int) -> tuple[Numbers, Numbers]:
    """Strides of tensors as runtime numbers and as the constants to multiply them by, see :func:`strides_in`.

    Of all axes, the three of pixels last; that of an image's single plane is 0.
    """
    strides = [one.stride() if dims == 3 else (*one.stride()[:-2], 0, *one.stride()[-2:]) for one in tensors]
    units = tuple(tuple(map(unit_of, row)) for row in strides)
    numbers = tuple(tuple(one // unit_of(one) for one in row) for row in strides)
    return numbers, units


@triton.jit
def strides_in(numbers, UNITS: tl.constexpr, which: tl.constexpr, AXES: tl.constexpr):
    """The strides of a tensor; by the units the compiler knows how rows are aligned, so that accesses are vectors."""
    strides = ()
    for axis in tl.static_range(AXES):
        strides = strides + (numbers[which][axis] * UNITS[which][axis],)
    return strides


@triton.jit
def place_of(number, grid, PATCH: tl.constexpr, VOLUME: tl.constexpr):
    """Image of a patch, and its first plane, row and column; ``grid`` has the patches along each axis of an image."""
    x, y, z = number % grid[2], number // grid[2] % grid[1], number // (grid[2] * grid[1]) % grid[0]
    image = (number // (grid[2] * grid[1] * grid[0])).to(tl.int64)
    return image, (z * (PATCH if VOLUME else 1), y * PATCH, x * PATCH)


@triton.jit
def tokens_at(
    start, place, plane, row, column, COUNT: tl.constexpr, PATCH: tl.constexpr, VOLUME: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """(COUNT,) offsets of a patch's tokens from the first pixel of their channel, by the strides of the three axes."""
    t = start + tl.arange(0, COUNT)
    x, y = place[2] + t % PATCH, place[1] + t // PATCH % PATCH
    z = place[0] + (t // (PATCH * PATCH) if VOLUME else t * 0)
    if WIDE:
        x, y, z = x.to(tl.int64), y.to(tl.int64), z.to(tl.int64)
    return z * plane + y * row + x * column


@triton.jit
def channels_of(block, channels, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """(CHANNELS,) numbers of a block, and which of them there are."""
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    if WIDE:
        channel = channel.to(tl.int64)
    return channel, present


@triton.jit
def read(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def load_tile(tensor, tokens, token_there, channel, channel_there, stride):
    """(tokens, channels) as stored.

    Tokens are the last axis of what is loaded: where neither axis is contiguous for the compiler, as rows of 7 are not,
    it gives the lanes of a warp to the last one.
    """
    at = tensor + (channel * stride)[:, None] + tokens[None, :]
    return tl.trans(read(at, channel_there[:, None] & token_there[None, :]))


@triton.jit
def load_rows(
    tensor, strides, place, start, channel, channel_there,
    T: tl.constexpr, ROWS: tl.constexpr, PATCH: tl.constexpr, VOLUME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(rows, channels) of a patch of an image (C, *S), from its token ``start`` on."""
    at = tokens_at(start, place, strides[2], strides[3], strides[4], ROWS, PATCH, VOLUME, WIDE)
    return load_tile(tensor, at, tl.arange(0, ROWS) < T - start, channel, channel_there, strides[1])


@triton.jit
def load_kept(tensor, place, start, column, T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(rows, columns) of a place (T, COLUMNS), from its token ``start`` on."""
    row = start + tl.arange(0, ROWS)
    at = (place * T + row.to(tl.int64))[:, None] * COLUMNS + column[None, :]
    return read(tensor + at, (row < T)[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def store_tile(tensor, value, tokens, token_there, channel, channel_there, stride):
    at, mask = tensor + (channel * stride)[:, None] + tokens[None, :], channel_there[:, None] & token_there[None, :]
    tl.store(at, tl.trans(value.to(tensor.dtype.element_ty)), mask=mask)


@triton.jit
def put(items, place, item, COUNT: tl.constexpr):
    """The tuple of ``COUNT`` with another item at a place that is known at run time alone."""
    result = ()
    for one in tl.static_range(COUNT):
        result = result + (tl.where(place == one, item, items[one]),)
    return result


@triton.jit
def add_at(items, place, item, COUNT: tl.constexpr):
    """The tuple of ``COUNT`` with an item added to the one at a place that is known at run time alone."""
    result = ()
    for one in tl.static_range(COUNT):
        result = result + (tl.where(place == one, items[one] + item, items[one]),)
    return result


@triton.jit
def weight_of(tensor, of, channel, channel_there, channels, residual, channel_stride, r_stride, RESIDUAL: tl.constexpr):
    """(channels, R) of one map and head, from query or output weights."""
    r = tl.arange(0, RESIDUAL)
    at = tensor + of * channels * residual + channel[:, None] * channel_stride + r[None, :] * r_stride
    return read(at, channel_there[:, None] & (r < residual)[None, :])


@triton.jit
def project(
    tensor, tokens, token_there, stride, weights, of, channels, residual, channel_stride, r_stride,
    ROWS: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(rows, R) of one map and head: tokens (rows, C) times weights, block of channels by block."""
    result = tl.zeros([ROWS, RESIDUAL], tl.float32)
    for block in tl.range(0, BLOCKS, disable_licm=True):
        channel, present = channels_of(block, channels, CHANNELS, WIDE)
        tile = load_tile(tensor, tokens, token_there, channel, present, stride)
        weight = weight_of(weights, of, channel, present, channels, residual, channel_stride, r_stride, RESIDUAL)
        result = tl.dot(tile, weight.to(tile.dtype), acc=result, input_precision=PRECISION)
    return result


@triton.jit
def position_of(position_bias, head, start, T: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """(rows, tokens) bias of the logits in units of log2; minus infinity for keys that are none."""
    row, t = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    at = position_bias + (head * T + start) * T + (row[:, None] * T + t[None, :])
    bias = read(at, (row < T - start)[:, None] & (t < T)[None, :]).to(tl.float32) * LOG2_E
    return tl.where((t < T)[None, :], bias, float("-inf"))


@triton.jit
def logits_of(query, key, bias, PRECISION: tl.constexpr):
    """``bias`` plus the product of queries that were computed in float32 with keys as stored.

    In half precision the queries go in two parts, themselves rounded and the rest: logits stand in an exponent, where
    a rounding of 1 in 500 would be that many times as large as the logit.
    """
    rounded = query.to(key.dtype)
    logits = tl.dot(rounded, tl.trans(key), acc=bias, input_precision=PRECISION)
    if key.dtype != tl.float32:
        logits = tl.dot((query - rounded.to(tl.float32)).to(key.dtype), tl.trans(key), acc=logits)
    return logits


@triton.jit
def score_of(
    means, score_weight, context, score_vector, score_bias, kept, channels, hidden_units,
    BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """A patch's importance, from the means of its channels; where ``kept`` is a tensor it gets the hidden units."""
    logit = tl.load(score_bias).to(tl.float32)
    for start in tl.range(0, hidden_units, HIDDEN, disable_licm=True):
        unit = start + tl.arange(0, HIDDEN)
        there = unit < hidden_units
        hidden = read(context + unit, there).to(tl.float32)
        for block in tl.static_range(BLOCKS):
            channel, present = channels_of(block, channels, CHANNELS, False)
            weight = read(score_weight + unit[:, None] * channels + channel[None, :], there[:, None] & present[None, :])
            hidden += tl.sum(weight.to(tl.float32) * means[block][None, :], 1)
        if kept is not None:
            tl.store(kept + unit, hidden, mask=there)
        # Written so that NaN goes through.
        logit += tl.sum(tl.where(hidden < 0, 0.0, hidden) * read(score_vector + unit, there).to(tl.float32), 0)
    return 1 / (1 + tl.exp(-logit))


class Launch:
    """What the launches of both directions share: sizes and blocks.

    Args:
        x: (B, C, \\*S).
        weights: an AttentionWeights.
        patch: edge of a patch.

    Attributes:
        dims, single: spatial axes, and whether the dtype is float32.
        patches, tokens: patches of all images, and tokens of a patch.
        most_channels: of a block, at most.
        sizes: the kernels' arguments from ``scale`` to ``hidden_units``.
        blocks, backward_blocks: the constants of their variant.
    """

    def __init__(self, x: Tensor, weights: Any, patch: int) -> None:
        batch, channels, *spatial = x.shape
        maps, heads, residual, _ = weights.query_weight.shape
        self.dims, self.single = len(spatial), x.element_size() == 4
        self.tokens = patch**self.dims
        grid = tuple(size // patch for size in spatial)
        self.patches = batch * math.prod(grid)
        grid = grid if self.dims == 3 else (1, *grid)
        self.sizes = residual**-0.5, grid, channels, residual, len(weights.score_weight)
        tokens = max(16, triton.next_power_of_2(self.tokens))
        self.most_channels = min(32, max(16, triton.next_power_of_2(channels)))
        # Two at least: of a loop over one the compiler makes none, and what it has read once stays in registers.
        block = self.most_channels if channels > 32 else 16
        self.blocks: dict[str, Any] = {
            "MAPS": maps, "HEADS": heads, "PATCH": patch, "VOLUME": self.dims == 3, "T": self.tokens, "TOKENS": tokens,
            "ROWS": min(32, tokens), "RESIDUAL": max(16, triton.next_power_of_2(residual)), "CHANNELS": block,
            "BLOCKS": -(-channels // block), "HIDDEN": 16, "PRECISION": "ieee" if on_amd() else "tf32x3",
        }  # fmt: skip
        columns = {"COLUMNS": self.most_channels, "STACK": triton.next_power_of_2(maps * heads)}
        # Whose products are three, of operands of two registers a number. Of 16 rows and 16 channels a lane would have
        # two numbers and not the four that it moves at once.
        wide = {"ROWS": 16, "CHANNELS": self.most_channels, "BLOCKS": -(-channels // self.most_channels)}
        self.backward_blocks = self.blocks | columns | (wide if self.single else {})

    def options(self, kernel: str) -> dict[str, int]:
        """What a kernel is compiled with."""
        # Blocks of smaller patches have as many rows less, the sums of the weights' gradients do not.
        tokens = 64 if kernel == "channels" else self.blocks["TOKENS"]
        # In float32 a product is three, of operands of two registers a number.
        warps = 2 * WARPS[kernel] if self.single and kernel == "forward" else WARPS[kernel]
        if lanes() == 64:  # of four such warps, a lane would have two numbers to move at once
            warps = 2
        # With dX and both sums at once, registers are short; not on AMD's, which have 512 a lane.
        passes = {"PASSES": 1 if lanes() == 64 else 2} if kernel == "channels" else {}
        return {"num_warps": max(1, warps * tokens // 64), "num_stages": 1, **passes}

    def plan_backward(self, device: torch.device) -> BackwardPlan:
        """For this GPU, or an H100 where there is none."""
        multiprocessors = 132
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        # No more than have the same to do; in a check, whose patches are few, several each all the same.
        each = 3 if crowded.get() else -(-self.patches // (PROGRAMS * multiprocessors))
        programs = -(-self.patches // each)
        blocks = -(-self.sizes[2] // self.most_channels)
        fused = blocks <= FUSED_BLOCKS and self.tokens == 64
        return BackwardPlan(programs, fused, programs if fused else max(1, programs // blocks))


def unrounded(*factors: Tensor) -> tuple[Tensor, ...]:
    """Of a product of PyTorch's in float32: as they are or, where the caller lets it round them to TF32, in float64."""
    # The second one where PyTorch is older than the first.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()
    return factors if precision in ("none", "ieee", "highest") else tuple(one.double() for one in factors)


class BackwardPlan(NamedTuple):
    """How many programs the first kernel of the backward of op 2 has; whether they make dX and the weights' gradients
    too; and how many sum those, of patches apart, for some channels."""

    programs: int
    fused: bool
    splits: int


def on_amd() -> bool:
    """Whose matrix units multiply float32 as it is, or not at all; on NVIDIA's it is three products of tf32."""
    return not triton.knobs.runtime.interpret and _target().backend == "hip"


def lanes() -> int:
    """Of a warp: 64 on AMD's CDNA, 32 on its RDNA and NVIDIA's."""
    return 32 if triton.knobs.runtime.interpret else _target().warp_size


def _target() -> GPUTarget:
    return triton.runtime.driver.active.get_current_target()
