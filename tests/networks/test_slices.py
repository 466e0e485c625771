"""A 2-D network that sees the slices below and above the one that it segments."""

from __future__ import annotations

import pytest
import torch
from awake import awake

from grcsf_fast import GRCSF, MaskedAutoencoder, residual_maps
from grcsf_fast.networks.whole_volume import segment


def network_of(neighbours: int = 1, **arguments) -> GRCSF:
    return awake(GRCSF(2, 1, 1, (4, 8), 2, 4, rcu_levels=(0,), neighbours=neighbours, **arguments)).eval()


def test_stack():
    network, volume = network_of(2), torch.arange(5.0).expand(6, 4, 5)
    stacked = network.stack(volume, torch.tensor([0, 3]))
    assert stacked.shape == (2, network.seen_channels, 6, 4) == (2, 5, 6, 4)
    assert stacked[0, :, 0, 0].tolist() == [0, 0, 1, 0, 2]  # beyond the end its last slice is repeated
    assert stacked[1, :, 0, 0].tolist() == [3, 2, 4, 1, 4]


def test_stack_of_several_channels():
    """All channels of a slice together."""
    network = awake(GRCSF(2, 2, 1, (4, 8), 2, 4, rcu_levels=(0,), neighbours=2)).eval()
    volume = torch.stack([torch.arange(5.0), 10 + torch.arange(5.0)])[:, None, None].expand(2, 6, 4, 5)
    stacked = network.stack(volume, torch.tensor([0, 3]))
    assert stacked.shape == (2, network.seen_channels, 6, 4) == (2, 10, 6, 4)
    assert stacked[0, :, 5, 3].tolist() == [0, 10, 0, 10, 1, 11, 0, 10, 2, 12]
    assert stacked[1, :, 5, 3].tolist() == [3, 13, 2, 12, 4, 14, 1, 11, 4, 14]
    image = torch.randn(2, 2, 8, 12)
    assert torch.equal(network(image), network(torch.cat([image] * 5, 1)))  # alone it is its own neighbour


def test_without_neighbours_a_stack_is_the_slice():
    volume = torch.randn(6, 4, 5)
    assert torch.equal(network_of(0).stack(volume, torch.tensor([4]))[0, 0], volume[:, :, 4])


@pytest.mark.parametrize("neighbours", [1, 2])
def test_a_volume_is_segmented_by_its_stacks(neighbours):
    network, volume, maps = network_of(neighbours), torch.randn(10, 13, 4), torch.randn(2, 10, 13, 4)
    found = segment(network, volume, maps, batch_size=3)
    with torch.no_grad():
        logits = network(network.stack(volume, torch.arange(4)), maps.permute(3, 0, 1, 2).contiguous())
    torch.testing.assert_close(found, logits[:, 0].sigmoid().permute(1, 2, 0), atol=1e-5, rtol=1e-5)
    changed = volume.clone()
    changed[:, :, 0] += 1
    moved = segment(network, changed, maps, batch_size=3)
    assert [number for number in range(4) if not torch.equal(moved[..., number], found[..., number])] == list(
        range(neighbours + 1)
    )


def test_an_image_by_itself_is_its_own_neighbour():
    network, image = network_of(2), torch.randn(2, 1, 8, 12)
    assert torch.equal(network(image), network(image.expand(-1, 5, -1, -1)))


def test_with_its_own_autoencoder():
    mae = MaskedAutoencoder(2, 1, 4, 16, 1, 2, 16, 1, 2, neighbours=2)
    network = network_of(1, mae=mae)
    stacked = torch.randn(2, 3, 8, 12)
    expected = network(stacked, residual_maps(stacked[:, :1], mae))
    torch.testing.assert_close(network(stacked), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbours": -1}, "^neighbours: expected a whole number from 0 up, of 63 bits, got -1"),
        ({"spatial_dims": 3, "neighbours": 1}, "^neighbours: expected 0 in 3-D, got 1"),
    ],
)
def test_numbers_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GRCSF(**({"spatial_dims": 2, "in_channels": 1, "out_channels": 1} | settings))


def test_channels_that_fit_neither():
    with pytest.raises(ValueError, match=r"^image: expected \(B,1 or 3\) and 2 spatial axes, got \(1, 2, 8, 8\)"):
        network_of()(torch.zeros(1, 2, 8, 8))
