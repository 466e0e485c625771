"""Convolutions for inference on a processor: with fewer multiplications than they have taps, and transposed ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import internal
from ..runtime.dtypes import accumulation_dtype
from .plain import is_plain
from .unet import CONVOLUTIONS

__all__ = ["FastConvolution", "FastUpsampling", "replace_convolutions"]

Convolution = nn.Conv2d | nn.Conv3d
Upsampling = nn.ConvTranspose2d | nn.ConvTranspose3d


class _Fast(nn.Module):
    """What a layer computes, by a C++ kernel: (B, C, \\*S) -> (B, O, \\*S').

    The weight is kept in the kernel's form alone and in full precision, whatever the dtype of the images, so it can
    neither be trained nor saved.

    Args:
        layer: its weight on the CPU.

    Raises:
        RuntimeError: of its methods, where they are used for anything else than inference by the C++ kernels.
        ValueError: images that do not fit.
    """

    def __init__(self, layer: Convolution | Upsampling, filters: Tensor) -> None:
        super().__init__()
        assert layer.bias is not None  # was looked at
        self.in_channels, self.out_channels, self.dims = layer.in_channels, layer.out_channels, layer.weight.dim() - 2
        # Not buffers: Module.to would change their dtype.
        self.filters = filters
        self.bias = layer.bias.detach().to(filters.dtype)
        self.eval()

    def run(self, x: Tensor) -> Tensor:
        """The kernel."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 + self.dims or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected (B,{self.in_channels}) and {self.dims} axes, got {tuple(x.shape)}")
        return self.run(x)

    def train(self, mode: bool = True) -> _Fast:
        if mode:
            raise RuntimeError("a network optimized for inference cannot be trained; use the network it was made from")
        return super().train(mode)

    def _save_to_state_dict(self, *_: Any) -> None:
        raise RuntimeError("a network optimized for inference has no weights to save; use the network it was made from")

    def _load_from_state_dict(self, *_: Any) -> None:
        raise RuntimeError(
            "a network optimized for inference takes no weights; load them into the network it is made from"
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, spatial_dims={self.dims}"


class FastConvolution(_Fast):
    """A convolution with three taps an axis and zeros around, by a quarter of its multiplications.

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", arXiv:1509.09308.
    """

    def __init__(self, layer: Convolution) -> None:
        super().__init__(layer, internal.transform_filters(layer.weight.detach()))

    def run(self, x: Tensor) -> Tensor:
        return internal.convolve(x, self.filters, self.bias)

    def joined(self, first: Tensor, second: Tensor) -> Tensor:
        """Of both, one behind the other in the channels, without a copy of them."""
        alike = first.shape[0] == second.shape[0] and first.shape[2:] == second.shape[2:]
        if first.dtype != second.dtype or not alike or first.shape[1] + second.shape[1] != self.in_channels:
            return self(torch.cat([first, second], 1))
        return internal.convolve(first, self.filters, self.bias, second)


class FastUpsampling(_Fast):
    """A transposed convolution that doubles every axis, with two taps an axis."""

    def __init__(self, layer: Upsampling) -> None:
        weight = layer.weight.detach()  # (C,O,*taps)
        weight = weight.to(accumulation_dtype(weight.dtype)).flatten(2).permute(2, 1, 0)
        super().__init__(layer, weight.contiguous())

    def run(self, x: Tensor) -> Tensor:
        return internal.upsample(x, self.filters, self.bias)


def replace_convolutions(module: nn.Module) -> None:
    """Replace, all the way down, the layers for which there is a kernel; not those with hooks or adapters."""
    for name, child in module.named_children():
        if is_plain(child, *CONVOLUTIONS) and _is(
            child, kernel=3, stride=1, padding=1, channels=internal.FEWEST_CHANNELS
        ):
            setattr(module, name, FastConvolution(child))
        elif is_plain(child, nn.ConvTranspose2d, nn.ConvTranspose3d) and _is(
            child, kernel=2, stride=2, padding=0, channels=1
        ):
            setattr(module, name, FastUpsampling(child))
        else:
            replace_convolutions(child)


def _is(layer: Convolution | Upsampling, kernel: int, stride: int, padding: int, channels: int) -> bool:
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding)
    alike = all(set(one) == {wanted} for one, wanted in zip(settings, (kernel, stride, padding, 1, 0), strict=True))
    alike = alike and layer.padding_mode == "zeros"
    return alike and layer.groups == 1 and layer.bias is not None and layer.in_channels >= channels
