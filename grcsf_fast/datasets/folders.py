"""What the layouts have in common: files below a folder, subjects in names, and what is said of a wrong root."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import GrcsfError

__all__ = [
    "ENDINGS",
    "LayoutError",
    "check_all_found",
    "check_folder",
    "check_packed_once",
    "files_below",
    "leads_nowhere",
    "shown_below",
    "subject_of",
    "to_nothing",
    "without_ending",
]

ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")


class LayoutError(GrcsfError, ValueError):
    """A folder that does not have the layout it was said to have; the message says what was expected and found."""


def check_folder(root: Path, expected: str) -> None:
    """See that there is a folder at all."""
    if not root.is_dir():
        found = "a file" if root.is_file() else "nothing"
        raise LayoutError(f"{root}: expected a folder with {expected}, found {found}")


def files_below(root: Path) -> Iterator[Path]:
    """Files in a folder and its subfolders in order; without hidden ones, such as those that macOS names ``._``.

    Linked folders are searched too, each once. A warning names a folder that may not be read.
    """
    seen: set[str] = set()

    def say(error: OSError) -> None:
        warnings.warn(f"{error.filename}: left out, it cannot be read: {error.strerror}", stacklevel=3)

    for folder, folders, names in os.walk(root, onerror=say, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)


def check_all_found(
    root: Path, expected: str, found: Sequence[object], missing: Sequence[object], others: Sequence[Path] = ()
) -> None:
    """See that something was found and nothing is missing.

    Args:
        root: of the data set.
        expected: what every entry of both is, in words.
        found: those that are there.
        missing: those that are not.
        others: files that were found in their place.

    Raises:
        LayoutError: with one that was found, one that is missing, and how many more are; and with links among the
            others, or that stand for one that is missing, to files that are not there.
    """
    if missing or not found:
        among = f" among {len(others)} files, the first of them {others[0].relative_to(root)}" if others else ""
        links = [path.relative_to(root) for path in others if leads_nowhere(path)]
        links += [one for one in missing if isinstance(one, Path) and leads_nowhere(root / one)]
        have = f"found {found[0]}" if found else f"found none{among}"
        lack = f"{', but not' if found else '; missing:'} {missing[0]}" if missing else ""
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        said = f"; {to_nothing(links)}" if links else ""
        raise LayoutError(f"{root}: expected {expected}; {have}{lack}{more}{said}")


def check_packed_once(paths: Iterable[Path]) -> None:
    """See that no file lies beside one of its name with another ending, as an unpacked copy does, that may differ.

    Raises:
        LayoutError: one does.
    """
    first: dict[Path, Path] = {}
    for path in paths:
        other = first.setdefault(path.with_name(without_ending(path.name)), path)
        if other != path:
            raise LayoutError(f"{path}: expected one file of this name, found {other.name} too; keep one of them")


def shown_below(path: Path, root: Path) -> Path:
    """A path in messages about a folder: from there on, if it lies below."""
    return path.relative_to(root) if path.is_relative_to(root) else path


def leads_nowhere(path: Path) -> bool:
    """Whether a path is a link to a file that is not there."""
    return path.is_symlink() and not path.exists()


def to_nothing(links: Sequence[Path]) -> str:
    """Such links, at least one, in words: git-annex and datalad leave them where nothing was fetched."""
    return f"{len(links)} links to nothing, such as {links[0]}, which may have to be fetched first"


def subject_of(name: str) -> str:
    """The subject in a case's name where that begins as in BIDS, ``sub-01`` of ``sub-01_ses-2``; else the name."""
    found = re.match(r"sub-[A-Za-z0-9]+", name)
    return found[0] if found else name


def without_ending(name: str) -> str:
    """A volume's file name without its ending."""
    for ending in ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name
