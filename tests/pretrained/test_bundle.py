"""Bundles: what goes in comes out, and what is not a bundle is refused with its name and the reason."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundles import edit, former_bundle, same_weights, tiny_bundle, tiny_mae, tiny_network, to_version_1
from safetensors.torch import load_file

from grcsf_fast.data.intensities import Intensities
from grcsf_fast.data.labels import Labels
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.inference.predictor import Predictor
from grcsf_fast.networks.grcsf import GRCSF
from grcsf_fast.networks.residual_maps import volume_residual_maps
from grcsf_fast.networks.weights import FORMAT_VERSION
from grcsf_fast.networks.whole_volume import segment
from grcsf_fast.pretrained.bundle import Bundle, BundleError, ResidualMapSettings, load_bundle, save_bundle


def test_round_trip(tmp_path):
    bundle = tiny_bundle()
    bundle.network.train()
    folder = save_bundle(bundle, tmp_path / "bundle")
    assert folder == tmp_path / "bundle"
    loaded = load_bundle(folder)
    for name in (
        "preprocessing",
        "residual_maps",
        "probability_threshold",
        "hysteresis_threshold",
        "tta_flip",
        "tta_scales",
        "roi_size",
        "card",
    ):
        assert getattr(loaded, name) == getattr(bundle, name), name
    assert loaded.network.config == bundle.network.config
    assert loaded.mae.config == bundle.mae.config
    assert same_weights(loaded.network, bundle.network)
    assert same_weights(loaded.mae, bundle.mae)
    assert not loaded.network.training
    assert not loaded.mae.training
    assert re.fullmatch("[0-9a-f]{64}", loaded.weights_sha256)
    bundle.network.eval()
    image, maps = torch.randn(2, 1, 13, 17), torch.rand(2, 2, 13, 17)
    torch.testing.assert_close(loaded.network(image, maps), bundle.network(image, maps), atol=0, rtol=0)


def test_round_trip_of_a_3d_network_without_rcu(tmp_path):
    network = GRCSF(3, 2, 1, features=(4, 8), rcu_levels=(), gcu=False, downsample="max", importance_threshold=0.25)
    bundle = Bundle(network, None, Preprocessing(), roi_size=(8, 8, 8), channels=("a", "b"))
    loaded = load_bundle(save_bundle(bundle, tmp_path / "b"))
    assert loaded.mae is None
    assert loaded.network.config == network.config
    assert same_weights(loaded.network, network)
    assert loaded.roi_size == (8, 8, 8)


def test_round_trip_of_an_autoencoder_alone(tmp_path):
    mae = tiny_mae()
    loaded = load_bundle(save_bundle(Bundle(None, mae, Preprocessing()), tmp_path / "b"))
    assert loaded.network is None
    assert loaded.roi_size is None
    assert loaded.card == {}
    assert same_weights(loaded.mae, mae)


def test_a_network_with_an_autoencoder_of_its_own_loads_again(tmp_path):
    """``GRCSF(mae=...)`` has the autoencoder in its state dict: what is saved has to load again."""
    mae = tiny_mae()
    network = tiny_network(mae=mae).eval()
    image = torch.randn(1, 1, 16, 16)
    loaded = load_bundle(save_bundle(Bundle(network, mae, Preprocessing()), tmp_path / "b"))
    assert same_weights(loaded.mae, mae)
    maps = torch.rand(1, 2, 16, 16)
    torch.testing.assert_close(loaded.network(image, maps), network(image, maps), atol=0, rtol=0)


@pytest.mark.parametrize("requires_maps", [False, True])
def test_a_network_beside_an_autoencoder_requires_maps(tmp_path, requires_maps):
    """However it was trained: nobody should get blank maps where the bundle could make real ones."""
    network = tiny_network(requires_maps=requires_maps)
    alone = load_bundle(save_bundle(Bundle(network, None, Preprocessing()), tmp_path / "alone")).network
    assert alone.requires_maps == requires_maps
    beside = load_bundle(save_bundle(Bundle(network, tiny_mae(), Preprocessing()), tmp_path / "beside")).network
    assert network.requires_maps == requires_maps
    with pytest.raises(ValueError, match=r"^residual_maps: "):
        beside(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_storage_loads_as_float32(tmp_path, dtype):
    bundle = tiny_bundle()
    folder = save_bundle(bundle, tmp_path / "half", dtype)
    whole = save_bundle(bundle, tmp_path / "whole")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
    assert (folder / "model.safetensors").stat().st_size < 0.6 * (whole / "model.safetensors").stat().st_size
    loaded = load_bundle(folder)
    for module, original in ((loaded.network, bundle.network), (loaded.mae, bundle.mae)):
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, original.state_dict()[name].to(dtype).float())
    assert {parameter.dtype for parameter in bundle.network.parameters()} == {torch.float32}


def test_the_folder_holds_json_and_safetensors_alone(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]
    config = json.loads((folder / "config.json").read_text())
    assert config["version"] == FORMAT_VERSION
    length = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((folder / "model.safetensors").read_bytes()[8 : 8 + length])
    assert "network.output.weight" in header


def test_names_of_the_package(tmp_path, monkeypatch):
    """A name stands for a folder of the package; a folder of that name in the working folder comes first."""
    packaged = tmp_path / "packaged"
    save_bundle(tiny_bundle(), packaged / "tiny")
    save_bundle(Bundle(None, tiny_mae(), Preprocessing()), tmp_path / "work" / "mine")
    monkeypatch.setattr("grcsf_fast.networks.weights.PACKAGED", packaged)
    monkeypatch.chdir(tmp_path / "work")
    assert load_bundle("tiny").network is not None
    assert load_bundle("mine").network is None
    with pytest.raises(FileNotFoundError, match=re.escape("smth: expected a bundle's folder or one of ['tiny']")):
        load_bundle("smth")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder / name}: expected the bundle's")):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(colour="red"), "unknown keys ['colour']"),
        (lambda c: c.pop("residual_maps"), "missing keys ['residual_maps']"),
        (lambda c: c.pop("weights_sha256"), "missing keys ['weights_sha256']"),
        (lambda c: c.update(version=99), f"expected a format version from 1 to {FORMAT_VERSION}, found 99"),
        (lambda c: c.pop("version"), f"expected a format version from 1 to {FORMAT_VERSION}, found None"),
        (lambda c: c.update(format="other"), 'expected "format": "grcsf-fast bundle", found '),
        (lambda c: c.pop("format"), 'expected "format": "grcsf-fast bundle", found '),
        (lambda c: c["preprocessing"].update(flavour=1), "flavour"),
        (lambda c: c["preprocessing"].update(modality="pet"), "modality: expected 'mri' or 'ct', got 'pet'"),
        (lambda c: c["preprocessing"].update(spacing=None), ""),
        (lambda c: c["preprocessing"].update(percentiles=[1.0]), ""),
        (lambda c: c.update(preprocessing=None), ""),
        (lambda c: c["preprocessing"].pop("spacing"), "missing keys ['spacing']"),
        (lambda c: c["preprocessing"].update(margin=1.5), "margin: expected a whole number from 0 up, got 1.5"),
        (lambda c: c["residual_maps"].pop("signed"), "missing keys ['signed']"),
        (lambda c: c["residual_maps"].update(mask_ratios=[0.5]), "residual_maps: expected the masking ratios"),
        (lambda c: c.update(labels={}), ""),
        (lambda c: c.update(residual_maps=[1, 2]), ""),
        (lambda c: c["network"].update(flavour=1), "flavour"),
        (lambda c: c["network"].update(spatial_dims=4), "spatial_dims: expected 2 or 3, got 4"),
        (lambda c: c["network"].update(features=[-1, 4]), ""),
        (lambda c: c.update(network="big"), ""),
        (lambda c: c["mae"].update(num_heads=0), ""),
        (lambda c: c.update(roi_size=5), ""),
        (lambda c: c.update(probability_threshold="x"), "'x'"),
        (
            lambda c: c.update(hysteresis_threshold=None),
            "hysteresis_threshold: expected a number from 0 to 1, got None",
        ),
        (lambda c: c.update(hysteresis_threshold=1.5), "hysteresis_threshold: expected a number from 0 to 1, got 1.5"),
        (lambda c: c.update(probability_threshold=float("nan")), "probability_threshold: expected a number from 0 to"),
        (lambda c: c.update(tta_scales=[1.0, 0.0]), "tta_scales: expected numbers from 0.25 to 4"),
    ],
)
def test_configuration_that_is_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(BundleError, match="^" + re.escape(f"{folder / 'config.json'}: ") + ".*" + re.escape(message)):
        load_bundle(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"model: 1", b"\xff\xfe\x00", b'{"format": "grcsf-fast bundle",}'])
def test_configuration_that_is_no_json(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(BundleError, match=re.escape(f"{folder / 'config.json'}: expected JSON, could not read it")):
        load_bundle(folder)


@pytest.mark.parametrize(("content", "found"), [("[]", "[]"), ("3", "3"), ("null", "None"), ('"bundle"', "'bundle'")])
def test_configuration_that_is_another_json(folder, content, found):
    (folder / "config.json").write_text(content)
    with pytest.raises(BundleError, match=re.escape('expected "format": "grcsf-fast bundle", found ' + found)):
        load_bundle(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights(folder, size):
    path = folder / "model.safetensors"
    content = path.read_bytes()[:size]
    path.write_bytes(content)
    expected = json.loads((folder / "config.json").read_text())["weights_sha256"]
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    assert str(caught.value).startswith(f"{path}: expected a file with SHA-256 {expected}, found ")
    assert f"truncated or altered ({len(content)} bytes)" in str(caught.value)


def test_altered_weights(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="truncated or altered"):
        load_bundle(folder)


def rehash(folder):
    from hashlib import sha256

    found = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda config: config.update(weights_sha256=found))


def test_weights_that_are_no_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    rehash(folder)
    with pytest.raises(BundleError, match=r"model\.safetensors: expected safetensors, could not read it"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["network"].update(features=[4, 16]), "size mismatch"),
        (lambda c: c["network"].update(features=[4, 8, 16]), "expected the tensors that config.json describes"),
        (lambda c: c.update(mae=None), r"\d+ differ, as mae\."),
    ],
)
def test_weights_of_another_network(folder, change, message):
    edit(folder, change)
    with pytest.raises(BundleError, match="(?s)^" + re.escape(f"{folder / 'model.safetensors'}: ") + ".*" + message):
        load_bundle(folder)


def test_save_replaces_an_older_bundle(tmp_path):
    first, second = tiny_bundle(), tiny_bundle()
    save_bundle(first, tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("x")
    save_bundle(second, tmp_path / "b")
    assert same_weights(load_bundle(tmp_path / "b").network, second.network)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]


def test_save_makes_missing_folders(tmp_path):
    save_bundle(tiny_bundle(), tmp_path / "x" / "y" / "b")
    assert load_bundle(tmp_path / "x" / "y" / "b").roi_size == (32, 48)


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["weights", "config", "old aside", "new in place"])
def test_failed_save_leaves_the_older_bundle(tmp_path, monkeypatch, stage):
    """Whichever step of saving fails."""
    save_bundle(tiny_bundle(), tmp_path / "b")
    before = snapshot(tmp_path)
    bundle = tiny_bundle()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if stage == "weights":
        monkeypatch.setattr("safetensors.torch.save_file", full)
    elif stage == "config":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        rename = Path.rename
        fails = "b" if stage == "old aside" else f".partial-{os.getpid()}-b"
        monkeypatch.setattr(Path, "rename", lambda path, target: full() if path.name == fails else rename(path, target))
    with pytest.raises(OSError, match="No space left"):
        save_bundle(bundle, tmp_path / "b")
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_card_that_is_no_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        save_bundle(Bundle(None, tiny_mae(), Preprocessing(), card={"x": object()}), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_save_do_not_stop_the_next(tmp_path):
    """Process numbers come again, in containers especially."""
    (tmp_path / f".partial-{os.getpid()}-b").mkdir()
    (tmp_path / f".partial-{os.getpid()}-b" / "model.safetensors").write_bytes(b"half")
    save_bundle(tiny_bundle(), tmp_path / "b")
    assert load_bundle(tmp_path / "b").roi_size == (32, 48)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_saving_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'file'}: expected a folder to write to")):
        save_bundle(tiny_bundle(), tmp_path / "file" / "b")


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from bundles import tiny_bundle
from grcsf_fast.pretrained.bundle import save_bundle
bundle = tiny_bundle()
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    save_bundle(bundle, sys.argv[1])
except OSError as error:
    print("OSError")
"""


def test_a_disk_that_is_really_full(tmp_path):
    """A process that may write 4 kB a file; the weights take 48."""
    save_bundle(tiny_bundle(), tmp_path / "b")
    before = snapshot(tmp_path)
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "b"), str(Path(__file__).parents[1] / "helpers")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert snapshot(tmp_path) == before
    assert (done.returncode, done.stdout.strip()) == (0, "OSError"), done.stderr[-2000:]


def test_a_copied_bundle_works(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(folder)
    assert load_bundle(str(tmp_path / "elsewhere")).probability_threshold == 0.4


def test_a_signal_while_a_bundle_is_replaced(tmp_path, monkeypatch):
    """Between the two renames: the old one is there again."""
    made = tiny_bundle()
    folder = save_bundle(made, tmp_path / "one")
    before = (folder / "config.json").read_bytes()
    rename, calls = Path.rename, []

    def interrupted(path, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(replace(made, card={"other": 1}), folder)
    assert (folder / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_bundles_of_version_1(tmp_path):
    """The same networks and settings."""
    made = former_bundle()
    folder = save_bundle(made, tmp_path / "b")
    to_version_1(folder)
    found = load_bundle(folder)
    for item in fields(Bundle):
        if item.name not in ("network", "mae", "card", "weights_sha256", "read_values_sha256"):
            assert getattr(found, item.name) == getattr(made, item.name), item.name
    assert found.network.config == made.network.config
    assert same_weights(found.network, made.network)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ["slices", "windows"])
def test_a_folder_of_version_1_gives_the_mask_that_it_gave(name, backend):
    """Written, and its mask made, by commit ab34de1, the last one of version 1; ``version_1/make.py`` says how."""
    folder = Path(__file__).parent / "version_1" / name
    expected = load_file(folder / "expected.safetensors")
    image = nib.Nifti1Image(expected.pop("image").numpy(), expected.pop("affine").numpy())
    mask = expected.pop("mask").numpy()
    found = Predictor(folder, device="cpu", backend=backend, precision="float32")(image)
    values = {key if isinstance(key, str) else f"residual{100 * key:.0f}": one for key, one in found.values.items()}
    assert "probability" in expected
    for key, one in expected.items():
        torch.testing.assert_close(values[key], one, atol=1e-5, rtol=1e-5)
    # No probability is so close to a threshold that rounding would decide about a voxel.
    np.testing.assert_array_equal(np.asarray(found.mask.dataobj), mask)
    assert 0 < mask.mean() < 0.5


def test_a_folder_of_version_2_gives_what_it_gave():
    """Written, and its logits computed, by the last release before version 3."""
    folder = Path(__file__).parent / "version_2"
    expected = load_file(folder / "expected.safetensors")
    network = GRCSF.from_pretrained(folder)
    assert network.config["gcu_form"] == "scale"
    assert not network.residual_map_settings.signed
    with torch.no_grad():
        torch.testing.assert_close(network(expected["image"]), expected["logits"], atol=1e-5, rtol=1e-5)


def test_a_folder_of_version_3_gives_what_it_gave():
    """Written, and what it gives computed, when version 3 was current.

    Two channels, neighbours, classes, units that do something, and an autoencoder that restores.
    """
    folder = Path(__file__).parent / "version_3"
    expected, bundle = load_file(folder / "expected.safetensors"), load_bundle(folder)
    volume, slices = expected["volume"], torch.arange(3)
    assert bundle.preprocessing == Preprocessing(
        (1.5, 2.0, 6.5), "ct", hu_window=(0.0, 80.0), margin=3, others=(Intensities("mri", (1.0, 99.0)),),
        constant_background=False,
    )  # fmt: skip
    assert bundle.residual_maps == ResidualMapSettings((0.5, 0.75), rounds=2, seed=5)
    assert bundle.labels == Labels(("oedema", "core"), ((3,), (1,)))
    assert (bundle.probability_threshold, bundle.hysteresis_threshold, bundle.roi_size) == (0.4, 0.9, None)
    assert (bundle.tta_flip, bundle.tta_scales, bundle.channels) == (True, (1.0, 1.2), ("CT", "FLAIR"))
    with torch.no_grad():
        maps = volume_residual_maps(volume, bundle.mae, **asdict(bundle.residual_maps))
        found = {
            "maps": maps,
            "drawn": bundle.mae(bundle.mae.stack(volume[:, :8, :8], slices), torch.tensor([[0, 2], [1, 3], [0, 3]])),
            "logits": bundle.network(bundle.network.stack(volume, slices), maps.permute(3, 0, 1, 2).contiguous()),
            "probability": segment(
                bundle.network, volume, maps, tta_flip=True, tta_scales=bundle.tta_scales, labels=bundle.labels
            ),
        }
    assert {*expected} == {"volume", *found}
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], atol=1e-5, rtol=1e-5)


def test_residual_maps_are_those_that_the_network_makes_itself():
    """Unless others are given; other masking ratios would be other maps."""
    settings = {"signed": False, "rounds": 2}
    network = GRCSF(2, 1, 1, (4, 8), 4, rcu_levels=(0,), mask_ratios=(0.6, 0.9), residual_map_settings=settings)
    bundle = Bundle(network, None, Preprocessing())
    assert bundle.residual_maps == network.residual_map_settings
    assert (bundle.residual_maps.mask_ratios, bundle.residual_maps.signed) == ((0.6, 0.9), False)
    with pytest.raises(
        ValueError, match=r"^residual_maps: expected the masking ratios \(0.6, 0.9\) of the network, got"
    ):
        Bundle(network, None, Preprocessing(), ResidualMapSettings())
