"""Checks of what users give to the networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError, class_of

__all__ = [
    "FLAG", "KINDS_OF_MAE", "KINDS_OF_MAPS", "KINDS_OF_NETWORK", "NUMBERS", "OBJECT", "OBJECTS", "TEXT", "TEXTS",
    "Kind", "check_counts", "check_device", "check_dtype", "check_kinds", "check_maps", "check_ratios", "check_tensor",
    "checked_edges", "checked_levels", "is_number", "is_whole", "short",
]  # fmt: skip

NARROW = (torch.float32, torch.bfloat16, torch.float16)  # what autocast converts by itself


def check_tensor(name: str, given: object, letters: str) -> None:
    """Refuse NumPy arrays, lists and pictures, and tensors of integers.

    Raises:
        ArgumentTypeError: the message says what is accepted.
    """
    if not isinstance(given, Tensor):
        raise ArgumentTypeError(
            f"{name}: expected a floating-point torch.Tensor {letters}, got {class_of(given)}; "
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
        if not all(is_whole(number) and number >= 1 for number in numbers):
            raise ArgumentError(f"{name}: expected integers of 1 or more, got {short(given)}")


def checked_edges(name: str, given: Any, axes: int, least: int) -> list[int]:
    """Edge lengths of an image.

    Raises:
        ArgumentError: the message names the argument.
    """
    edges = tuple(given) if isinstance(given, Iterable) else ()
    if len(edges) != axes or not all(is_whole(edge) and edge >= least for edge in edges):
        raise ArgumentError(f"{name}: expected {axes} integers of {least} or more, got {short(given)}")
    return [int(edge) for edge in edges]


def checked_levels(features: Any, rcu_levels: Any) -> tuple[list[int], list[int]]:
    """The channels of the stages and the levels with an RCU, which such a network can have; None: 0, 1 and 2.

    Raises:
        ArgumentError: the message names the argument.
    """
    stages = tuple(features) if isinstance(features, Iterable) else ()
    if len(stages) < 2:
        raise ArgumentError(f"features: expected the channels of at least 2 stages, got {short(features)}")
    check_counts(features=stages)
    depth = len(stages) - 1
    given = range(min(3, depth)) if rcu_levels is None else rcu_levels
    given = tuple(given) if isinstance(given, Iterable) else (-1,)
    if not all(is_whole(level) and level in range(depth) for level in given) or len(set(given)) != len(given):
        raise ArgumentError(f"rcu_levels: expected distinct levels from 0 to {depth - 1}, got {short(rcu_levels)}")
    return [int(channels) for channels in stages], [int(level) for level in given]


def check_ratios(mask_ratios: Any) -> None:
    """See that they are several shares of hidden patches, or none.

    Raises:
        ArgumentError: a single number, or one that is no share.
    """
    several = isinstance(mask_ratios, Iterable)
    if not several or not all(is_number(ratio) and 0 < ratio < 1 for ratio in mask_ratios):
        raise ArgumentError(f"mask_ratios: expected numbers in (0, 1), one per map, got {short(mask_ratios)}")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number of at most 63 bits, of Python or NumPy, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 2**63


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, of Python or NumPy, and no truth value."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond double precision
        return False


def _several(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def short(value: object) -> str:
    """How it is shown in a message."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 80 else text[:77] + "..."


# What a value in JSON may be: how it is said, and what fits.
Kind = tuple[str, Callable[[object], bool]]
FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
NUMBER: Kind = ("a finite number", is_number)
WHOLE: Kind = ("a whole number of at most 63 bits", is_whole)
TEXT: Kind = ("a text", lambda value: isinstance(value, str))
OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))
NUMBERS: Kind = ("a list of finite numbers", _several(is_number))
WHOLES: Kind = ("a list of whole numbers of at most 63 bits", _several(is_whole))
TEXTS: Kind = ("a list of texts", _several(TEXT[1]))
OBJECTS: Kind = ("a list of objects", _several(OBJECT[1]))

# Of arguments of GRCSF, MaskedAutoencoder and ResidualMapSettings; the others are checked there.
KINDS_OF_NETWORK = {
    "spatial_dims": WHOLE, "features": WHOLES, "mask_ratios": NUMBERS, "gcu": FLAG, "downsample": TEXT,
    "importance_threshold": NUMBER, "requires_maps": FLAG, "gcu_form": TEXT, "neighbours": WHOLE,
}  # fmt: skip
KINDS_OF_MAE = {
    "spatial_dims": WHOLE, "in_channels": WHOLE, "patch_size": WHOLE, "embed_dim": WHOLE, "depth": WHOLE,
    "num_heads": WHOLE, "decoder_dim": WHOLE, "decoder_depth": WHOLE, "decoder_num_heads": WHOLE, "mlp_ratio": NUMBER,
    "norm_target": FLAG, "neighbours": WHOLE, "decoder": TEXT, "restore": FLAG, "image_size": WHOLES,
}  # fmt: skip
KINDS_OF_MAPS = {"mask_ratios": NUMBERS}


def check_kinds(values: object, kinds: Mapping[str, Kind], where: str = "") -> None:
    """See that what JSON has under some keys is of their kinds: Python would make something of a text as well.

    Args:
        values: an object of JSON.
        kinds: of keys, which may be missing; others are let through.
        where: the keys that lead to the object, for the message.

    Raises:
        ArgumentError: the message says which key, what was expected and what came.
    """
    if not isinstance(values, dict):
        raise ArgumentError(f"{where}: expected an object, got {short(values)}")
    for key, (said, fits) in kinds.items():
        if key in values and not fits(values[key]):
            raise ArgumentError(f"{where + '.' if where else ''}{key}: expected {said}, got {short(values[key])}")


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
