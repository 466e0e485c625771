"""Cases made beside the training: by worker processes of a DataLoader, each case by one of a training's processes.

A worker makes whole cases, and the training cuts crops from those it holds: all crops of a case come from memory, and
workers that cut crops would each need every case. Which process makes a case changes nothing of it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..datasets.cases import Case, CaseSource
from ..errors import GrcsfError
from ..runtime.control_groups import usable_cores
from ..runtime.processes import World, said_by
from ..runtime.threads import one_thread
from ..runtime.transient import patiently

__all__ = ["CaseMakers", "WorkerError", "default_workers"]

AHEAD = 2  # cases that each worker makes before they are asked for
MOST_WORKERS = 8
ENDING_SECONDS = 5.0  # for a worker that was told to end
LOOK_SECONDS = 0.1  # between two looks of a worker at whether it is


class WorkerError(GrcsfError):
    """A worker process that ended before its work was done; the message names the case."""


def default_workers(device: torch.device, world: World) -> int:
    """Workers for the cores this process has: beside a GPU all but one of them, else a quarter, as steps need them."""
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")  # processes of this machine, where torchrun says
    cores = usable_cores() // (int(beside) if beside.isdecimal() and int(beside) else world.size)
    if cores < 2:
        return 0
    return min(MOST_WORKERS, max(1, cores // 4 if device.type == "cpu" else cores - 1))


class CaseMakers:
    """A source whose cases are finished, made ahead where there are workers; the same bits with any number of them.

    Args:
        source: of the cases.
        finish: applied to each of them; picklable where processes are not forked.
        last: number of the last case that will be asked for; numbers are asked for one after the other.
        workers: processes; 0: cases are made when they are asked for.
        finish_here: ``finish`` computes on a device that workers cannot share.
        world: processes of the training, which take turns at making cases and tell each other.
    """

    def __init__(
        self,
        source: CaseSource,
        finish: Callable[[Case], Case],
        last: int,
        workers: int = 0,
        finish_here: bool = False,
        world: World | None = None,
    ) -> None:
        self.source, self.finish, self.last, self.workers = source, finish, last, workers
        self.finish_here, self.world = finish_here, world or World()
        self._team: _Team | None = None

    def __getitem__(self, index: int) -> Case:
        """Raises what the source raises, and :class:`WorkerError`."""
        return said_by(self.world, index % self.world.size, lambda: self._made(index))

    def _made(self, index: int) -> Case:
        make = _Making(self.source, _unchanged if self.finish_here else self.finish)
        if not self.workers:
            with one_thread():  # as in a worker: sums differ by the number of threads
                case = make(index)
        else:
            if self._team is None:
                mine = range(index, self.last + 1, self.world.size)
                self._team = _Team(make, mine, min(self.workers, len(mine)))
            case = self._team.next(index)
        return self.finish(case) if self.finish_here else case

    def close(self) -> None:
        """End the workers, in the middle of a case too."""
        team, self._team = self._team, None
        if team is not None:
            team.close()


def _unchanged(case: Case) -> Case:
    return case


class _Making:
    """How a case is made, by its number."""

    def __init__(self, source: CaseSource, finish: Callable[[Case], Case]) -> None:
        self.source, self.finish = source, finish

    def __call__(self, index: int) -> Case:
        return self.finish(patiently(self.name(index), lambda: self.source[index]))

    def name(self, index: int) -> str:
        names = getattr(self.source, "names", None)
        return names[index % len(names)] if names else f"number {index} of {type(self.source).__name__}"


class _Team(Dataset):
    """Workers that make cases of given numbers, in order."""

    def __init__(self, make: _Making, numbers: range, workers: int) -> None:
        # Forked, they start in an instant and share the source's memory; where that is not usual, as the system does.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self.make, self.numbers = make, numbers
        # Of each worker its process's number and the case it makes, plus 1.
        self.doing = context.RawArray("q", 2 * workers)
        # No event: to set one waits for all who wait for it, those that were killed too.
        self.ending = context.RawValue("b", 0)
        loader = DataLoader(
            self, batch_size=None, sampler=numbers, num_workers=workers, collate_fn=_as_it_is, prefetch_factor=AHEAD,
            worker_init_fn=partial(_begin, os.getpid(), self.doing, self.ending), multiprocessing_context=context,
        )  # fmt: skip
        before = multiprocessing.active_children()
        # The loader would raise the death of a worker in the middle of a step; here it is noticed between two.
        with _handler_kept("SIGCHLD"):
            self.loaded: Iterator[Any] | None = iter(loader)
        self.processes = [process for process in multiprocessing.active_children() if process not in before]

    def __getitem__(self, index: int) -> Any:
        """In a worker: the case, or the error in place of it."""
        info = get_worker_info()
        assert info is not None
        self.doing[2 * info.id + 1] = index + 1
        try:
            return _packed(self.make(index))
        except Exception as error:
            return _Failed(error, self.make.name(index))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("loaded", "processes")}

    def next(self, index: int) -> Case:
        assert self.loaded is not None
        try:
            found = next(self.loaded)
        except RuntimeError as error:
            raise WorkerError(self._who_ended(index)) from error
        if isinstance(found, _Failed):
            raise found.error()
        return _unpacked(found)

    def _who_ended(self, index: int) -> str:
        for process in self.processes:
            process.join(0)
            if process.exitcode is not None:
                doing = [number for pid, number in zip(self.doing[::2], self.doing[1::2], strict=True)
                         if pid == process.pid and number]  # fmt: skip
                name = self.make.name(doing[0] - 1 if doing else index)
                code = process.exitcode
                how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"
                return (
                    f"{name}: the worker process that made this case was ended {how}; SIGKILL often means that memory "
                    "was short: fewer --workers need less, and with --workers 0 the training makes its cases itself"
                )
        return f"{self.make.name(index)}: no worker process could make this case"

    def close(self) -> None:
        self.ending.value = 1
        for process in self.processes:
            process.join(ENDING_SECONDS)
            if process.exitcode is None:
                process.kill()
        self.loaded = None


@contextmanager
def _handler_kept(name: str) -> Iterator[None]:
    """A signal has the same handler after the block as before."""
    number = getattr(signal, name, None)
    handler = signal.getsignal(number) if number is not None else None
    try:
        yield
    finally:
        if number is not None and handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)


def _as_it_is(value: Any) -> Any:
    return value


def _begin(parent: int, doing: Any, ending: Any, number: int) -> None:
    """At the start of a worker: it ends with its training and by nothing else.

    Signals that ask for an end come to all processes of a terminal or a job: the training then finishes its step, for
    which it may want another case.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    doing[2 * number] = os.getpid()
    threading.Thread(target=_end_with, args=(parent, ending), daemon=True).start()


def _end_with(parent: int, ending: Any) -> None:
    while not ending.value and os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(0)


def _packed(case: Case) -> dict[str, Any]:
    """With arrays, which go through a pipe: shared memory, as of tensors, is 64 MB in many containers."""
    values = {item.name: getattr(case, item.name) for item in fields(case)}
    if case.residual_maps is not None:
        values["residual_maps"] = case.residual_maps.half()  # as the pool keeps them
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _unpacked(values: dict[str, Any]) -> Case:
    tensors: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in values.items()
    }
    return Case(**tensors)


class _Failed:
    """An error in a worker, on its way to the training."""

    def __init__(self, error: Exception, name: str) -> None:
        where = "".join(traceback.format_exception(error))
        self.pickled = pickle.dumps(None)
        # Some errors cannot be pickled, or not be made again.
        with suppress(Exception):
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
            self.pickled = pickled
        self.text = f"{type(error).__name__}: {error}"
        expected = isinstance(error, GrcsfError | OSError)
        self.note = None if expected else f"while making case {name}, in a worker:\n{where}"

    def error(self) -> Exception:
        error = pickle.loads(self.pickled) or RuntimeError(self.text)
        if self.note:
            error.add_note(self.note)
        return error
