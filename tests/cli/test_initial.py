"""Trainings that start from a bundle: what of it holds; and what is refused before any case is read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from heads import tiny_bundle
from pairs import write_case

from grcsf_fast import MaskedAutoencoder
from grcsf_fast.cli import main
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.pretrained.bundle import Bundle, load_bundle, save_bundle
from grcsf_fast.training.checkpoint import weights_digest

SMALL = [
    *("--steps", "2", "--batch-size", "2", "--crop-size", "16,16", "--crop-size-jitter", "0", "--warmup-steps", "1"),
    *("--cache-size", "2", "--precision", "float32", "--augment", "none", "--workers", "0"),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, name in enumerate("abc"):
        write_case(tmp_path, name, corner=(8 + number, 9, 7))
    return tmp_path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """With features 4,8,8 and an RCU at levels 0 and 1."""
    made = replace(tiny_bundle(importance_threshold=0.4), preprocessing=Preprocessing((2.0, 2.0, 2.0)))
    return save_bundle(made, tmp_path_factory.mktemp("bundle") / "tiny")


def train(folder, *more) -> int:
    pairs = ("-i", folder / "images", "-l", folder / "masks", "--validation", 1)
    return main([str(one) for one in ["train", *pairs, "-o", folder / "out", *SMALL, *more]])


def train_mae(folder, *more) -> int:
    return main([str(one) for one in ["train-mae", "-i", folder / "images", "-o", folder / "out", *SMALL, *more]])


def mae_bundle(folder, **settings) -> Path:
    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1}
    mae = MaskedAutoencoder(2, 1, **sizes | settings)
    return save_bundle(Bundle(None, mae, Preprocessing((2.0, 2.0, 2.0))), folder / "mae")


def test_the_importance_threshold_was_for_other_weights(folder, bundle, capsys):
    """Sizes that are the bundle's own may be given; the training goes on as any other."""
    same = ("--initial", bundle, "--features", "4,8,8", "--rcu-levels", "0,1", "--neighbours", 0)
    assert train(folder, *same) == 0
    assert "importance_threshold 0.4 was for the bundle's weights: now 0\n" in capsys.readouterr().out
    assert train(folder, "--initial", bundle, "--resume", "--steps", 3) == 0
    found = load_bundle(folder / "out" / "bundle")
    assert found.network.importance_threshold == 0
    assert found.card["initial_sha256"] == load_bundle(bundle).weights_sha256
    assert "mae_sha256" not in found.card


@pytest.mark.parametrize(
    ("given", "held"),
    [
        (("--features", "4,8"), "(4, 8, 8), got (4, 8)"),
        (("--patch-size", "2"), "4, got 2"),
        (("--rcu-levels", "0"), "(0, 1), got (0,)"),
        (("--no-gcu",), "True, got False"),
        (("--downsample", "avg"), "got avg"),
        (("--neighbours", "1"), "0, got 1"),
    ],
)
def test_other_sizes_than_the_network_has_are_refused(folder, bundle, capsys, given, held):
    assert train(folder, "--initial", bundle, *given) == 2
    said = capsys.readouterr()
    name = given[0].replace("--no-", "--")
    assert said.err.startswith(f"error: {name}: expected none beside --initial, whose network has ")
    assert said.err.endswith(f"{held}\n")
    assert said.out == ""


def test_other_sizes_than_the_autoencoder_has_are_refused(folder, capsys):
    initial = mae_bundle(folder)
    assert train_mae(folder, "--initial", initial, "--embed-dim", 32) == 2
    assert "--embed-dim: expected none beside --initial, whose network has 16, got 32" in capsys.readouterr().err
    assert train_mae(folder, "--initial", initial, "--embed-dim", 16) == 0


def test_other_sizes_of_a_recipe_are_said(folder, bundle, capsys):
    recipe = folder / "mine.json"
    recipe.write_text(json.dumps({"format": "grcsf-fast recipe", "version": 1, "train": {"features": [4, 8]}}))
    assert train(folder, "--initial", bundle, "--recipe", recipe, "--steps", 1) == 0
    assert "features (4, 8, 8) of the bundle holds; the recipe has (4, 8)\n" in capsys.readouterr().out


def test_an_autoencoder_that_restores_learns_from_synthetic_subjects_alone(folder, capsys):
    initial = mae_bundle(folder, restore=True)
    assert train_mae(folder, "--initial", initial) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: --initial: expected an autoencoder that does not restore")
    assert said.err.endswith(f"got {initial}\n")
    assert said.out == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--crop-size", "16,20"), "expected multiples of the patch of 8, got 16,20 and 0"),
        (("--crop-size-jitter", "4"), "expected multiples of the patch of 8, got 16,16 and 4"),
        (("--patch-size", "6"), "expected multiples of the patch of 6, got 16,16 and 0"),
    ],
)
def test_crops_of_the_autoencoder_are_of_whole_patches(folder, capsys, given, message):
    assert train_mae(folder, *given) == 2
    said = capsys.readouterr()
    assert said.err == f"error: --crop-size and --crop-size-jitter: {message}\n"
    assert said.out == ""


def test_boxes_for_an_autoencoder_of_slices(folder, capsys):
    assert train_mae(folder, "--initial", mae_bundle(folder), "--crop-size", "16,16,16") == 2
    assert "--crop-size: expected 2 edge lengths for this autoencoder, got (16, 16, 16)" in capsys.readouterr().err


def differences(capsys) -> list[str]:
    """What a refused training differs in from the one that was begun."""
    error = capsys.readouterr().err
    assert "checkpoint.safetensors: expected to go on with the same training; only --steps, " in error
    return [line.strip() for line in error.splitlines()[1:]]


def test_another_autoencoder_of_the_same_sizes_is_refused(folder, capsys):
    """The steps that are left would see other residual maps."""
    first, other = (mae_bundle(folder).rename(folder / name) for name in ("first", "other"))
    given = ("--features", "4,8", "--rcu-levels", "0", "--mae")
    assert train(folder, *given, first) == 0
    capsys.readouterr()
    assert train(folder, *given, other, "--resume", "--steps", 3) == 2
    (line,) = differences(capsys)
    one, two = (weights_digest(load_bundle(bundle).mae) for bundle in (first, other))
    assert line == f'mae_sha256: the checkpoint has "{one}", now "{two}"'
    assert train(folder, *given, first, "--resume", "--steps", 3) == 0


@pytest.mark.parametrize("command", [train, train_mae])
def test_another_bundle_to_begin_with_is_refused(folder, bundle, capsys, command):
    """Of the same sizes, and with the same autoencoder where that is not what is trained."""
    made = load_bundle(bundle)
    with torch.no_grad():
        (made.network.output.bias if command is train else made.mae.mask_token).add_(1)
    other = save_bundle(made, folder / "other")
    assert command(folder, "--initial", bundle) == 0
    capsys.readouterr()
    assert command(folder, "--initial", other, "--resume", "--steps", 3) == 2
    one, two = (load_bundle(path).weights_sha256 for path in (bundle, other))
    assert differences(capsys) == [f'initial_sha256: the checkpoint has "{one}", now "{two}"']


def test_seeds_are_few_for_synthetic_subjects_alone(folder, capsys):
    assert main(["train-mae", "-o", str(folder / "out"), "--seed", "50"]) == 2
    assert "--seed: expected 0 to 49, got 50: further synthetic subjects are for validation" in capsys.readouterr().err
    assert train_mae(folder, "--seed", -1) == 2
    assert "error: --seed: expected 0 or more, got -1" in capsys.readouterr().err
    assert train_mae(folder, "--seed", 2**31 - 1, "--steps", 1, "--embed-dim", 16, "--num-heads", 2) == 0
