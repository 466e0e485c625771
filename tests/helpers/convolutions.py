"""Convolutions for tests of the kernels with transformed weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (B, C, *S): whole tiles and none, rows that end within a block of 48 tiles, many planes, one pixel, nothing.
SHAPES = (
    (2, 8, 8, 12), (1, 9, 7, 9), (3, 16, 6, 34), (1, 8, 1, 1), (2, 8, 3, 200), (1, 40, 24, 24), (5, 8, 12, 12),
    (0, 8, 4, 4), (2, 8, 5, 6, 7), (2, 8, 5, 6, 9), (1, 16, 1, 9, 4), (1, 9, 4, 2, 2),
)  # fmt: skip


def convolution(dims: int, inputs: int, outputs: int = 11, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return (nn.Conv2d if dims == 2 else nn.Conv3d)(inputs, outputs, 3, padding=1).to(dtype)


def exact(layer: nn.Module, x: Tensor) -> Tensor:
    run = F.conv2d if x.dim() == 4 else F.conv3d
    return run(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
