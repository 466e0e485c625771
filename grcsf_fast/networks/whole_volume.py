"""One volume through a network: as slices or windows, seen in several ways, and put together again.

:func:`reconstruct` and :func:`segment_views` are generators: they yield the images that they want computed and are sent
the :class:`Order` with the outputs. Who runs them decides which volumes share a batch; :func:`segment` runs one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.labels import Labels
from ..runtime.precision import without_autocast
from ..runtime.transfers import fetch, to_device, volumes_on
from .grcsf import GRCSF
from .mae import MaskedAutoencoder
from .residual_maps import check_patches, residual_maps
from .stream import Images, Made, Order, Stage, Stream
from .unet import crop_to, pad_to_multiple
from .unit_maps import unit_maps, with_unit_maps
from .weights import ResidualMapSettings
from .windows import Windows, resize_images

__all__ = [
    "Segmented",
    "reconstruct",
    "reconstruction_stage",
    "segment",
    "segment_views",
    "segmentation_stage",
]

RECONSTRUCTION, SEGMENTATION = "residual_maps", "segmentation"
WINDOWS_A_SLICE = 8  # a batch has that many times fewer windows than it would have slices
NO_LESION = -30.0  # logit of windows that no network saw


class Segmented(NamedTuple):
    """What a network found in a volume.

    Attributes:
        probability: of lesion, (X, Y, Z) float32 in [0, 1]; with labels (K, X, Y, Z), one for each.
        unit_maps: by name, see :func:`.unit_maps.with_unit_maps`, (X, Y, Z) float32: of the first way of seeing the
            volume, 0 where no network looked.
    """

    probability: Tensor
    unit_maps: Mapping[str, Tensor]


def segmentation_stage(
    network: GRCSF,
    batch_size: int = 16,
    roi_size: tuple[int, ...] | None = None,
    forward: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    in_channels: int = 1,
    labels: Labels | None = None,
) -> dict[str, Stage]:
    """The stage that :func:`segment_views` asks for.

    Args:
        network: in evaluation mode; in half precision by :meth:`GRCSF.optimized_for_inference`.
        batch_size: slices at once; windows of 3-D networks: an eighth of it.
        roi_size: of a 3-D network, edge lengths; None: the whole volume at once.
        forward: called in place of :func:`.unit_maps.with_unit_maps` of the network; a compiled form of it.
        in_channels: of the volumes.
        labels: that the network tells apart; None: lesion alone.

    Raises:
        ValueError: a network for other images than a volume's.
    """
    outputs = labels.outputs if labels is not None else 1
    if (network.in_channels, network.out_channels) != (in_channels, outputs):
        raise ValueError(
            f"network: expected in_channels {in_channels} and out_channels {outputs}, those of volumes and masks; "
            f"got in_channels {network.in_channels} and out_channels {network.out_channels}"
        )
    device, call = next(network.parameters()).device, forward or with_unit_maps(network)

    @torch.no_grad()
    def run(inputs: Tensor) -> Tensor:
        came_from, inputs = inputs.device, inputs.to(device)
        seen = network.seen_channels
        maps = inputs[:, seen:].to(network.dtype).contiguous() if inputs.shape[1] > seen else None
        with without_autocast(device):  # the precision is that of the weights, whoever calls
            return call(inputs[:, :seen].contiguous(), maps).float().to(came_from)

    windows = 1 if roi_size is None else max(1, batch_size // WINDOWS_A_SLICE)
    return {SEGMENTATION: Stage(batch_size if network.spatial_dims == 2 else windows, run)}


def reconstruction_stage(
    mae: MaskedAutoencoder, spatial_dims: int, batch_size: int, settings: ResidualMapSettings, in_channels: int = 1
) -> dict[str, Stage]:
    """The stage that :func:`reconstruct` asks for.

    Args:
        mae: the masked autoencoder.
        spatial_dims: of the network that gets the maps.
        batch_size: slices at once; volumes of 3-D networks go one by one.
        settings: of the maps.
        in_channels: of the volumes.

    Raises:
        ValueError: an autoencoder for other images than the network's.
    """
    if (mae.in_channels, mae.spatial_dims) != (in_channels, spatial_dims):
        raise ValueError(
            f"mae: expected in_channels {in_channels} and spatial_dims {spatial_dims} (that of the network), "
            f"got in_channels {mae.in_channels} and spatial_dims {mae.spatial_dims}"
        )
    device = next(mae.parameters()).device

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        with without_autocast(device):
            found = residual_maps(images.to(device), mae, **asdict(settings), batch_size=len(images))
        return found.to(images.device)

    return {RECONSTRUCTION: Stage(batch_size if spatial_dims == 2 else 1, run)}


def reconstruct(
    volume: Tensor, foreground: Tensor | None, mae: MaskedAutoencoder, mask_ratios: Sequence[float]
) -> Generator[Images, Order, Tensor]:
    """Residual maps of one volume.

    Args:
        volume: (X, Y, Z) float32, preprocessed; (C, X, Y, Z) of several channels.
        foreground: (X, Y, Z) bool, on the CPU; slices without it are not computed, their maps are 0. None: all are.
        mae: the autoencoder of the stage.
        mask_ratios: those of the stage.

    Returns:
        (M, X, Y, Z) float32.

    Raises:
        ValueError: a volume too small for the masking ratios.
    """
    kept = _kept(volume, foreground, mae.spatial_dims)
    if kept is not None and not len(kept):
        return volume.new_zeros((len(mask_ratios), *volume.shape[-3:]))

    shape = volume.shape[-3:]

    def make(part: slice) -> Tensor:
        seen = _whole(volume) if kept is None else mae.stack(volume, kept[part])
        return pad_to_multiple(seen, mae.patch_size)

    def finish(maps: Tensor) -> Tensor:
        return crop_to(maps, shape[: mae.spatial_dims])

    one = make(slice(0, 1))
    check_patches(mae, one.shape[2:], mask_ratios)
    order = yield Images(RECONSTRUCTION, [Made((1 if kept is None else len(kept), *one.shape[1:]), make, finish)])
    return _volumes(order.outputs.pop(), kept, shape[2])


def segment_views(
    volume: Tensor,
    foreground: Tensor | None,
    maps: Tensor | None,
    network: GRCSF,
    roi_size: tuple[int, ...] | None = None,
    tta_flip: bool = False,
    tta_scales: Sequence[float] = (1.0,),
    labels: Labels | None = None,
) -> Generator[Images, Order, Segmented]:
    """Lesion probability of one volume, averaged over the ways of seeing it, and what the units saw.

    Args:
        volume: (X, Y, Z) float32, preprocessed; (C, X, Y, Z) of several channels.
        foreground: (X, Y, Z) bool, on the CPU; slices without it are not computed, their probability is 0. Nor are
            windows, whose probability is then that of a logit of -30. None: all are computed.
        maps: residual maps (M, X, Y, Z), or None for a network without RCU.
        network: of the stage.
        roi_size: sliding window of a 3-D network; None: the whole volume at once.
        tta_flip: average over the volume and its mirror image along the first axis, left to right.
        tta_scales: average over the volume enlarged by these factors; in the slice, for a 2-D network.
        labels: that the network tells apart; None: lesion alone.
    """
    dims, whole, units = network.spatial_dims, volume.shape[-3:], unit_maps(network)
    kept = _kept(volume, foreground, dims)
    if kept is not None and not len(kept):
        nothing = volume.new_zeros(whole if labels is None else (len(labels.names), *whole))
        return Segmented(nothing, {name: volume.new_zeros(whole) for name in units})
    # A scale at a time: of 3-D networks the images of all ways of seeing a head would be most of what a case holds.
    labelled = 1 if labels is None else len(labels.names)
    total: Tensor | None = None
    looked: Tensor | None = None
    for scale in tta_scales:
        shape = tuple(max(1, round(size * scale)) for size in whole[:dims])
        views = _views(shape, tta_flip, roi_size, foreground, total is None)
        outputs: list[Tensor] = []
        if any(view.windows is None or view.windows.seen for view in views):
            # The images get no name here: whoever computes them has to hold the only reference, to free them in time.
            order = yield Images(
                SEGMENTATION,
                _seen(volume, maps, views, network)
                if kept is None
                else [_slices(volume, maps, kept, view, network, labels) for view in views],
            )
            outputs = order.outputs
        for view in views:
            if kept is None:
                found = _found(_joined(outputs, view, labels, len(units), volume.device), view, whole, labels)
            else:
                found = outputs.pop(0)
            if view.looked:
                looked = found[:, labelled:]
            total = found[:, :labelled] if total is None else total.add_(found[:, :labelled])
    assert total is not None
    assert looked is not None
    found = _volumes(total.div_(len(tta_scales) * (1 + tta_flip)), kept, whole[2])
    maps_of = dict(zip(units, _volumes(looked, kept, whole[2]), strict=True))
    return Segmented(found[0] if labels is None else found, maps_of)


def segment(
    network: GRCSF,
    volume: Tensor,
    maps: Tensor | None,
    batch_size: int = 16,
    roi_size: tuple[int, ...] | None = None,
    tta_flip: bool = False,
    tta_scales: Sequence[float] = (1.0,),
    labels: Labels | None = None,
) -> Tensor:
    """Lesion probability of one preprocessed volume; arguments as for :func:`segment_views` and its stage.

    Returns:
        The probability alone, on the CPU.
    """
    channels = len(volume) if volume.dim() == 4 else 1
    stream = Stream(segmentation_stage(network, batch_size, roi_size, None, channels, labels))
    device = volumes_on(next(network.parameters()).device)
    maps = None if maps is None else to_device(maps, device)
    work = segment_views(to_device(volume, device), None, maps, network, roi_size, tta_flip, tta_scales, labels)
    order = None
    while True:
        try:
            order = stream.submit(work.send(order))
        except StopIteration as end:
            return fetch({"probability": end.value.probability})["probability"]
        stream.run()
        if order.error is not None:
            raise order.error


@dataclass(frozen=True)
class _View:
    """A way of seeing a volume.

    Attributes:
        shape: of its images, enlarged.
        turned: mirrored along the first axis.
        windows: in which the images are cut; None: they go whole.
        looked: whether what the units saw is wanted of it; it is not turned then.
    """

    shape: tuple[int, ...]
    turned: bool
    windows: Windows | None
    looked: bool


def _views(
    shape: tuple[int, ...], tta_flip: bool, roi_size: tuple[int, ...] | None, foreground: Tensor | None, first: bool
) -> list[_View]:
    """The ways of seeing a volume of which the images have one shape; ``first``: of the first shape."""
    views = []
    for turned in (False, True) if tta_flip else (False,):
        windows = None
        if len(shape) == 3 and roi_size is not None:
            windows = Windows.over(shape, roi_size, foreground, turned)
        views.append(_View(shape, turned, windows, first and not turned))
    return views


def _slices(
    volume: Tensor, maps: Tensor | None, kept: Tensor, view: _View, network: GRCSF, labels: Labels | None
) -> Made:
    """The slices of a view, padded as the network wants them, and what is found in them."""

    def make(part: slice) -> Tensor:
        numbers = kept[part]
        images = network.stack(volume, numbers)
        if maps is not None:
            images = torch.cat([images, _images(maps, numbers)], 1)
        images = resize_images(images, view.shape)
        return pad_to_multiple(images.flip(2) if view.turned else images, network.multiple, network.minimum)

    whole = volume.shape[-3:]
    shape = (len(kept), *make(slice(0, 1)).shape[1:])
    return Made(shape, make, lambda outputs: _found(outputs, view, whole, labels))


def _seen(volume: Tensor, maps: Tensor | None, views: Sequence[_View], network: GRCSF) -> list[Tensor]:
    """The images of each view of a 3-D network, but of those without a window to be seen; padded as it wants them."""
    images = _whole(volume)
    if maps is not None:
        images = torch.cat([images, _images(maps, None)], 1)
    images = resize_images(images, views[0].shape)
    found = []
    for view in views:
        one = images.flip(2) if view.turned else images
        if view.windows is not None:
            if not view.windows.seen:
                continue
            one = view.windows.cut(one)
        found.append(pad_to_multiple(one, network.multiple, network.minimum))
    return found


def _joined(outputs: list[Tensor], view: _View, labels: Labels | None, units: int, device: torch.device) -> Tensor:
    """Logits and maps of units (1, C + U, \\*S) of a view of a 3-D network, taken out of the list if it has any."""
    if view.windows is None:
        return outputs.pop(0)
    windows = crop_to(outputs.pop(0), view.windows.roi_size) if view.windows.seen else ()
    # Of several classes the first is for what is no lesion.
    classes, channels = _channels(labels)
    unseen = [0.0] * classes + [NO_LESION] * (channels - classes) + [0.0] * units
    return view.windows.assembled(windows, unseen, device)


def _found(outputs: Tensor, view: _View, whole: Sequence[int], labels: Labels | None) -> Tensor:
    """From logits and maps of units (N, C + U, \\*S) of a view to the probability of each label as the volume lies,
    (N, K, \\*S), and where they are wanted the maps behind it, (N, K + U, \\*S)."""
    classes, channels = _channels(labels)
    cropped = crop_to(outputs, view.shape)
    shape = whole[: len(view.shape)]
    logits = cropped[:, :channels]
    found = logits.softmax(1)[:, 1:] if classes else logits.sigmoid()
    found = resize_images(found.flip(2) if view.turned else found, shape)
    if not view.looked or cropped.shape[1] == channels:  # nothing wanted, or no units
        return found
    return torch.cat([found, resize_images(cropped[:, channels:], shape)], 1)


def _channels(labels: Labels | None) -> tuple[bool, int]:
    """Whether the first of the logits is for what is no lesion, and their number."""
    return (False, 1) if labels is None else (labels.exclusive, labels.outputs)


def _kept(volume: Tensor, foreground: Tensor | None, spatial_dims: int) -> Tensor | None:
    """The numbers of the slices that a 2-D network is to see; None for a 3-D one."""
    if spatial_dims == 3:
        return None
    if foreground is None:
        return torch.arange(volume.shape[-1], device=volume.device)
    # Their number is known before they go to the volume's device, for which the processor would have to wait.
    return to_device(foreground.flatten(0, 1).any(0).nonzero()[:, 0], volume.device)


def _whole(volume: Tensor) -> Tensor:
    """(X, Y, Z) or (C, X, Y, Z) as a batch of one image."""
    return volume[None] if volume.dim() == 4 else volume[None, None]


def _images(volumes: Tensor, kept: Tensor | None) -> Tensor:
    """(K, X, Y, Z) to (N, K, \\*S): the slices that are kept, or the volume as one image."""
    return volumes[None] if kept is None else volumes.permute(3, 0, 1, 2)[kept]


def _volumes(images: Tensor, kept: Tensor | None, depth: int) -> Tensor:
    """The inverse of :func:`_images`, 0 in slices that were not kept."""
    if kept is None:
        return images[0]
    whole = images.new_zeros((depth, *images.shape[1:]))
    whole[kept] = images
    return whole.permute(1, 2, 3, 0).contiguous()
