"""Scans of thick slices, 0.9 x 0.9 x 5 mm: a 2-D network at their own spacing, as the how-to says."""

import json

import nibabel as nib
import numpy as np
import pytest
from commands import TINY_MAE, run
from pairs import write_thick

from grcsf_fast import load_volume, prepare
from grcsf_fast.data.volumes import Preprocessing

SPACING = (0.9, 0.9, 5.0)
AFFINE = np.diag([*SPACING, 1.0])
SMALL = [
    *("--steps", "2", "--batch-size", "2", "--warmup-steps", "0", "--cache-size", "2", "--augment", "all"),
    *("--precision", "float32", "--crop-size", "32,32", "--crop-size-jitter", "0", "--workers", "0"),
]


@pytest.fixture
def folder(tmp_path):
    write_thick(tmp_path, "abc", AFFINE)
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
    assert mask.shape == (44, 40, 10)
    assert np.allclose(mask.affine, AFFINE)
    assert run("evaluate", "-p", folder / "out" / "c.nii.gz", "-t", masks / "c.nii.gz") == 0
