"""What the Triton kernels read and write, counted lane by lane: ``python -m benchmarks.triton_traffic``.

Every launch runs in Triton's interpreter under an audit: no lane outside a tensor, every output byte written once,
bytes requested beside the ideal (each input read once, each output written once), 32-byte sectors beside the bytes.
Beside it the eager reference: the bytes that each of its operations reads and writes. From the counts follow the times
below which no GPU of a kind can be; those are predictions from documented peaks, nothing was measured on a GPU.

A slab of one image stands for the batch; a program gets as many patches as it would with all of it. "Requested" is what
the instructions ask for: the weights of op 2 are asked for again for each patch and mostly come from the nearest cache,
so the column without them is what concerns memory.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.ops import HEADS, MAPS, RESIDUAL, SHAPES, arguments_of, make_inputs, patch_of
from benchmarks.peers import OPS
from benchmarks.triton_interpreter import Audit, mend
from grcsf_fast import reference
from grcsf_fast.data.files import replace_when_done
from grcsf_fast.kernels.triton import gcu, rcu, rcu_backward
from grcsf_fast.reference import AttentionWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows or planes of a slab, by op, dimensions and size where the whole image would take the interpreter hours. Those of
# op 1 are whole tiles, those of op 2 whole patches.
SLABS = {(OPS[0], 2, 224): 32, (OPS[0], 3, 96): 32, (OPS[1], 2, 224): 32, (OPS[1], 3, 96): 4, (OPS[1], 3, 48): 8}
QUICK = ((8, 17, (32, 72)), (8, 33, (40, 48)), (2, 20, (16, 8, 24)))
# Documented: bytes a second, and operations a second of dense bf16 and of float32 as three tf32 products.
GPUS = {
    "H100": (3.35e12, {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 494e12 / 3}),
    "A100": (2.04e12, {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 156e12 / 3}),
}


class ReferenceTraffic(TorchDispatchMode):
    """Bytes that each operation reads and writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = op(*arguments, **(named or {}))
        inputs = [one for one in tree_leaves((arguments, named)) if isinstance(one, Tensor)]
        stored = {one.untyped_storage().data_ptr() for one in inputs}
        outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        fresh = [one for one in outputs if one.untyped_storage().data_ptr() not in stored]
        in_place = op._schema.name.endswith("_")
        if fresh or in_place:
            # An expanded tensor is as large as its storage.
            reads = {
                one.untyped_storage().data_ptr(): min(one.nbytes, one.untyped_storage().nbytes()) for one in inputs
            }
            self.bytes += sum(reads.values()) + sum(one.nbytes for one in (outputs if in_place else fresh))
        return result


@dataclass
class Row:
    """Bytes of the batch; ``weights`` are the part of ``requested`` that was read of tensors without a batch axis."""

    op: str
    backward: bool
    dtype: torch.dtype
    shape: tuple[int, int, tuple[int, ...]]
    ideal: int
    requested: int
    weights: int
    sectors: int
    reference: int
    written_twice: int
    unwritten: int


def _once(tensors: Sequence[Tensor]) -> int:
    return sum(one.nbytes for one in tensors)


def measure(op: str, backward: bool, dtype: torch.dtype, shape: tuple[int, int, tuple[int, ...]]) -> Row:
    batch, channels, spatial = shape
    patch = patch_of(spatial)
    if op == OPS[1]:
        spatial = tuple(-(-size // patch) * patch for size in spatial)
    slab = SLABS.get((op, len(spatial), spatial[0]), spatial[0])
    share = batch * spatial[0] // slab
    inputs = make_inputs(op, 1, channels, (slab, *spatial[1:]), dtype)
    settings = {} if op == OPS[0] else {"patch_size": patch}
    outputs = getattr(reference, op)(*arguments_of(inputs), **settings)
    out_grads = [torch.ones_like(one) for one in outputs]
    audit = Audit()
    tensors = list(inputs.values())
    programs = rcu_backward._programs
    # As many patches a program as the whole batch would give it.
    rcu_backward._programs = lambda patches, device: max(
        1, -(-patches // -(-patches * share // programs(patches * share, device)))
    )
    try:
        with audit.on():
            if op == OPS[0]:
                if backward:
                    made = gcu.backward([tuple(out_grads)], [tuple(tensors)], 1e-6, [[True] * 5])[0]
                else:
                    made = gcu.forward([tuple(tensors)], 1e-6)[0]
            elif backward:
                given = *tensors[:3], AttentionWeights(*tensors[3:]), patch, 0.0
                made = rcu_backward.backward(*out_grads, *given, [True] * 12)
            else:
                made = rcu.forward(*tensors[:3], AttentionWeights(*tensors[3:]), patch, 0.0)
    finally:
        rcu_backward._programs = programs
    with ReferenceTraffic() as counted:
        if backward:
            leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
            torch.autograd.grad(
                getattr(reference, op)(*arguments_of(leaves), **settings), list(leaves.values()), out_grads
            )
        else:
            getattr(reference, op)(*arguments_of(inputs), **settings)
    weights = {name for name in inputs if name.startswith(("query_", "position_", "output_", "score_"))}
    once = {name for name in weights if name != "score_context"}
    shared = [tensor for name, tensor in inputs.items() if name in once]
    if backward and op == OPS[1]:
        shared += [made[number] for number, name in enumerate(inputs) if name in once]
    every = [*tensors, *made, *(out_grads if backward else ())]
    written = (
        "compensated[0]", "residual[0]", "out", "score", "features_grad[0]", "coarse_grad[0]", "x_grad", "keys_grad",
        "values_grad",
    )  # fmt: skip
    return Row(
        op, backward, dtype, shape,
        _once(shared) + share * (_once(every) - _once(shared)),
        share * audit.requested,
        share * sum(one.requested for name, one in audit.loads.items() if name in weights),
        share * audit.sectors,
        share * counted.bytes,
        audit.written_twice,
        sum(int((~one.touched).sum()) for name, one in audit.stores.items() if name in written),
    )  # fmt: skip


def operations(row: Row) -> float:
    """Multiplications and additions on matrix units."""
    if row.op == OPS[0]:
        return 0.0
    pixels, channels, spatial = row.shape
    for size in spatial:
        pixels *= size
    products = (5, 6) if row.backward else (2, 2)
    return (
        pixels
        * 2
        * MAPS
        * HEADS
        * RESIDUAL
        * (products[0] * channels + products[1] * patch_of(spatial) ** len(spatial))
    )


def _why_bytes(row: Row) -> str:
    if row.op == OPS[0]:
        return (
            "neighbours of a pixel are asked for one by one, and what is beyond a block of channels twice; from caches"
        )
    weights = "weights are asked for again for each patch and come from the nearest cache"
    if not row.backward:
        return weights
    return f"the output's gradient and x are read by two kernels, the first of which passes two tensors on; {weights}"


def _why_sectors(row: Row) -> str:
    if row.op == OPS[0]:
        return "rows and tiles do not begin on 32 bytes; the neighbouring program uses the rest of a sector"
    return "rows of a patch are less than 32 bytes or do not begin on 32; neighbouring patches use the rest of a sector"


def problems(row: Row) -> list[str]:
    """What is wrong."""
    found = []
    # The backward of op 2 adds to its own sums in memory.
    if row.written_twice and (row.op == OPS[0] or not row.backward):
        found.append(f"{row.written_twice} bytes written more than once")
    if row.unwritten:
        found.append(f"{row.unwritten} bytes of outputs not written")
    return [f"{_label(row)}: {one}" for one in found]


def remarks(row: Row) -> list[str]:
    """Why more is asked for than the ideal; caches serve most of it, so that is no fault by itself."""
    found = []
    if row.requested > 1.1 * row.ideal:
        found.append(f"requests {row.requested / row.ideal:.2f} times the ideal: {_why_bytes(row)}")
    if row.sectors > 1.05 * row.requested:
        found.append(f"sectors {row.sectors / row.requested:.2f} times the bytes: {_why_sectors(row)}")
    return [f"{_label(row)}: {one}" for one in found]


def _label(row: Row) -> str:
    batch, channels, spatial = row.shape
    size = "x".join(map(str, spatial))
    kind = "backward" if row.backward else "forward"
    return f"{row.op} {kind}, {str(row.dtype).removeprefix('torch.')}, {batch} x C{channels} {size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small odd shapes")
    parser.add_argument("--dtypes", nargs="+", default=[str(one).removeprefix("torch.") for one in DTYPES[:2]])
    parser.add_argument("--shapes", type=int, nargs="+", help="numbers of the shapes")
    parser.add_argument("-o", "--output", type=Path, help="Markdown report")
    options = parser.parse_args()
    mend()
    shapes = QUICK if options.quick else SHAPES
    shapes = [shapes[number] for number in options.shapes or range(len(shapes))]
    rows = []
    head = (
        "op, dtype, shape", "ideal, MB", "requested / ideal", "without weights", "sectors / requested",
        "reference / ideal", "reference / fused",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    print("\n".join(lines), flush=True)
    for op in OPS:
        for backward in (False, True):
            for dtype in options.dtypes:
                for shape in shapes:
                    row = measure(op, backward, getattr(torch, dtype), shape)
                    rows.append(row)
                    cells = (
                        _label(row), f"{row.ideal / 1e6:.1f}", f"{row.requested / row.ideal:.2f}",
                        f"{(row.requested - row.weights) / row.ideal:.2f}", f"{row.sectors / row.requested:.2f}",
                        f"{row.reference / row.ideal:.1f}", f"{row.reference / row.requested:.1f}",
                    )  # fmt: skip
                    lines.append(f"| {' | '.join(cells)} |")
                    print(lines[-1], flush=True)
    lines += [
        "", "Predicted floors, in microseconds: bytes at the documented bandwidth or matrix products at the documented "
        "peak, whichever takes longer (its name behind the number).", "",
    ]  # fmt: skip
    columns = [f"{gpu}, {kind}" for gpu in GPUS for kind in ("fused", "reference")]
    lines += [f"| op, dtype, shape | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        cells = [_label(row)]
        for bandwidth, peaks in GPUS.values():
            work = operations(row) / peaks[row.dtype]
            for moved in (row.requested - row.weights, row.reference):
                floor = max(work, moved / bandwidth)
                cells.append(f"{1e6 * floor:.0f} {'bytes' if floor > work else 'products'}")
        lines.append(f"| {' | '.join(cells)} |")
    found = [problem for row in rows for problem in problems(row)]
    noted = [] if options.quick else [remark for row in rows for remark in remarks(row)]
    lines += ["", *(f"- {line}" for line in (*found, *noted)), ""]
    if options.output is not None:
        which = [] if options.shapes is None else ["--shapes", *map(str, options.shapes)]
        command = " ".join(["python -m benchmarks.triton_traffic", *which, "--dtypes", *options.dtypes])
        title = ["# What the Triton kernels read and write", "", f"`{command}`", ""]
        with replace_when_done(options.output) as (part,):
            part.write_text("\n".join([*title, *lines]))
    print("\n".join(found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
