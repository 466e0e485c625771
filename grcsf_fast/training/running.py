"""The mark of a running training in its folder, ``running.json``: a second training there would mix with it.

No lock of the system: those of network file systems may hold on one machine alone, or not at all.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..data.files import is_running, this_machine
from .checkpoint import TrainError

__all__ = ["RUNNING_NAME", "Mark", "MarkLostError", "running"]

RUNNING_NAME = "running.json"
MOST_AGE = 3  # in times between two checkpoints, after which the mark of another machine is nobody's


class MarkLostError(TrainError):
    """A training whose mark is gone or another's: it must write no more."""


class Mark:
    """The mark of this process's training.

    Args:
        path: of the file, which holds ``text``.
        text: says which process it is.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def renew(self) -> None:
        """Make the mark as of now.

        Raises:
            MarkLostError: it is gone, or another training's.
            OSError: nobody can tell.
        """
        found = _read(self.path)
        if found != self.text:
            whose = "none" if found is None else f"that of {_named(_described(found))}"
            raise MarkLostError(
                f"{self.path}: expected the mark of this training, {_named(_described(self.text))}, found {whose}: "
                "another training may write to this folder"
            )
        os.utime(self.path)

    def still_there(self) -> None:
        """Make the mark as of now where that is no trouble: between checkpoints, where cases take long."""
        with suppress(OSError, MarkLostError):
            self.renew()

    def remove(self) -> None:
        """Unless it is another's; one that stays is nobody's as soon as this process has ended."""
        with suppress(OSError):
            if _read(self.path) == self.text:
                self.path.unlink()


@contextmanager
def running(output: Path, checkpoint_minutes: float) -> Iterator[Mark]:
    """Hold the mark of a training in its folder; removed at the end, whatever that is.

    A mark of a process of this machine that has ended is taken over, and one of another machine that is older than
    three times ``checkpoint_minutes``.

    Args:
        output: folder of the training.
        checkpoint_minutes: most minutes between two renewals of the mark.

    Raises:
        TrainError: another training holds it; the message names file, machine and process.
        OSError: it cannot be written.
    """
    path = output / RUNNING_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {
        "host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid()), "machine": this_machine(),
        "checkpoint_minutes": checkpoint_minutes,
    }  # fmt: skip
    mark = Mark(path, json.dumps(own) + "\n")
    while not _made(path, mark.text):
        found = _read(path)
        if found is None:  # removed since
            continue
        other = _described(found)
        if not _is_nobodys(path, other, checkpoint_minutes):
            raise TrainError(
                f"{path}: expected no training in this folder, found one, {_named(other)}: wait for its end, or delete "
                "this file if that process is gone"
            )
        # Of two that do so at once one may remove the other's: the other sees that before it writes its first row.
        path.unlink(missing_ok=True)
    try:
        yield mark
    finally:
        mark.remove()


def _made(path: Path, text: str) -> bool:
    """Whether the file was made; False where there is one."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with open(file, "w") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _described(text: str) -> dict[str, Any]:
    """What a mark says; nothing where it is being written, or was not to its end."""
    with suppress(ValueError):
        said = json.loads(text)
        if isinstance(said, dict) and isinstance(said.get("pid"), int) and 0 < said["pid"] < 2**31:
            return said
    return {}


def _named(mark: dict[str, Any]) -> str:
    return f"process {mark['pid']} on {mark.get('host')}" if mark else "an unknown process"


def _is_nobodys(path: Path, mark: dict[str, Any], minutes: float) -> bool:
    if mark.get("machine") == this_machine():
        if mark["pid"] != os.getpid() and not is_running(mark["pid"]):
            return True
        now = _started(mark["pid"])
        return None not in (now, mark.get("started")) and now != mark["started"]
    given = mark.get("checkpoint_minutes")
    try:
        changed = path.stat().st_mtime
        # By the clock of the file system, which may be another one than this machine's.
        with tempfile.TemporaryFile(dir=path.parent) as file:
            age = os.fstat(file.fileno()).st_mtime - changed
    except FileNotFoundError:
        return True  # removed since
    return age > 60 * MOST_AGE * (given if isinstance(given, int | float) else minutes)


def _started(process: int) -> str | None:
    """When a process of this machine was started, in a unit of the system; None where nobody can tell.

    The numbers of processes are given again.
    """
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return "ended" if state in "ZX" else rest[18]
