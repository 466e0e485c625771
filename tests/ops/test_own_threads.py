"""The kernels' own threads, of builds without OpenMP, in a C++ program."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)

pytestmark = pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="no C++ compiler")


@pytest.mark.parametrize("options", [["-O2"], ["-O1", "-g", "-fsanitize=thread"]], ids=["plain", "thread sanitizer"])
def test_loops_meetings_callers_and_a_fork(tmp_path, options):
    program = tmp_path / "threads"
    sources = [str(ROOT / "kernels/cpu/threads.cpp"), str(Path(__file__).with_name("own_threads.cpp"))]
    command = [COMPILER, "-std=c++17", "-pthread", *options, f"-I{ROOT / 'kernels/cpu'}", *sources, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and ("tsan" in built.stderr or "-fsanitize" in built.stderr):
        pytest.skip("the compiler has no thread sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [str(program)], capture_output=True, text=True, timeout=600
    )  # where threads wait for each other for good
    assert done.returncode == 0, done.stderr
