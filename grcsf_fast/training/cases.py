"""The cases of a training, and an image as good as any."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..datasets.cases import Case, CaseSource
from ..networks.mae import MaskedAutoencoder
from ..networks.residual_maps import volume_residual_maps
from ..runtime.memory import memory_budget
from ..runtime.transient import patiently
from .sampling import CaseCache, bytes_of, small
from .settings import TrainingRun
from .workers import CaseMakers

__all__ = [
    "KeptCases",
    "WithMaps",
    "case_cache",
    "moved",
    "ramp",
]


def case_cache(source: CaseSource, run: TrainingRun, finish: Callable[[Case], Case] = lambda case: case) -> CaseCache:
    """The pool of a training, to be closed; says so where the settings leave cases of a folder unseen."""
    settings = run.settings
    count = len(source) if isinstance(source, Sized) else None
    size = settings.cache_size if count is None else min(settings.cache_size, count)
    replace_every = 0 if size == count else settings.replace_every
    pool = CaseCache(source, size, replace_every)
    last = pool.indices(settings.steps - 1)[-1]
    if count is not None and last + 1 < count and run.world.rank == 0:
        print(
            f"{last + 1} of {count} cases will be seen; lower --replace-every or raise --cache-size or --steps to see "
            "all"
        )
    # A process that was forked cannot use a GPU.
    pool.source = CaseMakers(source, finish, last, run.workers, run.device.type != "cpu", run.world)
    return pool


@dataclass(frozen=True)
class WithMaps:
    """Gives a case its residual maps.

    Attributes:
        mae: makes them; None: they are not wanted.
        settings: of :func:`grcsf_fast.networks.residual_maps.volume_residual_maps`.
        device: of the autoencoder.
    """

    mae: MaskedAutoencoder | None
    settings: dict[str, Any]
    device: torch.device

    def __call__(self, case: Case) -> Case:
        if self.mae is None or case.residual_maps is not None:
            return case
        maps = volume_residual_maps(case.image.to(self.device), self.mae, **self.settings, slices=case.slices)
        return replace(case, residual_maps=maps.cpu())


class KeptCases:
    """Validation cases that are made as they are asked for, and kept while those that are kept fit a budget.

    Args:
        cases: to make them of.
        finish: applied to each of them, the same each time.
        budget: bytes; None: a quarter of what this process may take when the first case is asked for.
    """

    def __init__(self, cases: Sequence[Case], finish: Callable[[Case], Case], budget: int | None = None) -> None:
        self.cases, self.finish, self.left = cases, finish, budget
        self._kept: dict[int, Case] = {}

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, number: int) -> Case:
        if number in self._kept:
            return self._kept[number]
        if self.left is None:
            self.left = memory_budget() // 4
        case = small(self.finish(patiently(f"validation case {number + 1}", lambda: self.cases[number])))
        size = bytes_of(case)
        if size <= self.left:
            self._kept[number] = case
            self.left -= size
        return case


def moved(values: Tensor, device: torch.device) -> Tensor:
    """On the device; where it is a GPU, the processor does not wait for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def ramp(*shape: int) -> Tensor:
    """Values from -2 to 2: an image as good as any to measure speed with."""
    return torch.linspace(-2, 2, math.prod(shape)).reshape(shape)
