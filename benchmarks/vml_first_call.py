"""How often the first square root of a process is wrong, without and with ``resolve_kernels``; Linux, as root.

Each trial forks a process and takes MKL's code out of the page cache, so that a first call is as slow as after booting.
"""

from __future__ import annotations

import argparse
import os
import runpy
import time
from pathlib import Path

import torch

# Not imported: importing the package makes the first calls.
VML = Path(__file__).parents[1] / "grcsf_fast/ops/vml.py"


def is_wrong(numbers: torch.Tensor, resolve: bool) -> bool:
    """In a process of its own: does a first square root on two threads err by more than float32 does?"""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        values = 2 * numbers
        if resolve:
            runpy.run_path(str(VML))["resolve_kernels"]()
        Path("/proc/sys/vm/drop_caches").write_text("1")
        error = (values.sqrt().double().square() / values - 1).abs().max()
        os.write(writer, b"1" if error > 1e-6 else b"0")
        os._exit(0)
    os.close(writer)
    answer = os.read(reader, 1)
    os.close(reader)
    os.waitpid(child, 0)
    return answer == b"1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="time for each of the two (default: %(default)s)")
    seconds = parser.parse_args().seconds
    # Until it forks, the process must have no other threads.
    torch.set_num_threads(1)
    numbers = torch.arange(1, 400_001, dtype=torch.float32)
    for resolve in (False, True):
        end = time.monotonic() + seconds
        trials = wrong = 0
        while time.monotonic() < end:
            wrong += is_wrong(numbers, resolve)
            trials += 1
        print(f"{'with' if resolve else 'without'} resolve_kernels: {wrong} of {trials} processes wrong")


if __name__ == "__main__":
    main()
