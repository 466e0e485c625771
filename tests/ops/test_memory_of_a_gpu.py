"""How the tests of `make gpu` share the memory of one GPU, as far as that is known without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]


def pytest_says(*arguments: str) -> str:
    """In a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_largest_shapes_are_one_group():
    """Of both ops, norm and pooling, in each dtype and layout: 2 x 96^3 pixels."""
    said = pytest_says("--collect-only", "-m", "xdist_group", "tests/ops/test_on_a_gpu.py")
    named = [line for line in said.splitlines() if "::" in line]
    assert len(named) == 4 * 3 * 2
    assert all("shape4" in line for line in named)


def test_memory_goes_back_after_each_test(tmp_path):
    """By a stand-in for the GPU, which is used from the second test on."""
    (tmp_path / "test_it.py").write_text("""
import torch
torch.cuda.empty_cache = lambda: print("emptied")
def test_on_the_processor():
    print("first")
def test_on_a_gpu():
    torch.cuda.is_initialized = lambda: True
    print("second")
def test_again():
    print("third")
""")
    said = pytest_says("-s", "-p", "conftest", f"--rootdir={ROOT}", str(tmp_path))
    assert re.findall("first|second|third|emptied", said) == ["first", "second", "emptied", "third", "emptied"]


def test_fewer_processes_on_a_smaller_gpu():
    assert [gpu.processes(size * 1e9) for size in (141, 80, 40, 24, 16)] == [8, 8, 6, 2, 1]
