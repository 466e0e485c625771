"""Convolutions for inference on a processor, with fewer multiplications than they have taps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import cpp
from ..ops.backends import select_backend
from ..reference import accumulation_dtype

__all__ = ["FrozenConvolution", "freeze_convolutions"]

FEWEST_CHANNELS = 8  # below, transforming the input costs more than it saves


class FrozenConvolution(nn.Module):
    """What a convolution with three taps an axis and zeros around computes: (B, C, \\*S) -> (B, O, \\*S).

    The weight is kept in transformed form alone and in full precision, whatever the dtype of the images, so it can
    neither be trained nor saved.

    Args:
        layer: a convolution of two or three axes, its weight on the CPU.

    Raises:
        RuntimeError: of its methods, where they are used for anything else than inference by the C++ kernels.

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", arXiv:1509.09308.
    """

    def __init__(self, layer: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.dims = layer.in_channels, layer.out_channels, layer.weight.dim() - 2
        # Not buffers: Module.to would change their dtype.
        self.filters = cpp.transform_filters(layer.weight.detach())
        self.bias = layer.bias.detach().to(self.filters.dtype)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 + self.dims or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected (B,{self.in_channels}) and {self.dims} axes, got {tuple(x.shape)}")
        if x.device.type != "cpu" or select_backend(x) != "cpp" or accumulation_dtype(x.dtype) != self.filters.dtype:
            raise RuntimeError(
                f"a frozen network runs on the C++ kernels, frozen for {self.filters.dtype}; "
                f"got {x.dtype} on {x.device}, backend {select_backend(x)!r}"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a frozen network has no gradients; use the network it was made from")
        return cpp.convolve(x, self.filters, self.bias)

    def train(self, mode: bool = True) -> FrozenConvolution:
        if mode:
            raise RuntimeError("a frozen network cannot be trained; use the network it was made from")
        return super().train(mode)

    def _save_to_state_dict(self, *_: Any) -> None:
        raise RuntimeError("a frozen network has no weights to save; use the network it was made from")

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, spatial_dims={self.dims}"


def freeze_convolutions(module: nn.Module) -> None:
    """Replace, all the way down, the convolutions that :class:`FrozenConvolution` can stand for."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d | nn.Conv3d) and _can_freeze(child):
            setattr(module, name, FrozenConvolution(child))
        else:
            freeze_convolutions(child)


def _can_freeze(layer: nn.Conv2d | nn.Conv3d) -> bool:
    alike = (set(layer.kernel_size), set(layer.stride), set(layer.padding), set(layer.dilation)) == ({3}, {1}, {1}, {1})
    return alike and layer.groups == 1 and layer.bias is not None and layer.in_channels >= FEWEST_CHANNELS
