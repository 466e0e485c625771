"""Trainings of thin boxes, and options that do not fit each other, which are refused before cases are read."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from commands import TINY_MAE, run
from pairs import write_thick

from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.networks.mae import MaskedAutoencoder
from grcsf_fast.pretrained.bundle import Bundle, load_bundle, save_bundle

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])
SMALL = [
    *("--steps", "1", "--batch-size", "2", "--warmup-steps", "0", "--cache-size", "2", "--augment", "none"),
    *("--precision", "float32", "--spacing", "2,2,5", "--workers", "0"),
]


@pytest.fixture
def folder(tmp_path):
    """Two scans of thick slices with a lesion each."""
    write_thick(tmp_path, "ab", AFFINE)
    return tmp_path


def jitter(folder):
    return json.loads((folder / "bundle" / "config.json").read_text())["card"]["options"]["crop_size_jitter"]


def test_thin_boxes_have_a_jitter_that_fits(folder):
    """That of 16 was refused for an edge of 8, a value that nobody had given."""
    crop = ("--crop-size", "32,32,8")
    mae, network = folder / "mae", folder / "network"
    assert run("train-mae", "-i", folder / "images", "-o", mae, *crop, *SMALL, *TINY_MAE) == 0
    assert jitter(mae) == [8, 8, 0]
    assert load_bundle(mae / "bundle").mae.spatial_dims == 3
    given = ("-i", folder / "images", "-l", folder / "masks", "--validation", "0", "--mae", mae / "bundle")
    small = (*SMALL[: SMALL.index("--spacing")], "--features", "4,8", "--rcu-levels", "0", "--workers", "0")
    assert run("train", *given, "-o", network, *crop, *small) == 0
    assert jitter(network) == [8, 8, 0]
    assert load_bundle(network / "bundle").roi_size == (32, 32, 8)
    # Given, it is that of every axis.
    assert run("train", *given, "-o", folder / "given", *crop, *small, "--crop-size-jitter", "4") == 0
    assert jitter(folder / "given") == 4


def test_the_default_of_slices_is_what_it_was(folder):
    assert run("train-mae", "-i", folder / "images", "-o", folder / "mae", *SMALL, *TINY_MAE) == 0
    assert jitter(folder / "mae") == 16


def test_a_jitter_that_is_given_is_refused_by_its_option(folder, capsys):
    for crop, value in (("32,32,8", 16), ("32,32,8", 8)):
        given = ("--crop-size", crop, "--crop-size-jitter", value)
        assert run("train-mae", "-i", folder / "images", "-o", folder / "out", *SMALL, *TINY_MAE, *given) == 2
        message = f"error: --crop-size-jitter: expected 0 to less than an edge of the crop (32, 32, 8), got {value}\n"
        assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("crop", "dims", "form"), [((), 3, "X,Y"), (("--crop-size", "32,32,8"), 2, "X,Y,Z")], ids=["slices", "boxes"]
)
def test_an_autoencoder_of_other_dimensions_is_refused_at_once(folder, capsys, crop, dims, form):
    mae = MaskedAutoencoder(dims, 1, 8, embed_dim=12, depth=1, num_heads=2, decoder_dim=12, decoder_depth=1)
    save_bundle(Bundle(None, mae, Preprocessing()), folder / "mae")
    (folder / "images" / "a.nii.gz").write_bytes(b"nothing that can be read")
    given = ("-i", folder / "images", "-l", folder / "masks", "--mae", folder / "mae", "--workers", "0")
    assert run("train", *given, "-o", folder / "out", *crop, "--rcu-levels", "0", "--features", "4,8") == 2
    said = capsys.readouterr().err
    edges = crop[1] if crop else "96,112"
    assert said.startswith(
        f"error: --mae: expected an autoencoder of {5 - dims} dimensions, as --crop-size {edges} is, "
    )
    assert said.endswith(f"got one of {dims}; train one with `grcsf-fast train-mae --crop-size {form}`\n")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (("--hu-window", "0,80"), "--modality mri, the default"),
        (("--hu-window", "0,80", "--modality", "mri"), "--modality mri"),
        (("--hu-window", "-160,240/0,80", "--modality", "mri,mri", "--channels", "a,b"), "--modality mri,mri"),
    ],
)
def test_a_window_without_ct_is_refused(folder, capsys, given, got):
    """It was kept in the bundle, and nothing was done by it."""
    assert run("train-mae", "-i", folder / "images", "-o", folder / "out", *TINY_MAE, *given) == 2
    message = f"error: --hu-window: expected --modality ct beside it, as MRI has no Hounsfield units, got {got}\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("values", "given", "refused"),
    [
        ({"hu-window": [0, 80]}, (), True),
        ({"hu-window": [0, 80], "modality": "mri"}, (), True),
        ({"hu-window": [0, 80], "modality": "ct"}, (), False),
        ({"hu-window": [0, 80], "modality": "ct"}, ("--modality", "mri"), False),
        ({"modality": "ct"}, ("--hu-window", "0,80"), False),
        ({}, ("--hu-window", "0,80/0,90", "--modality", "mri,ct", "--channels", "a,b"), False),
    ],
)
def test_windows_of_recipes(folder, capsys, values, given, refused):
    """A modality that is given by hand in place of a recipe's leaves its window without a meaning."""
    recipe = {"format": "grcsf-fast recipe", "version": 1, "trainings": values}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    # Refused in any case, by what is looked at later.
    crop = ("--crop-size", "30,30")
    assert (
        run("train-mae", "--recipe", folder / "recipe.json", "-i", folder / "images", "-o", folder / "o", *given, *crop)
        == 2
    )
    said = capsys.readouterr().err
    assert ("error: --hu-window: expected --modality ct" in said) == refused
    assert ("multiples of the patch of 8" in said) == (not refused)


def test_pairs_of_several_channels_are_refused_when_they_are_listed(folder, capsys):
    image = nib.load(folder / "images" / "b.nii.gz")
    four = nib.Nifti1Image(np.stack([image.get_fdata(dtype=np.float32)] * 2, -1), AFFINE)
    nib.save(four, folder / "images" / "b.nii.gz")
    command = ("cases", "pairs", folder / "images", folder / "masks", "-o", folder / "cases.json", "--folds", 2)
    assert run(*command) == 2
    said = capsys.readouterr().err
    assert f"error: {folder / 'images' / 'b.nii.gz'}: expected one image, found 2 along its fourth axis; " in said
    # The other case has one image: no command names channels of both.
    assert said.endswith("; make a file of each\n")
    # Of one volume it is an image like any other.
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32)[..., None], AFFINE), folder / "images" / "b.nii.gz")
    assert run(*command) == 0
    # A file for each channel.
    for name in ("images", "masks"):
        (folder / name / "b.nii.gz").unlink()
    (folder / "images" / "a.nii.gz").rename(folder / "images" / "a_0000.nii.gz")
    shutil.copy(folder / "images" / "a_0000.nii.gz", folder / "images" / "a_0001.nii.gz")
    capsys.readouterr()
    assert run(*command) == 2
    said = capsys.readouterr().err
    assert "channels of one case by their names" in said
    assert "or by patterns of `grcsf-fast cases`\n" in said
