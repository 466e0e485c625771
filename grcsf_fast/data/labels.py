"""Several kinds of lesion: their names, the numbers that stand for them in masks, and the outputs of networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError
from ..runtime.transfers import CPU, to_device
from .volumes import Prepared, mask_shares

__all__ = ["Labels", "any_label", "prepare_numbers"]

NAME = re.compile(r"[^\s,=+/\\]([^,=+/\\\n]*[^\s,=+/\\])?")
LEAST = 1e-6  # of a probability, so that its logarithm is finite


@dataclass(frozen=True)
class Labels:
    """What networks tell apart: classes that exclude each other, or regions that may overlap.

    Attributes:
        names: at least one; of one alone whatever else masks hold is background.
        numbers: of each the numbers in masks, from 1 to 255; a class has one of its own, a region joins some.
        exclusive: classes, of which a voxel has one at most; False: regions.

    Raises:
        ArgumentError: names or numbers that cannot be used.
    """

    names: tuple[str, ...]
    numbers: tuple[tuple[int, ...], ...]
    exclusive: bool = True

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ArgumentError(f"labels: expected different names, got {', '.join(self.names) or 'none'}")
        if len(self.numbers) != len(self.names):
            raise ArgumentError(f"labels: expected numbers for {len(self.names)} names, got {len(self.numbers)}")
        for name, numbers in zip(self.names, self.numbers, strict=True):
            if not NAME.fullmatch(name):
                raise ArgumentError(f"labels: expected a name without any of , = + / and \\, got {name!r}")
            if not numbers or not all(type(number) is int and 1 <= number <= 255 for number in numbers):
                raise ArgumentError(f"labels: expected whole numbers from 1 to 255 for {name}, got {numbers}")
            if self.exclusive and len(numbers) != 1:
                raise ArgumentError(f"labels: expected one number for the class {name}, got {numbers}")
        if self.exclusive and len(self.every) < len(self.names):
            raise ArgumentError(f"labels: expected a number of its own for every class, got {self.numbers}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Labels:
        """From what :func:`dataclasses.asdict` and JSON make of it."""
        names, numbers, exclusive = values["names"], values["numbers"], values["exclusive"]
        return cls(tuple(map(str, names)), tuple(tuple(one) for one in numbers), bool(exclusive))

    @property
    def every(self) -> tuple[int, ...]:
        """All numbers, in order."""
        return tuple(sorted({number for numbers in self.numbers for number in numbers}))

    @property
    def outputs(self) -> int:
        """Channels of a network's logits: of classes one more, the first, for what is none of them."""
        return len(self.names) + int(self.exclusive)

    def target(self, numbers: Tensor) -> Tensor:
        """What logits are trained towards.

        Args:
            numbers: (B, 1, \\*S), numbers as in masks.

        Returns:
            (B, outputs, \\*S) of the same dtype, 1 and 0.
        """
        own = [torch.isin(numbers, torch.tensor(one, device=numbers.device)) for one in self.numbers]
        parts = [~torch.cat(own, 1).any(1, keepdim=True), *own] if self.exclusive else own
        return torch.cat(parts, 1).to(numbers.dtype)

    def chosen(self, probabilities: Tensor) -> Tensor:
        """The number that is most probable at each voxel, given that one of them is there.

        Of classes the most probable one's; of regions the number whose membership in all of them is most probable,
        the lowest of several that lie in the same regions.

        Args:
            probabilities: (K, \\*S) in [0, 1], one for each name.

        Returns:
            (\\*S) uint8.
        """
        inside = [[float(number in one) for one in self.numbers] for number in self.every]
        weights, every = (
            to_device(torch.tensor(values, dtype=dtype, device=CPU), probabilities.device)
            for values, dtype in ((inside, torch.float32), (self.every, torch.uint8))
        )
        likely = torch.logit(probabilities.float(), LEAST)
        return every[torch.einsum("nk,k...->n...", weights, likely).argmax(0)]

    def marked(self, mask: np.ndarray, name: str) -> np.ndarray:
        """Where a mask of numbers shows one of the names: bool."""
        return np.isin(mask, self.numbers[self.names.index(name)])


def any_label(probabilities: Tensor, labels: Labels) -> Tensor:
    """The probability that there is any: (K, \\*S) to (\\*S).

    Classes exclude each other, so theirs sum up; of regions it is the highest.
    """
    return probabilities.sum(0).clamp(max=1) if labels.exclusive else probabilities.amax(0)


def prepare_numbers(numbers: np.ndarray, prepared: Prepared) -> Tensor:
    """Bring a mask of numbers to the grid of ``prepared``.

    A voxel has a number where lesion of any number covers at least half of it, as in
    :func:`grcsf_fast.data.volumes.prepare_mask`: the one that covers most, and the lowest of equals.

    Args:
        numbers: (X, Y, Z) uint8, on the grid of the file that ``prepared`` was read from.
        prepared: the volume it belongs to.

    Returns:
        (X, Y, Z) uint8.

    Raises:
        ValueError: another shape.
    """
    shares, whole = mask_shares(numbers, prepared)
    covered = 2 * shares >= whole
    found = np.zeros(covered.shape, np.uint8)
    most = np.zeros(covered.shape)
    for number in np.unique(numbers[numbers > 0]):
        own, _ = mask_shares(numbers == number, prepared)
        larger = covered & (own > most)
        found[larger], most[larger] = number, own[larger]
    return torch.from_numpy(np.ascontiguousarray(found[prepared.box]))
