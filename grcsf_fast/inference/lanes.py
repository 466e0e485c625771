"""Lanes: threads that each read, compute and finish volumes of their own, within bounds of number and memory."""

from __future__ import annotations

import contextvars
import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.volumes import VolumeError, bytes_needed
from ..errors import ArgumentError, GrcsfError
from ..networks.stream import Result
from ..ops.backends import BackendUnavailableError
from ..runtime.memory import available_memory
from ..runtime.threads import one_thread, threads_outside

if TYPE_CHECKING:
    from .predictor import Predictor

__all__ = ["Failure", "run_lanes"]

# Volumes that a lane has under way at once, so that the rest of one batch is filled from the next volume.
VOLUMES_A_LANE = 2
SHARE_OF_MEMORY = 0.7  # of what is free, if nobody says more


@dataclass(frozen=True)
class Failure:
    """A volume that could not be segmented.

    Attributes:
        source: as given.
        error: what was raised.
        foreseen: whether the error is about the volume or its file; False: nobody expected it.
        traceback: of the error.
    """

    source: Any
    error: BaseException
    foreseen: bool
    traceback: str

    @property
    def message(self) -> str:
        """The error in one line; of one that nobody foresaw the traceback."""
        return str(self.error) if self.foreseen else f"{self.source}: unexpected error\n{self.traceback}"


class _Memory:
    """What the volumes at work take together stays within a budget."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self.changed = threading.Condition()

    def take(self, amount: int, wait: bool, stop: threading.Event) -> bool:
        with self.changed:
            while self.used and self.used + amount > self.budget:
                if not wait or stop.is_set():
                    return False
                self.changed.wait(0.2)
            self.used += amount
            return True

    def give_back(self, amount: int) -> None:
        with self.changed:
            self.used -= amount
            self.changed.notify_all()


@dataclass
class _Task:
    number: int
    source: Any
    amount: int


class _Run:
    """What the lanes of one call share."""

    def __init__(
        self,
        predictor: Predictor,
        sources: Iterable[Any],
        lanes: int,
        memory: _Memory,
        finish: Callable[[Any], Any],
        skip: Callable[[Any], Any] | None,
    ) -> None:
        self.predictor, self.memory, self.finish, self.skip = predictor, memory, finish, skip
        self.sources = enumerate(sources)
        # A result that waits for its turn counts, so that lanes do not run ahead without bound.
        self.room = threading.Semaphore(lanes * (VOLUMES_A_LANE + 1))
        self.fed: queue.Queue[tuple[int, Any]] = queue.Queue(1)
        self.results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.exhausted = threading.Event()
        self.stop = threading.Event()

    def feed(self) -> None:
        """Takes sources one by one, in a thread of its own: a slow source keeps no lane from what it has."""
        while not self.stop.is_set():
            if not self.room.acquire(timeout=0.2):
                continue
            try:
                item = next(self.sources, None)
            # An error of the caller's own iterator ends the run.
            except BaseException as error:
                self.fatal(error)
                return
            if item is None:
                self.exhausted.set()
                return
            while not self.stop.is_set():
                with suppress(queue.Full):
                    self.fed.put(item, timeout=0.2)
                    break

    def next_task(self, wait: bool) -> _Task | None:
        """The next source that is neither skipped nor too large, if one is there."""
        while not self.stop.is_set():
            last = self.exhausted.is_set()
            try:
                number, source = self.fed.get(timeout=0.2) if wait and not last else self.fed.get_nowait()
            except queue.Empty:
                if wait and not last:
                    continue
                return None
            try:
                result = self.skip(source) if self.skip is not None else None
                if result is None:
                    return _Task(number, source, self._amount(source))
            except Exception as error:
                result = _failure(source, error)
            self.results.put((number, result))
        return None

    def _amount(self, source: Any) -> int:
        """Bytes that a volume takes; it fails if they are more than there are for all."""
        amount = bytes_needed(source, self.predictor.bundle.preprocessing)
        if amount > self.memory.budget:
            name = source if isinstance(source, str | Path) else "<nibabel image>"
            raise VolumeError(
                f"{name}: expected to need at most {self.memory.budget / 2**30:.1f} GiB of memory, its header asks "
                f"for about {amount / 2**30:.1f}"
            )
        return amount

    def fatal(self, error: BaseException) -> None:
        """An error that concerns every volume ends the run."""
        self.stop.set()
        self.results.put((-1, error))

    def lane(self) -> None:
        try:
            with self.predictor.on_backend():
                self._work()
        # Whatever it is, the caller must not wait for ever.
        except BaseException as error:
            self.fatal(error)

    def _work(self) -> None:
        predictor = self.predictor
        stream = predictor.stream()
        under_way: set[int] = set()
        waiting: _Task | None = None
        while not self.stop.is_set():
            # A full batch goes first: volumes are taken as late as possible, so that lanes end together.
            if stream.step(partial=False):
                continue
            if len(under_way) < VOLUMES_A_LANE:
                waiting = waiting or self.next_task(wait=not under_way)
                if waiting is not None and self.memory.take(waiting.amount, not under_way, self.stop):
                    listener = _Under(self, waiting, under_way)
                    waiting = None
                    try:
                        listener.prepared = predictor.prepared(listener.task.source, listener.seconds)
                    except Exception as error:
                        listener.failed(error)
                    else:
                        stream.add(listener.prepared.data, listener.prepared.foreground, None, listener)
                    continue
            if under_way:
                # No further volume can fill the rest of a batch.
                stream.step(partial=True)
            elif waiting is None and self.exhausted.is_set() and self.fed.empty():
                return


class _Under(Result):
    """A volume under way in a lane."""

    def __init__(self, run: _Run, task: _Task, under_way: set[int]) -> None:
        super().__init__()
        self.run, self.task, self.under_way = run, task, under_way
        self.prepared: Any = None
        under_way.add(task.number)

    def done(self, residual: Any, probability: Any) -> None:
        run = self.run
        prediction = run.predictor.prediction(self.prepared, residual, probability, self.seconds)
        result = run.finish(prediction)
        self._over(result)

    def failed(self, error: Exception) -> None:
        # True of every case.
        if isinstance(error, ModuleNotFoundError | BackendUnavailableError):
            self.run.fatal(error)
        # Such as of an image too small for the networks; of a volume that was read, so that it can be named.
        if isinstance(error, ValueError) and not isinstance(error, GrcsfError) and self.prepared is not None:
            error = VolumeError(f"{self.prepared.volume.name}: {error}").with_traceback(error.__traceback__)
        self._over(_failure(self.task.source, error))

    def _over(self, result: Any) -> None:
        self.prepared = None
        self.under_way.discard(self.task.number)
        self.run.memory.give_back(self.task.amount)
        self.run.results.put((self.task.number, result))


def _failure(source: Any, error: Exception) -> Failure:
    # Warnings are errors under -W error; they name the file.
    foreseen = isinstance(error, GrcsfError | OSError | Warning)
    return Failure(source, error, foreseen, "".join(traceback.format_exception(error)))


def run_lanes(
    predictor: Predictor,
    sources: Iterable[Any],
    ordered: bool,
    lanes: int | None,
    memory: int | None,
    finish: Callable[[Any], Any],
    skip: Callable[[Any], Any] | None,
) -> Iterator[Any]:
    """See :meth:`grcsf_fast.Predictor.predict_many`."""
    on_cpu = predictor.device.type == "cpu"
    if lanes is None:
        lanes = threads_outside() if on_cpu else 2
    # Processes of torchrun on one machine share its memory.
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    share = SHARE_OF_MEMORY / max(1, int(beside) if beside.isdecimal() else 1)
    budget = int(share * available_memory()) if memory is None else memory
    if lanes < 1 or budget < 1:
        raise ArgumentError(f"lanes and memory: expected 1 or more, got {lanes} and {budget}")
    run = _Run(predictor, sources, lanes, _Memory(budget), finish, skip)
    workers = [
        threading.Thread(target=contextvars.copy_context().run, args=(run.lane,), name=f"lane-{number}", daemon=True)
        for number in range(lanes)
    ]
    feeder = threading.Thread(target=contextvars.copy_context().run, args=(run.feed,), name="lanes-feeder", daemon=True)
    early: dict[int, Any] = {}
    turn = 0
    # One thread a lane, whatever their number: the same bits. Threads that start from here on take it over.
    with one_thread() if on_cpu else nullcontext():
        try:
            for worker in (feeder, *workers):
                worker.start()
            while True:
                try:
                    number, result = run.results.get(timeout=0.2)
                except queue.Empty:
                    # In this order: a lane's last result comes before its end.
                    if not any(worker.is_alive() for worker in workers) and run.results.empty():
                        break
                    continue
                if isinstance(result, BaseException):
                    raise result
                early[number] = result
                while early:
                    key = turn if ordered else next(iter(early))
                    if key not in early:
                        break
                    turn += 1
                    result = early.pop(key)
                    run.room.release()
                    yield result
                    del result
        finally:
            run.stop.set()
            started = [worker for worker in workers if worker.ident is not None]  # no more may be possible
            for worker in started:
                worker.join()
            if feeder.ident is not None:
                feeder.join(timeout=1)  # a source that blocks is not waited for
