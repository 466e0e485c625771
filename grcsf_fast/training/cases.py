"""The cases of a training, and an image as good as any."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..datasets.cases import Case, Source
from .sampling import CaseCache
from .settings import TrainSettings

__all__ = [
    "case_cache",
    "ramp",
]


def case_cache(source: Source, settings: TrainSettings, finish: Callable[[Case], Case]) -> CaseCache:
    """The pool of a training; says so where the settings leave cases of a folder unseen."""
    count = len(source) if hasattr(source, "__len__") else None
    size = settings.cache_size if count is None else min(settings.cache_size, count)
    replace_every = 0 if size == count else settings.replace_every
    seen = size + (settings.steps // replace_every if replace_every else 0)
    if count is not None and seen < count:
        print(
            f"{seen} of {count} cases will be seen; lower --replace-every or raise --cache-size or --steps to see all"
        )
    return CaseCache(source, size, replace_every, finish)


def ramp(*shape: int) -> Tensor:
    """Values from -2 to 2: an image as good as any to measure speed with."""
    return torch.linspace(-2, 2, math.prod(shape)).reshape(shape)
