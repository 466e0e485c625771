"""Checks of what users give to the networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError

__all__ = [
    "check_counts", "check_device", "check_dtype", "check_maps", "check_ratios", "check_tensor", "checked_levels",
]  # fmt: skip

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


def check_counts(**counts: int | Sequence[int]) -> None:
    """See that each is an integer of 1 or more, or several of them.

    Raises:
        ArgumentError: the message names the argument.
    """
    for name, given in counts.items():
        numbers = tuple(given) if isinstance(given, Iterable) else (given,)
        if not all(isinstance(number, Integral) and number >= 1 for number in numbers):
            raise ArgumentError(f"{name}: expected integers of 1 or more, got {given!r}")


def checked_levels(features: Any, rcu_levels: Any) -> tuple[list[int], list[int]]:
    """The channels of the stages and the levels with an RCU, which such a network can have; None: 0, 1 and 2.

    Raises:
        ArgumentError: the message names the argument.
    """
    stages = tuple(features) if isinstance(features, Iterable) else ()
    if len(stages) < 2:
        raise ArgumentError(f"features: expected the channels of at least 2 stages, got {features!r}")
    check_counts(features=stages)
    depth = len(stages) - 1
    given = range(min(3, depth)) if rcu_levels is None else rcu_levels
    given = tuple(given) if isinstance(given, Iterable) else None
    if given is None or any(level not in range(depth) for level in given) or len(set(given)) != len(given):
        raise ArgumentError(f"rcu_levels: expected distinct levels from 0 to {depth - 1}, got {rcu_levels!r}")
    return [int(channels) for channels in stages], [int(level) for level in given]


def check_ratios(mask_ratios: Any) -> None:
    """See that they are several shares of hidden patches, or none.

    Raises:
        ArgumentError: a single number, or one that is no share.
    """
    several = isinstance(mask_ratios, Iterable)
    if not several or not all(isinstance(ratio, Real) and 0 < float(ratio) < 1 for ratio in mask_ratios):
        raise ArgumentError(f"mask_ratios: expected numbers in (0, 1), one per map, got {mask_ratios!r}")


def check_maps(given: object, image: Tensor, count: int) -> None:
    """See that residual maps are those of an image.

    Raises:
        ArgumentTypeError: no floating-point tensor.
        ArgumentError: another shape or device.
    """
    check_tensor("residual_maps", given, "(B,M,*S)")
    assert isinstance(given, Tensor)
    expected = (image.shape[0], count, *image.shape[2:])
    if tuple(given.shape) != expected:
        windows = "; for sliding windows pass image and maps as channels of one tensor, and split it in each window"
        raise ArgumentError(
            f"residual_maps: expected shape (B,M,*S) = {expected}, got {tuple(given.shape)}"
            + (windows if given.shape[2:] != image.shape[2:] else "")
        )
    check_device("residual_maps", given, "the image", image)
