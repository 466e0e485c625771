"""How many of its kernels Triton compiles, and how many it finds in its cache on disk."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Kernels", "counted_kernels"]


@dataclass
class Kernels:
    """Kernels that a process got ready to launch.

    Attributes:
        compiled: anew, and kept in Triton's cache on disk.
        found: in that cache.
    """

    compiled: int = 0
    found: int = 0


@contextmanager
def counted_kernels() -> Iterator[Kernels]:
    """Counts those of all threads inside; a kernel that the process had launched before is not among them.

    Raises:
        ImportError: there is no Triton.
    """
    settings = importlib.import_module("triton").knobs.compilation
    before, kernels, counting = settings.listener, Kernels(), threading.Lock()

    def listener(*, cache_hit: bool, **others: Any) -> None:
        with counting:
            kernels.found += cache_hit
            kernels.compiled += not cache_hit
        if before is not None:
            before(cache_hit=cache_hit, **others)

    settings.listener = listener
    try:
        yield kernels
    finally:
        settings.listener = before
