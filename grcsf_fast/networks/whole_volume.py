"""One volume through a network: as slices or windows, seen in several ways, and put together again.

:func:`reconstruct` and :func:`segment_views` are generators: they yield the images that they want computed and are sent
the :class:`Order` with the outputs. Who runs them decides which volumes share a batch; :func:`segment` runs one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .grcsf import GRCSF
from .mae import MaskedAutoencoder
from .residual_maps import check_patches, residual_maps
from .stream import Images, Order, Stage, Stream
from .unet import crop_to, pad_to_multiple
from .weights import ResidualMapSettings

__all__ = ["reconstruct", "reconstruction_stage", "segment", "segment_views", "segmentation_stage"]

RECONSTRUCTION, SEGMENTATION = "residual_maps", "segmentation"
OVERLAP = 0.25  # of the windows of a 3-D network
WINDOWS_A_SLICE = 8  # a batch has that many times fewer windows than it would have slices
NO_LESION = -30.0  # logit of windows that no network saw

Place = tuple[slice, ...]


def segmentation_stage(
    network: GRCSF,
    batch_size: int = 16,
    roi_size: tuple[int, ...] | None = None,
    forward: Callable[[Tensor, Tensor | None], Tensor] | None = None,
) -> dict[str, Stage]:
    """The stage that :func:`segment_views` asks for.

    Args:
        network: in evaluation mode, one input and one output channel; in half precision by
            :meth:`GRCSF.optimized_for_inference`.
        batch_size: slices at once; windows of 3-D networks: an eighth of it.
        roi_size: of a 3-D network, edge lengths; None: the whole volume at once.
        forward: called in place of ``network``; a compiled form of it.

    Raises:
        ValueError: a network for other images than a volume's.
    """
    if (network.in_channels, network.out_channels) != (1, 1):
        raise ValueError(
            "network: expected in_channels 1 and out_channels 1, volumes having one channel and lesions one mask; "
            f"got in_channels {network.in_channels} and out_channels {network.out_channels}"
        )
    device, call = next(network.parameters()).device, forward or network

    @torch.no_grad()
    def run(inputs: Tensor) -> Tensor:
        inputs = inputs.to(device)
        seen = network.seen_channels
        maps = inputs[:, seen:].to(network.dtype).contiguous() if inputs.shape[1] > seen else None
        return call(inputs[:, :seen].contiguous(), maps)[:, 0].float().cpu()

    windows = 1 if roi_size is None else max(1, batch_size // WINDOWS_A_SLICE)
    return {SEGMENTATION: Stage(batch_size if network.spatial_dims == 2 else windows, run)}


def reconstruction_stage(
    mae: MaskedAutoencoder, spatial_dims: int, batch_size: int, settings: ResidualMapSettings
) -> dict[str, Stage]:
    """The stage that :func:`reconstruct` asks for.

    Args:
        mae: the masked autoencoder.
        spatial_dims: of the network that gets the maps.
        batch_size: slices at once; volumes of 3-D networks go one by one.
        settings: of the maps.

    Raises:
        ValueError: an autoencoder for other images than the network's.
    """
    if (mae.in_channels, mae.spatial_dims) != (1, spatial_dims):
        raise ValueError(
            f"mae: expected in_channels 1 and spatial_dims {spatial_dims} (that of the network), "
            f"got in_channels {mae.in_channels} and spatial_dims {mae.spatial_dims}"
        )
    device = next(mae.parameters()).device

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        return residual_maps(images.to(device), mae, **asdict(settings), batch_size=len(images)).cpu()

    return {RECONSTRUCTION: Stage(batch_size if spatial_dims == 2 else 1, run)}


def reconstruct(
    volume: Tensor, foreground: Tensor | None, mae: MaskedAutoencoder, mask_ratios: Sequence[float]
) -> Generator[Images, Order, Tensor]:
    """Residual maps of one volume.

    Args:
        volume: (X, Y, Z) float32, preprocessed.
        foreground: (X, Y, Z) bool; slices without it are not computed, their maps are 0. None: all are.
        mae: the autoencoder of the stage.
        mask_ratios: those of the stage.

    Returns:
        (M, X, Y, Z) float32.

    Raises:
        ValueError: a volume too small for the masking ratios.
    """
    kept = _kept(volume, foreground, mae.spatial_dims)
    if kept is not None and not len(kept):
        return volume.new_zeros((len(mask_ratios), *volume.shape))

    def images() -> Tensor:
        seen = volume[None, None] if kept is None else mae.stack(volume, kept)
        padded = pad_to_multiple(seen, mae.patch_size)
        check_patches(mae, padded.shape[2:], mask_ratios)
        return padded

    order = yield Images(RECONSTRUCTION, [images()])
    return _volumes(crop_to(order.outputs.pop(), volume.shape[: mae.spatial_dims]), kept, volume.shape[2])


def segment_views(
    volume: Tensor,
    foreground: Tensor | None,
    maps: Tensor | None,
    network: GRCSF,
    roi_size: tuple[int, ...] | None = None,
    tta_flip: bool = False,
    tta_scales: Sequence[float] = (1.0,),
) -> Generator[Images, Order, Tensor]:
    """Lesion probability of one volume, averaged over the ways of seeing it.

    Args:
        volume: (X, Y, Z) float32, preprocessed.
        foreground: (X, Y, Z) bool; slices without it are not computed, their probability is 0. Nor are windows, whose
            probability is then that of a logit of -30. None: all are computed.
        maps: residual maps (M, X, Y, Z), or None for a network without RCU.
        network: of the stage.
        roi_size: sliding window of a 3-D network; None: the whole volume at once.
        tta_flip: average over the volume and its mirror image along the first axis, left to right.
        tta_scales: average over the volume enlarged by these factors; in the slice, for a 2-D network.

    Returns:
        (X, Y, Z) float32 in [0, 1].
    """
    dims = network.spatial_dims
    kept = _kept(volume, foreground, dims)
    if kept is not None and not len(kept):
        return torch.zeros_like(volume)
    views = []
    for scale in tta_scales:
        shape = tuple(max(1, round(size * scale)) for size in volume.shape[:dims])
        for turned in (False, True) if tta_flip else (False,):
            windows = None
            if dims == 3 and roi_size is not None:
                windows = _Windows.over(shape, roi_size, foreground, turned)
            views.append(_View(shape, turned, windows))
    outputs: list[Tensor] = []
    if any(view.windows is None or view.windows.seen for view in views):
        # No name here for what is computed: whoever computes it is to be the only one that keeps it.
        order = yield Images(SEGMENTATION, _seen(volume, maps, kept, views, network))
        outputs = order.outputs
    return _volumes(_mean(outputs, views, volume.shape[:dims]), kept, volume.shape[2])[0]


def segment(
    network: GRCSF,
    volume: Tensor,
    maps: Tensor | None,
    batch_size: int = 16,
    roi_size: tuple[int, ...] | None = None,
    tta_flip: bool = False,
    tta_scales: Sequence[float] = (1.0,),
) -> Tensor:
    """Lesion probability of one preprocessed volume; arguments as for :func:`segment_views` and its stage.

    Returns:
        (X, Y, Z) float32 in [0, 1], on the CPU.
    """
    stream = Stream(segmentation_stage(network, batch_size, roi_size))
    maps = None if maps is None else maps.cpu()
    work = segment_views(volume.cpu(), None, maps, network, roi_size, tta_flip, tta_scales)
    order = None
    while True:
        try:
            order = stream.submit(work.send(order))
        except StopIteration as end:
            return end.value
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
    """

    shape: tuple[int, ...]
    turned: bool
    windows: _Windows | None


@dataclass(frozen=True)
class _Windows:
    """Sliding windows with MONAI's places and Gaussian weights.

    Attributes:
        roi_size: of each.
        missing: by which an image is smaller than a window, for each axis.
        shape: of the image, padded to a window at least.
        places: of all windows.
        seen: those with foreground.
    """

    roi_size: tuple[int, ...]
    missing: list[int]
    shape: tuple[int, ...]
    places: list[Place]
    seen: list[Place]

    @classmethod
    def over(
        cls, shape: tuple[int, ...], roi_size: tuple[int, ...], foreground: Tensor | None, turned: bool
    ) -> _Windows:
        from monai.data.utils import dense_patch_slices

        missing = [max(0, edge - size) for edge, size in zip(roi_size, shape, strict=True)]
        padded = tuple(size + gap for size, gap in zip(shape, missing, strict=True))
        places = dense_patch_slices(padded, roi_size, [max(1, int(edge * (1 - OVERLAP))) for edge in roi_size])
        windows = cls(roi_size, missing, padded, places, places)
        if foreground is None:
            return windows
        foreground = (foreground.flip(0) if turned else foreground)[None, None].float()
        foreground = F.pad((_resize(foreground, shape) > 0).float(), windows.padding())[0, 0] > 0
        return cls(roi_size, missing, padded, places, [place for place in places if foreground[place].any()])

    def padding(self) -> list[int]:
        """As :func:`torch.nn.functional.pad` wants it."""
        return [side for gap in reversed(self.missing) for side in (gap // 2, gap - gap // 2)]

    def cut(self, image: Tensor) -> Tensor:
        """(1, K, X, Y, Z) to (windows that are seen, K, \\*roi_size)."""
        padded = F.pad(image, self.padding(), mode="replicate")
        return torch.stack([padded[(0, slice(None), *place)] for place in self.seen])

    def assembled(self, logits: Sequence[Tensor]) -> Tensor:
        """Of the windows that are seen, \\*roi_size each, to (1, X, Y, Z)."""
        from monai.data.utils import compute_importance_map

        weights = compute_importance_map(self.roi_size, mode="gaussian", device="cpu", dtype=torch.float32)
        total, weight = (torch.zeros(self.shape, dtype=torch.float32, device="cpu") for _ in range(2))
        for place in self.places:
            weight[place] += weights
            if place not in self.seen:
                total[place] += NO_LESION * weights
        for place, one in zip(self.seen, logits, strict=True):
            total[place] += weights * one
        inner = [slice(gap // 2, size - gap + gap // 2) for gap, size in zip(self.missing, self.shape, strict=True)]
        return (total / weight)[tuple(inner)][None]


def _seen(
    volume: Tensor, maps: Tensor | None, kept: Tensor | None, views: Sequence[_View], network: GRCSF
) -> list[Tensor]:
    """The images of each view, but of those without a window to be seen; padded as the network wants them."""
    images = volume[None, None] if kept is None else network.stack(volume, kept)
    if maps is not None:
        images = torch.cat([images, _images(maps, kept)], 1)
    found, enlarged = [], images
    for view in views:
        if tuple(enlarged.shape[2:]) != view.shape:
            enlarged = _resize(images, view.shape)
        one = enlarged.flip(2) if view.turned else enlarged
        if view.windows is not None:
            if not view.windows.seen:
                continue
            one = view.windows.cut(one)
        found.append(pad_to_multiple(one, network.multiple, network.minimum))
    return found


def _mean(outputs: list[Tensor], views: Sequence[_View], shape: Sequence[int]) -> Tensor:
    """From logits (N, \\*S) of each view to their mean probability (N, 1, \\*shape); takes them out of the list."""
    total: Tensor | None = None
    for view in views:
        if view.windows is None:
            logits = outputs.pop(0)
        else:
            windows = crop_to(outputs.pop(0), view.windows.roi_size) if view.windows.seen else ()
            logits = view.windows.assembled(windows)
        found = crop_to(logits, view.shape).sigmoid()
        found = _resize((found.flip(1) if view.turned else found)[:, None], shape)
        total = found if total is None else total + found
    return total / len(views)


def _kept(volume: Tensor, foreground: Tensor | None, spatial_dims: int) -> Tensor | None:
    """The numbers of the slices that a 2-D network is to see; None for a 3-D one."""
    if spatial_dims == 3:
        return None
    if foreground is None:
        return torch.arange(volume.shape[2], device=volume.device)
    return foreground.flatten(0, 1).any(0).nonzero()[:, 0]


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


def _resize(images: Tensor, shape: Sequence[int]) -> Tensor:
    """(N, K, \\*S) by linear interpolation; itself where nothing changes."""
    if tuple(images.shape[2:]) == tuple(shape):
        return images
    mode = "bilinear" if images.dim() == 4 else "trilinear"
    return F.interpolate(images, size=tuple(shape), mode=mode, align_corners=False)
