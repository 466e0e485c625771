"""A contest: some ways to do the same thing, checked against float64 and timed in turns.

Nothing here knows what is computed. A contestant that raises or whose results are wrong gets no time, and its reason is
kept. The others run once a round, each round in another order, so that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ENOUGH_ROUNDS", "ENOUGH_SECONDS", "FULL", "QUICK", "Contest", "Contestant", "GpuClock", "Measured", "Pace",
    "ProcessorClock", "Replay", "clock_of", "largest_error", "relative_error", "too_short",
]  # fmt: skip

# A measurement with neither this many rounds nor this many seconds says so in its row.
ENOUGH_ROUNDS, ENOUGH_SECONDS = 20, 1.0
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Steps = Sequence[Callable[..., Any]]


@dataclass(frozen=True)
class Pace:
    """How long a contest is measured.

    Attributes:
        rounds, seconds: a contestant has enough with either.
        block: seconds that a contestant's turn in a round lasts at the least, what lies between two calls included; a
            turn repeats its call.
        least: rounds, however long they take.
    """

    rounds: int = ENOUGH_ROUNDS
    seconds: float = ENOUGH_SECONDS
    block: float = 0.02
    least: int = 3

    def shared(self, processes: int) -> Pace:
        """Of one of so many processes that measure the same one after another."""
        return replace(
            self,
            rounds=math.ceil(self.rounds / processes),
            seconds=self.seconds / processes,
            least=math.ceil(self.least / processes),
        )

    def turns(self, calls: Mapping[str, float], between: float) -> tuple[int, dict[str, int]]:
        """The most rounds of all ways to have enough that take little more than the shortest time, and calls a turn.

        Many short turns: a slow moment then hits all contestants, and few of the rounds.

        Args:
            calls: seconds of a call by contestant.
            between: seconds that lie between two calls.
        """

        def repeats(rounds: int, seconds: float) -> int:
            if rounds >= self.rounds:
                return max(1, math.ceil(self.block / (seconds + between)))
            # A little more, because the trial may have been slow.
            return max(1, math.ceil(max(self.block, 1.15 * self.seconds / rounds) / seconds))

        plans = {
            rounds: {name: repeats(rounds, seconds) for name, seconds in calls.items()}
            for rounds in range(self.least, max(self.rounds, self.least) + 1)
        }
        cost = {
            rounds: rounds * sum(plan[name] * (calls[name] + between) for name in calls)
            for rounds, plan in plans.items()
        }
        most = max(rounds for rounds in plans if cost[rounds] <= 1.25 * min(cost.values()))
        return most, plans[most]


IDLE_CYCLES = 2**24  # 8 to 12 ms of a GPU
FULL = Pace()
QUICK = Pace(rounds=5, seconds=0.1, least=2)


def too_short(rounds: int, seconds: float) -> str | None:
    """What to say of so many rounds that lasted so long together, if they are too few."""
    if rounds >= ENOUGH_ROUNDS or seconds >= ENOUGH_SECONDS:
        return None
    return f"fewer than {ENOUGH_ROUNDS} rounds and {ENOUGH_SECONDS:g} s: {rounds} rounds, {seconds:.2f} s"


def largest_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest difference of an element, over one and the largest element of its tensor."""
    errors = [
        (one.double() - other).abs().max() / (1 + other.abs().max()) for one, other in zip(results, exact, strict=True)
    ]
    return float(torch.stack(errors).max())  # NaN if any is


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of all differences over the norm of all exact values."""
    difference = sum(float((one.double() - other).square().sum()) for one, other in zip(results, exact, strict=True))
    return math.sqrt(difference / sum(float(other.square().sum()) for other in exact))


@dataclass(frozen=True)
class Contestant:
    """One way to do it.

    Attributes:
        build: gives the steps of a call, ready to run; each takes what the step before returned.
        exact: float64 results, each tensor on the processor; contestants that share the function share its results.
        tolerance: of the contest's error.
        ours: wrong or raising is a failure, not an absence.
        results: from what the last step returned to the tensors to check.
        detail: what else to note about a call, taken after the timing.
    """

    build: Callable[[], Steps]
    exact: Callable[[], Sequence[Tensor]]
    tolerance: float
    ours: bool = False
    results: Callable[[Any], Sequence[Tensor]] = tuple
    detail: Callable[[Callable[[], Any]], dict[str, Any]] | None = None


@dataclass
class Measured:
    """What a contest found out about one contestant.

    Attributes:
        ours: whether it is one of ours.
        tolerance: that its error had to keep.
        error: against float64; None where it raised or was not checked.
        reason: why it has no time; None where it has.
        first_call: seconds of building it and of its first call, compilation included.
        peak_bytes: by which the program's memory grew in a call, results included; None where it cannot be known.
        result_bytes: of the results alone.
        repeats: calls a turn.
        seconds: by pass, seconds a call in each round, in the order of the rounds.
        detail: see :class:`Contestant`.
    """

    ours: bool
    tolerance: float
    error: float | None = None
    reason: str | None = None
    first_call: float | None = None
    peak_bytes: int | None = None
    result_bytes: int | None = None
    repeats: int = 1
    seconds: dict[str, list[float]] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)


class ProcessorClock:
    """Wall seconds of the steps of a call, its caches cold at the first step or as the call before left them.

    How much of a shared last cache a program gets changes from minute to minute, and with it the time of whatever fits.
    """

    def __init__(self, cold: bool) -> None:
        largest = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
        self.flush = torch.ones(max(2**26, 2 * largest) // 4) if cold else None

    def block(self, steps: Steps, repeats: int) -> list[float]:
        """Mean seconds of each step over ``repeats`` calls."""
        totals = [0.0] * len(steps)
        for _ in range(repeats):
            if self.flush is not None:
                self.flush.sum()  # reads alone, so that nothing is left to be written back
            value: Any = None
            before = time.perf_counter()
            for number, step in enumerate(steps):
                value = step(value) if number else step()
                now = time.perf_counter()
                totals[number] += now - before
                before = now
        return [total / repeats for total in totals]

    def peak_growth(self, steps: Steps) -> tuple[int | None, Any]:
        """Bytes by which the process grows at its peak in a call (Linux only), and what that returns.

        Memory that the program keeps from earlier calls is given back first, else nothing would have to grow.
        """
        if not CLEAR.exists():
            return None, _chained(steps)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")  # resets the peak
        before = _kilobytes("VmRSS")
        value = _chained(steps)
        return max(0, 1024 * (_kilobytes("VmHWM") - before)), value


class GpuClock:
    """Seconds of the steps of a call on the device by events, its caches cold at the first step.

    The device idles before each call until its launches are queued, so that they are not what is timed; of calls that
    take longer to launch than that, or wait for the device in between, they still are.
    """

    def __init__(self) -> None:
        self.flush = torch.empty(64 * 2**20, device="cuda")

    def block(self, steps: Steps, repeats: int) -> list[float]:
        """Mean seconds of each step over ``repeats`` calls."""
        totals = [0.0] * len(steps)
        for _ in range(repeats):
            self.flush.zero_()
            torch.cuda._sleep(IDLE_CYCLES)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
            events[0].record()
            value: Any = None
            for number, step in enumerate(steps):
                value = step(value) if number else step()
                events[number + 1].record()
            events[-1].synchronize()
            for number, (begin, end) in enumerate(itertools.pairwise(events)):
                totals[number] += begin.elapsed_time(end) / 1000
        return [total / repeats for total in totals]

    def peak_growth(self, steps: Steps) -> tuple[int, Any]:
        """Bytes by which the allocator's memory grows at its peak in a call, and what that returns."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = _chained(steps)
        return torch.cuda.max_memory_allocated() - before, value


def clock_of(device: str, cold: bool) -> ProcessorClock | GpuClock:
    return GpuClock() if device == "cuda" else ProcessorClock(cold)


def _kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


def _chained(steps: Steps) -> Any:
    value = steps[0]()
    for step in steps[1:]:
        value = step(value)
    return value


@dataclass(frozen=True, eq=False)
class Contest:
    """Contestants with the same inputs, threads and device.

    Attributes:
        what: is computed.
        shape: of the inputs, to be read.
        dtype: of the large tensors.
        passes: by which the times are reported: "forward", "both" and "training step" are whole calls, "backward" is
            the last step of one.
        names: of the contestants, in the order of the tables.
        entries: makes the inputs and the contestants of those names.
        reference: the contestant that the others are compared with.
        threads, device: in force while it runs.
        work: (bytes, operations) that a call needs at the least; None where nobody has worked it out.
        error: of results against the exact ones.
        scaling: the axis of the scaling plots that this is a point of, and where on it.
        cold: whether each call begins with cold caches, as always on a GPU.
        long: whether calls take so many seconds that each turn is one, the trial counts as a round, the pace's least
            rounds have to do (rows that this makes too short say so), and the first call shows the memory.
    """

    what: str
    shape: str
    dtype: str
    passes: tuple[str, ...]
    names: tuple[str, ...]
    entries: Callable[[], dict[str, Contestant]]
    reference: str
    threads: int
    device: str = "cpu"
    work: Callable[[], tuple[float, float]] | None = None
    error: Callable[[Sequence[Tensor], Sequence[Tensor]], float] = largest_error
    scaling: tuple[str, float] | None = None
    cold: bool = True
    long: bool = False

    def group(self, passed: str) -> str:
        where = f"{self.threads} thread{'s' if self.threads > 1 else ''}" if self.device == "cpu" else self.device
        return f"{self.what}, {self.shape}, {self.dtype}, {passed}, {where}"

    def run(self, pace: Pace | None, check: bool = True) -> dict[str, Measured]:
        """Check every contestant and, with a pace, time those that are right.

        Args:
            check: false where another process did: times alone, no errors, no details, no memory.
        """
        torch.set_num_threads(self.threads)
        torch._dynamo.reset()
        gc.collect()
        entries = self.entries()
        if tuple(entries) != self.names:
            raise ValueError(f"entries of {self.what!r}: expected {self.names}, got {tuple(entries)}")
        found = {name: Measured(entry.ours, entry.tolerance) for name, entry in entries.items()}
        clock = None if pace is None else clock_of(self.device, self.cold)
        ready = self._built(entries, found, check, clock)
        if pace is None or clock is None or not ready:
            return found
        self._time(ready, found, clock, pace)
        if check:
            for name, steps in ready.items():
                if (detail := entries[name].detail) is not None:
                    found[name].detail = detail(lambda steps=steps: _chained(steps))
            # Last: it gives memory back, which costs the call that comes next.
            for name, steps in ready.items():
                if not self.long:
                    found[name].peak_bytes, _ = clock.peak_growth(steps)
        return found

    def _built(
        self,
        entries: dict[str, Contestant],
        found: dict[str, Measured],
        check: bool,
        clock: ProcessorClock | GpuClock | None,
    ) -> dict[str, Steps]:
        """The contestants that ran and, with ``check``, are right."""
        ready: dict[str, Steps] = {}
        known: dict[Callable[[], Sequence[Tensor]], Sequence[Tensor]] = {}
        for name, entry in entries.items():
            try:
                if check and entry.exact not in known:
                    known[entry.exact] = entry.exact()
                began = time.perf_counter()
                steps = entry.build()
                if self.long and check and clock is not None:
                    found[name].peak_bytes, value = clock.peak_growth(steps)
                else:
                    value = _chained(steps)
                if self.device == "cuda":
                    torch.cuda.synchronize()
            # Whatever a contestant raises is its reason, and stands in the table.
            except Exception as error:
                line = str(error).strip().partition("\n")[0]
                found[name].reason = f"{type(error).__name__}: {line[:120]}"
                continue
            found[name].first_call = time.perf_counter() - began
            if not check:
                del value
                ready[name] = steps
                continue
            results = [one.detach().cpu() for one in entry.results(value)]
            del value
            found[name].result_bytes = sum(one.nbytes for one in results)
            found[name].error = error = self.error(results, known[entry.exact])
            if error <= entry.tolerance:
                ready[name] = steps
            else:
                found[name].reason = f"wrong by {error:.1e}, more than {entry.tolerance:.0e}"
        return ready

    def _time(
        self, ready: dict[str, Steps], found: dict[str, Measured], clock: ProcessorClock | GpuClock, pace: Pace
    ) -> None:
        def seconds_of(took: list[float]) -> dict[str, float]:
            return {passed: took[-1] if passed == "backward" else sum(took) for passed in self.passes}

        trial = {name: seconds_of(clock.block(steps, 1)) for name, steps in ready.items()}
        if self.long:
            for name, seconds in trial.items():
                found[name].seconds = {passed: [value] for passed, value in seconds.items()}
            rounds = pace.least - 1
        else:
            # Those calls may have had to fetch memory, so short ones are tried again.
            once = {
                name: min((one if max(one.values()) > 0.1 else seconds_of(clock.block(ready[name], 3))).values())
                for name, one in trial.items()
            }
            began = time.perf_counter()
            clock.block([lambda: None], 3)
            rounds, repeats = pace.turns(once, (time.perf_counter() - began) / 3)
            for name in ready:
                found[name].repeats = repeats[name]
                found[name].seconds = {passed: [] for passed in self.passes}
        names = list(ready)
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                for passed, value in seconds_of(clock.block(ready[name], found[name].repeats)).items():
                    found[name].seconds[passed].append(value)


class Replay:
    """A timer for pytest-benchmark whose intervals were measured before."""

    __name__ = "replay"

    def __init__(self) -> None:
        self._readings: Iterable[float] = iter(())

    def load(self, durations: Sequence[float]) -> None:
        """The next two readings are the first duration apart, and so on."""
        self._readings = itertools.chain.from_iterable((0.0, duration) for duration in durations)

    def __call__(self) -> float:
        return next(self._readings)
