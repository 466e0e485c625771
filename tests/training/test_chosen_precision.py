"""The precision that a training chooses: said, kept in its bundles, and the same where it goes on."""

import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from trainings import Kept, assert_same, at_call, run, tiny_mae, tiny_network, training_run, weights

from grcsf_fast.errors import Interrupted
from grcsf_fast.networks.grcsf import GRCSF
from grcsf_fast.pretrained.bundle import load_bundle
from grcsf_fast.runtime.precision import Choice
from grcsf_fast.training import autoencoder, checkpoint
from grcsf_fast.training.network import train_network


def test_a_chosen_precision_stays_when_resumed(tmp_path, monkeypatch):
    """A measurement that comes out otherwise the next time must not change the weights."""
    monkeypatch.setattr("grcsf_fast.runtime.precision.multiplies_bfloat16", lambda device: True)
    choices = iter(["bfloat16", "float32", "float32"])
    monkeypatch.setattr("grcsf_fast.runtime.precision.measured_choice", lambda subject, run: Choice(next(choices), ""))
    whole = weights(run("mae", tmp_path / "whole", precision="auto"))
    assert_same(whole, weights(run("mae", tmp_path / "explicit", precision="bfloat16")))
    choices = iter(["bfloat16", "float32"])
    with monkeypatch.context() as patch:
        at_call(patch, autoencoder, "sample_crops", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            run("mae", tmp_path / "stopped", precision="auto")
    assert_same(whole, weights(run("mae", tmp_path / "stopped", precision="auto", resume=True)))
    assert next(choices) == "float32"  # not asked for


def test_a_training_says_its_precision_and_why(tmp_path, monkeypatch, capsys):
    """In one line where it was chosen, as predictions do, and in its bundles, whose training may have gone on."""
    monkeypatch.setattr("grcsf_fast.runtime.precision.multiplies_bfloat16", lambda device: True)
    choices = iter([Choice("bfloat16", "by the test"), Choice("float32", "by the test")])
    monkeypatch.setattr("grcsf_fast.runtime.precision.measured_choice", lambda subject, run: next(choices))
    options = {"precision": "auto", "steps": 2, "validate_every": 1}
    bundles = [run("network", tmp_path / "net", validation=[Kept()[50]], **options), tmp_path / "net" / "best"]
    assert capsys.readouterr().out.count("precision bfloat16: by the test\n") == 1
    bundles.append(run("network", tmp_path / "net", resume=True, **options | {"steps": 3}))
    assert "precision bfloat16: by the test\n" in capsys.readouterr().out
    for bundle in bundles:
        card = load_bundle(bundle).card
        assert (card["precision"], card["precision_reason"]) == ("bfloat16", "by the test")
    card = load_bundle(run("mae", tmp_path / "mae", **options)).card
    assert (card["precision"], card["precision_reason"]) == ("float32", "by the test")
    capsys.readouterr()
    card = load_bundle(run("mae", tmp_path / "asked", precision="float32")).card
    assert (card["precision"], card["precision_reason"]) == ("float32", "as asked for")
    assert "precision" not in capsys.readouterr().out


def test_a_checkpoint_that_does_not_say_why(tmp_path, capsys):
    """As those of before do not."""
    run("mae", tmp_path, steps=2, precision="auto")
    path = tmp_path / checkpoint.CHECKPOINT_NAME
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    del metadata["precision_reason"]
    save_file(tensors, path, metadata)
    capsys.readouterr()
    card = load_bundle(run("mae", tmp_path, steps=3, precision="auto", resume=True)).card
    assert card["precision_reason"] == "as in the checkpoint"
    assert f"precision {card['precision']}: as in the checkpoint\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("own", "given", "changes"),
    [
        (False, True, {}),
        (False, False, {}),
        (True, False, {}),
        (False, False, {"rcu_levels": ()}),
        (False, True, {"neighbours": 1}),
    ],
)
def test_what_is_measured_is_what_is_trained(tmp_path, monkeypatch, own, given, changes):
    """With residual maps where the training has some, and without where it has none or its network makes them."""
    monkeypatch.setattr("grcsf_fast.runtime.precision.multiplies_bfloat16", lambda device: True)

    def measured(subject, step):
        step(torch.float32)
        return Choice("float32", "")

    monkeypatch.setattr("grcsf_fast.runtime.precision.measured_choice", measured)
    seen, real = [], GRCSF.forward

    def forward(self, image, residual_maps=None, return_maps=False):
        maps = residual_maps.shape[1:] if residual_maps is not None else None
        seen.append((image.shape[1:], maps, image.is_contiguous(memory_format=torch.channels_last)))
        return real(self, image, residual_maps, return_maps)

    monkeypatch.setattr(GRCSF, "forward", forward)
    network = tiny_network(mae=tiny_mae() if own else None, **changes)
    settings = training_run(tmp_path, precision="auto", steps=1, channels_last=True)
    train_network(network, tiny_mae() if given else None, Kept(), (), settings)
    trial, step = seen
    assert trial == step
    assert network.requires_maps == (own or given)
