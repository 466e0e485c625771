"""Intensities: what counts as background, damage and head, and the recipes that the networks are trained with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError
from .geometry import VolumeError

__all__ = ["OPTIONAL", "Intensities", "Preprocessing", "head_box", "normalise", "sound", "without_outliers"]

MAX_BAD_SHARE = 0.01  # of voxels that are NaN or infinite and no background; above it a volume is refused
MAX_INTENSITY = 1e30  # squares of what is above leave float32
SAMPLE = 2**15  # voxels that quantiles are taken of
# A voxel that lies this many times further from the background than the brightest 1.5 % begin is no tissue; vessels
# reach 5 times, metal 10.
ABSURD = 20.0
OUTLIER_SHARE = 0.015
DARKEST_SHARE = 0.001  # of voxels that may be darker than air
CONSTANT_SHARE = 0.2  # of voxels with one value, which is a background then
BOTH_SIDES = 0.25  # what lies below a background to what lies above, by their distances, of a head that was normalised
AIR = -1000.0
# Head in a plane that is none, of the plane and of the head in the fullest one.
NOISE, NOISE_OF_FULLEST = 0.01, 0.03
PADDED = (
    "more voxels than outliers would be lie below all Hounsfield units; as padding around the scan, they became air"
)
HOUNSFIELD = (-(2.0**15), 2.0**16)  # what scanners can write, metal included

OPTIONAL = ("others", "constant_background")  # keys of a Preprocessing that files of before have not


@dataclass(frozen=True)
class Intensities:
    """The intensities of one channel; see :class:`Preprocessing`, whose attributes of the same names they are.

    Attributes:
        modality: ``"mri"`` or ``"ct"``.
        percentiles: lower and upper; MRI only.
        hu_window: lower and upper Hounsfield units; CT only.

    Raises:
        ArgumentError: other values.
    """

    modality: str = "mri"
    percentiles: tuple[float, float] = (0.5, 99.5)
    hu_window: tuple[float, float] = (-160.0, 240.0)

    def __post_init__(self) -> None:
        if self.modality not in ("mri", "ct"):
            raise ArgumentError(f"modality: expected 'mri' or 'ct', got {self.modality!r}")
        percentiles, window = _numbers(self.percentiles, 2), _numbers(self.hu_window, 2)
        if percentiles is None or not 0 <= percentiles[0] < percentiles[1] <= 100:
            raise ArgumentError(f"percentiles: expected 0 <= lower < upper <= 100, got {self.percentiles!r}")
        if window is None or not window[0] < window[1]:
            raise ArgumentError(f"hu_window: expected lower < upper, got {self.hu_window!r}")


def _numbers(given: Any, count: int) -> tuple[float, ...] | None:
    """So many finite numbers, of Python, NumPy or PyTorch; None of anything else."""
    try:
        if any(isinstance(value, str) for value in given):
            return None
        found = tuple(map(float, given))
    except (TypeError, ValueError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


@dataclass(frozen=True)
class Preprocessing:
    """How a volume becomes what the networks saw in training; stored in the bundle.

    Attributes:
        spacing: (3,) mm, x, y, z after reorientation to RAS.
        modality: ``"mri"``: cut at the upper percentile, then z-score within the head; ``"ct"``: cut at ``hu_window``
            and scaled to [-1, 1].
        percentiles: lower and upper, of the voxels above an eighth of the mean; the mean between them sets what
            counts as head; MRI only.
        hu_window: lower and upper Hounsfield units; CT only.
        margin: voxels kept around the head's box.
        others: of the channels after the first, where theirs differ; empty: every channel as the first.
        constant_background: of an MRI a background of one value is air whatever it is, and as dark as the darkest of
            a head that was normalised before; False, that of bundles from before it: below 0 alone, and as stored.

    Raises:
        ArgumentError: other values.
    """

    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0)
    modality: str = "mri"
    percentiles: tuple[float, float] = (0.5, 99.5)
    hu_window: tuple[float, float] = (-160.0, 240.0)
    margin: int = 2
    others: tuple[Intensities, ...] = ()
    constant_background: bool = True

    def __post_init__(self) -> None:
        Intensities(self.modality, self.percentiles, self.hu_window)
        spacing = _numbers(self.spacing, 3)
        if spacing is None or not min(spacing) > 0:
            raise ArgumentError(f"spacing: expected three numbers above 0 in mm, got {self.spacing!r}")
        if not isinstance(self.others, tuple) or not all(isinstance(one, Intensities) for one in self.others):
            raise ArgumentError(
                f"others: expected a tuple of Intensities of the channels after the first, got {self.others!r}"
            )
        if isinstance(self.margin, bool) or not isinstance(self.margin, Integral) or self.margin < 0:
            raise ArgumentError(f"margin: expected a whole number from 0 up, got {self.margin!r}")
        # NumPy's numbers, such as those of nibabel's headers, are none of JSON's.
        for name in ("spacing", "percentiles", "hu_window"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        object.__setattr__(self, "margin", int(self.margin))

    def of_channel(self, number: int) -> Preprocessing:
        """What a channel is prepared by, from 0."""
        if not number or not self.others:
            return self
        return replace(self, others=(), **asdict(self.others[number - 1]))

    def as_json(self) -> dict[str, Any]:
        """For JSON. Keys that older files do not have are left out where they are empty or False."""
        values = asdict(self)
        for name in OPTIONAL:
            if not values[name]:
                del values[name]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From what :meth:`as_json` and JSON make of it.

        Raises:
            TypeError, ValueError: something else.
        """
        others = tuple(Intensities(**_tuples(one)) for one in values.get("others", ()))
        own = {"constant_background": False} | {key: value for key, value in values.items() if key != "others"}
        return cls(**_tuples(own), others=others)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists alone."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def sound(data: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Voxels without NaN and infinite ones.

    Args:
        data: (X, Y, Z) float32.
        name: for messages.

    Returns:
        (X, Y, Z) float32, and what was done, empty where nothing was. NaN outside the head, as SPM writes it, becomes
        the darker of 0 and the volume's own background; other bad voxels get the median of their neighbours.

    Raises:
        VolumeError: more than 1 % are bad beyond such a background, or all.
    """
    bad = ~np.isfinite(data)
    count = int(bad.sum())
    if not count:
        return data, ""
    if count == data.size:
        raise VolumeError(f"{name}: expected an image, found nothing but NaN or infinite voxels")
    outside = _background(data, bad) if count > MAX_BAD_SHARE * data.size else np.zeros_like(bad)
    inside = count - int(outside.sum())
    if inside > MAX_BAD_SHARE * data.size:
        raise VolumeError(
            f"{name}: expected at most {MAX_BAD_SHARE:.0%} NaN or infinite voxels beside a background around the head, "
            f"found {inside} of {data.size} ({inside / data.size:.1%})"
        )
    air = min(0.0, float(np.quantile(_sample(data[~bad]), 0.005)))
    data = np.where(outside, np.float32(air), data)
    remarks = []
    if inside < count:
        remarks.append(f"{count - inside} NaN voxels of {data.size} around the head were taken as background ({air:g})")
    if inside:
        _fill(data, bad & ~outside)
        remarks.append(f"{inside} NaN or infinite voxels of {data.size} got the median of their neighbours")
    return data, "; ".join(remarks)


def _background(data: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Which NaN voxels surround a head: (X, Y, Z) bool, nothing where it is not certain that they do.

    They are most of the volume's border, as of a stripped head, or they begin in the dark, as beside a head that was
    turned in its box.
    """
    from scipy import ndimage

    nan = np.isnan(data)
    nothing = np.zeros_like(nan)
    ends = [nan.take(end, axis) for axis in range(3) for end in (0, -1)]
    for axis in range(3):
        # A slice that is missing in the middle is damage.
        held = np.flatnonzero(~bad.all(tuple(other for other in range(3) if other != axis)))
        if len(held) != held[-1] - held[0] + 1:
            return nothing
    # Of scattered NaN most voxels have one beside them; of a head only its surface has.
    beside = ndimage.binary_dilation(nan) & ~bad
    if beside.sum() > 0.5 * (~bad).sum():
        return nothing
    sound_ = data[~bad].astype(np.float64)
    air = np.quantile(sound_, 0.005)
    dark = not beside.any() or np.median(data[beside]) - air < 0.25 * (sound_.mean() - air)
    if not dark and sum(end.sum() for end in ends) < 0.5 * sum(end.size for end in ends):
        return nothing
    labels, count = ndimage.label(nan)
    reaches = np.zeros(count + 1, bool)
    for axis in range(3):
        for end in (0, -1):
            reaches[np.unique(labels.take(end, axis))] = True
    reaches[0] = False
    return reaches[labels]


def without_outliers(data: np.ndarray, preprocessing: Preprocessing, name: str) -> tuple[np.ndarray, list[str]]:
    """Voxels without absurd ones, which resampling would smear and which would decide what counts as head.

    Args:
        data: (X, Y, Z) float32, finite.
        preprocessing: the modality that is expected.
        name: for messages.

    Returns:
        (X, Y, Z) float32, the same array where there is no outlier; and what is doubtful or was done, a sentence each.

    Raises:
        VolumeError: intensities whose squares leave float32, or a CT that is not in Hounsfield units.
    """
    sample = _sample(data)
    low, high = HOUNSFIELD if preprocessing.modality == "ct" else _limits(sample)
    least, most = float(data.min()), float(data.max())
    remarks = _modality_remarks(sample, preprocessing.modality)
    if least < low or most > high:
        absurd = (data < low) | (data > high)
        if preprocessing.modality == "ct" and absurd.sum() > MAX_BAD_SHARE * data.size:
            data = _without_padding(data, low, high, name)
            remarks.append(PADDED)
            absurd = data > high
        if absurd.any():
            remarks.append(
                f"{int(absurd.sum())} voxels of {data.size}, from {float(data[absurd].min()):g} to "
                f"{float(data[absurd].max()):g}, lie far outside of all others ({low:.4g} to {high:.4g}); they got the "
                "median of their neighbours"
            )
            data = data.copy(order="K")
            _fill(data, absurd)
        least, most = float(data.min()), float(data.max())
    if max(-least, most) > MAX_INTENSITY:
        raise VolumeError(f"{name}: expected intensities within {MAX_INTENSITY:g}, found {least:g} to {most:g}")
    return data, remarks


def _without_padding(data: np.ndarray, low: float, high: float, name: str) -> np.ndarray:
    """What lies below all Hounsfield units becomes air: some scanners write it around the round field of view."""
    above = int((data > high).sum())
    if above > MAX_BAD_SHARE * data.size or float(data.max()) < low:
        raise VolumeError(
            f"{name}: expected a CT in Hounsfield units, {low:g} to {high:g}, found {above} of {data.size} voxels "
            f"above and {int((data < low).sum())} below"
        )
    return np.where(data < low, np.float32(AIR), data)


def _limits(sample: np.ndarray) -> tuple[float, float]:
    """The range outside of which no tissue of an MRI lies; infinite where the sample does not tell."""
    darkest, brightest = (float(value) for value in np.quantile(sample, (OUTLIER_SHARE, 1 - OUTLIER_SHARE)))
    air = min(0.0, darkest)
    # In a stripped volume even the brightest 1.5 % may begin in the background, all of one value.
    tissue = sample[sample != np.median(sample)]
    scale = max(brightest, float(np.median(tissue)) if tissue.size else 0.0) - air
    if not scale > 0:
        return -np.inf, np.inf
    return air - ABSURD * scale, air + ABSURD * scale


def _modality_remarks(sample: np.ndarray, modality: str) -> list[str]:
    low, high = (float(value) for value in np.quantile(sample, (0.001, 0.999)))
    found = f"found values from {low:.4g} to {high:.4g}"
    if modality == "mri" and ((sample > -1100) & (sample < -900)).mean() > 0.02:
        return [f"expected an MRI, as the networks were trained on, {found} with air at -1000: is this a CT?"]
    if modality == "ct" and not -5000 < low < -200:
        return [f"expected a CT in Hounsfield units, as the networks were trained on, {found}: is this an MRI?"]
    return []


def _sample(data: np.ndarray) -> np.ndarray:
    """All voxels, or as many drawn evenly of more, in float64: the same for the same volume, in memory as in a file."""
    if data.size > SAMPLE:
        drawn = np.random.default_rng(0).integers(data.size, size=SAMPLE)
        data = data[np.unravel_index(drawn, data.shape, order="F")]
    return data.ravel().astype(np.float64)


def _fill(data: np.ndarray, bad: np.ndarray) -> None:
    """Gives bad voxels the median of their sound neighbours (of 26), from the rim of a damaged region inwards.

    A mean would blur the head's edge, and what counts as head with it.
    """
    steps = np.array([step for step in np.ndindex(3, 3, 3) if step != (1, 1, 1)]) - 1
    places = np.argwhere(bad)
    while len(places):
        around = places[:, None] + steps
        within = ((around >= 0) & (around < data.shape)).all(2)
        index = tuple(np.where(within, around[..., axis], 0) for axis in range(3))
        usable = within & ~bad[index]
        known = usable.any(1)
        values = np.where(usable, data[index], np.nan)[known].astype(np.float64)  # two may sum to more than float32
        data[tuple(places[known].T)] = np.nanmedian(values, axis=1)
        bad[tuple(places[known].T)] = False
        places = places[~known]


def normalise(data: Tensor, preprocessing: Preprocessing, name: str) -> tuple[Tensor, Tensor]:
    """Normalised intensities and the head's mask, both (X, Y, Z)."""
    if preprocessing.modality == "ct":
        low, high = preprocessing.hu_window
        return (data.clamp(low, high) - low) / (high - low) * 2 - 1, data > -300
    air, inside = _air(data, preprocessing.constant_background)
    if inside is not None:
        if int(inside.sum()) < 64:
            raise VolumeError(f"{name}: expected a head, found {int(inside.sum())} voxels beside the background")
        if preprocessing.constant_background:
            least, high = _percentiles(data[inside], (100 * DARKEST_SHARE, preprocessing.percentiles[1]))
            data = torch.where(inside, data, least)
        else:
            _, high = _percentiles(data[inside], preprocessing.percentiles)
        data = data.clamp(max=high)
        return (data - data[inside].mean()) / data[inside].std().clamp_min(1e-6 * (high - air)), inside
    # SPM's global: the voxels above an eighth of the mean are the object.
    data = (data - air).clamp(min=0.0) if air else data
    object_ = data[data > data.mean() / 8]
    if object_.numel() < 64:
        raise VolumeError(f"{name}: expected a head, found {object_.numel()} voxels above the background")
    low, high = _percentiles(object_, preprocessing.percentiles)
    if not high > low:
        raise VolumeError(f"{name}: expected a head, found one intensity ({high:g}) in almost all of it")
    data = data.clamp(max=high)
    head = data > 0.25 * object_.clamp(low, high).mean()
    inside = data[head]
    return (data - inside.mean()) / inside.std().clamp_min(1e-6 * high), head


def _air(data: Tensor, anywhere: bool) -> tuple[float, Tensor | None]:
    """What is subtracted so that the air of an MRI is 0, and the head where that tells it.

    A background of one value, as a stripped head has it, is air itself: what lies below are the undershoots of a
    resampling. Where much of the head lies below as it lies above, the head was normalised before, and is all that is
    not background. Without such a background air is what only a few voxels are darker than, if they are below 0.

    Args:
        data: (X, Y, Z).
        anywhere: look at volumes without values below 0 too.
    """
    below_zero = float(data.min()) < 0
    if not below_zero and not anywhere:
        return 0.0, None
    step = max(1, data.numel() // SAMPLE)
    while anywhere and math.gcd(step, data.numel()) > 1:  # else it may be one plane that is looked at
        step += 1
    sample = data.flatten()[::step].cpu().numpy()
    values, counts = np.unique(sample, return_counts=True)
    most = int(counts.argmax())
    background = float(values[most])
    if int(counts[most]) < CONSTANT_SHARE * len(sample):
        return min(0.0, float(np.sort(sample)[int(DARKEST_SHARE * len(sample))])), None
    distances = (values - values[most]).astype(np.float64) * counts
    below, above = float(-distances.clip(max=0).sum()), float(distances.clip(min=0).sum())
    if below > BOTH_SIDES * above:
        if below_zero or above > BOTH_SIDES * below:
            return background, data != background
        return 0.0, None  # the brightest voxels have one value
    return background if anywhere else min(0.0, background), None


def _percentiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    # torch.quantile refuses more than 2**24 values.
    if values.device.type != "cpu":
        return _by_sorting(values, shares)
    return [float(np.percentile(values.numpy(), share)) for share in shares]


def _by_sorting(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Of at least two values, as NumPy interpolates them; what leaves their device is a few of them."""
    places = [share / 100 * (len(values) - 1) for share in shares]
    below = [min(int(place), len(values) - 2) for place in places]
    ranked = values.sort().values
    ends = torch.stack([ranked[first : first + 2] for first in below]).double().tolist()
    return [low + (place - first) * (high - low) for place, first, (low, high) in zip(places, below, ends, strict=True)]


def head_box(head: Tensor, margin: int, padded: bool = True) -> tuple[slice, slice, slice]:
    """The box of the head with a margin; planes with under 1 % of head are noise.

    Args:
        head: (X, Y, Z) bool.
        margin: in voxels.
        padded: of a head that is small in the volume also planes count with 3 % of what the fullest has.
    """
    box = []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        share = head.float().mean(others)
        least = (NOISE_OF_FULLEST * share.max()).clamp(max=NOISE) if padded and share.numel() else NOISE
        found = (share > least).nonzero().flatten()
        if not len(found):
            found = torch.arange(head.shape[axis], device=head.device)
        first, last = int(found[0]) - margin, int(found[-1]) + 1 + margin
        box.append(slice(max(0, first), min(head.shape[axis], last)))
    return tuple(box)
