"""Bundles that a training begins from, and what holds of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data.labels import Labels
from ..errors import ArgumentError
from ..networks.adapted import adapted
from ..networks.grcsf import GRCSF
from ..networks.mae import MaskedAutoencoder
from ..pretrained.bundle import Bundle, BundleError, ResidualMapSettings, load_bundle
from ..runtime.processes import World
from .listed import ChosenCases, check_fold
from .recipes import by_hand
from .shared import printable

__all__ = ["GivenBundles", "adapted_network", "check_adaptable", "check_sizes", "load_bundles"]


@dataclass(frozen=True)
class GivenBundles:
    """Bundles that a training begins from.

    Attributes:
        initial: that of ``--initial``, whose weights are trained on; None: not given.
        mae: that of ``--mae``, whose autoencoder makes the residual maps; None: not given.
    """

    initial: Bundle | None
    mae: Bundle | None = None

    @property
    def base(self) -> Bundle | None:
        """That whose autoencoder, channels and preprocessing hold."""
        return self.mae or self.initial

    @property
    def residual_maps(self) -> ResidualMapSettings:
        """How residual maps are made by the autoencoder that holds."""
        return self.base.residual_maps if self.base is not None else ResidualMapSettings()


def load_bundles(options: argparse.Namespace, chosen: ChosenCases | None) -> GivenBundles:
    """Read the bundles of ``--initial`` and ``--mae``.

    Args:
        options: of the command; ``train-mae`` has no ``--mae``.
        chosen: the list of ``--cases`` and the cases of its fold; None: not given.

    Raises:
        BundleError, FileNotFoundError: a bundle that cannot be read.
        ArgumentError: one has seen the fold that is held out.
    """
    names = (options.initial, getattr(options, "mae", None))
    initial, mae = (load_bundle(name) if name else None for name in names)
    check_fold(options, chosen, initial, "initial")
    check_fold(options, chosen, mae, "mae")
    return GivenBundles(initial, mae)


def check_sizes(
    options: argparse.Namespace, module: GRCSF | MaskedAutoencoder, defaults: Mapping[str, Any], world: World
) -> None:
    """See that options for a network's sizes are those of the network of --initial, which holds.

    Args:
        options: a value of the recipe that differs is said; one given by hand is an error.
        module: the network.
        defaults: of the options, by the name that they have in the network's configuration too.
        world: the first process says it.

    Raises:
        ArgumentError: another size was given by hand.
    """
    for name, default in defaults.items():
        value, held = getattr(options, name), module.config[name]
        held = tuple(held) if isinstance(held, list) else held
        if value in (None, held):
            continue
        flag = name.replace("_", "-")
        if not by_hand(options, name):
            if world.rank == 0:
                print(printable(f"{flag} {held} of the bundle holds; the recipe has {value}"))
        elif value != default:
            raise ArgumentError(f"--{flag}: expected none beside --initial, whose network has {held}, got {value}")


def check_adaptable(initial: Bundle, name: str, mae: Bundle | None, channels: Sequence[str]) -> None:
    """See that what an initial bundle cannot lend to a network of other channels is given.

    Args:
        initial: the bundle.
        name: as it was given.
        mae: that of ``--mae``; None: none was given.
        channels: of the network to be trained.

    Raises:
        BundleError: no segmentation network in it.
        ArgumentError: an autoencoder of these channels is missing, or their intensities are not known.
    """
    if initial.network is None:
        raise BundleError(f"{name}: expected a bundle with a segmentation network, found none in it")
    if mae is not None or len(channels) == len(initial.channels):
        return
    said, known = ", ".join(channels), ", ".join(initial.channels)
    if initial.network.rcu:
        raise ArgumentError(
            f"--mae: expected the bundle of an autoencoder of {said}, as that of {name} knows {len(initial.channels)} "
            f"({known}), got none; train it first: grcsf-fast train-mae --channels {','.join(channels)} -o MAE, then "
            "this command with --mae MAE/bundle"
        )
    if initial.preprocessing.others:
        raise ArgumentError(
            f"--channels: expected {len(initial.channels)}, as {name} prepares each of {known} in its own way, got "
            f"{said}"
        )


def adapted_network(initial: Bundle, channels: Sequence[str], labels: Labels | None, world: World) -> GRCSF:
    """The network of a bundle to train on, adapted to the channels and labels; the first process says what is new."""
    network = initial.network
    assert network is not None  # was checked
    said = []
    if network.importance_threshold:
        said.append(f"importance_threshold {network.importance_threshold:g} was for the bundle's weights: now 0")
        network.importance_threshold = 0.0
    before = network.in_channels
    if len(channels) != before or labels != initial.labels:
        network = adapted(network, len(channels), labels.outputs if labels is not None else 1)
    if len(channels) != before:
        kept, further = channels[:before], channels[before:]
        begin = f", those of {', '.join(further)} begin at 0" if further else ""
        said.append(f"weights of the first convolution: the bundle's for {', '.join(kept)}{begin}")
    if labels is not None and labels != initial.labels:
        assert isinstance(network.output, nn.Conv2d | nn.Conv3d)
        network.output.reset_parameters()  # its outputs meant others, even where they are as many
        said.append(f"labels {', '.join(labels.names)}: the last convolution is new")
    if world.rank == 0:
        for text in said:
            print(printable(text))
    return network
