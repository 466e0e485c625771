"""The runs of a folder: one file each, processes that make what is missing, and what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.cases import TESTS
from benchmarks.accuracy.variants import SETTINGS, VARIANTS
from benchmarks.machine import ROOT
from grcsf_fast.data.files import replace_when_done

__all__ = ["Run", "in_processes", "is_done", "load_runs", "run_path", "store", "wanted"]


class Run(NamedTuple):
    """One training.

    Attributes:
        setting: a key of ``SETTINGS``.
        variant: a key of ``VARIANTS``.
        seed: of weights and crops.
    """

    setting: str
    variant: str
    seed: int


def wanted(
    variants: Sequence[str] = tuple(VARIANTS), settings: Sequence[str] = tuple(SETTINGS), seeds: int | None = None
) -> list[Run]:
    """All runs of some variants, seed by seed, so that an early table has everyone in it.

    Args:
        variants: names of them.
        settings: names of them; a variant that is not measured in one is left out there.
        seeds: number of them for everyone; None: each variant's own.
    """
    numbers = {name: VARIANTS[name].seeds() if seeds is None else seeds for name in variants}
    return [
        Run(setting, name, seed)
        for seed in range(max(numbers.values(), default=0))
        for setting in settings
        for name in variants
        if seed < numbers[name] and setting in VARIANTS[name].settings()
    ]


def run_path(folder: Path, run: Run, mae: str) -> Path:
    """``mae`` being the start of the bundle's hash; only runs that are given its maps are others with another."""
    words = f"{run.setting} {run.variant} {run.seed} {mae if VARIANTS[run.variant].residual else ''}".lower().strip()
    return folder / "runs" / ("".join(letter if letter.isalnum() else "_" for letter in words) + ".json")


def store(folder: Path, run: Run, mae: str, result: dict[str, Any]) -> None:
    with replace_when_done(run_path(folder, run, mae)) as (part,):
        part.write_text(json.dumps(result) + "\n")


def is_done(folder: Path, run: Run, mae: str) -> bool:
    """Whether it has been tested on every set that there is."""
    path = run_path(folder, run, mae)
    return path.is_file() and set(TESTS) <= set(json.loads(path.read_text())["dice"])


def load_runs(folder: Path, mae: str) -> list[dict[str, Any]]:
    """The results of all finished runs without residual maps or with this autoencoder's, in a fixed order."""
    runs = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    return [one for one in runs if one["mae"] in (None, mae)]


def in_processes(commands: Sequence[Sequence[str]], jobs: int) -> list[int]:
    """Run ``python -m benchmarks.accuracy`` with each of these arguments, ``jobs`` at a time, one thread each.

    A process that dies takes nothing with it but its own work.

    Returns:
        The numbers of the commands that failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def call(arguments: Sequence[str]) -> int:
        command = [sys.executable, "-m", "benchmarks.accuracy", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode

    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        numbers = {pool.submit(call, arguments): number for number, arguments in enumerate(commands)}
        try:
            for future in as_completed(numbers):
                if future.result() != 0:
                    failed.append(numbers[future])
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return sorted(failed)
