"""Threads of torch's for a while: one, or some that each do something else, or the same of many things in order."""

from __future__ import annotations

import contextvars
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .memory import memory_budget

__all__ = ["in_order", "one_thread", "side_by_side", "threads_outside"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Blocks:
    """Those that are open.

    Attributes:
        open: how many, by the threads that opened them.
        numbers: torch's number of threads outside of them, by the same threads.
        outside: the number of the thread that opened the first of all.
    """

    def __init__(self) -> None:
        self.lock, self.open, self.numbers, self.outside = threading.Lock(), Counter[object](), dict[object, int](), 1


_blocks = _Blocks()


class _This(threading.local):
    """The thread: its key is no other's, as its identifier may be when it has ended."""

    def __init__(self) -> None:
        self.key = object()


_this = _This()


def _begin_anew() -> None:
    """In a process that was forked: whoever held the lock is not here, nor any thread but this one."""
    global _blocks
    thread, before, _blocks = _this.key, _blocks, _Blocks()
    if before.open[thread]:
        _blocks.open[thread], _blocks.numbers[thread] = before.open[thread], before.numbers[thread]
        _blocks.outside = before.outside


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch set to one thread, until the last of this thread's blocks that overlap ends.

    The number belongs to the thread; one that starts takes over the number that any thread has set last, which is 1
    while any thread has a block open. Other threads keep theirs. A block that another thread ends leaves both as they
    are.
    """
    thread = _this.key
    with _blocks.lock:
        number = _number()
        if not _blocks.open.total():
            _blocks.outside = number
        if not _blocks.open[thread]:
            _blocks.numbers[thread] = number
        _blocks.open[thread] += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _blocks.lock:
            _close(thread)


def _close(thread: object) -> None:
    """One of the blocks of a thread, mostly this one."""
    if not _blocks.open[thread]:
        return  # of one that this process, which was forked, does not have
    _blocks.open[thread] -= 1
    if _blocks.open[thread]:
        return
    del _blocks.open[thread]
    own = _blocks.numbers.pop(thread)
    to_come = 1 if _blocks.open.total() else _blocks.outside
    if thread == _this.key:
        torch.set_num_threads(own)
    if _number() != to_come or thread != _this.key:
        _set_for_threads_to_come(to_come)


def _number() -> int:
    """torch's number of threads. A thread that has never asked takes over the last one set when it first computes, even
    if it has set one itself: hence asked before any is set for others."""
    return torch.get_num_threads()


def _set_for_threads_to_come(number: int) -> None:
    """In a thread of its own, whose own number ends with it."""
    thread = threading.Thread(target=torch.set_num_threads, args=(number,))
    thread.start()
    thread.join()


def threads_outside() -> int:
    """torch's number of threads, as it is outside of all such blocks."""
    number = _blocks.numbers.get(_this.key) or torch.get_num_threads()
    # 1 may be what this thread took over when it started, while another had a block open.
    return _blocks.outside if number == 1 and _blocks.open.total() else number


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


def in_order(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    threads: int,
    bytes_of: Callable[[Item], int] = lambda item: 0,
) -> Generator[Result, None, None]:
    """``work`` of each item, in several threads; results, warnings and errors come in the order of the items.

    Whoever leaves early, as by a signal, waits for what has begun; nothing further begins. To be closed then. Where one
    thread is enough, it is the caller's.

    Args:
        work: of an item.
        items: in order.
        threads: at most.
        bytes_of: about how much memory an item takes. Together they take no more than :func:`memory_budget` says; one
            that takes more by itself is worked on alone.

    Raises:
        Exception: what the work of an item raised.
    """
    threads = min(threads, len(items))
    if threads < 2:
        yield from map(work, items)
        return
    room, said, before = _Room(), _Said(), warnings.showwarning

    def show(*warning: Any, **named: Any) -> None:
        if said.here is None:
            before(*warning, **named)
        else:
            said.here.append((warning, named))

    def do(item: Item) -> tuple[Callable[[], Result], list[Any]]:
        said.here = kept = []
        try:
            with room.of(bytes_of(item)):
                result = work(item)
            return lambda: result, kept
        except Exception as error:
            return _raising(error), kept

    # What catches warnings is of the whole process: with a block of its own for each thread, one would end another's.
    warnings.showwarning = show
    try:
        with one_thread(), ThreadPoolExecutor(threads, "side") as pool:
            try:
                for result, kept in pool.map(do, items):
                    for warning, named in kept:
                        before(*warning, **named)
                    yield result()
            finally:
                room.close()
                pool.shutdown(wait=False, cancel_futures=True)
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = before


def _raising(error: Exception) -> Callable[[], Any]:
    def result() -> Any:
        raise error

    return result


class _Said(threading.local):
    """Warnings of this thread's item; None: of a thread without one."""

    here: list[Any] | None = None


class _Room:
    """Memory for items that are worked on side by side."""

    def __init__(self) -> None:
        self._changed, self._taken, self._free, self._closed = threading.Condition(), 0, memory_budget(), False

    @contextmanager
    def of(self, amount: int) -> Iterator[None]:
        """Wait until so many bytes are free, or all.

        Raises:
            CancelledError: there is no more to do.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._taken or self._taken + amount <= self._free)
            if self._closed:
                raise CancelledError
            if amount and not self._taken:
                self._free = memory_budget()
            self._taken += amount
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
