"""Damaged files, voxels and streams by chance: the same few each time, and a minute of them; `make fuzz` runs ten."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits its memory by Linux's means")


def fuzz(*options: str) -> list[int]:
    """How many headers, gzip streams and sets of voxels were tried."""
    script = Path(__file__).with_name("fuzz_volumes.py")
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return [int(word) for word in done.stdout.split() if word.isdigit()][:3]


def test_some_damaged_files():
    """Hypothesis may end a search that has tried everything it can think of."""
    assert all(0 < count <= 60 for count in fuzz("--examples", "60"))


@pytest.mark.slow
def test_damaged_files_for_a_minute():
    assert all(count > 50 for count in fuzz("--seconds", "60"))
