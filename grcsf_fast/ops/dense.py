"""The one place where a tensor becomes what a kernel can read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dense"]


def dense(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor in C order, copied only if it must be.

    Raises:
        ValueError: a shape, dtype or device for which a kernel would read something else than the tensor.
    """
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name}: expected {dtype} of shape {tuple(shape)} on {device}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor.contiguous()
