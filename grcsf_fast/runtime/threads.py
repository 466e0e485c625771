"""Threads of torch's for a while: one, or some that each do something else."""

from __future__ import annotations

import contextvars
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["one_thread", "side_by_side", "threads_outside"]


class _Blocks:
    """How many are open, by the threads that opened them, and torch's number of threads outside of them all."""

    def __init__(self) -> None:
        self.lock, self.open, self.outside = threading.Lock(), Counter[int](), 1


_blocks = _Blocks()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch set to one thread, until the last of this thread's blocks that overlap ends.

    The number belongs to the thread; one that starts takes over the number that any thread has set last, which is 1
    while any thread has a block open. Other threads keep theirs.
    """
    thread = threading.get_ident()
    with _blocks.lock:
        _blocks.outside = threads_outside()
        _blocks.open[thread] += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _blocks.lock:
            _blocks.open[thread] -= 1
            if not _blocks.open[threading.get_ident()]:
                torch.set_num_threads(_blocks.outside)
                if _blocks.open.total():
                    _set_for_threads_to_come(1)


def _set_for_threads_to_come(number: int) -> None:
    """In a thread of its own, whose own number ends with it."""
    thread = threading.Thread(target=torch.set_num_threads, args=(number,))
    thread.start()
    thread.join()


def threads_outside() -> int:
    """torch's number of threads, as it is outside of all such blocks."""
    return _blocks.outside if _blocks.open.total() else torch.get_num_threads()


def side_by_side(works: list[Callable[[], Any]]) -> None:
    """Do all of them, in as many threads as torch has in this one; one after the other where it has one, as in lanes.

    Raises:
        BaseException: what one of them raised; the others that had begun have ended, and no further one begins.
    """
    # Of one iterator: each work is taken by one thread, and a thread that comes too late takes none.
    left, errors = iter(works), list[BaseException]()

    def do() -> None:
        for work in left:
            try:
                work()
            except BaseException as error:
                errors.append(error)
            if errors:
                return

    number = min(len(works), torch.get_num_threads())
    if number < 2:
        do()
    else:
        run = contextvars.copy_context
        threads = [threading.Thread(target=run().run, args=(do,), name=f"side-{n}", daemon=True) for n in range(number)]
        with one_thread():
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            except BaseException as error:  # a signal
                errors.append(error)
                for thread in threads:
                    thread.join()
                raise
    if errors:
        raise errors[0]
