"""Channels of different intensities: each prepared as if it were alone, by options, in bundles and in predictions."""

import json
from dataclasses import asdict

import nibabel as nib
import numpy as np
import pytest
import torch
from heads import awake

from grcsf_fast import GRCSF, Predictor
from grcsf_fast.cli import program
from grcsf_fast.cli.options import joined
from grcsf_fast.cli.training_preprocessing import preprocessing_of
from grcsf_fast.data.channels import Channels, load_image
from grcsf_fast.data.intensities import Intensities
from grcsf_fast.data.volumes import Preprocessing, VolumeError, load_volume, prepare
from grcsf_fast.errors import ArgumentError
from grcsf_fast.pretrained.bundle import Bundle, BundleError, load_bundle, save_bundle

SHAPE = (24, 26, 22)
BODY = np.s_[4:20, 4:22, 4:18]
MIXED = Preprocessing(margin=99, others=(Intensities("ct", hu_window=(0.0, 80.0)),))


@pytest.fixture
def images(tmp_path):
    """A PET-like and a CT-like image of one body."""
    rng = np.random.default_rng(0)
    paths = []
    for number, (air, low, high) in enumerate(((0, 90, 110), (-1000, -50, 150))):
        data = np.full(SHAPE, air, np.float32)
        data[BODY] = rng.uniform(low, high, data[BODY].shape)
        paths.append(tmp_path / f"a_{number:04d}.nii.gz")
        nib.save(nib.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0])), paths[-1])
    return paths


def test_each_channel_as_if_it_were_alone(images):
    together = prepare(load_image(Channels("a", tuple(images))), MIXED)
    alone = [
        prepare(load_volume(images[0]), Preprocessing(margin=99)).data,
        prepare(load_volume(images[1]), Preprocessing(modality="ct", hu_window=(0.0, 80.0), margin=99)).data,
    ]
    assert torch.equal(together.data, torch.stack(alone))
    with pytest.raises(VolumeError, match="expected 2 channels, as there are intensities for, found 1"):
        prepare(load_volume(images[0]), MIXED)


def test_files_of_one_recipe_stay_as_they_were():
    before = (
        '{"spacing": [2.0, 2.0, 2.0], "modality": "ct", "percentiles": [0.5, 99.5], "hu_window": [-160.0, 240.0], '
        '"margin": 2}'
    )
    plain = Preprocessing.from_json(json.loads(before))
    assert plain == Preprocessing(modality="ct", constant_background=False)
    assert json.dumps(plain.as_json()) == before
    for one in (plain, Preprocessing(modality="ct")):
        assert Preprocessing.from_json(json.loads(json.dumps(one.as_json()))) == one
        assert one.of_channel(3) is one


def test_numbers_of_numpy():
    """Such as the spacing in a header."""
    found = Preprocessing(np.float32([2, 2, 3]), percentiles=np.array([1, 99]), margin=np.int64(3))
    assert json.loads(json.dumps(found.as_json()))["spacing"] == [2.0, 2.0, 3.0]
    assert found == Preprocessing((2.0, 2.0, 3.0), percentiles=(1.0, 99.0), margin=3)


def bundle_of(preprocessing, channels=("PET", "CT")):
    network = awake(GRCSF(2, len(channels), 1, features=(4, 8), rcu_levels=()))
    return Bundle(network, None, preprocessing, channels=channels)


def test_a_bundle_keeps_them_and_predicts_by_them(images, tmp_path):
    loaded = load_bundle(save_bundle(bundle_of(MIXED), tmp_path / "bundle"))
    assert loaded.preprocessing == MIXED
    prediction = Predictor(loaded)(images)
    assert prediction.report["settings"]["preprocessing"]["others"] == json.loads(json.dumps([asdict(MIXED.others[0])]))
    assert float(prediction.prepared.data[1].min()) == -1
    with pytest.raises(BundleError, match="expected intensities of 3 channels or of one, found 2"):
        Predictor(bundle_of(MIXED, ("PET", "CT", "T1")))
    path = tmp_path / "bundle" / "config.json"
    config = json.loads(path.read_text())
    config["preprocessing"]["others"] = [{"modality": "pet"}]
    path.write_text(json.dumps(config))
    with pytest.raises(BundleError, match="modality: expected 'mri' or 'ct', got 'pet'"):
        load_bundle(tmp_path / "bundle")


def options(*given):
    return program._parser().parse_args(joined(["train-mae", "-o", "x", *given]))


def test_the_options_say_one_or_one_per_channel(capsys):
    assert preprocessing_of(options(), None, 2) == Preprocessing()
    one = options("--modality", "ct", "--hu-window", "-160,100")
    assert preprocessing_of(one, None, 2) == Preprocessing(modality="ct", hu_window=(-160.0, 100.0))
    found = preprocessing_of(options("--modality", "mri,ct", "--hu-window", "-10,20/0,80"), None, 2)
    assert found == Preprocessing(hu_window=(-10.0, 20.0), others=MIXED.others)
    found = preprocessing_of(options("--modality", "ct,ct", "--hu-window", "-160,240"), None, 2)
    assert found == Preprocessing(modality="ct")
    for given, channels, message in (
        (("--modality", "mri,ct"), 1, "--modality: expected one, got 2"),
        (("--modality", "mri,ct"), 3, "--modality: expected one, or 3 for as many channels, got 2"),
        (
            ("--modality", "ct", "--hu-window", "0,1/0,2/0,3"),
            2,
            "--hu-window: expected one, or 2 for as many channels, got 3",
        ),
        (("--modality", "ct", "--hu-window", "0,80/9,9"), 2, "hu_window: expected lower < upper, got"),
    ):
        with pytest.raises(ArgumentError, match=message):
            preprocessing_of(options(*given), None, channels)
    with pytest.raises(SystemExit):
        options("--modality", "mri,pet")
    assert "expected one of mri, ct, found pet" in capsys.readouterr().err


def test_a_recipe_is_compared_with_the_bundle(capsys):
    given = options("--modality", "mri,ct", "--hu-window", "-160,240/0,80")
    given.recipe_values = {"modality": given.modality, "hu_window": given.hu_window}
    assert preprocessing_of(given, bundle_of(MIXED), 2) == MIXED
    assert capsys.readouterr().out == ""
    preprocessing_of(given, bundle_of(Preprocessing()), 2)
    assert "modality mri of the bundle holds; the recipe has ('mri', 'ct')" in capsys.readouterr().out
