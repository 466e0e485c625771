"""What the cases of a training hold, found by reading each of them once, and remembered for the next training.

Folds of a cross-validation, an autoencoder and its network, and a training that goes on read the same cases: what a
case holds is kept in the user's cache, and known again by path, size and times of its files.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.files import replace_when_done, volume_files
from ..runtime.cache import cache_folder
from ..runtime.control_groups import usable_cores
from ..runtime.memory import memory_budget
from ..runtime.threads import in_order
from ..runtime.versions import versions

__all__ = ["Finding", "Memory", "Survey", "side_by_side_in_order", "some"]

MOST_NAMED = 10  # cases in a message
MOST_READERS = 8
BYTES_A_READER = 1 << 30  # enough for a head of 1 mm
SAVE_AFTER = 100  # cases that were read
MOST_REMEMBERED = 100_000  # cases in a file of the cache
SETTLED_NS = 2_000_000_000  # what changes again this soon may have the same times


@dataclass(frozen=True)
class Finding:
    """What one case holds.

    Attributes:
        content: hash of its files, and of what it takes of them.
        with_lesion: its mask holds lesion on the file's grid.
        numbers: that are left of the mask on the networks' grid; without labels 1 for lesion.
        unknown: numbers of the mask that belong to none of the labels.
    """

    content: str
    with_lesion: bool = False
    numbers: tuple[int, ...] = ()
    unknown: tuple[int, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What a source holds.

    Attributes:
        cases: their number.
        with_lesion: cases whose mask holds lesion.
        kept_lesion: cases of these that still hold some on the networks' grid.
        vanished: names of the others of these.
        unknown: numbers of masks that belong to none of the labels, and so are background.
        remembered: cases that were read by an earlier training, and not again.
    """

    cases: int
    with_lesion: int
    kept_lesion: int
    vanished: list[str]
    unknown: tuple[int, ...] = ()
    remembered: int = 0

    def text(self, masked: bool = True) -> str:
        """One line for people; where no masks are asked for, the number of cases alone."""
        line = f"{self.cases} cases"
        if masked:
            line += f", {self.with_lesion} with lesion, {self.kept_lesion} on the networks' grid"
            line += f"; too small for it or outside the head: {some(self.vanished)}" if self.vanished else ""
            numbers = ", ".join(map(str, self.unknown))
            line += f"; of no label, and so background, are the numbers {numbers} of masks" if numbers else ""
        return line + (f"; {self.remembered} were read before and are unchanged" if self.remembered else "")


class Memory:
    """Findings of earlier surveys, in a file of the user's cache; where there can be none, nothing is remembered.

    Args:
        reading: what else decides a finding than the files, JSON values: another reading has another memory.
    """

    def __init__(self, reading: Mapping[str, Any]) -> None:
        key = json.dumps({**reading, "version": versions()["grcsf-fast"]}, sort_keys=True)
        self._path: Path | None = None
        with suppress(RuntimeError):  # no home
            self._path = cache_folder("cases") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        self._known, self._new = self._read(), 0

    def key(self, files: Sequence[Path], choice: str) -> str | None:
        """Of a case, by its files as they are now; None: they cannot be looked at, or were changed a moment ago."""
        digest, latest = hashlib.sha256(choice.encode()), 0
        try:
            for path in [file for name in files for file in volume_files(name)]:
                found = path.stat()
                digest.update(f"\n{path.absolute()} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}".encode())
                latest = max(latest, found.st_mtime_ns, found.st_ctime_ns)
        except (OSError, ValueError):  # reading the case will say why
            return None
        return digest.hexdigest() if latest + SETTLED_NS <= time.time_ns() else None

    def get(self, key: str | None) -> Finding | None:
        return self._known.get(key) if key is not None else None

    def add(self, key: str | None, finding: Finding) -> None:
        if key is not None:
            self._known[key] = finding
            self._new += 1
            if self._new >= SAVE_AFTER:
                self.save()

    def save(self) -> None:
        """Write down what is new, together with what others wrote in the meantime."""
        if self._path is None or not self._new:
            return
        self._known, self._new = self._read() | self._known, 0
        latest = list(self._known.items())[-MOST_REMEMBERED:]
        with suppress(OSError), replace_when_done(self._path) as (part,):
            part.write_text(json.dumps({key: asdict(finding) for key, finding in latest}))

    def _read(self) -> dict[str, Finding]:
        try:
            kept = json.loads(self._path.read_text()) if self._path is not None else {}
            return {key: _finding(**values) for key, values in kept.items()}
        except (OSError, ValueError, TypeError, AttributeError):  # none yet, or a damaged one
            return {}


def _finding(content: str, with_lesion: bool, numbers: Sequence[int], unknown: Sequence[int]) -> Finding:
    return Finding(str(content), bool(with_lesion), tuple(map(int, numbers)), tuple(map(int, unknown)))


def side_by_side_in_order(look: Callable[[str], Any], names: Sequence[str]) -> Generator[Any, None, None]:
    """``look`` of each name, in several threads and in the order of the names."""
    return in_order(look, names, min(usable_cores(), MOST_READERS, memory_budget() // BYTES_A_READER))


def some(names: Sequence[str]) -> str:
    """Names in a message, the first ten of them."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
