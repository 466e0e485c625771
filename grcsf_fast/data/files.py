"""Files of a folder, and files that appear under their name only when they are complete."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import secrets
import shlex
import tempfile
import time
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ArgumentError
from .names import short_name

__all__ = [
    "allow_reading",
    "are_one_file",
    "case_name",
    "check_writable",
    "find_cases",
    "header_and_voxels",
    "holds_dicom",
    "is_dicom",
    "is_running",
    "left_out",
    "list_cases",
    "metaimage_fields",
    "named_files",
    "remove_partial",
    "replace_when_done",
    "scans_command",
    "seen_files",
    "sha256",
    "this_machine",
    "volume_files",
    "volume_sha256",
]

# Of voxels; those of a pair lie beside a header of the same name. An .mhd says itself where they are.
SUFFIXES = (".nii.gz", ".nii", ".img.gz", ".img", ".mhd", ".mha", ".nrrd")
HEADERS = (".hdr.gz", ".hdr")
# Volumes that are not read, and are not to be left out in silence.
FOREIGN = (
    *(".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip", ".mgz", ".mgh", ".nhdr", ".mnc"),
    *(".dcm", ".ima", ".brik"),
)
FILE_ENDINGS = (*SUFFIXES, *HEADERS, *FOREIGN, ".gz", ".json", ".csv", ".png", ".txt", ".pt", ".pth", ".safetensors")
MAX_LOOKED_AT = 10_000  # entries below a folder, so that a large tree costs no minutes
MAX_TRIED = 1000  # files of a folder that are looked at for the first DICOM file
MAX_FIELDS = 2**16  # bytes of a MetaImage's header
CHANNEL = re.compile(r"(.+)_(\d{4})", re.DOTALL)
# Of a file that is being written: machine, process, a token of each, as threads may write to the same name, and that
# name's :func:`short_name`.
PARTIAL = re.compile(r"\.partial-([0-9a-f]{6})-(\d+)-[0-9a-f]{6}-[0-9a-f]{12}(\..*)?", re.DOTALL)
A_DAY = 86400.0  # seconds after which what another machine left is nobody's


def case_name(path: str | Path, known: Container[str] = ()) -> str:
    """The file's name without its ending and, unless known with it, nnU-Net's suffix ``_0000`` of the first channel."""
    name = Path(path).name
    for suffix in (*SUFFIXES, *HEADERS):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            return name if name in known else name.removesuffix("_0000")
    return name


def header_and_voxels(path: str | Path) -> tuple[Path, Path]:
    """The files that hold a volume's header and voxels: one and the same, but of an ``.hdr`` and ``.img`` pair."""
    path = Path(path)
    packed = path.suffix if path.suffix.lower() == ".gz" else ""
    inner = path.with_suffix("") if packed else path
    if inner.suffix.lower() not in (".hdr", ".img"):
        return path, path
    names = [suffix.upper() if inner.suffix.isupper() else suffix for suffix in (".hdr", ".img")]
    header, voxels = (inner.with_suffix(name + packed) for name in names)
    return header, voxels


def metaimage_fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields of a MetaImage's header, and the place in bytes where it ends.

    Raises:
        ValueError: no header that ends with the name of the file with the voxels, which lies beside it.
    """
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while "ElementDataFile" not in fields and file.tell() < MAX_FIELDS:
            line = file.readline(MAX_FIELDS)
            key, equals, value = line.decode(errors="surrogateescape").partition("=")
            if not equals:
                break
            fields[key.strip()] = value.strip()
        end = file.tell()
    name = fields.get("ElementDataFile", "")
    if not name or Path(name).name != name or "%" in name or name.split()[0].upper() == "LIST":
        raise ValueError(f"expected the name of a file beside it as ElementDataFile, found {name or 'none'}")
    return fields, end


def list_cases(source: str | Path, known: Container[str] = ()) -> dict[str, Path]:
    """Case name -> file, sorted: of one file, or of every volume that lies directly in a folder.

    Of a pair it is the file with the voxels, of an ``.mhd`` that itself. A folder without volumes is a case itself
    where it holds DICOM files; else each folder directly in it that does is one. One warning says what is left out:
    volumes in subfolders, and those of other formats.

    Args:
        source: file or folder.
        known: names of cases, which may end as nnU-Net's channels do, ``_0000``.

    Raises:
        FileNotFoundError: nothing there, or no such file in the folder.
        ValueError: two files of the folder share a case name.
        OSError: an entry with such a file's name is no file.
    """
    cases, problems = find_cases(source, known)
    for error in problems.values():
        raise error
    return cases


def find_cases(
    source: str | Path, known: Container[str] = ()
) -> tuple[dict[str, Path], dict[str, ValueError | OSError]]:
    """As :func:`list_cases`, with the entries that are no cases apart.

    Returns:
        Case name -> file, and entry name -> why it is none: broken links, halves of pairs, and all files of one case
        name or of several channels of a case.

    Raises:
        FileNotFoundError: nothing there, or nothing in the folder has such a file's name.
    """
    source = Path(source)
    if source.is_file():
        return {case_name(source, known): source}, {}
    named, problems, subfolders, foreign = named_files(source, known)
    for name in list(named):
        channel = CHANNEL.fullmatch(name)
        if channel and channel[1] in named and name not in known:
            paths = named[channel[1]] + named.pop(name)
            same = " and ".join(path.name for path in paths)
            error = ValueError(
                f"{source}: {same} are channels of one case by their names; networks of one channel take one image of "
                "a case, so keep one of them, rename them if they are several cases, or name all in --channels of "
                "`grcsf-fast train-mae` and `train`, or by patterns of `grcsf-fast cases`"
            )
            problems |= {path.name: error for path in paths}
    cases = {}
    for name, paths in named.items():
        if any(path.name in problems for path in paths):
            continue
        if len(paths) == 1:
            cases[name] = paths[0]
            continue
        same = " and ".join(path.name for path in paths)
        error = ArgumentError(f"{source}: {same} are the same case; keep one of them")
        problems |= {path.name: error for path in paths}
    if not cases and not problems:
        series = [source] if holds_dicom(source) else [folder for folder in subfolders if holds_dicom(folder)]
        if series:
            others = [folder for folder in subfolders if folder not in series and not _is_empty(folder)]
            if others:
                text = f"{len(others)} folders without a DICOM file directly in them are not read"
                warnings.warn(f"{source}: {text}, the first of them {others[0].name}", stacklevel=3)
            return {Path(os.path.abspath(folder)).name: folder for folder in series}, {}
    hint = left_out(subfolders, foreign)
    if not cases and not problems:
        also = f"; {hint}" if hint else ""
        raise FileNotFoundError(f"{source}: expected files ending in .nii or .nii.gz, found none{also}")
    if hint:
        warnings.warn(f"{source}: {hint}", stacklevel=3)
    return cases, problems


def named_files(
    source: Path, known: Container[str] = ()
) -> tuple[dict[str, list[Path]], dict[str, ValueError | OSError], list[Path], list[Path]]:
    """Case name -> volumes of a folder; entry name -> why it is none; subfolders, and volumes that are not read.

    Raises:
        FileNotFoundError: no such folder.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: expected a NIfTI file or a folder of them, found nothing")
    named: dict[str, list[Path]] = {}
    problems: dict[str, ValueError | OSError] = {}
    subfolders, foreign, tried = [], [], 0
    for path in sorted(source.iterdir()):
        ending = path.name.lower().endswith
        if path.name.startswith("."):
            continue
        try:
            if path.is_dir():
                subfolders.append(path)
            elif ending(FOREIGN):
                foreign.append(path)
            elif ending((*SUFFIXES, *HEADERS)):
                _check_file(path)
                if ending(SUFFIXES):
                    named.setdefault(case_name(path, known), []).append(path)
            elif not ending(FILE_ENDINGS) and tried < MAX_TRIED and path.is_file():
                tried += 1
                foreign += [path] if is_dicom(path) else []
        except OSError as error:  # also of what may not be looked at
            problems[path.name] = error if error.errno is None else OSError(f"{path}: {error.strerror or error}")
    return named, problems, subfolders, foreign


def _check_file(path: Path) -> None:
    """See that a volume's file, or both of a pair, are there."""
    if not path.is_file():
        kind = "a link to nothing" if path.is_symlink() else "no regular file"
        raise OSError(f"{path}: expected a NIfTI file, found {kind}")
    other_half = next((half for half in header_and_voxels(path) if half != path), path)
    if not other_half.is_file():
        raise OSError(f"{path}: expected its other half {other_half.name} beside it, found none")


def left_out(subfolders: list[Path], foreign: list[Path]) -> str:
    """What a folder holds that may have been meant, in words; empty where there is nothing."""
    below, series, looked_at = [], [], 0
    for subfolder in subfolders:
        for folder, folders, names in os.walk(subfolder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            seen = [name for name in sorted(names) if not name.startswith(".")]
            below += [Path(folder, name) for name in seen if name.lower().endswith(SUFFIXES)]
            series += [folder for name in seen[:3] if is_dicom(Path(folder, name))][:1]
            looked_at += len(folders) + len(names)
            if looked_at > MAX_LOOKED_AT:
                break
        if looked_at > MAX_LOOKED_AT:
            break
    parts = []
    if below:
        count = f"{'at least ' if looked_at > MAX_LOOKED_AT else ''}{len(below)}"
        parts.append(f"subfolders are not searched, and hold {count} NIfTI files, the first of them {below[0]}")
        parts.append(f"`{scans_command(subfolders[0].parent, below[0])}` lists scans in subfolders, for --cases")
    if series:
        parts.append(f"{len(series)} subfolders with DICOM files are not read, the first of them {series[0]}")
    if foreign:
        parts.append(f"{len(foreign)} files of other formats are not read, the first of them {foreign[0].name}")
    return "; ".join(parts)


def scans_command(root: Path, scan: Path) -> str:
    """The command that lists the scans below a folder whose names end as this one's, to be typed."""
    ending = next(ending for ending in SUFFIXES if scan.name.lower().endswith(ending))
    stem = scan.name[: -len(ending)]
    _, bar, last = stem.rpartition("_")
    pattern = f"*{bar + last if bar else ''}{scan.name[len(stem) :]}"
    return f"grcsf-fast cases scans {shlex.quote(str(root))} {shlex.quote(pattern)} -o cases.json"


def is_dicom(path: Path) -> bool:
    """Whether a file says in its first bytes that it is DICOM; its name often does not."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def seen_files(folder: str | Path) -> list[Path]:
    """The files directly in a folder, sorted, without hidden ones."""
    return sorted(path for path in Path(folder).iterdir() if not path.name.startswith(".") and path.is_file())


def holds_dicom(folder: str | Path) -> bool:
    """Whether a path is a folder with DICOM files, by its first ones; not one that may not be read."""
    try:
        return Path(folder).is_dir() and any(map(is_dicom, seen_files(folder)[:MAX_TRIED]))
    except OSError:
        return False


def _is_empty(folder: Path) -> bool:
    try:
        return not any(not path.name.startswith(".") for path in folder.iterdir())
    except OSError:
        return False  # nobody knows


def remove_partial(folder: str | Path) -> None:
    """Remove what processes that no longer run left of files that they were writing in a folder, whatever their names.

    Those of another machine, or of another container, cannot be asked for, so what they left stays for a day. So does,
    for good, what may not be removed.
    """
    with suppress(OSError):
        for path in Path(folder).iterdir():
            found = PARTIAL.fullmatch(path.name)
            if not found or path.name in _writing:
                continue
            with suppress(OSError):
                here = found[1] == this_machine()
                if not (is_running(int(found[2])) if here else path.stat().st_mtime > time.time() - A_DAY):
                    path.unlink()


# By this process; by their names, which are of one file each, as a folder may be given in several ways.
_writing: set[str] = set()


@functools.cache
def this_machine() -> str:
    """What tells this system of process numbers from others: host, its boot, and the container."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:6]


def is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # of an earlier process with the same number: what this one writes is known
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
        OSError: they cannot, or its name is that of a file; the message names the folder.
    """
    folder = Path(folder)
    check_no_file_name(folder)
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"{folder}: expected a folder to write to: {error.strerror or error}") from error
    return folder


def check_no_file_name(folder: Path) -> None:
    """See that a folder is not called as a file is.

    Raises:
        OSError: it is, and is no folder yet; the message names it.
    """
    ending = next((ending for ending in FILE_ENDINGS if folder.name.lower().endswith(ending)), None)
    if ending and not folder.is_dir():
        raise OSError(f"{folder}: expected a folder for several files, found the name of one file, ending in {ending}")


def are_one_file(folder: str | Path, first: str, second: str) -> bool:
    """Whether two names are those of one file in a folder, or in the nearest one above it that exists.

    File systems of macOS and Windows do not tell cases of letters apart, and some not how accents are composed.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    with tempfile.TemporaryDirectory(dir=existing) as place:
        Path(place, first).touch()
        return Path(place, second).exists()


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
    own = f".partial-{this_machine()}-{os.getpid()}-{secrets.token_hex(3)}"
    parts = [final.with_name(f"{own}-{short_name(final.name)}") for final in finals]
    _writing.update(part.name for part in parts)
    try:
        yield parts
        for part in parts:
            with part.open("r+b") as written:  # Windows wants it open for writing
                os.fsync(written.fileno())
        for part, final in zip(parts, finals, strict=True):
            part.replace(final)
    finally:
        for part in parts:
            with suppress(FileNotFoundError):
                part.unlink()
        _writing.difference_update(part.name for part in parts)
        for folder in made:
            with suppress(OSError):  # not empty, or gone already
                folder.rmdir()


def allow_reading(path: Path) -> None:
    """Give a file the permissions that a newly made one has: safetensors makes its files for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sha256(path: Path) -> str:
    """Hash of a file's bytes.

    Raises:
        OSError: it cannot be read; the message names it.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        if error.filename is None:  # of reading, of which Python names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def volume_files(path: str | Path) -> list[Path]:
    """The files of a volume that are there: one, the two of a pair or a MetaImage, or all of a folder with DICOM."""
    if holds_dicom(path):
        return seen_files(path)
    files = list(dict.fromkeys(header_and_voxels(path)))
    if Path(path).suffix.lower() in (".mhd", ".mha"):
        with suppress(OSError, ValueError):  # reading the volume will say why
            fields, _ = metaimage_fields(Path(path))
            files.append(Path(path).parent / fields["ElementDataFile"])
    return [file for file in files if file.is_file()]


def volume_sha256(path: str | Path) -> str:
    """Hash of the bytes of a volume's file; of a pair's both."""
    hashes = [sha256(file) for file in volume_files(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
