"""Result files of the suite, as `make bench` writes them, read back."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Record", "Run", "load"]


@dataclass(frozen=True)
class Record:
    """One contestant of one group.

    Attributes:
        group, name: together unique.
        seconds: a call, by round, in the order of the rounds, which all contestants of the group share.
        info: what the suite noted, see ``benchmarks/conftest.py``.
    """

    group: str
    name: str
    seconds: tuple[float, ...]
    info: dict[str, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Run:
    """A result file.

    Attributes:
        groups: by group and contestant, in the file's order.
        machine, commit: as noted when it ran.
        date, command: of the run.
        quick: whether the times are of ``--quick``.
    """

    groups: dict[str, dict[str, Record]]
    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    command: str
    quick: bool


def load(path: Path) -> Run:
    """
    Raises:
        ValueError: the file is not a result file of the suite.
    """
    data = json.loads(path.read_text())
    missing = {"benchmarks", "machine_info", "commit_info", "datetime", "command", "quick"} - set(data)
    if missing:
        raise ValueError(f"{path}: expected a result file of `make bench`, found none of {sorted(missing)} in it")
    groups: dict[str, dict[str, Record]] = {}
    for one in data["benchmarks"]:
        record = Record(one["group"], one["name"], tuple(one["stats"]["data"]), one["extra_info"])
        groups.setdefault(record.group, {})[record.name] = record
    return Run(groups, data["machine_info"], data["commit_info"], data["datetime"], data["command"], data["quick"])
