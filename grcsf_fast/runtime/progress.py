"""Progress on the terminal for anything that takes longer than 2 s; nothing appears before.

In a file, such as a job's log, a line a minute for what takes longer than one.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

__all__ = ["bar", "busy", "counter", "steps"]

DELAY = 2.0  # seconds
TICK = 0.5  # seconds, of a clock
LINE_SECONDS = 60.0  # between two lines where there is no terminal


def bar(title: str, shown: bool = True) -> Callable[[Iterable[Any]], Any]:
    """A wrapper that shows how far a loop over its items is."""
    return lambda items: _tqdm(items, shown, desc=title, delay=DELAY, leave=False)


def steps(total: int, done: int, title: str, shown: bool = True) -> Any:
    """A tqdm bar over ``total`` steps of which some are done; the caller updates and closes it."""
    return _tqdm(None, shown, total=total, initial=done, desc=title, delay=DELAY, mininterval=1)


@contextmanager
def counter(title: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that moves a bar; does nothing where not ``shown``."""
    if not shown:
        yield lambda done, total: None
        return
    with steps(0, 0, title) as moving:
        moving.leave, moving.mininterval = False, 0.2

        def update(done: int, total: int) -> None:
            moving.total = total
            moving.update(done - moving.n)

        yield update


@contextmanager
def busy(title: str, shown: bool = True) -> Iterator[None]:
    """The seconds gone by, for a step that cannot say how far it is."""
    if not shown:
        yield
        return
    finished = threading.Event()

    def tick() -> None:
        if finished.wait(DELAY):
            return
        with _tqdm(None, desc=title, bar_format="{desc} {elapsed}", leave=False) as clock:
            while not finished.wait(TICK):
                clock.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _tqdm(items: Iterable[Any] | None, shown: bool = True, **named: Any) -> Any:
    from tqdm import tqdm

    file = _Tolerant(sys.stderr)
    if not file.is_terminal():
        # Bars inside of others would move the cursor.
        file, named = _Lines(sys.stderr), named | {"position": 0}
    return tqdm(items, file=file, disable=sys.stderr is None or not shown, **named)


class _Tolerant:
    """A text file whose end ends no work: a terminal may be closed, and who reads a pipe may have left."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: closed
            self._file.write(text)

    def is_terminal(self) -> bool:
        if type(self._file).__module__.startswith("ipykernel."):  # notebooks draw over a line too
            return True
        with suppress(OSError, ValueError, AttributeError):
            return bool(self._file.isatty())
        return False

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Lines(_Tolerant):
    """A text file where nothing can be drawn over: of what a bar shows a line a minute, and what it showed last."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._next, self._left_out = monotonic() + LINE_SECONDS, ""

    def write(self, text: str) -> None:
        shown = text.strip()
        if shown:
            self._left_out = shown
        # A bar that stays ends its line when it is closed.
        due = monotonic() >= self._next if shown else text == "\n"
        if due and self._left_out:
            super().write(f"{self._left_out}\n")
            self._left_out, self._next = "", monotonic() + LINE_SECONDS
