"""Which cases of a folder or list a process is to do, and whether their results can stand beside each other."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..data.channels import Channels
from ..data.files import are_one_file, volume_files
from ..data.images import OneChannel
from ..errors import ArgumentError
from ..runtime.processes import World, said_by_first
from .share import Share
from .sources import file_of

__all__ = ["Image", "Plan", "check_names", "plan", "shard"]

Image = Path | OneChannel | Channels


@dataclass(frozen=True)
class Plan:
    """What is to be done, the same in all processes.

    Attributes:
        cases: name -> file, one channel of it, or several channels.
        problems: further entries that cannot be cases: name -> why.
        names: of this process's cases, the largest first.
        folder: that was looked through for all of them; empty: they are of a list.
        share: that this run has of them; None: all.
    """

    cases: Mapping[str, Image]
    problems: Mapping[str, Exception]
    names: list[str]
    folder: str = ""
    share: Share | None = None


def plan(
    cases: Mapping[str, Image], problems: Mapping[str, Exception], world: World, folder: str | Path = "",
    share: Share | None = None,
) -> Plan:  # fmt: skip
    """This process's part of what the first process sees: a folder that changes must not look different to two."""
    if share is not None:
        cases = {name: one for name, one in cases.items() if share.has(name)}
        problems = {name: one for name, one in problems.items() if share.has(name)}
    sizes = {}
    for name, path in cases.items():
        try:
            file = file_of(path)
            sizes[name] = sum(one.stat().st_size for one in volume_files(file)) if file is not None else 0
        except OSError:
            sizes[name] = 0  # reading it will say why
    cases, problems, sizes = said_by_first(world, lambda: (cases, problems, sizes))
    folder = os.path.abspath(folder) if folder else ""
    return Plan(cases, problems if world.rank == 0 else {}, shard(sizes, world), folder, share)


def shard(sizes: Mapping[str, int], world: World) -> list[str]:
    """The names of this process's cases, the largest first: each goes to the process that has least so far."""
    loads = [0] * world.size
    mine = []
    for name in sorted(sizes, key=lambda one: (-sizes[one], one)):
        least = loads.index(min(loads))
        loads[least] += sizes[name] + 1
        if least == world.rank:
            mine.append(name)
    return mine


def check_names(
    source: str | Path, output: str | Path, cases: Iterable[str], folders: Iterable[Path] | None = None
) -> None:
    """See that no result can take the place of an input or of another case's result.

    Args:
        source: a file or a folder, or a list of cases.
        output: folder for the results.
        cases: names.
        folders: that hold inputs, or masks of them; None: the source, or the folder that it is in.

    Raises:
        ArgumentError: the folder of the input is that of the output; a case is named like a residual map of another;
            or the output's file system takes two names for one.
    """
    if folders is None:
        folders = [Path(source).parent if Path(source).is_file() else Path(source)]
    if Path(output).resolve() in {folder.resolve() for folder in folders}:
        raise ArgumentError(f"{output}: expected another folder than the input's, whose volumes it would replace")
    cases = set(cases)
    for name in sorted(cases):
        places = [found.start() for found in re.finditer("_residual", name)]
        if of := [name[:place] for place in places if name[:place] in cases]:
            raise ArgumentError(f"{source}: expected no case named like a result of {of[0]}, found {name}")
    alike: dict[str, str] = {}
    for name in sorted(cases):
        other = alike.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name and are_one_file(output, other, name):
            raise ArgumentError(
                f"{source}: expected names that differ in {output}, whose file system takes {other} and {name} for one"
            )
