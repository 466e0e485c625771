"""Two copies compiled for sm_90, and how wide they are: run by test_triton.py in a process without the interpreter."""

import json

import torch
import triton
import triton.language as tl

from benchmarks.triton_compile import TARGETS, compiling_for
from benchmarks.triton_widths import widths


@triton.jit
def _masked(into, of, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(into + at, tl.load(of + at, mask=at < count, other=0.0), mask=at < count)


@triton.jit
def _folded(into, of, count, BLOCK: tl.constexpr):
    """The mask also in the offset, which hides that offsets follow each other."""
    at = tl.arange(0, BLOCK)
    there = at < count
    at = tl.where(there, at, 0)
    tl.store(into + at, tl.load(of + at, mask=there, other=0.0), mask=there)


for target in (one for one in TARGETS if one.name in ("sm_90", "gfx942")):
    tensors = torch.zeros(4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
    with compiling_for(target.target, TARGETS.index(target)) as compiled:
        for kernel in (_masked, _folded):
            kernel[(1,)](*tensors, 4000, 4096, num_warps=4)
    print(json.dumps([target.name, *(widths(kernel) for _, kernel, _ in compiled)]))
