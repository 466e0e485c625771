"""What Triton compiles of the numbers that scales are described by, without a GPU; the interpreter knows no such
difference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_numbers_that_are_constants_and_multiples():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "tests/ops/compiled_scales.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    empty_scale, strides = map(json.loads, done.stdout.splitlines())
    assert empty_scale == ["_fine_kernel", "_coarse_kernel", "_sums_kernel"]
    assert strides == [1, [128, 128], [128, 128]]
