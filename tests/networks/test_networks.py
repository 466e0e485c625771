"""The GRCSF network: shapes of any size, residual maps given or its own, errors, padding and gradients."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from awake import awake
from cancelled import cancelled
from monai.inferers import sliding_window_inference
from torch.autograd import gradcheck

from grcsf_fast import GRCSF, MaskedAutoencoder, residual_maps, use_backend
from grcsf_fast.errors import GrcsfError
from grcsf_fast.networks.unet import crop_to, pad_to_multiple

SMALL = {"in_channels": 1, "out_channels": 2, "features": (4, 6, 8), "residual_channels": 3, "rcu_levels": (0, 1)}
SIZES_2D = [(1, 1), (7, 13), (17, 5), (1, 31), (16, 16)]
SIZES_3D = [(1, 1, 1), (5, 7, 3), (11, 2, 13), (8, 8, 8)]


def network(spatial_dims: int = 2, **settings: object) -> GRCSF:
    return awake(GRCSF(**({"spatial_dims": spatial_dims, "patch_size": 2} | SMALL | settings))).eval()


def autoencoder(spatial_dims: int = 2, in_channels: int = 1, patch_size: int = 4) -> MaskedAutoencoder:
    return MaskedAutoencoder(
        spatial_dims,
        in_channels,
        patch_size,
        embed_dim=12,
        depth=1,
        num_heads=2,
        decoder_dim=12,
        decoder_depth=1,
        decoder_num_heads=2,
    )


def image_and_maps(spatial: tuple[int, ...], batch: int = 2, channels: int = 1, maps: int = 2, dtype=torch.float32):
    return torch.randn(batch, channels, *spatial, dtype=dtype), torch.rand(batch, maps, *spatial, dtype=dtype)


class TestShapes:
    @pytest.mark.parametrize("maps", [1, 2, 3])
    @pytest.mark.parametrize("spatial", SIZES_2D + SIZES_3D)
    def test_logits(self, spatial, maps):
        model = network(len(spatial), mask_ratios=(0.5, 0.75, 0.9)[:maps])
        logits = model(*image_and_maps(spatial, maps=maps))
        assert logits.shape == (2, 2, *spatial)
        assert logits.isfinite().all()

    @pytest.mark.parametrize("spatial", [(7, 13), (3, 5, 7)])
    @pytest.mark.parametrize(("in_channels", "out_channels"), [(3, 1), (2, 5)])
    def test_channels(self, spatial, in_channels, out_channels):
        model = network(len(spatial), in_channels=in_channels, out_channels=out_channels)
        assert model(*image_and_maps(spatial, channels=in_channels)).shape == (2, out_channels, *spatial)

    @pytest.mark.parametrize("spatial", SIZES_2D + SIZES_3D)
    def test_maps(self, spatial):
        image, given = image_and_maps(spatial)
        logits, maps = network(len(spatial))(image, given, return_maps=True)
        assert logits.shape == (2, 2, *spatial)
        assert sorted(maps.gcu_residuals) == sorted(maps.patch_scores) == [0, 1]
        for level in (0, 1):
            pixel, patch = 2**level, 2 * 2**level
            assert maps.gcu_residuals[level].shape == (2, 1, *[math.ceil(size / pixel) for size in spatial])
            assert maps.patch_scores[level].shape == (2, 1, *[math.ceil(size / patch) for size in spatial])
            assert ((maps.gcu_residuals[level] > -1e-5) & (maps.gcu_residuals[level] < 2 + 1e-5)).all()
            assert ((maps.patch_scores[level] >= 0) & (maps.patch_scores[level] <= 1)).all()
        assert maps.residual_maps is given

    def test_maps_of_a_network_without_units(self):
        image, _ = image_and_maps((7, 13))
        logits, maps = network(rcu_levels=(), gcu=False)(image, return_maps=True)
        assert logits.shape == (2, 2, 7, 13)
        assert (maps.gcu_residuals, maps.patch_scores, maps.residual_maps) == ({}, {}, None)

    @pytest.mark.parametrize("downsample", ["conv", "avg", "max"])
    @pytest.mark.parametrize("spatial", [(9, 6), (3, 5, 6)])
    def test_downsamplings(self, spatial, downsample):
        model = network(len(spatial), downsample=downsample)
        assert model(*image_and_maps(spatial)).shape == (2, 2, *spatial)

    @pytest.mark.parametrize(("levels", "patch_size"), [((1,), 3), ((0, 1), 1), ((1, 0), 5)])
    def test_patch_sizes_and_levels(self, levels, patch_size):
        model = network(rcu_levels=levels, patch_size=patch_size)
        logits, maps = model(*image_and_maps((11, 8)), return_maps=True)
        assert logits.shape == (2, 2, 11, 8)
        for level in levels:
            edge = patch_size * 2**level
            assert maps.patch_scores[level].shape == (2, 1, math.ceil(11 / edge), math.ceil(8 / edge))

    @pytest.mark.parametrize(("features", "levels"), [((4, 6), [0]), ((4, 6, 8), [0, 1]), ((4, 4, 4, 4, 4), [0, 1, 2])])
    def test_default_levels(self, features, levels):
        assert GRCSF(2, 1, 1, features).config["rcu_levels"] == levels

    def test_numbers_of_numpy(self):
        """As they come of labels and headers; a network with them can be stored."""
        numbers = np.array([1, 2])
        model = network(
            in_channels=numbers[0], out_channels=numbers[1], features=np.array([4, 6]), patch_size=numbers[1],
            rcu_levels=np.array([0]), mask_ratios=np.array([0.5], np.float32), importance_threshold=np.float32(0.25),
            num_heads=numbers[0], residual_channels=numbers[1], neighbours=numbers[0],
        )  # fmt: skip
        model.importance_threshold = np.float32(0.5)
        assert GRCSF(**json.loads(json.dumps(model.config))).config == model.config
        assert model.config["importance_threshold"] == 0.5

    def test_default_patch_sizes(self):
        assert network(2, patch_size=None).config["patch_size"] == 8
        assert network(3, patch_size=None).config["patch_size"] == 4


class TestResidualMaps:
    @pytest.mark.parametrize("spatial", [(7, 13), (3, 5, 7)])
    def test_blank_ones_of_a_network_that_was_not_trained_with_any(self, spatial):
        model, (image, _) = network(len(spatial)), image_and_maps(spatial)
        blank = torch.zeros(2, 2, *spatial)
        logits, maps = model(image, return_maps=True)
        assert torch.equal(maps.residual_maps, blank)
        assert torch.equal(logits, model(image, blank))
        assert not model.requires_maps

    @pytest.mark.parametrize("spatial_dims", [2, 3])
    def test_the_default_network_runs(self, spatial_dims):
        assert GRCSF(spatial_dims, 1, 1)(torch.zeros(1, 1, *[16] * spatial_dims)).shape == (1, 1, *[16] * spatial_dims)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_training_with_maps_makes_them_required(self, compiled):
        """A network that learnt to read the maps must not segment without them unnoticed."""
        model, (image, given) = network(), image_and_maps((8, 8))
        model(image, given)  # evaluation is no training
        run = torch.compile(model.train(), backend="eager", fullgraph=True) if compiled else model.train()
        run(image)
        assert not model.requires_maps
        run(image, given)
        assert model.requires_maps
        with pytest.raises(ValueError, match=r"^residual_maps: this network was trained with them"):
            model.eval()(image)
        with pytest.raises(ValueError, match=r"^residual_maps: "):
            GRCSF(**model.config)(image)

    def test_training_with_the_own_autoencoder_makes_them_required(self):
        model = network(mae=autoencoder()).train()
        model(torch.zeros(1, 1, 8, 8))
        assert model.requires_maps
        model.mae = None
        with pytest.raises(ValueError, match=r"^residual_maps: "):
            model(torch.zeros(1, 1, 8, 8))

    def test_required_but_neither_given_nor_computable(self):
        with pytest.raises(ValueError, match=r"^residual_maps: .*residual_maps=grcsf_fast\.residual_maps\("):
            network(requires_maps=True)(torch.zeros(1, 1, 8, 8))

    @pytest.mark.parametrize("spatial", [(13, 16), (9, 6, 11)])
    def test_own_autoencoder(self, spatial):
        dims = len(spatial)
        model = network(dims, mae=autoencoder(dims))
        image, given = image_and_maps(spatial)
        expected = residual_maps(image, model.mae, model.mask_ratios)
        logits, maps = model(image, return_maps=True)
        assert torch.equal(maps.residual_maps, expected)
        assert torch.equal(logits, model(image, expected))
        assert not torch.equal(logits, model(image, given))

    def test_given_maps_go_before_the_own_autoencoder(self):
        model = network(mae=autoencoder())
        image, given = image_and_maps((8, 8))
        assert model(image, given, return_maps=True)[1].residual_maps is given

    def test_own_autoencoder_is_frozen(self):
        model = network(mae=autoencoder()).train()
        before = {name: tensor.clone() for name, tensor in model.mae.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(torch.randn(2, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        assert all(parameter.grad is None for parameter in model.mae.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.mae.state_dict().items())
        assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("mae."))

    def test_own_autoencoder_stays_frozen(self):
        """When the network is frozen and thawed, as trainings do that begin with some of the layers."""
        model = network(mae=autoencoder())
        assert model.requires_grad_(False) is model
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.requires_grad_(True)
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert wanted == {name for name, _ in model.named_parameters() if not name.startswith("mae.")}
        assert all(
            parameter.requires_grad for parameter in network().requires_grad_(False).requires_grad_().parameters()
        )

    def test_image_too_small_for_the_own_autoencoder(self):
        with pytest.raises(ValueError, match=r"^image: expected at least 4 patches of edge 4"):
            network(mae=autoencoder())(torch.zeros(1, 1, 1, 1))

    def test_without_rcu_none_are_needed(self):
        model = network(rcu_levels=())
        image, given = image_and_maps((7, 6))
        assert torch.equal(model(image), model(image, given))


class TestErrors:
    def test_all_are_errors_of_ours(self):
        """So that a program can tell bad input from a bug."""
        with pytest.raises(GrcsfError):
            network(features=())
        with pytest.raises(GrcsfError) as caught:
            network()([1, 2])
        assert isinstance(caught.value, TypeError)

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("spatial_dims", {"spatial_dims": 1}),
            ("spatial_dims", {"spatial_dims": 4}),
            ("features", {"features": (8,), "rcu_levels": ()}),
            ("features", {"features": (), "rcu_levels": ()}),
            ("rcu_levels", {"rcu_levels": (2,)}),
            ("rcu_levels", {"rcu_levels": (-1,)}),
            ("rcu_levels", {"rcu_levels": (0, 0)}),
            ("mask_ratios", {"mask_ratios": ()}),
            ("importance_threshold", {"importance_threshold": -0.1}),
            ("importance_threshold", {"importance_threshold": 1.1}),
            ("importance_threshold", {"importance_threshold": math.nan}),
            ("patch_size", {"patch_size": 0}),
            ("patch_size", {"patch_size": -4}),
            ("downsample", {"downsample": "stride"}),
        ],
    )
    def test_constructor(self, name, settings):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
            network(**settings)

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("in_channels", {"in_channels": 0}),
            ("out_channels", {"out_channels": 0}),
            ("features", {"features": (4, 0, 8)}),
            ("residual_channels", {"residual_channels": 0}),
            ("num_heads", {"num_heads": 0}),
            ("mask_ratios", {"mask_ratios": (0.5, 1.5)}),
            ("mask_ratios", {"mask_ratios": (0.0,)}),
        ],
    )
    def test_constructor_numbers_without_meaning(self, name, settings):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
            network(**settings)

    @pytest.mark.parametrize("mae", [{"spatial_dims": 3}, {"in_channels": 2}])
    def test_autoencoder_of_other_images(self, mae):
        with pytest.raises(ValueError, match=r"^mae: expected spatial_dims 2 and in_channels 1, got "):
            network(mae=autoencoder(**mae))

    @pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 1, 8), (1, 1, 8, 8, 8), (1, 8, 8)])
    def test_image(self, shape):
        with pytest.raises(ValueError, match=r"^image: expected \(B,1\) and 2 spatial axes, got ") as error:
            network()(torch.zeros(shape), torch.zeros(1, 2, 8, 8))
        assert str(shape) in str(error.value)

    @pytest.mark.parametrize("shape", [(2, 1, 8, 9), (1, 2, 8, 9), (2, 2, 9, 8), (2, 2, 8)])
    def test_shape_of_residual_maps(self, shape):
        with pytest.raises(
            ValueError, match=r"^residual_maps: expected shape \(B,M,\*S\) = \(2, 2, 8, 9\), got "
        ) as error:
            network()(torch.zeros(2, 1, 8, 9), torch.zeros(shape))
        assert str(shape) in str(error.value)


class TestState:
    @pytest.mark.parametrize("spatial_dims", [2, 3])
    def test_round_trip(self, spatial_dims):
        first = network(spatial_dims, mae=autoencoder(spatial_dims))
        second = network(spatial_dims, mae=autoencoder(spatial_dims))
        image = torch.randn(1, 1, *[9] * spatial_dims)
        expected = first(image)
        assert not torch.equal(second(image), expected)
        second.load_state_dict(first.state_dict())
        assert torch.equal(second(image), expected)

    def test_config_rebuilds_the_network(self):
        model = network(importance_threshold=0.3, downsample="max", num_heads=3, gcu=False)
        rebuilt = GRCSF(**model.config).eval()
        rebuilt.load_state_dict(model.state_dict())
        image, given = image_and_maps((9, 6))
        assert torch.equal(rebuilt(image, given), model(image, given))
        assert rebuilt.config == model.config

    def test_backend_does_not_name_the_parameters(self):
        names = list(network().state_dict())
        with use_backend("reference"):
            assert list(network().state_dict()) == names

    @pytest.mark.parametrize("spatial", [(9, 14), (5, 9, 6)])
    def test_same_image_same_logits(self, spatial):
        model = network(len(spatial), mae=autoencoder(len(spatial)))
        image, _ = image_and_maps(spatial)
        assert torch.equal(model(image), model(image))

    def test_images_of_a_batch_are_independent(self):
        model = network(mae=autoencoder())
        image, _ = image_and_maps((9, 14), batch=3)
        together = model(image)
        for index in range(3):
            torch.testing.assert_close(together[index], model(image[index : index + 1])[0], atol=1e-5, rtol=1e-5)

    def test_threshold_is_for_evaluation(self):
        """With every patch skipped, the attention's parameters have no effect; in training they have."""
        model = network(importance_threshold=1.0)
        image, given = image_and_maps((8, 8))
        for training, same in ((False, True), (True, False)):
            model.train(training)
            before = model(image, given)
            with torch.no_grad():
                for unit in model.rcu.values():
                    unit.output_bias += 1.0
            assert torch.equal(model(image, given), before) == same


@pytest.mark.parametrize("spatial", [(13, 18), (9, 5, 10)])
def test_sliding_window(spatial):
    """A drop-in for MONAI's inferer, windows with and without overlap."""
    model = network(len(spatial), mae=autoencoder(len(spatial)))
    image = torch.randn(1, 1, *spatial)
    with torch.no_grad():
        logits = sliding_window_inference(image, [8] * len(spatial), 3, model, overlap=0.25)
        window = sliding_window_inference(image[..., :8], [*spatial[:-1], 8], 1, model)
        expected = model(image[..., :8])
    assert logits.shape == (1, 2, *spatial)
    assert logits.isfinite().all()
    torch.testing.assert_close(window, expected, atol=1e-5, rtol=1e-5)


class TestPadding:
    @pytest.mark.parametrize("spatial", [(13, 18), (1, 1), (5, 9, 6)])
    def test_equals_an_exactly_sized_image(self, spatial):
        model = network(len(spatial))
        image, given = image_and_maps(spatial)
        target = [max(math.ceil(size / model.multiple) * model.multiple, model.minimum) for size in spatial]
        padding = [side for size, wanted in zip(spatial, target, strict=True) for side in (wanted - size, 0)][::-1]
        exact_image, exact_given = (F.pad(tensor, padding, mode="replicate") for tensor in (image, given))
        assert exact_image.shape[2:] == tuple(target)
        exact = model(exact_image, exact_given)
        assert exact.shape[2:] == tuple(target)
        assert torch.equal(model(image, given), exact[(..., *[slice(size) for size in spatial])])

    def test_multiple_serves_stages_and_patches(self):
        assert network(features=(4, 6, 8), rcu_levels=(0, 1), patch_size=3).multiple == 12
        assert network(features=(4, 6, 8), rcu_levels=(), patch_size=3).multiple == 4
        assert network(features=(4, 6, 8), rcu_levels=(1,), patch_size=5).multiple == 20

    @pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 2, 3, 1, 7)])
    def test_pads_with_edges_and_crops_back(self, shape):
        tensor = torch.randn(shape)
        padded = pad_to_multiple(tensor, 4, minimum=8)
        assert padded.shape == (*shape[:2], *[8] * (len(shape) - 2))
        edge = [torch.arange(8).clamp_max(size - 1) for size in shape[2:]]
        expected = tensor
        for axis, index in enumerate(edge, start=2):
            expected = expected.index_select(axis, index)
        assert torch.equal(padded, expected)
        assert torch.equal(crop_to(padded, shape[2:]), tensor)

    def test_exact_size_is_not_copied(self):
        tensor = torch.randn(1, 1, 8, 4)
        assert pad_to_multiple(tensor, 4) is tensor


class TestGradients:
    @pytest.fixture
    def tiny(self):
        model = network(
            features=(2, 3), rcu_levels=(0,), out_channels=1, residual_channels=2, num_heads=1, mask_ratios=(0.5,)
        )
        with use_backend("reference"):
            yield model.double()

    def test_of_the_inputs(self, tiny):
        image, given = image_and_maps((3, 4), batch=1, maps=1, dtype=torch.float64)
        assert gradcheck(tiny, (image.requires_grad_(), given.requires_grad_()))

    def test_of_parameters(self, tiny):
        image, given = image_and_maps((3, 4), batch=1, maps=1, dtype=torch.float64)
        names = [
            "encoder.0.0.weight",
            "up.0.weight",
            "gcu.0.feature_gate.excite.0.weight",
            "rcu.0.query_weight",
            "rcu.0.position_bias",
            "rcu.0.score_vector",
            "rcu.0.stem.3.weight",
        ]
        parameters = dict(tiny.named_parameters())

        def forward(*tensors: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(tiny, dict(zip(names, tensors, strict=True)), (image, given))

        assert gradcheck(forward, tuple(parameters[name].detach().clone().requires_grad_() for name in names))

    @pytest.mark.parametrize("spatial", [(8, 8), (4, 8, 4)])
    def test_reach_every_parameter(self, spatial):
        model = network(len(spatial)).train()
        for unit in model.gcu:
            for gate in (unit.feature_gate, unit.coarse_gate):
                torch.nn.init.ones_(gate.excite[0].bias)  # so that its ReLU lets something pass
        logits, maps = model(*image_and_maps(spatial), return_maps=True)
        loss = logits.square().sum() + sum(score.sum() for score in maps.patch_scores.values())
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or cancelled(name), name


def test_squeeze_of_coarse_features_is_that_of_the_upsampled():
    """For an exact factor of 2 linear up-sampling and averaging keep the mean: one squeeze serves both gates."""
    features = torch.randn(2, 6, 10, 6, dtype=torch.float64)
    coarse = F.avg_pool2d(features, 2)
    upsampled = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    for same in (upsampled, features):
        torch.testing.assert_close(coarse.mean((2, 3)), same.mean((2, 3)))
