"""Convolutions with transformed weights, and networks that have them, against those they were made from."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from awake import awake
from convolutions import SHAPES, convolution, exact
from small import autoencoder
from tolerances import TOLERANCES
from torch import nn

from grcsf_fast import GRCSF, use_backend
from grcsf_fast.functional import internal
from grcsf_fast.networks.fast_layers import FastConvolution, FastUpsampling, replace_convolutions
from grcsf_fast.ops import cpp, registered, stages

pytestmark = pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built")


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
        found = FastConvolution(layer)(x)
    assert found.dtype == dtype
    atol, rtol = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), exact(layer, x).detach(), atol=atol, rtol=rtol)


def test_filters_that_do_not_fit():
    """Of a private op, which would read beyond them."""
    layer, x = convolution(2, 8), torch.randn(2, 16, 6, 10)
    for run in (lambda: stages.convolution(x, layer.weight, layer.bias), lambda: FastConvolution(layer).run(x)):
        with pytest.raises(ValueError, match="filters: expected"), torch.no_grad():
            run()
    with pytest.raises(ValueError, match="filters: expected"), torch.no_grad():
        FastUpsampling(nn.ConvTranspose2d(8, 7, 2, stride=2)).run(x)


def test_weights_of_other_taps():
    for taps in ((1, 1), (3, 5), (3,), (3, 3, 3)):
        weight, x = torch.randn(8, 8, *taps), torch.randn(1, 8, 16, 32)
        with pytest.raises(ValueError, match=r"weight: expected \(O,C,3,3\), got"):
            internal.convolution(x, weight, torch.zeros(8))
        if taps != (3, 3, 3):
            with pytest.raises(ValueError, match=r"weight: expected \(O,C,3,3\) or \(O,C,3,3,3\), got"):
                internal.transform_filters(weight)


def test_a_bias_of_another_length():
    x, weight = torch.randn(1, 16, 64, 64), torch.randn(16, 16, 3, 3)
    with use_backend("cpp"), pytest.raises(RuntimeError, match=r"(?i)bias"), torch.no_grad():
        internal.convolution(x, weight, torch.zeros(15))


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
        found = FastUpsampling(layer if dtype == torch.float64 else layer.float())(x)
    assert found.dtype == dtype
    atol, rtol = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("outputs", [1, 7, 8, 32, 33, 40])
def test_numbers_of_output_channels(instruction_set, outputs):
    layer, x = convolution(2, 12, outputs), torch.randn(2, 12, 10, 14)
    with torch.no_grad():
        torch.testing.assert_close(FastConvolution(layer)(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (16, 8), (17, 33), (48, 32), (50, 64), (100, 5)])
def test_gradients_of_weights_by_channels(instruction_set, inputs, outputs):
    """Of fewer and more channels than a vector, a group and a strip of the kernel have; of more tiles than a block."""
    x, out_grad = torch.randn(2, inputs, 11, 34), torch.randn(2, outputs, 11, 34)
    layer = convolution(2, inputs, outputs)
    (expected,) = torch.autograd.grad(exact(layer, x), [layer.weight], out_grad.double())
    found = cpp.convolution_weight_grad(out_grad, x)
    size = float(expected.abs().max())
    torch.testing.assert_close(found / size, expected.float() / size, atol=1e-5, rtol=0)
    half = cpp.convolution_weight_grad(out_grad.bfloat16(), x.bfloat16())
    assert half.dtype == torch.float32
    (rounded,) = torch.autograd.grad(exact(layer, x.bfloat16()), [layer.weight], out_grad.bfloat16().double())
    torch.testing.assert_close(half / size, rounded.float() / size, atol=1e-5, rtol=0)


def test_large_numbers_beside_small_ones():
    """An error is one of the largest inputs near a pixel, and of no other."""
    layer, x = convolution(2, 16), torch.randn(1, 16, 64, 64)
    x[..., :32] *= 1e6
    with torch.no_grad():
        error = (FastConvolution(layer)(x).double() - exact(layer, x)).abs()
    assert error[..., :32].max() < 1e6 * 1e-5 * 5
    assert error[..., 40:].max() < 1e-5 * 5


def test_neighbours_and_threads_do_not_matter(instruction_set):
    x = torch.randn(7, 16, 10, 30)
    for layer in (FastConvolution(convolution(2, 16)), FastUpsampling(nn.ConvTranspose2d(16, 9, 2, stride=2))):
        with torch.no_grad():
            expected = layer(x)
            assert torch.equal(layer(x[3:4])[0], expected[3])
            for threads in (1, 3, 8):
                torch.set_num_threads(threads)
                found = layer(x)
                torch.set_num_threads(2)
                assert torch.equal(found, expected)


@pytest.mark.parametrize("spatial", [(5, 6), (3, 4, 5)])
def test_registered_ops(spatial):
    x, dims = torch.randn(2, 8, *spatial), len(spatial)
    up = FastUpsampling((nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d)(8, 3, 2, stride=2))
    for op, layer in ((registered.convolve, FastConvolution(convolution(dims, 8))), (registered.upsample, up)):
        torch.library.opcheck(op, (x, layer.filters, layer.bias))


def test_not_finite_numbers_stay_near():
    layer, x = convolution(2, 8), torch.randn(2, 8, 16, 16)
    x[0, 3, 5, 5] = torch.nan
    with torch.no_grad():
        bad = ~FastConvolution(layer)(x).isfinite()
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
    replace_convolutions(module)
    kept = [type(layer).__name__ for layer in module[1:-1]]
    assert kept == ["Conv2d"] * 6 + ["ConvTranspose2d"] * 2
    replaced = [type(layer).__name__ for layer in (module[0], *module[-1])]
    assert replaced == ["FastConvolution", "FastConvolution", "FastUpsampling"]


def network(dims, **options):
    torch.manual_seed(0)
    model = GRCSF(dims, 1, 2, features=(8, 12, 16), residual_channels=8, rcu_levels=(0, 1), patch_size=4, **options)
    return awake(model).eval()


@pytest.mark.parametrize("spatial", [(21, 34), (9, 17, 12)])
def test_network(spatial):
    model = network(len(spatial))
    optimized = model.optimized_for_inference(fused=True)
    assert sum(isinstance(module, FastConvolution) for module in optimized.modules()) > 8
    image, maps = torch.randn(2, 1, *spatial), torch.rand(2, 2, *spatial)
    with torch.no_grad(), use_backend("cpp"):
        expected = model(image, maps)
        torch.testing.assert_close(optimized(image, maps), expected, atol=1e-4, rtol=1e-4)
        # In half precision the transformed weights stay exact, so it is not further away than the network itself.
        distance = [
            float((one(image, maps).float() - expected).square().mean().sqrt())
            for one in (model.optimized_for_inference(torch.bfloat16, fused) for fused in (True, False))
        ]
    assert distance[0] < 1.1 * distance[1] < 0.1


def test_float64_network():
    model = network(2).double()
    image, maps = torch.randn(1, 1, 16, 16).double(), torch.rand(1, 2, 16, 16).double()
    with torch.no_grad():
        expected = model(image, maps)
        torch.testing.assert_close(
            model.optimized_for_inference(fused=True)(image, maps), expected, atol=1e-9, rtol=1e-9
        )


def test_an_optimized_network_is_for_inference_alone():
    optimized = network(2).optimized_for_inference(fused=True)
    image, maps = torch.randn(1, 1, 16, 16), torch.rand(1, 2, 16, 16)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        optimized.train()
    with pytest.raises(RuntimeError, match="no weights to save"):
        torch.save(optimized.state_dict(), io.BytesIO())
    with pytest.raises(RuntimeError, match="no gradients"):
        optimized.eval()(image.clone().requires_grad_(), maps)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"C\+\+ kernels.*backend 'reference'"),
        use_backend("reference"),
    ):
        optimized(image, maps)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"made for torch.float32; got torch.float64"):
        optimized.double()(image.double(), maps.double())
    layer = FastConvolution(convolution(2, 8))
    with torch.no_grad(), pytest.raises(ValueError, match=r"x: expected \(B,8\) and 2 axes, got \(1, 4, 8, 8\)"):
        layer(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("with_autoencoder", [True, False])
@pytest.mark.parametrize("spatial", [(21, 34), (9, 17, 12)])
def test_gradients_being_on_does_not_matter(spatial, with_autoencoder):
    """An optimized network asks for none, in whichever mode and thread it runs."""
    dims = len(spatial)
    model = network(dims, mae=autoencoder(dims) if with_autoencoder else None).optimized_for_inference(fused=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    image, maps = torch.randn(2, 1, *spatial), None if with_autoencoder else torch.rand(2, 2, *spatial)
    with torch.no_grad():
        expected = model(image, maps)
    found = model(image, maps)
    assert not found.requires_grad
    assert torch.equal(found, expected)
    with torch.inference_mode():
        assert torch.equal(model(image, maps), expected)
    with ThreadPoolExecutor(2) as threads:
        for other in threads.map(lambda _: model(image, maps), range(4)):
            assert torch.equal(other, expected)


@torch.no_grad()
def test_autocast():
    model = network(2)
    image, maps = torch.randn(2, 1, 21, 34), torch.rand(2, 2, 21, 34)
    expected = model(image, maps)
    optimized = model.optimized_for_inference(fused=True)
    with torch.autocast("cpu", torch.bfloat16):
        distance = [float((one(image, maps).float() - expected).square().mean().sqrt()) for one in (optimized, model)]
    assert distance[0] < 1.5 * distance[1] < 0.1


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_an_optimized_network(way):
    model = network(2, mae=autoencoder(2)).optimized_for_inference(fused=True)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, stored := io.BytesIO())
        copied = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
    image = torch.randn(1, 1, 16, 20)
    assert torch.equal(copied(image), model(image))
    assert torch.equal(
        copied.optimized_for_inference(torch.bfloat16)(image), model.optimized_for_inference(torch.bfloat16)(image)
    )


def test_an_optimized_network_stays_so():
    """Twice is as good as once; weights neither come out nor go in."""
    model = network(2)
    weights = model.state_dict()
    optimized = model.optimized_for_inference(fused=True)
    image, maps = torch.randn(1, 1, 16, 16), torch.rand(1, 2, 16, 16)
    expected = optimized(image, maps)
    assert torch.equal(optimized.optimized_for_inference(fused=True)(image, maps), expected)
    with pytest.raises(RuntimeError, match="takes no weights; load them into the network it is made from"):
        optimized.load_state_dict(weights)
    assert torch.equal(optimized(image, maps), expected)
    with pytest.raises(RuntimeError, match=r"made for torch.float32; got torch.float16"):
        optimized.half()(image.half(), maps.half())


def test_gradients_of_an_image_are_refused():
    optimized = network(2).optimized_for_inference(fused=True)
    image, maps = torch.randn(1, 1, 16, 16, requires_grad=True), torch.rand(1, 2, 16, 16)
    with pytest.raises(
        RuntimeError, match="optimized for inference has no gradients; use the network it was made from"
    ):
        optimized(image, maps)
    with torch.no_grad():
        assert not optimized(image, maps).requires_grad


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


@torch.no_grad()
@pytest.mark.parametrize("way", ["subclass", "hook", "weight norm", "parametrisation", "padding"])
def test_convolutions_that_are_more_stay(way):
    """A kernel knows the weight alone, and zeros around."""
    layer = convolution(2, 8, 8)
    if way == "subclass":
        layer.__class__ = Standardised
    elif way == "hook":
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif way == "weight norm":
        nn.utils.parametrizations.weight_norm(layer)
    elif way == "parametrisation":
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    else:
        layer.padding_mode = "reflect"
        layer._reversed_padding_repeated_twice = [1, 1, 1, 1]
    module, x = nn.Sequential(layer, nn.Conv2d(8, 8, 3, padding=1)), torch.randn(1, 8, 6, 7)
    expected = module(x)
    replace_convolutions(module)
    assert [type(one) is FastConvolution for one in module] == [False, True]
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


def test_fused_layers_need_the_kernels(monkeypatch):
    monkeypatch.setattr(cpp, "problem", lambda: "not built")
    with pytest.raises(RuntimeError, match="fused: not built"):
        network(2).optimized_for_inference(fused=True)
