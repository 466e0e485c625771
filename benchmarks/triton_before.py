"""The Triton kernels of the two ops beside those of an older commit, compiled: ``python -m benchmarks.triton_before``.

Both are compiled for an H100 that is not here, into an empty cache, for one image of a default network's size: how many
instructions, registers and bytes of shared memory each kernel takes, what it spills, how much of a multiprocessor it
can fill, and how long a first call waits for the compiler; and how many kernels a training with crops of several sizes
compiles. Nothing runs and nothing is timed but the compiler.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from benchmarks import triton_compile
from benchmarks.ops import make_inputs, patch_of
from benchmarks.peers import OPS
from benchmarks.triton_dram import TorchBytes
from grcsf_fast.data.files import replace_when_done
from grcsf_fast.kernels.triton import gcu, rcu, rcu_backward
from grcsf_fast.ops.examples import grouped

# The last one before both ops' kernels were written anew.
BEFORE = "e9859c5"
ABOUT_BEFORE = (
    "There op 1 computed less, as it had no strength per channel, and op 2 read memory on an H200 that was not its own."
)
ROOT = Path(__file__).parents[1]
TARGET = next(one for one in triton_compile.TARGETS if one.name == "sm_90")
SIDES = ("before", "now")
SHAPES = ((32, (224, 224)), (64, (48, 48, 48)))
DTYPES = (torch.float32, torch.bfloat16)
CROPS = (96, 112, 128, 160, 224)  # edges, of 32 channels


@dataclass(frozen=True)
class Kernels:
    """The modules of both ops."""

    gcu: ModuleType
    rcu: ModuleType
    rcu_backward: ModuleType


@dataclass(frozen=True)
class Call:
    """What became of one call: each kernel's name and numbers, seconds to compile all, operations of PyTorch's."""

    label: str
    side: str
    kernels: list[tuple[str, dict[str, int]]]
    seconds: float
    torch_calls: int


def kernels_of(commit: str, folder: Path) -> Kernels:
    """Those of a commit of this repository, whose files are kept in ``folder``, where Triton reads them.

    Raises:
        ValueError: no such commit here, or one without Triton kernels.
    """
    done = subprocess.run(["git", "archive", commit, "kernels/triton"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"commit: expected one with kernels/triton, got {commit!r}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    name, path = f"kernels_of_{commit}", folder / "kernels/triton"
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    if spec is None or spec.loader is None:
        raise ValueError(f"commit: expected one with kernels/triton, got {commit!r}")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    found = {one: importlib.import_module(f"{name}.{one}") for one in ("gcu", "rcu")}
    apart = (path / "rcu_backward.py").exists()
    return Kernels(**found, rcu_backward=importlib.import_module(f"{name}.rcu_backward") if apart else found["rcu"])


def calls(
    kernels: Kernels, channels: int, spatial: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Forward and backward of both ops for one image."""
    given = list(make_inputs(OPS[0], 1, channels, spatial, dtype).values())
    grads = given[0], given[0][:, :1].contiguous()
    if "scales" in inspect.signature(kernels.gcu.forward).parameters:
        scales = [tuple(given)]
        yield "op 1, forward", lambda: kernels.gcu.forward(scales, 1e-6)
        yield "op 1, backward", lambda: kernels.gcu.backward([grads], scales, 1e-6, [[True] * 5])
    else:
        lists = [[one] for one in given[:4]]
        yield "op 1, forward", lambda: kernels.gcu.forward(*lists, 1e-6)
        yield (
            "op 1, backward",
            lambda: kernels.gcu.backward([grads[0]], [grads[1]], *lists, 1e-6, [[True] * 4]),
        )
    patch = patch_of(spatial)
    attended = *grouped(make_inputs(OPS[1], 1, channels, spatial, dtype)), patch, 0.0
    score = torch.zeros(1, 1, *(size // patch for size in spatial))
    yield "op 2, forward", lambda: kernels.rcu.forward(*attended)
    yield (
        "op 2, backward",
        lambda: kernels.rcu_backward.backward(attended[0], score, *attended, [True] * 12),
    )


def compiled(label: str, side: str, call: Callable[[], Any]) -> Call:
    number = triton_compile.TARGETS.index(TARGET)
    with triton_compile.compiling_for(TARGET.target, number) as launched, TorchBytes() as counted:
        call()
    names = [name.strip("_").removesuffix("_kernel") for name, _, _ in launched]
    kernels = [(name, triton_compile.inspect(one, TARGET)) for name, (_, one, _) in zip(names, launched, strict=True)]
    return Call(label, side, kernels, sum(seconds for _, _, seconds in launched), counted.calls)


def variants(kernels: Kernels) -> dict[str, int]:
    """How many kernels each call compiles over all crops, in float32: one of another specialisation is another one."""
    number = triton_compile.TARGETS.index(TARGET)
    found: dict[str, set[str]] = {}
    for edge in CROPS:
        for what, call in calls(kernels, 32, (edge, edge), torch.float32):
            with triton_compile.compiling_for(TARGET.target, number) as launched:
                call()
            found.setdefault(what, set()).update(kernel.hash for _, kernel, _ in launched)
    return {what: len(hashes) for what, hashes in found.items()}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _cells(call: Call) -> Iterator[list[str]]:
    for name, found in call.kernels:
        yield [
            call.label, call.side, name, *(str(found[one]) for one in ("instructions", "registers", "stack", "spills")),
            f"{found['shared'] / 1024:.0f}", str(found["warps"]), f"{triton_compile.occupancy(found, TARGET):.2f}",
        ]  # fmt: skip


HEAD = (
    "call", "", "kernel", "instructions", "registers", "stack, bytes", "instructions that spill", "shared, KiB",
    "warps", "occupancy",
)  # fmt: skip


def page(found: Sequence[Call], crops: Mapping[str, Mapping[str, int]], commit: str, command: str) -> str:
    """``crops``: of each side, see :func:`variants`."""
    labels = list(dict.fromkeys(one.label for one in found))
    sums = []
    for label in labels:
        pair = [next(one for one in found if (one.label, one.side) == (label, side)) for side in SIDES]

        def both(of: Callable[[Call], Any], pair: list[Call] = pair) -> str:
            return " / ".join(str(of(one)) for one in pair)

        sums.append([
            label, both(lambda one: len(one.kernels)), both(lambda one: one.torch_calls),
            *(
                both(lambda one, key=key: sum(numbers[key] for _, numbers in one.kernels))
                for key in ("instructions", "spills")
            ),
            both(lambda one: f"{one.seconds:.1f}"),
        ])  # fmt: skip
    today = datetime.datetime.now(datetime.UTC).date()
    return "\n".join([
        "# The Triton kernels before and now", "",
        f"triton {triton.__version__}, torch {torch.__version__}, {today}; `{command}`; no GPU was there.", "",
        f"Compiled for {TARGET.name} (H100), one image; before: commit {commit}. "
        + (f"{ABOUT_BEFORE} " if commit == BEFORE else "")
        + "Instructions are those of the code, not those that a program runs: loops count once. None of it is a time; "
        "seconds are those of the compiler on the machine that wrote this, beside other work.", "",
        "Of a call, before / now:", "",
        *_table(("call", "kernels launched", "operations of PyTorch's", "instructions", "of them spill",
                 "seconds to compile"), sums), "",
        f"Kernels compiled for crops of {', '.join(map(str, CROPS))} pixels each way, C32, float32, before / now:",
        "",
        *_table(("call", "kernels"), [
            [what, " / ".join(str(crops[side][what]) for side in SIDES)] for what in crops[SIDES[0]]
        ]), "",
        "Of each kernel:", "", *_table(HEAD, [cells for one in found for cells in _cells(one)]), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=BEFORE, help="before")
    parser.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))), help="numbers of the shapes")
    parser.add_argument("--dtypes", nargs="+", default=[str(one).removeprefix("torch.") for one in DTYPES])
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    found: list[Call] = []
    with tempfile.TemporaryDirectory() as name:
        os.environ["TRITON_CACHE_DIR"] = str(Path(name) / "cache")
        sides = dict(zip(SIDES, (kernels_of(options.commit, Path(name)), Kernels(gcu, rcu, rcu_backward)), strict=True))
        for dtype in options.dtypes:
            for channels, spatial in (SHAPES[number] for number in options.shapes):
                size = f"C{channels} {'x'.join(map(str, spatial))}, {dtype}"
                made = {side: dict(calls(one, channels, spatial, getattr(torch, dtype))) for side, one in sides.items()}
                for what in made[SIDES[0]]:
                    for side in SIDES:
                        found.append(compiled(f"{what}, {size}", side, made[side][what]))
                        print(f"{found[-1].label}, {side}: {found[-1].seconds:.1f} s", flush=True)
        crops = {side: variants(kernels) for side, kernels in sides.items()}
    command = f"python -m benchmarks.triton_before --shapes {' '.join(map(str, options.shapes))} --dtypes " + " ".join(
        options.dtypes
    )
    text = page(found, crops, options.commit, command)
    if options.output is None:
        print(text)
        return
    with replace_when_done(options.output) as (part,):
        part.write_text(text)


if __name__ == "__main__":
    main()
