"""Processes that share the cases of a folder or the batches of a training, as torchrun or a scheduler describes them.

They find that in the environment.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentError, GrcsfError, UnfinishedError

__all__ = [
    "OtherEndedError",
    "World",
    "described_world",
    "device_of",
    "end_if_left",
    "gathered",
    "highest",
    "one_of_many",
    "said_by",
    "said_by_first",
    "sum_gradients",
    "summed",
]

Result = TypeVar("Result")

RANK_NAMES, MEETING_NAMES = ("RANK", "WORLD_SIZE"), ("MASTER_ADDR", "MASTER_PORT")
MEETING_TIME = timedelta(minutes=5)
# A process that ends is noticed at once by its closed connections; this is for machines that vanish. Up to here the
# others wait for one with a long case.
WAITING_TIME = timedelta(days=2)
REACHING_S = 10.0  # for the store where they met, after an error


class OtherEndedError(UnfinishedError):
    """Another process ended before this one."""


@dataclass(frozen=True)
class World:
    """Which part of the cases is this process's.

    Attributes:
        rank: number of the process.
        size: processes in all.
        local_rank: number among those of this machine; that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def described_world(environment: Mapping[str, str] | None = None) -> World:
    """This process's share by RANK and WORLD_SIZE; without them, and where there is one process, it has all.

    A scheduler's own variables, such as SLURM_PROCID, mean nothing here.

    Args:
        environment: None: that of the process.

    Raises:
        ArgumentError: the variables are incomplete or contradict each other; the message says what to do.
    """
    environment = os.environ if environment is None else environment
    found = {name: environment[name] for name in RANK_NAMES if environment.get(name)}
    if not found or found.get("WORLD_SIZE") == "1":
        return World()
    said = " and ".join(f"{name}={value}" for name, value in found.items())
    advice = "start the processes with torchrun, or unset these variables to work alone"
    if missing := [name for name in RANK_NAMES if name not in found]:
        raise ArgumentError(f"environment: {said}, but {missing[0]} is not set; {advice}")
    if not all(value.isdecimal() for value in found.values()) or not int(found["RANK"]) < int(found["WORLD_SIZE"]):
        raise ArgumentError(f"environment: expected a RANK from 0 to below WORLD_SIZE, found {said}; {advice}")
    if missing := [name for name in MEETING_NAMES if not environment.get(name)]:
        raise ArgumentError(
            f"environment: {said}, but {' and '.join(missing)}, where the processes meet, not set; {advice}"
        )
    local = environment.get("LOCAL_RANK", "")
    return World(int(found["RANK"]), int(found["WORLD_SIZE"]), int(local if local.isdecimal() else found["RANK"]))


@contextmanager
def one_of_many(device: torch.device | None = None) -> Iterator[World]:
    """This process's share; at the end of the block processes wait for each other, unless it raises.

    If one dies, torchrun ends the others, and the same command again does what is left. A process on a GPU whose block
    raises leaves its group as it is: NCCL ends a group when all of its processes do, and the others may wait for this
    one. Nothing more can be done by several in it, and a program ends by :func:`end_if_left`.

    Args:
        device: whose tensors the processes add up, :func:`summed`; None: none.

    Raises:
        ArgumentError: see :func:`described_world`; or the processes do not meet within minutes.
        UnfinishedError: another process ended before this one; the message has the number and the error of each that
            ended with one, where torchrun holds the store in which they met.
    """
    world = described_world()
    if world.size == 1:
        yield world
        return
    import torch.distributed as distributed

    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    global _errors, _left
    store = _meet(world, "cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    _errors = _Errors(world, store) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
    try:
        yield world
        highest(world, 0)
    except BaseException as error:
        _left = on_gpu
        if _errors is not None and isinstance(error, Exception):
            _errors.tell(error)
        raise
    finally:
        if not _left:
            distributed.destroy_process_group()
        _errors = None


_left = False


def end_if_left(code: int) -> None:
    """End the process with this code, at once, if it has left a group on GPUs: Python's end would wait as well."""
    if _left:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or none at all
                stream.flush()
        os._exit(code)


class _Errors:
    """What ended each of the processes, in the store where they met: of each other they see closed connections alone.

    That of torchrun's agent, which outlives them. Else the first process holds the store and takes it along when it
    ends, and who looks there at that moment has a stack printed by C++.
    """

    def __init__(self, world: World, store: Any) -> None:
        self.store, self.rank = store, world.rank
        self.others = [rank for rank in range(world.size) if rank != world.rank]

    def tell(self, error: Exception) -> None:
        """Unless it is but that of another process."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OtherEndedError):
                return
            cause = cause.__cause__
        kind = "" if isinstance(error, GrcsfError | OSError) else f"{type(error).__name__}: "
        with suppress(OSError, RuntimeError):
            self._reach()
            self.store.set(f"error/{self.rank}", f"{kind}{error}".partition("\n")[0])

    def of_others(self) -> str:
        """Those that were told up to now; empty where there are none, or no agent any more, of another machine."""
        found = []
        with suppress(OSError, RuntimeError):
            self._reach()
            for rank in self.others:
                if self.store.check([f"error/{rank}"]):
                    found.append(f"RANK {rank} ended with an error: {self.store.get(f'error/{rank}').decode()}")
        return "; ".join(found)

    def _reach(self) -> None:
        """Raises OSError where the agent's machine is gone: in C++ that prints stacks."""
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(place, timeout=REACHING_S).close()


_errors: _Errors | None = None


def _meet(world: World, backend: str) -> Any:
    """Make the process group; returns its store.

    Meeting takes minutes at most, and only then processes may wait for each other long.
    """
    import torch.distributed as distributed
    from torch.distributed.rendezvous import rendezvous

    def meet() -> Any:
        store = next(rendezvous("env://", world.rank, world.size, timeout=MEETING_TIME))[0]
        distributed.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=WAITING_TIME
        )
        return store

    try:
        return _interruptible(meet)
    # Errors of the store and of gloo share no other base.
    except (RuntimeError, ValueError) as error:
        names = ", ".join(f"{name}={os.environ.get(name)}" for name in (*RANK_NAMES, *MEETING_NAMES))
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArgumentError(
            f"environment: the processes that {names} describe did not meet ({reason}); start all of them, with "
            "torchrun for instance, or unset these variables to work alone"
        ) from error


def _together(call: Callable[[], Result]) -> Result:
    try:
        return _interruptible(call)
    except RuntimeError as error:
        raise _ended_early(error) from error


def _ended_early(error: RuntimeError) -> UnfinishedError:
    if _errors is not None and (said := _errors.of_others()):
        return OtherEndedError(said)
    return OtherEndedError(
        f"another process ended before its work was done ({str(error).splitlines()[0]}); the same command does what "
        "is left"
    )


def _interruptible(call: Callable[[], Result]) -> Result:
    """The call in a thread of its own: one that waits in C++ would keep Ctrl-C and SIGTERM waiting too."""
    found: list[Result] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if raised:
        raise raised[0]
    return found[0]


def said_by_first(world: World, say: Callable[[], Result]) -> Result:
    """What the first process says; the others are told."""
    return said_by(world, 0, say)


def said_by(world: World, rank: int, say: Callable[[], Result]) -> Result:
    """What one process says; the others are told."""
    if world.size == 1:
        return say()
    import torch.distributed as distributed

    told: list[Any] = [say() if world.rank == rank else None]
    _together(lambda: distributed.broadcast_object_list(told, rank, device=torch.device("cpu")))
    return told[0]


def gathered(world: World, one: Any) -> list[Any]:
    """What each process gives, in order of their numbers; waits for all of them."""
    if world.size == 1:
        return [one]
    import torch.distributed as distributed

    every: list[Any] = [None] * world.size
    _together(lambda: distributed.all_gather_object(every, one))
    return every


def highest(world: World, number: int) -> int:
    """The highest of all processes' numbers; waits for all of them."""
    if world.size == 1:
        return number
    import torch.distributed as distributed

    told = torch.tensor(number, device="cpu")
    _together(lambda: distributed.all_reduce(told, distributed.ReduceOp.MAX))
    return int(told)


def summed(world: World, own: Tensor) -> Tensor:
    """Sum of the processes' tensors of one shape; its gradient is that of each process's own part.

    Raises:
        UnfinishedError: another process ended.
    """
    if world.size == 1:
        return own
    total = own.detach().clone()
    _added_up(total)
    return own + (total - own.detach())


def sum_gradients(world: World, parameters: Iterable[Tensor]) -> None:
    """Give every process the sum of all processes' gradients, of parameters that have one in some process.

    Raises:
        UnfinishedError: another process ended.
    """
    if world.size == 1:
        return
    learnt = [one for one in parameters if one.requires_grad]
    # A parameter without a gradient, which has one elsewhere or nowhere, keeps the tensors of all processes alike.
    grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in learnt]
    total = torch.cat([grad.flatten() for grad in grads])
    _added_up(total)
    for one, part in zip(learnt, total.split([one.numel() for one in learnt]), strict=True):
        one.grad = part.view_as(one)


def _added_up(values: Tensor) -> None:
    """In place. By tensors on GPUs, the processor does not wait for it."""
    import torch.distributed as distributed

    try:
        distributed.all_reduce(values)
    except RuntimeError as error:
        shared = str(error).partition("Duplicate GPU detected")[2].partition("\n")[0]  # as NCCL says it
        if shared:
            raise ArgumentError(
                f"device: expected a GPU for each process, found two on one{shared}; start no more processes on a "
                "machine than it has GPUs, without a number in --device"
            ) from error
        raise _ended_early(error) from error


def device_of(world: World, device: str) -> str:
    """``auto`` and ``cuda`` are the GPU of this process's number on its machine."""
    if world.size > 1 and torch.cuda.is_available() and device in ("auto", "cuda"):
        return f"cuda:{world.local_rank % torch.cuda.device_count()}"
    return device
