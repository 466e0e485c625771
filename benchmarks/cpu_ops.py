"""Both ops on the processor against their peers: ``make bench-ops``.

Every contestant is checked against the float64 reference first, and a wrong one gets no time. Rounds are interleaved:
each contestant once a round, in another order each time, so that a slow moment of the machine hits all of them; figures
are medians. Op 2 takes the smallest multiple of its patch where a shape is none (28 becomes 32). The floor is
what the machine needs at the least: every input read once and every output written once at the copy bandwidth, or the
multiplications and additions at the rate of a large matrix product, both measured in the same run, whichever is more.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import HEADS, MAPS, SHAPES, contestants_of, make_inputs, median_seconds, operations, patch_of
from benchmarks.peers import OPS, peers_of
from grcsf_fast import functional, use_backend
from grcsf_fast.cli import keep_memory
from grcsf_fast.data.files import replace_when_done


def copy_bandwidth() -> float:
    """Bytes a second read and written by a copy into memory that is already there."""
    source = torch.ones(64 * 2**20)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / median_seconds({"copy": lambda: target.copy_(source)}, 9)["copy"]


def peak_rate() -> float:
    """Operations a second of a large float32 matrix product."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    out = torch.empty(2048, 2048)
    return 2 * 2048**3 / median_seconds({"product": lambda: torch.mm(a, b, out=out)}, 9)["product"]


def measure_shape(
    op: str, dtype: torch.dtype, backward: bool, shape: Any, rounds: int, threads: int
) -> tuple[dict[str, float], dict[str, str], int]:
    """Seconds of those that are right, why the others are not among them, and the bytes of inputs and outputs."""
    batch, channels, spatial = shape
    logits = 4 * batch * math.prod(spatial) * MAPS * HEADS * patch_of(spatial) ** len(spatial)
    # Kept memory lies in pieces: a reference that stores several such tensors for its backward would need over 24 GiB.
    if not (backward and op == OPS[1] and logits > 2**30):
        keep_memory()
    torch.set_num_threads(threads)
    inputs = make_inputs(op, batch, channels, spatial, dtype)
    settings = {} if op == OPS[0] else {"patch_size": patch_of(spatial)}
    with torch.set_grad_enabled(backward):
        ready, absent = contestants_of(op, inputs, settings, backward, "cpp")
        seconds = median_seconds(ready, rounds)
    tokens = patch_of(spatial) ** len(spatial) if op == OPS[1] else channels
    first = next(iter(inputs.values()))
    outputs = first.nbytes + first.numel() // tokens // (channels if op == OPS[1] else 1) * 4
    return seconds, absent, outputs + sum(tensor.nbytes for tensor in inputs.values())


def measure(
    op: str, dtype: torch.dtype, backward: bool, shapes: Any, rounds: int, threads: int, machine: dict[str, float]
) -> list[str]:
    """Lines of a Markdown table. Each shape has a process of its own, so that none inherits memory, or lack of it."""
    names = ["cpp", *peers_of(op)]
    lines = [
        f"| shape | {' | '.join(f'{name}, ms' for name in names)} | reference / cpp | best peer / cpp | cpp / floor |",
        "|---" * (len(names) + 4) + "|",
    ]
    over_reference, over_best, notes = [], [], []
    for batch, channels, wanted in shapes:
        spatial = wanted if op == OPS[0] else tuple(-(-size // patch_of(wanted)) * patch_of(wanted) for size in wanted)
        label = f"{batch} x C{channels} {'x'.join(map(str, spatial))}"
        alone = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=alone) as process:
            job = process.submit(measure_shape, op, dtype, backward, (batch, channels, spatial), rounds, threads)
            seconds, absent, moved = job.result()
        notes += [f"{label}, {name}: {reason}" for name, reason in absent.items()]
        floor = max(moved / machine["bytes"], operations(op, batch, channels, spatial) / machine["operations"])
        peers = [value for name, value in seconds.items() if name != "cpp"]
        over_reference.append(seconds["reference"] / seconds["cpp"])
        over_best.append(min(peers) / seconds["cpp"])
        cells = [f"{1000 * seconds[name]:.1f}" if name in seconds else "-" for name in names]
        share = "" if backward else f"{seconds['cpp'] / floor:.2f}"
        lines.append(f"| {label} | {' | '.join(cells)} | {over_reference[-1]:.1f} | {over_best[-1]:.1f} | {share} |")
        print(lines[-1], flush=True)
    mean = [statistics.geometric_mean(values) for values in (over_reference, over_best)]
    lines.append(f"| geometric mean | {' | '.join('' for _ in names)} | {mean[0]:.1f} | {mean[1]:.1f} | |")
    return [*lines, "", *(f"- {note}" for note in notes), ""]


def growth_beyond_outputs() -> int:
    """Bytes by which the process grew at its peak during a forward of op 2, less those of the outputs. Linux only."""
    inputs = make_inputs(OPS[1], 8, 256, (32, 32), torch.float32)

    def kilobytes(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name))

    with use_backend("cpp"), torch.no_grad():
        outputs = functional.patch_cross_attention(**inputs, patch_size=8)
        size = sum(one.nbytes for one in outputs)
        # The first outputs stay, so that the second need memory of their own. Writing 5 resets the peak.
        Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("VmRSS")
        again = functional.patch_cross_attention(**inputs, patch_size=8)
        grown = 1024 * (kilobytes("VmHWM") - before)
        del outputs, again
    return max(0, grown - size)


def threshold_and_memory(rounds: int) -> list[str]:
    """Op 2 with nine patches in ten skipped, and the memory it takes beyond its outputs."""
    batch, channels, spatial = SHAPES[0]
    inputs = make_inputs(OPS[1], batch, channels, spatial, torch.float32)
    with use_backend("cpp"), torch.no_grad():
        score = functional.patch_cross_attention(**inputs, patch_size=8)[1]
        # Shift the scores so that 0.5 passes one patch in twenty.
        inputs["score_bias"] -= torch.logit(score.flatten().kthvalue(int(0.95 * score.numel())).values)
        passing = float((functional.patch_cross_attention(**inputs, patch_size=8)[1] >= 0.5).float().mean())
        runs = {
            str(threshold): lambda threshold=threshold: functional.patch_cross_attention(
                **inputs, patch_size=8, threshold=threshold
            )
            for threshold in (0.0, 0.5)
        }
        seconds = median_seconds(runs, rounds)
    return [
        f"- threshold 0.5 with {100 * passing:.1f} % of the patches passing: "
        f"{seconds['0.0'] / seconds['0.5']:.1f} times as fast as threshold 0 "
        f"({1000 * seconds['0.0']:.1f} and {1000 * seconds['0.5']:.1f} ms, C32 224x224)",
        f"- memory of an op 2 forward beyond its outputs, C256 32x32, {torch.get_num_threads()} threads: "
        f"{growth_beyond_outputs() / 1024:.0f} KiB (growth of the process's peak)",
        "",
    ]


def cost_of_a_call(rounds: int) -> list[str]:
    """What one call for all scales of op 1 could save: the fixed cost of a call, beside the calls of a network."""
    scales = [make_inputs(OPS[0], *shape, torch.float32) for shape in SHAPES[:4]]
    smallest = make_inputs(OPS[0], 1, 1, (2, 2), torch.float32)

    def each_scale() -> None:
        for inputs in scales:
            functional.global_compensation(**inputs)

    def nearly_empty() -> None:
        for _ in range(100):
            functional.global_compensation(**smallest)

    with use_backend("cpp"), torch.no_grad():
        seconds = median_seconds({"scales": each_scale, "empty": nearly_empty}, rounds)
    return [
        f"- op 1 at the four 2-D scales, one call each: {1000 * seconds['scales']:.1f} ms; a call on 2x2 pixels: "
        f"{10 * seconds['empty'] * 1000:.0f} microseconds, which is all that a grouped call could save, three times",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--passes", nargs="+", choices=("forward", "both"), default=("forward", "both"))
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"))
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="numbers of the shapes")
    parser.add_argument("-o", "--output", type=Path, help="Markdown report")
    options = parser.parse_args()
    keep_memory()
    shapes = [SHAPES[number] for number in options.shapes]
    lines = [
        "# Both ops on the processor",
        "",
        f"`python -m benchmarks.cpu_ops {shlex.join(sys.argv[1:])}`",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; "
        f"medians of {options.rounds} interleaved rounds; memory kept by the program, except for op 2 forward and "
        "backward at its largest shape (fresh pages, for all contestants).",
        "",
    ]
    for threads in options.threads:
        torch.set_num_threads(threads)
        machine = {"bytes": copy_bandwidth(), "operations": peak_rate()}
        lines += [
            f"## {threads} threads",
            "",
            f"Copy {machine['bytes'] / 1e9:.1f} GB/s, product {machine['operations'] / 1e9:.0f} Gop/s.",
            "",
        ]
        for op in options.ops:
            for dtype in options.dtypes:
                for which in options.passes:
                    title = f"### {op}, {dtype}, {'forward' if which == 'forward' else 'forward and backward'}"
                    print(title, flush=True)
                    table = measure(
                        op, getattr(torch, dtype), which == "both", shapes, options.rounds, threads, machine
                    )
                    lines += [title, "", *table]
        if OPS[0] in options.ops:
            lines += ["### One call a scale", "", *cost_of_a_call(options.rounds)]
        if OPS[1] in options.ops:
            lines += ["### Threshold and memory", "", *threshold_and_memory(options.rounds)]
    if options.output is not None:
        with replace_when_done(options.output) as (part,):
            part.write_text("\n".join(lines))
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
