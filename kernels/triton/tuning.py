"""Whose entry of the tables is taken, and block shapes measured instead.

``GRCSF_TRITON_AUTOTUNE=1`` has block shapes chosen by measurement; off by default.

The first call of each kind (op, forward or backward, channels, patch or planar, dimensions, dtype, architecture) then
measures the table's entry and a few neighbours of it on its own tensors, and the process keeps the fastest. Further
calls of the kind, whatever their sizes, take it as it is. At most ``MOST`` kinds are measured, later ones get the
table's entry. Candidates differ in the order of their sums alone, so results may differ by rounding from one process
to the next; without the variable they do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import triton
from triton.runtime.errors import TritonError

__all__ = ["MOST", "architecture", "chosen", "enabled"]

MOST = 64

Entry = TypeVar("Entry", bound=Hashable)
_kept: dict[Hashable, Any] = {}


def architecture() -> str:
    """Of the GPU, as the table names it; an H100's where there is none.

    NVIDIA's other ones, 12.0 among them, have the matrix units of 8.0.
    """
    if triton.knobs.runtime.interpret:
        return "sm_90"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return target.arch
    return {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, "sm_80")


def enabled() -> bool:
    return os.environ.get("GRCSF_TRITON_AUTOTUNE", "0") not in ("", "0")


def measure(run: Callable[[], Any]) -> float:
    """Milliseconds of a call."""
    return triton.testing.do_bench(run, warmup=10, rep=50)


def chosen(
    key: Hashable, entry: Entry, neighbours: Callable[[], Sequence[Entry]], run: Callable[[Entry], Any]
) -> Entry:
    """The table's entry, or the one that ``run`` is fastest with."""
    if not enabled():
        return entry
    if key not in _kept:
        if len(_kept) >= MOST:
            return entry
        times = {entry: measure(lambda: run(entry))}
        for other in neighbours():
            try:
                times[other] = measure(lambda other=other: run(other))
            except (TritonError, RuntimeError):
                continue  # one that does not compile or fit, which the table's entry does
        _kept[key] = min(times, key=times.__getitem__)
    return _kept[key]
