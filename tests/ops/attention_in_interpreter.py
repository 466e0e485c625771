"""Strides, autocast and NaN in the Triton kernels of op 2; run by test_triton.py in a process under the interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from calling import arguments
from tolerances import tolerance
from torch.utils._python_dispatch import TorchDispatchMode

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


class Products(TorchDispatchMode):
    """Notes the dtypes of what PyTorch multiplies."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.dtypes += [one.dtype for one in arguments]
        return function(*arguments, **(named or {}))


def _set(module, name, value):
    return lambda: setattr(module, name, value)


MATMUL = torch.backends.cuda.matmul
ROUNDING = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": _set(MATMUL, "allow_tf32", True),
    "fp32_precision": _set(MATMUL, "fp32_precision", "tf32"),
    "of all backends": _set(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture(params=ROUNDING)
def rounding(request):
    """Products of float32 may be rounded; nothing is left of it."""
    yield ROUNDING[request.param]
    torch.set_float32_matmul_precision("highest")
    for one in (MATMUL, torch.backends.mkldnn.matmul, torch.backends):
        one.fp32_precision = "none"


def test_products_beside_the_launches_know_no_tf32(backend, rounding, attention_inputs):
    """Where the caller lets PyTorch round, the product is in float64; nobody's settings are touched."""
    x, keys, values, *weights = attention_inputs((2, 4), 2, batch=1).values()
    given = torch.randn_like(x), torch.randn(1, 1, 1, 2), x, keys, values, functional.AttentionWeights(*weights)
    found = []
    for dtype, setting in ((torch.float32, lambda: None), (torch.float64, rounding)):
        setting()
        precision = MATMUL.fp32_precision
        with Products() as products:
            found.append(triton_ops.rcu_backward(*given, 2, 0.0, [True] * 12))
        assert products.dtypes == [dtype] * 2
        assert MATMUL.fp32_precision == precision
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, **tolerance(torch.float32))


def test_a_scorer_without_hidden_units(backend, attention_inputs):
    inputs = {
        name: one[..., :0] if name in ("score_context", "score_vector") else one[:0] if name == "score_weight" else one
        for name, one in attention_inputs((2, 4), 2).items()
    }
    leaves = [one.requires_grad_() for one in inputs.values()]
    exact = {name: one.detach().double().requires_grad_() for name, one in inputs.items()}
    outputs = functional.patch_cross_attention(*arguments(inputs), patch_size=2)
    expected = reference.patch_cross_attention(*arguments(exact), patch_size=2)
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance(one.dtype))
    grads = [torch.randn_like(one) for one in outputs]
    found = torch.autograd.grad(outputs, leaves, grads)
    others = torch.autograd.grad(expected, list(exact.values()), [one.double() for one in grads])
    for one, other in zip(found, others, strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance(one.dtype))


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


@pytest.fixture
def crowded():
    """As where a kernel's first use is checked."""
    token = grouped.crowded.set(True)
    yield
    grouped.crowded.reset(token)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spatial", "patch", "channels", "plan"),
    [
        ((8, 40), 8, 20, (2, True, 2)),
        pytest.param((4, 4, 20), 4, 48, (2, True, 2), marks=pytest.mark.slow),
        ((4, 20), 4, 20, (2, False, 2)),  # a second kernel, whose programs have three patches and two
        pytest.param((8, 40), 8, 80, (2, False, 1), marks=pytest.mark.slow),
    ],
)
def test_programs_of_the_backward_have_several_patches(
    backend, crowded, attention_inputs, spatial, patch, channels, plan
):
    """Where it is checked, as at the sizes of networks; nothing is read that another lane may not have stored yet."""
    x, keys, values, *weights = attention_inputs(spatial, patch, batch=1, channels=channels).values()
    launch = patches.Launch(x, functional.AttentionWeights(*weights), patch)
    assert launch.patches == 5
    assert launch.plan_backward(x.device) == plan
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
