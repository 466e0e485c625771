"""What became of the cases of a folder: a row of ``summary.csv`` each, ``failures.json`` and the page."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.failures import alone, change_failures, note_failures, read_failures
from ..data.page import is_page
from ..data.reports import REPORT, is_report, run_of
from ..errors import ArgumentError, UnfinishedError
from ..runtime.processes import World, gathered
from .page import PAGE_NAME, TITLE, shown_report, write_folder_page
from .plan import Plan
from .share import RUN, SUMMARY_NAME, is_table, read_rows, write_rows
from .sources import file_of

__all__ = ["STAGES", "CaseResult", "Done", "Failed", "Finished", "Record", "check_record", "note_alone"]

STAGES = ("read", "prepare", "residual_maps", "segmentation", "restore", "save")
SECONDS_A_RECORD = 5.0  # least, between two writings of the failures
FIGURES = ("lesion_count", "total_volume_ml")  # of a report; of several labels also of each
OF_CALCIUM = ("agatston",)  # beside them, of lesions that are counted above some Hounsfield units
TIMES = ("seconds", *STAGES)  # of the run that did a case


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


class Record:
    """What became of the cases, in ``summary.csv``, the failures' files and the page; most of it by the first process.

    It never ends a run: what cannot be written is said, and tried again.
    """

    def __init__(
        self, output: Path, todo: Plan, page: bool, world: World, labels: Sequence[str], settings: Mapping[str, Any]
    ) -> None:
        self.output, self.todo, self.page, self.world, self.settings = output, todo, page, world, settings
        # Of each label the same figures as of all together, by its name.
        figures = (*FIGURES, *(OF_CALCIUM if "above_hu" in settings else ()))
        of_labels = (f"{label}_{key}" for label in labels for key in figures)
        self.columns = ("case", "input", "status", *figures, *of_labels, *TIMES, "remarks", "error")
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
        """A row per case; those that an interrupted run has not reached and that are not finished are "missing". Then
        the page.

        What its other processes or earlier runs did is known by the reports alone then. Of shares the one that ends
        last writes the table, the page and the failures of all. A repetition with nothing new writes none of them.
        """
        # Of a case that failed since, the report is the one from before.
        failed = {} if self.whole or self.world.size > 1 else read_failures(self.output)
        before = self._before()
        rows = {name: self._row(name, name not in failed, before) for name in {*self.todo.cases, *self.rows}}
        if self.todo.share is not None:
            run = run_of(self.settings)
            marked = {name: row | {RUN: run} for name, row in rows.items()}
            write_rows(self.output / self.todo.share.summary_name, (*self.columns, RUN), marked)
            rows = self.todo.share.combined(self.output, run)
            if rows is None:
                return
            done = {name for name, row in rows.items() if row["status"] == "done"}
            change_failures(self.output, self._failures(), lambda name, one: name in done or self._is_over(name, one))
        rows = _of_others(self.output, rows, before) | rows
        write_rows(self.output / SUMMARY_NAME, self.columns, rows)
        # Not of an interrupted run: who stops it should not wait for the pictures of all cases.
        if self.page and self.whole and not self._has_page(rows):
            write_folder_page(self.output, rows)

    def _before(self) -> dict[str, dict[str, str]]:
        """The rows that earlier runs have written."""
        found = {}
        for name in (SUMMARY_NAME, *([] if self.todo.share is None else [self.todo.share.summary_name])):
            with suppress(FileNotFoundError, ValueError):
                found |= read_rows(self.output / name)
        return found

    def _has_page(self, rows: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether the page was written after the table, which an interrupted run writes alone, and all reports."""
        reports = [self.output / f"{name}{REPORT}" for name, row in rows.items() if row["status"] == "done"]
        try:
            written = (self.output / PAGE_NAME).stat().st_mtime_ns
            return all(file.stat().st_mtime_ns <= written for file in (self.output / SUMMARY_NAME, *reports))
        except FileNotFoundError:
            return False

    def _row(self, name: str, by_report: bool, before: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        """Of a case; ``by_report``: whether a report of these settings is enough for one that was not reached."""
        file = file_of(self.todo.cases[name]) if name in self.todo.cases else None
        row = {"input": os.path.abspath(file) if file else "", "status": "missing"} | self.rows.get(name, {})
        report = shown_report(self.output / f"{name}{REPORT}")
        if name not in self.rows and by_report and report.get("settings") == self.settings:
            row["status"] = "done"
        done = report and row["status"] == "done"
        return _times(before.get(name, {}), report) | row | _found(report) if done else row


def _of_others(
    output: Path, names: Collection[str], before: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """Rows of what a folder holds of other cases than those of these names: what failed, and by its report is done."""
    found = {
        name: Failed(name, one["input"], one["error"], one["traceback"]).row()
        for name, one in read_failures(output).items()
        if name not in names
    }
    for path in output.glob(f"*{REPORT}"):
        name = path.name.removesuffix(REPORT)
        if name in names or name in found:
            continue
        report = shown_report(path)
        # Neither somebody else's, nor a copy under another name.
        if is_report(report) and report["case"] == name:
            found[name] = {"status": "done"} | _times(before.get(name, {}), report) | _found(report)
    return found


def _times(before: Mapping[str, str], report: Mapping[str, Any]) -> dict[str, str]:
    """The seconds in an earlier row of a case, where that is of the result that the report has."""
    same = all(before.get(key) == str(report.get(key)) for key in FIGURES)
    return {key: before.get(key, "") for key in TIMES} if same else {}


def _found(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a report adds to the row of a case: its input, figures of all lesions and of each label, and remarks."""
    figures = (*FIGURES, *(key for key in OF_CALCIUM if key in report))
    remarks = "; ".join(map(str, report.get("remarks") or []))
    found = {key: report.get(key) for key in ("input", *figures)} | {"remarks": remarks}
    return found | {
        f"{label}_{key}": own.get(key) for label, own in report.get("labels", {}).items() for key in figures
    }


def check_record(output: Path, todo: Plan, page: bool) -> None:
    """See that the tables and the page of a run take the place of none but those of an earlier one.

    Raises:
        ArgumentError: of a file of somebody else; the message names it.
    """
    tables = [SUMMARY_NAME, *([] if todo.share is None else [todo.share.summary_name])]
    for name in (*tables, *([PAGE_NAME] if page else [])):
        path = output / name
        ours = is_page(path, TITLE) if name == PAGE_NAME else is_table(path)
        if os.path.lexists(path) and not ours:
            also = ", or --no-page" if name == PAGE_NAME else ""
            raise ArgumentError(
                f"{path}: expected no file, or one of an earlier prediction, found another one, which this one's would "
                f"replace; choose another folder{also}, or take it away"
            )


def note_alone(output: str | Path, result: Done | Failed, page: bool) -> None:
    """Bring the tables and the page of a folder of results up to date with a case that was predicted by itself.

    Args:
        output: folder; without a table that has the case nothing is done.
        result: what became of the case; of one that is done its report is on disk.
        page: whether the page, if there is one, is written again.

    Raises:
        OSError: a file cannot be written.
    """
    output, of_all = Path(output), {}
    row = {"input": "", "error": "", **result.row()}
    if isinstance(result, Done):
        row |= {**_found(result.report), RUN: run_of(result.report["settings"])}
    with alone(output):
        for path in (*output.glob("summary.*-of-*.csv"), output / SUMMARY_NAME):
            try:
                rows = read_rows(path)
            except (FileNotFoundError, ValueError):  # also somebody's table
                continue
            columns = [column for column in rows.get(result.name, {}) if column]
            if "error" not in columns:  # none of this case
                continue
            kept = {RUN: rows[result.name].get(RUN, ""), "case": result.name}
            rows[result.name] = dict.fromkeys(columns, "") | kept | row
            write_rows(path, columns, rows)
            of_all = rows if path.name == SUMMARY_NAME else {}
    # One that has not reached all cases left the page of an earlier run as it was.
    whole = all(one["status"] != "missing" for one in of_all.values())
    if of_all and whole and page and is_page(output / PAGE_NAME, TITLE):
        write_folder_page(output, of_all)
