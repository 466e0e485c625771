"""Building blocks of the U-shaped backbone: convolution stages, downsampling, upsampling, padding."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError
from ..functional import internal
from .plain import has_hooks, is_plain

__all__ = [
    "CONVOLUTIONS", "Downsample", "JoinedStage", "LikeWeights", "NormActivation", "conv", "conv_stage", "crop_to",
    "drop_cancelled_biases", "pad_to_multiple", "transposed_conv",
]  # fmt: skip

NEGATIVE_SLOPE = 0.01


class Convolution2d(nn.Conv2d):
    """PyTorch's, but that on a processor a kernel of ours may serve; three taps, zeros around."""

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is None or input.dim() != 4 or _changed(self, 2):
            return super().forward(input)
        return internal.convolution(input, self.weight, self.bias)


class Convolution3d(nn.Conv3d):
    """See :class:`Convolution2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is None or input.dim() != 5 or _changed(self, 3):
            return super().forward(input)
        return internal.convolution(input, self.weight, self.bias)


def _changed(layer: nn.Conv2d | nn.Conv3d, dims: int) -> bool:
    """Whether a setting is no longer the one that the kernel knows: PyTorch reads them at each call."""
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    ones = (1,) * dims
    return settings != ((3,) * dims, ones, ones, ones, 1, "zeros")


CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, Convolution2d, Convolution3d)


def conv(spatial_dims: int, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """A 2-D or 3-D convolution with an odd kernel; with stride s it maps an axis of n*s to n."""
    if kernel == 3 and stride == 1:
        return (Convolution2d if spatial_dims == 2 else Convolution3d)(in_channels, out_channels, kernel, padding=1)
    layer = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
    return layer(in_channels, out_channels, kernel, stride=stride, padding=(kernel - 1) // 2)


def transposed_conv(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """A transposed convolution that doubles every spatial axis."""
    layer = nn.ConvTranspose2d if spatial_dims == 2 else nn.ConvTranspose3d
    return layer(in_channels, out_channels, 2, stride=2)


class NormActivation(nn.Module):
    """Affine instance normalisation and leaky ReLU: (B, C, *S) -> (B, C, *S).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return internal.normalize_activate(x, self.weight, self.bias, slope=NEGATIVE_SLOPE)


class LikeWeights(nn.Module):
    """The tensor in the dtype of the weights around, which follows :meth:`torch.nn.Module.to`."""

    like: Tensor

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.like.dtype)


def conv_stage(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """(conv 3, instance norm, leaky ReLU) twice: (B, in_channels, *S) -> (B, out_channels, *S)."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        # The identity keeps the numbers in the names of weights, where bundles had an activation of its own.
        layers += [conv(spatial_dims, channels, out_channels), NormActivation(out_channels), nn.Identity()]
    return nn.Sequential(*layers)


class JoinedStage(nn.Sequential):
    """A :func:`conv_stage` of two images, one behind the other in the channels: (B, C, \\*S), (B, D, \\*S)."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        layer, *rest = self
        # A kernel takes both as they are; hooks on its layer would see neither.
        joined = getattr(layer, "joined", None)
        if joined is not None and not has_hooks(layer):
            x = joined(first, second)
        else:
            x = layer(torch.cat([first, second], 1))
        for layer in rest:
            x = layer(x)
        return x


def drop_cancelled_biases(network: nn.Module) -> None:
    """Take away the biases of convolutions that go into an instance norm, which subtracts them again.

    For inference on a GPU, where PyTorch adds a bias in a pass of its own. Convolutions with hooks keep theirs.
    """
    for stage in network.modules():
        if isinstance(stage, nn.Sequential):
            for layer, following in itertools.pairwise(stage):
                if is_plain(layer, *CONVOLUTIONS) and type(following) is NormActivation:
                    layer.register_parameter("bias", None)


class Downsample(nn.Module):
    """Halve every spatial axis and keep the channels: (B, C, \\*S) -> two of (B, C, \\*S/2).

    The first goes down to the next stage, the second is the GCU's coarse features.

    Args:
        spatial_dims: 2 or 3.
        channels: C of input and output.
        mode: ``"conv"`` (3-wide convolution of stride 2), ``"avg"`` or ``"max"`` pooling.
        mean: the second is the average whatever the mode; False: it is the first.
    """

    MODES = ("conv", "avg", "max")

    def __init__(self, spatial_dims: int, channels: int, mode: str, mean: bool) -> None:
        super().__init__()
        if mode not in self.MODES:
            raise ArgumentError(f"downsample: expected one of {self.MODES}, got {mode!r}")
        self.mode, self.mean = mode, mean
        if mode == "conv":
            self.reduce = conv(spatial_dims, channels, channels, stride=2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if self.mode == "max" and self.mean:
            return internal.pool_with_mean(features)
        if self.mode == "conv":
            down = self.reduce(features)
        else:
            down = (internal.pool if self.mode == "max" else internal.mean_pool)(features)
        return down, internal.mean_pool(features) if self.mean and self.mode != "avg" else down


def pad_to_multiple(image: Tensor, multiple: int, minimum: int = 0) -> Tensor:
    """Repeat the last row of every spatial axis until it is a multiple of ``multiple`` and at least ``minimum``.

    Edge values, not zeros, which would fake an edge of the head. (B, C, *S) -> (B, C, *S').
    """
    padding: list[int] = []
    for size in reversed(image.shape[2:]):
        target = max(-(-size // multiple) * multiple, minimum)
        padding += [0, target - size]
    return F.pad(image, padding, mode="replicate") if any(padding) else image


def crop_to(tensor: Tensor, spatial_shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The first ``spatial_shape`` elements of the spatial axes: undoes :func:`pad_to_multiple`."""
    return tensor[(..., *[slice(0, size) for size in spatial_shape])]
