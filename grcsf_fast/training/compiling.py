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
    import torch._dynamo.config as dynamo

    # Crops of a few sizes are each compiled for themselves: sizes as variables made slower code. Without a limit of
    # sizes, beyond which torch would go back to the function as it is.
    limits: dict[str, Any] = {"recompile_limit": 10**6, "accumulated_recompile_limit": 10**6}
    forward = torch.compile(function, dynamic=False)

    def unlimited(*arguments: Any, **named: Any) -> Any:
        with dynamo.patch(**limits):
            return forward(*arguments, **named)

    return unlimited


def convolution_format(settings: TrainSettings) -> torch.memory_format:
    """Of images and weights."""
    if not settings.channels_last:
        return torch.contiguous_format
    return torch.channels_last if len(settings.crop_size) == 2 else torch.channels_last_3d
