"""Launches of a call, and the model of the caches; run by test_triton.py in a process under the interpreter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks import triton_cache, triton_dram, triton_traffic
from benchmarks.peers import OPS
from grcsf_fast.kernels.triton import rcu_backward
from grcsf_fast.reference import AttentionWeights

SMALL = {OPS[0]: (2, 20, (24, 144)), OPS[1]: (2, 20, (32, 48))}
WIDE = (2, 80, (8, 16))


@pytest.mark.parametrize(
    ("op", "backward", "shape", "kernels"),
    [
        (OPS[0], False, SMALL[OPS[0]], ["_forward_kernel"]),
        (OPS[0], True, SMALL[OPS[0]], ["_fine_kernel", "_coarse_kernel", "_sums_kernel"]),
        (OPS[1], False, SMALL[OPS[1]], ["_forward_kernel"]),
        (OPS[1], True, SMALL[OPS[1]], ["_patches_kernel", "_sums_kernel"]),
        (OPS[1], True, WIDE, ["_patches_kernel", "_channels_kernel", "_sums_kernel"]),
    ],
)
def test_launches_and_bytes_where_all_fits(op, backward, shape, kernels):
    """With all in the cache, inputs are read and outputs written once; what is between kernels is written too."""
    moved = triton_dram.measure(op, backward, torch.float32, shape)
    assert moved.launches == kernels
    assert len(kernels) <= triton_dram.most_launches(op, backward)
    assert bool(moved.torch_calls) == (op == OPS[1] and backward)
    read = sum(one for one, _ in moved.kernels.values())
    written = sum(one for _, one in moved.kernels.values())
    if not backward:
        assert 0.98 < (read + written) / moved.ideal < 1.03
    elif op == OPS[0]:
        assert 1 < (read + written) / moved.ideal < 1.1


def test_one_program_after_another_is_what_was_replayed():
    """Of all programs recorded, the sectors are those that a few of them stand for."""
    batch, channels, spatial = SMALL[OPS[0]]
    tensors = triton_dram.tensors_of(OPS[0], channels, spatial, torch.float32)
    with triton_cache.recorded(lambda kernel, grid: [(number,) for number in range(grid[0])]) as launches:
        triton_dram.call(OPS[0], [], tensors, 8)
    seen = {}
    for accesses in launches[0].programs.values():
        for label, _, found in accesses:
            seen.setdefault(label, set()).update((found // 4).tolist())
    sizes = {label: size // 4 for label, (_, size) in launches[0].regions.items()}
    assert {label: len(units) for label, units in seen.items()} == sizes
    moved = triton_dram.measure(OPS[0], False, torch.float32, (batch, channels, spatial))
    inputs = [size for label, size in sizes.items() if label.startswith(("features", "coarse", "gates"))]
    assert moved.kernels["_forward_kernel"][0] == sum(-(-4 * size // 32) * 32 for size in inputs)


def test_what_was_used_longest_ago_goes():
    cache = triton_cache.Lru(64 * 32, 1000)
    first, second = np.arange(40), np.arange(100, 140)
    cache.use(first, True)
    cache.use(second, False)
    assert (cache.read, cache.written) == (40 * 32, 16 * 32)
    cache.use(second, False)
    assert cache.read == 40 * 32
    cache.use(first[16:], False)
    assert cache.read == 40 * 32
    cache.use(first[:16], False)
    assert cache.read == 56 * 32
    cache.end()
    assert cache.written == 40 * 32


def test_what_does_not_fit_is_read_again_and_fails(monkeypatch):
    small = dataclasses.replace(triton_cache.GPUS["H100"], l2=64 * 2**10, l1=4 * 2**10)
    monkeypatch.setitem(triton_cache.GPUS, "H100", small)
    row = triton_traffic.measure(OPS[1], False, torch.float32, SMALL[OPS[1]])
    assert row.moved.ratio > 1.15
    (problem,) = triton_traffic.problems(row)
    assert problem.startswith("patch_cross_attention forward, float32, 2 x C20 32x48:")
    assert problem.endswith("times the ideal bytes, at most 1.15 allowed")


def test_a_launch_too_many_fails(monkeypatch):
    """As it would be with a launch per part of the patches."""
    monkeypatch.setattr(triton_dram, "LAUNCHES", triton_dram.LAUNCHES | {(OPS[1], True): 2})
    row = triton_traffic.measure(OPS[1], True, torch.float32, WIDE)
    assert any("4 launches, at most 2 allowed: _patches_kernel" in one for one in triton_traffic.problems(row))


@pytest.mark.parametrize("channels", [20, 80])
def test_what_nobody_needs_is_not_launched(channels):
    """Of the gradients of keys and values alone, neither what makes dX and the weights', nor sums."""
    tensors = triton_dram.tensors_of(OPS[1], channels, (8, 8), torch.float32)
    given = *triton_dram.incoming(OPS[1], tensors, 8), *tensors[:3], AttentionWeights(*tensors[3:]), 8, 0.0
    with triton_cache.recorded(lambda kernel, grid: ()) as launches:
        rcu_backward.backward(*given, [number in (1, 2) for number in range(12)])
    assert [one.kernel for one in launches] == ["_patches_kernel"]


def test_programs_that_are_not_alike_are_refused():
    """Where one of them asks for something else, nothing is known of those between."""
    tensors = triton_dram.tensors_of(OPS[0], 4, (2, 80), torch.float32)
    with triton_cache.recorded(lambda kernel, grid: [(0,), (1,)]) as launches:
        triton_dram.call(OPS[0], [], tensors, 8)
    programs = {(0, 0): launches[0].programs[(0,)], (0, 1): launches[0].programs[(1,)]}
    label, stored, found = programs[0, 1][0]
    programs[0, 2] = [(label, stored, found + np.arange(found.size) * 4), *programs[0, 1][1:]]
    with pytest.raises(AssertionError, match="programs are not alike"):
        triton_cache._steps(programs, (1, 5))
