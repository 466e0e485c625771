"""Compiles the attention's backward for an H100 with 16 and with 64 residual channels; a line of JSON each: residual
channels, matrix instructions of a group of warps, and what the compile report says. Run by test_triton.py."""

import json

import torch

from benchmarks.triton_compile import TARGETS, compiling_for, inspect, problems
from grcsf_fast.kernels.triton import rcu_backward
from grcsf_fast.reference import AttentionWeights

(TARGET,) = (one for one in TARGETS if one.name == "sm_90")


def attention(residual: int) -> None:
    channels, tokens, hidden = 32, 64, 16
    x, maps = torch.zeros(1, channels, 8, 8), torch.zeros(1, 1, residual, 8, 8)
    weights = AttentionWeights(
        query_weight=torch.zeros(1, 1, residual, channels),
        query_bias=torch.zeros(1, 1, residual),
        position_bias=torch.zeros(1, tokens, tokens),
        output_weight=torch.zeros(1, 1, channels, residual),
        output_bias=torch.zeros(channels),
        score_weight=torch.zeros(hidden, channels),
        score_context=torch.zeros(1, hidden),
        score_vector=torch.zeros(hidden),
        score_bias=torch.zeros(()),
    )
    rcu_backward.backward(x, torch.zeros(1, 1, 1, 1), x, maps, maps, weights, 8, 0.0, [True] * 12)


for number, residual in enumerate((16, 64)):
    with compiling_for(TARGET.target, number) as compiled:
        attention(residual)
    found = [inspect(kernel, TARGET) for _, kernel, _ in compiled]
    said = [problems("rcu backward", one | {"stack": 0, "spills": 0}, {}, {}, TARGET, torch.float32) for one in found]
    print(json.dumps([residual, sum(one["group matrix"] for one in found), " ".join(said)]))
