"""A folder of volumes to a folder of masks: resumed where it stopped, shared by processes, every failure on record."""

from __future__ import annotations

import csv
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .data.files import remove_partial, replace_when_done
from .lanes import Failure
from .predict import Prediction, Predictor, output_names, read_report, sha256

__all__ = ["FAILURES_NAME", "SUMMARY_NAME", "Outcome", "Share", "is_finished", "one_of_many", "predict_folder", "shard"]

FAILURES_NAME, SUMMARY_NAME = "failures.json", "summary.csv"
STAGES = ("read", "prepare", "residual_maps", "segmentation", "restore", "save")
COLUMNS = ("case", "input", "status", "lesion_count", "total_volume_ml", "seconds", *STAGES, "error")


@dataclass(frozen=True)
class Share:
    """Which part of the cases is this process's, as torchrun says it.

    Attributes:
        rank: number of the process.
        world: processes in all.
        local_rank: number among those of this machine; that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0


@dataclass
class Outcome:
    """What became of the cases.

    Attributes:
        failures: name -> what failed, of all processes.
        finished_before: cases of this process that an earlier run had finished.
        rows: name -> what this process adds to ``summary.csv``.
    """

    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    finished_before: int = 0
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)


@contextmanager
def one_of_many() -> Iterator[Share]:
    """This process's share, and all processes together at the end: none exits before the last one is done.

    Processes are those of ``torchrun``; without it there is one. If one dies, torchrun ends the others, and the same
    command again does what is left.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = [os.environ.get(name) for name in names]
    if None in found or found[1] == "1":
        yield Share()
        return
    import torch.distributed as distributed

    distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        yield Share(*map(int, found))
    finally:
        distributed.destroy_process_group()


def shard(cases: Mapping[str, Path], share: Share) -> list[str]:
    """The names of this process's cases, the largest first: each goes to the process that has least so far."""
    sizes = {name: path.stat().st_size for name, path in cases.items()}
    loads = [0] * share.world
    mine = []
    for name in sorted(cases, key=lambda one: (-sizes[one], one)):
        least = loads.index(min(loads))
        loads[least] += sizes[name] + 1
        if least == share.rank:
            mine.append(name)
    return mine


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
    if found.get("input_sha256") != sha256(source):
        return False
    files = {report.parent / name: expected for name, expected in found["outputs"].items()}
    return all(path.is_file() and sha256(path) == expected for path, expected in files.items())


def predict_folder(
    predictor: Predictor,
    cases: Mapping[str, Path],
    output: str | Path,
    *,
    problems: Mapping[str, Exception] | None = None,
    overwrite: bool = False,
    maps: bool = True,
    overlay: bool = True,
    memory: int | None = None,
    share: Share | None = None,
    done: Callable[[str, dict[str, Any] | None, int], None] = lambda name, report, slices: None,
) -> Outcome:
    """Segment many files; a bad one is noted and the others are done.

    A case whose files are there, of the same input, weights and settings, is left as it is. ``summary.csv`` and, if
    something failed, ``failures.json`` are written to ``output``, also when the run is interrupted.

    Args:
        predictor: to use.
        cases: name -> file.
        output: folder for the results.
        problems: further entries that cannot be cases: name -> why; they count as failures.
        overwrite: do finished cases again.
        maps: with residual maps.
        overlay: with pictures.
        memory: see :meth:`Predictor.predict_many`.
        share: which of the cases; None: all.
        done: called in this thread with a case's name, its report (None: failed) and its slices (0: finished before).

    Returns:
        What became of them.
    """
    share = share or Share()
    output = Path(output)
    outcome = Outcome()
    names = shard(cases, share)
    settings = predictor.settings()
    ratios = predictor.bundle.residual.ratios if maps and predictor.network.rcu else ()
    files = {name: output_names(name, ratios, overlay) for name in names}
    remove_partial(output, {file for name in names for file in (*files[name], f"{name}_report.json")})
    remove_partial(output, {FAILURES_NAME, SUMMARY_NAME})
    order: list[str] = []

    def unfinished() -> Iterator[Path]:
        for name in names:
            report = output / f"{name}_report.json"
            if not overwrite and is_finished(report, cases[name], settings, files[name]):
                outcome.finished_before += 1
                done(name, read_report(report), 0)
                continue
            order.append(name)
            yield cases[name]

    def finish(prediction: Prediction) -> tuple[dict[str, Any], dict[str, float], int]:
        began = time.perf_counter()
        name = by_path[prediction.prepared.volume.name]
        prediction.save(output, name, maps, overlay)
        prediction.seconds["save"] = time.perf_counter() - began
        return prediction.report, prediction.seconds, len(prediction.prepared.head.flatten(0, 1).any(0).nonzero())

    by_path = {str(path): name for name, path in cases.items()}

    def fail(name: str, source: Path | str, error: str, text: str) -> None:
        outcome.failures[name] = {"input": str(source), "error": error, "traceback": text}
        outcome.rows[name] = {"status": "failed", "input": str(source), "error": error.splitlines()[0]}
        if share.world == 1:
            _write_failures(output, outcome.failures)
        done(name, None, 0)

    try:
        if share.rank == 0:
            for name, problem in (problems or {}).items():
                fail(name, name, str(problem), "")
        results = predictor.predict_many(unfinished(), failures="return", ordered=False, memory=memory, finish=finish)
        for result in results:
            if isinstance(result, Failure):
                fail(by_path[str(result.source)], result.source, result.message, result.traceback)
                continue
            report, seconds, slices = result
            name = by_path[report["input"]]
            outcome.rows[name] = {"seconds": round(sum(seconds.values()), 3)} | {
                stage: round(seconds.get(stage, 0.0), 3) for stage in STAGES
            }
            done(name, report, slices)
        if share.world > 1:
            _gather(outcome, share)
    finally:
        if share.rank == 0:
            _write_failures(output, outcome.failures)
            _write_summary(output, cases, outcome)
    return outcome


def _gather(outcome: Outcome, share: Share) -> None:
    """Waits for all processes; each then knows every failure, and the first one every row of the summary."""
    import torch.distributed as distributed

    every: list[Any] = [None] * share.world
    distributed.all_gather_object(every, (outcome.failures, outcome.rows))
    for failures, rows in every:
        outcome.failures.update(failures)
        outcome.rows.update(rows)


def _write_failures(output: Path, failures: Mapping[str, Any]) -> None:
    path = output / FAILURES_NAME
    if failures:
        with replace_when_done(path) as (part,):
            part.write_text(json.dumps(dict(sorted(failures.items())), indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)


def _write_summary(output: Path, cases: Mapping[str, Path], outcome: Outcome) -> None:
    """A row a case, of what the reports say now."""
    with replace_when_done(output / SUMMARY_NAME) as (part,), part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name in sorted({*cases, *outcome.rows}):
            row = {"case": name, "input": str(cases.get(name, "")), "status": "missing"}
            report = read_report(output / f"{name}_report.json")
            if report and name not in outcome.failures:
                row |= {"status": "done", **{key: report.get(key) for key in ("lesion_count", "total_volume_ml")}}
            writer.writerow(row | outcome.rows.get(name, {}))


def device_of(share: Share, device: str) -> str:
    """``auto`` and ``cuda`` are the GPU of this process's number on its machine."""
    if share.world > 1 and torch.cuda.is_available() and device in ("auto", "cuda"):
        return f"cuda:{share.local_rank % torch.cuda.device_count()}"
    return device
