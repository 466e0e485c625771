"""Everything that needs a GPU, in one command: ``make gpu``.

The op tests on the device; then both ops against their peers, forward and with gradients, and the network; times by
events, with the caches flushed before each, interleaved, medians. Bandwidth and rates are stated beside those of a
large copy and of large matrix products, measured in the same run. Writes one JSON and one Markdown report; without a
GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.contest import SHAPES, contestants_of, make_inputs, median_seconds, operations, patch_of
from benchmarks.peers import OPS
from grcsf_fast import GRCSF, use_backend
from grcsf_fast.data.files import replace_when_done

ROUNDS = 11


class Clock:
    """Seconds of a call on the device, its caches cold."""

    def __init__(self) -> None:
        self.flush = torch.empty(64 * 2**20, device="cuda")

    def __call__(self, call: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def ceilings(clock: Clock) -> dict[str, float]:
    """Bytes a second of a large copy, operations a second of large products."""
    source = torch.ones(256 * 2**20, device="cuda")
    target = torch.empty_like(source)
    found = {"bytes": 2 * source.nbytes / median_seconds({"copy": lambda: target.copy_(source)}, ROUNDS, clock)["copy"]}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        seconds = median_seconds({"product": lambda a=a, b=b: a @ b}, ROUNDS, clock)["product"]
        found[str(dtype).removeprefix("torch.")] = 2 * 8192**3 / seconds
    return found


def op_row(op: str, dtype: torch.dtype, backward: bool, shape: Any, clock: Clock) -> dict[str, Any]:
    batch, channels, spatial = shape
    patch = patch_of(spatial)
    if op == OPS[1]:
        spatial = tuple(-(-size // patch) * patch for size in spatial)
    inputs = {name: one.cuda() for name, one in make_inputs(op, batch, channels, spatial, dtype).items()}
    settings = {} if op == OPS[0] else {"patch_size": patch}
    torch._dynamo.reset()
    with torch.set_grad_enabled(backward):
        began = time.perf_counter()
        ready, absent = contestants_of(op, inputs, settings, backward, "triton")
        prepared = time.perf_counter() - began
        seconds = median_seconds(ready, ROUNDS, clock)
    memory = {}
    for name, call in ready.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        memory[name] = torch.cuda.max_memory_allocated() - before
    large: list[Tensor] = [one for one in inputs.values() if one.dim() > 2]
    moved = sum(one.nbytes for one in large) + large[0].nbytes
    return {
        "op": op, "dtype": str(dtype).removeprefix("torch."), "pass": "both" if backward else "forward",
        "shape": [batch, channels, *spatial], "seconds": seconds, "absent": absent, "peak_bytes": memory,
        "prepared_seconds": prepared, "bytes": moved, "operations": operations(op, batch, channels, spatial),
    }  # fmt: skip


def network_rows(clock: Clock) -> list[dict[str, Any]]:
    """The default 2-D network, batch 8, 224x224, forward and training step."""
    torch.manual_seed(0)
    network = GRCSF(2, 1, 1).cuda()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    image, maps = torch.randn(8, 1, 224, 224, device="cuda"), torch.rand(8, 2, 224, 224, device="cuda")
    compiled = torch.compile(network, dynamic=False)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):

        def forward(model: Any, backend: str, dtype: torch.dtype = dtype) -> Tensor:
            network.eval()
            with use_backend(backend), torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                return model(image, maps)

        def step(model: Any, backend: str, dtype: torch.dtype = dtype) -> None:
            network.train()
            optimizer.zero_grad()
            with use_backend(backend):
                with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                    loss = model(image, maps).float().square().mean()
                loss.backward()
            optimizer.step()

        for title, run in (("forward", forward), ("training step", step)):
            torch._dynamo.reset()
            seconds = median_seconds(
                {
                    "triton": lambda run=run: run(network, "triton"),
                    "reference": lambda run=run: run(network, "reference"),
                    "compiled reference": lambda run=run: run(compiled, "reference"),
                },
                ROUNDS,
                clock,
            )
            outputs = [forward(network, backend).float() for backend in ("triton", "reference")]
            difference = float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
            rows.append(
                {
                    "what": title,
                    "dtype": str(dtype).removeprefix("torch."),
                    "seconds": seconds,
                    "difference": difference,
                }
            )
    return rows


def tables(report: dict[str, Any]) -> list[str]:
    """The report as Markdown."""
    ceiling = report["ceilings"]
    lines = [
        "# On a GPU", "",
        f"`make gpu` on {report['device']}; torch {report['torch']}, triton {report['triton']}; "
        f"medians of {ROUNDS} interleaved rounds, caches flushed.", "",
        f"Tests: {report['tests']}", "",
        f"Copy {ceiling['bytes'] / 1e9:.0f} GB/s; products {ceiling['float32'] / 1e12:.0f} (float32) and "
        f"{ceiling['bfloat16'] / 1e12:.0f} (bfloat16) Top/s.", "",
        "| op, dtype, pass, shape | triton, us | reference / triton | best peer / triton | of copy | peak MB |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in report["ops"]:
        seconds = row["seconds"]
        label = f"{row['op']}, {row['dtype']}, {row['pass']}, {'x'.join(map(str, row['shape']))}"
        if "triton" not in seconds:
            lines.append(f"| {label} | {row['absent'].get('triton')} | | | | |")
            continue
        ours = seconds["triton"]
        peers = {name: value for name, value in seconds.items() if name != "triton"}
        best = min(peers, key=peers.get)
        share = f"{row['bytes'] / ours / ceiling['bytes']:.2f}" if row["pass"] == "forward" else ""
        lines.append(
            f"| {label} | {1e6 * ours:.0f} | {seconds.get('reference', math.nan) / ours:.1f} | "
            f"{peers[best] / ours:.1f} ({best}) | {share} | {row['peak_bytes']['triton'] / 1e6:.0f} |"
        )
    lines += [
        "",
        "| network | triton, ms | reference / triton | compiled reference / triton | difference |",
        "|---|---|---|---|---|",
    ]
    for row in report["network"]:
        ours = row["seconds"]["triton"]
        lines.append(
            f"| {row['what']}, {row['dtype']} | {1000 * ours:.2f} | {row['seconds']['reference'] / ours:.2f} | "
            f"{row['seconds']['compiled reference'] / ours:.2f} | {row['difference']:.1e} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/gpu"), help="without an ending")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch finds none; nothing was measured", file=sys.stderr)
        sys.exit(2)
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_ops.py", "-k", "triton"],
        capture_output=True,
        text=True,
        check=False,
    )
    print(tests.stdout[-4000:], tests.stderr[-2000:], flush=True)
    clock = Clock()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "tests": tests.stdout.strip().splitlines()[-1],
        "ceilings": ceilings(clock), "ops": [], "network": [],
    }  # fmt: skip
    for op in OPS:
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                for shape in SHAPES:
                    report["ops"].append(op_row(op, dtype, backward, shape, clock))
                    print(json.dumps(report["ops"][-1]), flush=True)
    report["network"] = network_rows(clock)
    text = "\n".join(tables(report))
    print(text)
    with replace_when_done(options.output.with_suffix(".json"), options.output.with_suffix(".md")) as (data, page):
        data.write_text(json.dumps(report, indent=1))
        page.write_text(text)
    sys.exit(tests.returncode)


if __name__ == "__main__":
    main()
