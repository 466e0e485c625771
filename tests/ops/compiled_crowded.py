"""Compiles the attention's backward for an H100 as a network calls it, and as the check of its first use does, in which
a program has several patches; a line of JSON each: the kernels' names, and hashes of what was compiled. Run by
test_triton.py."""

import json

import torch

from benchmarks.ops import make_inputs
from benchmarks.triton_compile import TARGETS, compiling_for
from grcsf_fast.kernels.triton import rcu_backward
from grcsf_fast.kernels.triton.grouped import crowded
from grcsf_fast.ops.examples import grouped

(TARGET,) = (one for one in TARGETS if one.name == "sm_90")
NUMBER = 0

for channels in (32, 80):
    x, keys, values, weights = grouped(make_inputs("patch_cross_attention", 1, channels, (16, 24), torch.float32))
    for several in (False, True):
        crowded.set(several)
        with compiling_for(TARGET.target, NUMBER) as compiled:
            score = torch.zeros(1, 1, 2, 3)
            rcu_backward.backward(x, score, x, keys, values, weights, 8, 0.0, [True] * 12)
        print(json.dumps([(name, kernel.hash) for name, kernel, _ in compiled if name != "_sums_kernel"]))
