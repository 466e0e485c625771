"""Signals that ask a program to end: Ctrl-C, a scheduler's SIGTERM, a closed terminal's SIGHUP."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import Interrupted

__all__ = ["Stop", "terminable"]

ENDING = ("SIGTERM", "SIGHUP")  # some systems have no SIGHUP


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block by :class:`Interrupted`, as Ctrl-C ends it by KeyboardInterrupt."""

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(number=number)

    with _handled(interrupt, ENDING):
        yield


class Stop:
    """Signals in the block are noted and raised where the work can stop without loss.

    Outside the main thread Python allows no handlers: there signals stay what they are.

    Example:
        >>> with Stop() as stop:
        ...     for step in range(3):
        ...         stop.check()
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._abortable = False

    def __enter__(self) -> Stop:
        self._handling = _handled(self._note, ("SIGINT", *ENDING))
        self._handling.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handling.__exit__(*error)

    def _note(self, number: int, frame: Any) -> None:
        if self.number is None:
            self.number = number
            # Not by print, which a signal may have interrupted in the middle.
            with suppress(OSError):
                os.write(2, b"\nstopping after this step; a second signal stops without it\n")
        elif self._abortable:
            raise Interrupted(number=self.number)

    def check(self) -> None:
        """Raise if a signal has come.

        Raises:
            Interrupted: it has.
        """
        if self.number is not None:
            raise Interrupted(number=self.number)

    @contextmanager
    def abortable(self) -> Iterator[None]:
        """A block that changes nothing of worth: a second signal ends it at once."""
        self._abortable = True
        try:
            yield
        finally:
            self._abortable = False


@contextmanager
def _handled(handler: Callable[[int, Any], None], names: tuple[str, ...]) -> Iterator[None]:
    """``handler`` for signals that nobody chose to ignore, as nohup and shells do for work in the background."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
