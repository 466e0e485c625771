"""The masked autoencoder, its masks, and the residual maps made of both."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from grcsf_fast import MaskedAutoencoder, residual_maps
from grcsf_fast.networks.mae import sincos_positions
from grcsf_fast.networks.residual_maps import complementary_masks, volume_residual_maps

CASES = [(2, 1, (8, 12)), (2, 3, (12, 4)), (3, 1, (4, 8, 8)), (3, 2, (8, 8, 4))]


def autoencoder(spatial_dims: int = 2, in_channels: int = 1, **settings: object) -> MaskedAutoencoder:
    small = {
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "decoder_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    }
    return MaskedAutoencoder(spatial_dims, in_channels, **(small | settings))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden_pixels(mae: MaskedAutoencoder, visible: torch.Tensor, spatial: tuple[int, ...]) -> torch.Tensor:
    """(B, V) indices -> (B, *S) bool, patch by patch."""
    counts = [size // mae.patch_size for size in spatial]
    hidden = torch.ones(visible.shape[0], *spatial, dtype=torch.bool)
    for image, indices in enumerate(visible.tolist()):
        for index in indices:
            place = np.unravel_index(index, counts)
            box = tuple(slice(n * mae.patch_size, (n + 1) * mae.patch_size) for n in place)
            hidden[(image, *box)] = False
    return hidden


class TestReconstruction:
    @pytest.mark.parametrize(("dims", "channels", "spatial"), CASES)
    def test_shape(self, dims, channels, spatial):
        mae = autoencoder(dims, channels)
        reconstruction = mae(torch.randn(3, channels, *spatial), torch.tensor([[0, 1], [2, 0], [1, 0]]))
        assert reconstruction.shape == (3, channels, *spatial)
        assert reconstruction.isfinite().all()

    @pytest.mark.parametrize(("dims", "channels", "spatial"), CASES)
    def test_patches_and_back(self, dims, channels, spatial):
        mae = autoencoder(dims, channels)
        image = torch.randn(2, channels, *spatial)
        patches = mae.patchify(image)
        assert patches.shape == (2, math.prod(mae.grid(spatial)), channels * 4**dims)
        for index, place in enumerate(np.ndindex(*mae.grid(spatial))):
            box = tuple(slice(n * 4, (n + 1) * 4) for n in place)
            assert torch.equal(patches[:, index], image[(slice(None), slice(None), *box)].flatten(1))
        assert torch.equal(mae.unpatchify(patches, spatial), image)

    @pytest.mark.parametrize(("dims", "channels", "spatial"), CASES)
    def test_hidden_pixels_are_not_seen(self, dims, channels, spatial):
        mae = autoencoder(dims, channels)
        image = torch.randn(2, channels, *spatial)
        visible = torch.tensor([[0, 2], [1, 2]])
        hidden = hidden_pixels(mae, visible, spatial)[:, None].expand_as(image)
        reconstruction = mae(image, visible)
        assert torch.equal(mae(torch.where(hidden, torch.randn_like(image), image), visible), reconstruction)
        assert not torch.equal(mae(torch.where(hidden, image, torch.randn_like(image)), visible), reconstruction)

    def test_order_of_the_visible_patches_does_not_matter(self):
        mae = autoencoder()
        image = torch.randn(1, 1, 8, 12)
        torch.testing.assert_close(mae(image, torch.tensor([[4, 0, 3]])), mae(image, torch.tensor([[0, 3, 4]])))

    def test_images_of_a_batch_are_independent(self):
        mae = autoencoder()
        image = torch.randn(2, 1, 8, 12)
        visible = torch.tensor([[0, 5], [3, 1]])
        together = mae(image, visible)
        for index in range(2):
            alone = mae(image[index : index + 1], visible[index : index + 1])
            torch.testing.assert_close(together[index], alone[0])

    def test_positions_are_distinct_and_centred(self):
        positions = sincos_positions((3, 5), 16)
        assert positions.shape == (15, 16)
        assert torch.cdist(positions, positions).add(torch.eye(15)).min() > 0.1
        torch.testing.assert_close(sincos_positions((5, 7), 16).reshape(5, 7, 16)[1:4, 1:6].flatten(0, 1), positions)

    def test_config_rebuilds_the_network(self):
        mae = autoencoder(3, 2, mlp_ratio=2.0, norm_target=True)
        rebuilt = MaskedAutoencoder(**mae.config)
        rebuilt.load_state_dict(mae.state_dict())
        image, visible = torch.randn(1, 2, 4, 8, 8), torch.tensor([[0, 3]])
        assert torch.equal(rebuilt(image, visible), mae(image, visible))


class TestLoss:
    @pytest.mark.parametrize(("dims", "channels", "spatial"), CASES)
    def test_counts_hidden_patches_only(self, dims, channels, spatial):
        mae = autoencoder(dims, channels)
        image = torch.randn(2, channels, *spatial)
        visible = torch.tensor([[0, 1], [1, 2]])
        hidden = hidden_pixels(mae, visible, spatial)[:, None].expand_as(image)
        expected = (mae(image, visible) - image)[hidden].square().mean()
        torch.testing.assert_close(mae.loss(image, visible), expected)

    def test_normalised_target(self):
        """Each hidden patch less its own mean, over its own deviation."""
        mae = autoencoder(2, 2, norm_target=True)
        image = 5 + 3 * torch.randn(1, 2, 8, 8)
        visible = torch.tensor([[0, 3]])
        prediction = mae.predict_patches(mae.patchify(image), visible, (2, 2))[0].detach().double().numpy()
        patches = mae.patchify(image)[0].double().numpy()
        errors = []
        for index in (1, 2):
            mean, variance = patches[index].mean(), patches[index].var(ddof=1)
            normalised = (patches[index] - mean) / math.sqrt(variance + 1e-6)
            errors.append(((prediction[index] - normalised) ** 2).mean())
        assert mae.loss(image, visible).item() == pytest.approx(np.mean(errors), rel=1e-5)

    def test_normalised_target_is_drawn_in_the_images_own_intensities(self):
        mae = autoencoder(norm_target=True)
        torch.nn.init.zeros_(mae.predict.weight)
        torch.nn.init.zeros_(mae.predict.bias)
        image = 100 + torch.randn(1, 1, 8, 8)
        means = F.avg_pool2d(image, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        torch.testing.assert_close(mae(image, torch.tensor([[0, 1]])), means)

    @pytest.mark.parametrize("settings", [{"patch_size": 4}, {"patch_size": 1}])
    def test_normalised_target_of_flat_patches_is_finite(self, settings):
        """A patch without a deviation, of one pixel even, has a target of zero."""
        mae = autoencoder(norm_target=True, **settings)
        image = torch.full((1, 1, 8, 8), 2.0)
        assert mae.loss(image, torch.tensor([[0, 1]])).isfinite()

    def test_overfits_a_tiny_set(self):
        """Four smooth images under two complementary masks."""
        mae = autoencoder(embed_dim=32, decoder_dim=32, num_heads=4)
        axis = torch.linspace(-1, 1, 16)
        images = torch.stack([(k * axis).sin()[:, None] * (k * axis + axis).cos() for k in range(1, 5)])[:, None]
        images = images.repeat(2, 1, 1, 1)
        visible = complementary_masks(16, 0.5, seeded()).repeat_interleave(4, 0)
        optimizer = torch.optim.Adam(mae.parameters(), lr=3e-3)
        first = mae.loss(images, visible).item()
        for _ in range(200):
            optimizer.zero_grad()
            mae.loss(images, visible).backward()
            optimizer.step()
        assert mae.loss(images, visible).item() < first / 10


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("spatial_dims", {"spatial_dims": 1}),
            ("spatial_dims", {"spatial_dims": 4}),
            ("embed_dim", {"embed_dim": 17}),
            ("embed_dim", {"embed_dim": 2}),
            ("decoder_dim", {"decoder_dim": 15}),
            ("decoder_dim", {"decoder_dim": 2, "decoder_num_heads": 1}),
        ],
    )
    def test_constructor(self, name, settings):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
            autoencoder(**settings)

    @pytest.mark.parametrize("name", ["in_channels", "patch_size", "num_heads", "decoder_num_heads"])
    def test_constructor_numbers_without_meaning(self, name):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*got 0$"):
            autoencoder(**{name: 0})

    @pytest.mark.parametrize("shape", [(1, 1, 8, 9), (1, 1, 7, 8), (1, 1, 8), (1, 1, 4, 4, 4)])
    @pytest.mark.parametrize("method", ["forward", "loss"])
    def test_size(self, method, shape):
        with pytest.raises(ValueError, match=r"^image: expected 2 spatial axes, each a multiple of the patch size 4"):
            getattr(autoencoder(), method)(torch.zeros(shape), torch.tensor([[0]]))

    @pytest.mark.parametrize("method", ["forward", "loss"])
    def test_channels(self, method):
        with pytest.raises(ValueError, match=r"^image: expected 1 channels, got 2$"):
            getattr(autoencoder(), method)(torch.zeros(1, 2, 8, 8), torch.tensor([[0]]))

    @pytest.mark.parametrize("method", ["forward", "loss"])
    def test_visible_patches_of_another_batch(self, method):
        """One row of indices for two images must not leave the second image unseen."""
        with pytest.raises(ValueError, match=r"^visible: "):
            getattr(autoencoder(), method)(torch.randn(2, 1, 8, 8), torch.tensor([[0, 1]]))


class TestComplementaryMasks:
    @pytest.mark.parametrize("count", [10, 12, 13, 31, 40, 63, 97])
    @pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6, 0.75, 0.9])
    def test_every_patch_is_hidden(self, count, ratio):
        masks = complementary_masks(count, ratio, seeded())
        visible = math.floor(count * (1 - Fraction(str(ratio))))
        assert masks.shape[1] == visible
        assert masks.dtype == torch.int64
        assert masks.min() >= 0
        assert masks.max() < count
        times_visible = torch.zeros(count, dtype=torch.int64)
        for row in masks:
            assert row.unique().numel() == visible
            times_visible[row] += 1
        assert (times_visible < len(masks)).all()
        if ratio >= 0.5:
            assert (times_visible <= 1).all()

    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_few_patches(self, count):
        masks = complementary_masks(count, 0.5, seeded())
        assert masks.shape == (count // (count // 2), count // 2)
        assert masks.unique().numel() == masks.numel()

    @pytest.mark.parametrize(("ratio", "passes", "times"), [(0.5, 2, 1), (0.75, 4, 3)])
    @pytest.mark.parametrize("count", [4, 16, 100])
    def test_design_ratios(self, count, ratio, passes, times):
        masks = complementary_masks(count, ratio, seeded())
        assert masks.shape[0] == passes
        hidden = torch.full((count,), passes)
        for row in masks:
            hidden[row] -= 1
        assert (hidden == times).all()

    def test_quarter_divides_the_image_by_hidden_sets(self):
        masks = complementary_masks(16, 0.25, seeded())
        assert masks.shape == (4, 12)
        assert (torch.bincount(masks.flatten(), minlength=16) == 3).all()

    def test_seed(self):
        first = complementary_masks(64, 0.75, seeded(1))
        assert torch.equal(complementary_masks(64, 0.75, seeded(1)), first)
        assert not torch.equal(complementary_masks(64, 0.75, seeded(2)), first)

    @pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, math.nan])
    def test_ratio(self, ratio):
        with pytest.raises(ValueError, match=r"^ratio: expected a number in \(0, 1\), got "):
            complementary_masks(16, ratio, seeded())

    @pytest.mark.parametrize(("count", "ratio"), [(1, 0.5), (3, 0.75), (9, 0.9), (0, 0.5)])
    def test_too_few_patches(self, count, ratio):
        with pytest.raises(ValueError, match=rf"^ratio: {ratio} of {count} patches leaves 0 visible"):
            complementary_masks(count, ratio, seeded())


class Offset(MaskedAutoencoder):
    """Reconstructs hidden patches 1 too high in the first channel and visible ones 1000 too high."""

    def reconstruct_patches(self, patches, visible, wanted, grid):
        hidden = ~(wanted[:, :, None] == visible[:, None]).any(2)
        chosen = patches.gather(1, wanted[..., None].expand(-1, -1, patches.shape[2])).unflatten(
            2, (self.in_channels, -1)
        )
        offset = torch.where(hidden, 1.0, 1000.0)[..., None, None].expand_as(chosen).clone()
        offset[:, :, 1:] = torch.where(hidden, -3.0, 1000.0)[..., None, None]
        return (chosen + offset).flatten(2)


class TestResidualMaps:
    @pytest.mark.parametrize(("dims", "channels", "spatial"), [(2, 1, (13, 10)), (2, 3, (9, 8)), (3, 1, (5, 8, 7))])
    @pytest.mark.parametrize("ratios", [(0.5,), (0.5, 0.75), (0.25, 0.5, 0.75)])
    def test_shape_of_odd_sizes(self, dims, channels, spatial, ratios):
        maps = residual_maps(torch.randn(2, channels, *spatial), autoencoder(dims, channels), ratios)
        assert maps.shape == (2, len(ratios), *spatial)
        assert maps.is_contiguous()
        assert not maps.requires_grad
        assert maps.isfinite().all()
        assert maps.amin() < 0 < maps.amax()
        assert (residual_maps(torch.randn(2, channels, *spatial), autoencoder(dims, channels), signed=False) >= 0).all()

    @pytest.mark.parametrize(("channels", "absolute", "mean"), [(1, 1.0, -1.0), (2, 2.0, 1.0)])
    @pytest.mark.parametrize("rounds", [1, 3])
    def test_counts_hidden_passes_only(self, channels, absolute, mean, rounds):
        mae = Offset(2, channels, 4, 8, 1, 1, 8, 1, 1)
        for signed in (True, False):
            maps = residual_maps(torch.randn(2, channels, 10, 15), mae, (0.25, 0.5, 0.6, 0.75), rounds, signed=signed)
            torch.testing.assert_close(maps, torch.full_like(maps, mean if signed else absolute))

    @pytest.mark.parametrize("signed", [True, False])
    def test_is_the_mean_over_the_passes(self, signed):
        """The definition, from the masks of the same generator."""
        mae = autoencoder(2, 2).eval()
        image = torch.randn(1, 2, 8, 12)
        maps = residual_maps(image, mae, (0.5, 0.75), rounds=2, seed=7, signed=signed)
        generator = seeded(7)
        for index, ratio in enumerate((0.5, 0.75)):
            total, times = torch.zeros(8, 12), torch.zeros(8, 12)
            for visible in [row for _ in range(2) for row in complementary_masks(6, ratio, generator)]:
                hidden = hidden_pixels(mae, visible[None], (8, 12))[0]
                error = image - mae(image, visible[None]).detach()
                total += (error if signed else error.abs()).mean(1)[0] * hidden
                times += hidden
            torch.testing.assert_close(maps[0, index], total / times, atol=1e-5, rtol=1e-5)

    def test_half_precision_beside_a_float32_image(self):
        """The reconstruction is in bfloat16, the image and the difference are not rounded."""
        mae = autoencoder().eval()
        image = 100 + torch.randn(2, 1, 8, 12)
        with torch.no_grad():
            for tensor in (mae.predict.weight, mae.predict.bias):
                tensor.zero_()
        maps = residual_maps(image, mae.bfloat16(), (0.5,))
        torch.testing.assert_close(maps[:, 0], image[:, 0])
        assert residual_maps(image.bfloat16(), mae, (0.5,)).dtype == torch.bfloat16

    def test_odd_sizes_are_padded_with_edges(self):
        mae = autoencoder()
        image = torch.randn(2, 1, 9, 14)
        padded = F.pad(image, (0, 2, 0, 3), mode="replicate")
        assert torch.equal(residual_maps(image, mae), residual_maps(padded, mae)[..., :9, :14])

    def test_seed(self):
        mae = autoencoder()
        image = torch.randn(2, 1, 16, 16)
        maps = residual_maps(image, mae, seed=3)
        torch.rand(5)
        assert torch.equal(residual_maps(image, mae, seed=3), maps)
        assert not torch.equal(residual_maps(image, mae, seed=4), maps)

    def test_global_generator_is_left_alone(self):
        state = torch.get_rng_state()
        mae, image = autoencoder(), torch.zeros(1, 1, 8, 8)
        torch.set_rng_state(state)
        residual_maps(image, mae)
        assert torch.equal(torch.get_rng_state(), state)

    def test_images_of_a_batch_are_independent(self):
        mae = autoencoder()
        image = torch.randn(3, 1, 16, 12)
        maps = residual_maps(image, mae)
        for index in range(3):
            alone = residual_maps(image[index : index + 1], mae)
            torch.testing.assert_close(maps[index], alone[0], atol=1e-5, rtol=1e-5)
        image[1] = math.nan
        spoiled = residual_maps(image, mae)
        assert spoiled[1].isnan().all()
        assert torch.equal(spoiled[::2], maps[::2])

    def test_batch_size(self):
        mae = autoencoder()
        image = torch.randn(17, 1, 13, 12)
        maps = residual_maps(image, mae, batch_size=16)
        torch.testing.assert_close(residual_maps(image, mae, batch_size=1), maps, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(residual_maps(image, mae, batch_size=64), maps, atol=1e-5, rtol=1e-5)

    def test_progress(self):
        calls = []
        residual_maps(torch.zeros(5, 1, 8, 8), autoencoder(), batch_size=2, progress=lambda *done: calls.append(done))
        assert calls == [(2, 5), (4, 5), (5, 5)]

    @pytest.mark.parametrize("training", [True, False])
    def test_training_mode_is_restored(self, training):
        mae = autoencoder().train(training)
        seen = []
        residual_maps(torch.zeros(1, 1, 8, 8), mae, progress=lambda *_: seen.append(mae.training))
        assert seen == [False]
        assert mae.training is training

        def fail(*_: int) -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            residual_maps(torch.zeros(1, 1, 8, 8), mae, progress=fail)
        assert mae.training is training

    @pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 8, 8, 8)])
    def test_axes(self, shape):
        with pytest.raises(ValueError, match=rf"^image: expected \(B,C\) and 2 spatial axes, got {len(shape)} axes"):
            residual_maps(torch.zeros(shape), autoencoder())

    def test_channels(self):
        with pytest.raises(ValueError, match=r"^image: expected 1 channels, got 2$"):
            residual_maps(torch.zeros(1, 2, 8, 8), autoencoder())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"mask_ratios": ()}, r"^mask_ratios: expected at least one"),
            ({"mask_ratios": (0.5, 1.0)}, r"^mask_ratios: expected at least one number in \(0, 1\)"),
            ({"mask_ratios": (0.9,)}, r"^image: expected at least 10 patches of edge 4 for ratio 0\.9, got 4"),
            ({"rounds": 0}, r"^rounds and batch_size: expected 1 or more, got 0 and 64"),
            ({"batch_size": 0}, r"^rounds and batch_size: expected 1 or more, got 1 and 0"),
        ],
    )
    def test_numbers(self, settings, message):
        with pytest.raises(ValueError, match=message):
            residual_maps(torch.zeros(1, 1, 8, 8), autoencoder(), **settings)


class TestVolumes:
    def test_slices_of_a_plane_autoencoder(self):
        """(X, Y, Z): each axial slice gets the maps it would get as an image."""
        mae = autoencoder()
        volume = torch.randn(9, 12, 3)
        maps = volume_residual_maps(volume, mae, (0.5, 0.75), seed=2)
        assert maps.shape == (2, 9, 12, 3)
        for z in range(3):
            alone = residual_maps(volume[None, None, :, :, z], mae, (0.5, 0.75), seed=2)[0]
            torch.testing.assert_close(maps[..., z], alone, atol=1e-5, rtol=1e-5)

    def test_volume_autoencoder(self):
        mae = autoencoder(3)
        volume = torch.randn(9, 5, 8)
        maps = volume_residual_maps(volume, mae)
        assert maps.shape == (2, 9, 5, 8)
        assert torch.equal(maps, residual_maps(volume[None, None], mae)[0])
