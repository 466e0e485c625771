"""Trained networks that are trained on: with other channels or outputs, and without what fitted their old weights."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ..runtime.defaults import fresh_defaults

__all__ = ["adapted", "threshold_now"]


def adapted(network: Any, in_channels: int, out_channels: int) -> Any:
    """A network of other channels with the weights that fit, to be trained on.

    Args:
        network: a trained :class:`grcsf_fast.GRCSF` without an autoencoder of its own.
        in_channels: of the image; weights of channels that the network had are kept, of further ones they are 0.
        out_channels: of the logits; where the number differs, the last convolution is new.

    Returns:
        In evaluation mode, float32, on the CPU, with importance threshold 0; like the network where nothing differs.

    Raises:
        ArgumentError: numbers below 1.
    """
    changed = {"in_channels": in_channels, "out_channels": out_channels, "importance_threshold": 0.0}
    with fresh_defaults():
        found = type(network)(**network.config | changed, residual_map_settings=network.residual_map_settings)
    own, given = found.state_dict(), network.state_dict()
    first = "encoder.0.0.weight"
    given[first] = _of_channels(given[first], network.in_channels, in_channels)
    kept = {name: values for name, values in given.items() if values.shape == own[name].shape}
    found.load_state_dict(own | kept)
    return found.eval()


def _of_channels(weight: Tensor, before: int, now: int) -> Tensor:
    """Weights (F, N * before, *K) of a first convolution that sees N slices for images of other channels."""
    by_slice = weight.unflatten(1, (-1, before))[:, :, :now]
    missing = by_slice.new_zeros((*by_slice.shape[:2], now - by_slice.shape[2], *by_slice.shape[3:]))
    return torch.cat([by_slice, missing], 2).flatten(1, 2)


def threshold_now(network: Any, features: Tensor) -> float:
    """The importance below which patches are skipped: none are in training, which says so where some will be later.

    A backward in evaluation mode says what it does not reach; ``features`` are any that the RCUs see.
    """
    threshold = network.importance_threshold if network.rcu else 0.0
    if not network.training:
        if threshold and features.requires_grad and not torch.compiler.is_compiling():
            features.register_hook(functools.partial(_warn_of_skipped, threshold))
        return threshold
    if threshold and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        warnings.warn(
            f"importance_threshold {threshold:g} was chosen for other weights than training makes: "
            "in evaluation mode patches scored below it are skipped; set network.importance_threshold = 0 to train on",
            stacklevel=4,
        )
    return 0.0


def _warn_of_skipped(threshold: float, gradient: Tensor) -> None:
    warnings.warn(
        f"importance_threshold {threshold:g}: in evaluation mode patches scored below it are skipped and give the RCUs "
        "no gradients; to train on, call network.train() and set network.importance_threshold = 0",
        stacklevel=2,
    )
