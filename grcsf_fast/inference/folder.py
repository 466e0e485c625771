"""A folder of volumes to a folder of masks: resumed where it stopped, shared by processes, every failure on record."""

from __future__ import annotations

import itertools
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.channels import Channels
from ..data.failures import FAILURES_NAME, change_failures, note_failures, read_failures
from ..data.files import remove_partial, sha256, volume_files
from ..data.images import OneChannel
from ..data.mask_files import MASK_FORMATS, mask_endings
from ..errors import ArgumentError, UnfinishedError
from ..runtime.precision import PRECISIONS
from ..runtime.processes import World, gathered, said_by_first
from .case import in_lanes, predict_case
from .lanes import Case, Failure, Work
from .model import Model
from .page import PAGE_NAME, write_folder_page
from .prediction import check_same_input, output_names, read_report, same_channels
from .share import SUMMARY_NAME, Share, write_rows
from .sources import file_of, files_of, origin_of, source_sha256

__all__ = [
    "SUMMARY_NAME",
    "CaseResult",
    "Done",
    "Failed",
    "Finished",
    "Plan",
    "check_names",
    "earlier_precision",
    "is_finished",
    "plan",
    "predict_cases",
    "shard",
]

Image = Path | OneChannel | Channels
STAGES = ("read", "prepare", "residual_maps", "segmentation", "restore", "save")
MOST_OTHERS = 100  # results of other runs that are looked at for their precision
SECONDS_A_RECORD = 5.0  # least, between two writings of the failures
FIGURES = ("lesion_count", "total_volume_ml")  # of a report; of several labels also of each


@dataclass(frozen=True)
class Plan:
    """What is to be done, the same in all processes.

    Attributes:
        cases: name -> file, one channel of it, or several channels.
        problems: further entries that cannot be cases: name -> why.
        names: of this process's cases, the largest first.
        folder: that was looked through for all of them; empty: they are of a list.
        share: that this run has of them; None: all.
    """

    cases: Mapping[str, Image]
    problems: Mapping[str, Exception]
    names: list[str]
    folder: str = ""
    share: Share | None = None


def plan(
    cases: Mapping[str, Image], problems: Mapping[str, Exception], world: World, folder: str | Path = "",
    share: Share | None = None,
) -> Plan:  # fmt: skip
    """This process's part of what the first process sees: a folder that changes must not look different to two."""
    if share is not None:
        cases, problems = ({name: one for name, one in all_.items() if share.has(name)} for all_ in (cases, problems))
    sizes = {}
    for name, path in cases.items():
        try:
            sizes[name] = sum(file.stat().st_size for file in volume_files(file_of(path)))
        except OSError:
            sizes[name] = 0  # reading it will say why
    cases, problems, sizes = said_by_first(world, lambda: (cases, problems, sizes))
    folder = os.path.abspath(folder) if folder else ""
    return Plan(cases, problems if world.rank == 0 else {}, shard(sizes, world), folder, share)


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


def check_names(
    source: str | Path, output: str | Path, cases: Iterable[str], folders: Iterable[Path] | None = None
) -> None:
    """See that no result can take the place of an input or of another case's result.

    Args:
        source: a file or a folder, or a list of cases.
        output: folder for the results.
        cases: names.
        folders: that hold inputs, or masks of them; None: the source, or the folder that it is in.

    Raises:
        ArgumentError: the folder of the input is that of the output; or a case is named like a residual map of another.
    """
    if folders is None:
        folders = [Path(source).parent if Path(source).is_file() else Path(source)]
    if Path(output).resolve() in {folder.resolve() for folder in folders}:
        raise ArgumentError(f"{output}: expected another folder than the input's, whose volumes it would replace")
    cases = set(cases)
    for name in sorted(cases):
        places = [found.start() for found in re.finditer("_residual", name)]
        if of := [name[:place] for place in places if name[:place] in cases]:
            raise ArgumentError(f"{source}: expected no case named like a result of {of[0]}, found {name}")


def earlier_precision(output: Path, names: Iterable[str], settings: Mapping[str, Any]) -> str | None:
    """The precision of results that a folder holds already, of the same settings in all else; None: there are none.

    Those of the cases of these names come first; some of other runs count as well.
    """
    own = (output / f"{name}_report.json" for name in names)
    for path in itertools.chain(own, itertools.islice(output.glob("*_report.json"), MOST_OTHERS)):
        found = read_report(path).get("settings")
        precision = found.get("precision") if isinstance(found, dict) else None
        if precision in PRECISIONS and found == {**settings, "precision": precision}:
            return precision
    return None


def is_finished(report: Path, source: Image, settings: Mapping[str, Any], outputs: list[str]) -> bool:
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
    if not same_channels(found, origin_of(source, settings.get("channels", ()))):
        return False
    files = {report.parent / name: expected for name, expected in found["outputs"].items()}
    try:
        whole = all(path.is_file() and sha256(path) == expected for path, expected in files.items())
        read = all(volume_files(file) for file in files_of(source))
        return whole and read and source_sha256(source) == found.get("input_sha256")
    except OSError:
        return False  # whatever cannot be read is named when it is tried


def predict_cases(
    model: Model,
    todo: Plan,
    output: str | Path,
    overwrite: bool,
    maps: bool,
    overlay: bool,
    page: bool,
    memory: int | None,
    world: World,
    mask_format: str = "nifti",
) -> Iterator[CaseResult]:
    """See :meth:`grcsf_fast.Predictor.predict_folder`."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    settings = model.settings()
    ratios = model.bundle.residual_maps.mask_ratios if maps and model.mae is not None else ()
    endings = {name: mask_endings(file_of(todo.cases[name]), mask_format) for name in todo.names}
    files = {name: output_names(name, ratios, overlay, endings[name]) for name in todo.names}
    if world.rank == 0:
        read_failures(output)  # a file of another kind in its place is refused before anything is done
    remove_partial(output, _all_names(model, todo))

    def case(name: str) -> Work[Done | Finished]:
        """From the file to its results on disk."""
        report = output / f"{name}_report.json"
        if not overwrite and is_finished(report, todo.cases[name], settings, files[name]):
            return Finished(name, read_report(report))
        if not overwrite:
            source = todo.cases[name]
            check_same_input(report, origin_of(source, model.bundle.channels), lambda: source_sha256(source))
        prediction = yield from predict_case(model, todo.cases[name], name)
        began = time.perf_counter()
        prediction.save(output, name, maps, overlay, mask_format, overwrite)
        prediction.seconds["save"] = time.perf_counter() - began
        slices = len(prediction.prepared.foreground.flatten(0, 1).any(0).nonzero())
        return Done(name, prediction.report, prediction.seconds, slices)

    if todo.share is not None and world.rank == 0:
        todo.share.remove_others(output)
    names = {path: name for name, path in todo.cases.items()}
    cases = (Case(todo.cases[name], case(name)) for name in todo.names)
    labels = () if model.bundle.labels is None else model.bundle.labels.names
    record = _Record(output, todo, page, world, labels, settings)
    with closing(record), closing(in_lanes(model, cases, False, None, memory)) as results:
        for name, problem in todo.problems.items():
            yield record.noted(Failed(name, os.path.join(todo.folder, name), str(problem), ""))
        for result in results:
            if isinstance(result, Failure):
                source = result.source
                result = Failed(names[source], os.path.abspath(file_of(source)), result.message, result.traceback)
            yield record.noted(result)
        yield from record.completed()


def _all_names(model: Model, todo: Plan) -> set[str]:
    """The files that runs of these cases write, with any options."""
    names = {FAILURES_NAME, SUMMARY_NAME, PAGE_NAME, *([todo.share.summary_name] if todo.share else [])}
    for name in todo.names:
        endings = {ending for one in MASK_FORMATS for ending in mask_endings(file_of(todo.cases[name]), one)}
        names |= {f"{name}_report.json", *output_names(name, model.bundle.residual_maps.mask_ratios, True, [*endings])}
    return names


@dataclass(frozen=True)
class Done:
    """A case whose files were written.

    Attributes:
        name: of the case.
        report: as on disk, but for the hashes of the files.
        seconds: that each stage took.
        slices: that the networks saw.
    """

    name: str
    report: dict[str, Any]
    seconds: dict[str, float]
    slices: int

    def row(self) -> dict[str, Any]:
        """What the case adds to ``summary.csv``."""
        stages = {stage: round(self.seconds.get(stage, 0.0), 3) for stage in STAGES}
        return {"status": "done", "seconds": round(sum(self.seconds.values()), 3)} | stages


@dataclass(frozen=True)
class Finished:
    """A case whose files were there, and its report."""

    name: str
    report: dict[str, Any]

    def row(self) -> dict[str, Any]:
        return {"status": "done"}


@dataclass(frozen=True)
class Failed:
    """A case that could not be done.

    Attributes:
        name: of the case, or of an entry of the folder that is none.
        input: its file.
        error: one line; a traceback where nobody foresaw the error.
        traceback: of the error.
    """

    name: str
    input: str
    error: str
    traceback: str

    def row(self) -> dict[str, Any]:
        lines = [line for line in self.error.splitlines() if line.strip()] or ["unknown"]
        # Of a traceback the first line and the last.
        reason = " ".join(dict.fromkeys((lines[0], lines[-1])))
        return {"status": "failed", "input": self.input, "error": reason}


CaseResult = Done | Finished | Failed


class _Record:
    """What became of the cases, in ``summary.csv``, the failures' files and the page; most of it by the first process.

    It never ends a run: what cannot be written is said, and tried again.
    """

    def __init__(
        self, output: Path, todo: Plan, page: bool, world: World, labels: Sequence[str], settings: Mapping[str, Any]
    ) -> None:
        self.output, self.todo, self.page, self.world, self.settings = output, todo, page, world, settings
        # Of each label the same figures as of all together, by its name.
        self.of_labels = {f"{label}_{key}": (label, key) for label in labels for key in FIGURES}
        self.columns = ("case", "input", "status", *FIGURES, *self.of_labels, "seconds", *STAGES, "error")
        self.failures: dict[str, Failed] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.whole = False  # no case was left out by an interruption
        self._written = 0.0

    def noted(self, result: CaseResult) -> CaseResult:
        self.rows[result.name] = result.row()
        if isinstance(result, Failed):
            self.failures[result.name] = result
            if time.monotonic() > self._written + SECONDS_A_RECORD:
                try:
                    self._write_failures()
                except OSError as error:
                    warnings.warn(f"{self.output}: failures could not be noted yet: {error}", stacklevel=2)
                self._written = time.monotonic()
        return result

    def completed(self) -> list[Failed]:
        """Waits for all processes; the failures of the others, where this is the first one."""
        own = set(self.failures)
        for failures, rows in gathered(self.world, (self.failures, self.rows)):
            self.failures |= failures
            self.rows |= rows
        self.whole = True
        return [failed for name, failed in self.failures.items() if name not in own and self.world.rank == 0]

    def close(self) -> None:
        """Write all; one file that cannot be written keeps no other from it.

        Raises:
            UnfinishedError: one could not be written.
        """
        steps = [self._write_failures, self._write_summary] if self.world.rank == 0 else []
        if self.world.rank and not self.whole:
            steps = [self._write_failures]
        errors = []
        for step in steps:
            try:
                step()
            except OSError as error:
                errors.append(error)
        if errors:
            raise UnfinishedError(
                f"{self.output}: what became of the cases could not be written: {errors[0]}; the same command does it, "
                "and leaves finished cases as they are"
            ) from errors[0]

    def _write_failures(self) -> None:
        """The failures of this run, and those of an earlier one whose cases this one has not done.

        A whole run has looked at all entries of its folder, or of its share of them: what else failed of these before
        is there no more, or no problem any more.
        """

        share, rank, failures = self.todo.share, self.world.rank, self._failures()
        if share is None and not rank:
            change_failures(self.output, failures, self._is_over)
            return
        part = ".".join([*([share.part] if share is not None else []), *([str(rank)] if rank else [])])
        note_failures(self.output, part, failures, self._is_over)
        # What a run in other shares noted of cases that are done now.
        if not rank and any(
            name not in failures and self._is_over(name, one) for name, one in read_failures(self.output).items()
        ):
            change_failures(self.output, failures, self._is_over)

    def _failures(self) -> dict[str, dict[str, str]]:
        return {
            name: {"input": failed.input, "error": failed.error, "traceback": failed.traceback}
            for name, failed in self.failures.items()
        }

    def _is_over(self, name: str, failure: Mapping[str, str]) -> bool:
        share, folder = self.todo.share, self.todo.folder
        looked_at = self.whole and folder and os.path.dirname(failure["input"]) == folder
        return name in self.rows or bool(looked_at and (share is None or share.has(name)))

    def _write_summary(self) -> None:
        """A row per case; those that an interrupted run has not reached are "missing". Then the page.

        What its other processes did is known by its reports alone then. Of shares the one that ends last writes the
        table, the page and the failures of all.
        """
        rows = {name: self._row(name) for name in {*self.todo.cases, *self.rows}}
        if self.todo.share is not None:
            write_rows(self.output / self.todo.share.summary_name, self.columns, rows)
            rows = self.todo.share.combined(self.output)
            if rows is None:
                return
            done = {name for name, row in rows.items() if row["status"] == "done"}
            change_failures(self.output, self._failures(), lambda name, one: name in done or self._is_over(name, one))
        write_rows(self.output / SUMMARY_NAME, self.columns, rows)
        # Not of an interrupted run: who stops it should not wait for the pictures of all cases.
        if self.page and self.whole:
            write_folder_page(self.output, rows)

    def _row(self, name: str) -> dict[str, Any]:
        row = {"input": str(self.todo.cases.get(name, "")), "status": "missing"} | self.rows.get(name, {})
        report = read_report(self.output / f"{name}_report.json")
        if name not in self.rows and self.world.size > 1 and report.get("settings") == self.settings:
            row["status"] = "done"
        if row["status"] == "done":
            row |= {key: report.get(key) for key in FIGURES}
            own = report.get("labels", {})
            row |= {column: own.get(label, {}).get(key) for column, (label, key) in self.of_labels.items()}
        return row
