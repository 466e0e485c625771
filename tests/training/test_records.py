"""What a training leaves on disk: its log after a kill, who may read its weights, and what its bundles say."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from trainings import RESIDUAL, Kept, rows, run, tiny_mae, tiny_network, training_run

from grcsf_fast.data.files import this_machine
from grcsf_fast.data.names import short_name
from grcsf_fast.pretrained.bundle import BundleError, load_bundle
from grcsf_fast.training.autoencoder import train_mae
from grcsf_fast.training.network import train_network


class KeptWithMaps(Kept):
    """Cases whose residual maps somebody made before."""

    def __getitem__(self, index):
        case = super().__getitem__(index)
        shape = (len(RESIDUAL.mask_ratios), *case.image.shape)
        maps = torch.rand(shape, generator=torch.Generator().manual_seed(index))
        return replace(case, residual_maps=maps.half())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_network_trained_with_maps_of_its_cases_needs_maps(tmp_path, ema):
    """Also as its moving average, which was made before it saw any."""
    where = training_run(tmp_path, ema=ema, steps=2, validate_every=1)
    bundle = train_network(tiny_network(), None, KeptWithMaps(), [KeptWithMaps()[50]], where)
    for folder in (bundle, tmp_path / "best"):
        assert load_bundle(folder).network.requires_maps


@pytest.mark.parametrize("kind", ["network", "mae"])
def test_what_could_not_be_stored_is_refused_before_the_first_step(tmp_path, kind):
    """Channels that the run names otherwise: at the end a night would be lost."""
    where = replace(training_run(tmp_path / "out"), channels=("a", "b"))

    def train():
        if kind == "mae":
            return train_mae(tiny_mae(), Kept(), where)
        return train_network(tiny_network(), None, KeptWithMaps(), [], where)

    with pytest.raises(BundleError, match=f"expected in_channels 2 of its {kind}, found 1"):
        train()
    assert not (tmp_path / "out").exists()


def test_a_moving_average_of_a_network_with_its_own_autoencoder(tmp_path):
    """Whose copy holds a copy of the autoencoder."""
    network, mae = tiny_network(), tiny_mae()
    network.mae = mae.requires_grad_(False)
    where = training_run(tmp_path, ema=0.9, steps=2, validate_every=1)
    bundle = train_network(network, mae, Kept(), [Kept()[50]], where)
    for folder in (bundle, tmp_path / "best"):
        assert load_bundle(folder).mae is not None


@pytest.mark.parametrize("cut", ["1", "12", "12,0.5", "12,0.5,0.25,0.25,0.003,1.5,,\n1"])
def test_a_row_that_was_cut_is_no_step(tmp_path, cut):
    """Of the row of step 12 a kill may leave what looks like another step."""
    run("mae", tmp_path, steps=2)
    with (tmp_path / "log.csv").open("a") as file:
        file.write(cut)
    run("mae", tmp_path, steps=3, resume=True)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_weights_have_the_permissions_of_any_new_file(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        bundle = run("mae", tmp_path / "training", steps=1)
    finally:
        os.umask(before)
    for path in (bundle / "model.safetensors", bundle / "config.json", tmp_path / "training/checkpoint.safetensors"):
        assert path.stat().st_mode & 0o777 == mode, path


def test_what_a_killed_training_left_of_a_checkpoint_goes(tmp_path):
    """Each may be as large as the checkpoint, and nobody sees them."""
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    run("mae", tmp_path, steps=1)
    left = tmp_path / f".partial-{this_machine()}-{dead.pid}-abcdef-{short_name('checkpoint.safetensors')}"
    left.write_bytes((tmp_path / "checkpoint.safetensors").read_bytes())
    run("mae", tmp_path, steps=1, resume=True)
    assert not left.exists()
