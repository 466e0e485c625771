"""Small bundles, and what is done to them on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from unittest import mock

import torch
from awake import awake
from safetensors.torch import load_file, save_file

from grcsf_fast import GRCSF, MaskedAutoencoder
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.pretrained import bundle
from grcsf_fast.pretrained.bundle import Bundle, ResidualMapSettings


def tiny_mae():
    return MaskedAutoencoder(
        patch_size=4, embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_num_heads=2
    )


def tiny_network(**changes):
    arguments = {"features": (4, 8), "patch_size": 4, "residual_channels": 4, "rcu_levels": (0,)}
    arguments |= {"requires_maps": True} | changes
    return awake(GRCSF(2, 1, 1, **arguments))


def tiny_bundle():
    return Bundle(
        network=tiny_network(),
        mae=tiny_mae(),
        preprocessing=Preprocessing(spacing=(1.5, 2.0, 6.5), modality="ct", hu_window=(0.0, 80.0), margin=3),
        residual_maps=ResidualMapSettings(mask_ratios=(0.5, 0.75), rounds=2, seed=7),
        probability_threshold=0.4,
        hysteresis_threshold=0.9,
        tta_flip=True,
        tta_scales=(1.0, 0.9),
        roi_size=(32, 48),
        card={"trained_on": "näher an nichts", "dice": 0.5},
    )


def former_bundle():
    """As bundles were before format version 3."""
    made = tiny_bundle()
    residual_maps = replace(made.residual_maps, signed=False)
    return replace(made, network=tiny_network(gcu_form="scale"), residual_maps=residual_maps)


def saved_before(made, folder):
    """As versions wrote it that did not look at its channels."""
    with mock.patch.object(bundle, "check_channels"):
        return bundle.save_bundle(made, folder)


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def same_weights(first, second):
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def to_version_1(folder):
    """Other names in the configuration, and one tensor called otherwise; of a bundle in the former form."""
    config = json.loads((folder / "config.json").read_text())
    assert config["version"] == 3
    assert config["network"].pop("gcu_form") == "scale"
    assert config["residual_maps"].pop("signed") is False
    config["version"] = 1
    config["residual"] = {"ratios": config["residual_maps"].pop("mask_ratios"), **config.pop("residual_maps")}
    config["network"]["threshold"] = config["network"].pop("importance_threshold")
    assert config["network"].pop("requires_maps")
    for old, new in (
        ("lesion_peak", "hysteresis_threshold"),
        ("mirror", "tta_flip"),
        ("zooms", "tta_scales"),
        ("window", "roi_size"),
    ):
        config[old] = config.pop(new)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors = {name.replace("network.output.", "network.head."): tensor for name, tensor in tensors.items()}
    save_file(tensors, weights)
    config["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
