"""Checks of what users give to the networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError, class_of

__all__ = [
    "COUNT", "FLAG", "KINDS_OF_MAE", "KINDS_OF_MAPS", "KINDS_OF_NETWORK", "KINDS_OF_UNIT", "NUMBERS", "OBJECT",
    "OBJECTS", "TEXT", "TEXTS", "Kind", "check_device", "check_dtype", "check_kinds", "check_maps",
    "check_tensor", "checked_config", "checked_edges", "checked_levels", "is_number", "is_whole", "short",
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
    stages = checked_config(KINDS_OF_NETWORK, features=features)["features"]
    depth = len(stages) - 1
    given = range(min(3, depth)) if rcu_levels is None else rcu_levels
    a_set = isinstance(given, set | frozenset)
    levels = checked_config(KINDS_OF_NETWORK, rcu_levels=list(given) if a_set else given)["rcu_levels"]
    if not all(level in range(depth) for level in levels) or len(set(levels)) != len(levels):
        raise ArgumentError(f"rcu_levels: expected distinct levels from 0 to {depth - 1}, got {short(rcu_levels)}")
    return stages, sorted(levels) if a_set else levels


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


def _several(fits: Callable[[Any], bool], least: int = 0) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(fits, value))


def _whole_from(least: int) -> Kind:
    said = f"a whole number from {least} up, of 63 bits"
    return said, lambda value: is_whole(value) and value >= least  # pyright: ignore[reportOperatorIssue]


def _one_of(*choices: object) -> Kind:
    return " or ".join(map(repr, choices)), lambda value: type(value) in map(type, choices) and value in choices


def short(value: object) -> str:
    """How it is shown in a message."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 80 else text[:77] + "..."


# What a value in JSON may be: how it is said, and what fits.
Kind = tuple[str, Callable[[Any], bool]]
FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
COUNT: Kind = _whole_from(1)
FROM_0: Kind = _whole_from(0)
DIMENSIONS: Kind = _one_of(2, 3)
SHARE: Kind = ("a number in [0, 1]", lambda value: is_number(value) and 0 <= value <= 1)
ABOVE_0: Kind = ("a finite number above 0", lambda value: is_number(value) and value > 0)
FRACTIONS = (SHARE, ABOVE_0)  # 0 and 0.0 are one
TEXT: Kind = ("a text", lambda value: isinstance(value, str))
OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))
NUMBERS: Kind = ("a list of finite numbers", _several(is_number))
WHOLES: Kind = ("a list of whole numbers of at most 63 bits", _several(is_whole))
RATIOS: Kind = ("numbers in (0, 1), one per map", _several(lambda value: is_number(value) and 0 < value < 1))
TEXTS: Kind = ("a list of texts", _several(TEXT[1]))
OBJECTS: Kind = ("a list of objects", _several(OBJECT[1]))

MOST_ROUNDS = 64
# Of arguments of GRCSF, MaskedAutoencoder, the units and ResidualMapSettings.
KINDS_OF_NETWORK = {
    "spatial_dims": DIMENSIONS, "in_channels": COUNT, "out_channels": COUNT,
    "features": ("the channels of at least 2 stages, whole numbers from 1 up", _several(COUNT[1], least=2)),
    "patch_size": COUNT, "residual_channels": COUNT, "num_heads": COUNT, "rcu_levels": WHOLES, "mask_ratios": RATIOS,
    "gcu": FLAG, "downsample": TEXT, "importance_threshold": SHARE, "requires_maps": FLAG, "gcu_form": TEXT,
    "neighbours": FROM_0,
}  # fmt: skip
KINDS_OF_MAE = {
    "spatial_dims": DIMENSIONS, "in_channels": COUNT, "patch_size": COUNT, "embed_dim": COUNT, "depth": FROM_0,
    "num_heads": COUNT, "decoder_dim": COUNT, "decoder_depth": FROM_0, "decoder_num_heads": COUNT,
    "mlp_ratio": ABOVE_0, "norm_target": FLAG, "neighbours": FROM_0, "decoder": _one_of("cross", "self"),
    "restore": FLAG, "image_size": WHOLES,
}  # fmt: skip
KINDS_OF_UNIT = {
    "spatial_dims": DIMENSIONS, "channels": COUNT, "context_channels": COUNT, "num_maps": COUNT, "level": FROM_0,
    "residual_channels": COUNT, "num_heads": COUNT, "patch_size": COUNT,
}  # fmt: skip
KINDS_OF_MAPS = {
    "mask_ratios": RATIOS,
    "rounds": (f"a whole number from 1 to {MOST_ROUNDS}", lambda value: is_whole(value) and 1 <= value <= MOST_ROUNDS),
    "seed": FROM_0,
    "signed": FLAG,
}


def checked_config(kinds: Mapping[str, Kind], **given: object) -> dict[str, Any]:
    """Arguments of a constructor as JSON has them: numbers of NumPy become Python's, arrays and iterables lists.

    Sets are refused, as they have no order.

    Args:
        kinds: of the arguments, each of which has one.
        given: the arguments.

    Raises:
        ArgumentError: the message says which argument, what was expected and what came.
    """
    config = {name: _plain(value) for name, value in given.items()}
    for name, (said, fits) in kinds.items():
        if name in config and not fits(config[name]):
            raise ArgumentError(f"{name}: expected {said}, got {short(given[name])}")
        if name in config and (said, fits) in FRACTIONS:
            config[name] = float(config[name])
    return config


def _in_order(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | set | frozenset)


def _plain(value: Any) -> Any:
    """In Python's own types, where nothing is lost; the value itself elsewhere."""
    if isinstance(value, np.ndarray | Tensor):
        value = value.tolist()
    if _in_order(value):
        return [_plain(one) for one in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if is_whole(value):
        return int(value)
    return float(value) if is_number(value) and not isinstance(value, int) else value


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
