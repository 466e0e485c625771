"""What constructors of the networks take: numbers of NumPy and lists become plain ones, and the rest is refused."""

import json
import re

import numpy as np
import pytest
import torch
from small import autoencoder, network

from grcsf_fast import (
    GRCSF,
    GlobalCompensationUnit,
    MaskedAutoencoder,
    Predictor,
    RegionCompensationUnit,
    residual_maps,
)
from grcsf_fast.data.reports import run_of
from grcsf_fast.errors import ArgumentError
from grcsf_fast.pretrained.bundle import ResidualMapSettings


def assert_plain(value):
    """Of Python's own types, as JSON has them."""
    assert type(value) in (bool, int, float, str, list), value
    for one in value if isinstance(value, list) else ():
        assert_plain(one)


# As they are, and as NumPy or a tuple has them.
OF_NETWORK = {
    "spatial_dims": (2, np.int64(2)),
    "in_channels": (1, np.int32(1)),
    "out_channels": (2, np.uint8(2)),
    "features": ([4, 6, 8], (np.int64(4), 6, np.int16(8))),
    "patch_size": (2, np.int64(2)),
    "residual_channels": (3, np.int64(3)),
    "num_heads": (2, np.int64(2)),
    "rcu_levels": ([0, 1], np.arange(2)),
    "mask_ratios": ([0.5, 0.75], np.array([0.5, 0.75], np.float32)),
    "gcu": (True, np.bool_(True)),
    "importance_threshold": (0.25, np.float32(0.25)),
    "requires_maps": (True, np.bool_(True)),
    "neighbours": (1, np.int64(1)),
}
OF_MAE = {
    "spatial_dims": (2, np.int64(2)),
    "in_channels": (1, np.int64(1)),
    "patch_size": (4, np.int64(4)),
    "embed_dim": (12, np.int64(12)),
    "depth": (1, np.int64(1)),
    "num_heads": (2, np.int64(2)),
    "decoder_dim": (12, np.int64(12)),
    "decoder_depth": (1, np.int64(1)),
    "decoder_num_heads": (2, np.int64(2)),
    "mlp_ratio": (2.0, np.float32(2)),
    "norm_target": (True, np.bool_(True)),
    "neighbours": (1, np.int64(1)),
    "restore": (True, np.bool_(True)),
    "image_size": ([8, 12], (np.int64(8), np.int64(12))),
}


@pytest.mark.parametrize(("kind", "arguments"), [(GRCSF, OF_NETWORK), (MaskedAutoencoder, OF_MAE)])
def test_the_configuration_is_plain(tmp_path, kind, arguments):
    plain, other = (kind(**{name: pair[which] for name, pair in arguments.items()}) for which in (0, 1))
    assert other.config == plain.config
    for value in other.config.values():
        assert_plain(value)
    json.dumps(other.config)
    for name, value in vars(plain).items():
        if isinstance(value, int | float | tuple):
            assert repr(getattr(other, name)) == repr(value), name
    assert kind.from_pretrained(other.save_pretrained(tmp_path / "saved")).config == plain.config


def test_settings_of_maps_are_plain():
    maps = ResidualMapSettings([np.float32(0.5), 0.75], np.int64(2), np.uint8(3), np.bool_(False))
    assert repr(maps) == repr(ResidualMapSettings((0.5, 0.75), 2, 3, False))


def test_fractions_are_stored_as_such():
    """0 and 0.0 are one setting, also in its digest, by which results of one run are told."""
    unit = network(importance_threshold=0)
    assert repr(unit.config) == repr(network(importance_threshold=0.0).config)
    unit.importance_threshold = 1
    assert repr(unit.importance_threshold) == "1.0"
    assert repr(autoencoder(mlp_ratio=2).config) == repr(autoencoder(mlp_ratio=2.0).config)
    settings = [Predictor("demo", importance_threshold=zero, precision="float32").settings() for zero in (0, 0.0)]
    assert run_of(settings[0]) == run_of(settings[1])


@pytest.mark.parametrize(
    ("name", "given", "plain"),
    [
        ("features", {4: 0, 6: 0, 8: 0}.keys(), [4, 6, 8]),
        ("features", torch.tensor([4, 6, 8]), [4, 6, 8]),
        ("rcu_levels", {1, 0}, [0, 1]),
        ("rcu_levels", frozenset({0}), [0]),
        ("rcu_levels", (level for level in (1, 0)), [1, 0]),
        ("mask_ratios", map(float, ("0.5", "0.75")), [0.5, 0.75]),
        ("importance_threshold", torch.tensor(0.25), 0.25),
        ("importance_threshold", np.array(0.25), 0.25),
    ],
)
def test_what_is_gone_through_becomes_a_list(name, given, plain):
    """Levels have an order of their own, which a set of them may lack."""
    assert repr(network(**{"features": (4, 6, 8), name: given}).config[name]) == repr(plain)


def test_maps_of_ratios_that_are_gone_through_once():
    image, mae = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), autoencoder(patch_size=2)
    expected = residual_maps(image, mae, (0.5, 0.75))
    for ratios in (iter((0.5, 0.75)), np.array([0.5, 0.75])):
        assert torch.equal(residual_maps(image, mae, ratios), expected)


NO_COUNTS = (0, -1, True, 2.0, 2.5, "2", None, [2], 2**70)
NO_FLAGS = (1, 0, "False", None)
REFUSED_NETWORK = {
    "spatial_dims": (1, 4, 2.0, True, "2", [2], None),
    "in_channels": NO_COUNTS,
    "out_channels": NO_COUNTS,
    "features": (8, "48", (8,), (8, 0), (8, 8.0), (8, True), {8: 1, 4: 2}, {8, 4}),
    "patch_size": [one for one in NO_COUNTS if one is not None],
    "residual_channels": NO_COUNTS,
    "num_heads": NO_COUNTS,
    "rcu_levels": (1, "01", (0, 0), (2,), (-1,), (0.0,), (True,), {0: 1}, {0, 9}, {0, "1"}),
    "mask_ratios": (0.5, "0.5", (0.5, 1.0), ("0.5",), (True,), {0.5, 0.75}),
    "gcu": NO_FLAGS,
    "downsample": (None, 3, "Max", ["max"]),
    "importance_threshold": ("0.5", True, None, -0.1, 1.5),
    "requires_maps": NO_FLAGS,
    "gcu_form": (None, 3, "none", ["scale"]),
    "neighbours": (-1, 1.0, True, "1", None),
}
REFUSED_MAE = {
    "spatial_dims": REFUSED_NETWORK["spatial_dims"],
    **dict.fromkeys(("in_channels", "patch_size", "embed_dim", "num_heads", "decoder_dim"), NO_COUNTS),
    "decoder_num_heads": NO_COUNTS,
    "depth": (-1, 1.0, True, "1", None),
    "decoder_depth": (-1, 1.0, True, "1", None),
    "mlp_ratio": (0, -1.0, True, "4", None, float("nan")),
    "norm_target": NO_FLAGS,
    "neighbours": REFUSED_NETWORK["neighbours"],
    "decoder": (None, 3, "none", ["self"]),
    "restore": NO_FLAGS,
    "image_size": (8, "88", (8,), (8, 8.0), (8, True), (8, 2)),
}
REFUSED_UNIT = {
    "spatial_dims": REFUSED_NETWORK["spatial_dims"],
    **dict.fromkeys(("channels", "context_channels", "num_maps", "residual_channels", "num_heads"), NO_COUNTS),
    "patch_size": NO_COUNTS,
    "level": (-1, 1.0, True, "1", None),
}
REFUSED_MAPS = {
    "mask_ratios": REFUSED_NETWORK["mask_ratios"],
    "rounds": (*NO_COUNTS, 65),
    "seed": (-1, 1.0, True, "1", None),
    "signed": NO_FLAGS,
}


def regional_unit(**settings):
    return RegionCompensationUnit(**{"spatial_dims": 2, "channels": 4, "context_channels": 3} | settings)


@pytest.mark.parametrize(
    ("build", "name", "value"),
    [
        pytest.param(build, name, value, id=f"{build.__name__}-{name}-{value!r}"[:60])
        for build, refused in (
            (network, REFUSED_NETWORK),
            (autoencoder, REFUSED_MAE),
            (regional_unit, REFUSED_UNIT),
            (GlobalCompensationUnit, {"channels": NO_COUNTS}),
            (ResidualMapSettings, REFUSED_MAPS),
        )
        for name, values in refused.items()
        for value in values
    ],
)
def test_what_is_refused(build, name, value):
    """The message names the argument, what was expected and what came."""
    with pytest.raises(ArgumentError) as caught:
        build(**{name: value})
    parts = re.fullmatch(rf"{name}: expected .+, got (.+)", str(caught.value))
    assert parts, str(caught.value)
    if not isinstance(value, str | list | tuple | dict | set | np.ndarray):
        assert parts[1].startswith(repr(value)[:70])
