"""What a result file says about the machine: model, versions, kernels, and rates measured in the same session.

Nothing that identifies it: no host name, no path.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import clock_of
from grcsf_fast import backend_info
from grcsf_fast.ops.cpp import instruction_sets
from grcsf_fast.runtime.versions import versions

__all__ = ["commit", "describe", "machine_name", "rates"]

ROUNDS = 9
ROOT = Path(__file__).parents[1]


def processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def rates(device: str) -> dict[str, float]:
    """Bytes a second read and written by a large copy into memory that is there, operations a second of products.

    Of the fastest round: a ceiling is what the machine can do.
    """
    clock = clock_of(device, cold=False)
    side, size = (8192, 2**28) if device == "cuda" else (2048, 2**26)

    def seconds(call: Callable[[], Any]) -> float:
        clock.block([call], 1)
        return min(clock.block([call], 1)[0] for _ in range(ROUNDS))

    source = torch.ones(size, device=device)
    target = torch.zeros_like(source)
    found = {"copy_bytes_per_second": 2 * source.nbytes / seconds(lambda: target.copy_(source))}
    for dtype in (torch.float32, torch.bfloat16):
        a, b, out = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(3))
        name = str(dtype).removeprefix("torch.")
        found[f"{name}_operations_per_second"] = (
            2 * side**3 / seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        )
    return found


def describe(device: str, threads: int) -> dict[str, Any]:
    """Everything but the rates."""
    kernels = backend_info()["cpp"]
    return {
        "cpu": processor(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {**versions(), "pytest-benchmark": metadata.version("pytest-benchmark")},
        "kernels": "built" if kernels["available"] else "not built",
        "instruction_set": (os.environ.get("GRCSF_CPU_ISA") or instruction_sets()[-1])
        if kernels["available"]
        else None,
    }


def machine_name(device: str) -> str:
    """For the name of a file: "amd-epyc-2-cores", or a GPU's."""
    words = torch.cuda.get_device_name() if device == "cuda" else f"{processor()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)", "", words).lower()).strip("-")


def commit() -> dict[str, Any]:
    """The commit that is checked out, and whether files differ from it; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "id": git("rev-parse", "HEAD"),
            "time": git("show", "-s", "--format=%cI"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"id": "unknown", "time": None, "dirty": True}
