"""Residual maps: of autoencoders that draw what is hidden, and of those that restore what they see."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reconstruct import hidden_pixels, seeded
from small import autoencoder

from grcsf_fast import MaskedAutoencoder, residual_maps
from grcsf_fast.networks.mae import RESTORE_WEIGHT
from grcsf_fast.networks.residual_maps import complementary_masks, covering_masks, volume_residual_maps


class Offset(MaskedAutoencoder):
    """Reconstructs hidden patches 1 too high in the first channel and visible ones 1000 too high."""

    def forward(self, image, visible, wanted=None, restored=False):
        found = []
        for shown, drawn in zip(visible, wanted, strict=True):
            hidden = ~(drawn[:, :, None] == shown[:, None]).any(2)  # (N, W)
            chosen = self.patchify(image)[:, drawn].unflatten(3, (self.in_channels, -1))
            offset = torch.where(hidden, 1.0, 1000.0)[..., None, None].expand_as(chosen).clone()
            offset[:, :, :, 1:] = torch.where(hidden, -3.0, 1000.0)[..., None, None]
            found.append((chosen + offset).flatten(3))
        return found


class TestRestoring:
    """An autoencoder that says how the visible patches would look in a healthy head."""

    @pytest.fixture
    def mae(self):
        mae = autoencoder(restore=True).eval()
        with torch.no_grad():
            mae.change.weight.normal_()
        return mae

    def test_starts_with_no_change(self):
        image = torch.randn(2, 1, 8, 12)
        assert residual_maps(image, autoencoder(restore=True)).abs().max() == 0

    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize("spatial", [(8, 12), (8, 20)])
    def test_maps_are_the_mean_over_the_passes_that_show_a_pixel(self, mae, spatial, signed):
        """The definition; ten patches are no multiple of the two that a pass of 75 % shows."""
        image = torch.randn(1, 1, *spatial)
        maps = residual_maps(image, mae, (0.5, 0.75), rounds=2, seed=7, signed=signed)
        generator, count = seeded(7), math.prod(spatial) // 16
        for index, ratio in enumerate((0.5, 0.75)):
            total, times = torch.zeros(spatial), torch.zeros(spatial)
            for visible in [row for _ in range(2) for row in covering_masks(count, ratio, generator)]:
                shown = ~hidden_pixels(mae, visible[None], spatial)[0]
                patches = mae.patchify(image).clone()
                patches[:, visible] = mae(image, visible[None], restored=True).detach()
                error = (image - mae.unpatchify(patches, spatial))[0, 0]
                total += (error if signed else error.abs()) * shown
                times += shown
            assert (times > 0).all()
            torch.testing.assert_close(maps[0, index], total / times, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("count", [4, 7, 10, 169])
    @pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6, 0.75])
    def test_masks_show_every_patch(self, count, ratio):
        masks = covering_masks(count, ratio, seeded(1))
        assert masks.unique().tolist() == list(range(count))
        assert all(len(row.unique()) == len(row) for row in masks)

    def test_the_loss_learns_the_change(self, mae):
        image, healthy = torch.randn(2, 1, 8, 12), torch.randn(2, 1, 8, 12)
        visible = torch.tensor([[0, 3, 5], [1, 2, 4]])
        target = mae.patchify(healthy).gather(1, visible[..., None].expand(-1, -1, 16))
        off = (mae(image, visible, restored=True) - target).square().mean()
        plain = mae.loss(image, visible, healthy) - RESTORE_WEIGHT * off
        change, mae.change = mae.change, None
        torch.testing.assert_close(plain, mae.loss(image, visible, healthy), atol=1e-4, rtol=1e-4)
        mae.change = change

    @pytest.mark.parametrize("restore", [False, True])
    def test_maskings_are_what_calls_make_of_them(self, restore):
        mae = MaskedAutoencoder(2, 1, 4, 8, 1, 1, 8, 1, 1, restore=restore).eval()
        if restore:
            torch.nn.init.normal_(mae.change.weight)
        image = torch.randn(3, 1, 8, 12)
        visible = [torch.tensor([[0, 3], [5, 1]]), torch.tensor([[2, 4, 1]])]
        wanted = None if restore else [torch.tensor([[1, 2, 4], [0, 2, 3]]), torch.tensor([[0, 5]])]
        for number, found in enumerate(mae(image, visible, wanted, restore)):
            for masking, rows in enumerate(visible[number]):
                drawn = None if wanted is None else wanted[number][masking].expand(3, -1)
                expected = mae(image, rows.expand(3, -1), drawn, restore)
                torch.testing.assert_close(found[:, masking], expected)

    def test_maskings_without_what_to_draw(self):
        with pytest.raises(ValueError, match="wanted: expected patches to draw of each masking or restored, got"):
            autoencoder()(torch.zeros(1, 1, 8, 8), [torch.tensor([[0]])])
        with pytest.raises(ValueError, match=r"^wanted: expected a row of indices per masking, got \(1,\)"):
            autoencoder()(torch.zeros(1, 1, 8, 8), [torch.tensor([[0]])], [torch.tensor([1])])

    def test_one_that_does_not_restore(self):
        with pytest.raises(ValueError, match=r"^restored: expected an autoencoder that restores \(restore=True\)"):
            autoencoder()(torch.zeros(1, 1, 8, 8), torch.tensor([[0]]), restored=True)


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
            (
                {"mask_ratios": (0.5, 1.0)},
                r"^mask_ratios: expected numbers in \(0, 1\), one per map, got \(0\.5, 1\.0\)$",
            ),
            ({"mask_ratios": 0.5}, r"^mask_ratios: expected numbers in \(0, 1\), one per map, got 0\.5$"),
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
