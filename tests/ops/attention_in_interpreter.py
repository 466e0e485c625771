"""Strides, autocast and NaN in the Triton kernels of op 2; run by test_triton.py in a process under the interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from calling import arguments

from grcsf_fast import functional, use_backend
from grcsf_fast.kernels.triton import grouped, patches
from grcsf_fast.ops import triton as triton_ops


@pytest.fixture
def backend(where):
    where.dtype = torch.float32
    with use_backend("triton"):
        yield


@triton.jit
def _strides_kernel(out, numbers, UNITS: tl.constexpr, all_numbers, ALL_UNITS: tl.constexpr):
    one, other = patches.strides_in(numbers, UNITS, 0, 5), grouped.layout(all_numbers, ALL_UNITS, 0, 1)
    for axis in tl.static_range(5):
        tl.store(out + axis, one[axis])
        tl.store(out + 5 + axis, other[axis])


@pytest.mark.parametrize("width", [2**11, 2**11 - 1])
def test_strides_beyond_2_to_the_31(backend, width):
    """They come whole: a part of them that fits into 32 bits would be multiplied there."""
    x = torch.empty((2, 2, 2**10, 2**10, width), device="meta")
    assert x.stride(0) >= 2**31
    launch = grouped.Launch([[x]], 8)
    out = torch.zeros(10, dtype=torch.int64)
    _strides_kernel[(1,)](out, *patches.strides_of([x], 3), launch.numbers, launch.units)
    assert out.tolist() == 2 * list(x.stride())


def test_products_beside_the_launches_know_no_autocast(backend, attention_inputs):
    x, keys, values, *weights = attention_inputs((2, 4), 2, batch=1).values()
    given = torch.randn_like(x), torch.randn(1, 1, 1, 2), x, keys, values, functional.AttentionWeights(*weights), 2, 0.0
    expected = triton_ops.rcu_backward(*given, [True] * 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = triton_ops.rcu_backward(*given, [True] * 12)
    assert all(map(torch.equal, found, expected))


def test_nan_goes_through_the_scorer(backend, attention_inputs):
    """Of an image with a broken number, and of no other."""
    inputs = attention_inputs((2, 4), 2, batch=2)
    inputs["x"][0, 0, 0, 0] = torch.nan
    context = inputs["score_context"].requires_grad_()
    for name in ("triton", "reference"):
        with use_backend(name):
            score = functional.patch_cross_attention(*arguments(inputs), patch_size=2)[1]
        (found,) = torch.autograd.grad(score.sum(), context)
        assert found[0].isnan().all(), name
        assert found[1].isfinite().all(), name
