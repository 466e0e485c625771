"""What is refused before it costs something: folders with other files, settings that make no mask, spaces, masks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from bundles import same_weights
from heads import noise, tiny_bundle
from monai.data.meta_tensor import MetaTensor

from grcsf_fast import GRCSF, GRCSFLoss, MaskedAutoencoder, Predictor
from grcsf_fast.errors import ArgumentError
from grcsf_fast.inference.monai_inferer import VolumeInferer
from grcsf_fast.networks.weights import ResidualMapSettings
from grcsf_fast.pretrained.bundle import Bundle, load_bundle, save_bundle
from grcsf_fast.pretrained.monai_bundle import export_monai

SETTINGS = ResidualMapSettings((0.5, 0.75), rounds=2, seed=7, signed=False)


def small():
    return GRCSF(2, 1, 1, features=(4, 8), patch_size=4, rcu_levels=(), gcu=False)


def test_a_folder_with_other_files_is_kept(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    small().save_pretrained(folder)  # empty
    (folder / ".DS_Store").write_text("")
    small().save_pretrained(folder)  # weights, and what a file browser left
    (folder / "patients.csv").write_text("1")
    for save in (lambda: small().save_pretrained(folder), lambda: save_bundle(tiny_bundle(), folder)):
        with pytest.raises(ArgumentError, match=r"study: .* found patients.csv in it, which would be lost"):
            save()
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "patients.csv"}
    foreign = tmp_path / "of another program"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ArgumentError, match="found files of something else"):
        small().save_pretrained(foreign)
    assert json.loads((foreign / "config.json").read_text()) == {"model_type": "bert"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="found a file"):
        small().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").is_file()


@pytest.mark.parametrize("name", ["", ".", "none/..", "../in", "{}"])
def test_a_folder_that_the_program_is_in_is_not_replaced(tmp_path, monkeypatch, name):
    """By whatever name: the program would be in one that is no more."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(ArgumentError, match=r"in: expected another folder than the one that the program is in"):
        small().save_pretrained(name.format(tmp_path / "in"))
    assert [path.name for path in tmp_path.rglob("*")] == ["in"]


@pytest.mark.parametrize("name", ["none/../mine", "mine/none/.."])
def test_files_are_kept_by_whatever_name_their_folder_is_given(tmp_path, monkeypatch, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scan.nii.gz").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"found scan\.nii\.gz in it, which would be lost"):
        small().save_pretrained(name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "scan.nii.gz"]


def test_a_link_leads_to_the_new_weights(tmp_path):
    """Not to older ones, for those who know the folder by its own name."""
    folder, link = tmp_path / "disk" / "weights", tmp_path / "link"
    link.symlink_to(folder)
    for seed in (0, 1):  # a new folder, and its replacement
        torch.manual_seed(seed)
        network = small()
        assert network.save_pretrained(link) == link
        assert same_weights(GRCSF.from_pretrained(folder), network)
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert [path.name for path in folder.parent.iterdir()] == ["weights"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float16"])
def test_weights_of_a_dtype_that_does_not_load_are_not_stored(tmp_path, dtype):
    with pytest.raises(ArgumentError, match=r"^dtype: expected one of torch\.float64, .*torch\.float16, got "):
        small().save_pretrained(tmp_path / "network", dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probability_threshold": 50.0}, "probability_threshold: expected a number from 0 to 1, got 50.0"),
        ({"probability_threshold": -1.0}, "probability_threshold: "),
        ({"hysteresis_threshold": float("nan")}, "hysteresis_threshold: "),
        ({"tta_scales": ()}, "tta_scales: expected numbers from 0.25 to 4"),
        ({"tta_scales": (1.0, 9.0)}, "tta_scales: "),
        ({"roi_size": (1,)}, "roi_size: expected two or three edge lengths"),
        ({"roi_size": (8, 8, 0)}, "roi_size: "),
    ],
)
def test_settings_that_make_no_mask(settings, message):
    bundle = tiny_bundle()
    with pytest.raises(ArgumentError, match=message):
        replace(bundle, **settings)
    with pytest.raises(ArgumentError, match=message):
        VolumeInferer(bundle.preprocessing.as_json(), {}, **settings)


def test_settings_of_residual_maps_are_those_of_the_network(tmp_path):
    """However it is loaded: with another sign or seed the maps would be others, without a word."""
    bundle = replace(tiny_bundle(), residual_maps=SETTINGS)
    save_bundle(bundle, tmp_path / "bundle")
    loaded = load_bundle(tmp_path / "bundle")
    assert loaded.network.residual_map_settings == loaded.residual_maps == SETTINGS
    assert GRCSF.from_pretrained(tmp_path / "bundle").residual_map_settings == SETTINGS
    export_monai(loaded, tmp_path / "monai")
    text = json.loads((tmp_path / "monai" / "configs" / "inference.json").read_text())["network_def"]
    mae = text.pop("mae")
    autoencoder = MaskedAutoencoder(**{key: value for key, value in mae.items() if key != "_target_"})
    network = GRCSF(**{key: value for key, value in text.items() if key != "_target_"}, mae=autoencoder)
    assert network.residual_map_settings == SETTINGS
    with pytest.raises(ArgumentError, match="residual_map_settings: expected the masking ratios"):
        GRCSF(2, 1, 1, residual_map_settings=ResidualMapSettings((0.5,)))
    with pytest.raises(ArgumentError, match="residual_map_settings: expected those of residual maps"):
        GRCSF(2, 1, 1, residual_map_settings={"turns": 2})


def test_an_autocast_around_changes_nothing():
    predictor = Predictor(tiny_bundle(), precision="float32")
    image, affine = noise(30, 30, 9), np.diag([6.0, 6.0, 6.0, 1.0])
    alone = predictor(image, affine)
    with torch.autocast("cpu", torch.bfloat16):
        within = predictor(image, affine)
    for name, values in alone.values.items():
        assert torch.equal(values, within.values[name]), name


@pytest.mark.parametrize("space", ["LPS", "RAS", None])
def test_affines_of_another_space(space):
    image = MetaTensor(torch.from_numpy(noise(1, 30, 30, 9)), affine=torch.diag(torch.tensor([6.0, 6, 6, 1])))
    if space is not None:
        image.meta["space"] = space
    bundle = tiny_bundle()
    inferer = VolumeInferer(bundle.preprocessing.as_json(), {})
    network = bundle.network
    network.mae = bundle.mae
    if space == "LPS":
        with pytest.raises(ArgumentError, match="affine: expected one from voxels to RAS mm"):
            Predictor(bundle)(image)
        with pytest.raises(ArgumentError, match="affine: expected one from voxels to RAS mm"):
            inferer(image[None], network)
    else:
        assert Predictor(bundle)(image).mask.shape == (30, 30, 9)
        assert inferer(image[None], network).shape == (1, 1, 30, 30, 9)


@pytest.mark.parametrize("values", [(0, 255), (0, 1, 2), (-1, 1)])
def test_masks_of_other_values(values):
    mask = torch.tensor(values, dtype=torch.float32).repeat(32 * 32)[: 32 * 32].reshape(1, 1, 32, 32)
    with pytest.raises(ArgumentError, match="mask: expected 1 in lesions and 0 elsewhere"):
        GRCSFLoss()(torch.zeros(1, 1, 32, 32), mask)


def test_a_resampled_mask_may_leave_its_range_by_rounding():
    mask = torch.full((1, 1, 8, 8), 1.000001)
    mask[..., 4:] = -1e-8
    assert torch.isfinite(GRCSFLoss()(torch.zeros(1, 1, 8, 8), mask))


def test_a_single_channel_has_no_softmax():
    with pytest.raises(ArgumentError, match="logits: expected at least two channels with softmax"):
        GRCSFLoss(softmax=True)(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_patches_whose_size_the_scores_do_not_tell():
    """Of images of 28 pixels patches of 7 and, padded, of 8 make as many."""
    network, image = GRCSF(2, 1, 1, features=(4, 8, 8, 8), rcu_levels=(0, 1, 2)), torch.zeros(1, 1, 28, 28)
    output = network(image, return_maps=True)
    with pytest.raises(ArgumentError, match=r"GRCSFLoss\(patch_size=network.config\['patch_size'\]\)"):
        GRCSFLoss()(output, image)
    assert torch.isfinite(GRCSFLoss(patch_size=8)(output, image))


def test_slices_that_a_volume_does_not_have():
    volume = torch.arange(5.0).expand(4, 4, 5)
    for number in (-1, 5):
        with pytest.raises(ArgumentError, match="slices: expected numbers from 0 to 4"):
            GRCSF(2, 1, 1, neighbours=1).stack(volume, torch.tensor([0, number]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_optimized_in_another_dtype(dtype):
    torch.manual_seed(0)
    network = GRCSF(2, 1, 1, features=(32, 64), patch_size=4, rcu_levels=()).eval()
    image = torch.randn(1, 1, 40, 40)
    with torch.no_grad():
        expected = network(image)
        found = network.optimized_for_inference(dtype)(image if dtype == torch.float16 else image.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


def test_an_unknown_way_of_downsampling():
    with pytest.raises(ArgumentError, match="downsample: expected one of"):
        GRCSF(2, 1, 1, downsample="mean")


def test_a_bundle_that_was_made_before_can_be_replaced(tmp_path):
    bundle = Bundle(small(), None, tiny_bundle().preprocessing)
    save_bundle(bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "README.md").write_text("card")
    save_bundle(bundle, tmp_path / "bundle")
    assert load_bundle(tmp_path / "bundle").mae is None
