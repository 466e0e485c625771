"""Global Compensation Unit: gives back to a skip connection what the downsampling lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import ArgumentError
from ..functional.internal import mean_pool
from .arguments import KINDS_OF_UNIT, check_tensor, checked_config
from .plain import has_hooks

__all__ = ["GCU_FORMS", "GlobalCompensationUnit", "ScalingCompensationUnit", "SqueezeExcitation", "compensate"]


class SqueezeExcitation(nn.Module):
    """One weight in (0, 1) per channel from the channel means: (B, C) -> (B, C)."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(channels // reduction, 4)
        self.excite = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, means: Tensor) -> Tensor:
        return self.excite(means)


class GlobalCompensationUnit(nn.Module):
    """Gives back to features what a downsampling by 2 lost: for the skip connections of any backbone.

    Squeeze-and-excitation gates around :func:`grcsf_fast.functional.global_compensation`. The strength of each channel
    starts at 0, so that a network begins as its backbone.

    Args:
        channels: C of the features; 1 or more.

    Raises:
        ArgumentError: no channels.

    Example:
        >>> import torch
        >>> from grcsf_fast import GlobalCompensationUnit
        >>> skip = torch.randn(1, 32, 64, 64)
        >>> compensated, residual = GlobalCompensationUnit(32)(skip)
        >>> compensated.shape, residual.shape
        (torch.Size([1, 32, 64, 64]), torch.Size([1, 1, 64, 64]))

    Source: paper, Global Compensation Unit. Two separate gates and the strength are our decisions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels = checked_config(KINDS_OF_UNIT, channels=channels)["channels"]
        self.feature_gate = SqueezeExcitation(channels)
        self.coarse_gate = SqueezeExcitation(channels)
        self.strength = nn.Parameter(torch.zeros(channels))

    def gates(self, features: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, \\*S) and (B, C, \\*S/2) -> two weights per channel, (B, C) each."""
        # The mean of the average is that of the features, and so is that of the average up-sampled by exactly 2.
        means = _means(coarse)
        return self.feature_gate(means), self.coarse_gate(means)

    def combine(self, features: Tensor, compensated: Tensor, residual: Tensor) -> Tensor:
        """What the skip connection gets; other forms of the unit differ here."""
        return compensated

    def forward(self, features: Tensor, coarse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compensate one scale; :func:`compensate` does several in one call.

        Args:
            features: (B, C, \\*S), S of 2 or 3 even axes, floating-point.
            coarse: (B, C, \\*S/2), the average of the features over 2 x 2 (x 2) pixels; None: it is made here.

        Returns:
            ``(compensated, residual)``: (B, C, \\*S), and ``1 - cosine`` of the two, (B, 1, \\*S) in [0, 2].

        Raises:
            ArgumentTypeError: no tensors, or none of floating-point numbers.
            ArgumentError: shapes that do not fit.
        """
        if coarse is None:
            self.check_features(features)
            coarse = mean_pool(features)
        return _together([self], [features], [coarse])[0]

    def check(self, features: Tensor, coarse: Tensor) -> None:
        """Refuse what the unit is not for, errors as of a call."""
        self.check_features(features)
        check_tensor("coarse", coarse, "(B,C,*S/2)")
        expected = (features.shape[0], self.channels, *(size // 2 for size in features.shape[2:]))
        if tuple(coarse.shape) != expected:
            raise ArgumentError(
                f"coarse: expected (B,C,*S/2) with C = {self.channels} and 2 or 3 spatial axes, half of features "
                f"{tuple(features.shape)}, got {tuple(coarse.shape)}"
            )

    def check_features(self, features: Tensor) -> None:
        """As :meth:`check`, of the features alone."""
        check_tensor("features", features, "(B,C,*S)")
        if features.dim() not in (4, 5) or features.shape[1] != self.channels:
            raise ArgumentError(
                f"features: expected (B,C,*S) with C = {self.channels} and 2 or 3 spatial axes, "
                f"got {tuple(features.shape)}"
            )
        if any(size % 2 for size in features.shape[2:]):
            raise ArgumentError(f"features: expected even spatial axes, got {tuple(features.shape)}; pad them first")


class ScalingCompensationUnit(GlobalCompensationUnit):
    """The form of bundles before format version 3, ``features * (1 + residual)``, for them alone.

    Its ``coarse`` is what the encoder goes down with.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.strength
        self.register_buffer("strength", torch.zeros(channels), persistent=False)

    def gates(self, features: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        return self.feature_gate(_means(features)), self.coarse_gate(_means(coarse))

    def combine(self, features: Tensor, compensated: Tensor, residual: Tensor) -> Tensor:
        return features * (1 + residual)


def _means(features: Tensor) -> Tensor:
    return features.flatten(2).mean(2)


GCU_FORMS = {"difference": GlobalCompensationUnit, "scale": ScalingCompensationUnit}


def compensate(
    units: Sequence[nn.Module], features: Sequence[Tensor], coarse: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Several scales at once: what each :class:`GlobalCompensationUnit` returns, ``(compensated, residual)``.

    In one call of the op, which is one launch on a GPU, unless somebody wants to see or to change what a unit does: one
    with hooks or an adapter around it is called as a module.

    Args:
        units: one per scale.
        features: (B, C, \\*S) each, as many, as for the unit.
        coarse: (B, C, \\*S/2) each, as many.

    Returns:
        A pair per scale, (B, C, \\*S) and (B, 1, \\*S).

    Raises:
        ArgumentError: as for the unit, or lists of different lengths.
        ArgumentTypeError: as for the unit.
    """
    if not len(units) == len(features) == len(coarse):
        raise ArgumentError(
            f"units, features, coarse: expected as many of each, got {len(units)}, {len(features)} and {len(coarse)}"
        )
    whole = GlobalCompensationUnit.forward
    own = [unit for unit in units if isinstance(unit, GlobalCompensationUnit) and type(unit).forward is whole]
    if len(own) == len(units) and not any(map(has_hooks, own)):
        return _together(own, features, coarse)
    return [unit(high, low) for unit, high, low in zip(units, features, coarse, strict=True)]


def _together(
    units: Sequence[GlobalCompensationUnit], features: Sequence[Tensor], coarse: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    for unit, high, low in zip(units, features, coarse, strict=True):
        unit.check(high, low)
    coarse = [low.to(high.dtype) for high, low in zip(features, coarse, strict=True)]
    gates = [unit.gates(high, low) for unit, high, low in zip(units, features, coarse, strict=True)]
    pairs = functional.multiscale_compensation(
        features, coarse, [pair[0] for pair in gates], [pair[1] for pair in gates], [unit.strength for unit in units]
    )
    return [
        (unit.combine(high, compensated, residual), residual)
        for unit, high, (compensated, residual) in zip(units, features, pairs, strict=True)
    ]
