"""Global compensation of all scales of a network: a launch forward, three backward.

What it means: grcsf_fast/reference.py, whose letters these are: F features, D coarse features, E
the up-sampled D, a and b the gates, g the strength, U = a F, V = b E. The loops:

    forward, a program per tile of pixels:   over blocks of channels: sums of UV, U^2, V^2; then RM
                                             over blocks of channels: F + g RM (F - E)
    backward, the same program:              over blocks of channels: those sums, and that of g (F - E) dF^; then dRM
                                             over blocks of channels: dF, and what the tile adds to da, db and dg
    backward, a program per tile of coarse pixels and block of channels:
                                             over the fine pixels that are interpolated from each: dD
    backward, a program per row of da, db and dg: over tiles, in their order

Tiles are (pixels, channels): where neighbours are gathered nothing is contiguous, and Triton then gives the lanes of a
warp to the first axis, so that they read side by side. What is read twice comes from a cache. Nothing is added by
atomics: the same bits in every run. Tensors are read and written by their strides, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped import Launch, addresses, at, channels_of, layout, pixels_of, read
from .sums import add_rows

__all__ = ["Scale", "backward", "forward"]

Scale = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""F (B, C, *S), D (B, C, *S/2), a (B, C), b (B, C) and g (C,): F and D of one dtype and any strides, the rest dense."""
# Pixels of a tile, at most, half as many in volumes, and warps of a program. By times of images on an H200.
PIXELS, WARPS = 64, 4
TINY = torch.finfo(torch.float32).tiny  # least denominator squared, as in the reference


@triton.jit
def _neighbour(pixel, tap, size, far):
    """The coarse pixel, of ``size``, that is 3/4 of the fine one at ``2 pixel + tap``, or, if ``far`` is 1, 1/4 of it.

    Taps go from -1 to 2. At an edge both are the pixel there.
    """
    return tl.minimum(tl.maximum(pixel + ((tap + 2) // 2 - 1 + far * ((tap + 2) % 2 * 2 - 1)), 0), size - 1)


@triton.jit
def _with_plane(e, coarse, strides, place, taps, sizes, mask, far_z, VOLUME: tl.constexpr):
    """(P, C) ``e`` and what one coarse plane, the near or the far one, gives to E at the taps of coarse pixels.

    ``coarse`` are addresses of channels (1, C), ``sizes`` its three edges.
    """
    # 3/4 along each axis, but 1/4 along those where it is the farther one.
    share = tl.where(far_z == 0, 0.75, 0.25) if VOLUME else 1.0
    for far_y in tl.static_range(2):
        for far_x in tl.static_range(2):
            z = _neighbour(place[0], taps[0], sizes[0], far_z)
            y = _neighbour(place[1], taps[1], sizes[1], far_y)
            x = _neighbour(place[2], taps[2], sizes[2], far_x)
            e += (0.75**2 / 3 ** (far_y + far_x)) * share * read(coarse + at(strides, (z, y, x)), mask)
    return e


@triton.jit
def _gates(gates, image, channels, channel, present):
    """(1, C) a, b and g of a block of channels."""
    row = image * channels + channel
    return read(gates[0] + row, present), read(gates[1] + row, present), read(gates[2] + channel, present)


@triton.jit
def _tile(number, features, coarse, numbers, UNITS: tl.constexpr, TILES: tl.constexpr, scale: tl.constexpr):
    """Sizes, image, pixels and which of them there are; addresses and strides of the pixels' F and of the image's D."""
    sizes = layout(numbers, UNITS, scale, 0)
    strides, coarse_strides = layout(numbers, UNITS, scale, 1), layout(numbers, UNITS, scale, 2)
    image, place, inside = pixels_of(number, sizes, TILES, scale)
    f_at, d_at = addresses(features[scale], strides, image, place), coarse[scale] + image * coarse_strides[0]
    return sizes, image, place, inside, (f_at, strides, d_at, coarse_strides)


@triton.jit
def _block(start, tile, gates, TILES: tl.constexpr, VOLUME: tl.constexpr, scale: tl.constexpr):
    """(1, C) channels of a block and which of them there are, a and g; (P, C) F, E, U and V."""
    sizes, image, place, inside, tensors = tile
    f_at, strides, d_at, coarse_strides = tensors
    z, y, x = place
    halves = ((sizes[2] + 1) // 2, sizes[3] // 2, sizes[4] // 2)  # an image's single plane stays one
    channel, present = channels_of(start, sizes[1], TILES, scale)
    a, b, g = _gates(gates[scale], image, sizes[1], channel, present)
    f = read(f_at + channel * strides[1], present & inside)
    d_at += channel * coarse_strides[1]
    near, taps = (z // 2, y // 2, x // 2), (z % 2, y % 2, x % 2)
    # Planes one after another, so that the neighbours of only one of them are in registers.
    e = tl.zeros(f.shape, tl.float32)
    for far in tl.range(0, 2 if VOLUME else 1, disable_licm=True):
        e = _with_plane(e, d_at, coarse_strides, near, taps, halves, present & inside, far, VOLUME)
    return channel, present, a, g, f, e, a * f, b * e


@triton.jit
def _forward_kernel(
    features, coarse,  # (B, C, *S), (B, C, *S/2): tuples with an entry per scale, as are all but floor
    gates,  # a (B, C), b (B, C), g (C,); dense
    compensated, residual,  # (B, C, *S), (B, 1, *S)
    floor,  # least squared denominator
    numbers, bounds, UNITS: tl.constexpr, TILES: tl.constexpr, VOLUME: tl.constexpr, SCALES: tl.constexpr,  # see Launch
):  # fmt: skip
    # From the last one on: the coarsest scale has the most channels, so that its programs take longest.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    for scale in tl.static_range(SCALES):
        if (program >= bounds[scale]) & (program < bounds[scale + 1]):
            CHANNELS: tl.constexpr = TILES[scale][0]
            tile = _tile(program - bounds[scale], features, coarse, numbers, UNITS, TILES, scale)
            sizes, image, place, inside = tile[0], tile[1], tile[2], tile[3]
            out_strides = layout(numbers, UNITS, scale, 3)
            out_at = addresses(compensated[scale], out_strides, image, place)

            uv = tl.zeros(inside.shape, tl.float32)
            uu, vv = uv, uv
            for start in tl.range(0, sizes[1], CHANNELS, disable_licm=True):
                _, _, _, _, _, _, u, v = _block(start, tile, gates, TILES, VOLUME, scale)
                uv += tl.sum(u * v, 1, keep_dims=True)
                uu += tl.sum(u * u, 1, keep_dims=True)
                vv += tl.sum(v * v, 1, keep_dims=True)
            energy = uu * vv
            rm = 1 - uv / tl.sqrt_rn(tl.where(energy < floor, floor, energy))  # so that NaN goes through
            tl.store(addresses(residual[scale], layout(numbers, UNITS, scale, 4), image, place), rm, mask=inside)
            for start in tl.range(0, sizes[1], CHANNELS, disable_licm=True):
                channel, present, _, g, f, e, _, _ = _block(start, tile, gates, TILES, VOLUME, scale)
                tl.store(out_at + channel * out_strides[1], f + rm * (g * (f - e)), mask=present & inside)


@triton.jit
def _fine_kernel(
    features, coarse, gates,  # as forward
    compensated_grad, residual_grad,  # (B, C, *S), (B, 1, *S)
    features_grad,  # (B, C, *S)
    pixels,  # (B, 3, *S), dense: p, q and RM for the coarse kernel
    parts,  # (3, tiles of all images, C), dense: what each adds to da, db and dg
    floor, numbers, bounds, UNITS: tl.constexpr, TILES: tl.constexpr, VOLUME: tl.constexpr, SCALES: tl.constexpr,
    NEEDED: tl.constexpr,  # whether dF, pixels and parts are
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    for scale in tl.static_range(SCALES):
        if (program >= bounds[scale]) & (program < bounds[scale + 1]):
            CHANNELS: tl.constexpr = TILES[scale][0]
            tile = _tile(program - bounds[scale], features, coarse, numbers, UNITS, TILES, scale)
            sizes, image, place, inside = tile[0], tile[1], tile[2], tile[3]
            grad_strides, out_strides = layout(numbers, UNITS, scale, 3), layout(numbers, UNITS, scale, 5)
            grad_at = addresses(compensated_grad[scale], grad_strides, image, place)
            out_at = addresses(features_grad[scale], out_strides, image, place)

            uv = tl.zeros(inside.shape, tl.float32)
            uu, vv = uv, uv
            d_rm = read(addresses(residual_grad[scale], layout(numbers, UNITS, scale, 4), image, place), inside)
            for start in tl.range(0, sizes[1], CHANNELS, disable_licm=True):
                channel, present, _, g, f, e, u, v = _block(start, tile, gates, TILES, VOLUME, scale)
                uv += tl.sum(u * v, 1, keep_dims=True)
                uu += tl.sum(u * u, 1, keep_dims=True)
                vv += tl.sum(v * v, 1, keep_dims=True)
                d_out = read(grad_at + channel * grad_strides[1], present & inside)
                d_rm += tl.sum(g * (f - e) * d_out, 1, keep_dims=True)
            energy = uu * vv
            length = tl.sqrt_rn(tl.where(energy < floor, floor, energy))
            cosine = uv / length
            rm = 1 - cosine
            # dU = p V - o U and dV = p U - q V; where the floor is in force, the denominator is a constant.
            p = -d_rm / length
            o = tl.where(energy < floor, 0.0, -d_rm * cosine / uu)
            q = tl.where(energy < floor, 0.0, -d_rm * cosine / vv)
            if NEEDED[1]:
                size = sizes[2] * sizes[3] * sizes[4]
                pixel = addresses(pixels[scale], (3 * size, size, sizes[3] * sizes[4], sizes[4], 1), image, place)
                tl.store(pixel, p, mask=inside)
                tl.store(pixel + size, q, mask=inside)
                tl.store(pixel + size + size, rm, mask=inside)
            part_at = parts[scale] + (program - bounds[scale]).to(tl.int64) * sizes[1]
            # A bound of 1 is a constant, and the difference of two of them a number, for which there is no .to.
            all_tiles = tl.cast(bounds[scale + 1] - bounds[scale], tl.int64) * sizes[1]
            for start in tl.range(0, sizes[1], CHANNELS, disable_licm=True):
                channel, present, a, g, f, e, u, v = _block(start, tile, gates, TILES, VOLUME, scale)
                d_out = read(grad_at + channel * grad_strides[1], present & inside)
                d_u, d_v = p * v - o * u, p * u - q * v
                if NEEDED[0]:
                    d_f = d_out * (1 + g * rm) + a * d_u
                    tl.store(out_at + channel * out_strides[1], d_f, mask=present & inside)
                if NEEDED[2]:
                    d_g = tl.sum(rm * d_out * (f - e), 0, keep_dims=True)
                    tl.store(part_at + channel, tl.sum(f * d_u, 0, keep_dims=True), mask=present)
                    tl.store(part_at + all_tiles + channel, tl.sum(e * d_v, 0, keep_dims=True), mask=present)
                    tl.store(part_at + 2 * all_tiles + channel, d_g, mask=present)


@triton.jit
def _fine(pixel, tap, size):
    """The fine pixel at ``2 pixel + tap``, of twice ``size``, and the coarse pixel's share in it along the axis.

    Beyond an edge it is the one at the edge, so that the shares in that one add up to 1.
    """
    return tl.minimum(tl.maximum(2 * pixel + tap, 0), 2 * size - 1), tl.where((tap + 2) // 2 == 1, 0.75, 0.25)


@triton.jit
def _coarse_kernel(
    coarse, features, gates,  # as forward
    compensated_grad, pixels,  # (B, C, *S), (B, 3, *S)
    coarse_grad,  # (B, C, *S/2)
    numbers, bounds, UNITS: tl.constexpr, TILES: tl.constexpr, VOLUME: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    for scale in tl.static_range(SCALES):
        if (program >= bounds[scale]) & (program < bounds[scale + 1]):
            CHANNELS: tl.constexpr = TILES[scale][0]
            sizes, strides = layout(numbers, UNITS, scale, 0), layout(numbers, UNITS, scale, 1)  # of the coarse ones
            f_strides, grad_strides = layout(numbers, UNITS, scale, 2), layout(numbers, UNITS, scale, 3)
            out_strides = layout(numbers, UNITS, scale, 4)
            _, channels, depth, height, width = sizes
            # From where the fine pixels ended, which are still in a cache.
            number, blocks = bounds[scale + 1] - 1 - program, tl.cdiv(channels, CHANNELS)
            image, place, inside = pixels_of(number // blocks, sizes, TILES, scale)
            channel, present = channels_of(number % blocks * CHANNELS, channels, TILES, scale)
            mask = present & inside
            a, b, g = _gates(gates[scale], image, channels, channel, present)
            d_at = coarse[scale] + image * strides[0] + channel * strides[1]
            f_at = features[scale] + image * f_strides[0] + channel * f_strides[1]
            grad_at = compensated_grad[scale] + image * grad_strides[0] + channel * grad_strides[1]
            size = (8 if VOLUME else 4) * depth * height * width
            pixels_strides = (3 * size, size, 4 * height * width, 2 * width, 1)

            d_coarse = tl.zeros(mask.shape, tl.float32)
            for to_z in tl.range(-1 if VOLUME else 0, 3 if VOLUME else 1, disable_licm=True):
                for to_y in tl.range(-1, 3, disable_licm=True):
                    for to_x in tl.range(-1, 3, disable_licm=True):
                        fine_z, in_z = _fine(place[0], to_z, depth)
                        fine_y, in_y = _fine(place[1], to_y, height)
                        fine_x, in_x = _fine(place[2], to_x, width)
                        fine, share = (fine_z, fine_y, fine_x), (in_z if VOLUME else 1.0) * in_y * in_x
                        pixel = addresses(pixels[scale], pixels_strides, image, fine)
                        p, q, rm = read(pixel, inside), read(pixel + size, inside), read(pixel + size + size, inside)
                        f, d_out = read(f_at + at(f_strides, fine), mask), read(grad_at + at(grad_strides, fine), mask)
                        e = tl.zeros(mask.shape, tl.float32)
                        for far in tl.static_range(2 if VOLUME else 1):
                            e = _with_plane(e, d_at, strides, place, (to_z, to_y, to_x), sizes[2:], mask, far, VOLUME)
                        d_coarse += share * (b * (p * (a * f) - q * (b * e)) - g * rm * d_out)
            out_at = addresses(coarse_grad[scale], out_strides, image, place) + channel * out_strides[1]
            tl.store(out_at, d_coarse, mask=mask)


def _pixels(features: Tensor) -> int:
    return PIXELS // (features.dim() - 3)


def _fine_channels(features: Tensor) -> int:
    """Of a block of the fine kernel: where they lie side by side, and in volumes, 16 would make accesses narrower."""
    return 16 if features.dim() == 4 and features.stride(1) > 1 else 32


def forward(scales: Sequence[Scale], eps: float) -> list[tuple[Tensor, Tensor]]:
    """``(compensated, residual)`` of each scale, the first laid out as the features."""
    features, coarse, gates = zip(*((*scale[:2], tuple(scale[2:])) for scale in scales), strict=True)
    out = [(torch.empty_like(one), one.new_empty(one.shape[0], 1, *one.shape[2:])) for one in features]
    launch = Launch([(f, d, *pair) for f, d, pair in zip(features, coarse, out, strict=True)], _pixels(features[0]))
    tensors = features, coarse, gates, *zip(*out, strict=True)
    launch.start(_forward_kernel, *tensors, max(eps * eps, TINY), num_warps=WARPS)
    return out


def backward(
    grads: Sequence[tuple[Tensor, Tensor]], scales: Sequence[Scale], eps: float, needed: Sequence[Sequence[bool]]
) -> list[tuple[Tensor | None, ...]]:
    """Of each scale the gradients of its five tensors, laid out as these, None where not needed."""
    out_grads, residual_grads = zip(*grads, strict=True)
    features, coarse, gates = zip(*((*scale[:2], tuple(scale[2:])) for scale in scales), strict=True)
    # A kind that one scale needs is computed for all.
    kinds = tuple(any(any(want[of]) for want in needed) for of in (slice(1), slice(1, 2), slice(2, 5)))
    # What is not wanted gets a tensor that no kernel touches: a pointer of the right type.
    d_features = tuple(map(torch.empty_like, features)) if kinds[0] else features
    d_coarse = tuple(map(torch.empty_like, coarse)) if kinds[1] else coarse
    d_gates = [tuple(map(torch.empty_like, three)) for three in gates]
    groups = list(zip(features, coarse, out_grads, residual_grads, d_features, strict=True))
    launch = Launch(groups, _pixels(features[0]), channels=_fine_channels(features[0]))
    pixels, parts = [], []
    for one, count in zip(features, launch.counts, strict=True):
        like = {"dtype": torch.float32, "device": one.device}
        pixels.append(torch.empty((len(one), 3, *one.shape[2:]) if kinds[1] else 1, **like))
        parts.append(torch.empty((3, len(one) * count, one.shape[1]) if kinds[2] else 1, **like))
    tensors = features, coarse, gates, out_grads, residual_grads, d_features, tuple(pixels), tuple(parts)
    launch.start(_fine_kernel, *tensors, max(eps * eps, TINY), NEEDED=kinds, num_warps=WARPS)
    if kinds[1]:
        # It reads more for each of its pixels.
        groups = list(zip(coarse, features, out_grads, d_coarse, strict=True))
        launch = Launch(groups, PIXELS // 4, True)
        tensors = coarse, features, gates, out_grads, tuple(pixels), d_coarse
        launch.start(_coarse_kernel, *tensors, num_warps=WARPS)
    if kinds[2]:
        add_rows([pair for part, three in zip(parts, d_gates, strict=True) for pair in zip(part, three, strict=True)])
    found = zip(d_features, d_coarse, d_gates, needed, strict=True)
    return [
        tuple(one if wanted else None for one, wanted in zip((f, d, *three), want, strict=True))
        for f, d, three, want in found
    ]
