"""What can go wrong without a bug of this package, beside OSError and MemoryError; any other exception is one, and
keeps its traceback.
"""

from __future__ import annotations

import signal

__all__ = ["ArgumentError", "ArgumentTypeError", "GrcsfError", "Interrupted", "UnfinishedError", "class_of"]


class GrcsfError(Exception):
    """The base of all errors that say what a user can change."""


class ArgumentError(GrcsfError, ValueError):
    """An argument, an option or a variable of the environment that cannot be used; the message names it."""


class ArgumentTypeError(GrcsfError, TypeError):
    """An argument of a kind that cannot be used, an array for a tensor, say; the message names it."""


def class_of(given: object) -> str:
    """The name of an argument's class, for a message: ``numpy.ndarray``, ``list``."""
    return f"{type(given).__module__}.{type(given).__qualname__}".removeprefix("builtins.")


class UnfinishedError(GrcsfError):
    """Work that stopped on the way; the message says why, what is done and how to go on."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work.

    Args:
        text: what is done and how to go on; empty: whoever catches it knows better.
        number: of the signal.
    """

    def __init__(self, text: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.number = number
