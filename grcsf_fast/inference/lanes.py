"""Lanes: threads that each work on cases of their own, within bounds of number and memory.

A case is a generator. It yields what it needs: first room in memory, then images to be computed, and is sent what came
of them. What it returns is its result; what it raises ends it alone. Lanes know nothing else of cases.
"""

from __future__ import annotations

import contextvars
import errno
import os
import queue
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from ..errors import ArgumentError, GrcsfError, UnfinishedError
from ..networks.stream import Images, Order
from ..ops.backends import BackendUnavailableError
from ..runtime.memory import in_units, is_out_of_memory
from ..runtime.threads import one_thread

__all__ = ["Batches", "Failure", "Job", "Room", "RoomError", "Work", "run_lanes"]

Result = TypeVar("Result")

# That a lane has under way at once, so that the rest of one batch is filled from the next case.
CASES_A_LANE = 2
TRUE_OF_EVERY_CASE = (ModuleNotFoundError, BackendUnavailableError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # where results go


@dataclass(frozen=True)
class Room:
    """What a case asks for before it takes much memory: so many bytes. They are given back when it ends."""

    amount: int


class RoomError(GrcsfError):
    """A case asked for more room than there is for all; raised in it."""


Work = Generator[Room | Images, Order | None, Result]


class Batches(Protocol):
    """What computes a lane's images: a :class:`Stream` of its own, or a seat at one that lanes share."""

    def submit(self, images: Images) -> Order:
        """Have images computed; a later :meth:`step` returns the order when all of them are."""
        ...

    def step(self, partial: bool) -> list[Order] | None:
        """The orders that ended by what can be computed now; ``partial``: by all that there is. None: nothing was."""
        ...


class Job(NamedTuple, Generic[Result]):
    """A source and a name, for whoever hears of a failure, and the work on it."""

    source: Any
    work: Work[Result]
    name: str = ""


@dataclass(frozen=True)
class Failure:
    """A volume that could not be segmented.

    Attributes:
        source: as given.
        name: of the case, as its prediction would have had it.
        error: what was raised.
        foreseen: whether the error is about the volume or its file; False: nobody expected it.
        traceback: of the error.
    """

    source: Any
    name: str
    error: BaseException
    foreseen: bool
    traceback: str

    @classmethod
    def of(cls, source: Any, name: str, error: Exception) -> Failure:
        # Warnings are errors under -W error; they name the file.
        foreseen = isinstance(error, GrcsfError | OSError | Warning) or is_out_of_memory(error)
        text = "".join(traceback.format_exception(error))
        # The frames of its traceback would keep the volume as long as the failure waits to be told.
        chain: list[BaseException] = [error]
        for one in chain:
            traceback.clear_frames(one.__traceback__)
            chain += [led for led in (one.__cause__, one.__context__) if led is not None and led not in chain]
        return cls(source, name, error, foreseen, text)

    @property
    def message(self) -> str:
        """The error in one line; of one that nobody foresaw the traceback."""
        if is_out_of_memory(self.error):
            return f"{self.source}: not enough memory, try a smaller batch: {self.error}"
        return str(self.error) if self.foreseen else f"{self.source}: unexpected error\n{self.traceback}"


def run_lanes(
    cases: Iterable[Job[Result]],
    stream: Callable[[], Batches],
    *,
    ordered: bool,
    lanes: int,
    memory: int,
    one_thread_each: bool,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[Result | Failure]:
    """Work on cases side by side; lazy, a few cases ahead of what is asked for.

    Args:
        cases: taken one by one when there is room, in a thread of their own.
        stream: makes one, for each lane.
        ordered: yield in the order of ``cases``; False: as completed.
        lanes: threads.
        memory: bytes that the cases at work may take together.
        one_thread_each: torch is set to one thread in the whole process until the iterator ends or is closed.
        context: entered by each lane.

    Yields:
        What the cases return, or a failure.

    Raises:
        ValueError: no lane or no memory.
        BaseException: what ``cases`` raises; what is true of every case, such as a missing module; and what is no
            error, such as KeyboardInterrupt, in a case.
        UnfinishedError: a case failed for what every other would fail for too: nothing can be written any more, or the
            GPU is lost.
    """
    if lanes < 1 or memory < 1:
        raise ArgumentError(f"lanes and memory: expected 1 or more, got {lanes} and {memory}")
    shared: _Shared[Result] = _Shared(cases, lanes, memory)
    feeder = _thread("lanes-feeder", shared.feed)
    workers = [_thread(f"lane-{number}", lambda: _Lane(shared, stream).run(context)) for number in range(lanes)]
    early: dict[int, Result | Failure] = {}
    turn, running = 0, lanes
    # One thread for each lane, whatever their number: the same bits. Threads that start from here on take it over.
    with one_thread() if one_thread_each else nullcontext():
        try:
            for thread in (feeder, *workers):
                thread.start()
            while running:
                event = shared.events.get()
                if isinstance(event, _End):
                    if event.error is not None:
                        raise event.error
                    running -= 1
                    continue
                early[event.number] = event.result
                del event
                while early:
                    key = turn if ordered else next(iter(early))
                    if key not in early:
                        break
                    turn += 1
                    result = early.pop(key)
                    shared.ahead.put(True)
                    yield result
                    del result
        finally:
            shared.stop()
            for worker in workers:
                if worker.ident is not None:  # no more may have been possible
                    worker.join()
            if feeder.ident is not None:
                feeder.join(timeout=1)  # a source that blocks is not waited for


def _thread(name: str, target: Callable[[], None]) -> threading.Thread:
    return threading.Thread(target=contextvars.copy_context().run, args=(target,), name=name, daemon=True)


@dataclass(frozen=True)
class _Outcome(Generic[Result]):
    """What a case came to."""

    number: int
    result: Result | Failure


@dataclass(frozen=True)
class _End:
    """A lane has ended, or an error ends the run."""

    error: BaseException | None


class _Memory:
    """What the cases at work take together stays within a budget."""

    def __init__(self, budget: int) -> None:
        self.budget, self._used = budget, 0
        self._changed = threading.Condition()

    def take(self, amount: int, wait: bool) -> bool:
        """Whether there was room. A lane that stops gives back what its cases have, so that waiting ends."""
        with self._changed:
            while self._used and self._used + amount > self.budget:
                if not wait:
                    return False
                self._changed.wait()
            self._used += amount
            return True

    def give_back(self, amount: int) -> None:
        with self._changed:
            self._used -= amount
            self._changed.notify_all()


class _Shared(Generic[Result]):
    """What the lanes of one run, their feeder and who wants the results have in common.

    The queues are written in C: a signal that interrupts the main thread inside them leaves no lock behind.
    """

    def __init__(self, cases: Iterable[Job[Result]], lanes: int, memory: int) -> None:
        self.cases, self.lanes, self.memory = enumerate(cases), lanes, _Memory(memory)
        self.stopped = threading.Event()
        # None to each lane: there are no more.
        self.fed: queue.SimpleQueue[tuple[int, Job[Result]] | None] = queue.SimpleQueue()
        self.events: queue.SimpleQueue[_Outcome[Result] | _End] = queue.SimpleQueue()
        # Whether to take a further case. A result that waits for its turn counts, so that lanes do not run ahead
        # without bound.
        self.ahead: queue.SimpleQueue[bool] = queue.SimpleQueue()
        for _ in range(lanes * (CASES_A_LANE + 1)):
            self.ahead.put(True)

    def feed(self) -> None:
        """Takes cases one by one, in a thread of its own: a slow source keeps no lane from what it has."""
        try:
            while self.ahead.get() and (case := next(self.cases, None)) is not None:
                self.fed.put(case)
        # An error of the caller's own iterator ends the run.
        except BaseException as error:
            self.fatal(error)
        self._no_more()

    def fatal(self, error: BaseException) -> None:
        self.stopped.set()
        self.events.put(_End(error))

    def stop(self) -> None:
        """Lanes and feeder end as soon as they can."""
        self.stopped.set()
        self.ahead.put(False)
        self._no_more()

    def _no_more(self) -> None:
        for _ in range(self.lanes):
            self.fed.put(None)


@dataclass
class _UnderWay(Generic[Result]):
    """A case that a lane has begun; ``room`` is what it asked for, ``taken`` what it has."""

    number: int
    source: Any
    work: Work[Result]
    name: str
    room: int = 0
    taken: int = 0


class _Lane(Generic[Result]):
    """One thread's cases, and what computes their images."""

    def __init__(self, shared: _Shared[Result], stream: Callable[[], Batches]) -> None:
        self.shared, self.make_stream = shared, stream
        self.computing: dict[Order, _UnderWay[Result]] = {}
        self.asking: _UnderWay[Result] | None = None
        self.more = True

    def run(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        try:
            with context():
                self.stream = self.make_stream()
                self._work()
            self.shared.events.put(_End(None))
        # Whatever it is, the caller must not wait for ever.
        except BaseException as error:
            self.shared.fatal(error)
        finally:
            for case in (*self.computing.values(), *([self.asking] if self.asking else [])):
                case.work.close()
                self.shared.memory.give_back(case.taken)

    def _work(self) -> None:
        while not self.shared.stopped.is_set():
            # A full batch goes first: cases are begun as late as possible, so that lanes end together.
            ended = self.stream.step(partial=False)
            if ended is None:
                if self._begin():
                    continue
                # No further case can fill the rest of a batch.
                ended = self.stream.step(partial=True)
            if ended is not None:
                for order in ended:
                    self._go_on(self.computing.pop(order), order.error or order)
            elif not self.more and self.asking is None:
                return

    def _begin(self) -> bool:
        """Give room to the next case, or end it without; False: there is none now, or no room."""
        if len(self.computing) >= CASES_A_LANE:
            return False
        wait = not self.computing
        if self.asking is None:
            if not self.more:
                return False
            try:
                fed = self.shared.fed.get(block=wait)
            except queue.Empty:
                return False
            if fed is None:
                self.more = False
                return False
            number, job = fed
            self._go_on(_UnderWay(number, *job), None)
            return True
        if not self.shared.memory.take(self.asking.room, wait):
            return False
        case, self.asking = self.asking, None
        case.taken = case.room
        self._go_on(case, None)
        return True

    def _go_on(self, case: _UnderWay[Result], given: Order | Exception | None) -> None:
        """Up to what the case needs next, or to its end."""
        try:
            request = case.work.throw(given) if isinstance(given, Exception) else case.work.send(given)
        except StopIteration as end:
            self._over(case, end.value)
        except BaseException as error:
            if isinstance(error, TRUE_OF_EVERY_CASE) or not isinstance(error, Exception):
                self.shared.memory.give_back(case.taken)
                raise
            if _is_of_all(error):
                self.shared.memory.give_back(case.taken)
                text = f"{case.source}: {error}; every other case would fail alike, so the run ends; what is written is"
                raise UnfinishedError(f"{text} whole, and the same command goes on from there") from error
            self._over(case, Failure.of(case.source, case.name, error))
        else:
            if isinstance(request, Images):
                self.computing[self.stream.submit(request)] = case
            elif request.amount <= self.shared.memory.budget:
                case.room, self.asking = request.amount, case
            else:
                most, asked = map(in_units, (self.shared.memory.budget, request.amount))
                text = f"expected to need at most {most} of memory, asks for {asked}"
                beside = (
                    "; fewer processes of torchrun leave each of them more" if "LOCAL_WORLD_SIZE" in os.environ else ""
                )
                self._go_on(case, RoomError(f"{text}{beside}"))

    def _over(self, case: _UnderWay[Result], result: Result | Failure) -> None:
        self.shared.memory.give_back(case.taken)
        self.shared.events.put(_Outcome(case.number, result))


def _is_of_all(error: BaseException) -> bool:
    """Whether no other case can do better: a full disk, or a GPU that computes nothing any more."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return isinstance(error, getattr(torch, "AcceleratorError", ()))  # not in the oldest torch that serves
