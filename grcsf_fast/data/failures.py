"""The record of a folder's cases that failed: ``failures.json``, and beside it those of further processes at work.

Only the first of several processes writes ``failures.json``, when all have ended. Until then, and for good where they
were interrupted, the others have ``failures.1.json`` and so on; who reads the record reads all.
Programs that share a folder change the record one after the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ArgumentError
from .files import replace_when_done

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["FAILURES_NAME", "change_failures", "note_failures", "read_failures"]

FAILURES_NAME = "failures.json"


def _file(folder: str | Path, rank: int = 0) -> Path:
    """Where a process has its part of the record."""
    return Path(folder) / (FAILURES_NAME if rank == 0 else f"failures.{rank}.json")


def _parts(folder: str | Path) -> list[Path]:
    others = [path for path in Path(folder).glob("failures.*.json") if path.name.split(".")[1].isdecimal()]
    return [path for path in (_file(folder), *sorted(others)) if path.is_file()]


def read_failures(folder: str | Path) -> dict[str, dict[str, str]]:
    """Case name -> ``"input"``, ``"error"`` and ``"traceback"``; empty where nothing failed.

    Raises:
        ArgumentError: a file of such a name that holds something else; the message names it.
    """
    failures = {}
    for path in _parts(folder):
        try:
            for name, one in json.loads(path.read_text()).items():
                failures[name] = {"input": "", "traceback": "", "error": str(one["error"])} | one
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArgumentError(
                f"{path}: expected the failures that predict notes, could not read them: {error!r}"
            ) from error
    return failures


def note_failures(folder: str | Path, rank: int, failures: Mapping[str, Mapping[str, str]]) -> None:
    """Write the part of a process, which is all that failed in it so far.

    Raises:
        OSError: it cannot be written.
    """
    with replace_when_done(_file(folder, rank)) as (part,):
        part.write_text(json.dumps(dict(sorted(failures.items())), indent=2) + "\n")


def change_failures(
    folder: str | Path, add: Mapping[str, Mapping[str, str]], done: Container[str] = (), gone: bool = False
) -> None:
    """Note failures in one file of the record, in place of all there are.

    Args:
        folder: of the predictions.
        add: as :func:`read_failures` has them.
        done: cases whose failures are over.
        gone: also leave out what failed for a file that is there no more.

    Raises:
        ArgumentError: as :func:`read_failures`.
        OSError: it cannot be written.
    """
    with _alone(folder):
        _change(folder, add, done, gone)


@contextmanager
def _alone(folder: str | Path) -> Iterator[None]:
    """No other program changes the record; where the file system has no such locks, nothing is waited for."""
    if fcntl is None or not os.path.isdir(folder):
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a network's file system, where a folder cannot be locked
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _change(folder: str | Path, add: Mapping[str, Mapping[str, str]], done: Container[str], gone: bool) -> None:
    before, parts = read_failures(folder), _parts(folder)
    kept = {
        name: one
        for name, one in before.items()
        if name not in done and not (gone and not os.path.exists(one["input"]))
    }
    failures = {**kept, **add}
    path = _file(folder)
    if failures and (failures != before or parts != [path]):
        note_failures(folder, 0, failures)
    for part in parts:
        if part != path or not failures:
            part.unlink(missing_ok=True)
