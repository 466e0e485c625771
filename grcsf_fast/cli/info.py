"""``grcsf-fast info``."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..networks.weights import PACKAGED
from ..ops import triton
from ..ops.backends import backend_info
from ..ops.check import examine_all
from ..pretrained.bundle import read_config
from ..runtime.precision import choose_device
from ..runtime.versions import versions
from .shared import KERNELS_FAILED, new_command

__all__ = ["add"]


def add(commands: Any) -> None:
    command = new_command(commands, "info", run, "List backends, packaged bundles and versions.")
    command.add_argument(
        "--check",
        action="store_true",
        help="also run every kernel that can run here on small inputs against the reference; exit code 1 if one fails",
    )


def run(options: argparse.Namespace) -> int:
    for name, backend in backend_info().items():
        state = "can run" if backend["available"] else f"cannot run: {backend['reason']}"
        print(f"backend {name}: {state}; {backend['description']}")
    print(f"device: {choose_device('auto')}, {torch.get_num_threads()} threads")
    for path in sorted(PACKAGED.glob("*/config.json")):
        print(f"bundle {path.parent.name}: SHA-256 {read_config(path.parent)['weights_sha256']}")
    for package, version in versions().items():
        print(f"{package} {version}")
    return _check_kernels() if options.check else 0


def _check_kernels() -> int:
    """The table of ``info --check``."""
    count = failed = 0
    if triton.interpreted():
        print("Triton's interpreter multiplies bfloat16 numbers as bits; that alone is no fault of a kernel")
    print(f"{'backend':8} {'result':7} {'error':8} {'allowed':8} kernel")
    for kernel, result in examine_all():
        count += 1
        if isinstance(result, Exception):
            state, error, allowed, where = "FAILED", "-", "-", f": {type(result).__name__}: {result}"
        else:
            state, where = ("ok", "") if result.passed else ("FAILED", f": {result.tensor}")
            error, allowed = f"{result.error:.1e}", f"{result.tolerance:.1e}"
        failed += state == "FAILED"
        print(f"{kernel.backend:8} {state:7} {error:8} {allowed:8} {kernel}{where}", flush=True)
    print(f"{count} kernels checked, {failed} failed")
    return KERNELS_FAILED if failed else 0
