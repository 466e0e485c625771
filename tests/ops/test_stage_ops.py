"""What backbone and autoencoder do between their convolutions and products: the CPU's kernels against PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES
from torch._subclasses.fake_tensor import FakeTensorMode

from grcsf_fast import use_backend
from grcsf_fast.errors import ArgumentError
from grcsf_fast.functional import internal
from grcsf_fast.ops import cpp, plain, registered, stages

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
        found = internal.normalize_activate(x, weight, bias, 1e-5, 0.1)
    assert found.dtype == dtype
    if not x.numel():
        assert found.shape == x.shape
        return
    expected = plain.normalize_activate(x.double(), weight.double(), bias.double(), 1e-5, 0.1)
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
        found = internal.pool(x)
        largest, mean = internal.pool_with_mean(x)
    torch.testing.assert_close(found, plain.pool(x) if x.numel() else found, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(largest, found, atol=0, rtol=0, equal_nan=True)
    assert found.shape == mean.shape == (*shape[:2], *(size // 2 for size in shape[2:]))
    if x.numel():
        atol, rtol = TOLERANCES[dtype]
        torch.testing.assert_close(mean.double(), plain.mean_pool(x.double()), atol=atol, rtol=rtol, equal_nan=True)


def check_gradients(name, tensors, *settings):
    """Outputs and all gradients of the kernels, against PyTorch's in float64 on the same numbers."""
    outcomes = []
    for convert, module, backend in ((lambda one: one, internal, "cpp"), (torch.Tensor.double, plain, "auto")):
        given = [convert(one.detach()).requires_grad_() for one in tensors]
        with use_backend(backend):
            outputs = getattr(module, name)(*given, *settings)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        incoming = [torch.linspace(-1, 1, one.numel(), dtype=tensors[0].dtype).reshape(one.shape) for one in outputs]
        grads = torch.autograd.grad(outputs, given, [one.to(outputs[0].dtype) for one in incoming])
        outcomes.append([*outputs, *grads])
    assert type(outcomes[0][0].grad_fn).__name__.startswith("GeneratedBackwardFor_grcsf_fast_")
    for found, expected in zip(*outcomes, strict=True):
        assert found.dtype == tensors[0].dtype
        atol, rtol = TOLERANCES[found.dtype]
        size = max(1.0, float(expected.detach().nan_to_num().abs().max()) if expected.numel() else 1.0)
        torch.testing.assert_close(found.double() / size, expected / size, atol=atol, rtol=rtol, equal_nan=True)


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_against_float64(instruction_set, shape, dtype, layout):
    tensors = inputs(shape, dtype, layout)
    check_gradients("normalize_activate", tensors, 1e-5, 0.1)
    check_gradients("pool_with_mean", tensors[:1])


def test_pooling_gives_the_gradient_to_whom_pytorch_gives_it(instruction_set):
    """To the first of equal pixels and to the last of several NaN."""
    for shape in ((1, 2, 8, 12), (1, 2, 4, 8, 6)):
        x = torch.randint(0, 2, shape).float()
        x[0, 0, :2, :2] = torch.tensor([[torch.nan, 1.0], [torch.nan, 2.0]]).reshape(2, 2, *[1] * (len(shape) - 4))
        x[0, 1, :2, :2] = -torch.inf
        check_gradients("pool_with_mean", [x])


def test_flat_planes_have_the_gradients_of_pytorch(instruction_set):
    """Nothing is above 0 there, so the activation has its lower slope, as in PyTorch."""
    x = torch.full((2, 3, 4, 8), 3.0)
    check_gradients("normalize_activate", [x, torch.rand(3), torch.zeros(3)], 1e-5, 0.1)


def test_planes_of_mostly_one_number(instruction_set):
    """As of a head with air around it: a million equal numbers, of which every addition is rounded the same way."""
    air = torch.rand(1, 1, 96, 96, 96) < 0.8
    x, incoming = (torch.where(air, value, torch.randn(air.shape) + 1) for value in (0.731, 0.417))
    outcomes = []
    for module, backend, dtype in ((internal, "cpp", torch.float32), (plain, "reference", torch.float64)):
        given = [one.to(dtype).requires_grad_() for one in (x * 0.1, torch.ones(1), torch.ones(1))]
        with use_backend(backend):
            out = module.normalize_activate(*given, 1e-5, 1.0)
        outcomes.append([out, *torch.autograd.grad(out, given, incoming.to(dtype))])
    atol, rtol = TOLERANCES[torch.float32]
    for found, expected in zip(*outcomes, strict=True):
        size = expected.detach().abs().max()
        torch.testing.assert_close(found.double() / size, expected / size, atol=atol, rtol=rtol)


# (B, wanted, tokens, heads, width of a head): one token, a vector's width and beyond it, more rows than go at once.
ATTENTION = (
    (2, 5, 5, 2, 4),
    (1, 1, 1, 1, 1),
    (1, 7, 16, 3, 16),
    (2, 100, 33, 1, 24),
    (1, 3, 150, 2, 40),
    (0, 4, 4, 1, 2),
)


def packed(batch, wanted, tokens, heads, width, dtype):
    """Queries, keys and values, the last two as halves of one tensor, as a transformer has them."""
    both = torch.randn(batch, tokens, 2 * heads * width, dtype=torch.float64).to(dtype)
    return torch.randn(batch, wanted, heads * width, dtype=torch.float64).to(dtype), *both.chunk(2, 2)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention_against_float64(instruction_set, shape, dtype, scale):
    query, key, value = packed(*shape, dtype)
    query = query * scale
    with use_backend("cpp"), torch.no_grad():
        found = internal.attend(query, key, value, shape[3])
    assert found.dtype == dtype
    expected = plain.attend(query.double(), key.double(), value.double(), shape[3])
    atol, rtol = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=rtol)


def test_attention_to_rows_that_are_not_dense(instruction_set):
    query, key, value = packed(2, 9, 20, 2, 8, torch.float32)
    expected = plain.attend(query, key, value, 2)
    spread = query.repeat_interleave(2, -1)[..., ::2]
    turned = key.transpose(1, 2).contiguous().transpose(1, 2)
    with use_backend("cpp"), torch.no_grad():
        found = internal.attend(spread, turned, value.expand(2, -1, -1), 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_attention_to_not_finite_numbers():
    query, key, value = packed(2, 4, 6, 1, 8, torch.float32)
    key[1, 2] = torch.nan
    with use_backend("cpp"), torch.no_grad():
        found = internal.attend(query, key, value, 1)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 32), (4, 48), (0, 3, 4)])
def test_gelu_against_float64(instruction_set, shape, dtype):
    x = torch.randn(shape, dtype=torch.float64).to(dtype) * 4
    weight, bias = torch.randn(37, shape[-1], dtype=dtype) * 0.5, torch.randn(37, dtype=dtype)
    with use_backend("cpp"), torch.no_grad():
        found = internal.linear_gelu(x, weight, bias)
    assert found.dtype == dtype
    # The product is PyTorch's, and rounded before the bias is added.
    expected = F.gelu(F.linear(x, weight).double() + bias.double())
    atol, rtol = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=rtol)


def test_gelu_at_its_ends(instruction_set):
    x = torch.tensor([[-200.0], [-9.0], [-1e-30], [0.0], [1e-30], [9.0], [200.0], [torch.nan]])
    with use_backend("cpp"), torch.no_grad():
        found = internal.linear_gelu(x, torch.ones(1, 1), torch.zeros(1))
    torch.testing.assert_close(found, F.gelu(x), atol=2e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_under_autocast(dtype):
    x, weight, bias = torch.randn(4, 16), torch.randn(24, 16), torch.randn(24)
    with use_backend("cpp"), torch.no_grad(), torch.autocast("cpu", dtype):
        found = internal.linear_gelu(x, weight, bias)
    assert found.dtype == dtype
    expected = F.gelu(F.linear(x.to(dtype), weight.to(dtype)).float() + bias)
    torch.testing.assert_close(found.float(), expected, atol=8e-3, rtol=8e-3)


def test_threads_do_not_matter(instruction_set):
    x, weight, bias = inputs((3, 7, 34, 62), torch.float32)
    tokens = packed(3, 50, 60, 2, 8, torch.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, statistics = cpp.norm_forward(x, weight, bias, 1e-5, 0.01)
        assert torch.equal(out, cpp.normalize_activate(x, weight, bias, 1e-5, 0.01))
        grads = cpp.norm_backward(out, x, weight, bias, statistics, 0.01)
        pooled = cpp.pool_forward(x)
        found.append((out, *grads, *pooled, cpp.pool_backward(*pooled, x), cpp.pool(x), cpp.attend(*tokens, 2)))
    torch.set_num_threads(2)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 6, 10), (1, 2, 6, 10), (1, 5, 6, 10)])
def test_more_threads_than_planes(shape, dtype):
    """And planes that cannot be shared out evenly."""
    x, weight, bias = inputs(shape, dtype)
    found = []
    for threads in (1, 3, 4):
        torch.set_num_threads(threads)
        out, statistics = cpp.norm_forward(x, weight, bias, 1e-5, 0.01)
        found.append((out, *cpp.norm_backward(out, x, weight, bias, statistics, 0.01)))
    torch.set_num_threads(2)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


def test_attention_to_what_would_be_misread():
    """By the registered op, where nothing has checked the arguments."""
    query, key, value = packed(2, 4, 6, 2, 8, torch.float32)
    for given, message in (
        ((query, key.double(), value, 2), "keys: expected torch.float32 of shape"),
        ((query, key, value[:, :3], 2), r"values: expected .* of shape \(2, 6, 16\)"),
        ((query, key[:1], value, 2), r"keys: expected .* of shape \(2, 6, 16\)"),
        ((query, key, value, 0), "heads: expected a divisor of 16"),
        ((query, key, value, 3), "heads: expected a divisor of 16"),
        ((query, key[:, :0], value[:, :0], 2), "one token or more, got 2 and 0"),
    ):
        with pytest.raises(ValueError, match=message):
            registered.attend(*given)


def test_pooling_of_what_would_be_misread():
    """By the registered ops, forward and backward."""
    for shape in ((1, 1, 3, 4, 4), (1, 1, 4, 5), (1, 1, 3, 3), (1, 2, 4), (1, 1, 2, 2, 2, 2)):
        x = torch.zeros(shape)
        half = torch.zeros(*shape[:2], *(size // 2 for size in shape[2:]))
        for run in (
            lambda x: registered.pool(x),
            lambda x: registered.pool_with_mean(x),
            lambda x: stages._pool(x, "cpp"),
            lambda x, half=half: stages._pool_backward(half, half, x, "cpp"),
        ):
            with pytest.raises(ArgumentError, match=r"^x: expected \(B,C,H,W\) or .* even spatial axes, got \(1, "):
                run(x)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("spatial", [(8, 8), (2, 4, 6)])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 0), (0, 8), (0, 0)])
def test_convolutions_of_no_channels(instruction_set, spatial, inputs, outputs, threads):
    torch.set_num_threads(threads)
    x, bias = torch.randn(2, inputs, *spatial), torch.randn(outputs)
    weight = torch.randn(outputs, inputs, *(3 for _ in spatial))
    for found in (
        stages._convolve(x, weight, bias),
        registered.convolve(x, registered.transform_filters(weight), bias),
    ):
        assert torch.equal(found, bias.reshape(-1, *(1 for _ in spatial)).expand_as(found))
        assert found.shape == (2, outputs, *spatial)
    out_grad = torch.randn(2, outputs, *spatial)
    assert torch.equal(stages._convolve_back(out_grad, weight), torch.zeros_like(x))
    assert stages._convolve_weight_back(out_grad, x, weight).shape == weight.shape
    filters = torch.randn(2 ** len(spatial), outputs, inputs)
    doubled = registered.upsample(x, filters, bias)
    assert torch.equal(doubled, bias.reshape(-1, *(1 for _ in spatial)).expand_as(doubled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(5, 40, 3, 3), (40, 3, 3, 3, 3)])
def test_shapes_of_filters_are_known_before_they_are_made(shape, turned, dtype):
    weight = torch.randn(shape).to(dtype)
    torch.library.opcheck(registered.transform_filters, (weight, turned))
    with FakeTensorMode():
        fake = internal.transform_filters(torch.ones(shape, dtype=dtype))
    assert (fake.shape, fake.dtype) == (internal.transform_filters(weight).shape, dtype)
    assert torch.equal(internal.transform_filters(weight), cpp.transform_filters(weight))


def test_an_outlier_beside_pixels_that_it_does_not_reach(instruction_set):
    """The error of a transformed convolution is one of the largest number in the 6 x 6 pixels of a tile."""
    x, weight = torch.randn(1, 32, 64, 64), torch.randn(32, 32, 3, 3) / (32 * 9) ** 0.5
    x[0, 3, 21, 30] = 1e4
    found = stages.convolution(x, weight, torch.zeros(32))
    error = (found.double() - F.conv2d(x.double(), weight.double(), padding=1)).abs().amax((0, 1))
    near, reached = torch.zeros(2, 64, 64, dtype=torch.bool)
    near[20:24, 28:32], reached[20:23, 29:32] = True, True  # the tile, and the nine of a plain convolution
    assert error[~near].max() < 1.5e-5 < error[near & ~reached].max() < 2e-7 * 1e4
    x[0, 3, 21, 30] = torch.nan
    assert torch.equal(stages.convolution(x, weight, torch.zeros(32)).isnan().any(1)[0], near)


def test_not_finite_numbers_stay_in_their_plane():
    x, weight, bias = inputs((2, 3, 8, 8), torch.float32)
    x[0, 1, 2, 3] = torch.nan
    x[1, 2, 0, 0] = torch.inf
    with torch.no_grad():
        found = internal.normalize_activate(x, weight, bias)
    finite = found.isfinite().flatten(2).all(2)
    assert finite.tolist() == [[True, False, True], [True, True, False]]


def test_gradients():
    """Of what has kernels for inference alone from PyTorch."""
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs((2, 3, 4, 6), torch.float64))
    torch.autograd.gradcheck(internal.normalize_activate, (x, weight, bias))
    torch.autograd.gradcheck(internal.pool, (x,))
    torch.autograd.gradcheck(internal.pool_with_mean, (x,))
    tokens = [one.clone().requires_grad_() for one in packed(1, 3, 4, 2, 2, torch.float64)]
    torch.autograd.gradcheck(lambda *all_: internal.attend(*all_, 2), tokens)
    torch.autograd.gradcheck(internal.linear_gelu, [torch.randn(n, dtype=torch.float64).requires_grad_() for n in
                                                      ((2, 3), (4, 3), (4,))])  # fmt: skip


def test_registered_ops():
    x, weight, bias = inputs((2, 3, 4, 6), torch.float32)
    torch.library.opcheck(registered.normalize_activate, (x, weight, bias, 1e-5, 0.01))
    torch.library.opcheck(registered.pool, (x,))
    needing = [one.clone().requires_grad_() for one in (x, weight, bias)]
    torch.library.opcheck(stages._normalize, (*needing, 1e-5, 0.01, "cpp"))
    torch.library.opcheck(stages._pool, (needing[0], "cpp"))
    torch.library.opcheck(registered.pool_with_mean, (x,))
    torch.library.opcheck(registered.attend, (*packed(1, 3, 4, 2, 8, torch.float32), 2))
    torch.library.opcheck(registered.linear_gelu, (torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)))


def test_other_backends_use_pytorch(monkeypatch):
    x, weight, bias = inputs((2, 3, 4, 6), torch.float32)
    with use_backend("reference"), torch.no_grad():
        expected = F.leaky_relu(F.instance_norm(x, weight=weight, bias=bias), 0.01)
        assert torch.equal(internal.normalize_activate(x, weight, bias), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: internal.pool(torch.zeros(1, 1, 3, 4)), ValueError, r"^x: expected even"),
        (lambda: internal.pool(torch.zeros(1, 1, 4)), ValueError, r"^x: expected \(B,C,H,W\)"),
        (lambda: internal.pool(torch.zeros(1, 1, 4, 4, dtype=torch.int32)), TypeError, r"^x: expected a floating"),
        (
            lambda: internal.normalize_activate(torch.zeros(1, 2, 4, 4), torch.ones(3), torch.ones(2)),
            ValueError, r"^weight: expected shape \(C,\) = \(2,\)",
        ),
        (
            lambda: internal.normalize_activate(torch.zeros(1, 2, 1, 1), torch.ones(2), torch.ones(2)),
            ValueError, r"^x: expected more than one pixel",
        ),
        (lambda: internal.attend(torch.zeros(1, 2), *[torch.zeros(1, 2, 4)] * 2, 2), ValueError, "^queries: exp"),
        (lambda: internal.attend(*[torch.zeros(1, 2, 4)] * 3, 3), ValueError, "^heads: expected a divisor of D = 4"),
        (
            lambda: internal.attend(*[torch.zeros(1, 2, 4)] * 2, torch.zeros(1, 3, 4), 2),
            ValueError, r"^values: expected shape \(B,N,D\) = \(1, 2, 4\)",
        ),
        (
            lambda: internal.attend(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, 4), 2),
            TypeError, "^keys: expected dtype torch.float32",
        ),
        (
            lambda: internal.linear_gelu(torch.zeros(1, 2), torch.zeros(4, 3), torch.zeros(4)),
            ValueError, r"^weight: expected shape \(H,D\) = \(4, 2\)",
        ),
    ],
)  # fmt: skip
def test_ill_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
