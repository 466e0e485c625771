"""Crops from cases that a rolling cache holds.

Everything drawn is a function of a seed and the step alone, so that a training resumed at a step goes on as if it had
never stopped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets.cases import Case, CaseSource
from ..runtime.memory import memory_budget

__all__ = ["CaseCache", "bytes_of", "sample_crops", "small"]


class CaseCache:
    """The cases in memory at a step: ``size`` of them, one replaced by the source's next every ``replace_every`` steps.

    Args:
        source: of the cases.
        size: cases held.
        replace_every: steps between replacements; 0: never.
        finish: applied to a new case once, for instance to compute its residual maps.
    """

    def __init__(
        self, source: CaseSource, size: int, replace_every: int, finish: Callable[[Case], Case] = lambda case: case
    ) -> None:
        self.source = source
        self.size = size
        self.replace_every = replace_every
        self.finish = finish
        self._held: dict[int, Case] = {}
        self._weighed = False

    def indices(self, step: int) -> range:
        first = step // self.replace_every if self.replace_every else 0
        return range(first, first + self.size)

    def at(self, step: int, progress: Callable[[Sequence[int]], Iterable[int]] = lambda missing: missing) -> list[Case]:
        """The cases of a step; ``progress`` wraps the list of those that have to be made."""
        wanted = self.indices(step)
        for index in [held for held in self._held if held not in wanted]:
            del self._held[index]
        for index in progress([index for index in wanted if index not in self._held]):
            self._held[index] = _looked_through(small(self.finish(self.source[index])))
            if not self._weighed:
                self._weighed = True
                self._weigh(bytes_of(self._held[index]))
        return [self._held[index] for index in wanted]

    def _weigh(self, bytes_of_one: int) -> None:
        """Warn of a pool that is too large; the system would end the process without a word, hours later perhaps."""
        budget = memory_budget()
        if self.size > 1 and self.size * bytes_of_one > budget:
            needed, most = (one / 2**30 for one in (self.size * bytes_of_one, budget))
            warnings.warn(
                f"{self.size} cases like the first need {needed:.1f} GiB of memory in each process, which may take "
                f"{most:.1f}; --cache-size {max(1, budget // bytes_of_one)} would do with that", stacklevel=2,
            )  # fmt: skip

    def close(self) -> None:
        """End what the source has running, if anything."""
        getattr(self.source, "close", lambda: None)()


def bytes_of(case: Case) -> int:
    """Of its tensors."""
    return sum(value.nbytes for value in vars(case).values() if isinstance(value, Tensor))


def small(case: Case) -> Case:
    """As cases stay in memory: with residual maps of half precision."""
    return case if case.residual_maps is None else replace(case, residual_maps=case.residual_maps.half())


@dataclass(frozen=True)
class _LookedThrough(Case):
    """A case with the slices that hold each of its labels, of one label none are told apart, and those that somebody
    annotated."""

    label_slices: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    annotated_slices: tuple[int, ...] = ()


def _looked_through(case: Case) -> Case:
    """With the slices that hold lesion: to look for them takes milliseconds, and each crop asks for them."""
    if case.lesion is None:
        return case
    known: dict[str, Any] = {"lesion_slices": _lesion_slices(case.lesion), "label_slices": _label_slices(case.lesion)}
    known["dense"] = None  # for validations alone
    if case.ignored is not None:
        known["annotated_slices"] = _lesion_slices(~case.ignored)
    return _LookedThrough(**vars(case) | known)


def _lesion_slices(lesion: Tensor) -> tuple[int, ...]:
    return tuple(lesion.any(0).any(0).nonzero().flatten().tolist())


def _label_slices(lesion: Tensor) -> dict[int, tuple[int, ...]]:
    """By number the slices that hold it; empty where there is one number at most."""
    numbers = [] if lesion.dtype == torch.bool else lesion.unique().tolist()
    numbers = [int(number) for number in numbers if number]
    return {one: _lesion_slices(lesion == one) for one in numbers} if len(numbers) > 1 else {}


def sample_crops(
    cases: Sequence[Case],
    count: int,
    crop: Sequence[int],
    lesion_fraction: float,
    rng: np.random.Generator,
    stack: Callable[[Tensor, Tensor], Tensor] | None = None,
    own: slice = slice(None),
) -> dict[str, Tensor]:
    """Crops for a training step.

    With two sizes in ``crop`` they are axial slices, with three they are boxes. A share of them is centred near a
    lesion voxel of a slice that holds lesion, of a case drawn again where the first one holds none and another does;
    along each axis the voxel is within a quarter of the crop's edge of the middle. Of several labels in a case one is
    drawn first, so that small ones beside large ones are seen as often. The others lie anywhere, around voxels that
    somebody annotated. Smaller volumes are padded with edge values.

    Args:
        cases: to draw from.
        count: of crops.
        crop: edge lengths in voxels.
        lesion_fraction: the share near a lesion.
        rng: gives each of the crops a generator of its own.
        stack: what an image is made of where that is more than a slice, the image of a case and slices (N,) to
            (N, K, X, Y).
        own: which of the crops are cut out, where others have the rest of them.

    Returns:
        Of N crops ``image`` (N, K, \\*crop) float32, without ``stack`` K the channels of images, and where the cases
        have them ``lesion``, ``ignored`` and ``healthy`` (N, 1, \\*crop) and ``residual_maps`` (N, M, \\*crop), all
        float32.
    """
    collected: dict[str, list[Tensor]] = {}
    for seed in rng.integers(2**63, size=count)[own]:
        draws = np.random.default_rng(seed)
        case, centre = _place(cases, crop, lesion_fraction, draws)
        shape = case.image.shape[-3:]
        window = []
        for axis, size in enumerate(shape[: len(crop)]):
            first = min(max(centre[axis] - crop[axis] // 2, 0), max(size - crop[axis], 0))
            window.append(slice(first, min(first + crop[axis], size)))
        padding = [
            side
            for size, goal in zip(reversed(shape[: len(crop)]), reversed(crop), strict=True)
            for side in _both_sides(goal - size)
        ]
        for name in ("image", "lesion", "ignored", "healthy", "residual_maps"):
            values = getattr(case, name)
            if values is None:
                continue
            values = values if values.dim() == 4 else values[None]
            if len(crop) == 2:
                if name == "image" and stack is not None:
                    values = stack(case.image, torch.tensor([centre[2]]))[0]
                else:
                    values = values[..., centre[2]]
            values = values[(slice(None), *window)].float()
            if any(padding):
                values = F.pad(values[None], padding, mode="replicate")[0]
            collected.setdefault(name, []).append(values)
    return {name: torch.stack(values) for name, values in collected.items()}


def _place(
    cases: Sequence[Case], crop: Sequence[int], lesion_fraction: float, rng: np.random.Generator
) -> tuple[Case, list[int]]:
    """Case, and voxel in the middle of a crop."""
    case = cases[int(rng.integers(len(cases)))]
    centre = [int(rng.integers(size)) for size in case.image.shape[-3:]]
    if case.slices is not None and len(crop) == 2:
        centre[2] = case.slices[int(rng.integers(len(case.slices)))]
    centre = _annotated(case, crop, centre, rng)
    if case.lesion is not None and rng.random() < lesion_fraction:
        slices = _with_lesion(case, crop)
        if not slices:
            for index in rng.permutation(len(cases)):
                if slices := _with_lesion(cases[index], crop):
                    case = cases[index]
                    break
        if slices and case.lesion is not None:
            number, slices = _label(case, slices, rng)
            z = slices[int(rng.integers(len(slices)))]
            held = case.lesion[:, :, z] if number is None else case.lesion[:, :, z] == number
            inside = held.nonzero()
            voxel = [*inside[int(rng.integers(len(inside)))].tolist(), z]
            # Of slices too three are drawn, as ever: trainings that go on find the same crops.
            edges = [*crop, min(crop)][:3]
            jitter = [int(rng.integers(-(edge // 4), edge // 4 + 1)) for edge in edges]
            centre = [place + (jitter[axis] if axis < len(crop) else 0) for axis, place in enumerate(voxel)]
    return case, centre


def _annotated(case: Case, crop: Sequence[int], centre: list[int], rng: np.random.Generator) -> list[int]:
    """A voxel that somebody annotated, of a slice with some; of cases where nobody left any out the one given."""
    if case.ignored is None:
        return centre
    slices = case.annotated_slices if isinstance(case, _LookedThrough) else _lesion_slices(~case.ignored)
    if case.slices is not None and len(crop) == 2:
        slices = [z for z in slices if z in case.slices]
    if not slices:
        return centre
    z = slices[int(rng.integers(len(slices)))]
    inside = (~case.ignored[:, :, z]).nonzero()
    return [*inside[int(rng.integers(len(inside)))].tolist(), z]


def _with_lesion(case: Case, crop: Sequence[int]) -> Sequence[int]:
    """Slices that hold lesion, of those that crops are drawn from."""
    if case.lesion is None:
        return []
    held = case.lesion_slices if case.lesion_slices is not None else _lesion_slices(case.lesion)
    return held if case.slices is None or len(crop) == 3 else [z for z in held if z in case.slices]


def _label(case: Case, slices: Sequence[int], rng: np.random.Generator) -> tuple[int | None, Sequence[int]]:
    """One of the labels that these slices hold, and the slices that hold it; None and all of them where there is but
    one, for which nothing is drawn."""
    assert case.lesion is not None  # slices hold some
    known = case.label_slices if isinstance(case, _LookedThrough) else _label_slices(case.lesion)
    allowed = set(slices)
    held = {number: own for number, every in known.items() if (own := [z for z in every if z in allowed])}
    if len(held) < 2:
        return None, slices
    number = list(held)[int(rng.integers(len(held)))]
    return number, held[number]


def _both_sides(missing: int) -> tuple[int, int]:
    missing = max(missing, 0)
    return missing // 2, missing - missing // 2
