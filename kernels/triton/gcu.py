"""Global compensation of all scales of a network: a launch forward, three backward.

What it means: DESIGN section 3 and grcsf_fast/reference.py, whose letters these are: F features, D coarse features, E
the up-sampled D, a and b the gates, g the strength, U = a F, V = b E. The loops:

    forward, a program per tile of pixels:   over blocks of channels: sums of UV, U^2, V^2; then RM
                                             over blocks of channels: F + g RM (F - E)
    backward, the same program:              over blocks of channels: those sums, and that of g (F - E) dF^; then dRM
                                             over blocks of channels: dF, and what the tile adds to da, db and dg
    backward, a program per tile of coarse pixels and block of channels:
                                             over the fine pixels that are interpolated from each: dD
    backward, a program per row of da, db and dg: over tiles, in their order

What is read twice comes from a cache. Nothing is added by atomics: the same bits in every run. Tensors are read and
written by their strides, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .grouped import Launch, at, channels_of, layout, pixels_of, read

__all__ = ["Entry", "backward", "forward"]

SUM_TILES, SUM_CHANNELS = 512, 16  # block of the last kernel


@triton.jit
def _neighbour(fine, FAR: tl.constexpr, size):
    """The coarse pixel, of ``size``, that is mixed into a fine one with a weight of 3/4, or with 1/4."""
    near = fine // 2
    if FAR:
        near = tl.minimum(tl.maximum(near + fine % 2 * 2 - 1, 0), size - 1)
    return near


@triton.jit
def _upsampled(coarse, strides, z, y, x, sizes, mask, VOLUME: tl.constexpr):
    """(C, P) E; ``coarse`` are the addresses of the channels (C, 1), the sizes those of the features."""
    total = tl.zeros(mask.shape, tl.float32)
    for far_z in tl.static_range(2 if VOLUME else 1):
        plane = z
        if VOLUME:
            plane = _neighbour(z, far_z, sizes[2] // 2)
        for far_y in tl.static_range(2):
            for far_x in tl.static_range(2):
                row, column = _neighbour(y, far_y, sizes[3] // 2), _neighbour(x, far_x, sizes[4] // 2)
                # 3/4 along each axis, but 1/4 along those where it is the farther one.
                weight = (0.75 ** (3 if VOLUME else 2)) / 3 ** (far_z + far_y + far_x)
                total += weight * read(coarse + at(strides, plane, row, column), mask)
    return total


@triton.jit
def _gates(gates, image, channels, channel, present):
    """(C, 1) a, b and g of a block of channels; all three are dense."""
    row = image * channels + channel
    return read(gates[0] + row, present), read(gates[1] + row, present), read(gates[2] + channel, present)


@triton.jit
def _both(source, place, sizes, channel, mask, VOLUME: tl.constexpr):
    """(C, P) F and E of a block of channels."""
    features, step, coarse, strides = source
    f = read(features + channel * step, mask)
    e = _upsampled(coarse + channel * strides[1], strides, place[0], place[1], place[2], sizes, mask, VOLUME)
    return f, e


@triton.jit
def _sums(
    source, grad, gates, image, place, sizes,
    TILES: tl.constexpr, VOLUME: tl.constexpr, BACKWARD: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """(P,) sums over the channels of UV, U^2, V^2 and g (F - E) dF^; (C, P) F, E and dF^ of the last block."""
    CHANNELS: tl.constexpr = TILES[scale][0]
    inside = place[3]
    uv = tl.zeros(inside.shape, tl.float32)
    uu, vv, given = uv, uv, uv
    f = tl.zeros([CHANNELS, inside.shape[0]], tl.float32)
    e, d_out = f, f
    for start in tl.range(0, sizes[1], CHANNELS, disable_licm=True):
        channel, present = channels_of(start, sizes[1], TILES, scale)
        mask = present & inside[None, :]
        a, b, g = _gates(gates, image, sizes[1], channel, present)
        f, e = _both(source, place, sizes, channel, mask, VOLUME)
        u, v = a * f, b * e
        uv += tl.sum(u * v, 0)
        uu += tl.sum(u * u, 0)
        vv += tl.sum(v * v, 0)
        if BACKWARD:
            d_out = read(grad[0] + channel * grad[1], mask)
            given += tl.sum(g * (f - e) * d_out, 0)
    return uv, uu, vv, given, f, e, d_out


@triton.jit
def _forward_kernel(
    features, coarse,  # (B, C, *S), (B, C, *S/2): tuples with an entry per scale, as are all but floor
    gates,  # a (B, C), b (B, C), g (C,); dense
    compensated, residual,  # (B, C, *S), (B, 1, *S)
    numbers, ends,  # see Launch
    floor,  # least squared denominator
    UNITS: tl.constexpr, TILES: tl.constexpr, VOLUME: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    # From the last one on: the coarsest scale has the most channels, so that its programs take longest.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    for scale in tl.static_range(SCALES):
        begin = 0 if scale == 0 else ends[scale - 1]
        if (program >= begin) & (program < ends[scale]):
            _forward_scale(
                program - begin, features[scale], coarse[scale], gates[scale], compensated[scale], residual[scale],
                numbers[scale], floor, UNITS, TILES, VOLUME, scale,
            )  # fmt: skip


@triton.jit
def _forward_scale(
    number, features, coarse, gates, compensated, residual, numbers, floor,
    UNITS: tl.constexpr, TILES: tl.constexpr, VOLUME: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = TILES[scale][0]
    sizes = layout(numbers, UNITS, scale, 0)
    strides, coarse_strides = layout(numbers, UNITS, scale, 1), layout(numbers, UNITS, scale, 2)
    out_strides, residual_strides = layout(numbers, UNITS, scale, 3), layout(numbers, UNITS, scale, 4)
    image = (number // sizes[0]).to(tl.int64)
    z, y, x, inside = pixels_of(number % sizes[0], sizes[2], sizes[3], sizes[4], TILES, scale)
    place = (z, y, x, inside)
    features += image * strides[0] + at(strides, z, y, x)
    compensated += image * out_strides[0] + at(out_strides, z, y, x)
    residual += image * residual_strides[0] + at(residual_strides, z, y, x)
    source = (features, strides[1], coarse + image * coarse_strides[0], coarse_strides)

    uv, uu, vv, _, f, e, _ = _sums(source, source, gates, image, place, sizes, TILES, VOLUME, False, scale)
    energy = uu * vv
    rm = (1 - uv / tl.sqrt_rn(tl.where(energy < floor, floor, energy)))[None, :]  # so that NaN goes through
    tl.store(residual, rm.to(residual.dtype.element_ty), mask=inside[None, :])
    for start in tl.range(0, sizes[1], CHANNELS, disable_licm=True):
        channel, present = channels_of(start, sizes[1], TILES, scale)
        mask = present & inside[None, :]
        if not TILES[scale][5]:  # a single block is still there
            f, e = _both(source, place, sizes, channel, mask, VOLUME)
        g = read(gates[2] + channel, present)
        out = f + g * rm * (f - e)
        tl.store(compensated + channel * out_strides[1], out.to(compensated.dtype.element_ty), mask=mask)


@triton.jit
def _fine_kernel(
    features, coarse, gates,  # as forward
    compensated_grad, residual_grad,  # (B, C, *S), (B, 1, *S)
    features_grad,  # (B, C, *S)
    pixels,  # (B, 3, *S), dense: p, q and RM for the coarse kernel
    parts,  # (tiles of all images, 3, C), dense: what each adds to da, db and dg
    numbers, ends, floor,
    UNITS: tl.constexpr, TILES: tl.constexpr, VOLUME: tl.constexpr, SCALES: tl.constexpr,
    NEEDED: tl.constexpr,  # per scale, whether dF, pixels and parts are
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    for scale in tl.static_range(SCALES):
        begin = 0 if scale == 0 else ends[scale - 1]
        if (program >= begin) & (program < ends[scale]):
            _fine_scale(
                program - begin, features[scale], coarse[scale], gates[scale], compensated_grad[scale],
                residual_grad[scale], features_grad[scale], pixels[scale], parts[scale], numbers[scale], floor,
                UNITS, TILES, VOLUME, NEEDED, scale,
            )  # fmt: skip


@triton.jit
def _fine_scale(
    number, features, coarse, gates, compensated_grad, residual_grad, features_grad, pixels, parts, numbers, floor,
    UNITS: tl.constexpr, TILES: tl.constexpr, VOLUME: tl.constexpr, NEEDED: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = TILES[scale][0]
    sizes = layout(numbers, UNITS, scale, 0)
    strides, coarse_strides = layout(numbers, UNITS, scale, 1), layout(numbers, UNITS, scale, 2)
    grad_strides, residual_strides = layout(numbers, UNITS, scale, 3), layout(numbers, UNITS, scale, 4)
    out_strides = layout(numbers, UNITS, scale, 5)
    image = (number // sizes[0]).to(tl.int64)
    z, y, x, inside = pixels_of(number % sizes[0], sizes[2], sizes[3], sizes[4], TILES, scale)
    place = (z, y, x, inside)
    features += image * strides[0] + at(strides, z, y, x)
    compensated_grad += image * grad_strides[0] + at(grad_strides, z, y, x)
    residual_grad += image * residual_strides[0] + at(residual_strides, z, y, x)
    features_grad += image * out_strides[0] + at(out_strides, z, y, x)
    source = (features, strides[1], coarse + image * coarse_strides[0], coarse_strides)

    uv, uu, vv, given, f, e, d_out = _sums(
        source, (compensated_grad, grad_strides[1]), gates, image, place, sizes, TILES, VOLUME, True, scale
    )
    energy = uu * vv
    length = tl.sqrt_rn(tl.where(energy < floor, floor, energy))
    cosine = uv / length
    rm = (1 - cosine)[None, :]
    d_cosine = -(given + tl.sum(read(residual_grad, inside[None, :]), 0))
    # dU = p V - o U and dV = p U - q V; where the floor is in force, the denominator is a constant.
    p = (d_cosine / length)[None, :]
    o = tl.where(energy < floor, 0.0, d_cosine * cosine / uu)[None, :]
    q = tl.where(energy < floor, 0.0, d_cosine * cosine / vv)[None, :]
    if NEEDED[scale][1]:
        size = sizes[2] * sizes[3] * sizes[4]
        pixels += image * 3 * size + ((z * sizes[3] + y) * sizes[4] + x)[None, :]
        tl.store(pixels, p, mask=inside[None, :])
        tl.store(pixels + size, q, mask=inside[None, :])
        tl.store(pixels + size + size, rm, mask=inside[None, :])
    parts += number.to(tl.int64) * 3 * sizes[1]
    for start in tl.range(0, sizes[1], CHANNELS, disable_licm=True):
        channel, present = channels_of(start, sizes[1], TILES, scale)
        mask = present & inside[None, :]
        if not TILES[scale][5]:
            f, e = _both(source, place, sizes, channel, mask, VOLUME)
            d_out = read(compensated_grad + channel * grad_strides[1], mask)
        a, b, g = _gates(gates, image, sizes[1], channel, present)
        u, v = a * f, b * e
        d_u = p * v - o * u
        if NEEDED[scale][0]:
            d_f = d_out * (1 + g * rm) + a * d_u
            tl.store(features_grad + channel * out_strides[1], d_f.to(features_grad.dtype.element_ty), mask=mask)
        if NEEDED[scale][2]:
            d_v = p * u - q * v
            tl.store(parts + channel, tl.sum(f * d_u, 1, keep_dims=True), mask=present)
            tl.store(parts + sizes[1] + channel, tl.sum(e * d_v, 1, keep_dims=True), mask=present)
            d_g = tl.sum(rm * d_out * (f - e), 1, keep_dims=True)
            tl.store(parts + 2 * sizes[1] + channel, d_g, mask=present)


@triton.jit
def _share(fine, coarse, size):
    """How much of a coarse pixel is in a fine one, along an axis of ``size`` coarse pixels."""
    near, far = _neighbour(fine, False, size), _neighbour(fine, True, size)
    return tl.where(near == coarse, 0.75, 0.0) + tl.where(far == coarse, 0.25, 0.0)


@triton.jit
def _coarse_kernel(
    coarse, features, gates,  # as forward
    compensated_grad, pixels,  # (B, C, *S), (B, 3, *S)
    coarse_grad,  # (B, C, *S/2)
    numbers, ends, UNITS: tl.constexpr, TILES: tl.constexpr, VOLUME: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    for scale in tl.static_range(SCALES):
        begin = 0 if scale == 0 else ends[scale - 1]
        if (program >= begin) & (program < ends[scale]):
            _coarse_scale(
                program - begin, coarse[scale], features[scale], gates[scale], compensated_grad[scale], pixels[scale],
                coarse_grad[scale], numbers[scale], UNITS, TILES, VOLUME, scale,
            )  # fmt: skip


@triton.jit
def _coarse_scale(
    number, coarse, features, gates, compensated_grad, pixels, coarse_grad, numbers,
    UNITS: tl.constexpr, TILES: tl.constexpr, VOLUME: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """With dE = b (p U - q V) - g RM dF^, dD is the sum of dE over the fine pixels that D is in, each by D's share.

    V in turn is a sum over D's neighbours; what they are multiplied with is the same for all channels and summed first.
    """
    CHANNELS: tl.constexpr = TILES[scale][0]
    tiles, channels, depth, height, width = layout(numbers, UNITS, scale, 0)  # of the coarse features
    strides, features_strides = layout(numbers, UNITS, scale, 1), layout(numbers, UNITS, scale, 2)
    grad_strides, out_strides = layout(numbers, UNITS, scale, 3), layout(numbers, UNITS, scale, 4)
    blocks = tl.cdiv(channels, CHANNELS)
    image = (number // (tiles * blocks)).to(tl.int64)
    z, y, x, inside = pixels_of(number % tiles, depth, height, width, TILES, scale)
    channel, present = channels_of(number // tiles % blocks * CHANNELS, channels, TILES, scale)
    coarse += image * strides[0] + channel * strides[1]
    features += image * features_strides[0] + channel * features_strides[1]
    compensated_grad += image * grad_strides[0] + channel * grad_strides[1]
    size = (8 if VOLUME else 4) * depth * height * width
    pixels += image * 3 * size

    of_u = tl.zeros([CHANNELS, inside.shape[0]], tl.float32)
    of_v, of_out = of_u, of_u
    for to_z in tl.range(-1 if VOLUME else 0, 3 if VOLUME else 1, disable_licm=True):
        for to_y in tl.range(-1, 3, disable_licm=True):
            fine_z, fine_y = 2 * z + to_z, 2 * y + to_y
            share = _share(fine_z, z, depth) * _share(fine_y, y, height)
            there = inside & (fine_z >= 0) & (fine_z < 2 * depth) & (fine_y >= 0) & (fine_y < 2 * height)
            for to_x in tl.static_range(-1, 3):
                fine_x = 2 * x + to_x
                mask = there & (fine_x >= 0) & (fine_x < 2 * width)
                pixel = pixels + ((fine_z * (2 * height) + fine_y) * (2 * width) + fine_x)
                weight = share * _share(fine_x, x, width)
                p, rm = weight * read(pixel, mask), weight * read(pixel + size + size, mask)
                mask = present & mask[None, :]
                of_u += p[None, :] * read(features + at(features_strides, fine_z, fine_y, fine_x), mask)
                of_out += rm[None, :] * read(compensated_grad + at(grad_strides, fine_z, fine_y, fine_x), mask)
    for step_z in tl.range(-1 if VOLUME else 0, 2 if VOLUME else 1, disable_licm=True):
        for step_y in tl.range(-1, 2, disable_licm=True):
            # q by the shares of this pixel and of its neighbours in a row, over the fine pixels that both are in.
            left, own, right = (
                tl.zeros(x.shape, tl.float32),
                tl.zeros(x.shape, tl.float32),
                tl.zeros(x.shape, tl.float32),
            )
            other_z, other_y = z + step_z, y + step_y
            for to_z in tl.range(_first(step_z) if VOLUME else 0, _last(step_z) if VOLUME else 1):
                for to_y in tl.range(_first(step_y), _last(step_y), disable_licm=True):
                    fine_z, fine_y = 2 * z + to_z, 2 * y + to_y
                    share = _share(fine_z, z, depth) * _share(fine_y, y, height)
                    share *= _share(fine_z, other_z, depth) * _share(fine_y, other_y, height)
                    there = inside & (fine_z >= 0) & (fine_z < 2 * depth) & (fine_y >= 0) & (fine_y < 2 * height)
                    for to_x in tl.static_range(-1, 3):
                        fine_x = 2 * x + to_x
                        mask = there & (fine_x >= 0) & (fine_x < 2 * width)
                        pixel = pixels + size + ((fine_z * (2 * height) + fine_y) * (2 * width) + fine_x)
                        q = share * _share(fine_x, x, width) * read(pixel, mask)
                        left += q * _share(fine_x, x - 1, width)
                        own += q * _share(fine_x, x, width)
                        right += q * _share(fine_x, x + 1, width)
            there = inside & (other_z >= 0) & (other_z < depth) & (other_y >= 0) & (other_y < height)
            for step_x in tl.static_range(-1, 2):
                other_x = x + step_x
                mask = present & (there & (other_x >= 0) & (other_x < width))[None, :]
                weight = left if step_x == -1 else own if step_x == 0 else right
                of_v += weight[None, :] * read(coarse + at(strides, other_z, other_y, other_x), mask)
    a, b, g = _gates(gates, image, channels, channel, present)
    out = b * (a * of_u - b * of_v) - g * of_out
    coarse_grad += image * out_strides[0] + channel * out_strides[1] + at(out_strides, z, y, x)
    tl.store(coarse_grad, out.to(coarse_grad.dtype.element_ty), mask=present & inside[None, :])


@triton.jit
def _first(step):
    """The first fine pixel, beside twice the coarse one, that a coarse pixel and one a step further are both in."""
    return tl.maximum(2 * step - 1, -1)


@triton.jit
def _last(step):
    """The one after the last."""
    return tl.minimum(2 * step + 3, 3)


@triton.jit
def _sums_kernel(
    parts,  # (tiles of all images, 3, C)
    sums,  # (2 B + 1, C): da, db and dg
    sizes,  # B, tiles of an image, C
    ends, TILES: tl.constexpr, CHANNELS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """A row of sums and a block of channels per program."""
    program = tl.program_id(0)
    for scale in tl.static_range(SCALES):
        begin = 0 if scale == 0 else ends[scale - 1]
        if (program >= begin) & (program < ends[scale]):
            batch, tiles, channels = sizes[scale]
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
                mask = (tile < last) & (channel < channels)
                total += read(parts[scale] + (tile.to(tl.int64) * 3 + which) * channels + channel, mask)
            sum_of = tl.sum(total, 0, keep_dims=True)
            tl.store(sums[scale] + row * channels + channel, sum_of, mask=channel < channels)


class Entry(NamedTuple):
    """Pixels of a tile, at most, and warps; the coarse kernel has half of the pixels."""

    pixels: int
    warps: int


FORWARD, BACKWARD = Entry(64, 8), Entry(64, 8)


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
    """``(compensated, residual)`` of each scale.

    Features and coarse, of one dtype, have any strides, compensated has those of the features. Gates are dense.
    """
    gates = tuple(zip(feature_gates, coarse_gates, strengths, strict=True))

    def run(entry: Entry) -> list[tuple[Tensor, Tensor]]:
        out = [(torch.empty_like(one), one.new_empty(one.shape[0], 1, *one.shape[2:])) for one in features]
        launch = Launch([(f, d, *pair) for f, d, pair in zip(features, coarse, out, strict=True)], entry.pixels)
        if launch.ends[-1]:
            _forward_kernel[(launch.ends[-1],)](
                tuple(features), tuple(coarse), gates, *zip(*out, strict=True), launch.numbers, launch.ends,
                _floor(eps), **launch.constants(), num_warps=entry.warps,
            )  # fmt: skip
        return out

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
    gates = tuple(zip(feature_gates, coarse_gates, strengths, strict=True))
    kinds = tuple((bool(want[0]), bool(want[1]), any(want[2:])) for want in needed)
    with_coarse = [scale for scale, kind in enumerate(kinds) if kind[1]]

    def run(entry: Entry) -> list[tuple[Tensor | None, ...]]:
        # What is not wanted gets a tensor that no kernel touches: a pointer of the right type.
        high = [torch.empty_like(one) if kind[0] else one for one, kind in zip(features, kinds, strict=True)]
        low = [torch.empty_like(one) for one in coarse]
        fine = Launch(list(zip(features, coarse, compensated_grads, residual_grads, high, strict=True)), entry.pixels)
        pixels, parts, sums = [], [], []
        for one, count, kind in zip(features, fine.counts, kinds, strict=True):
            batch, channels, *spatial = one.shape
            pixels.append(one.new_empty((batch, 3, *spatial) if kind[1] else 1, dtype=torch.float32))
            parts.append(one.new_empty((batch * count, 3, channels) if kind[2] else 1, dtype=torch.float32))
            sums.append(one.new_empty((2 * batch + 1, channels), dtype=torch.float32))
        if fine.ends[-1]:
            _fine_kernel[(fine.ends[-1],)](
                tuple(features), tuple(coarse), gates, tuple(compensated_grads), tuple(residual_grads), tuple(high),
                tuple(pixels), tuple(parts), fine.numbers, fine.ends, _floor(eps), **fine.constants(), NEEDED=kinds,
                num_warps=entry.warps,
            )  # fmt: skip
        chosen = [
            tuple(tensors[scale] for scale in with_coarse)
            for tensors in (coarse, features, compensated_grads, low, gates, pixels)
        ]
        launch = Launch(list(zip(*chosen[:4], strict=True)), entry.pixels // 2, by_block=True) if with_coarse else None
        if launch is not None and launch.ends[-1]:
            _coarse_kernel[(launch.ends[-1],)](
                chosen[0], chosen[1], chosen[4], chosen[2], chosen[5], chosen[3], launch.numbers, launch.ends,
                **launch.constants(), num_warps=entry.warps,
            )  # fmt: skip
        if any(kind[2] for kind in kinds):
            sizes = tuple((one.shape[0], count, one.shape[1]) for one, count in zip(features, fine.counts, strict=True))
            ends = tuple(accumulate((2 * batch + 1) * -(-c // SUM_CHANNELS) for batch, _, c in sizes))
            _sums_kernel[(ends[-1],)](
                tuple(parts), tuple(sums), sizes, ends, SUM_TILES, SUM_CHANNELS, len(sizes), num_warps=8
            )
        results = []
        for scale, want in enumerate(needed):
            batch, of_gates = features[scale].shape[0], sums[scale]
            found = high[scale], low[scale], of_gates[:batch], of_gates[batch : 2 * batch], of_gates[2 * batch]
            results.append(tuple(one if wanted else None for one, wanted in zip(found, want, strict=True)))
        return results

    return run(_chosen_entry(features, BACKWARD, run))
