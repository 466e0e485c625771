"""A fixed share of the cases of a folder: for the jobs of an array, which share a folder of results and never meet."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.files import replace_when_done
from ..data.reports import cell_of, text_of
from ..errors import ArgumentError

__all__ = ["RUN", "SUMMARY_NAME", "Share", "is_table", "read_rows", "was_done", "write_rows"]

SUMMARY_NAME = "summary.csv"
# Names that are no UTF-8 go through as they are. Spreadsheets put a mark of the byte order in front.
READ: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
RUN = "run"  # column of a share's table
FIRST = ["case", "input", "status"]  # columns of every table, of all versions
TEXTS = (*FIRST, "remarks", "error", RUN)


@dataclass(frozen=True)
class Share:
    """One of several shares. A case's depends on its name alone, so it stays when other cases come or go.

    Attributes:
        number: from 1.
        of: shares in all.

    Raises:
        ArgumentError: a number that is none of these.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ArgumentError(f"share: expected a number from 1 to the number of shares, got {self}")

    @classmethod
    def parse(cls, text: str) -> Share:
        """``"3/50"``, the third of fifty."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if found is None:
            raise ArgumentError(f"share: expected K/N, such as 3/50, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def has(self, name: str) -> bool:
        """Whether a case of this name belongs to it."""
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.of == self.number - 1

    @property
    def part(self) -> str:
        """As files are named by it."""
        return f"{self.number}-of-{self.of}"

    @property
    def summary_name(self) -> str:
        """Of the table of its cases."""
        return f"summary.{self.part}.csv"

    def combined(self, output: Path, run: str) -> dict[str, dict[str, str]] | None:
        """The rows of all shares' tables; None as long as one is not there, or is one from before.

        Args:
            output: folder of results.
            run: what the tables of this array hold under ``run``, see :func:`~grcsf_fast.data.reports.run_of`.
        """
        rows: dict[str, dict[str, str]] = {}
        for number in range(1, self.of + 1):
            try:
                table = read_rows(output / Share(number, self.of).summary_name)
            except (FileNotFoundError, ValueError):  # also somebody else's
                return None
            # One that does not say of which array it is counts as one of this.
            if any(row.get(RUN, run) != run for row in table.values()):
                return None
            rows |= table
        return rows

    def remove_others(self, output: Path) -> None:
        """Tables of another number of shares, which say nothing of this one's."""
        for path in output.glob("summary.*-of-*.csv"):
            found = re.fullmatch(r"summary\.[0-9]+-of-([0-9]+)\.csv", path.name)
            if found is not None and int(found[1]) != self.of and is_table(path):
                with suppress(FileNotFoundError):
                    path.unlink()


def is_table(path: Path) -> bool:
    """Whether a file is a table of cases as this or an earlier version wrote it, by its first columns."""
    try:
        with path.open(**READ) as file:
            return next(csv.reader(file), [])[: len(FIRST)] == FIRST
    except (OSError, csv.Error):
        return False


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    """A table of cases, by name.

    Raises:
        OSError: it cannot be read.
        ValueError: another table, or none; the message names it.
    """
    rows = {}
    try:
        with path.open(**READ) as file:
            table = csv.DictReader(file)
            if [*(table.fieldnames or [])][: len(FIRST)] != FIRST:
                raise ValueError(f"{path}: expected a table that begins with {','.join(FIRST)}, found another one")
            for row in table:
                cells = {text_of(column): text_of(cell or "") for column, cell in row.items() if column is not None}
                rows[cells["case"]] = cells
    except csv.Error as error:
        raise ValueError(f"{path}: expected a table of cases, could not read it: {error}") from error
    return rows


def was_done(output: Path, name: str) -> bool:
    """Whether a table in a folder of results says that a case of this name was done."""
    for path in (output / SUMMARY_NAME, *output.glob("summary.*-of-*.csv")):
        with suppress(OSError, ValueError):
            if read_rows(path).get(name, {}).get("status") == "done":
                return True
    return False


def write_rows(path: Path, columns: Collection[str], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a table of cases, by name, unless its file is so already; without the columns that are not asked for.

    No text is one that spreadsheets take for a formula, see :func:`~grcsf_fast.data.reports.cell_of`.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(map(cell_of, columns))
    for name in sorted(rows):
        row = {"case": name} | dict(rows[name])
        writer.writerow(_cell(column, row.get(column, "")) for column in columns)
    content = text.getvalue().encode("utf-8", READ["errors"])
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    with replace_when_done(path) as (part,):
        part.write_bytes(content)


def _cell(column: str, value: Any) -> Any:
    """Figures of a table that was read are texts, and go back as the numbers they are."""
    with suppress(ValueError, TypeError):
        if column not in TEXTS:
            float(value)
            return value
    return cell_of(value)
