"""Where a stroke lesion lies and what form it has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .streams import Random

__all__ = ["LesionShape", "draw_shape", "draw_site", "lesion_radius", "lesion_volume_quantile", "lesion_volumes"]

MIN_VOLUME_ML, MAX_VOLUME_ML, MEDIAN_VOLUME_ML = 0.01, 500.0, 5.0
# Spread of the log volume: with a median of 5 mL the mean is near 25 mL, as in ATLAS R2.0.
LOG_VOLUME_SPREAD = 1.8
LESION_COUNT_WEIGHTS = (0.45, 0.22, 0.13, 0.09, 0.06, 0.05)
# Lacunes are up to 15 mm wide.
LACUNE_ML = 1.8


@dataclass(frozen=True)
class LesionShape:
    """A connected region in a window of the grid.

    Attributes:
        window: three slices.
        region: of the window's shape, bool.
        depth: float32, 0 at the region's edge, 1 at its core; only its values inside mean something.
    """

    window: tuple[slice, ...]
    region: Tensor
    depth: Tensor


def lesion_volume_quantile(share: float) -> float:
    """Total lesion volume in mL below which a share of the subjects lies; the distribution is log-normal and cut."""
    deviation = float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))
    return float(np.clip(MEDIAN_VOLUME_ML * np.exp(LOG_VOLUME_SPREAD * deviation), MIN_VOLUME_ML, MAX_VOLUME_ML))


def lesion_volumes(random: Random, total_ml: float | None = None, count: int | None = None) -> np.ndarray:
    """Volumes in mL of the lesions; number and sum are drawn from their distributions, or given."""
    few = 1 + int(random.numpy.choice(len(LESION_COUNT_WEIGHTS), p=LESION_COUNT_WEIGHTS))
    drawn = lesion_volume_quantile(random.uniform(0, 1))
    total = drawn if total_ml is None else total_ml
    shares = random.numpy.dirichlet(np.ones(few if count is None else count)) * total
    kept = shares[shares >= MIN_VOLUME_ML]
    return kept if kept.size else np.array([total])


def lesion_radius(volume_ml: float) -> float:
    """In mm, of the ball of that volume."""
    return (3 * volume_ml * 1000 / (4 * np.pi)) ** (1 / 3)


def draw_site(
    free: Tensor, gm: Tensor, middle: np.ndarray, volume_ml: float, spacing: tuple[float, ...], random: Random
) -> tuple[str, np.ndarray] | None:
    """Kind of a lesion and a voxel of ``free`` where it fits; None where nothing is free.

    Args:
        free: (X, Y, Z) bool.
        gm: (X, Y, Z), share of grey matter.
        middle: of the brain, in voxels.
        volume_ml: of the lesion.
        spacing: in mm.
    """
    if volume_ml < LACUNE_ML:
        kind = str(random.numpy.choice(["lacune", "cortical", "any"], p=[0.45, 0.2, 0.35]))
    else:
        kind = str(random.numpy.choice(["territory", "deep", "cortical", "any"], p=[0.45, 0.15, 0.1, 0.3]))
    # Rejection: a list of all candidates would cost more than the rest of a small lesion.
    tried = random.numpy.integers(0, free.shape, (2000, 3))
    off = (tried - middle) * np.asarray(spacing)
    distance = np.linalg.norm(off, axis=1)
    place = tuple(torch.from_numpy(tried.T.copy()))
    fits = free[place].numpy()
    wanted = fits
    if kind in ("lacune", "deep"):
        wanted = fits & (np.abs(off) < (34, 42, 24)).all(1) & (np.abs(off[:, 0]) > 5)
    elif kind == "territory":
        wanted = fits & (distance > 34)
    elif kind == "cortical":
        wanted = fits & (distance > 38) & (gm[place].numpy() > 0.5)
    for good, name in ((wanted, kind), (fits, "any")):
        if good.any():
            return name, tried[int(good.argmax())]
    candidates = free.nonzero()
    if not len(candidates):
        return None
    return "any", candidates[int(random.numpy.integers(len(candidates)))].numpy()


def draw_shape(
    free: Tensor,
    gm: Tensor,
    site: tuple[str, np.ndarray],
    middle: np.ndarray,
    volume_ml: float,
    spacing: tuple[float, ...],
    random: Random,
) -> LesionShape | None:
    """A connected region of about ``volume_ml`` inside ``free``: a distance to the site plus smoothed noise, cut.

    The distance is that of an ellipsoid, or of a wedge that opens from the depth to the cortex, as an artery's
    territory does. None where nothing is free near the site.
    """
    kind, centre = site
    radius = lesion_radius(volume_ml)
    reach = [int(np.ceil((2.5 * radius + 6) / step)) for step in spacing]
    window = tuple(slice(max(0, c - r), min(n, c + r + 1)) for c, r, n in zip(centre, reach, free.shape, strict=True))
    local = tuple(part.stop - part.start for part in window)
    axes = [
        torch.arange(part.start, part.stop, dtype=torch.float32).sub(float(c)) * step
        for part, c, step in zip(window, centre, spacing, strict=True)
    ]
    outward = (centre - middle) * np.asarray(spacing)
    distance = _wedge(axes, outward, radius, random) if kind == "territory" else _ellipsoid(axes, radius, kind, random)
    height = random.smooth(local, 0.8 * radius / spacing[0])[0].mul_(random.uniform(0.15, 0.6)).sub_(distance)
    height += random.smooth(local, 0.3 * radius / spacing[0])[0].mul_(random.uniform(0.05, 0.3))
    if random.chance(0.35):  # a ragged rim
        height += random.smooth(local, 2.0 / spacing[0])[0].mul_(random.uniform(0.05, 0.25))
    if kind == "cortical":
        height += 0.8 * gm[window]
    height[~free[window]] = -torch.inf
    if volume_ml > 1:
        # A stroke lesion keeps to one side of the brain.
        left = torch.arange(local[0]) < middle[0] - window[0].start
        height[left if centre[0] >= middle[0] else ~left] = -torch.inf
    count = min(max(1, round(volume_ml * 1000 / float(np.prod(spacing)))), int(height.isfinite().sum()))
    region = _connected_top(height.numpy(), count)
    if not region.any():
        return None
    inside = height[region]
    low, high = float(inside.min()), float(inside.max())
    return LesionShape(window, region, (height - low) / max(high - low, 1e-6))


def _ellipsoid(axes: list[Tensor], radius: float, kind: str, random: Random) -> Tensor:
    """A random orientation and random half axes of product 1; small deep lesions are rounder."""
    turn, _ = np.linalg.qr(random.numpy.normal(size=(3, 3)))
    stretch = np.exp(random.numpy.normal(0, 0.2 if kind == "lacune" else 0.35, 3))
    stretch /= np.prod(stretch) ** (1 / 3)
    rows = (turn / stretch).T / radius
    return _along(axes, rows[0]).square_().add_(_along(axes, rows[1]).square_()).add_(
        _along(axes, rows[2]).square_()
    ).sqrt_()  # fmt: skip


def _wedge(axes: list[Tensor], outward: np.ndarray, radius: float, random: Random) -> Tensor:
    """Narrow towards the middle of the brain, wide at the cortex, without an end there."""
    tilted = outward + random.numpy.normal(0, 0.25, 3) * np.linalg.norm(outward)
    direction = tilted / max(float(np.linalg.norm(tilted)), 1e-6)
    length = random.uniform(2.0, 2.8) * radius
    along = _along(axes, direction)
    x, y, z = axes
    across = (x.square()[:, None, None] + y.square()[:, None] + z.square()) - along.square()
    share = along.div_(length).add_(0.5)  # 0 at the tip, 1 at the base
    width = share.clamp(0, 1.3).mul_(random.uniform(0.7, 1.2)).add_(0.2).mul_(radius)
    ends = torch.where(share < 0.5, (0.5 - share) / 0.5, (share - 0.5) / 0.9)
    return across.clamp_min_(0).div_(width.square_()).add_(ends.square_().square_()).sqrt_()


def _along(axes: list[Tensor], direction: np.ndarray) -> Tensor:
    """(X, Y, Z): the inner product of each point with a direction."""
    x, y, z = (axis * float(part) for axis, part in zip(axes, direction, strict=True))
    return x[:, None, None] + (y[:, None] + z)


def _connected_top(height: np.ndarray, count: int) -> Tensor:
    """The highest voxels that make one connected region of about ``count``; the cut sinks until one is so large.

    Where regions merge just below a cut, the size jumps: of all cuts tried, that of the closest size is taken.
    """
    finite = height[np.isfinite(height)]
    best, best_size = np.zeros(height.shape, bool), 0
    if not finite.size or not count:
        return torch.from_numpy(best)
    labels = np.empty(height.shape, np.int32)
    low, high = 1.0, 4.0
    for _ in range(7):
        # Most regions are connected at once; the others take a bisection.
        share = low if not best_size else (low * high) ** 0.5
        place = finite.size - min(round(count * share), finite.size)
        ndimage.label(height >= np.partition(finite, place)[place], output=labels)
        sizes = np.bincount(labels.ravel())[1:]
        size = int(sizes.max())
        if abs(np.log(size / count)) < abs(np.log(max(best_size, 1e-9) / count)):
            best, best_size = labels == 1 + int(sizes.argmax()), size
        if 0.95 * count <= size <= 1.05 * count:
            break
        low, high = (share, high) if size < count else (low, share)
    return torch.from_numpy(best)
