"""What the networks take: tensor subclasses, empty batches, dtypes and devices, and what they say of anything else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from PIL import Image
from small import autoencoder, network
from streams import together
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from grcsf_fast import GRCSF, backend_info, residual_maps, use_backend
from grcsf_fast.errors import ArgumentTypeError
from grcsf_fast.networks import residual_maps as residuals
from grcsf_fast.networks import transformer
from grcsf_fast.networks.constants import constant_tensors
from grcsf_fast.networks.stream import Stream
from grcsf_fast.networks.whole_volume import segment_views, segmentation_stage
from grcsf_fast.pretrained.bundle import load_bundle

SIZES = [(9, 14), (5, 9, 6)]
BACKENDS = [name for name in ("cpp", "reference") if backend_info()[name]["available"]]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


class Tagged(Tensor):
    """A subclass whose operations give it back."""


@pytest.fixture(params=[MetaTensor, Tagged])
def subclass(request):
    return MetaTensor if request.param is MetaTensor else lambda tensor: tensor.as_subclass(Tagged)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("spatial", SIZES)
class TestSubclasses:
    @pytest.mark.parametrize("with_mae", [True, False])
    def test_values_are_the_plain_tensors(self, subclass, spatial, with_mae):
        model = network(len(spatial), mae=autoencoder(len(spatial)) if with_mae else None)
        image, given = torch.randn(2, 1, *spatial), None if with_mae else torch.rand(2, 2, *spatial)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                expected, maps = model(image, given, return_maps=True)
                found, found_maps = model(subclass(image), given, return_maps=True)
            assert type(found) is type(subclass(image))
            assert torch.equal(found.as_subclass(Tensor), expected)
            for kind in ("gcu_residuals", "patch_scores"):
                for level, one in getattr(maps, kind).items():
                    assert torch.equal(getattr(found_maps, kind)[level].as_subclass(Tensor), one)

    def test_without_units(self, subclass, spatial):
        model = network(len(spatial), rcu_levels=(), gcu=False)
        image = torch.randn(2, 1, *spatial)
        with torch.no_grad():
            assert torch.equal(model(subclass(image)).as_subclass(Tensor), model(image))

    def test_gradients(self, subclass, spatial):
        model = network(len(spatial), mae=autoencoder(len(spatial))).train()
        image = torch.randn(2, 1, *spatial)
        gradients = []
        for one in (image, subclass(image)):
            model.zero_grad()
            model(one).square().mean().backward()
            gradients.append([p.grad.as_subclass(Tensor).clone() for p in model.parameters() if p.requires_grad])
        for expected, found in zip(*gradients, strict=True):
            assert torch.equal(found, expected)

    def test_residual_maps(self, subclass, spatial):
        small, image = autoencoder(len(spatial)), torch.randn(3, 1, *spatial)
        expected = residual_maps(image, small, batch_size=2)
        assert torch.equal(residual_maps(subclass(image), small, batch_size=2).as_subclass(Tensor), expected)

    def test_given_maps(self, subclass, spatial):
        model = network(len(spatial))
        image, given = torch.randn(1, 1, *spatial), torch.rand(1, 2, *spatial)
        with torch.no_grad():
            assert torch.equal(model(image, subclass(given)).as_subclass(Tensor), model(image, given))

    def test_sliding_window(self, spatial):
        model = network(len(spatial), mae=autoencoder(len(spatial)))
        image = torch.randn(1, 1, *spatial)
        windows = [[8] * len(spatial), 2, model]
        with torch.no_grad():
            expected = sliding_window_inference(image, *windows, overlap=0.25)
            found = sliding_window_inference(MetaTensor(image, meta={"name": "case"}), *windows, overlap=0.25)
        assert found.meta["name"] == "case"
        assert torch.equal(found.as_tensor(), expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("spatial", SIZES)
class TestEmptyBatches:
    @pytest.mark.parametrize("with_mae", [True, False])
    @pytest.mark.parametrize("gradients", [True, False])
    def test_network(self, spatial, with_mae, gradients):
        model = network(len(spatial), mae=autoencoder(len(spatial)) if with_mae else None)
        given = None if with_mae else torch.zeros(0, 2, *spatial)
        with torch.set_grad_enabled(gradients):
            logits, maps = model(torch.zeros(0, 1, *spatial), given, return_maps=True)
        assert logits.shape == (0, 2, *spatial)
        assert maps.residual_maps.shape == (0, 2, *spatial)
        for level in (0, 1):
            assert maps.gcu_residuals[level].shape == (0, 1, *[math.ceil(size / 2**level) for size in spatial])
            assert maps.patch_scores[level].shape == (0, 1, *[math.ceil(size / 2 ** (level + 1)) for size in spatial])

    def test_training(self, spatial):
        """The gradient of nothing is 0, for each parameter."""
        model = network(len(spatial), mae=autoencoder(len(spatial))).train()
        logits, maps = model(torch.zeros(0, 1, *spatial), return_maps=True)
        (logits.sum() + sum(score.sum() for score in maps.patch_scores.values())).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name

    def test_residual_maps(self, spatial):
        calls = []
        empty = torch.zeros(0, 1, *spatial)
        maps = residual_maps(empty, autoencoder(len(spatial)), progress=lambda *done: calls.append(done))
        assert maps.shape == (0, 2, *spatial)
        assert calls == [(0, 0)]

    def test_autoencoder(self, spatial):
        small, spatial = autoencoder(len(spatial)), [8] * len(spatial)
        assert small(torch.zeros(0, 1, *spatial), torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 1, *spatial)


ARRAY = np.zeros((1, 1, 8, 8), np.float32)


class TestRefused:
    @pytest.fixture(params=["network", "residual_maps", "autoencoder"])
    def call(self, request):
        small = autoencoder()
        visible = torch.tensor([[0, 1]])
        return {
            "network": network(mae=small),
            "residual_maps": lambda image: residual_maps(image, small),
            "autoencoder": lambda image: small(image, visible),
        }[request.param]

    @pytest.mark.parametrize(
        ("image", "kind"),
        [
            (ARRAY, r"numpy\.ndarray"),
            (ARRAY.tolist(), "list"),
            (Image.new("F", (8, 8)), r"PIL\.Image\.Image"),
            (None, "NoneType"),
            ("scan.nii.gz", "str"),
            (2.0, "float"),
        ],
    )
    def test_no_tensor(self, call, image, kind):
        with pytest.raises(TypeError, match=rf"^image: expected a floating-point torch\.Tensor \(B,.*got {kind}; conv"):
            call(image)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool, torch.complex64])
    def test_no_floating_point(self, call, dtype):
        with pytest.raises(TypeError, match=rf"^image: expected a floating-point tensor .* got {dtype}; convert with"):
            call(torch.zeros(1, 1, 8, 8, dtype=dtype))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_dtype(self, call, dtype):
        message = rf"^image: expected torch\.float32 \(that of the .*got {dtype}; convert with \.to\(torch\.float32\)$"
        with pytest.raises(TypeError, match=message):
            call(torch.zeros(1, 1, 8, 8, dtype=dtype))

    def test_device(self, call):
        with pytest.raises(ValueError, match=r"^image: expected device cpu \(that of the .*got meta; move it with"):
            call(torch.zeros(1, 1, 8, 8, device="meta"))

    @pytest.mark.parametrize(
        ("maps", "error", "message"),
        [
            (np.zeros((1, 2, 8, 8)), TypeError, r"^residual_maps: expected a floating-point torch\.Tensor .*ndarray"),
            (torch.zeros(1, 2, 8, 8, dtype=torch.int16), TypeError, r"^residual_maps: .*got torch\.int16"),
            (torch.zeros(1, 2, 8, 8, device="meta"), ValueError, r"^residual_maps: expected device cpu .*got meta"),
        ],
    )
    def test_residual_maps(self, maps, error, message):
        with pytest.raises(error, match=message):
            network()(torch.zeros(1, 1, 8, 8), maps)

    def test_float32_beside_float64_weights(self):
        with pytest.raises(TypeError, match=r"^image: expected torch\.float64 .*convert with \.to\(torch\.float64\)$"):
            network().double()(torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 8, 8))

    @pytest.mark.parametrize(
        "volume", [ARRAY[0], ARRAY[0].tolist(), torch.zeros(8, 8, 8, dtype=torch.int16)], ids=["array", "list", "int16"]
    )
    def test_volumes(self, volume):
        for dims in (2, 3):
            with pytest.raises(TypeError, match=r"^volume: expected a floating-point .*\(X,Y,Z\), got "):
                residuals.volume_residual_maps(volume, autoencoder(dims))

    def test_axes_of_volumes(self):
        with pytest.raises(ValueError, match=r"^volume: expected \(X,Y,Z\), got 2 axes \(8, 8\)$"):
            residuals.volume_residual_maps(torch.zeros(8, 8), autoencoder())

    @pytest.mark.parametrize(("name", "row"), [("visible", 0), ("wanted", 1)])
    @pytest.mark.parametrize("index", [np.array([[0, 1]]), [[0, 1]], torch.tensor([[0.0, 1.0]])])
    def test_indices(self, name, row, index):
        indices = [torch.tensor([[0, 1]])] * 2
        indices[row] = index
        with pytest.raises(TypeError, match=rf"^{name}: expected an int64 torch\.Tensor"):
            autoencoder()(torch.zeros(1, 1, 8, 8), *indices)

    @pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
    def test_threshold_set_later(self, value):
        model = network(importance_threshold=0.25)
        with pytest.raises(ValueError, match=r"^importance_threshold: expected a number in \[0, 1\], got "):
            model.importance_threshold = value
        assert model.importance_threshold == 0.25
        model.importance_threshold = 0.5
        assert model.config["importance_threshold"] == model.importance_threshold == 0.5


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_autocast_takes_half_precision(self, dtype):
        model = network(mae=autoencoder())
        image = torch.randn(1, 1, 9, 14)
        with torch.no_grad():
            expected = model(image)
            with torch.autocast("cpu", torch.bfloat16):
                found = model(image.to(dtype))
        assert (found - expected).square().mean() < 0.02 * expected.square().mean()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_maps_of_any_dtype(self, dtype):
        model, image = network(), torch.randn(1, 1, 8, 8)
        given = torch.rand(1, 2, 8, 8).bfloat16()
        assert torch.equal(model(image, given.to(dtype)), model(image, given.float()))

    def test_half(self):
        model = network(mae=autoencoder())
        image = torch.randn(1, 1, 9, 14)
        with torch.no_grad():
            expected = model(image)
            found = model.half()(image.half())
        assert found.dtype == torch.float16
        assert (found - expected).square().mean() < 1e-3 * expected.square().mean()

    def test_nan_spoils_its_own_image_alone(self):
        model = network(mae=autoencoder())
        image = torch.randn(2, 1, 8, 8)
        expected = model(image)
        image[1, 0, 3, 5] = math.nan
        found = model(image)
        assert found[1].isnan().all()
        assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize(("spatial", "layout"), [(SIZES[0], torch.channels_last), (SIZES[1], torch.channels_last_3d)])
def test_channels_last(backend, spatial, layout):
    model = network(len(spatial), mae=autoencoder(len(spatial)))
    image = torch.randn(2, 1, *spatial)
    with torch.no_grad():
        expected = model(image)
        found = model.to(memory_format=layout)(image.to(memory_format=layout))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=["float64", "meta"])
def other_default(request):
    """A dtype and a device that nobody asked for: enters them when called."""

    def enter() -> None:
        if request.param == "float64":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")

    yield enter
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


class TestDefaults:
    """PyTorch's default dtype and device change nothing for networks that exist, and for bundles."""

    @pytest.mark.parametrize("spatial", [(9, 16), (5, 9, 8)])
    def test_networks(self, backend, spatial, other_default, monkeypatch):
        model = network(len(spatial), mae=autoencoder(len(spatial)))
        image = torch.randn(3, 1, *spatial)

        def results() -> list[Tensor]:
            # As on a first call.
            monkeypatch.setattr(residuals, "_masks", constant_tensors(residuals._masks.__wrapped__))
            monkeypatch.setattr(transformer, "_positions", constant_tensors(transformer._positions.__wrapped__))
            with torch.no_grad():
                maps = residual_maps(image, model.mae, rounds=2, batch_size=2)
                return [maps, model(image), model(image, maps)]

        expected = results()
        other_default()
        for found, one in zip(results(), expected, strict=True):
            assert found.dtype == torch.float32
            assert torch.equal(found, one)

    @pytest.mark.parametrize(("dims", "roi_size"), [(2, None), (3, None), (3, (8, 8, 8))])
    def test_volumes(self, dims, roi_size, other_default):
        model = network(dims, out_channels=1, rcu_levels=())
        volume = torch.randn(9, 10, 7)
        foreground = torch.zeros(9, 10, 7, dtype=torch.bool)
        foreground[2:5, 3:6, 1:3] = True

        def probabilities() -> list[Tensor]:
            found = []
            for one in (foreground, torch.zeros_like(foreground), None):
                work = segment_views(volume, one, None, model, roi_size, tta_flip=True, tta_scales=(1.0, 1.25))
                found += [one.probability for one in together(Stream(segmentation_stage(model, 16, roi_size)), [work])]
            return found

        expected = probabilities()
        other_default()
        for found, one in zip(probabilities(), expected, strict=True):
            assert found.dtype == torch.float32
            assert torch.equal(found, one)

    def test_bundles(self, other_default):
        expected = load_bundle("demo")
        other_default()
        found = load_bundle("demo")
        for kind in ("network", "mae"):
            states = [getattr(one, kind).state_dict() for one in (found, expected)]
            assert states[0].keys() == states[1].keys()
            for name, tensor in states[0].items():
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, states[1][name])

    def test_half_precision(self, other_default):
        model = network(rcu_levels=()).optimized_for_inference(torch.bfloat16, fused=False)
        image = torch.randn(1, 1, 9, 14)
        with torch.no_grad():
            expected = model(image)
            other_default()
            assert torch.equal(model.optimized_for_inference(torch.bfloat16, fused=False)(image), expected)


class TestConstants:
    def test_may_be_saved_by_a_backward(self):
        """Made first in inference mode, they serve a training step later."""
        image, small = torch.randn(1, 1, 20, 36), autoencoder()
        with torch.inference_mode():
            residual_maps(image, small)
        visible = residuals._masks(45, (0.5,), 1, 0, False, device=image.device)[0][:1]
        small.loss(image, visible).backward()
        assert small.embed.weight.grad.isfinite().all()

    def test_fake_tensors_stay_fake(self):
        model = network(mae=autoencoder())
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            logits = model(mode.from_tensor(torch.randn(2, 1, 9, 14)))
        assert type(logits) is FakeTensor
        assert logits.shape == (2, 2, 9, 14)

    def test_global_generator_is_left_alone(self):
        image, small = torch.randn(1, 1, 8, 52), autoencoder()
        state = torch.get_rng_state()
        residual_maps(image, small)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("given", ["demo", 3, torch.nn.Linear(2, 2)])
def test_what_is_no_autoencoder(given):
    """A bundle's name, above all."""
    said = r"^mae: expected a MaskedAutoencoder, got .*; MaskedAutoencoder\.from_pretrained\('demo'\) is the packaged"
    with pytest.raises(ArgumentTypeError, match=said):
        GRCSF(2, 1, 1, mae=given)
    with pytest.raises(ArgumentTypeError, match=said):
        residual_maps(torch.zeros(1, 1, 16, 16), given)


def test_a_compiled_autoencoder_is_one():
    mae = torch.compile(autoencoder(2), backend="eager")
    assert residual_maps(torch.zeros(1, 1, 16, 16), mae).shape == (1, 2, 16, 16)


@torch.no_grad()
def test_stages_may_be_compiled_one_by_one():
    model, image, maps = network(), torch.randn(1, 1, 9, 14), torch.rand(1, 2, 9, 14)
    expected = model(image, maps)
    for stages in (model.encoder, model.decoder):
        for number, stage in enumerate(stages):
            stages[number] = torch.compile(stage, backend="eager")
    torch.testing.assert_close(model(image, maps), expected, atol=1e-5, rtol=1e-5)
