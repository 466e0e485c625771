"""Warnings of cases: what is said of several cases, figures apart, comes once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

__all__ = ["case_warnings_counted", "case_warnings_once"]

# Files that warn of a case, by its name in front of a colon.
OF_CASES = tuple(str(Path(__file__).parents[1] / room) for room in ("data", "datasets"))


@contextmanager
def case_warnings_once() -> Iterator[None]:
    """Inside, warnings of cases come once of a kind, whoever reads the cases and however often."""
    before = warnings.showwarning
    warnings.showwarning = _OncePerKind(before)
    try:
        yield
    finally:
        warnings.showwarning = before


@contextmanager
def case_warnings_counted() -> Iterator[None]:
    """Within :func:`case_warnings_once`, gather those of cases and say them at the end, with numbers of cases."""
    shown = warnings.showwarning
    with shown.counted() if isinstance(shown, _OncePerKind) else nullcontext():
        yield


class _OncePerKind:
    """Shows warnings, those of cases once of a kind.

    Args:
        show: shows a warning, as :func:`warnings.showwarning`.
    """

    def __init__(self, show: Callable[..., None]) -> None:
        self._show = show
        self._kinds: set[str] = set()
        self._gathered: list[tuple[str, tuple[Any, ...]]] | None = None

    def __call__(self, message: Warning | str, category: type[Warning], filename: str, *others: Any) -> None:
        _, colon, said = str(message).partition(": ")
        if not filename.startswith(OF_CASES) or not colon:
            self._show(message, category, filename, *others)
            return
        kind = re.sub(r"-?\d[\d.,e+-]*", "#", said)
        if self._gathered is not None:
            self._gathered.append((kind, (str(message), category, filename, *others)))
        elif kind not in self._kinds:
            self._kinds.add(kind)
            self._show(f"{message} (others like it are not named)", category, filename, *others)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Gather what is said inside, and say it at the end with numbers of cases."""
        self._gathered = []
        try:
            yield
        finally:
            gathered, self._gathered = self._gathered, None
            kinds: dict[str, dict[str, tuple[Any, ...]]] = {}
            for kind, shown in gathered:
                kinds.setdefault(kind, {}).setdefault(shown[0], shown)
            self._kinds |= kinds.keys()
            for own in kinds.values():
                text, *others = next(iter(own.values()))
                self._show(f"{text} (and {len(own) - 1} more like it)" if len(own) > 1 else text, *others)
