"""Strides, autocast and NaN in the Triton kernels of op 2; run by test_triton.py in a process under the interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from calling import arguments
from tolerances import tolerance

from benchmarks.triton_interpreter import Audit
from grcsf_fast import functional, reference, use_backend
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


@pytest.mark.parametrize(("spatial", "patch"), [((2, 4), 2), ((8, 16), 8)])
def test_nan_goes_through_the_scorer(backend, attention_inputs, spatial, patch):
    """Of an image with a broken number, and of no other; patches of 8 make dX in the first launch."""
    inputs = attention_inputs(spatial, patch, batch=2)
    inputs["x"][0, 0, 0, 0] = torch.nan
    x, context = inputs["x"].requires_grad_(), inputs["score_context"].requires_grad_()
    for name in ("triton", "reference"):
        with use_backend(name):
            score = functional.patch_cross_attention(*arguments(inputs), patch_size=patch)[1]
        found, x_grad = torch.autograd.grad(score.sum(), [context, x])
        assert found[0].isnan().all(), name
        assert x_grad[0, ..., :patch, :patch].isnan().all(), name
        assert found[1].isfinite().all(), name
        assert x_grad[1].isfinite().all(), name
        assert x_grad[0, ..., patch:].isfinite().all(), name


def test_patches_below_the_threshold_in_one_launch(backend, attention_inputs):
    """Half of the patches; what they are given is passed on, and their scores have gradients all the same."""
    inputs = attention_inputs((8, 32), 8, batch=1)
    leaves = [one.requires_grad_() for one in inputs.values()]
    exact = {name: one.detach().double().requires_grad_() for name, one in inputs.items()}
    scores = reference.patch_cross_attention(*arguments(exact), patch_size=8)[1].detach().flatten().sort().values
    threshold = float(scores[1:3].mean())
    out, score = functional.patch_cross_attention(*arguments(inputs), patch_size=8, threshold=threshold)
    expected = reference.patch_cross_attention(*arguments(exact), patch_size=8, threshold=threshold)
    assert int((score < threshold).sum()) == 2
    grads = torch.randn_like(out), torch.randn_like(score)
    found = torch.autograd.grad((out, score), leaves, grads)
    others = torch.autograd.grad(expected, list(exact.values()), [one.double() for one in grads])
    for one, other in zip(found, others, strict=True):
        size = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one.double() / size, other / size, **tolerance(one.dtype))


@pytest.mark.parametrize(
    ("spatial", "patch", "channels", "plan"),
    [
        ((8, 40), 8, 20, (2, True, 2)),
        pytest.param((4, 4, 20), 4, 48, (1, True, 1), marks=pytest.mark.slow),
        ((4, 20), 4, 20, (2, False, 2)),  # a second kernel, whose programs have three patches and two
        pytest.param((8, 40), 8, 80, (2, False, 2), marks=pytest.mark.slow),
    ],
)
def test_programs_of_the_backward_have_several_patches(
    backend, monkeypatch, attention_inputs, spatial, patch, channels, plan
):
    given = patches.BackwardPlan(*plan)
    x, keys, values, *weights = attention_inputs(spatial, patch, batch=1, channels=channels).values()
    launch = patches.Launch(x, functional.AttentionWeights(*weights), patch)
    assert (launch.patches, launch.plan_backward(x.device).fused) == (5, given.fused)
    monkeypatch.setattr(patches.Launch, "plan_backward", lambda self, device: given)
    grads = torch.randn_like(x), torch.randn(1, 1, *(size // patch for size in spatial))
    with Audit().on():
        found = triton_ops.rcu_backward(
            *grads, x, keys, values, functional.AttentionWeights(*weights), patch, 0.0, [True] * 12
        )
    exact = [one.double().requires_grad_() for one in (x, keys, values, *weights)]
    outputs = reference.patch_cross_attention(*exact[:3], functional.AttentionWeights(*exact[3:]), patch)
    expected = torch.autograd.grad(outputs, exact, [one.double() for one in grads])
    for one, other in zip(found, expected, strict=True):
        size = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one.double() / size, other / size, **tolerance(one.dtype))


@pytest.mark.parametrize(
    ("patches_each", "programs"), [(1, 1), (264, 264), (265, 133), (392, 196), (2640, 264), (2641, 241)]
)
def test_programs_of_the_backward_have_the_same_to_do(backend, attention_inputs, patches_each, programs):
    """Two a multiprocessor of an H100 at most, and no more than shorten the longest one."""
    x, _, _, *weights = attention_inputs((2, 4), 2, batch=1).values()
    launch = patches.Launch(x, functional.AttentionWeights(*weights), 2)
    launch.patches = patches_each
    assert launch.plan_backward(x.device).programs == programs
