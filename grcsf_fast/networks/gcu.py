"""Global Compensation Unit: gives back to a skip connection what the downsampling lost."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import functional
from ..errors import ArgumentError
from .arguments import check_tensor
from .plain import has_hooks

__all__ = ["GlobalCompensationUnit", "SqueezeExcitation", "compensate"]


class SqueezeExcitation(nn.Module):
    """One weight in (0, 1) per channel from the channel means: (B, C, \\*S) -> (B, C).

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
    """Gives back to features what a downsampling by 2 lost: for the skip connections of any backbone.

    Squeeze-and-excitation gates around :func:`grcsf_fast.functional.global_compensation`.

    Args:
        channels: C of the features; 1 or more.

    Raises:
        ArgumentError: no channels.

    Example:
        >>> import torch
        >>> from grcsf_fast import GlobalCompensationUnit
        >>> skip = torch.randn(1, 32, 64, 64)
        >>> coarse = torch.nn.functional.avg_pool2d(skip, 2)
        >>> compensated, residual = GlobalCompensationUnit(32)(skip, coarse)
        >>> compensated.shape, residual.shape
        (torch.Size([1, 32, 64, 64]), torch.Size([1, 1, 64, 64]))

    Source: paper, Global Compensation Unit. Two separate gates are our decision.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ArgumentError(f"channels: expected 1 or more, got {channels}")
        self.channels = channels
        self.feature_gate = SqueezeExcitation(channels)
        self.coarse_gate = SqueezeExcitation(channels)

    def gates(self, features: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, \\*S) and (B, C, \\*S/2) -> two weights per channel, (B, C) each."""
        return self.feature_gate(features), self.coarse_gate(coarse)

    def combine(self, features: Tensor, compensated: Tensor, residual: Tensor) -> Tensor:
        """What the skip connection gets; other forms of the unit differ here."""
        return compensated

    def forward(self, features: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Compensate one scale; :func:`compensate` does several in one call.

        Args:
            features: (B, C, \\*S), S of 2 or 3 even axes, floating-point.
            coarse: (B, C, \\*S/2), the features after a downsampling by exactly 2 that keeps the channels.

        Returns:
            ``(compensated, residual)``: (B, C, \\*S), and ``1 - cosine`` of the two, (B, 1, \\*S) in [0, 2].

        Raises:
            ArgumentTypeError: no tensors, or none of floating-point numbers.
            ArgumentError: shapes that do not fit.
        """
        return _together([self], [features], [coarse])[0]

    def check(self, features: Tensor, coarse: Tensor) -> None:
        """Refuse what the unit is not for, errors as of a call."""
        for name, tensor, halving in (("features", features, 1), ("coarse", coarse, 2)):
            letters = "(B,C,*S)" if halving == 1 else "(B,C,*S/2)"
            check_tensor(name, tensor, letters)
            expected = (features.shape[0], self.channels, *(size // halving for size in features.shape[2:]))
            if tuple(tensor.shape) != expected or tensor.dim() not in (4, 5):
                raise ArgumentError(
                    f"{name}: expected {letters} with C = {self.channels} and 2 or 3 spatial axes"
                    + (f", half of features {tuple(features.shape)}" if halving == 2 else "")
                    + f", got {tuple(tensor.shape)}"
                )
        if any(size % 2 for size in features.shape[2:]):
            raise ArgumentError(f"features: expected even spatial axes, got {tuple(features.shape)}; pad them first")


def compensate(
    units: Sequence[nn.Module], features: Sequence[Tensor], coarse: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Several scales at once: what each :class:`GlobalCompensationUnit` returns, ``(compensated, residual)``.

    In one call of the op, which is one launch on a GPU, unless somebody wants to see or to change what a unit does: one
    with hooks or an adapter around it is called as a module.

    Args:
        units: one per scale.
        features: as many, as for the unit.
        coarse: as many.
    """
    whole = GlobalCompensationUnit.forward
    if all(getattr(type(unit), "forward", None) is whole and not has_hooks(unit) for unit in units):
        return _together(units, features, coarse)
    return [unit(high, low) for unit, high, low in zip(units, features, coarse, strict=True)]


def _together(
    units: Sequence[GlobalCompensationUnit], features: Sequence[Tensor], coarse: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    for unit, high, low in zip(units, features, coarse, strict=True):
        unit.check(high, low)
    coarse = [low.to(high.dtype) for high, low in zip(features, coarse, strict=True)]
    gates = [unit.gates(high, low) for unit, high, low in zip(units, features, coarse, strict=True)]
    pairs = functional.multiscale_compensation(
        features, coarse, [pair[0] for pair in gates], [pair[1] for pair in gates]
    )
    return [
        (unit.combine(high, compensated, residual), residual)
        for unit, high, (compensated, residual) in zip(units, features, pairs, strict=True)
    ]
