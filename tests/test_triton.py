"""The Triton kernels as far as they can be proven without a GPU, each proof in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, and a driver, real or not, belongs to a process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from grcsf_fast import BackendUnavailableError, backend_info, functional, use_backend
from grcsf_fast.ops import triton

PARTS = 2  # processes side by side: the interpreter uses one core
ROOT = Path(__file__).parent.parent

pytest.importorskip("triton")


def run(*arguments: str, interpret: bool, **variables: str) -> str:
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-8000:]
    return output


def test_ops_in_the_interpreter():
    """Every backend's tests of test_ops.py, and what only these kernels promise."""

    def part(number: int) -> str:
        return run(
            "-m", "pytest", "-q", "-p", "interpreted", "tests/test_ops.py", "tests/kernels_in_interpreter.py",
            "-k", "triton", "--durations=0", interpret=True, GRCSF_PART=f"{number}/{PARTS}", OMP_NUM_THREADS="1",
        )  # fmt: skip

    with ThreadPoolExecutor(PARTS) as pool:
        outputs = list(pool.map(part, range(PARTS)))
    passed = [int(re.search(r"(\d+) passed", output).group(1)) for output in outputs]
    assert min(passed) > 50, outputs[0][-2000:]


def test_traffic_of_odd_shapes():
    """No lane outside a tensor, and every byte of the outputs written once."""
    output = run("-m", "benchmarks.triton_traffic", "--quick", interpret=True)
    assert output.count("| global_compensation") == output.count("| patch_cross_attention") > 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiles_without_spilling(target):
    """One entry of each kind; `make triton` compiles everything."""
    names = [
        *(f"gcu {way} C64 {dims}" for way in ("forward", "backward") for dims in ("2-D", "3-D")),
        *(f"rcu {way} C64 2-D patch 8" for way in ("forward", "backward")),
    ]
    output = run(
        "-m", "benchmarks.triton_compile", "--targets", target, "--dtypes", "bfloat16", "--only", *names,
        interpret=False,
    )  # fmt: skip
    assert all(f"| {target} | bfloat16 | {name}" in output for name in names)


@pytest.mark.skipif(triton.problem() is None, reason="there is a GPU here")
def test_without_a_gpu():
    """By name an error that says why; a tensor of the CPU never goes there."""
    reason = backend_info()["triton"]["reason"]
    assert re.search("built without CUDA|no GPU", reason)
    with pytest.raises(BackendUnavailableError, match=re.escape(reason)), use_backend("triton"):
        pass
    assert functional.select_backend(torch.zeros(1)) != "triton"
