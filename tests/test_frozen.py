"""Convolutions with transformed weights, and networks that have them, against those they were made from."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES
from torch import nn

from grcsf_fast import GRCSF, use_backend
from grcsf_fast.networks.frozen import FrozenConvolution, FrozenUpsampling, freeze_convolutions
from grcsf_fast.ops import cpp, registered

pytestmark = pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built")

# (B, C, *S): whole tiles and none, rows that end within a block of 48 tiles, many planes, one pixel, nothing.
SHAPES = (
    (2, 8, 8, 12), (1, 9, 7, 9), (3, 16, 6, 34), (1, 8, 1, 1), (2, 8, 3, 200), (1, 40, 24, 24), (5, 8, 12, 12),
    (0, 8, 4, 4), (2, 8, 5, 6, 7), (1, 16, 1, 9, 4), (1, 9, 4, 2, 2),
)  # fmt: skip


@pytest.fixture(params=cpp.instruction_sets() if cpp.problem() is None else [])
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("GRCSF_CPU_ISA", request.param)


def convolution(dims, inputs, outputs=11, dtype=torch.float32):
    torch.manual_seed(1)
    return (nn.Conv2d if dims == 2 else nn.Conv3d)(inputs, outputs, 3, padding=1).to(dtype)


def exact(layer, x):
    run = F.conv2d if x.dim() == 4 else F.conv3d
    return run(x.double(), layer.weight.double(), layer.bias.double(), padding=1)


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(instruction_set, shape, dtype, layout):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    if layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "sliced":
        x = x.repeat_interleave(2, -1)[..., ::2]
    layer = convolution(len(shape) - 2, shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        found = FrozenConvolution(layer)(x)
    assert found.dtype == dtype
    atol, rtol = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), exact(layer, x).detach(), atol=atol, rtol=rtol)


# Rows in parts, several rows at once with and without a rest, planes, nothing.
UPSAMPLED = (
    (2, 5, 3, 100),
    (2, 3, 7, 12),
    (1, 17, 6, 48),
    (3, 8, 1, 1),
    (0, 4, 4, 4),
    (2, 4, 3, 5, 9),
    (1, 3, 2, 1, 60),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", UPSAMPLED)
def test_upsampling_against_float64(instruction_set, shape, dtype):
    torch.manual_seed(1)
    kind = nn.ConvTranspose2d if len(shape) == 4 else nn.ConvTranspose3d
    layer = kind(shape[1], 7, 2, stride=2).double()
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        expected = layer(x.double())
        found = FrozenUpsampling(layer if dtype == torch.float64 else layer.float())(x)
    assert found.dtype == dtype
    atol, rtol = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("outputs", [1, 7, 8, 32, 33, 40])
def test_numbers_of_output_channels(instruction_set, outputs):
    layer, x = convolution(2, 12, outputs), torch.randn(2, 12, 10, 14)
    with torch.no_grad():
        torch.testing.assert_close(FrozenConvolution(layer)(x), layer(x), atol=1e-5, rtol=1e-5)


def test_large_numbers_beside_small_ones():
    """An error is one of the largest inputs near a pixel, and of no other."""
    layer, x = convolution(2, 16), torch.randn(1, 16, 64, 64)
    x[..., :32] *= 1e6
    with torch.no_grad():
        error = (FrozenConvolution(layer)(x).double() - exact(layer, x)).abs()
    assert error[..., :32].max() < 1e6 * 1e-5 * 5
    assert error[..., 40:].max() < 1e-5 * 5


def test_neighbours_and_threads_do_not_matter(instruction_set):
    x = torch.randn(7, 16, 10, 30)
    for layer in (FrozenConvolution(convolution(2, 16)), FrozenUpsampling(nn.ConvTranspose2d(16, 9, 2, stride=2))):
        with torch.no_grad():
            expected = layer(x)
            assert torch.equal(layer(x[3:4])[0], expected[3])
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found = layer(x)
                torch.set_num_threads(2)
                assert torch.equal(found, expected)


@pytest.mark.parametrize("spatial", [(5, 6), (3, 4, 5)])
def test_registered_ops(spatial):
    x, dims = torch.randn(2, 8, *spatial), len(spatial)
    up = FrozenUpsampling((nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d)(8, 3, 2, stride=2))
    for op, layer in ((registered.convolve, FrozenConvolution(convolution(dims, 8))), (registered.upsample, up)):
        torch.library.opcheck(op, (x, layer.filters, layer.bias))


def test_not_finite_numbers_stay_near():
    layer, x = convolution(2, 8), torch.randn(2, 8, 16, 16)
    x[0, 3, 5, 5] = torch.nan
    with torch.no_grad():
        bad = ~FrozenConvolution(layer)(x).isfinite()
    # A tile sees the pixel if it lies within one pixel of it.
    assert bad[0].all(0).nonzero().tolist() == [[y, x] for y in range(4, 8) for x in range(4, 8)]
    assert not bad[1].any()


def test_which_convolutions_are_replaced():
    module = nn.Sequential(
        nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.ConvTranspose2d(8, 8, 2, stride=2, output_padding=1),
        nn.ConvTranspose2d(8, 8, 3, stride=2),
        nn.Sequential(nn.Conv3d(8, 4, 3, padding=1), nn.ConvTranspose3d(4, 4, 2, 2)),
    )  # fmt: skip
    freeze_convolutions(module)
    kept = [type(layer).__name__ for layer in module[1:-1]]
    assert kept == ["Conv2d"] * 6 + ["ConvTranspose2d"] * 2
    replaced = [type(layer).__name__ for layer in (module[0], *module[-1])]
    assert replaced == ["FrozenConvolution", "FrozenConvolution", "FrozenUpsampling"]


def network(dims, **options):
    torch.manual_seed(0)
    model = GRCSF(dims, 1, 2, features=(8, 12, 16), residual_channels=8, rcu_levels=(0, 1), patch_size=4, **options)
    return model.eval()


@pytest.mark.parametrize("spatial", [(21, 34), (9, 17, 12)])
def test_network(spatial):
    model = network(len(spatial))
    frozen = copy.deepcopy(model).freeze()
    assert sum(isinstance(module, FrozenConvolution) for module in frozen.modules()) > 8
    image, maps = torch.randn(2, 1, *spatial), torch.rand(2, 2, *spatial)
    with torch.no_grad(), use_backend("cpp"):
        expected = model(image, maps)
        torch.testing.assert_close(frozen(image, maps), expected, atol=1e-4, rtol=1e-4)
        # In half precision the transformed weights stay exact, so it is not further away than the network itself.
        distance = [
            float((one.lowered(torch.bfloat16)(image, maps).float() - expected).square().mean().sqrt())
            for one in (frozen, model)
        ]
    assert distance[0] < 1.1 * distance[1] < 0.1


def test_float64_network():
    model = network(2).double()
    image, maps = torch.randn(1, 1, 16, 16).double(), torch.rand(1, 2, 16, 16).double()
    with torch.no_grad():
        expected = model(image, maps)
        torch.testing.assert_close(model.freeze()(image, maps), expected, atol=1e-9, rtol=1e-9)


def test_a_frozen_network_is_for_inference_alone():
    frozen = network(2).freeze()
    image, maps = torch.randn(1, 1, 16, 16), torch.rand(1, 2, 16, 16)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        frozen.train()
    with pytest.raises(RuntimeError, match="no weights to save"):
        torch.save(frozen.state_dict(), io.BytesIO())
    with pytest.raises(RuntimeError, match="no gradients"):
        frozen.eval()(image.requires_grad_(), maps)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"C\+\+ kernels.*backend 'reference'"),
        use_backend("reference"),
    ):
        frozen(image, maps)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"frozen for torch.float32; got torch.float64"):
        frozen.double()(image.double(), maps.double())
    layer = FrozenConvolution(convolution(2, 8))
    with torch.no_grad(), pytest.raises(ValueError, match=r"x: expected \(B,8\) and 2 axes, got \(1, 4, 8, 8\)"):
        layer(torch.zeros(1, 4, 8, 8))


def test_freezing_needs_the_kernels(monkeypatch):
    monkeypatch.setattr(cpp, "problem", lambda: "not built")
    with pytest.raises(RuntimeError, match="freeze: not built"):
        network(2).freeze()
