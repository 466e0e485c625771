"""Lanes: threads that each read, compute and finish volumes of their own, within bounds of number and memory."""

from __future__ import annotations

import contextvars
import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data.volumes import VolumeError, bytes_needed
from .engine import Result
from .ops.backends import BackendUnavailableError

if TYPE_CHECKING:
    from .predict import Predictor

__all__ = ["Failure", "available_memory", "run_lanes"]

# Volumes that a lane has under way at once, so that the rest of one batch is filled from the next volume.
VOLUMES_A_LANE = 3
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


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its control group if that has less."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(min(found), 0) if found else 8 * 2**30


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
        self, predictor: Predictor, sources: Iterable[Any], lanes: int, memory: _Memory, finish: Callable[[Any], Any]
    ) -> None:
        self.predictor, self.memory, self.finish = predictor, memory, finish
        self.sources = enumerate(sources)
        self.taking = threading.Lock()
        self.exhausted = False
        # A result that waits for its turn counts, so that lanes do not run ahead without bound.
        self.room = threading.Semaphore(lanes * (VOLUMES_A_LANE + 1))
        self.results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.stop = threading.Event()

    def next_task(self, wait: bool) -> _Task | None:
        """The next source that is not too large, if there is one and room for it."""
        while not (self.exhausted or self.stop.is_set()):
            if not self.room.acquire(timeout=0.2 if wait else 0):
                if wait:
                    continue
                return None
            with self.taking:
                try:
                    number, source = next(self.sources)
                except StopIteration:
                    self.exhausted = True
                    self.room.release()
                    return None
                # An error of the caller's own iterator ends the run.
                except BaseException as error:
                    self.exhausted = True
                    self.fatal(error)
                    return None
            amount = bytes_needed(source, self.predictor.bundle.preprocessing)
            if amount <= self.memory.budget:
                return _Task(number, source, amount)
            name = source if isinstance(source, str | Path) else "<nibabel image>"
            error = VolumeError(
                f"{name}: expected to need at most {self.memory.budget / 2**30:.1f} GiB of memory, its header asks for "
                f"about {amount / 2**30:.1f}"
            )
            self.results.put((number, Failure(source, error, True, str(error))))
        return None

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
                        stream.add(listener.prepared.data, listener.prepared.head, None, listener)
                    continue
            if under_way:
                # No further volume can fill the rest of a batch.
                stream.step(partial=True)
            elif waiting is None and self.exhausted:
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
        if isinstance(error, ValueError) and not isinstance(error, VolumeError) and self.prepared is not None:
            error = VolumeError(f"{self.prepared.volume.name}: {error}").with_traceback(error.__traceback__)
        foreseen = isinstance(error, VolumeError | OSError)
        text = "".join(traceback.format_exception(error))
        self._over(Failure(self.task.source, error, foreseen, text))

    def _over(self, result: Any) -> None:
        self.prepared = None
        self.under_way.discard(self.task.number)
        self.run.memory.give_back(self.task.amount)
        self.run.results.put((self.task.number, result))


def run_lanes(
    predictor: Predictor,
    sources: Iterable[Any],
    ordered: bool,
    lanes: int | None,
    memory: int | None,
    finish: Callable[[Any], Any],
) -> Iterator[Any]:
    """See :meth:`grcsf_fast.Predictor.predict_many`."""
    on_cpu = predictor.device.type == "cpu"
    threads = torch.get_num_threads()
    if lanes is None:
        lanes = threads if on_cpu else 2
    budget = int(SHARE_OF_MEMORY * available_memory()) if memory is None else memory
    if lanes < 1 or budget < 1:
        raise ValueError(f"lanes and memory: expected 1 or more, got {lanes} and {budget}")
    run = _Run(predictor, sources, lanes, _Memory(budget), finish)
    if on_cpu:
        # Threads that start from here on take it over. One a lane, whatever their number: the same bits.
        torch.set_num_threads(1)
    workers = [
        threading.Thread(target=contextvars.copy_context().run, args=(run.lane,), name=f"lane-{number}", daemon=True)
        for number in range(lanes)
    ]
    early: dict[int, Any] = {}
    turn = 0
    try:
        for worker in workers:
            worker.start()
        while True:
            try:
                number, result = run.results.get(timeout=0.2)
            except queue.Empty:
                if run.results.empty() and not any(worker.is_alive() for worker in workers):
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
        for worker in workers:
            worker.join()
        if on_cpu:
            torch.set_num_threads(threads)
