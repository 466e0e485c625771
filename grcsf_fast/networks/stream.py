"""Volumes through the networks in batches that slices (2-D) or windows (3-D) of several volumes share.

A batch always has the same number of images; the last one is filled up with repetitions. So an image's result depends
neither on the images beside it nor on how many volumes there were: each is computed by the same instructions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .residual_maps import check_patches, residual_maps
from .unet import pad_to_multiple

if TYPE_CHECKING:
    from ..pretrained.bundle import ResidualMapSettings
    from .grcsf import GRCSF
    from .mae import MaskedAutoencoder

__all__ = ["Listener", "Result", "VolumeStream", "segment"]

OVERLAP = 0.25  # of the windows of a 3-D network
WINDOWS_A_SLICE = 8  # a batch has that many times fewer windows than it would have slices
NO_LESION = -30.0  # logit of windows that no network saw


class Listener(Protocol):
    """What a stream tells about a volume."""

    def done(self, residual: Tensor | None, probability: Tensor) -> None:
        """Residual maps (M, X, Y, Z) or None and the probability (X, Y, Z), both float32, on the CPU."""

    def failed(self, error: Exception) -> None:
        """The volume, or :meth:`done`, raised; nothing more comes of it."""

    def spent(self, stage: str, seconds: float) -> None:
        """The volume's part of the time that a stage took."""


@dataclass
class _Strip:
    """Images of one volume on their way through a network.

    Attributes:
        inputs: (N, K, \\*S).
        outputs: (N, ...), None before the first batch.
        sent: images that were put into a batch.
        done: called with the outputs when the last one is there.
        case: the volume.
    """

    inputs: Tensor
    done: Callable[[Tensor], None]
    case: _Case
    outputs: Tensor | None = None
    sent: int = 0


class _Gather:
    """Collects strips of equal shape and runs them in batches of one size."""

    def __init__(self, stage: str, size: int, run: Callable[[Tensor], Tensor]) -> None:
        self.stage, self.size, self.run = stage, size, run
        self.waiting: dict[tuple[int, ...], deque[_Strip]] = {}

    def add(self, strip: _Strip) -> None:
        self.waiting.setdefault(tuple(strip.inputs.shape[1:]), deque()).append(strip)

    def count(self, key: tuple[int, ...]) -> int:
        return sum(len(strip.inputs) - strip.sent for strip in self.waiting[key])

    def fullest(self) -> tuple[int, tuple[int, ...]]:
        """Images that wait for a batch, and their shape; 0 if none does."""
        return max(((self.count(key), key) for key in self.waiting), default=(0, ()))

    def batch(self, key: tuple[int, ...]) -> None:
        """Run up to ``size`` of the images that wait under ``key``."""
        began = time.perf_counter()
        taken: list[tuple[_Strip, slice]] = []
        room, strips = self.size, self.waiting[key]
        while room and strips:
            strip = strips[0]
            part = slice(strip.sent, min(strip.sent + room, len(strip.inputs)))
            taken.append((strip, part))
            strip.sent = part.stop
            room -= part.stop - part.start
            if strip.sent == len(strip.inputs):
                strips.popleft()
        if not strips:
            del self.waiting[key]
        images = [strip.inputs[part] for strip, part in taken]
        if room:
            images.append(images[-1][-1:].expand(room, *key))
        try:
            outputs = self.run(torch.cat(images) if len(images) > 1 else images[0])
        # Out of memory, say: the volumes of this batch are lost, the others are not.
        except Exception as error:
            for strip, _ in taken:
                strip.case.fail(error)
            return
        first = 0
        seconds = (time.perf_counter() - began) / (self.size - room)
        for strip, part in taken:
            count = part.stop - part.start
            if strip.outputs is None:
                strip.outputs = outputs.new_empty((len(strip.inputs), *outputs.shape[1:]))
            strip.outputs[part] = outputs[first : first + count]
            first += count
            strip.case.listener.spent(self.stage, seconds * count)
        # What follows may add new strips.
        for strip, part in taken:
            if part.stop == len(strip.inputs):
                strip.case.attempt(strip.done, strip.outputs)

    def drop(self, case: _Case) -> None:
        """Forget the strips of a volume."""
        for key in list(self.waiting):
            self.waiting[key] = deque(strip for strip in self.waiting[key] if strip.case is not case)
            if not self.waiting[key]:
                del self.waiting[key]


class VolumeStream:
    """The networks of a bundle, fed with volumes; call :meth:`step` until all of them are done.

    Args:
        network: in evaluation mode, one input and one output channel; in half precision by :meth:`GRCSF.lowered`.
        mae: the masked autoencoder, for images as the network's and in the same dtype; None: residual maps come with
            each volume or are not needed.
        residual: settings of the residual maps.
        batch_size: slices at once; windows of 3-D networks: an eighth of it.
        roi_size: of a 3-D network, edge lengths; None: the whole volume at once.
        tta_flip: average over each volume and its mirror image along the first axis, left to right.
        tta_scales: average over each volume enlarged by these factors; in the slice, for a 2-D network.
        forward: called in place of ``network``; a compiled form of it.

    Raises:
        ValueError: a network or an autoencoder for other images than a volume's.
    """

    def __init__(
        self,
        network: GRCSF,
        mae: MaskedAutoencoder | None = None,
        residual: ResidualMapSettings | None = None,
        batch_size: int = 16,
        roi_size: tuple[int, ...] | None = None,
        tta_flip: bool = False,
        tta_scales: Sequence[float] = (1.0,),
        forward: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> None:
        if (network.in_channels, network.out_channels) != (1, 1):
            raise ValueError(
                "network: expected in_channels 1 and out_channels 1, volumes having one channel and lesions one mask; "
                f"got in_channels {network.in_channels} and out_channels {network.out_channels}"
            )
        if mae is not None and (mae.in_channels, mae.spatial_dims) != (1, network.spatial_dims):
            raise ValueError(
                f"mae: expected in_channels 1 and spatial_dims {network.spatial_dims} (that of the network), "
                f"got in_channels {mae.in_channels} and spatial_dims {mae.spatial_dims}"
            )
        self.network, self.mae, self.residual = network, mae, residual
        self.forward = network if forward is None else forward
        self.device = next(network.parameters()).device
        self.roi_size, self.tta_flip, self.tta_scales = roi_size, tta_flip, tuple(tta_scales)
        planar = network.spatial_dims == 2
        windows = 1 if roi_size is None else max(1, batch_size // WINDOWS_A_SLICE)
        self.reconstructing = _Gather("residual_maps", batch_size if planar else 1, self._reconstruct)
        self.segmenting = _Gather("segmentation", batch_size if planar else windows, self._segment)

    def add(self, volume: Tensor, foreground: Tensor | None, residual: Tensor | None, listener: Listener) -> None:
        """Queue one volume.

        Args:
            volume: (X, Y, Z) float32, preprocessed.
            foreground: (X, Y, Z) bool; slices without it are not computed: probability and maps are 0 there. Nor are
                windows,
                whose probability is then that of a logit of -30. None: all are computed.
            residual: (M, X, Y, Z); None: the autoencoder's, or none.
            listener: hears of the result or of the error, in this call or in a later :meth:`step`.
        """
        case = _Case(self, volume, foreground, listener)
        if residual is None and self.mae is not None:
            case.attempt(case.reconstruct)
        else:
            case.attempt(case.segment, residual)

    def batches_left(self) -> int:
        """Of the images that wait now; what follows from them comes on top."""
        return sum(
            -(-gather.count(key) // gather.size)
            for gather in (self.segmenting, self.reconstructing)
            for key in gather.waiting
        )

    def step(self, partial: bool) -> bool:
        """Run one batch; a batch that is not full only if ``partial``. Returns whether there was one to run."""
        for gather in (self.segmenting, self.reconstructing):
            count, key = gather.fullest()
            if count >= gather.size:
                gather.batch(key)
                return True
        if partial:
            gather = max((self.segmenting, self.reconstructing), key=lambda one: one.fullest()[0] / one.size)
            count, key = gather.fullest()
            if count:
                gather.batch(key)
                return True
        return False

    @torch.no_grad()
    def _reconstruct(self, images: Tensor) -> Tensor:
        settings = self.residual
        maps = residual_maps(
            images.to(self.device), self.mae, settings.mask_ratios, settings.rounds, settings.seed, len(images)
        )
        return maps.cpu()

    @torch.no_grad()
    def _segment(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.device)
        maps = inputs[:, 1:].to(self.network.dtype).contiguous() if inputs.shape[1] > 1 else None
        logits = self.forward(inputs[:, :1].contiguous(), maps)
        return logits[:, 0].float().cpu()


class _Case:
    """One volume of a stream, between its stages."""

    def __init__(self, stream: VolumeStream, volume: Tensor, foreground: Tensor | None, listener: Listener) -> None:
        self.stream, self.volume, self.listener = stream, volume, listener
        self.over = False
        self.network = stream.network
        self.planar = self.network.spatial_dims == 2
        self.foreground = torch.ones_like(volume, dtype=torch.bool) if foreground is None else foreground
        self.kept = self.foreground.flatten(0, 1).any(0).nonzero()[:, 0]
        self.residual: Tensor | None = None
        self.views: list[Tensor | None] = []

    def attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        """Run a step of this volume, whose errors are its own."""
        if self.over:
            return
        try:
            step(*arguments)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        if not self.over:
            self.over = True
            self.stream.reconstructing.drop(self)
            self.stream.segmenting.drop(self)
            self.listener.failed(error)

    def _images(self, volumes: Tensor) -> Tensor:
        """(K,X,Y,Z) to (N,K,\\*S): the slices with foreground, or the volume as one image."""
        return volumes.permute(3, 0, 1, 2)[self.kept] if self.planar else volumes[None]

    def _volumes(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`_images`, 0 in slices without foreground."""
        if not self.planar:
            return images[0]
        whole = images.new_zeros((self.volume.shape[2], *images.shape[1:]))
        whole[self.kept] = images
        return whole.permute(1, 2, 3, 0).contiguous()

    def reconstruct(self) -> None:
        mae = self.stream.mae
        images = self._images(self.volume[None])
        if not len(images):
            self.segment(self.volume.new_zeros((len(self.stream.residual.mask_ratios), *self.volume.shape)))
            return
        sizes = images.shape[2:]
        padded = pad_to_multiple(images, mae.patch_size)
        check_patches(mae, padded.shape[2:], self.stream.residual.mask_ratios)

        def finish(maps: Tensor) -> None:
            self.segment(self._volumes(maps[(..., *(slice(0, size) for size in sizes))]))

        self.stream.reconstructing.add(_Strip(padded, finish, self))

    def segment(self, residual: Tensor | None) -> None:
        began = time.perf_counter()
        self.residual = residual
        inputs = self.volume[None] if residual is None else torch.cat([self.volume[None], residual])
        images = self._images(inputs)  # (N,K,*S)
        turns = (False, True) if self.stream.tta_flip else (False,)
        self.views = [None] * (len(self.stream.tta_scales) * len(turns))
        if not len(images):
            self.listener.done(residual, torch.zeros_like(self.volume))
            return
        for place, zoom in enumerate(self.stream.tta_scales):
            enlarged = _resize(images, [max(1, round(size * zoom)) for size in images.shape[2:]])
            for turned in turns:
                self._add_view(place * len(turns) + turned, enlarged.flip(2) if turned else enlarged, turned)
        self.listener.spent("segmentation", time.perf_counter() - began)

    def _add_view(self, number: int, images: Tensor, turned: bool) -> None:
        sizes = images.shape[2:]

        def finish(logits: Tensor) -> None:
            began = time.perf_counter()
            found = logits[(slice(None), *(slice(0, size) for size in sizes))].sigmoid()
            found = found.flip(1) if turned else found
            spatial = self.volume.shape[: self.network.spatial_dims]
            self.views[number] = _resize(found[:, None], spatial)
            self.listener.spent("segmentation", time.perf_counter() - began)
            if all(view is not None for view in self.views):
                # In the order of the views, whichever came first.
                mean = sum(self.views[1:], self.views[0]) / len(self.views)
                self.listener.done(self.residual, self._volumes(mean)[0])

        if self.planar or self.stream.roi_size is None:
            padded = pad_to_multiple(images, self.network.multiple, self.network.minimum)
            self.stream.segmenting.add(_Strip(padded, finish, self))
        else:
            self._add_windows(images, finish, turned)

    def _add_windows(self, images: Tensor, finish: Callable[[Tensor], None], turned: bool) -> None:
        """A sliding window with MONAI's places and Gaussian weights over (1,K,X,Y,Z)."""
        from monai.data.utils import compute_importance_map, dense_patch_slices

        roi_size = self.stream.roi_size
        missing = [max(0, edge - size) for edge, size in zip(roi_size, images.shape[2:], strict=True)]
        padding = [side for gap in reversed(missing) for side in (gap // 2, gap - gap // 2)]
        padded = F.pad(images, padding, mode="replicate")
        foreground = (
            _resize((self.foreground.flip(0) if turned else self.foreground)[None, None].float(), images.shape[2:]) > 0
        )
        foreground = F.pad(foreground.float(), padding) > 0
        shape = padded.shape[2:]
        places = dense_patch_slices(shape, roi_size, [max(1, int(edge * (1 - OVERLAP))) for edge in roi_size])
        weights = compute_importance_map(roi_size, mode="gaussian", device="cpu", dtype=torch.float32)
        seen = [place for place in places if foreground[(0, 0, *place)].any()]
        total, weight = (images.new_zeros(shape) for _ in range(2))
        for place in places:
            weight[place] += weights
            if place not in seen:
                total[place] += NO_LESION * weights

        def assemble(logits: Tensor) -> None:
            for place, one in zip(seen, logits, strict=True):
                total[place] += weights * one
            inner = [slice(gap // 2, gap // 2 + size) for gap, size in zip(missing, images.shape[2:], strict=True)]
            finish((total / weight)[tuple(inner)][None])

        if seen:
            windows = torch.stack([padded[(0, slice(None), *place)] for place in seen])
            windows = pad_to_multiple(windows, self.network.multiple, self.network.minimum)
            crop = (slice(None), *(slice(0, edge) for edge in roi_size))
            self.stream.segmenting.add(_Strip(windows, lambda logits: assemble(logits[crop]), self))
        else:
            assemble(images.new_zeros((0, *roi_size)))


def _resize(images: Tensor, shape: Sequence[int]) -> Tensor:
    """(N, K, \\*S) by linear interpolation; itself where nothing changes."""
    if tuple(images.shape[2:]) == tuple(shape):
        return images
    mode = "bilinear" if images.dim() == 4 else "trilinear"
    return F.interpolate(images, size=tuple(shape), mode=mode, align_corners=False)


def segment(
    network: GRCSF,
    volume: Tensor,
    residual: Tensor | None,
    batch_size: int = 16,
    roi_size: tuple[int, ...] | None = None,
    tta_flip: bool = False,
    tta_scales: Sequence[float] = (1.0,),
) -> Tensor:
    """Lesion probability of one preprocessed volume.

    Args:
        network: in evaluation mode, one input and one output channel.
        volume: (X, Y, Z) float32.
        residual: (M, X, Y, Z), or None for a network without RCU.
        batch_size: slices at once, for a 2-D network.
        roi_size: sliding window of a 3-D network; None: the whole volume at once.
        tta_flip: average over the volume and its mirror image along the first axis, left to right.
        tta_scales: average over the volume enlarged by these factors; in the slice, for a 2-D network.

    Returns:
        (X, Y, Z) float32 in [0, 1], on the CPU.
    """
    stream = VolumeStream(network, None, None, batch_size, roi_size, tta_flip, tta_scales)
    result = Result()
    stream.add(volume.cpu(), None, None if residual is None else residual.cpu(), result)
    while stream.step(partial=True):
        pass
    return result.get()[1]


class Result:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.found: tuple[Tensor | None, Tensor] | Exception | None = None

    def done(self, residual: Tensor | None, probability: Tensor) -> None:
        self.found = residual, probability

    def failed(self, error: Exception) -> None:
        self.found = error

    def spent(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def get(self) -> tuple[Tensor | None, Tensor]:
        """Residual maps and probability; raises what the volume raised."""
        if isinstance(self.found, Exception):
            raise self.found
        return self.found
