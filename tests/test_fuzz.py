"""A minute of damaged files; `make fuzz` runs ten."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory by Linux's means")
def test_damaged_files_for_a_minute():
    script = Path(__file__).with_name("fuzz_volumes.py")
    done = subprocess.run([sys.executable, str(script), "--seconds", "60"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    headers, streams = [int(word) for word in done.stdout.split() if word.isdigit()][:2]
    assert headers > 100
    assert streams > 100
