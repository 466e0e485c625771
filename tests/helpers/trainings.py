"""Trainings small enough for any test, and ways to disturb them."""

from __future__ import annotations

import csv
import itertools
from functools import partial
from pathlib import Path

import torch

from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.networks.grcsf import GRCSF
from grcsf_fast.networks.mae import MaskedAutoencoder
from grcsf_fast.pretrained.bundle import ResidualMapSettings, load_bundle
from grcsf_fast.training import autoencoder, network, sampling
from grcsf_fast.training.autoencoder import train_mae
from grcsf_fast.training.network import train_network
from grcsf_fast.training.settings import TrainingRun, TrainSettings
from grcsf_fast.training.synthetic import SyntheticSource

PREPROCESSING = Preprocessing(spacing=(8.0, 8.0, 8.0))
RESIDUAL = ResidualMapSettings()
CPU = torch.device("cpu")
SETTINGS = {
    "steps": 6,
    "batch_size": 4,
    "crop_size": (16, 16),
    "warmup_steps": 2,
    "cache_size": 3,
    "replace_every": 2,
    "precision": "float32",
    "log_every": 1,
    "validate_every": 3,
}


class Kept:
    """A source whose cases are made once for all tests."""

    cases: dict = {}  # noqa: RUF012 - shared on purpose

    def __init__(self, first_seed=0):
        self.first_seed = first_seed

    def __getitem__(self, index):
        seed = self.first_seed + index
        if seed not in self.cases:
            self.cases[seed] = SyntheticSource(PREPROCESSING, 0)[seed]
        return self.cases[seed]


def tiny_mae():
    torch.manual_seed(1)
    return MaskedAutoencoder(
        patch_size=4, embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_num_heads=2
    )


def tiny_network(spatial_dims=2, **changes):
    torch.manual_seed(2)
    arguments = {"features": (4, 8), "patch_size": 4, "residual_channels": 4, "rcu_levels": (0,)} | changes
    return GRCSF(spatial_dims, **({"in_channels": 1, "out_channels": 1} | arguments))


# Of a run and not of its settings.
WHERE = ("workers", "tensorboard", "world")


def training_run(output, resume=False, card=None, preprocessing=PREPROCESSING, initial_sha256=None, **changes):
    where = {name: changes.pop(name) for name in WHERE if name in changes}
    settings = TrainSettings(**SETTINGS | changes)
    return TrainingRun(
        Path(output), settings, preprocessing, RESIDUAL, CPU, resume, card or {}, initial_sha256, **where
    )


def run(kind, output, resume=False, source=None, validation=(), network=None, card=None, **changes):
    """Train one of the two for a few steps; returns its bundle's folder."""
    source = source or Kept()
    where = training_run(output, resume, card, **changes)
    if kind == "mae":
        return train_mae(tiny_mae(), source, where)
    network = network or tiny_network()
    return train_network(network, tiny_mae() if network.rcu else None, source, validation, where)


def weights(bundle):
    loaded = load_bundle(bundle)
    return (loaded.network or loaded.mae).state_dict()


def rows(output):
    with (output / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def patch_crops(monkeypatch, changed):
    """Let both trainings draw their crops by another function; ``changed`` makes it of the real one."""
    replaced = changed(sampling.sample_crops)
    for module in (autoencoder, network):
        monkeypatch.setattr(module, "sample_crops", replaced)


def kill_at(monkeypatch, step):
    """Stop the training as Ctrl-C would, in the middle of a step."""
    calls = []

    def interrupted(sample, *arguments):
        calls.append(1)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        return sample(*arguments)

    patch_crops(monkeypatch, lambda sample: partial(interrupted, sample))


def at_call(monkeypatch, owner, name, number, act):
    """Do something at the ``number``-th call of a function, before it."""
    function, calls = getattr(owner, name), itertools.count(1)

    def counted(*arguments, **named):
        if next(calls) == number:
            act()
        return function(*arguments, **named)

    monkeypatch.setattr(owner, name, counted)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
