"""The masked autoencoder, its masks, and what it sees beside a slice."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reconstruct import hidden_pixels, seeded
from small import autoencoder

from grcsf_fast import GRCSF, MaskedAutoencoder, residual_maps
from grcsf_fast.networks.mae import TOP_SLICES
from grcsf_fast.networks.residual_maps import complementary_masks, volume_residual_maps
from grcsf_fast.networks.transformer import sincos_positions

CASES = [(2, 1, (8, 12)), (2, 3, (12, 4)), (3, 1, (4, 8, 8)), (3, 2, (8, 8, 4))]


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


class TestNeighbours:
    """An autoencoder that sees the slices around the one it draws."""

    def test_stack(self):
        mae = autoencoder(neighbours=2)
        volume = torch.arange(5.0).expand(8, 12, 5)
        stacked = mae.stack(volume, torch.tensor([0, 3]))
        assert stacked.shape == (2, mae.seen_channels, 8, 12) == (2, 6, 8, 12)
        assert stacked[0, :5, 0, 0].tolist() == [0, 0, 1, 0, 2]  # edges are repeated
        assert stacked[1, :5, 0, 0].tolist() == [3, 2, 4, 1, 4]
        assert stacked[:, 5, 0, 0].tolist() == pytest.approx([4 / TOP_SLICES, 1 / TOP_SLICES])

    def test_stack_of_several_channels(self):
        """All channels of a slice together, its own first; what is drawn are those."""
        mae = autoencoder(in_channels=2, neighbours=1).eval()
        volume = torch.stack([torch.arange(4.0), 10 + torch.arange(4.0)])[:, None, None].expand(2, 8, 12, 4)
        stacked = mae.stack(volume, torch.tensor([0, 2]))
        assert stacked.shape == (2, mae.seen_channels, 8, 12) == (2, 7, 8, 12)
        assert stacked[0, :6, 7, 5].tolist() == [0, 10, 0, 10, 1, 11]
        assert stacked[1, :6, 7, 5].tolist() == [2, 12, 1, 11, 3, 13]
        assert stacked[:, 6, 7, 5].tolist() == pytest.approx([3 / TOP_SLICES, 1 / TOP_SLICES])
        image = torch.randn(1, 2, 8, 12)
        alone = torch.cat([image] * 3 + [torch.ones(1, 1, 8, 12)], 1)
        assert torch.equal(residual_maps(image, mae), residual_maps(alone, mae))
        visible = torch.tensor([[0, 3, 5]])
        hidden = hidden_pixels(mae, visible, (8, 12))[:, None].expand_as(image)
        expected = (mae(alone, visible) - image)[hidden].square().mean()
        torch.testing.assert_close(mae.loss(alone, visible), expected)

    def test_without_neighbours_a_stack_is_the_slice(self):
        volume = torch.randn(8, 12, 5)
        assert torch.equal(autoencoder().stack(volume, torch.tensor([4]))[0, 0], volume[:, :, 4])

    def test_maps_of_a_volume_are_those_of_its_stacks(self):
        mae, volume = autoencoder(neighbours=1).eval(), torch.randn(9, 14, 4)
        maps = volume_residual_maps(volume, mae)
        assert maps.shape == (2, 9, 14, 4)
        expected = residual_maps(mae.stack(volume, torch.arange(4)), mae)
        assert torch.equal(maps, expected.permute(1, 2, 3, 0))
        some = volume_residual_maps(volume, mae, slices=(1, 3))
        torch.testing.assert_close(some[..., 1::2], maps[..., 1::2], atol=1e-5, rtol=1e-5)
        assert some[..., ::2].abs().max() == 0

    def test_neighbours_change_the_maps(self):
        mae, volume = autoencoder(neighbours=1).eval(), torch.randn(8, 12, 3)
        changed = volume.clone()
        changed[:, :, 0] += 1
        maps, others = (volume_residual_maps(one, mae, slices=(1,))[..., 1] for one in (volume, changed))
        assert not torch.allclose(maps, others)

    def test_an_image_by_itself_is_its_own_neighbour(self):
        mae, image = autoencoder(neighbours=2).eval(), torch.randn(2, 1, 8, 12)
        alone = torch.cat([image.expand(-1, 5, -1, -1), torch.ones_like(image)], 1)
        assert torch.equal(residual_maps(image, mae), residual_maps(alone, mae))

    def test_a_network_with_one_segments_images(self):
        model = GRCSF(2, 1, 1, (4, 8), 2, 4, rcu_levels=(0,), mae=autoencoder(neighbours=1)).eval()
        assert model(torch.randn(2, 1, 10, 14)).shape == (2, 1, 10, 14)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"neighbours": -1}, "^neighbours: expected a whole number from 0 up, of 63 bits, got -1"),
            ({"spatial_dims": 3, "neighbours": 1}, "^neighbours: expected 0 in 3-D, got 1"),
            ({"decoder": "none"}, "^decoder: expected 'cross' or 'self'"),
        ],
    )
    def test_arguments_that_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            MaskedAutoencoder(**arguments)

    def test_channels_that_fit_neither(self):
        with pytest.raises(ValueError, match=r"^image: expected 1 or 6 channels, got 3"):
            residual_maps(torch.zeros(1, 3, 8, 8), autoencoder(neighbours=2))


def test_the_loss_of_another_target():
    """What hidden patches should be may differ from what is seen, and counts in them alone."""
    mae, image, target = autoencoder().eval(), torch.randn(2, 1, 8, 12), torch.randn(2, 1, 8, 12)
    visible = torch.tensor([[0, 3, 5], [1, 2, 4]])
    drawn = mae(image, visible)
    hidden = hidden_pixels(mae, visible, (8, 12))
    expected = ((drawn - target).square()[:, 0] * hidden).sum() / hidden.sum()
    torch.testing.assert_close(mae.loss(image, visible, target), expected)
    torch.testing.assert_close(mae.loss(image, visible, image), mae.loss(image, visible))
