"""Progress on the terminal for anything that takes longer than 2 s; nothing appears before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["bar", "busy", "counter", "steps"]

DELAY = 2.0  # seconds


def bar(title: str) -> Callable[[Iterable[Any]], Any]:
    """A wrapper that shows how far a loop over its items is."""
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=title, delay=DELAY, leave=False)


def steps(total: int, done: int, title: str) -> Any:
    """A tqdm bar over ``total`` steps of which some are done; the caller updates and closes it."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=title, delay=DELAY, mininterval=1)


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
    from tqdm import tqdm

    finished = threading.Event()

    def tick() -> None:
        if finished.wait(DELAY):
            return
        with tqdm(desc=title, bar_format="{desc} {elapsed}", leave=False) as clock:
            while not finished.wait(0.5):
                clock.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
