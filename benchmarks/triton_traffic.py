"""What the Triton kernels move: ``python -m benchmarks.triton_traffic``.

At the default networks' sizes the bytes between memory and L2, by a model of the caches (benchmarks/triton_cache.py,
where it is described), beside the ideal: each input read once, each output written once. It exits with 1 where they are
more than benchmarks/triton_dram.py allows, or a call launches more than it may, operations of PyTorch's included.
Beside it the eager reference: the bytes that each of its operations reads and writes. From the bytes follow the times
below which no GPU of a kind can be; those are predictions from documented peaks, nothing was measured on a GPU.

With ``--quick``, at small odd sizes, an audit of every lane instead: none outside a tensor, every byte of the outputs
written once.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import triton_dram
from benchmarks.ops import HEADS, MAPS, RESIDUAL, SHAPES, arguments_of, make_inputs, patch_of
from benchmarks.peaks import PEAKS
from benchmarks.peers import OPS
from benchmarks.triton_cache import GPUS
from benchmarks.triton_interpreter import Audit, mend
from grcsf_fast import reference
from grcsf_fast.data.files import replace_when_done

DTYPES = (torch.float32, torch.bfloat16)
QUICK = ((2, 17, (8, 40)), (2, 33, (8, 16)), (1, 20, (4, 8, 12)))
GPUS_OF_FLOORS = {"H100": PEAKS["H100 SXM"], "A100": PEAKS["A100 SXM"]}
WRITTEN = {
    "compensated[0]", "residual[0]", "out", "score", "features_grad[0]", "coarse_grad[0]", "x_grad", "keys_grad",
    "values_grad",
}  # fmt: skip


class ReferenceTraffic(TorchDispatchMode):
    """Bytes that each operation reads and writes; views move nothing. Tensors need no memory: they may be ``meta``."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = op(*arguments, **(named or {}))
        inputs = [one for one in tree_leaves((arguments, named)) if isinstance(one, Tensor)]
        stored = {one.untyped_storage()._cdata for one in inputs}
        outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        fresh = [one for one in outputs if one.untyped_storage()._cdata not in stored]
        in_place = op._schema.name.endswith("_")
        if fresh or in_place:
            # An expanded tensor is as large as its storage.
            reads = {one.untyped_storage()._cdata: min(one.nbytes, one.untyped_storage().nbytes()) for one in inputs}
            self.bytes += sum(reads.values()) + sum(one.nbytes for one in (outputs if in_place else fresh))
        return result


@dataclass
class Row:
    """Bytes of the batch."""

    op: str
    backward: bool
    dtype: torch.dtype
    shape: triton_dram.Shape
    moved: triton_dram.Moved
    reference: int

    @property
    def ideal(self) -> int:
        return self.shape[0] * self.moved.ideal

    @property
    def bytes(self) -> float:
        return self.moved.ratio * self.ideal

    @property
    def label(self) -> str:
        return _label(self.op, self.backward, self.dtype, self.shape)


def _label(op: str, backward: bool, dtype: torch.dtype, shape: triton_dram.Shape) -> str:
    batch, channels, spatial = shape
    size = "x".join(map(str, spatial))
    kind = "backward" if backward else "forward"
    return f"{op} {kind}, {str(dtype).removeprefix('torch.')}, {batch} x C{channels} {size}"


def reference_bytes(op: str, backward: bool, dtype: torch.dtype, shape: triton_dram.Shape) -> int:
    batch, channels, spatial = shape
    patch = patch_of(spatial)
    if op == OPS[1]:
        spatial = tuple(-(-size // patch) * patch for size in spatial)
    small = make_inputs(op, 1, channels, tuple(patch for _ in spatial), dtype)
    large = dict(zip(small, triton_dram.tensors_of(op, channels, spatial, dtype, "meta"), strict=True))
    leaves = {name: tensor.requires_grad_(backward) for name, tensor in large.items()}
    with ReferenceTraffic() as counted:
        outputs = getattr(reference, op)(*arguments_of(leaves), **({} if op == OPS[0] else {"patch_size": patch}))
        if backward:
            torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(one) for one in outputs])
    return batch * counted.bytes


def measure(op: str, backward: bool, dtype: torch.dtype, shape: triton_dram.Shape) -> Row:
    moved = triton_dram.measure(op, backward, dtype, shape)
    return Row(op, backward, dtype, shape, moved, reference_bytes(op, backward, dtype, shape))


def audit(op: str, backward: bool, dtype: torch.dtype, shape: triton_dram.Shape) -> tuple[int, int]:
    """Bytes of the outputs that are written more than once, and that are not written."""
    batch, channels, spatial = shape
    patch = patch_of(spatial)
    tensors = list(make_inputs(op, batch, channels, spatial, dtype).values())
    grads = triton_dram.incoming(op, tensors, patch) if backward else []
    with Audit().on() as seen:
        triton_dram.call(op, grads, tensors, patch)
    # The backward of op 2 adds to its own sums in memory.
    twice = 0 if backward and op == OPS[1] else seen.written_twice
    return twice, sum(int((~one.touched).sum()) for name, one in seen.stores.items() if name in WRITTEN)


def matrix_operations(backward: bool, pixels: int, numbers: int, channels: int, tokens: int) -> float:
    """Multiplications and additions of op 2 on matrix units; ``numbers``: residual channels of all maps and heads."""
    products = (5, 6) if backward else (2, 2)
    return pixels * 2 * numbers * (products[0] * channels + products[1] * tokens)


def operations(row: Row) -> float:
    """Multiplications and additions on matrix units."""
    if row.op == OPS[0]:
        return 0.0
    batch, channels, spatial = row.shape
    tokens = patch_of(spatial) ** len(spatial)
    return matrix_operations(row.backward, batch * math.prod(spatial), MAPS * HEADS * RESIDUAL, channels, tokens)


def problems(row: Row) -> Iterator[str]:
    """What is more than it may be."""
    most = triton_dram.most_over_ideal(row.label)
    if row.moved.ratio > most:
        yield f"{row.label}: {row.moved.ratio:.2f} times the ideal bytes, at most {most:.2f} allowed"
    launched, allowed = row.moved.launched, triton_dram.most_launches(row.op, row.backward)
    if launched > allowed:
        names = ", ".join([*row.moved.launches, f"{row.moved.torch_calls} of PyTorch's"])
        yield f"{row.label}: {launched} launches, at most {allowed} allowed: {names}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _cells(row: Row) -> list[str]:
    moved = row.moved
    return [
        row.label, f"{row.ideal / 1e6:.1f}", f"{moved.ratio:.2f}",
        f"{triton_dram.most_over_ideal(row.label):.2f}",
        "; ".join(
            f"{name.strip('_').removesuffix('_kernel')} {read / moved.ideal:.2f} + {written / moved.ideal:.2f}"
            for name, (read, written) in moved.kernels.items()
        ),
        f"{moved.torch_calls}: {moved.torch_bytes / moved.ideal:.2f}", str(moved.launched),
        f"{row.reference / row.ideal:.1f}", f"{row.reference / row.bytes:.1f}",
    ]  # fmt: skip


HEAD = (
    "op, dtype, shape", "ideal, MB", "bytes / ideal", "at most", "of kernels, read + written", "PyTorch's operations",
    "launches", "reference / ideal", "reference / ours",
)  # fmt: skip


def _floors(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Microseconds."""
    for row in rows:
        cells = [row.label]
        for peak in GPUS_OF_FLOORS.values():
            # Float32 as three products of tf32.
            work = operations(row) / (peak.tf32 / 3 if row.dtype == torch.float32 else peak.half)
            for moved in (row.bytes, row.reference):
                floor = max(work, moved / peak.bandwidth)
                cells.append(f"{1e6 * floor:.0f} {'bytes' if floor > work else 'products'}")
        yield cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small odd shapes, lane by lane")
    parser.add_argument("--dtypes", nargs="+", default=[str(one).removeprefix("torch.") for one in DTYPES])
    parser.add_argument("--shapes", type=int, nargs="+", help="numbers of the shapes")
    parser.add_argument("-o", "--output", type=Path, help="Markdown report")
    options = parser.parse_args()
    mend()
    shapes = QUICK if options.quick else SHAPES
    shapes = [shapes[number] for number in options.shapes or range(len(shapes))]
    dtypes = [getattr(torch, name) for name in options.dtypes]
    cases = [(op, back, dtype, one) for op in OPS for back in (False, True) for dtype in dtypes for one in shapes]
    if options.quick:
        print("| op, dtype, shape | written twice | not written |\n|---|---|---|")
        wrong = 0
        for case in cases:
            twice, missing = audit(*case)
            wrong += twice + missing
            print(f"| {_label(*case)} | {twice} | {missing} |", flush=True)
        sys.exit(1 if wrong else 0)
    rows = []
    for case in cases:
        rows.append(measure(*case))
        print(" | ".join(_cells(rows[-1])), flush=True)
    found = [problem for row in rows for problem in problems(row)]
    l2, resident = GPUS[triton_dram.GPU].l2 // 2**20, triton_dram.RESIDENT
    lines = [
        f"Model: {triton_dram.GPU}, an L2 of {l2} MiB. " + (triton_dram.__doc__ or "").partition("\n\n")[2].strip(), "",
        "Programs at once per multiprocessor: "
        + ", ".join(f"{name.strip('_')} of op {1 + OPS.index(op)} {each}" for (op, name), each in resident.items())
        + ".", "", *_table(HEAD, [_cells(row) for row in rows]), "",
        "Predicted floors, in microseconds: bytes at the documented bandwidth or matrix products at the documented "
        "peak, whichever takes longer (its name behind the number).", "",
        *_table(["op, dtype, shape", *(f"{gpu}, {kind}" for gpu in GPUS_OF_FLOORS for kind in ("ours", "reference"))],
                list(_floors(rows))), "",
        "Fails:" if found else "Nothing fails.", "", *(f"- {one}" for one in found), "",
    ]  # fmt: skip
    if options.output is not None:
        which = [] if options.shapes is None else ["--shapes", *map(str, options.shapes)]
        command = " ".join(["python -m benchmarks.triton_traffic", *which, "--dtypes", *options.dtypes])
        versions = f"triton {triton.__version__}, torch {torch.__version__}; `{command}`; no GPU was there."
        title = ["# What the Triton kernels read and write", "", versions, ""]
        with replace_when_done(options.output) as (part,):
            part.write_text("\n".join([*title, *lines]))
    print("\n".join(lines))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
