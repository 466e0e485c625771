"""Global Compensation Unit: gives back to a skip connection what the downsampling lost."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import functional
from .plain import has_hooks

__all__ = ["GlobalCompensationUnit", "SqueezeExcitation", "compensate"]


class SqueezeExcitation(nn.Module):
    """One weight in (0, 1) a channel from the channel means: (B, C, \\*S) -> (B, C).

    For an exact factor of 2 the mean of an up-sampled tensor is the mean of the tensor, so the gate of the
    up-sampled coarse features is taken from the coarse features themselves.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(channels // reduction, 4)
        self.excite = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        return self.excite(features.flatten(2).mean(2))


class GlobalCompensationUnit(nn.Module):
    """Squeeze-and-excitation gates around :func:`grcsf_fast.functional.global_compensation`.

    Args:
        channels: C of the features.

    Source: paper, Global Compensation Unit. Two separate gates are our decision.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.feature_gate = SqueezeExcitation(channels)
        self.coarse_gate = SqueezeExcitation(channels)

    def gates(self, features: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, \\*S) and (B, C, \\*S/2) -> two weights a channel, (B, C) each."""
        return self.feature_gate(features), self.coarse_gate(coarse)

    def combine(self, features: Tensor, compensated: Tensor, residual: Tensor) -> Tensor:
        """What the skip connection gets; other forms of the unit differ here."""
        return compensated

    def forward(self, features: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, \\*S) and (B, C, \\*S/2) -> compensated (B, C, \\*S) and residual (B, 1, \\*S)."""
        return _together([self], [features], [coarse])[0]


def compensate(
    units: Sequence[nn.Module], features: Sequence[Tensor], coarse: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """What each unit returns, ``(compensated, residual)``, for all scales of a network.

    In one call of the op, unless somebody wants to see or to change what a unit does: one with hooks or an adapter
    around it is called as a module.
    """
    whole = GlobalCompensationUnit.forward
    if all(getattr(type(unit), "forward", None) is whole and not has_hooks(unit) for unit in units):
        return _together(units, features, coarse)
    return [unit(high, low) for unit, high, low in zip(units, features, coarse, strict=True)]


def _together(
    units: Sequence[GlobalCompensationUnit], features: Sequence[Tensor], coarse: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    coarse = [low.to(high.dtype) for high, low in zip(features, coarse, strict=True)]
    gates = [unit.gates(high, low) for unit, high, low in zip(units, features, coarse, strict=True)]
    pairs = functional.multiscale_compensation(
        features, coarse, [pair[0] for pair in gates], [pair[1] for pair in gates]
    )
    return [
        (unit.combine(high, compensated, residual), residual)
        for unit, high, (compensated, residual) in zip(units, features, pairs, strict=True)
    ]
