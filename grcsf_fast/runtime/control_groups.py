"""The control groups of this process: how much of the machine a container or a scheduler leaves it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["control_groups", "usable_cores"]

ROOT = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self/cgroup")


def control_groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's groups of a controller, from its own to the root, and whether they are of version 2."""
    with suppress(OSError):
        for line in PROCESS.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = ROOT / controller if controllers else ROOT
            folder = root / place.lstrip("/")
            yield from (
                (one, not controllers) for one in (folder, *folder.parents) if one == root or root in one.parents
            )


def usable_cores() -> int:
    """Cores whose time this process may use: those it may run on, or as many as the quota of a control group is worth.

    A quota is time, not cores: in a container with the time of 2 cores of 64, 64 threads wait for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, second in control_groups("cpu"):
        with suppress(OSError, ValueError):
            if second:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores
