"""Result files of the suite: those of several processes joined into one, and read back."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_benchmark.stats import Stats

from benchmarks.contest import too_short

__all__ = ["Record", "Run", "join", "load"]


@dataclass(frozen=True)
class Record:
    """One contestant of one group.

    Attributes:
        group, name: together unique.
        processes: seconds a call by process of the run and by round, in the order of the rounds, which all contestants
            of the group share.
        info: what the suite noted, see ``benchmarks/conftest.py``.
    """

    group: str
    name: str
    processes: tuple[tuple[float, ...], ...]
    info: dict[str, Any]

    @property
    def seconds(self) -> list[float]:
        """Of all processes."""
        return list(itertools.chain.from_iterable(self.processes))

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


def join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the processes of one run wrote, as one.

    A contestant that all of them timed gets the rounds of all; what else is known of it is what the first noted.
    Another one is absent, with the process that has no time of it.
    """
    others = [{(one["group"], one["name"]): one for one in part["benchmarks"]} for part in parts[1:]]
    benchmarks = []
    lost: dict[str, dict[str, str]] = {}  # by group and name, why
    for first in parts[0]["benchmarks"]:
        key = first["group"], first["name"]
        without = [number for number, other in enumerate(others, 2) if key not in other]
        if without:
            lost.setdefault(first["group"], {})[first["name"]] = f"no time in process {without[0]} of the run"
            continue
        every = [first, *(other[key] for other in others)]
        stats = Stats()
        stats.data = [seconds for one in every for seconds in one["stats"]["data"]]
        counts = [len(one["stats"]["data"]) for one in every]
        lasted = sum(one["stats"]["iterations"] * sum(one["stats"]["data"]) for one in every)
        noted = {"rounds_by_process": counts, "too_short": too_short(sum(counts), lasted)}
        benchmarks.append(
            first
            | {
                "stats": first["stats"] | stats.as_dict() | {"data": stats.data},
                "extra_info": first["extra_info"] | noted,
            }
        )
    for one in benchmarks:
        one["extra_info"]["absent"] = one["extra_info"].get("absent", {}) | lost.get(one["group"], {})
    return parts[0] | {"benchmarks": benchmarks}


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
        rounds = iter(one["stats"]["data"])
        counts = one["extra_info"].get("rounds_by_process", [one["stats"]["rounds"]])
        processes = tuple(tuple(itertools.islice(rounds, count)) for count in counts)
        record = Record(one["group"], one["name"], processes, one["extra_info"])
        groups.setdefault(record.group, {})[record.name] = record
    return Run(groups, data["machine_info"], data["commit_info"], data["datetime"], data["command"], data["quick"])
