"""One thread of torch's for a while, in the whole process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread", "threads_outside"]


class _Blocks:
    """How many are open, and torch's number of threads outside of them: it is the process's, and so is this."""

    def __init__(self) -> None:
        self.lock, self.open, self.outside = threading.Lock(), 0, 1


_blocks = _Blocks()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch set to one thread, until the last of all blocks that overlap ends."""
    with _blocks.lock:
        _blocks.outside = threads_outside()
        _blocks.open += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _blocks.lock:
            _blocks.open -= 1
            if not _blocks.open:
                torch.set_num_threads(_blocks.outside)


def threads_outside() -> int:
    """torch's number of threads, as it is outside of all such blocks."""
    return _blocks.outside if _blocks.open else torch.get_num_threads()
