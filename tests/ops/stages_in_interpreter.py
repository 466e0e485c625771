"""Norm and pooling by the Triton kernels; run by test_triton.py in a process under the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from awake import awake
from tolerances import tolerance

from benchmarks.triton_interpreter import Audit
from grcsf_fast import GRCSF, use_backend
from grcsf_fast.functional import internal
from grcsf_fast.ops import plain, stages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=FORMATS[x.dim()]),
    "a view": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
# Several tiles, several blocks of channels, widths that fill none, and a single pixel more than one.
SHAPES = [
    *((2, 3, 4, 6), (2, 5, 2, 2, 6), (1, 1, 2, 2), (0, 3, 4, 4)),
    *(pytest.param(one, marks=pytest.mark.slow) for one in ((2, 3, 8, 12), (1, 33, 6, 34), (1, 2, 70, 140))),
]
OPS = {"normalize_activate": 3, "pool_with_mean": 1}


@pytest.fixture(autouse=True)
def backend():
    with use_backend("triton"):
        yield


def given(name, shape, dtype=torch.float32, layout="contiguous"):
    x = LAYOUTS[layout]((torch.randn(shape) * 3 + 1).to(dtype))
    return [x, torch.rand(shape[1]) + 0.5, torch.randn(shape[1])][: OPS[name]]


def results(ops, name, tensors, incoming):
    """Outputs and all gradients."""
    leaves = [one.detach().requires_grad_() for one in tensors]
    outputs = getattr(ops, name)(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [one.to(out.dtype) for one, out in zip(incoming, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)]


def incoming_of(name, x):
    """Gradients of the outputs, in their dtype."""
    shape = x.shape if name == "normalize_activate" else (*x.shape[:2], *(size // 2 for size in x.shape[2:]))
    one = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(x.dtype)
    return [one] if name == "normalize_activate" else [one, one.flip(-1)]


def check(name, tensors, incoming=None):
    incoming = incoming or incoming_of(name, tensors[0])
    with Audit().on():
        found = results(internal, name, tensors, incoming)
    expected = results(plain, name, [one.double() for one in tensors], incoming)
    for one, other in zip(found, expected, strict=True):
        size = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one.double() / size, other / size, **tolerance(one.dtype), equal_nan=True)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_against_float64(name, shape, layout):
    """And laid out as x, whose incoming gradient need not be."""
    tensors = given(name, shape, layout=layout)
    out, *_ = found = check(name, tensors)
    x, x_grad = tensors[0], found[-OPS[name]]
    if layout != "a view" and x.numel():
        assert x_grad.stride() == x.stride()
        lying = FORMATS[x.dim()] if layout == "channels last" else torch.contiguous_format
        assert out.is_contiguous(memory_format=lying)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", OPS)
def test_half_precision(name, dtype):
    check(name, given(name, (1, 17, 6, 34), dtype, "channels last"))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_large_mean_costs_no_digits(layout):
    """Of the variance, which from sums of squares would have none left: float32 does not tell 1e8 from 1e8 + 1.

    The mean itself is a number near 1e4, exact to 5e-4.
    """
    x, weight, bias = given("normalize_activate", (1, 2, 48, 96))
    x = LAYOUTS[layout](1e4 + torch.randn(x.shape))
    found = internal.normalize_activate(x, weight, bias)
    expected = plain.normalize_activate(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-3)


def test_not_finite_numbers_stay_in_their_plane():
    tensors = given("normalize_activate", (2, 3, 8, 8))
    tensors[0][0, 1, 2, 3] = torch.nan
    found = check("normalize_activate", tensors)
    assert found[0].isfinite().flatten(2).all(2).tolist() == [[True, False, True], [True, True, True]]


def test_pooling_gives_the_gradient_to_whom_pytorch_gives_it():
    """To the first of equal pixels and to the last of several NaN."""
    x = torch.randint(0, 2, (1, 2, 8, 12)).float()
    x[0, 0, :2, :2] = torch.tensor([[torch.nan, 1.0], [torch.nan, 2.0]])
    x[0, 1, :2, :2] = -torch.inf
    x_grad = check("pool_with_mean", [x], [torch.randn(1, 2, 4, 6), torch.zeros(1, 2, 4, 6)])[2]
    assert int((x_grad != 0).sum()) == 48


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_registered_ops(name, layout):
    tensors = [one.requires_grad_() for one in given(name, (2, 3, 4, 6), layout=layout)]
    op = stages._normalize if name == "normalize_activate" else stages._pool
    torch.library.opcheck(
        op, (*tensors, 1e-5, 0.01, "triton") if name == "normalize_activate" else (*tensors, "triton")
    )


def test_a_gradient_of_another_layout():
    tensors = given("normalize_activate", (1, 5, 4, 6))
    check("normalize_activate", tensors, [torch.randn(1, 5, 4, 6).contiguous(memory_format=torch.channels_last)])
    x = given("pool_with_mean", (1, 5, 4, 6))
    check("pool_with_mean", x, [torch.randn(1, 5, 2, 3).transpose(2, 3).contiguous().transpose(2, 3) for _ in range(2)])


def test_what_is_needed_alone():
    x, weight, bias = given("normalize_activate", (1, 3, 4, 6))
    incoming = incoming_of("normalize_activate", x)
    every = results(internal, "normalize_activate", [x, weight, bias], incoming)
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(internal.normalize_activate(x, weight, bias), [weight], incoming)
    assert torch.equal(grad, every[2])


@pytest.mark.parametrize("layout", [pytest.param("contiguous", marks=pytest.mark.slow), "channels last"])
def test_a_network_of_these_kernels(layout):
    """Its logits and gradients, every kernel of ours in it."""
    network = awake(GRCSF(2, 1, 1, (4, 6), 2, 3, rcu_levels=(0,))).to(memory_format=torch.channels_last)
    image, maps = LAYOUTS[layout](torch.randn(1, 1, 8, 8)), torch.randn(1, 2, 8, 8)
    outcomes = []
    for name in ("triton", "reference"):
        with use_backend(name):
            logits = network(image, maps)
            outcomes.append((logits, *torch.autograd.grad(logits.square().sum(), list(network.parameters()))))
    for one, other in zip(*outcomes, strict=True):
        size = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one / size, other / size, atol=1e-4, rtol=1e-4)
