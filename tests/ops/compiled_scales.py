"""Compiles op 1 for an H100 where Triton makes constants of what is passed; a line of JSON each. Run by
test_compiled_scales.py.

First the kernels of the backward of two scales of which the second is empty; then how many forwards are compiled for
rows of features that lie 240, 256 and 272 numbers apart, and the widths of accesses to them.
"""

import json

import torch

from benchmarks.triton_compile import TARGETS, compiling_for
from benchmarks.triton_widths import widths
from grcsf_fast.kernels.triton import gcu

(TARGET,) = (one for one in TARGETS if one.name == "sm_90")


def scale(batch: int, channels: int, columns: int) -> tuple[torch.Tensor, ...]:
    gates = torch.zeros(batch, channels), torch.zeros(batch, channels), torch.zeros(channels)
    return torch.zeros(batch, channels, 2, columns), torch.zeros(batch, channels, 1, columns // 2), *gates


with compiling_for(TARGET.target, 0) as compiled:
    # One program of the first scale, none of the second one: bounds of 0, 1 and 1.
    scales = [scale(1, 4, 2), scale(0, 4, 2)]
    gcu.backward([(one[0], one[0][:, :1]) for one in scales], scales, 1e-6, [[True] * 5] * 2)
print(json.dumps([name for name, _, _ in compiled]))

with compiling_for(TARGET.target, 1) as compiled:
    for width in (16 * 15, 16 * 16, 16 * 17):
        features, *others = scale(1, 32, 32)
        gcu.forward([(torch.zeros(1, 32, 2, width)[..., :32], *others)], 1e-6)
kernels = {kernel.hash: kernel for _, kernel, _ in compiled}
loads, stores = widths(next(iter(kernels.values())))
print(json.dumps([len(kernels), loads["features"], stores["compensated"]]))
