"""One thread of torch's for a while, in the whole process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread", "threads_outside"]

_lock = threading.Lock()
_before: list[int] = []


@contextmanager
def one_thread() -> Iterator[None]:
    """torch set to one thread, until the last of all blocks that overlap ends."""
    with _lock:
        _before.append(threads_outside())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            before = _before.pop()
            if not _before:
                torch.set_num_threads(before)


def threads_outside() -> int:
    """torch's number of threads, as it is outside of all such blocks."""
    return _before[0] if _before else torch.get_num_threads()
