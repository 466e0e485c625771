"""Damaged files, voxels and streams by chance: the same few each time, and a minute of them; `make fuzz` runs ten."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits its memory by Linux's means")


def fuzz(*options: str) -> tuple[list[int], list[int]]:
    """How many headers, gzip streams and sets of voxels were tried, and how many of them were read."""
    script = Path(__file__).with_name("fuzz_volumes.py")
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    counts = [int(number) for number in re.findall(r"\d+", done.stdout)][:6]
    return counts[::2], counts[1::2]


def test_some_damaged_files():
    """Hypothesis may end a search that has tried everything it can think of."""
    tried, read = fuzz("--examples", "60")
    assert all(0 < count <= 60 for count in tried)
    assert all(0 < count < of for count, of in zip(read, tried, strict=True))


@pytest.mark.slow
def test_damaged_files_for_a_minute():
    tried, read = fuzz("--seconds", "60")
    assert all(0 < count < of for count, of in zip(read, tried, strict=True))
