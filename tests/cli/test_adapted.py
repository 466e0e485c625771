"""Trainings that start from a bundle of other channels or labels; what they hold out of a folder, and say once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from heads import tiny_bundle
from pairs import AFFINE, write_case

from grcsf_fast import GRCSF, MaskedAutoencoder
from grcsf_fast.cli import main
from grcsf_fast.data.intensities import Intensities
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.pretrained.bundle import Bundle, load_bundle, save_bundle

SMALL = [
    *("--steps", "1", "--batch-size", "2", "--crop-size", "16,16", "--crop-size-jitter", "0", "--warmup-steps", "1"),
    *("--cache-size", "2", "--precision", "float32", "--augment", "none", "--workers", "0", "--learning-rate", "1e-9"),
]
SIZES = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1}
PREPROCESSING = Preprocessing((2.0, 2.0, 2.0))
FIRST = "encoder.0.0.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three cases of one channel, and the same with two in ``both``; ``labels`` are masks that hold 1 and 2."""
    for name in ("both", "labels"):
        (tmp_path / name).mkdir()
    for number, name in enumerate("abc"):
        write_case(tmp_path, name, corner=(8 + number, 9, 7))
        for channel in range(2):
            shutil.copy(tmp_path / "images" / f"{name}.nii.gz", tmp_path / "both" / f"{name}_{channel:04d}.nii.gz")
        mask = np.asarray(nib.load(tmp_path / "masks" / f"{name}.nii.gz").dataobj).copy()
        mask[:, :11] *= 2
        nib.save(nib.Nifti1Image(mask, AFFINE), tmp_path / "labels" / f"{name}.nii.gz")
    return tmp_path


@pytest.fixture
def bundle(tmp_path) -> Path:
    made = replace(tiny_bundle(importance_threshold=0.4), preprocessing=PREPROCESSING)
    return save_bundle(made, tmp_path / "initial")


def train(folder, images, *more, masks="masks") -> int:
    pairs = ("-i", folder / images, "-l", folder / masks, "--validation", 1)
    return main([str(one) for one in ["train", *pairs, "-o", folder / "out", *SMALL, *more]])


def mae_of(folder, *channels) -> Path:
    mae = MaskedAutoencoder(2, len(channels), **SIZES)
    return save_bundle(Bundle(None, mae, PREPROCESSING, channels=channels), folder / "mae")


def test_a_network_is_adapted_to_more_channels(folder, bundle, capsys):
    mae = mae_of(folder, "T1w", "FLAIR")
    assert train(folder, "both", "--initial", bundle, "--mae", mae) == 0
    said = capsys.readouterr().out
    assert "importance_threshold 0.4 was for the bundle's weights: now 0\n" in said
    assert "weights of the first convolution: the bundle's for T1w, those of FLAIR begin at 0\n" in said
    found, before = load_bundle(folder / "out" / "bundle"), load_bundle(bundle)
    assert (found.channels, found.network.in_channels, found.mae.in_channels) == (("T1w", "FLAIR"), 2, 2)
    assert found.network.importance_threshold == 0
    own, given = found.network.state_dict(), before.network.state_dict()
    torch.testing.assert_close(own[FIRST][:, :1], given[FIRST], rtol=0, atol=1e-6)
    assert own[FIRST][:, 1].abs().max() < 1e-6
    torch.testing.assert_close(own["output.weight"], given["output.weight"], rtol=0, atol=1e-6)
    assert found.card["initial_sha256"] == before.weights_sha256


def test_an_autoencoder_of_the_channels_is_asked_for_with_the_way_to_one(folder, bundle, capsys):
    assert train(folder, "both", "--initial", bundle, "--channels", "T1w,FLAIR") == 2
    assert capsys.readouterr().err == (
        f"error: --mae: expected the bundle of an autoencoder of T1w, FLAIR, as that of {bundle} knows 1 (image), "
        "got none; train it first: grcsf-fast train-mae --channels T1w,FLAIR -o MAE, then this command with --mae "
        "MAE/bundle\n"
    )
    given = ["-i", str(folder / "both"), "-o", str(folder / "out"), "--channels", "T1w,FLAIR", "--initial", str(bundle)]
    assert main(["train-mae", *given]) == 2
    said = capsys.readouterr().err
    assert (
        f"--channels: expected 1, those of {bundle} (image), got T1w, FLAIR: an autoencoder keeps its channel" in said
    )
    assert "`grcsf-fast train-mae --channels T1w,FLAIR` without --initial trains one of these" in said


def test_without_rcu_no_autoencoder_is_needed(folder, capsys):
    network = GRCSF(2, 1, 1, (4, 8), rcu_levels=())
    initial = save_bundle(Bundle(network, None, PREPROCESSING), folder / "initial")
    assert train(folder, "both", "--initial", initial, "--channels", "T1w,FLAIR") == 0
    assert load_bundle(folder / "out" / "bundle").channels == ("T1w", "FLAIR")
    shutil.rmtree(folder / "out")
    two = Bundle(GRCSF(2, 2, 1, (4, 8), rcu_levels=()), None, PREPROCESSING, channels=("T1w", "CT"))
    initial = save_bundle(two, folder / "two")
    assert train(folder, "images", "--initial", initial, "--channels", "T1w") == 0
    shutil.rmtree(folder / "out")
    capsys.readouterr()
    # By their names the weights would be those of another image.
    assert train(folder, "images", "--initial", initial, "--channels", "CT") == 2
    assert f"--channels: expected CT in place 2, where {initial} has it (T1w, CT), got CT" in capsys.readouterr().err
    others = replace(PREPROCESSING, others=(Intensities("ct"),))
    initial = save_bundle(replace(two, preprocessing=others), folder / "two")
    assert train(folder, "images", "--initial", initial, "--channels", "T1w") == 2
    assert "prepares each of T1w, CT in its own way, got T1w" in capsys.readouterr().err


def test_other_labels_have_a_new_last_convolution(folder, bundle, capsys):
    """Also where there are as many, as the outputs meant others."""
    rim = ("--classes", "rim=1,core=2")
    assert train(folder, "images", "--initial", bundle, *rim, masks="labels") == 0
    assert "labels rim, core: the last convolution is new\n" in capsys.readouterr().out
    found, before = load_bundle(folder / "out" / "bundle"), load_bundle(bundle)
    assert (found.labels.names, found.network.out_channels) == (("rim", "core"), 3)
    own, given = found.network.state_dict(), before.network.state_dict()
    torch.testing.assert_close(own[FIRST], given[FIRST], rtol=0, atol=1e-6)
    again = (folder / "out" / "bundle").rename(folder / "classes")
    shutil.rmtree(folder / "out")
    assert train(folder, "images", "--initial", again, masks="labels") == 0  # those of the bundle
    same = load_bundle(folder / "out" / "bundle")
    assert same.labels == found.labels
    torch.testing.assert_close(same.network.state_dict()["output.weight"], own["output.weight"], rtol=0, atol=1e-6)
    shutil.rmtree(folder / "out")
    other = ("--classes", "core=2,rim=1", "--seed", 1)
    assert train(folder, "images", "--initial", again, *other, masks="labels") == 0
    other = load_bundle(folder / "out" / "bundle")
    assert other.labels.names == ("core", "rim")
    assert not torch.allclose(other.network.state_dict()["output.weight"], own["output.weight"], atol=1e-3)


@pytest.mark.parametrize(("asked", "held"), [(1, 1), (6, 1), (0, 0)])
def test_what_is_held_out_of_a_folder_is_said_and_noted(folder, bundle, capsys, asked, held):
    pairs = ("-i", folder / "images", "-l", folder / "masks", "--validation", asked)
    given = ["train", *pairs, "-o", folder / "out", *SMALL, "--initial", bundle]
    assert main([str(one) for one in given]) == 0
    card = load_bundle(folder / "out" / "bundle").card
    names = json.loads((folder / "out" / "held_out.json").read_text())
    assert (card["held_out_number"], len(names)) == (held, held)
    assert set(names) <= set("abc")
    said = f"{held} of 3 cases held out for validation{': ' if names else ''}{', '.join(names)}\n"
    assert said in capsys.readouterr().out
    assert "interrupted" not in card["options"]
    json.dumps(dict(card))


@pytest.mark.filterwarnings("default")
def test_a_training_says_once_that_its_images_are_no_ct(folder):
    given = ["train-mae", "-i", folder / "images", "--modality", "ct", "-o", folder / "out", *SMALL]
    sizes = ("--patch-size", 4, "--embed-dim", 16, "--depth", 1, "--num-heads", 2, "--decoder-dim", 16)
    with pytest.warns(UserWarning, match="is this an MRI") as shown:
        assert main([str(one) for one in [*given, *sizes, "--decoder-depth", 1, "--decoder-num-heads", 2]]) == 0
    assert [str(one.message).rpartition("(")[2] for one in shown] == ["and 2 more like it)"]
