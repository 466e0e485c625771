"""What the backbone does between its convolutions: the CPU's kernels against PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES

from grcsf_fast import functional, reference, use_backend
from grcsf_fast.ops import cpp, registered

pytestmark = pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPES = ((2, 3, 8, 12), (1, 1, 2, 2), (3, 5, 6, 34), (0, 3, 4, 4), (2, 2, 4, 6, 10), (1, 17, 2, 2, 2))


@pytest.fixture(params=cpp.instruction_sets() if cpp.problem() is None else [])
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("GRCSF_CPU_ISA", request.param)


def inputs(shape, dtype, layout="plain"):
    x = torch.randn(shape, dtype=torch.float64).to(dtype) * 3 + 1
    if layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "sliced":
        x = x.repeat_interleave(2, -1)[..., ::2]
    return x, torch.rand(shape[1], dtype=dtype) + 0.5, torch.randn(shape[1], dtype=dtype)


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalisation_against_float64(instruction_set, shape, dtype, layout):
    x, weight, bias = inputs(shape, dtype, layout)
    with use_backend("cpp"), torch.no_grad():
        found = functional.normalize_activate(x, weight, bias, 1e-5, 0.1)
    assert found.dtype == dtype
    if not x.numel():
        assert found.shape == x.shape
        return
    expected = reference.normalize_activate(x.double(), weight.double(), bias.double(), 1e-5, 0.1)
    atol, rtol = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pooling_is_exact(instruction_set, shape, dtype, layout):
    x = inputs(shape, dtype, layout)[0]
    if x.numel():
        x[..., 1] = torch.nan
    with use_backend("cpp"), torch.no_grad():
        found = functional.pool(x)
    torch.testing.assert_close(found, reference.pool(x) if x.numel() else found, atol=0, rtol=0, equal_nan=True)
    assert found.shape == (*shape[:2], *(size // 2 for size in shape[2:]))


def test_threads_do_not_matter(instruction_set):
    x, weight, bias = inputs((3, 7, 34, 62), torch.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((cpp.normalize_activate(x, weight, bias, 1e-5, 0.01), cpp.pool(x)))
    torch.set_num_threads(2)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


def test_not_finite_numbers_stay_in_their_plane():
    x, weight, bias = inputs((2, 3, 8, 8), torch.float32)
    x[0, 1, 2, 3] = torch.nan
    x[1, 2, 0, 0] = torch.inf
    with torch.no_grad():
        found = functional.normalize_activate(x, weight, bias)
    finite = found.isfinite().flatten(2).all(2)
    assert finite.tolist() == [[True, False, True], [True, True, False]]


def test_gradients_come_from_pytorch():
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs((2, 3, 4, 6), torch.float64))
    torch.autograd.gradcheck(functional.normalize_activate, (x, weight, bias))
    torch.autograd.gradcheck(functional.pool, (x,))


def test_registered_ops():
    x, weight, bias = inputs((2, 3, 4, 6), torch.float32)
    torch.library.opcheck(registered.normalize_activate, (x, weight, bias, 1e-5, 0.01))
    torch.library.opcheck(registered.pool, (x,))


def test_other_backends_use_pytorch(monkeypatch):
    x, weight, bias = inputs((2, 3, 4, 6), torch.float32)
    with use_backend("reference"), torch.no_grad():
        expected = F.leaky_relu(F.instance_norm(x, weight=weight, bias=bias), 0.01)
        assert torch.equal(functional.normalize_activate(x, weight, bias), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: functional.pool(torch.zeros(1, 1, 3, 4)), ValueError, r"^x: expected even"),
        (lambda: functional.pool(torch.zeros(1, 1, 4)), ValueError, r"^x: expected \(B,C,H,W\)"),
        (lambda: functional.pool(torch.zeros(1, 1, 4, 4, dtype=torch.int32)), TypeError, r"^x: expected a floating"),
        (
            lambda: functional.normalize_activate(torch.zeros(1, 2, 4, 4), torch.ones(3), torch.ones(2)),
            ValueError, r"^weight: expected shape \(C,\) = \(2,\)",
        ),
        (
            lambda: functional.normalize_activate(torch.zeros(1, 2, 1, 1), torch.ones(2), torch.ones(2)),
            ValueError, r"^x: expected more than one pixel",
        ),
    ],
)  # fmt: skip
def test_ill_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
