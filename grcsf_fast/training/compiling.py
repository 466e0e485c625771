"""How what is trained runs: compiled, and with which layout of its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .settings import TrainSettings

__all__ = ["compiled", "convolution_format"]


def compiled(function: Callable[..., Any], settings: TrainSettings) -> Callable[..., Any]:
    """The function, compiled if the settings want it."""
    if not settings.compile:
        return function
    # Crops of a few sizes are each compiled for themselves: sizes as variables made slower code.
    torch._dynamo.config.cache_size_limit = max(16, torch._dynamo.config.cache_size_limit)
    return torch.compile(function, dynamic=False)


def convolution_format(settings: TrainSettings) -> torch.memory_format:
    """Of images and weights."""
    if not settings.channels_last:
        return torch.contiguous_format
    return torch.channels_last if len(settings.crop_size) == 2 else torch.channels_last_3d
