"""Progress on the terminal for anything that takes longer than 2 s; nothing appears before."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["bar", "busy", "counter", "steps"]

DELAY = 2.0  # seconds


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
            while not finished.wait(0.5):
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

    return tqdm(items, file=_Tolerant(sys.stderr), disable=sys.stderr is None or not shown, **named)


class _Tolerant:
    """A text file whose end ends no work: a terminal may be closed, and who reads a pipe may have left."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: closed
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
