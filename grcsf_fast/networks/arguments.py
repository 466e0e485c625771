"""Checks of what users give to the networks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError

__all__ = ["check_device", "check_dtype", "check_tensor"]

NARROW = (torch.float32, torch.bfloat16, torch.float16)  # what autocast converts by itself


def check_tensor(name: str, given: object, letters: str) -> None:
    """Refuse NumPy arrays, lists and pictures, and tensors of integers.

    Raises:
        ArgumentTypeError: the message says what is accepted.
    """
    if not isinstance(given, Tensor):
        kind = f"{type(given).__module__}.{type(given).__qualname__}".removeprefix("builtins.")
        raise ArgumentTypeError(
            f"{name}: expected a floating-point torch.Tensor {letters}, got {kind}; "
            "convert with torch.as_tensor(numpy.asarray(...), dtype=torch.float32)"
        )
    if not given.is_floating_point():
        convert = ".abs(), say" if given.is_complex() else ".float()"
        expected = f"a floating-point tensor {letters}"
        raise ArgumentTypeError(f"{name}: expected {expected}, got {given.dtype}; convert with {convert}")


def check_device(name: str, given: Tensor, owner: str, weight: Tensor) -> None:
    """Refuse a tensor that is elsewhere than the weights.

    Raises:
        ArgumentError: the message names both places.
    """
    if given.device != weight.device:
        raise ArgumentError(
            f"{name}: expected device {weight.device} (that of {owner}), got {given.device}; "
            f"move it with .to('{weight.device}')"
        )


def check_dtype(name: str, given: Tensor, owner: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a floating-point tensor of another dtype, but for those that autocast converts where it is on.

    Raises:
        ArgumentTypeError: the message says how to convert.
    """
    if given.dtype in dtypes:
        return
    kind = given.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and given.dtype in NARROW and torch.float64 not in dtypes:
        return
    expected = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
    raise ArgumentTypeError(
        f"{name}: expected {expected} (that of {owner}), got {given.dtype}; convert with .to({dtypes[0]})"
    )
