"""Bundles of strangers: values of other kinds, numbers that no machine holds, tensors that are no weights."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from bundles import edit, tiny_bundle, tiny_mae
from safetensors.torch import load_file, save_file

from grcsf_fast import residual_maps
from grcsf_fast.errors import ArgumentError
from grcsf_fast.networks.weights import BundleError, ResidualMapSettings
from grcsf_fast.pretrained.bundle import load_bundle, read_channels, save_bundle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(tta_flip="false"), "tta_flip: expected True or False, got 'false'"),
        (lambda c: c.update(tta_flip=0), "tta_flip: expected True or False, got 0"),
        (lambda c: c.update(tta_scales="11"), "tta_scales: expected numbers from 0.25 to 4, 16 at most, got '11'"),
        (lambda c: c.update(tta_scales=[1.0] * 17), "tta_scales: expected numbers from 0.25 to 4, 16 at most"),
        (lambda c: c.update(tta_scales=[True]), "tta_scales: expected numbers from 0.25 to 4"),
        (lambda c: c.update(hysteresis_threshold="0.5"), "hysteresis_threshold: expected a number from 0 to 1"),
        (lambda c: c.update(probability_threshold=True), "probability_threshold: expected a number from 0 to 1"),
        (lambda c: c.update(probability_threshold=10**400), "probability_threshold: expected a number from 0 to 1"),
        (lambda c: c.update(channels=[["a"]]), "channels: expected names, got"),
        (lambda c: c.update(channels=[]), "channels: expected names, got []"),
        (lambda c: c.update(channels="image"), "channels: expected names, got 'image'"),
        (lambda c: c["residual_maps"].update(signed="no"), "signed: expected true or false, got 'no'"),
        (lambda c: c["residual_maps"].update(rounds="2"), "rounds: expected a whole number from 1 to 64, got '2'"),
        (lambda c: c["residual_maps"].update(rounds=10**9), "rounds: expected a whole number from 1 to 64"),
        (lambda c: c["residual_maps"].update(rounds=0), "rounds: expected a whole number from 1 to 64, got 0"),
        (lambda c: c["residual_maps"].update(seed="1"), "seed: expected a whole number"),
        (lambda c: c["residual_maps"].update(seed=2**63), "seed: expected a whole number from 0 up, of 63 bits"),
        (
            lambda c: c["residual_maps"].update(mask_ratios=[0.5, True]),
            "mask_ratios: expected numbers in (0, 1), one per map",
        ),
        (lambda c: c["residual_maps"].update(mask_ratios=[0.5] * 65), "mask_ratios: expected 64 at most, got 65"),
        (lambda c: c.update(version=True), "expected a format version from 1 to 3, found True"),
        (lambda c: c.update(card=[1]), "card: expected an object, got [1]"),
        (lambda c: c.update(roi_size=[True, True]), "roi_size: expected two or three edge lengths of 1 or more"),
        (lambda c: c.update(roi_size=[10**400] * 2), "roi_size: expected two or three edge lengths of 1 or more"),
        (lambda c: c.update(preprocessing="mri"), "preprocessing: expected an object, got 'mri'"),
        (
            lambda c: c["preprocessing"].update(constant_background="no"),
            "preprocessing.constant_background: expected true or false, got 'no'",
        ),
        (
            lambda c: c["preprocessing"].update(spacing=["1", "1", "1"]),
            "preprocessing.spacing: expected a list of finite numbers, got ['1', '1', '1']",
        ),
        (
            lambda c: c["preprocessing"].update(others=[{"percentiles": "59"}]),
            "preprocessing.others[0].percentiles: expected a list of finite numbers, got '59'",
        ),
        (
            lambda c: c.update(labels={"names": ["a", "b"], "numbers": [[1], [2]], "exclusive": "no"}),
            "labels.exclusive: expected true or false, got 'no'",
        ),
        (
            lambda c: c.update(labels={"names": "ab", "numbers": [[1], [2]], "exclusive": True}),
            "labels.names: expected a list of texts, got 'ab'",
        ),
        (lambda c: c["network"].update(gcu="false"), "network.gcu: expected true or false, got 'false'"),
        (lambda c: c["network"].update(features="48"), "network.features: expected the channels of at least"),
        (lambda c: c["network"].update(num_heads=10**400), "num_heads: expected a whole number from 1 up"),
        (
            lambda c: c["network"].update(importance_threshold=10**400),
            "network.importance_threshold: expected a number in [0, 1], got 1000",
        ),
        (lambda c: c["mae"].update(norm_target="no"), "mae.norm_target: expected true or false, got 'no'"),
        (lambda c: c["mae"].update(depth="1"), "mae.depth: expected a whole number from 0 up, of 63 bits, got '1'"),
        (lambda c: c["mae"].update(depth=-1), "depth: expected a whole number from 0 up, of 63 bits, got -1"),
        (lambda c: c["mae"].update(mlp_ratio=float("nan")), "mae.mlp_ratio: expected a finite number above 0, got nan"),
    ],
)
def test_values_of_other_kinds(folder, change, message):
    """Which Python would make something of."""
    edit(folder, change)
    with pytest.raises(BundleError, match="^" + re.escape(f"{folder / 'config.json'}: ") + ".*" + re.escape(message)):
        load_bundle(folder)


@pytest.mark.parametrize("content", ["[" * 200_000, '{"version": ' + "9" * 5000 + "}"])
def test_json_that_python_does_not_take_in(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(BundleError, match=re.escape(f"{folder / 'config.json'}: expected JSON, could not read it: ")):
        load_bundle(folder)


def test_a_mark_of_the_byte_order(folder):
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_bundle(folder).preprocessing == tiny_bundle().preprocessing


def test_networks_that_are_larger_than_their_weights(folder):
    """Nothing of that size is made. In a process of its own, where ``torch.empty`` is torch's."""
    code = """
import json, sys, unittest.mock
from pathlib import Path
from grcsf_fast.networks import weights
from grcsf_fast.pretrained.bundle import load_bundle
folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
for part, changes in json.loads(sys.argv[2]):
    (folder / "config.json").write_text(json.dumps(config | {part: config[part] | changes}))
    with unittest.mock.patch.object(weights, "_load_weights", side_effect=AssertionError("too late")):
        try:
            load_bundle(folder)
        except weights.BundleError as error:
            print(error)
"""
    changes = [
        ("mae", {"depth": 10**6}), ("mae", {"embed_dim": 10**5, "num_heads": 1}),
        ("network", {"features": [4] * 1000}), ("network", {"features": [4, 10**6], "rcu_levels": []}),
        ("network", {"patch_size": 4096}),
    ]  # fmt: skip
    command = [sys.executable, "-c", code, str(folder), json.dumps(changes)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == len(changes)
    for line in said:
        assert line.startswith(f"{folder / 'model.safetensors'}: expected the tensors that config.json describes; ")


def test_sizes_are_looked_at_in_no_time():
    """Without PyTorch's compiler, whose import takes a second."""
    code = (
        "import sys, grcsf_fast; before = set(sys.modules); grcsf_fast.load_bundle('demo'); "
        "print([name for name in ('torch._dynamo.convert_frame', 'sympy') if name in set(sys.modules) - before])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64, torch.float16, torch.float64]
)
def test_tensors_that_are_no_weights(folder, dtype):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.startswith("network.encoder") and name.endswith("weight"))
    save_file(tensors | {name: tensors[name].to(dtype)}, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    )
    if dtype in (torch.float16, torch.float64):
        assert load_bundle(folder).network.dtype == torch.float32
    else:
        with pytest.raises(BundleError, match=f"expected numbers like torch.float32 of {name}, found {dtype}$"):
            load_bundle(folder)


def test_settings_of_numpy():
    settings = ResidualMapSettings((0.5,), rounds=np.int64(2), seed=np.int64(3))
    assert json.loads(json.dumps(asdict(settings))) == {
        "mask_ratios": [0.5], "rounds": 2, "seed": 3, "signed": True
    }  # fmt: skip


def test_a_window_of_numpy(tmp_path):
    made = replace(tiny_bundle(), roi_size=[*np.array([32, 48])])
    assert made.roi_size == load_bundle(save_bundle(made, tmp_path / "b")).roi_size == (32, 48)


def test_channels_without_weights(folder):
    """As the survey of a data set asks for them."""
    assert read_channels(folder) == ("image",)
    edit(folder, lambda c: c.update(channels=[["a"]]))
    with pytest.raises(BundleError, match=re.escape("config.json: expected names of channels, found [['a']]")):
        read_channels(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": "1"}, "rounds and batch_size: expected 1 or more, got '1' and 64"),
        ({"batch_size": 2.5}, "rounds and batch_size: expected 1 or more, got 1 and 2.5"),
        ({"seed": "x"}, "seed: expected a whole number of at most 63 bits, got 'x'"),
        ({"seed": 2**70}, "seed: expected a whole number of at most 63 bits, got 1180591620717411303424"),
        ({"mask_ratios": (10**400,)}, "mask_ratios: expected numbers in (0, 1), one per map, got (1000"),
    ],
)
def test_arguments_of_residual_maps(arguments, message):
    with pytest.raises(ArgumentError, match="^" + re.escape(message)):
        residual_maps(torch.zeros(1, 1, 16, 16), tiny_mae(), **arguments)
