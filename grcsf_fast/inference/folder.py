"""A folder of volumes to a folder of masks: resumed where it stopped, shared by processes, every failure on record."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.files import remove_partial, replace_when_done, sha256, volume_sha256
from ..runtime.precision import PRECISIONS
from ..runtime.processes import World, gathered, said_by_first
from .lanes import Failure
from .prediction import Prediction, output_names, read_report
from .predictor import Predictor

__all__ = [
    "FAILURES_NAME",
    "SUMMARY_NAME",
    "Outcome",
    "Plan",
    "earlier_precision",
    "is_finished",
    "plan",
    "predict_folder",
    "shard",
]

FAILURES_NAME, SUMMARY_NAME = "failures.json", "summary.csv"
STAGES = ("read", "prepare", "residual_maps", "segmentation", "restore", "save")
SECONDS_A_RECORD = 5.0  # least, between two writings of the failures
COLUMNS = ("case", "input", "status", "lesion_count", "total_volume_ml", "seconds", *STAGES, "error")


@dataclass
class Outcome:
    """What became of the cases.

    Attributes:
        failures: name -> what failed, of all processes.
        finished_before: cases of this process that an earlier run had finished.
        rows: name -> what this process adds to ``summary.csv``.
        complete: no case was left out by an interruption.
    """

    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    finished_before: int = 0
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False


@dataclass(frozen=True)
class Plan:
    """What is to be done, the same in all processes.

    Attributes:
        cases: name -> file.
        problems: further entries that cannot be cases: name -> why.
        names: of this process's cases, the largest first.
    """

    cases: Mapping[str, Path]
    problems: Mapping[str, Exception]
    names: list[str]


def plan(cases: Mapping[str, Path], problems: Mapping[str, Exception], world: World) -> Plan:
    """This process's part of what the first process sees: a folder that changes must not look different to two."""
    sizes = {}
    for name, path in cases.items():
        try:
            sizes[name] = path.stat().st_size
        except OSError:
            sizes[name] = 0  # reading it will say why
    cases, problems, sizes = said_by_first(world, lambda: (cases, problems, sizes))
    return Plan(cases, problems if world.rank == 0 else {}, shard(sizes, world))


def shard(sizes: Mapping[str, int], world: World) -> list[str]:
    """The names of this process's cases, the largest first: each goes to the process that has least so far."""
    loads = [0] * world.size
    mine = []
    for name in sorted(sizes, key=lambda one: (-sizes[one], one)):
        least = loads.index(min(loads))
        loads[least] += sizes[name] + 1
        if least == world.rank:
            mine.append(name)
    return mine


def earlier_precision(output: Path, names: Iterable[str], settings: Mapping[str, Any]) -> str | None:
    """The precision of results that a folder holds already, of the same settings in all else; None: there are none."""
    for name in names:
        found = read_report(output / f"{name}_report.json").get("settings")
        precision = found.get("precision") if isinstance(found, dict) else None
        if precision in PRECISIONS and found == {**settings, "precision": precision}:
            return precision
    return None


def is_finished(report: Path, source: Path, settings: Mapping[str, Any], outputs: list[str]) -> bool:
    """Whether a case's files are those of this input and these settings, by their content.

    Args:
        report: the case's; it may not be there.
        source: the input.
        settings: of the predictor.
        outputs: names of the files that there should be beside the report.
    """
    found = read_report(report)
    if not found or set(found["outputs"]) != set(outputs) or found.get("settings") != settings:
        return False
    files = {report.parent / name: expected for name, expected in found["outputs"].items()}
    try:
        whole = all(path.is_file() and sha256(path) == expected for path, expected in files.items())
        return whole and source.is_file() and volume_sha256(source) == found.get("input_sha256")
    except OSError:
        return False  # whatever cannot be read is named when it is tried


def predict_folder(
    predictor: Predictor,
    todo: Plan,
    output: str | Path,
    *,
    overwrite: bool = False,
    maps: bool = True,
    overlay: bool = True,
    memory: int | None = None,
    world: World | None = None,
    done: Callable[[str, dict[str, Any] | None, int], None] = lambda name, report, slices: None,
) -> Outcome:
    """Segment many files; a bad one is noted and the others are done.

    A case whose files are there, of the same input, weights and settings, is left as it is. ``summary.csv`` and, if
    something failed, ``failures.json`` are written to ``output``, also when the run is interrupted.

    Args:
        predictor: to use.
        todo: from :func:`plan`.
        output: folder for the results.
        overwrite: do finished cases again.
        maps: with residual maps.
        overlay: with pictures.
        memory: see :meth:`Predictor.predict_many`.
        world: of this process; None: there is no other.
        done: called in this thread with a case's name, its report (None: failed) and its slices (0: finished before).

    Returns:
        What became of them.
    """
    world = world or World()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    settings = predictor.settings()
    ratios = predictor.bundle.residual_maps.mask_ratios if maps and predictor.network.rcu else ()
    files = {name: output_names(name, ratios, overlay) for name in todo.names}
    remove_partial(output, {file for name in todo.names for file in (*files[name], f"{name}_report.json")})
    remove_partial(output, {FAILURES_NAME, SUMMARY_NAME})
    by_path = {str(todo.cases[name]): name for name in todo.names}
    written = 0.0

    def finished(path: Path) -> _Finished | None:
        name = by_path[str(path)]
        report = output / f"{name}_report.json"
        if not overwrite and is_finished(report, path, settings, files[name]):
            return _Finished(name)
        return None

    def finish(prediction: Prediction) -> _Done:
        began = time.perf_counter()
        name = by_path[prediction.prepared.volume.name]
        prediction.save(output, name, maps, overlay)
        prediction.seconds["save"] = time.perf_counter() - began
        slices = len(prediction.prepared.foreground.flatten(0, 1).any(0).nonzero())
        return _Done(name, prediction.report, prediction.seconds, slices)

    def fail(name: str, source: Path | str, error: str, text: str) -> None:
        nonlocal written
        outcome.failures[name] = {"input": str(source), "error": error, "traceback": text}
        lines = [line for line in error.splitlines() if line.strip()] or ["unknown"]
        # Of a traceback the first line and the last.
        reason = " ".join(dict.fromkeys((lines[0], lines[-1])))
        outcome.rows[name] = {"status": "failed", "input": str(source), "error": reason}
        if world.size == 1 and time.monotonic() > written + SECONDS_A_RECORD:
            _write_failures(output, outcome)
            written = time.monotonic()
        done(name, None, 0)

    try:
        for name, problem in todo.problems.items():
            fail(name, name, str(problem), "")
        results = predictor.predict_many(
            (todo.cases[name] for name in todo.names), ordered=False, failures="return", memory=memory, finish=finish,
            skip=finished,
        )  # fmt: skip
        with closing(results):
            for result in results:
                if isinstance(result, Failure):
                    fail(by_path[str(result.source)], result.source, result.message, result.traceback)
                elif isinstance(result, _Finished):
                    outcome.finished_before += 1
                    outcome.rows[result.name] = {"status": "done"}
                    done(result.name, read_report(output / f"{result.name}_report.json"), 0)
                else:
                    outcome.rows[result.name] = result.row()
                    done(result.name, result.report, result.slices)
        _gather(outcome, world)
        outcome.complete = True
    finally:
        if world.rank == 0:
            _write_failures(output, outcome)
            _write_summary(output, todo.cases, outcome)
    return outcome


@dataclass(frozen=True)
class _Finished:
    """A case whose files were there."""

    name: str


@dataclass(frozen=True)
class _Done:
    """A case whose files were written."""

    name: str
    report: dict[str, Any]
    seconds: dict[str, float]
    slices: int

    def row(self) -> dict[str, Any]:
        stages = {stage: round(self.seconds.get(stage, 0.0), 3) for stage in STAGES}
        return {"status": "done", "seconds": round(sum(self.seconds.values()), 3)} | stages


def _gather(outcome: Outcome, world: World) -> None:
    """Waits for all processes; each then knows every failure, and the first one every row of the summary."""
    for failures, rows in gathered(world, (outcome.failures, outcome.rows)):
        outcome.failures.update(failures)
        outcome.rows.update(rows)


def _write_failures(output: Path, outcome: Outcome) -> None:
    """The failures of this run, and those of an earlier one whose cases this one has not reached."""
    path = output / FAILURES_NAME
    earlier: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        earlier = json.loads(path.read_text())
    failures = {name: one for name, one in earlier.items() if not outcome.complete and name not in outcome.rows}
    failures |= outcome.failures
    if failures:
        with replace_when_done(path) as (part,):
            part.write_text(json.dumps(dict(sorted(failures.items())), indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)


def _write_summary(output: Path, cases: Mapping[str, Path], outcome: Outcome) -> None:
    """A row a case; those that an interrupted run has not reached are "missing"."""
    # Names that are no UTF-8 go through as they are.
    encoding = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with replace_when_done(output / SUMMARY_NAME) as (part,), part.open("w", **encoding) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name in sorted({*cases, *outcome.rows}):
            row = {"case": name, "input": str(cases.get(name, "")), "status": "missing"} | outcome.rows.get(name, {})
            if row["status"] == "done":
                report = read_report(output / f"{name}_report.json")
                row |= {key: report.get(key) for key in ("lesion_count", "total_volume_ml")}
            writer.writerow(row)
