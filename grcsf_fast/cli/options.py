"""Arguments of the command line: numbers with bounds and lists of them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["joined", "modalities", "number", "numbers", "ratios", "windows"]


def joined(arguments: Sequence[str]) -> list[str]:
    """``--hu-window -160,240`` as ``--hu-window=-160,240``: argparse takes a list with a minus in front for options."""
    whole: list[str] = []
    for argument in arguments:
        value = re.match(r"-(\.?\d|inf|nan)", argument, re.IGNORECASE)
        if value and whole and re.fullmatch(r"--[a-z][a-z-]*", whole[-1]):
            whole[-1] += f"={argument}"
        else:
            whole.append(argument)
    return whole


def number(
    kind: type, least: float = -math.inf, most: float = math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], Any]:
    """A parser of one finite number within bounds; whole numbers have 32 bits."""
    if kind is int:
        most = min(most, 2**31 - 1)
    bounds = [
        f"{word} {bound:.12g}"
        for word, bound in (("from", least), ("above", above), ("below", below), ("up to", most))
        if math.isfinite(bound)
    ]
    expected = " ".join([f"a {'whole ' if kind is int else ''}number", *bounds])

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            finite = False
        if not (finite and least <= value <= most and above < value < below):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def numbers(number: Callable[[str], Any], counts: Sequence[int] = ()) -> Callable[[str], tuple]:
    """A parser of numbers separated by commas; of so many as ``counts`` has, or of at least one."""

    def parse(text: str) -> tuple:
        parts = text.split(",") if text else []
        if len(parts) not in counts if counts else not parts:
            many = " or ".join(map(str, counts)) or "one or more"
            raise argparse.ArgumentTypeError(f"expected {many} numbers separated by commas, got {text!r}")
        return tuple(number(part) for part in parts)

    return parse


def ratios(text: str) -> tuple[float, ...]:
    """Shares between 0 and 1, each of which has a file name of its own by its per cents."""
    shares = numbers(number(float, above=0, below=1))(text)
    if len({round(100 * share) for share in shares}) < len(shares):
        raise argparse.ArgumentTypeError(f"expected ratios that differ by at least one percentage point, got {text!r}")
    return shares


def modalities(text: str) -> str | tuple[str, ...]:
    """Intensity recipes: one, or one per channel."""
    names = tuple(part.strip() for part in text.split(","))
    if wrong := [name for name in names if name not in ("mri", "ct")]:
        raise argparse.ArgumentTypeError(f"expected one of mri, ct, found {wrong[0]}")
    return names[0] if len(names) == 1 else names


def windows(text: str) -> tuple[Any, ...]:
    """Bounds of intensities: two numbers, or two per channel."""
    found = tuple(numbers(number(float), (2,))(part) for part in text.split("/"))
    return found[0] if len(found) == 1 else found
