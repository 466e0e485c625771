"""Scans of thick slices, 0.9 x 0.9 x 5 mm: a 2-D network at their own spacing, as the how-to says."""

import json

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast import load_volume, prepare
from grcsf_fast.cli import main
from grcsf_fast.data.volumes import Preprocessing

SPACING = (0.9, 0.9, 5.0)
AFFINE = np.diag([*SPACING, 1.0])
SHAPE = (52, 48, 9)
SMALL = [
    *("--steps", "2", "--batch-size", "2", "--warmup-steps", "0", "--cache-size", "2", "--augment", "all"),
    *("--precision", "float32", "--crop-size", "32,32", "--crop-size-jitter", "0", "--workers", "0"),
]
TINY_MAE = ["--embed-dim", "16", "--depth", "1", "--num-heads", "2", "--decoder-dim", "16", "--decoder-num-heads", "2"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number, name in enumerate("abc"):
        rng = np.random.default_rng(number)
        image, mask = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint8)
        image[4:48, 4:44, 1:8] = rng.uniform(90, 110, (44, 40, 7))
        mask[20:28, 18:26, 4] = 1
        image[mask > 0] = 150
        nib.save(nib.Nifti1Image(image, AFFINE), tmp_path / "images" / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(mask, AFFINE), tmp_path / "masks" / f"{name}.nii.gz")
    return tmp_path


def test_slices_are_those_of_the_file(folder):
    """Nothing is interpolated, although a header holds 0.9 in single precision: intensities are scaled alone."""
    path = folder / "images" / "a.nii.gz"
    prepared = prepare(load_volume(path), Preprocessing(SPACING))
    seen = prepared.data.numpy()
    stored = np.asarray(nib.load(path).dataobj)[prepared.box]
    assert seen.shape == stored.shape
    head = (stored > 95) & (stored < 105)
    slope, offset = np.polyfit(stored[head], seen[head], 1)
    assert slope > 0
    assert np.abs(slope * stored[head] + offset - seen[head]).max() < 1e-3
    # By default the five millimetres between slices are filled in.
    assert prepare(load_volume(path), Preprocessing()).data.shape[2] > 2 * seen.shape[2]


def test_a_network_of_slices_at_their_own_spacing(folder):
    images, masks, mae, net = (folder / name for name in ("images", "masks", "mae", "net"))
    assert run("train-mae", "-i", images, "--spacing", "0.9,0.9,5", "-o", mae, *SMALL, *TINY_MAE) == 0
    given = ("--mae", mae / "bundle", "--features", "4,8", "--rcu-levels", "0", "--validation", "1")
    assert run("train", "-i", images, "-l", masks, "-o", net, *given, *SMALL) == 0
    assert run("predict", "-i", images / "c.nii.gz", "-m", net / "bundle", "-o", folder / "out") == 0
    settings = json.loads((folder / "out" / "c_report.json").read_text())["settings"]
    assert settings["preprocessing"]["spacing"] == list(SPACING)
    assert (settings["network"]["spatial_dims"], settings["network"]["neighbours"]) == (2, 1)
    mask = nib.load(folder / "out" / "c.nii.gz")
    assert mask.shape == SHAPE
    assert np.allclose(mask.affine, AFFINE)
    assert run("evaluate", "-p", folder / "out" / "c.nii.gz", "-t", masks / "c.nii.gz") == 0
