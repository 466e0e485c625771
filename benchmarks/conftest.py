"""The suite under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``; without the flag, correctness alone.

A module of the suite has ``contests(plan)`` and one test that calls ``compete``. The first contestant of a group runs
the whole contest, in turns; each contestant's test then hands its own rounds to pytest-benchmark, whose table and JSON
so hold what was measured side by side.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.contest import Contest, Measured, Replay, too_short
from benchmarks.machine import commit, describe, rates
from benchmarks.plan import Plan
from grcsf_fast.runtime.memory import keep_memory

ARENA = pytest.StashKey["Arena"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("suite", "benchmark suite")
    group.addoption("--quick", action="store_true", help="fewer shapes and rounds; every row says what is too short")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="of the processor (default: torch's)")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--budget", type=float, metavar="SECONDS", help="skip the contests that would begin after it")
    group.addoption(
        "--part", type=part_of_run, default=(1, 1), metavar="K/N",
        help="as the Kth of N processes of one run (`benchmarks.run`): an Nth of the rounds; the first alone checks",
    )  # fmt: skip
    group.addoption("--compiled", metavar="FOLDER", help="of what torch.compile made (default: one that is removed)")


def part_of_run(text: str) -> tuple[int, int]:
    number, _, processes = text.partition("/")
    if not (number.isdecimal() and processes.isdecimal() and 1 <= int(number) <= int(processes)):
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, got {text!r}")
    return int(number), int(processes)


class Arena:
    """The session's contests; the results of one are kept until the next begins."""

    def __init__(self, config: pytest.Config) -> None:
        mode = "quick" if config.option.quick else "full"
        self.plan = Plan(mode if config.option.benchmark_only else "check", config.option.device, config.option.threads)
        self.number, self.processes = config.option.part
        self.pace = self.plan.pace and self.plan.pace.shared(self.processes)
        self.budget = config.option.budget
        self.began = time.perf_counter()
        self.commit = commit()
        self.compiler_runs = False
        self.contest: Contest | None = None
        self.failure: Exception | None = None  # of that contest as a whole
        self.found: dict[str, Measured] = {}
        self.lines: dict[str, list[str]] = {}  # of the terminal's second table, by group

    def prepare(self) -> None:
        """Once, before the first time is taken."""
        self.machine = describe(self.plan.device, self.plan.threads)
        if self.plan.mode == "check":
            return
        if self.plan.device == "cpu":
            # Fresh pages cost another time in each process, and more of it where a contestant makes more tensors.
            keep_memory(whole_volumes=True)
        # What was imported stays; looking through it again takes longer than most calls.
        gc.freeze()
        torch.set_num_threads(self.plan.threads)
        self.machine |= rates(self.plan.device)

    def results(self, contest: Contest) -> dict[str, Measured]:
        if contest is not self.contest:
            self.contest, self.found = None, {}
            if self.budget is not None and time.perf_counter() - self.began > self.budget:
                pytest.skip(f"the budget of {self.budget:g} s was used up")
            if self.pace is not None and any("compiled" in name for name in contest.names):
                self.start_compiler()
            self.contest, self.failure = contest, None
            # What no contestant alone can answer for fails each of their tests, and runs once.
            try:
                self.found = contest.run(self.pace, check=self.number == 1)
            except Exception as error:
                self.failure = error
        if self.failure is not None:
            raise self.failure
        return self.found

    def start_compiler(self) -> None:
        """Once: what that takes belongs to no contestant."""
        if not self.compiler_runs:
            torch.compile(torch.neg)(torch.ones(8, device=self.plan.device))
            self.compiler_runs = True

    def floor(self, contest: Contest) -> dict[str, float]:
        """Seconds that the machine needs at the least, and of what."""
        if contest.work is None:
            return {}
        moved, operations = contest.work()
        rate = self.machine[f"{contest.dtype}_operations_per_second"]
        seconds = max(moved / self.machine["copy_bytes_per_second"], operations / rate)
        return {"bytes": moved, "operations": operations, "floor_seconds": seconds}

    def note(self, group: str, name: str, one: Measured, seconds: list[float], short: str | None) -> None:
        median = f"{1000 * statistics.median(seconds):.3f}" if seconds else "-"
        first = "-" if one.first_call is None else f"{one.first_call:.2f}"
        peak = "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:.1f}"
        error = "-" if one.error is None else f"{one.error:.0e}"
        self.lines.setdefault(group, []).append(
            f"{name:<28}{median:>12}{first:>10}{peak:>11}{error:>8}  {one.reason or short or ''}"[:120]
        )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device: expected cpu where torch finds no GPU, got cuda")
    if config.option.threads < 1:
        raise pytest.UsageError(f"--threads: expected 1 or more, got {config.option.threads}")
    config.stash[ARENA] = Arena(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" not in metafunc.fixturenames:
        return
    plan = metafunc.config.stash[ARENA].plan
    entries = [
        pytest.param(
            (contest, passed, name),
            id=f"{contest.group(passed)}, {name}",
            marks=pytest.mark.benchmark(group=contest.group(passed), timer=Replay()),
        )
        for contest in metafunc.module.contests(plan)
        for passed in (contest.passes if plan.pace is not None else contest.passes[-1:])
        for name in contest.names
    ]
    metafunc.parametrize("entry", entries)


@pytest.fixture(scope="session")
def arena(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    arena = request.config.stash[ARENA]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        if arena.pace is not None:
            # A compile time is one from nothing.
            compiled = request.config.option.compiled or tmp_path_factory.mktemp("inductor")
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        arena.prepare()
        yield arena
    torch.set_num_threads(threads)


@pytest.fixture
def compete(
    request: pytest.FixtureRequest, arena: Arena, entry: tuple[Contest, str, str], benchmark: Any
) -> Callable[[], None]:
    """The body of every test of the suite."""
    contest, passed, name = entry
    replay = request.node.get_closest_marker("benchmark").kwargs["timer"]

    def body() -> None:
        found = arena.results(contest)
        one = found[name]
        seconds = one.seconds.get(passed, [])
        # What is too short in one of several processes need not be in all of them.
        judged = seconds and arena.processes == 1
        short = too_short(len(seconds), one.repeats * sum(seconds)) if judged else None
        arena.note(contest.group(passed), name, one, seconds, short)
        if one.reason is not None:
            # By the reference all others are judged; it may be too large for a device, but not wrong.
            failed = one.ours or (name == contest.reference and one.reason.startswith("wrong by"))
            (pytest.fail if failed else pytest.skip)(f"{name}: {one.reason}")
        if arena.pace is None:
            benchmark.disabled = True
            benchmark.pedantic(lambda: None)
            return
        benchmark.name = name
        benchmark.extra_info.update(
            what=contest.what, shape=contest.shape, dtype=contest.dtype, passed=passed, threads=contest.threads,
            device=contest.device, ours=one.ours, reference=contest.reference, first_call_seconds=one.first_call,
            peak_bytes=one.peak_bytes, result_bytes=one.result_bytes, error=one.error, tolerance=one.tolerance,
            too_short=short, scaling=contest.scaling, detail=one.detail,
            absent={other: rival.reason for other, rival in found.items() if rival.reason} if one.ours else {},
            **arena.floor(contest),
        )  # fmt: skip
        replay.load([value * one.repeats for value in seconds])
        benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=one.repeats)

    return body


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return config.stash[ARENA].machine


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return config.stash[ARENA].commit


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    plan = config.stash[ARENA].plan
    quick = " --quick" if plan.mode == "quick" else ""
    output_json["command"] = (
        f"pytest benchmarks/ --benchmark-only{quick} --threads {plan.threads} --device {plan.device}"
    )
    output_json["quick"] = plan.mode == "quick"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    arena = config.stash[ARENA]
    if arena.pace is None or not arena.lines or arena.number > 1:
        return
    terminalreporter.section("first call (with compilation), memory, errors; what has no time and why")
    for group, rows in arena.lines.items():
        terminalreporter.write_line(group)
        head = f"{'':<28}{'median, ms':>12}{'first, s':>10}{'peak, MiB':>11}{'error':>8}"
        for row in (head, *rows, ""):
            terminalreporter.write_line(row)
