"""``dataset.json`` of the Decathlon and of nnU-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data import reports
from .folders import LayoutError

__all__ = ["label_names", "numbered", "read_json"]


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        LayoutError: no such file, or no object in it.
    """
    try:
        text = reports.read_json(path)
    except FileNotFoundError as error:
        beside = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
        there = f"found {beside[0]} and {len(beside) - 1} more entries" if beside else "found an empty folder"
        raise LayoutError(f"{path.parent}: expected {path.name} {expected}; {there}, but not {path.name}") from error
    except (OSError, ValueError) as error:
        raise LayoutError(f"{path}: expected JSON {expected}, could not read it: {error}") from error
    if not isinstance(text, dict):
        raise LayoutError(f"{path}: expected a JSON object {expected}, found {type(text).__name__}")
    return text


def numbered(path: Path, key: str, names: Any) -> tuple[str, ...]:
    """Names in order of their numbers: ``{"0": "FLAIR", "1": "T1w"}``, from 0 without a gap.

    Those of nnU-Net say how to normalise, and may be alike: ``CT``, ``CT`` are then ``CT_0``, ``CT_1``.

    Raises:
        LayoutError: something else.
    """
    try:
        found = {int(number): str(name) for number, name in names.items()}
    except (AttributeError, ValueError):
        found = {}
    if not found or sorted(found) != list(range(len(found))):
        raise LayoutError(f'{path}: expected names numbered from 0 under "{key}", found {names!r}')
    every = [found[number] for number in range(len(found))]
    return tuple(f"{name}_{number}" if every.count(name) > 1 else name for number, name in enumerate(every))


def label_names(path: Path, labels: Any) -> dict[int, str]:
    """What the values of masks mean, by value; without the background, 0.

    They stand there from value to name (Decathlon, nnU-Net 1), or from name to value or to several values, of which
    each then has the names of all regions that it belongs to (nnU-Net 2).

    Raises:
        LayoutError: something else.
    """
    names: dict[int, list[str]] = {}
    try:
        for key, value in labels.items():
            old = isinstance(value, str)
            values = [int(key)] if old else value if isinstance(value, list | tuple) else [value]
            for number in values:
                names.setdefault(int(number), []).append(value if old else key)
    except (AttributeError, TypeError, ValueError) as error:
        raise LayoutError(f'{path}: expected names and values under "labels", found {labels!r}') from error
    return {value: " and ".join(found) for value, found in sorted(names.items()) if value}
