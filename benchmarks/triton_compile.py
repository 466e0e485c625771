"""The Triton kernels compiled for GPUs that are not here, and what came out: ``python -m benchmarks.triton_compile``.

For each target, dtype and entry: registers, stack (anything but 0 is spilled), shared memory, matrix instructions, how
much of a multiprocessor the kernel can fill, and how wide it loads and stores its large tensors. A kernel fails that
spills more, moves a tensor in narrower pieces, needs more shared memory or leaves room for fewer programs than
benchmarks/triton_expected.py says, multiplies without the matrix units or by those instructions of a group of warps
that raced on an H200; exits with 1 when one does.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks import triton_expected
from benchmarks.ops import make_inputs, patch_of
from benchmarks.triton_widths import Widths, widths
from grcsf_fast.data.files import replace_when_done
from grcsf_fast.kernels.triton import gcu, norm, pooling, rcu, rcu_backward
from grcsf_fast.ops.examples import grouped

Entry = tuple[str, Callable[[], Any]]
"""What a launch is called in the table, and the launch."""

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Target:
    """A GPU: what its compiler calls it, shared memory of a program and registers and warps of a multiprocessor."""

    name: str
    target: GPUTarget
    shared: int
    multiprocessor_shared: int
    registers: int
    warps: int


TARGETS = (
    Target("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, 164 * 1024, 65536, 64),
    Target("sm_86", GPUTarget("cuda", 86, 32), 99 * 1024, 100 * 1024, 65536, 48),
    Target("sm_89", GPUTarget("cuda", 89, 32), 99 * 1024, 100 * 1024, 65536, 48),
    Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, 228 * 1024, 65536, 64),
    Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, 228 * 1024, 65536, 64),
    Target("sm_120", GPUTarget("cuda", 120, 32), 99 * 1024, 100 * 1024, 65536, 48),
    # A compute unit of four SIMDs, each with 512 vector registers a lane and 8 wavefronts of 64 lanes.
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, 64 * 1024, 4 * 512 * 64, 32),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Channels, size: those of the default networks, and patches 4 and 7.
SHAPES = {2: ((32, 224), (64, 112), (128, 56), (256, 32), (512, 32)), 3: ((32, 96), (64, 48), (128, 24), (256, 12))}
# What an entry's label says of its kernels where it has several.
OF_KERNEL = {
    "_fine_kernel": ", fine pixels", "_coarse_kernel": ", coarse pixels", "_sums_kernel": ", sums",
    "_patches_kernel": ", patches", "_channels_kernel": ", channels", "_statistics_kernel": ", statistics",
}  # fmt: skip
OTHER_PATCHES = ((2, 64, 112, 4), (2, 64, 112, 7))


class _Driver:
    """Stands in for a GPU's driver: compiles, never runs. Each target needs a device number of its own."""

    def __init__(self, target: GPUTarget, number: int) -> None:
        self.target, self.number = target, number

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type_name: str) -> str:
        return type_name


@contextmanager
def compiling_for(target: GPUTarget, number: int) -> Iterator[list[tuple[str, Any, float]]]:
    """Launches inside compile and do not run; the list gets (name, compiled kernel, seconds)."""
    compiled: list[tuple[str, Any, float]] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        began = time.perf_counter()
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel, time.perf_counter() - began))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Driver(target, number))
    try:
        yield compiled
    finally:
        JITFunction.run = run


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def inspect(kernel: Any, target: Target) -> dict[str, int]:
    """Numbers that the compiler's output holds."""
    found = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    if target.target.backend == "hip":
        text = kernel.asm["amdgcn"]

        def note(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

        wide = len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", text))
        return found | {
            "registers": note("vgpr_count"),
            "stack": note("private_segment_fixed_size"),
            "spills": note("vgpr_spill_count"),
            "matrix": len(re.findall("v_mfma", text)),
            "group matrix": 0,
            "wide loads": wide,
            "loads": len(re.findall(r"(?:global|buffer)_load_", text)),
            "wide stores": len(re.findall(r"(?:global|buffer)_store_(?:dwordx4|b128)", text)),
            "stores": len(re.findall(r"(?:global|buffer)_store_", text)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    names = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code))

    def count(pattern: str) -> int:
        return sum(number for name, number in names.items() if re.match(pattern, name))

    return found | {
        "instructions": sum(names.values()),
        "registers": registers,
        "stack": stack,
        "spills": count("LDL|STL"),
        "matrix": count(r"HMMA|HGMMA|UTC\w*MMA"),
        "group matrix": count(r"HGMMA|UTC\w*MMA"),
        "wide loads": count(r"LDG\.E.*\.128"),
        "loads": count("LDG"),
        "wide stores": count(r"STG\.E.*\.128"),
        "stores": count("STG"),
    }


def occupancy(found: dict[str, int], target: Target) -> float:
    """Share of a multiprocessor's warps that can be there at once, by registers, shared memory and warps."""
    lanes = target.target.warp_size
    each = -(-found["registers"] // 8) * 8 * lanes * found["warps"]
    programs = min(
        target.registers // each if each else 32,
        target.multiprocessor_shared // found["shared"] if found["shared"] else 32,
        target.warps // found["warps"],
        32,
    )
    return programs * found["warps"] / target.warps


def compensations(
    label: str, dims: int, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[Entry]:
    """Op 1 on these scales in one launch; the residual of channels_last features is contiguous all the same."""
    tensors = [make_inputs("global_compensation", 1, c, (size,) * dims, dtype).values() for c, size in shapes]
    features, coarse, *gates = (list(one) for one in zip(*tensors, strict=True))
    features, coarse = ([one.contiguous(memory_format=layout) for one in kind] for kind in (features, coarse))
    grads = [(one, one[:, :1].contiguous()) for one in features]
    scales = list(zip(features, coarse, *gates, strict=True))
    yield f"gcu forward{label}", lambda: gcu.forward(scales, 1e-6)
    yield f"gcu backward{label}", lambda: gcu.backward(grads, scales, 1e-6, [[True] * 5] * len(shapes))


def entries(dtype: torch.dtype) -> Iterator[Entry]:
    """Launches of both ops, by what they are called in the table."""
    for dims, shapes in SHAPES.items():
        last = torch.channels_last if dims == 2 else torch.channels_last_3d
        for shape in shapes:
            yield from compensations(f" C{shape[0]} {dims}-D", dims, [shape], dtype, torch.contiguous_format)
        # What a network calls: all scales that it compensates.
        yield from compensations(f", four {dims}-D scales", dims, shapes[:4], dtype, torch.contiguous_format)
        yield from compensations(f", four {dims}-D scales, channels last", dims, shapes[:4], dtype, last)
    attentions = [(dims, *shape, patch_of((1,) * dims)) for dims, shapes in SHAPES.items() for shape in shapes]
    for dims, channels, size, patch in [*attentions, *OTHER_PATCHES]:
        spatial = (size,) * dims
        given = make_inputs("patch_cross_attention", 1, channels, spatial, dtype)
        tokens = patch**dims
        given["position_bias"] = torch.zeros(given["position_bias"].shape[0], tokens, tokens)
        x, keys, values, weights = grouped(given)
        score = torch.zeros(1, 1, *(size // patch for _ in range(dims)))
        label = f"C{channels} {dims}-D patch {patch}"
        inputs = (x, keys, values, weights, patch, 0.0)
        yield f"rcu forward {label}", lambda i=inputs: rcu.forward(*i)
        yield f"rcu backward {label}", lambda i=inputs, s=score: rcu_backward.backward(i[0], s, *i, [True] * 12)
    for dims, shapes in SHAPES.items():
        last = torch.channels_last if dims == 2 else torch.channels_last_3d
        for (channels, size), layout in itertools.product(shapes, (torch.contiguous_format, last)):
            x = torch.empty(1, channels, *[size] * dims, dtype=dtype).contiguous(memory_format=layout)
            yield from stages(f"C{channels} {dims}-D{', channels last' if layout is last else ''}", x, layout)


def stages(label: str, x: torch.Tensor, layout: torch.memory_format) -> Iterator[Entry]:
    """Norm and pooling, which networks call between the two ops."""
    channels = x.new_ones(x.shape[1], dtype=torch.float32)
    statistics = x.new_ones((1, 2, x.shape[1]), dtype=torch.float32)
    half = x[(..., *[slice(None, None, 2)] * (x.dim() - 2))].contiguous(memory_format=layout)
    yield f"norm forward {label}", lambda: norm.forward(x, channels, channels, 1e-5, 0.01)
    yield f"norm backward {label}", lambda: norm.backward(x, x, channels, channels, statistics, 0.01)
    yield f"pooling forward {label}", lambda: pooling.forward(x, layout)
    yield f"pooling backward {label}", lambda: pooling.backward(half, half, x)


COLUMNS = (
    "target", "dtype", "kernel", "registers", "stack", "spills", "shared KiB", "warps", "occupancy", "matrix",
    "128-bit loads", "128-bit stores", "bits of loads", "bits of stores", "compiled in, s",
)  # fmt: skip


def _shown(bits: Widths) -> str:
    """The narrowest accesses to the large tensors, and the widest where they differ."""
    large = {name: pair for name, pair in bits.items() if name in triton_expected.LARGE.split()}
    return ", ".join(
        f"{name} {least}" if least == most else f"{name} {least} to {most}" for name, (least, most) in large.items()
    )


def problems(
    label: str, found: dict[str, int], loads: Widths, stores: Widths, target: Target, dtype: torch.dtype
) -> str:
    """What a compiled kernel fails by, or nothing."""
    wrong = []
    most = triton_expected.most_stack(f"{target.name} {str(dtype).removeprefix('torch.')} {label}")
    if found["stack"] > most or (found["spills"] and not most):
        wrong.append(f"stack {found['stack']}, spills {found['spills']}; at most {most} bytes of stack expected")
    most_shared = min(target.shared, triton_expected.MOST_SHARED)
    if found["shared"] > most_shared:
        wrong.append(f"{found['shared']} bytes of shared memory, at most {most_shared} expected")
    programs = round(occupancy(found, target) * target.warps / found["warps"])
    if programs < (least := triton_expected.least_programs(label)):
        wrong.append(f"{programs} programs a multiprocessor, at least {least} expected")
    if not found["stores"]:
        wrong.append("stores nothing")
    if label.startswith("rcu") and not label.endswith("sums") and not found["matrix"]:
        wrong.append("no matrix instruction")
    if found["group matrix"]:
        wrong.append(f"{found['group matrix']} matrix instructions of a group of warps (kernels/triton/patches.py)")
    for kind, bits in (("loads", loads), ("stores", stores)):
        wrong += triton_expected.too_narrow(f"{target.name} {label}", kind, bits, dtype.itemsize)
    return "; ".join(wrong)


def compile_all(target_name: str, dtype_name: str, only: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Rows of the table, and what fails by target, dtype and kernel."""
    (number,) = (number for number, one in enumerate(TARGETS) if one.name == target_name)
    target, dtype = TARGETS[number], getattr(torch, dtype_name)
    rows = []
    failures = {}
    for label, launch in entries(dtype):
        if not any(text in label for text in only):
            continue
        with compiling_for(target.target, number) as compiled:
            try:
                launch()
            # Whatever the compiler raises is the entry's result.
            except Exception as error:
                failures[f"{target_name} {dtype_name} {label}"] = f"{type(error).__name__}: {str(error)[:300]}"
        for name, kernel, seconds in compiled:
            found = inspect(kernel, target)
            loads, stores = widths(kernel)
            shown = label + OF_KERNEL.get(name, "")
            cells = (
                target_name, dtype_name, shown, found["registers"], found["stack"], found["spills"],
                f"{found['shared'] / 1024:.0f}", found["warps"], f"{occupancy(found, target):.2f}",
                found["matrix"], f"{found['wide loads']} of {found['loads']}",
                f"{found['wide stores']} of {found['stores']}", _shown(loads), _shown(stores), f"{seconds:.1f}",
            )  # fmt: skip
            rows.append(f"| {' | '.join(map(str, cells))} |")
            wrong = problems(shown, found, loads, stores, target, dtype)
            if wrong:
                failures[f"{target_name} {dtype_name} {shown}"] = wrong
    return rows, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=[one.name for one in TARGETS])
    parser.add_argument("--dtypes", nargs="+", default=[str(one).removeprefix("torch.") for one in DTYPES])
    parser.add_argument("--only", nargs="+", default=[""], help="entries whose names hold one of these texts")
    parser.add_argument("-o", "--output", type=Path, help="Markdown report")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    tasks = [(target, dtype, options.only) for target in options.targets for dtype in options.dtypes]
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    print("\n".join(lines), flush=True)
    failures: dict[str, str] = {}
    with concurrent.futures.ProcessPoolExecutor(
        min(len(tasks), os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        for rows, failed in pool.map(compile_all, *zip(*tasks, strict=True)):
            print("\n".join(rows), flush=True)
            lines += rows
            failures |= failed
    wrong = [f"{entry}: {text}" for entry, text in failures.items()]
    lines += ["", "May spill, as listed in benchmarks/triton_expected.py, by bytes of stack:", ""]
    lines += [f"- `{pattern}`: {most}" for pattern, most in triton_expected.MOST_STACK]
    lines += ["", "Fails:" if wrong else "Nothing fails.", "", *(f"- {one}" for one in wrong)]
    if options.output is not None:
        head = [
            "# The Triton kernels, compiled", "", f"triton {triton.__version__}, torch {torch.__version__}; "
            "`python -m benchmarks.triton_compile`; no GPU was there.", "", "Bits are those of the narrowest access to "
            "a tensor, and of the widest where they differ.", "",
        ]  # fmt: skip
        with replace_when_done(options.output) as (part,):
            part.write_text("\n".join([*head, *lines, ""]))
    if wrong:
        print("\n".join(["fails:", *wrong]))
        sys.exit(1)


if __name__ == "__main__":
    main()
