"""The whole suite into one result file: ``make bench``, or ``python -m benchmarks.run [--quick]``.

Further options are pytest's and the suite's. Three processes one after another (``--quick``: one) measure everything, a
third of the rounds each, because where memory and code happen to lie stays the same within a process. The file is
benchmarks/results/MACHINE-DATE.json and appears under its name when it is complete; a run with failures is stored with
"-failed" in the name and ends with pytest's exit status. Run nothing beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.machine import machine_name
from benchmarks.records import join, load
from benchmarks.report import summary, write
from grcsf_fast.data.files import replace_when_done

__all__ = ["RESULTS", "default_output", "suite"]

RESULTS = Path(__file__).parent / "results"
PROCESSES = 3


def suite(output: Path, options: Sequence[str], processes: int) -> tuple[int, Path]:
    """Run it with these options of pytest; its exit status and the file that was written."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "--benchmark-only"]
        for number in range(1, processes + 1):
            part = Path(folder) / f"{number}.json"
            own = [f"--part={number}/{processes}", f"--compiled={folder}/compiled", f"--benchmark-json={part}"]
            status = subprocess.run([*command, *own, *options], check=False).returncode
            if part.exists():
                parts.append(json.loads(part.read_text()))
            else:
                status = status or 1
            if status != 0:
                break
    if not parts:
        raise RuntimeError(f"expected results in {output.name}, got none: exit status {status} of pytest")
    target = output if status == 0 else output.with_stem(f"{output.stem}-failed")
    with replace_when_done(target) as (written,):
        command = " ".join(["python -m benchmarks.run", *options])
        written.write_text(json.dumps(join(parts) | {"command": command}, indent=1))
    return status, target


def default_output(device: str) -> Path:
    return RESULTS / f"{machine_name(device)}-{datetime.date.today()}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("-o", "--output", type=Path, help="result file; default: by machine and date")
    parser.add_argument("--report", action="store_true", help="also the page and its pictures, beside the file")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds, one process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    options, rest = parser.parse_known_args()
    if options.output is None and (options.quick or rest):
        parser.error("-o: expected a file for --quick and for further options; the default one is of the whole suite")
    output = options.output or default_output(options.device)
    more = ["--device", options.device, *(["--quick"] if options.quick else []), *rest]
    status, written = suite(output, more, 1 if options.quick else PROCESSES)
    print(*summary(load(written)), written, sep="\n")
    if options.report:
        print(*write(load(written), written.with_suffix(".md")), sep="\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
