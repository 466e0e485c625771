"""Convolutions that train by the kernels with transformed weights: their gradients, and when they serve."""

import pytest
import torch
import torch.nn.functional as F
from convolutions import SHAPES, convolution, exact
from tolerances import TOLERANCES
from torch import nn

from grcsf_fast import use_backend
from grcsf_fast.networks.unet import conv
from grcsf_fast.ops import cpp, stages
from grcsf_fast.runtime.dtypes import accumulation_dtype

pytestmark = pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_against_float64(instruction_set, shape, dtype):
    """Of the op that trains; what it computes in float32 is compared in units of the largest number. Images in bfloat16
    have a weight in float32, whose gradient is no less exact."""
    wide_dtype = accumulation_dtype(dtype)
    layer = convolution(len(shape) - 2, shape[1], dtype=wide_dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    found = stages.convolution(x, layer.weight, layer.bias)
    incoming = torch.randn(found.shape, dtype=dtype)
    given = (x, layer.weight, layer.bias)
    grads = torch.autograd.grad(found, given, incoming)
    expected = exact(layer, x)
    wide = torch.autograd.grad(expected, given, incoming.double())
    dtypes = (dtype, dtype, wide_dtype, wide_dtype)
    for one, other, kept in zip((found, *grads), (expected, *wide), dtypes, strict=True):
        assert one.dtype == kept
        atol, rtol = TOLERANCES[kept]
        size = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one.double() / size, other.double() / size, atol=atol, rtol=rtol)


def test_registered_training():
    layer, x = convolution(2, 8), torch.randn(2, 8, 6, 10, requires_grad=True)
    torch.library.opcheck(stages._convolve, (x, layer.weight, layer.bias))
    incoming = torch.randn(2, 11, 6, 10)
    torch.library.opcheck(stages._convolve_back, (incoming, layer.weight.detach()))
    torch.library.opcheck(stages._convolve_weight_back, (incoming, x.detach(), layer.weight.detach()))


def test_second_derivatives_are_refused():
    layer, x = convolution(2, 8), torch.randn(2, 8, 6, 10, requires_grad=True)
    for given in (x, layer.weight):
        (grad,) = torch.autograd.grad(
            stages.convolution(x, layer.weight, layer.bias).square().sum(), given, create_graph=True
        )
        with pytest.raises(NotImplementedError, match="cannot be differentiated a second time"):
            grad.sum().backward()


def uses_the_kernel(layer, x):
    return "grcsf_fast_convolution" in type(layer(x).grad_fn).__name__


def test_what_runs_by_the_kernel():
    """Float32 with pixels and channels enough, the C++ backend in force; PyTorch serves the rest."""
    layer, x = conv(2, 8, 8), torch.randn(1, 8, 16, 32)
    assert uses_the_kernel(layer, x)
    assert uses_the_kernel(conv(3, 8, 8), torch.randn(1, 8, 2, 16, 16))
    with use_backend("reference"):
        assert not uses_the_kernel(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_the_kernel(layer, x)
        assert not uses_the_kernel(layer, x.bfloat16())
    with pytest.raises(RuntimeError, match="should be the same"):
        layer(x.bfloat16())
    assert not uses_the_kernel(layer, x[..., :31])
    assert not uses_the_kernel(conv(2, 7, 8), torch.randn(1, 7, 16, 32))
    # Pixels for 256 channels, and not for one more.
    assert uses_the_kernel(conv(2, 256, 8), torch.randn(1, 256, 16, 32))
    assert not uses_the_kernel(conv(2, 257, 8), torch.randn(1, 257, 16, 32))
    with pytest.raises(RuntimeError, match="to have 8 channels"):
        layer(torch.randn(1, 16, 16, 32))
    assert not uses_the_kernel(layer, x.contiguous(memory_format=torch.channels_last))
    assert not uses_the_kernel(conv(2, 8, 8).double(), x.double())
    expected = layer(x)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert torch.equal(layer(x), expected)
            assert not torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert not layer.requires_grad_(False)(x).requires_grad
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "changes",
    [{"padding": (0, 0)}, {"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2},
     {"padding_mode": "circular", "_reversed_padding_repeated_twice": [1] * 4}],
)  # fmt: skip
def test_settings_that_were_changed_count(changes):
    layer, x = conv(2, 8, 8), torch.randn(1, 8, 16, 32)
    if "groups" in changes:
        layer.weight = nn.Parameter(layer.weight[:, :4].detach())
    for name, value in changes.items():
        setattr(layer, name, value)
    assert not uses_the_kernel(layer, x)
    assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))


def test_outputs_and_their_way_back_do_not_depend_on_threads(instruction_set):
    """Though they decide who has a block of tiles of its own and what is shared: of 6 blocks all, two, one or none."""
    layer, x = conv(2, 40, 24), torch.randn(2, 40, 37, 50, requires_grad=True)
    found = []
    for threads in (1, 2, 3, 4, 5, 7, 24):
        torch.set_num_threads(threads)
        out = layer(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), [x, layer.weight, layer.bias])))
    torch.set_num_threads(2)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))
