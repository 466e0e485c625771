"""From a masked autoencoder to residual maps: how the image differs from what its surroundings lead to expect."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, ArgumentTypeError
from .arguments import KINDS_OF_MAPS, check_tensor, checked_config, is_whole, short
from .constants import constant_tensors
from .mae import MaskedAutoencoder

__all__ = [
    "check_mae", "check_patches", "complementary_masks", "covering_masks", "residual_maps", "volume_residual_maps",
]  # fmt: skip


def complementary_masks(count: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Visible patches of the passes of one round; together the passes hide every patch at least once.

    At 50 % two passes, at 75 % four: the visible sets of a round do not overlap, so an image of a multiple of four
    patches is hidden once and three times. Below 50 % it is the hidden sets that divide the image.

    Args:
        count: P, patches of the image.
        ratio: share of the patches hidden in a pass, in (0, 1).
        generator: source of the permutation.

    Returns:
        (passes, V) int64 on the CPU, indices of visible patches.

    Raises:
        ArgumentError: a ratio outside (0, 1), or too few patches for it.
    """
    if not 0 < ratio < 1:
        raise ArgumentError(f"ratio: expected a number in (0, 1), got {ratio}")
    # Rounded, so that 1 - 0.9 counts as a tenth.
    visible = math.floor(round(count * (1 - ratio), 6))
    if visible < 1 or visible >= count:
        raise ArgumentError(f"ratio: {ratio} of {count} patches leaves {visible} visible; expected 1 to {count - 1}")
    order = torch.randperm(count, generator=generator, device="cpu")
    if 2 * visible <= count:
        return order[: count // visible * visible].reshape(-1, visible)
    hidden = count - visible
    passes = math.ceil(count / hidden)
    # The last hidden set wraps around to the first patches of the permutation.
    return torch.stack([order.roll(-step * hidden)[hidden:] for step in range(passes)])


def check_mae(given: Any, form: tuple[int, int] | None = None) -> None:
    """See that it is an autoencoder, compiled or not, and one for a network's spatial dimensions and channels.

    Raises:
        ArgumentTypeError: something else, such as a bundle's name.
        ArgumentError: one of another form.
    """
    if not isinstance(given, nn.Module) or not hasattr(given, "restores"):
        raise ArgumentTypeError(
            f"mae: expected a MaskedAutoencoder, got {short(given)}; "
            "MaskedAutoencoder.from_pretrained('demo') is the packaged one"
        )
    if form is not None and form != (given.spatial_dims, given.in_channels):
        raise ArgumentError(
            f"mae: expected spatial_dims {form[0]} and in_channels {form[1]}, "
            f"got {given.spatial_dims} and {given.in_channels}"
        )


def check_patches(mae: MaskedAutoencoder, spatial_shape: Sequence[int], mask_ratios: Sequence[float]) -> int:
    """The number of patches of an image.

    Raises:
        ArgumentError: too few for the masking ratios, or an axis that is no multiple of the patch.
    """
    count = math.prod(mae.grid(tuple(spatial_shape)))
    least = math.ceil(round(1 / (1 - max(mask_ratios)), 6))
    if count < least:
        raise ArgumentError(
            f"image: expected at least {least} patches of edge {mae.patch_size} for ratio {max(mask_ratios)}, "
            f"got {count} "
            f"in {tuple(spatial_shape)}"
        )
    return count


@torch.no_grad()
def residual_maps(
    image: Tensor,
    mae: MaskedAutoencoder,
    mask_ratios: Sequence[float] = (0.5, 0.75),
    rounds: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    signed: bool = True,
) -> Tensor:
    """Mean reconstruction error of each pixel over the passes in which it was hidden, a map per ratio.

    Image minus reconstruction: below 0 the image is darker than expected, above 0 brighter. Of an autoencoder that
    restores it is the mean over the passes in which the pixel was visible: image minus healthy head.

    The masks come from ``seed`` alone and are the same for every image of a batch, so the maps of an image depend
    neither on its neighbours in the batch nor on the run. Channels are averaged. Images whose size is no multiple of
    the patch are padded with their edge values and cropped back. Images larger than the autoencoder's ``image_size``
    are seen in windows of it that overlap by a quarter or more, whose maps are blended.

    Args:
        image: (B, C, \\*S), or (B, seen_channels, \\*S) as :meth:`MaskedAutoencoder.stack` makes it for one that
            sees neighbouring slices; without them they count as equal to the image. float32 or the autoencoder's
            dtype, preprocessed as it was trained; any B, 0 included. Beside a float32 image an autoencoder in half
            precision reconstructs in its own and the differences are taken in float32.
        mae: the autoencoder; used in evaluation mode.
        mask_ratios: hidden shares, M of them.
        rounds: maskings averaged; each is a full set of complementary passes.
        seed: of the masks.
        batch_size: images a pass runs through the network at once; bounds the memory.
        progress: called with (images done, images in all) after each chunk; each window is an image.
        signed: False: the mean of the absolute error, for networks that were trained with it.

    Returns:
        (B, M, \\*S) in the dtype of ``image``; NaN wherever a patch was drawn from one that has NaN in a pixel.

    Raises:
        ArgumentTypeError: an image that is no tensor or of another dtype, or no autoencoder.
        ArgumentError: sizes, devices, ratios or rounds that do not fit.

    Source: paper (ratios, averaging); the sign, by measurement, and complementary masks are our decisions.
    """
    check_tensor("image", image, "(B,C,*S)")
    check_mae(mae)
    if image.dim() != 2 + mae.spatial_dims:
        raise ArgumentError(
            f"image: expected (B,C) and {mae.spatial_dims} spatial axes, got {image.dim()} axes {tuple(image.shape)}"
        )
    if image.shape[1] not in (mae.in_channels, mae.seen_channels):
        expected = " or ".join(map(str, sorted({mae.in_channels, mae.seen_channels})))
        raise ArgumentError(f"image: expected {expected} channels, got {image.shape[1]}")
    if image.shape[1] != mae.seen_channels:
        image = mae.alone(image)
    mask_ratios = checked_config(KINDS_OF_MAPS, mask_ratios=mask_ratios)["mask_ratios"]
    if not mask_ratios:
        raise ArgumentError("mask_ratios: expected at least one, got none")
    if not is_whole(rounds) or not is_whole(batch_size) or rounds < 1 or batch_size < 1:
        given = f"{short(rounds)} and {short(batch_size)}"
        raise ArgumentError(f"rounds and batch_size: expected 1 or more, got {given}")
    if not is_whole(seed):
        raise ArgumentError(f"seed: expected a whole number of at most 63 bits, got {short(seed)}")
    mae.check_image(image)
    if mae.image_size is not None and any(map(operator.gt, image.shape[2:], mae.image_size)):

        def maps_of(window: Tensor, told: Callable[[int, int], None] | None) -> Tensor:
            return residual_maps(window, mae, mask_ratios, rounds, seed, batch_size, told, signed)

        return _blended(image, mae.image_size, maps_of, progress)
    padding = [side for size in reversed(image.shape[2:]) for side in (0, -size % mae.patch_size)]
    padded = F.pad(image, padding, mode="replicate") if any(padding) else image
    count = check_patches(mae, padded.shape[2:], mask_ratios)
    masks = _masks(count, tuple(mask_ratios), rounds, seed, mae.restores, device=image.device)
    visible, hidden, times = masks[::3], masks[1::3], masks[2::3]
    counted = visible if mae.restores else hidden
    # A compiled or exported program takes any number of images.
    chunks = [padded] if torch.compiler.is_compiling() else padded.split(batch_size)

    training = [module for module in mae.modules() if module.training]
    for module in training:
        module.training = False
    try:
        maps = []
        for number, chunk in enumerate(chunks):
            # All passes of a ratio are one batch, and hidden patches alone are drawn.
            drawn = mae(chunk, visible, None if mae.restores else hidden, mae.restores)
            patches = mae.patchify(chunk[:, : mae.in_channels])
            errors = [
                _mean_error(patches, one, rows, often, signed)
                for one, rows, often in zip(drawn, counted, times, strict=True)
            ]
            maps.append(torch.stack([mae.unpatchify(error, chunk.shape[2:]).mean(1) for error in errors], 1))
            if progress is not None:
                progress(min((number + 1) * batch_size, image.shape[0]), image.shape[0])
    finally:
        for module in training:
            module.training = True
    found = maps[0] if len(maps) == 1 else torch.cat(maps)
    return found[(..., *[slice(0, size) for size in image.shape[2:]])].contiguous()


def _blended(
    image: Tensor,
    edges: Sequence[int],
    maps_of: Callable[[Tensor, Callable[[int, int], None] | None], Tensor],
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """Maps of an image from those of its windows, whose weights fall towards their borders."""
    spatial = image.shape[2:]
    starts = [_starts(size, edge) for size, edge in zip(spatial, edges, strict=True)]
    corners = list(itertools.product(*starts))
    wide = torch.promote_types(image.dtype, torch.float32)
    weight = torch.ones((), dtype=wide, device=image.device)
    for size, edge, along in zip(spatial, edges, starts, strict=True):
        steps = torch.arange(1, min(size, edge) + 1, dtype=wide, device=image.device)
        ramp = torch.minimum(steps, steps.flip(0)) if len(along) > 1 else torch.ones_like(steps)
        weight = weight[..., None] * ramp
    weights, total = torch.zeros(spatial, dtype=wide, device=image.device), None
    for number, corner in enumerate(corners):

        def told(done: int, count: int, before: int = number) -> None:
            if progress is not None:
                progress(before * count + done, len(corners) * count)

        place = tuple(slice(start, start + edge) for start, edge in zip(corner, edges, strict=True))
        maps = maps_of(image[(..., *place)].contiguous(), told)
        if total is None:
            total = weights.new_zeros((*maps.shape[:2], *spatial))
        total[(..., *place)] += weight * maps
        weights[place] += weight
    assert total is not None
    return (total / weights).to(image.dtype)


def _starts(size: int, edge: int) -> list[int]:
    """Where windows of an edge begin along an axis, from its one end to the other."""
    if size <= edge:
        return [0]
    steps = math.ceil((size - edge) / (edge - edge // 4))
    return [step * (size - edge) // steps for step in range(steps + 1)]


def volume_residual_maps(
    volume: Tensor,
    mae: MaskedAutoencoder,
    mask_ratios: Sequence[float] = (0.5, 0.75),
    rounds: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    signed: bool = True,
    slices: Sequence[int] | None = None,
) -> Tensor:
    """Residual maps of one volume, (X, Y, Z) -> (M, X, Y, Z); a 2-D autoencoder sees its axial slices as one batch.

    The volume is (C, X, Y, Z) for an autoencoder of several channels. Arguments and errors as for
    :func:`residual_maps`; ``slices`` of a 2-D autoencoder: the maps of other ones are 0.
    """
    check_tensor("volume", volume, "(X,Y,Z)")
    if volume.dim() != (3 if mae.in_channels == 1 else 4):
        expected = "(X,Y,Z)" if mae.in_channels == 1 else f"({mae.in_channels},X,Y,Z)"
        raise ArgumentError(f"volume: expected {expected}, got {volume.dim()} axes {tuple(volume.shape)}")
    if mae.spatial_dims == 3:
        image = volume[None] if volume.dim() == 4 else volume[None, None]
        return residual_maps(image, mae, mask_ratios, rounds, seed, batch_size, progress, signed)[0]
    wanted = torch.tensor(range(volume.shape[-1]) if slices is None else slices, device=volume.device)
    images = mae.stack(volume, wanted)  # (N,seen_channels,X,Y)
    found = residual_maps(images, mae, mask_ratios, rounds, seed, batch_size, progress, signed).permute(1, 2, 3, 0)
    if slices is None:
        return found
    maps = found.new_zeros((len(found), *volume.shape[-3:]))
    maps[..., wanted] = found
    return maps


def covering_masks(count: int, ratio: float, generator: torch.Generator) -> Tensor:
    """As :func:`complementary_masks`, of passes that together show every patch at least once."""
    visible = complementary_masks(count, ratio, generator)
    shown = visible.unique()
    if len(shown) == count:
        return visible
    # Fewer patches are left than a pass shows: it shows some a second time.
    rest = torch.ones(count, dtype=torch.bool, device="cpu").index_fill(0, shown, False).nonzero().flatten()
    return torch.cat([visible, torch.cat([rest, visible.flatten()])[None, : visible.shape[1]]])


@constant_tensors
def _masks(count: int, mask_ratios: tuple[float, ...], rounds: int, seed: int, shown: bool) -> tuple[Tensor, ...]:
    """Three tensors per ratio: visible patches (passes, V), hidden ones (passes, P - V), and how often each counts,
    (P,) float32: where it is hidden, or where it is ``shown``."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    masks = covering_masks if shown else complementary_masks
    tensors: list[Tensor] = []
    for ratio in mask_ratios:
        visible = torch.cat([masks(count, ratio, generator) for _ in range(rounds)])
        hidden = torch.ones(len(visible), count, dtype=torch.bool, device="cpu").scatter(1, visible, False)
        times = (~hidden if shown else hidden).sum(0, dtype=torch.float32)
        tensors += [visible, hidden.nonzero()[:, 1].reshape(len(visible), -1), times]
    return tuple(tensors)


def _mean_error(patches: Tensor, drawn: Tensor, counted: Tensor, times: Tensor, signed: bool) -> Tensor:
    """(b, P, values), x - x^ or its absolute value, averaged over the passes in which a patch counts.

    Of an autoencoder that restores those count that show the patch, of others those that hide it; masks as from
    :func:`_masks`.
    """
    error = patches[:, counted] - drawn
    error = error if signed else error.abs()  # (b,passes,N,values)
    total = torch.zeros_like(patches)
    for number in range(len(counted)):
        total[:, counted[number]] += error[:, number]
    return total / times[:, None].to(patches.dtype)
