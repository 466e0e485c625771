"""Torch's defaults, which a program may have changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

__all__ = ["fresh_defaults"]


@contextmanager
def fresh_defaults() -> Iterator[None]:
    """Torch's defaults of dtype and device as a process begins with, for code that makes tensors by them."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        # The context slows every operation, and is of no use where the default is the same.
        with torch.device("cpu") if device.type != "cpu" else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)
