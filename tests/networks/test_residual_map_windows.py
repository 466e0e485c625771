"""Residual maps of images that are larger than those that an autoencoder was trained on."""

import pytest
import torch
from small import autoencoder as small_autoencoder

from grcsf_fast import MaskedAutoencoder, residual_maps
from grcsf_fast.errors import ArgumentError
from grcsf_fast.networks.residual_maps import volume_residual_maps


def autoencoder(dims: int = 2, image_size=None, **settings) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return small_autoencoder(dims, image_size=image_size, **settings).eval()


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(16, 24), (8, 21), (13, 24)])
def test_images_that_are_no_larger_are_seen_at_once(shape, signed):
    image = numbers(2, 1, *shape)
    found = residual_maps(image, autoencoder(image_size=(16, 24)), signed=signed)
    assert torch.equal(found, residual_maps(image, autoencoder(), signed=signed))


@pytest.mark.parametrize("neighbours", [0, 1])
def test_larger_ones_are_blended_from_windows(neighbours):
    mae, plain = autoencoder(image_size=(16, 24), neighbours=neighbours), autoencoder(neighbours=neighbours)
    image = numbers(2, plain.seen_channels, 28, 20)
    found = residual_maps(image, mae)
    # Along the first axis from 0 and from 12; where they overlap the nearer middle counts for more.
    first, second = (residual_maps(image[:, :, start : start + 16], plain) for start in (0, 12))
    torch.testing.assert_close(found[:, :, :12], first[:, :, :12])
    torch.testing.assert_close(found[:, :, 16:], second[:, :, 4:])
    shares = torch.tensor([1, 2, 3, 4])[:, None] / 5
    torch.testing.assert_close(found[:, :, 12:16], (1 - shares) * first[:, :, 12:] + shares * second[:, :, :4])
    assert not torch.allclose(found, residual_maps(image, plain), atol=1e-3)


@pytest.mark.parametrize("shape", [(9, 30), (64, 64), (17, 25), (33, 24)])
def test_every_pixel_is_seen_and_no_window_is_larger(shape, monkeypatch):
    mae = autoencoder(image_size=(16, 24))
    seen, patchify = [], mae.patchify
    monkeypatch.setattr(mae, "patchify", lambda image: seen.append(tuple(image.shape[2:])) or patchify(image))
    told = []
    found = residual_maps(numbers(3, 1, *shape), mae, batch_size=2, progress=lambda *counts: told.append(counts))
    assert found.isfinite().all()
    assert all(height <= 16 and width <= 24 for height, width in seen)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == told[-1][1] == 3 * (len(told) // 2)


def test_volumes():
    mae, volume = autoencoder(3, (8, 12, 16)), numbers(20, 12, 10)
    found = volume_residual_maps(volume, mae, (0.5,))
    assert found.shape == (1, 20, 12, 10)
    plain = autoencoder(3)
    for start, own in ((0, slice(0, 6)), (12, slice(14, 20))):
        window = volume_residual_maps(volume[start : start + 8], plain, (0.5,))
        torch.testing.assert_close(found[:, own], window[:, own.start - start : own.stop - start])


def test_in_half_precision():
    mae = autoencoder(image_size=(16, 16))
    image = numbers(1, 1, 24, 40)
    found = residual_maps(image.bfloat16(), mae.bfloat16())
    assert found.dtype == torch.bfloat16
    # Not the table's bound of one rounding: every layer rounds.
    torch.testing.assert_close(found.float(), residual_maps(image, mae.float()), atol=0.02, rtol=0.02)


def test_bundles_know_it(tmp_path):
    mae = autoencoder(image_size=(16, 24))
    assert mae.image_size == (16, 24)
    loaded = MaskedAutoencoder.from_pretrained(mae.save_pretrained(tmp_path / "mae"))
    assert loaded.image_size == (16, 24)
    assert loaded.config == mae.config
    assert "image_size" not in autoencoder().config  # as of bundles from before
    mae.image_size = None
    assert mae.config == autoencoder().config


@pytest.mark.parametrize("wrong", [16, (16,), (16, 3), (16, 24.5), (16, 16, 16), ("16", "24")])
def test_other_values(wrong):
    with pytest.raises(ArgumentError, match="image_size: expected 2 integers of 4 or more, got"):
        autoencoder(image_size=wrong)
