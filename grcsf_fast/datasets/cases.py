"""A case: a preprocessed volume with what is known of it, and where cases come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, overload

from torch import Tensor

__all__ = [
    "Case",
    "CaseSource",
    "Chosen",
]


@dataclass(frozen=True)
class Case:
    """A preprocessed volume for training.

    Attributes:
        name: of the case.
        image: (X, Y, Z) float32, or (C, X, Y, Z) of several channels.
        lesion: (X, Y, Z) bool, or of several labels uint8, their numbers; None where no truth is known.
        residual_maps: (M, X, Y, Z) float16, once computed.
        healthy: (X, Y, Z) float32, the same head without lesion, known of synthetic subjects alone and there if asked
            for; intensities as in ``image``.
        slices: axial slices that crops of 2-D networks are drawn from; None: all.
        ignored: (X, Y, Z) bool, voxels that nobody annotated, which count neither as lesion nor as none; None: there
            are none. Of the cases of a training all have it or none.
        dense: (X, Y, Z) bool, voxels whose intensities lesion may have, where a list counts it above a limit alone and
            predictions are cut there; None: all.
        lesion_slices: axial slices that hold lesion, in order, once somebody looked; None: nobody did.
    """

    name: str
    image: Tensor
    lesion: Tensor | None
    residual_maps: Tensor | None = None
    healthy: Tensor | None = None
    slices: tuple[int, ...] | None = None
    ignored: Tensor | None = None
    dense: Tensor | None = None
    lesion_slices: tuple[int, ...] | None = None


class CaseSource(Protocol):
    """Cases by number; a source that ends starts again, or is asked for no more than it has."""

    def __getitem__(self, index: int) -> Case: ...


class Chosen(Sequence[Case]):
    """Cases of a source by their numbers, each read when it is asked for.

    Args:
        source: of the cases.
        numbers: of those chosen, in their order.
    """

    def __init__(self, source: CaseSource, numbers: Sequence[int]) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Case: ...
    @overload
    def __getitem__(self, place: slice) -> Chosen: ...
    def __getitem__(self, place: int | slice) -> Case | Chosen:
        if isinstance(place, slice):
            return Chosen(self.source, self.numbers[place])
        return self.source[self.numbers[place]]
