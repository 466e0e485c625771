"""Training: exact resume after a kill, refusals, log and curves, and a loss that falls. Tiny networks throughout."""

import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from trainings import (
    PREPROCESSING,
    RESIDUAL,
    Kept,
    assert_same,
    kill_at,
    patch_crops,
    rows,
    run,
    tiny_mae,
    tiny_network,
    training_run,
    weights,
)

from grcsf_fast import MaskedAutoencoder
from grcsf_fast.cli import main
from grcsf_fast.datasets.cases import Case
from grcsf_fast.errors import ArgumentError
from grcsf_fast.networks.mae import TOP_SLICES
from grcsf_fast.pretrained.bundle import load_bundle
from grcsf_fast.training.autoencoder import train_mae
from grcsf_fast.training.checkpoint import TrainError
from grcsf_fast.training.settings import TrainSettings
from grcsf_fast.training.synthetic import SyntheticSource


@pytest.mark.parametrize("kind", ["mae", "network"])
def test_a_killed_training_resumes_exactly(tmp_path, monkeypatch, kind):
    """Six steps at once, or killed in the fifth with a checkpoint after the third: the same bits."""
    whole = weights(run(kind, tmp_path / "whole"))
    again = weights(run(kind, tmp_path / "again"))
    assert_same(whole, again)

    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(kind, tmp_path / "killed")
    assert not (tmp_path / "killed" / "bundle").exists()
    assert [row["step"] for row in rows(tmp_path / "killed")] == ["1", "2", "3", "4"]
    resumed = weights(run(kind, tmp_path / "killed", resume=True))
    assert_same(whole, resumed)

    logs = [rows(tmp_path / name) for name in ("whole", "killed")]
    assert [row["step"] for row in logs[1]] == ["1", "2", "3", "4", "5", "6"]
    for first, second in zip(*logs, strict=True):
        assert first | {"seconds": ""} == second | {"seconds": ""}


KILLED = """
import signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from functools import partial
import trainings
torch.set_num_threads(1)
calls = []

def slow(sample, *arguments):
    calls.append(1)
    if len(calls) == 5:
        print("in step 5", flush=True)
        signal.pause()
    return sample(*arguments)

real = trainings.sampling.sample_crops
trainings.autoencoder.sample_crops = partial(slow, real)
trainings.run("mae", Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_training_killed_by_the_system_resumes_exactly(tmp_path):
    """SIGKILL leaves no time for anything; half a row at the end of the log stands for a write cut short."""
    whole = weights(run("mae", tmp_path / "whole"))
    output = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(Path(__file__).parents[1] / "helpers"), str(output)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "in step 5\n"
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (output / "checkpoint.safetensors").exists()
    with (output / "log.csv").open("a") as file:
        file.write("5,0.7")
    assert_same(whole, weights(run("mae", output, resume=True)))
    assert [row["step"] for row in rows(output)] == ["1", "2", "3", "4", "5", "6"]
    assert rows(output)[3]["loss"] == rows(tmp_path / "whole")[3]["loss"]


def test_resume_of_a_finished_training_writes_the_same_bundle(tmp_path):
    first = weights(run("mae", tmp_path))
    log = (tmp_path / "log.csv").read_bytes()
    assert_same(first, weights(run("mae", tmp_path, resume=True)))
    assert (tmp_path / "log.csv").read_bytes() == log


def test_seeds_and_settings_matter(tmp_path):
    first = weights(run("mae", tmp_path / "a", steps=2))
    other = weights(run("mae", tmp_path / "b", steps=2, seed=1))
    plain = weights(run("mae", tmp_path / "c", steps=2, augment="none"))
    assert not torch.equal(first["predict.weight"], other["predict.weight"])
    assert not torch.equal(first["predict.weight"], plain["predict.weight"])


def test_a_checkpoint_in_the_way(tmp_path):
    run("mae", tmp_path, steps=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(TrainError, match=re.escape(f"{checkpoint}: a training was begun here; go on with --resume")):
        run("mae", tmp_path, steps=1)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(tmp_path):
    run("mae", tmp_path / "resumed", resume=True)
    run("mae", tmp_path / "plain")
    first, second = (load_file(tmp_path / name / "bundle" / "model.safetensors") for name in ("resumed", "plain"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_checkpoint_that_is_none(tmp_path, content):
    """Empty, garbage, and a safetensors file of another maker."""
    (tmp_path / "checkpoint.safetensors").write_bytes(content)
    with pytest.raises(TrainError, match=re.escape(f"{tmp_path / 'checkpoint.safetensors'}: expected a checkpoint")):
        run("mae", tmp_path, resume=True)


def test_log_and_curves_of_a_network(tmp_path):
    """A row each second step, with the validation's columns where there was one; the last step always."""
    validation = [Kept()[50], Kept()[51]]
    run("network", tmp_path, validation=validation, steps=7, log_every=2, validate_every=3, card={"who": "test"})
    log = rows(tmp_path)
    # Step 3 is a validation between two rows of the log.
    assert [row["step"] for row in log] == ["2", "3", "4", "6", "7"]
    assert [row["step"] for row in log if row["validation_dice"]] == ["3", "6", "7"]
    for row in log:
        if row["validation_dice"]:
            assert 0 <= float(row["validation_dice"]) <= 1
            assert 0 <= float(row["validation_dice_median"]) <= 1
        if row["step"] == "3":
            assert row["loss"] == ""
            continue
        loss = float(row["segmentation_loss"]) + 0.2 * float(row["score_loss"])
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-4)
        assert float(row["seconds"]) > 0
    # Two steps of warm-up to the peak, then the cosine.
    rates = [float(row["learning_rate"]) for row in log if row["learning_rate"]]
    peak = TrainSettings().learning_rate
    assert rates == pytest.approx([peak * 0.5 * (1 + np.cos(np.pi * share)) for share in (0, 0.2, 0.6, 0.8)], rel=1e-4)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    card = load_bundle(tmp_path / "bundle").card
    assert card == {
        "who": "test",
        "weights": {"kind": "of the optimiser", "chosen": "the last step", "step": 7},
        "precision": "float32",
        "precision_reason": "as asked for",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "bundle",
        "checkpoint.safetensors",
        "curves.png",
        "log.csv",
    ]


@pytest.mark.parametrize("validate_every", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_validation_does_not_change_the_training(tmp_path, validate_every):
    plain = weights(run("network", tmp_path / "plain"))
    watched = weights(run("network", tmp_path / "b", validation=[Kept()[50]], validate_every=validate_every))
    assert_same(plain, watched)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_network_without_rcu(tmp_path, spatial_dims):
    """No autoencoder, no score loss; a 3-D network's bundle holds its window."""
    crop = (16, 12, 10)[:spatial_dims]
    network = tiny_network(spatial_dims=spatial_dims, rcu_levels=())
    bundle = load_bundle(run("network", tmp_path, network=network, steps=2, crop_size=crop, batch_size=2))
    assert bundle.mae is None
    assert bundle.roi_size == (crop if spatial_dims == 3 else None)
    assert bundle.network.config["spatial_dims"] == spatial_dims
    assert all(row["score_loss"] == "" for row in rows(tmp_path))


def test_the_bundle_says_what_it_was_trained_with(tmp_path):
    bundle = load_bundle(run("network", tmp_path, steps=1, network=tiny_network(features=(4, 6))))
    assert bundle.preprocessing == PREPROCESSING
    assert bundle.residual_maps == RESIDUAL
    assert bundle.network.config["features"] == [4, 6]
    assert_same(bundle.mae.state_dict(), tiny_mae().state_dict())


@pytest.mark.parametrize("kind", [pytest.param("mae", marks=pytest.mark.slow), "network"])
def test_the_loss_goes_down(tmp_path, kind):
    """A hundred and twenty steps on three cases; measured: from 4.51 to 1.84 and from 1.14 to 0.57."""
    run(
        kind,
        tmp_path,
        steps=120,
        replace_every=0,
        validate_every=120,
        warmup_steps=5,
        learning_rate=5e-3,
        augment="none",
    )
    loss = [float(row["loss"]) for row in rows(tmp_path)]
    assert len(loss) == 120
    assert np.mean(loss[-8:]) < 0.75 * np.mean(loss[:8])


class Broken:
    def __getitem__(self, index):
        return Case("broken", torch.full((20, 20, 20), float("nan")), torch.zeros(20, 20, 20, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["mae", "network"])
def test_a_loss_that_is_not_finite(tmp_path, kind):
    with pytest.raises(TrainError, match=r"step 0: the gradient is not finite \(loss nan\)"):
        run(kind, tmp_path, source=Broken())
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'file' / 'out'}: expected a folder to write to")):
        run("mae", tmp_path / "file" / "out")


def test_crop_and_network_of_different_dimensions(tmp_path):
    with pytest.raises(ValueError, match=r"crop_size: expected 2 edge lengths for this network, got \(8, 8, 8\)"):
        run("network", tmp_path, crop_size=(8, 8, 8))


def test_autoencoder_and_network_of_different_dimensions(tmp_path):
    """Their training would end in a bundle without use."""
    with pytest.raises(ArgumentError, match=r"^mae: expected an autoencoder of 3 dimensions .*, got one of 2$"):
        run("network", tmp_path, crop_size=(8, 8, 8), network=tiny_network(3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "float16"}, "precision: expected 'auto', 'float32' or 'bfloat16', got 'float16'"),
        ({"augment": "some"}, "augment: expected one of"),
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"cache_size": -1}, "cache_size: expected 1 or more, got -1"),
        ({"log_every": 0}, "log_every: expected 1 or more, got 0"),
        ({"validate_every": 0}, "validate_every: expected 1 or more, got 0"),
        ({"crop_size": (16,)}, "crop_size: expected two or three edge lengths, got (16,)"),
        ({"crop_size": (16, 16, 16, 16)}, "crop_size: expected two or three edge lengths"),
        ({"crop_size": (16, 0)}, "crop_size: expected two or three edge lengths, got (16, 0)"),
        (
            {"crop_size": (16, 24), "crop_size_jitter": 16},
            "crop_size_jitter: expected 0 to less than an edge of the crop (16, 24), got 16",
        ),
        ({"crop_size_jitter": -1}, "crop_size_jitter: expected 0 to less than an edge"),
        ({"replace_every": -1}, "replace_every: expected 0 or more, got -1"),
        ({"warmup_steps": -1}, "warmup_steps: expected 0 or more, got -1"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a number above 0, got inf"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a number of 0 or more, got nan"),
        ({"score_weight": -0.1}, "score_weight: expected a number of 0 or more, got -0.1"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes: expected a number above 0, got 0.0"),
        ({"lesion_fraction": 1.5}, "lesion_fraction: expected a number in [0, 1], got 1.5"),
    ],
)
def test_settings_errors(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainSettings(**changes)


def test_crops_of_a_step_vary_by_the_jitter():
    settings = TrainSettings(crop_size=(96, 112), crop_size_jitter=16)
    drawn = {tuple(settings.crop_of_step(np.random.default_rng([0, step]))) for step in range(100)}
    assert drawn == {(x, y) for x in (80, 96, 112) for y in (96, 112, 128)}
    fixed = TrainSettings(crop_size=(16, 24, 8))
    assert fixed.crop_of_step(np.random.default_rng(0)) == [16, 24, 8]


@pytest.mark.parametrize("kind", ["mae", "network"])
def test_crops_reach_the_step_at_the_size_of_the_step(tmp_path, monkeypatch, kind):
    seen = set()

    def watched(sample, cases, count, crop, *others):
        seen.add(tuple(crop))
        return sample(cases, count, crop, *others)

    patch_crops(monkeypatch, lambda sample: partial(watched, sample))
    run(kind, tmp_path, steps=8, crop_size_jitter=8)
    assert len(seen) > 1
    assert all(abs(edge - 16) in (0, 8) for crop in seen for edge in crop)


def test_an_autoencoder_that_restores_needs_healthy_twins(tmp_path):
    """Without them its training would unlearn what its maps are made of."""
    mae = MaskedAutoencoder(2, 1, 4, 16, 1, 2, 16, 1, 2, restore=True)
    with pytest.raises(ArgumentError, match=r"^source: expected healthy twins .*got none of synthetic_0"):
        train_mae(mae, Kept(), training_run(tmp_path))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("neighbours", [0, 2])
def test_an_autoencoder_that_restores_learns_to(tmp_path, neighbours):
    mae = MaskedAutoencoder(2, 1, 4, 16, 1, 2, 16, 1, 2, neighbours=neighbours, restore=True)
    train_mae(mae, SyntheticSource(PREPROCESSING, 0, healthy=True), training_run(tmp_path))
    loaded = load_bundle(tmp_path / "bundle").mae
    assert loaded.config == mae.config
    assert loaded.change.weight.abs().max() > 0


def test_each_step_hides_the_share_of_a_masking_ratio(tmp_path):
    """Of 16 patches those that are left see each other; both ratios occur, and every crop has patches of its own."""
    mae = tiny_mae()
    seen, real = [], mae.loss
    mae.loss = lambda image, visible, *others: seen.append(visible) or real(image, visible, *others)
    train_mae(mae, Kept(), training_run(tmp_path))
    assert load_bundle(tmp_path / "bundle").mae.image_size == (16, 16)
    assert RESIDUAL.mask_ratios == (0.5, 0.75)
    assert len(seen) == 6
    assert {visible.shape for visible in seen} == {(4, 8), (4, 4)}
    for visible in seen:
        ordered = visible.sort(1).values
        assert (ordered.diff(dim=1) > 0).all()
        assert 0 <= ordered.min() <= ordered.max() < 16
        assert len(ordered.unique(dim=0)) > 1


def test_augmentation_leaves_the_distance_from_the_top(tmp_path):
    """No intensity as the other channels: without noise, shift and gamma."""
    mae = MaskedAutoencoder(2, 1, 4, 16, 1, 2, 16, 1, 2, neighbours=1)
    seen, real = [], mae.loss
    mae.loss = lambda image, *others: seen.append(image) or real(image, *others)
    train_mae(mae, Kept(), training_run(tmp_path, augment="all", steps=4, batch_size=8))
    distance = torch.cat(seen)[:, -1]
    assert distance.shape == (32, 16, 16)
    assert torch.equal(distance.amin((1, 2)), distance.amax((1, 2)))
    slices = distance[:, 0, 0] * TOP_SLICES
    torch.testing.assert_close(slices, slices.round())
    assert len(slices.unique()) > 1


@pytest.mark.parametrize(("crop", "neighbours"), [("16,16", 2), ("16,16,16", 0)])
def test_neighbours_that_are_not_asked_for(tmp_path, crop, neighbours):
    """Two where slices are drawn, none with boxes."""
    small = ["--steps", "1", "--batch-size", "2", "--cache-size", "1", "--crop-size-jitter", "0", "--warmup-steps", "0"]
    assert main(["train-mae", "-o", str(tmp_path), "--spacing", "8,8,8", "--crop-size", crop, *small]) == 0
    mae = load_bundle(tmp_path / "bundle").mae
    assert (mae.neighbours, mae.restores) == (neighbours, True)
