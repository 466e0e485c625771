"""Checks of arguments: which one, what was expected, what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError, class_of

__all__ = ["check_float", "check_like", "check_not_empty", "check_same_dtype", "check_shape", "spatial_dims"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(
            f"{name}: expected a torch.Tensor of floating-point numbers, got {class_of(tensor)}; torch.as_tensor makes "
            "one of an array or a list"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise ArgumentTypeError(
            f"{name}: expected a dense tensor, got a {'nested' if tensor.is_nested else tensor.layout} one"
        )
    if not tensor.is_floating_point():
        raise ArgumentTypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if tensor.dtype not in DTYPES:
        raise ArgumentTypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_like(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    check_float(name, tensor)
    if tensor.device != model.device:
        raise ArgumentError(f"{name}: expected device {model.device} (that of {model_name}), got {tensor.device}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ArgumentError(f"{name}: expected shape {letters} = {shape}, got {tuple(tensor.shape)}")


def check_same_dtype(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    if tensor.dtype != model.dtype:
        raise ArgumentTypeError(f"{name}: expected dtype {model.dtype} (that of {model_name}), got {tensor.dtype}")


def spatial_dims(name: str, tensor: Tensor) -> int:
    check_float(name, tensor)
    if tensor.dim() not in (4, 5):
        raise ArgumentError(f"{name}: expected (B,C,H,W) or (B,C,D,H,W), got {tensor.dim()} axes {tuple(tensor.shape)}")
    return tensor.dim() - 2


def check_not_empty(name: str, tensor: Tensor) -> None:
    """A batch may be empty, an image may not."""
    if not all(tensor.shape[1:]):
        raise ArgumentError(f"{name}: expected a channel and a pixel along each axis, got {tuple(tensor.shape)}")
