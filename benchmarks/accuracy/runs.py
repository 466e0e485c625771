"""The runs of a folder: one file each, processes that make what is missing, and what they found."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.accuracy.cases import TESTS
from benchmarks.accuracy.variants import SETTINGS, VARIANTS
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


def in_processes(work: Callable[..., None], arguments: Sequence[Sequence[Any]], jobs: int) -> dict[int, str]:
    """Call ``work`` with each of these arguments in ``jobs`` processes side by side, one thread each.

    Returns:
        The numbers of the calls that failed, each with its error; all that were not done where a process was killed.
    """
    failed = {}
    # Read when a process imports what multiplies matrices.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"), ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:  # fmt: skip
        numbers = {pool.submit(work, *one): number for number, one in enumerate(arguments)}
        try:
            for future in as_completed(numbers):
                if error := future.exception():
                    failed[numbers[future]] = f"{type(error).__name__}: {error}"
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return dict(sorted(failed.items()))
