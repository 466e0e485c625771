"""Files of a folder, and files that appear under their name only when they are complete."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["case_name", "check_writable", "find_cases", "list_cases", "remove_partial", "replace_when_done", "share"]

SUFFIXES = (".nii.gz", ".nii")
PARTIAL = re.compile(r"\.partial-(\d+)-(.+)", re.DOTALL)


def case_name(path: str | Path) -> str:
    """The file's name without ``.nii`` or ``.nii.gz`` and without nnU-Net's suffix ``_0000`` of the first channel."""
    name = Path(path).name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)].removesuffix("_0000")
    return name


def list_cases(source: str | Path) -> dict[str, Path]:
    """Case name -> file, sorted: of one file, or of every NIfTI file that lies directly in a folder.

    Raises:
        FileNotFoundError: nothing there, or no NIfTI file in the folder.
        ValueError: two files of the folder share a case name.
        OSError: an entry with a NIfTI file's name is no file.
    """
    cases, problems = find_cases(source)
    for error in problems.values():
        raise error
    return cases


def find_cases(source: str | Path) -> tuple[dict[str, Path], dict[str, ValueError | OSError]]:
    """As :func:`list_cases`, with the entries that are no cases apart.

    Returns:
        Case name -> file, and entry name -> why it is none: broken links, and all files of one case name.

    Raises:
        FileNotFoundError: nothing there, or nothing in the folder has a NIfTI file's name.
    """
    source = Path(source)
    if source.is_file():
        return {case_name(source): source}, {}
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: expected a NIfTI file or a folder of them, found nothing")
    named: dict[str, list[Path]] = {}
    problems: dict[str, ValueError | OSError] = {}
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(SUFFIXES):
            continue
        if path.is_file():
            named.setdefault(case_name(path), []).append(path)
        elif not path.is_dir():
            kind = "a link to nothing" if path.is_symlink() else "no regular file"
            problems[path.name] = OSError(f"{path}: expected a NIfTI file, found {kind}")
    cases = {}
    for name, paths in named.items():
        if len(paths) == 1:
            cases[name] = paths[0]
            continue
        same = " and ".join(path.name for path in paths)
        problems |= {path.name: ValueError(f"{source}: {same} are the same case; keep one of them") for path in paths}
    if not cases and not problems:
        raise FileNotFoundError(f"{source}: expected files ending in .nii or .nii.gz, found none")
    return cases, problems


def remove_partial(folder: str | Path, finals: Collection[str]) -> None:
    """Remove what processes that no longer run left of files they were writing under these names."""
    with suppress(FileNotFoundError):
        for path in Path(folder).iterdir():
            found = PARTIAL.fullmatch(path.name)
            if found and found[2] in finals and not _runs(int(found[1])):
                path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if process == os.getpid():
        return False  # of an earlier process with the same number: this one has not begun to write
    if os.name == "nt":
        return True  # signal 0 is no question there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def check_writable(folder: str | Path) -> Path:
    """See that files can be made in a folder, or in the nearest one above it that exists; makes nothing itself.

    Raises:
        OSError: they cannot; the message names the folder.
    """
    folder = Path(folder)
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"{folder}: expected a folder to write to: {error.strerror or error}") from error
    return folder


@contextmanager
def replace_when_done(*targets: str | Path) -> Iterator[list[Path]]:
    """Temporary paths beside ``targets``, renamed to them in order once the block ends without an error.

    The temporary names keep the suffix, by which writers choose a format. On an error nothing of them is left, and
    whatever stood under the final names stays as it was. Missing folders are made.
    """
    finals = [Path(target) for target in targets]
    made = [final.parent for final in finals if not final.parent.exists()]
    for final in finals:
        if final.is_dir():
            raise IsADirectoryError(f"{final}: expected a file's name, found a folder")
        final.parent.mkdir(parents=True, exist_ok=True)
    parts = [final.with_name(f".partial-{os.getpid()}-{final.name}") for final in finals]
    try:
        yield parts
        for part in parts:
            with part.open("rb") as written:
                os.fsync(written.fileno())
        for part, final in zip(parts, finals, strict=True):
            part.replace(final)
    finally:
        for part in parts:
            with suppress(FileNotFoundError):
                part.unlink()
        for folder in made:
            with suppress(OSError):  # not empty, or gone already
                folder.rmdir()


def share(path: Path) -> None:
    """Give a file the permissions that a newly made one has: safetensors makes its files for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
