"""What a stream of volumes refuses before the first volume."""

import pytest
import torch
from small import autoencoder, network

from grcsf_fast.networks.weights import ResidualMapSettings
from grcsf_fast.networks.whole_volume import reconstruction_stage, segment, segmentation_stage


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (1, 2), (4, 3)])
def test_networks_of_several_channels(dims, inputs, outputs):
    """Volumes have one channel and lesions one mask: the others would be lost without a word."""
    model = network(dims, in_channels=inputs, out_channels=outputs, rcu_levels=())
    message = rf"^network: expected in_channels 1 .*got in_channels {inputs} and out_channels {outputs}$"
    with pytest.raises(ValueError, match=message):
        segmentation_stage(model)
    with pytest.raises(ValueError, match=message):
        segment(model, torch.zeros(8, 8, 8), None)


@pytest.mark.parametrize(("dims", "channels"), [(3, 1), (2, 2)])
def test_autoencoders_of_other_images(dims, channels):
    with pytest.raises(ValueError, match=rf"^mae: .*got in_channels {channels} and spatial_dims {dims}$"):
        reconstruction_stage(autoencoder(dims, channels), 2, 16, ResidualMapSettings((0.5,)))
