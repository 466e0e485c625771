"""The record of a folder's cases that failed: ``failures.json``, and beside it those of further programs at work.

Only the first of several processes writes ``failures.json``, when all have ended. Until then, and for good where they
were interrupted, the others have ``failures.1.json`` and so on; who reads the record reads all.
Programs that share a folder change the record one after the other.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ArgumentError
from .files import replace_when_done

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["FAILURES_NAME", "alone", "change_failures", "note_failures", "read_failures"]

FAILURES_NAME = "failures.json"
LOCK_NAME = ".lock"  # of a folder that cannot be locked itself
SECONDS_OF_A_CHANGE = 10.0


# Of a process, of a share of the cases, or of a process that works on a share.
PART = re.compile(r"failures\.[0-9]+(-of-[0-9]+)?(\.[0-9]+)?\.json")


def _file(folder: str | Path, part: str = "") -> Path:
    return Path(folder) / (f"failures.{part}.json" if part else FAILURES_NAME)


def _parts(folder: str | Path) -> list[Path]:
    others = [path for path in Path(folder).glob("failures.*.json") if PART.fullmatch(path.name)]
    return [path for path in (_file(folder), *sorted(others)) if path.is_file()]


def read_failures(folder: str | Path) -> dict[str, dict[str, str]]:
    """Case name -> ``"input"``, ``"error"`` and ``"traceback"``; empty where nothing failed.

    Raises:
        ArgumentError: a file of such a name that holds something else; the message names it.
    """
    return _failures_in(_read(_parts(folder)))


def _read(parts: Iterable[Path]) -> dict[Path, bytes]:
    """What they hold; without those that another program has just put together with the others."""
    contents = {}
    for path in parts:
        with suppress(FileNotFoundError):
            contents[path] = path.read_bytes()
    return contents


def _failures_in(contents: Mapping[Path, bytes]) -> dict[str, dict[str, str]]:
    failures = {}
    for path, content in contents.items():
        try:
            for name, one in json.loads(content.decode()).items():
                failures[name] = {"input": "", "traceback": "", "error": str(one["error"])} | one
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArgumentError(
                f"{path}: expected the failures that predict notes, could not read them: {error!r}"
            ) from error
    return failures


def note_failures(
    folder: str | Path,
    part: str,
    add: Mapping[str, Mapping[str, str]],
    over: Callable[[str, Mapping[str, str]], bool] = lambda name, failure: False,
) -> None:
    """Note failures in a part of the record, which one program alone writes to.

    Args:
        folder: of the predictions.
        part: a process's number from 1, a share as ``"3-of-50"``, or both with a point between them.
        add: as :func:`read_failures` has them.
        over: as for :func:`change_failures`.

    Raises:
        ArgumentError: as :func:`read_failures`.
        OSError: it cannot be written.
    """
    path = _file(folder, part)
    with alone(folder):
        before = _failures_in(_read([path]))
        failures = {**{name: one for name, one in before.items() if not over(name, one)}, **add}
        if not failures:
            path.unlink(missing_ok=True)
        elif failures != before:
            _write(path, failures)


def _write(path: Path, failures: Mapping[str, Mapping[str, str]]) -> None:
    with replace_when_done(path) as (part,):
        part.write_text(json.dumps(dict(sorted(failures.items())), indent=2) + "\n")


def change_failures(
    folder: str | Path,
    add: Mapping[str, Mapping[str, str]],
    over: Callable[[str, Mapping[str, str]], bool] = lambda name, failure: False,
) -> None:
    """Note failures in one file of the record, in place of all there are.

    Args:
        folder: of the predictions.
        add: as :func:`read_failures` has them.
        over: whether a case that failed before has not failed any more.

    Raises:
        ArgumentError: as :func:`read_failures`.
        OSError: it cannot be written.
    """
    with alone(folder):
        _change(folder, add, over)


@contextmanager
def alone(folder: str | Path) -> Iterator[None]:
    """No other program changes the record or the tables beside it; without such locks nothing is waited for.

    It is the folder that is locked or, on NFS, which locks what is open for writing alone, a file in it.
    """
    if fcntl is None or not os.path.isdir(folder):
        yield
        return
    held = None
    try:
        for path, flags in ((folder, os.O_RDONLY), (Path(folder, LOCK_NAME), os.O_RDWR | os.O_CREAT)):
            try:
                held = os.open(path, flags, 0o666)
                _lock(held)
                break
            except OSError:
                if held is not None:
                    os.close(held)
                held = None
        yield
    finally:
        if held is not None:
            os.close(held)


def _lock(held: int) -> None:
    """For as long as another program may take to change the record; who holds a folder longer has another purpose."""
    assert fcntl is not None
    until = time.monotonic() + SECONDS_OF_A_CHANGE
    while time.monotonic() < until:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.05)


def _change(
    folder: str | Path,
    add: Mapping[str, Mapping[str, str]],
    over: Callable[[str, Mapping[str, str]], bool],
) -> None:
    contents = _read(_parts(folder))
    before = _failures_in(contents)
    failures = {**{name: one for name, one in before.items() if not over(name, one)}, **add}
    path = _file(folder)
    if failures and (failures != before or [*contents] != [path]):
        _write(path, failures)
    for part, content in contents.items():
        # Where no lock holds: what another has written meanwhile was not read.
        if (part != path or not failures) and _read([part]) == {part: content}:
            part.unlink(missing_ok=True)
