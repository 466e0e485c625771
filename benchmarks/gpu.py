"""Everything that needs a GPU, in one command: ``make gpu``.

The tests of ops and predictions on the device, then the benchmark suite on it within eight minutes, its report, and how
busy a folder keeps the GPU (``benchmarks/gpu_timeline.py``); without a GPU it says so and exits with 2. Times
are by events, with the caches flushed before each call (``benchmarks/contest.py``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.records import load
from benchmarks.report import write
from benchmarks.run import default_output, suite

# Seconds after which no further contest begins; the one that runs then still ends.
BUDGET = 420
# Bytes of the GPU's that a process of tests needs, by arithmetic: the largest shapes, which run one at a time
# (tests/ops/conftest.py), with the reference's float64 numbers of patches; and any other test.
LARGEST, OTHERS = 15e9, 5e9


def processes(memory: float) -> int:
    """That run tests side by side on a GPU of so many bytes."""
    return max(1, min(8, int((memory - LARGEST) // OTHERS) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="result file; default: by GPU and date")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch finds none; nothing was measured", file=sys.stderr)
        sys.exit(2)
    # In processes of their own: what one kernel does to the GPU's memory ends the others in its process.
    # test_triton.py runs in the interpreter, here as anywhere else.
    chosen = ["tests/ops", "tests/inference/test_cases_on_a_gpu.py"]
    chosen += ["--ignore", "tests/ops/test_triton.py", "-k", "triton or on_a_gpu"]
    side_by_side = str(processes(torch.cuda.get_device_properties(0).total_memory))
    chosen += ["-n", side_by_side, "--dist", "loadgroup"]
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", *chosen], check=False)
    output = options.output or default_output("cuda")
    status, written = suite(output, ["--device", "cuda", "--budget", str(BUDGET)], processes=1)
    print(written, *write(load(written), written.with_suffix(".md")), sep="\n")
    busy = written.with_name(f"{written.stem}-timeline.json")
    timeline = subprocess.run([sys.executable, "-m", "benchmarks.gpu_timeline", "-o", str(busy)], check=False)
    sys.exit(tests.returncode or status or timeline.returncode)


if __name__ == "__main__":
    main()
