"""The variants of ``make ablation``: each runs, and starts with the backbone's weights where it has them."""

import importlib.util
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("ablation", Path(__file__).parents[2] / "benchmarks" / "ablation.py")
ablation = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ablation)

VARIANTS = ablation.UNITS | ablation.GCU_FORMS


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_variant_differs_from_the_backbone_by_its_units_alone(name):
    network = VARIANTS[name]()
    torch.manual_seed(7)
    backbone = ablation.build(None, False, network.config["downsample"])
    ablation.start_as(network, backbone)
    own, other = network.state_dict(), backbone.state_dict()
    different = {key for key, value in other.items() if not torch.equal(own[key], value)}
    widened = {
        "maps as channels": {"encoder.0.0.weight"},
        "gcu, extra channel": {f"decoder.{level}.0.weight" for level in range(3)},
        "gcu, scale and channel": {f"decoder.{level}.0.weight" for level in range(3)},
    }
    assert different == widened.get(name, set())


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_variant_segments_and_learns(name):
    image, maps = torch.randn(2, 1, 32, 32), torch.rand(2, 2, 32, 32)
    network = VARIANTS[name]()
    logits, _ = network(image, maps, return_maps=True)
    assert logits.shape == image.shape
    logits.square().sum().backward()
    assert all(
        parameter.grad is not None
        for key, parameter in network.named_parameters()
        if not (name == "gcu, detached" and "gate" in key)
    )
