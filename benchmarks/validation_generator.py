"""A second synthesizer, of other principles, for validation alone: nothing that trains may import it.

Networks learn the habits of the generator that drew their subjects. This one shares nothing with
``grcsf_fast/synthesis`` but the template: the anatomy is the template's own picture under a stationary velocity field,
contrast is a curve over its intensities, lesions grow voxel by voxel through a random medium (invasion percolation)
and take their intensities from the local and the global histogram, edges blur by partial volume, noise is correlated,
the bias field is a polynomial. What it draws is synthetic too: figures on it say nothing of patients.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from grcsf_fast.synthesis.template import Template

__all__ = ["ValidationSubject", "draw_subject"]


class ValidationSubject(NamedTuple):
    """All (X, Y, Z) but the affine.

    Attributes:
        image: float32, 0 or above.
        lesion: bool.
        affine: (4, 4) float64, voxel to RAS millimetres.
        brain: bool.
    """

    image: np.ndarray
    lesion: np.ndarray
    affine: np.ndarray
    brain: np.ndarray


def draw_subject(template: Template, seed: int, total_ml: float | None = None) -> ValidationSubject:
    """Everything from the seed and the template's spacing.

    Args:
        template: anatomy and grid.
        seed: of numpy's generator.
        total_ml: volume of all lesions together; None: log-uniform from 0.1 to 150 mL. Less comes out where a region
            cannot grow further.
    """
    rng = np.random.default_rng([20_251, seed])
    spacing = np.array(template.spacing)
    t1, gm, wm = _flow(np.stack([part.numpy() for part in (template.t1, template.gm, template.wm)]), spacing, rng)
    brain = ndimage.binary_fill_holes(t1 > 0.1)
    fluid = brain & (gm + wm < 0.3)
    image = _curve(t1, rng) * brain
    image += 0.015 * rng.standard_gamma(2.0) * _correlated(image.shape, 2.0 / spacing, rng) * brain

    total = float(np.exp(rng.uniform(np.log(0.1), np.log(150)))) if total_ml is None else total_ml
    lesion = np.zeros(image.shape, bool)
    shares = rng.dirichlet(np.full(int(rng.integers(1, 5)), 0.8)) * total
    for volume in np.sort(shares)[::-1]:
        count = round(volume * 1000 / float(np.prod(spacing)))
        free = brain & (gm + wm > 0.5) & ~lesion
        if (count < 1 and lesion.any()) or not free.any():
            continue
        region = _percolate(free, max(1, count), spacing, rng)
        image = _mix(image, region, brain, fluid, spacing, rng)
        lesion |= region
    if rng.random() < 0.5:
        image = np.where(brain, image, _shells(brain, spacing, rng))
        kept = None
    else:
        # Stripping is never exact: a little too tight or too wide.
        kept = ndimage.gaussian_filter(brain.astype(np.float32), 1.5 / spacing) > rng.uniform(0.3, 0.6)
    return ValidationSubject(_scan(image, kept, spacing, rng), lesion, template.affine.copy(), brain)


def _flow(maps: np.ndarray, spacing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(K, X, Y, Z) under the exponential of a velocity field: B-splines over 25 mm nodes, scaling and squaring."""
    shape = np.array(maps.shape[1:])
    coarse = np.maximum(8, np.round(shape * spacing / 5)).astype(int)
    nodes = np.maximum(4, np.round(shape * spacing / 25)).astype(int)
    velocity = np.stack([
        ndimage.zoom(rng.normal(0, rng.uniform(1.5, 4.5), nodes), coarse / nodes, order=3) for _ in range(3)
    ])  # fmt: skip
    # In coarse voxels, halved until a step is small; a smaller or larger head is a flow too.
    centred = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in coarse], indexing="ij"))
    growth = rng.normal(0, 0.04, (3, 1, 1, 1)) + rng.normal(0, 0.03)
    flow = (velocity / 5 + growth * centred) / 2**5
    places = np.stack(np.meshgrid(*map(np.arange, coarse), indexing="ij")).astype(float)
    for _ in range(5):
        flow = flow + np.stack([ndimage.map_coordinates(part, places + flow, order=1, mode="nearest") for part in flow])
    scale = (shape - 1) / (coarse - 1)
    target = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij"))
    for axis in range(3):
        fine = ndimage.zoom(flow[axis].astype(np.float32), shape / coarse, order=1, grid_mode=False)
        target[axis] += fine * scale[axis]
    return np.stack([ndimage.map_coordinates(part, target, order=1, mode="constant") for part in maps])


def _curve(t1: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A rising curve through random knots: the order of T1's tissues stays, their distances do not."""
    knots = np.array([0.0, 0.25, 0.5, 0.7, 0.85, 1.0, 1.4])
    rise = np.diff(knots) * rng.lognormal(0, 0.35, len(knots) - 1)
    return np.interp(t1, knots, np.concatenate([[0.0], np.cumsum(rise)])).astype(np.float32)


def _percolate(free: np.ndarray, count: int, spacing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A connected region of ``count`` voxels: of all voxels at its border the one that resists least is next.

    Resistance is the distance from the start, walked by a drunkard first so that long forms come out, plus a rough and
    a fine random medium.
    """
    starts = np.argwhere(free)
    start = starts[rng.integers(len(starts))]
    radius = (3 * count * float(np.prod(spacing)) / (4 * np.pi)) ** (1 / 3)
    steps = rng.normal(0, 1.0, (int(rng.integers(1, 12)), 3)).cumsum(0)
    path = np.concatenate([np.zeros((1, 3)), steps / max(1.0, float(np.abs(steps).max())) * radius])  # mm
    reach = np.ceil((3.5 * radius + 8) / spacing).astype(int)
    low, high = np.maximum(0, start - reach), np.minimum(free.shape, start + reach + 1)
    half = free.shape[0] // 2  # one hemisphere
    low[0], high[0] = (max(low[0], half), high[0]) if start[0] >= half else (low[0], min(high[0], half))
    window = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    axes = np.meshgrid(*[(np.arange(a, b) - s) * d for a, b, s, d in zip(low, high, start, spacing, strict=True)],
                       indexing="ij", sparse=True)  # fmt: skip
    away = np.full([b - a for a, b in zip(low, high, strict=True)], np.inf, np.float32)
    for point in path:
        away = np.minimum(away, sum((axis - p) ** 2 for axis, p in zip(axes, point, strict=True)))
    medium = rng.uniform(0.2, 0.5) * _correlated(away.shape, np.maximum(2.0, 0.4 * radius) / spacing, rng)
    medium += rng.uniform(0.05, 0.25) * rng.standard_normal(away.shape)
    resistance = np.pad(np.where(free[window], np.sqrt(away) / radius + medium, np.inf), 1, constant_values=np.inf)
    neighbours = [axis // resistance.itemsize for axis in resistance.strides]
    offsets = neighbours + [-step for step in neighbours]
    values = resistance.ravel().tolist()
    first = int(np.ravel_multi_index(tuple(start - low + 1), resistance.shape))
    border, seen, grown = [(0.0, first)], {first}, []
    while border and len(grown) < count:
        _, here = heapq.heappop(border)
        grown.append(here)
        for offset in offsets:
            there = here + offset
            if there not in seen and values[there] != np.inf:
                seen.add(there)
                heapq.heappush(border, (values[there], there))
    marked = np.zeros(resistance.size, bool)
    marked[grown] = True
    inner = marked.reshape(resistance.shape)[1:-1, 1:-1, 1:-1]
    # Single voxels that resisted inside the lesion belong to it.
    inner = (inner | ndimage.binary_fill_holes(inner) | (ndimage.uniform_filter(inner.astype(np.float32), 3) > 0.6)) & (
        free[window]
    )
    region = np.zeros_like(free)
    region[window] = inner
    return region


def _mix(
    image: np.ndarray,
    region: np.ndarray,
    brain: np.ndarray,
    fluid: np.ndarray,
    spacing: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Intensities between a low quantile of what lies around and the fluid's; edges by partial volume."""
    (tight,) = ndimage.find_objects(region.astype(np.uint8))
    margin = np.ceil(12 / spacing).astype(int)
    window = tuple(slice(max(0, part.start - m), part.stop + m) for part, m in zip(tight, margin, strict=True))
    local, inner = image[window], region[window]
    around = local[brain[window] & ~inner]
    low, half = np.quantile(around, [rng.uniform(0.02, 0.2), 0.5]) if around.size else (local.max() / 2,) * 2
    scar = float(min(low, rng.uniform(0.75, 0.92) * half))  # what nobody could see is no truth
    water = float(np.quantile(image[fluid], rng.uniform(0.05, 0.4))) if fluid.any() else 0.3 * scar
    depth = ndimage.distance_transform_edt(inner, sampling=spacing)
    turn = rng.uniform(0.0, 1.0) * float(depth.max())
    softness = 0.7 + 0.2 * float(depth.max())
    wet = 1 / (1 + np.exp(-(depth - turn + rng.normal(0, 1.0)) / softness)) * (rng.random() < 0.75)
    value = scar + (min(water, scar) - scar) * wet
    # Some of what was there shows through, in other places than it was.
    value = value + rng.uniform(0.1, 0.4) * (ndimage.uniform_filter(np.roll(local, 3, 1), 3) - around.mean())
    value = value * (1 + 0.06 * _correlated(inner.shape, 2.5 / spacing, rng))
    share = ndimage.uniform_filter(inner.astype(np.float32), np.maximum(1, np.round(2 / spacing)).astype(int))
    result = image.copy()
    result[window] = np.where(brain[window], local + share * (np.maximum(value, 0) - local), local)
    return result


def _shells(brain: np.ndarray, spacing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fluid, bone and skin by distance from the brain, thicker below."""
    distance = ndimage.distance_transform_edt(~brain, sampling=spacing)
    distance = distance * (1 + 0.2 * _correlated(brain.shape, 20 / spacing, rng))
    bounds = np.cumsum([0, rng.uniform(1, 3), rng.uniform(3, 6), rng.uniform(3, 6)])
    shells = np.zeros(brain.shape, np.float32)
    levels = (0.25, rng.uniform(0.03, 0.15), rng.uniform(0.7, 1.3))
    for level, low, high in zip(levels, bounds[:-1], bounds[1:], strict=True):
        shells[(distance > low) & (distance <= high)] = level
    return shells


def _scan(image: np.ndarray, kept: np.ndarray | None, spacing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Partial volume of larger voxels, a cubic bias field, correlated noise of which a part follows the signal."""
    if rng.random() < 0.4:
        factor = np.where(rng.random(3) < 0.5, rng.uniform(1.2, 2.5), 1.0)
        small = [max(4, round(n / f)) for n, f in zip(image.shape, factor, strict=True)]
        box = [max(1, round(f)) for f in factor]
        part = ndimage.zoom(ndimage.uniform_filter(image, box), np.array(small) / image.shape, order=1)
        image = ndimage.zoom(part, np.array(image.shape) / part.shape, order=1)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in image.shape], indexing="ij", sparse=True)
    terms = (x, y, z, x * y, y * z, x * z, x * x, y * y, z * z, y**3, z**3)
    bias = 1 + sum(rng.normal(0, 0.07) * term for term in terms)
    width = rng.uniform(0.3, 0.8) / spacing
    noise = rng.uniform(0.005, 0.04) * _correlated(image.shape, width, rng)
    noise = noise + rng.uniform(0, 0.03) * image * _correlated(image.shape, width, rng)
    image = np.abs(image * np.maximum(bias, 0.3) + noise)
    if kept is not None:
        image = image * kept
    return (image * rng.lognormal(5, 1)).astype(np.float32)


def _correlated(shape: tuple[int, ...], width: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White noise under a Gaussian of that width in voxels, brought back to unit variance."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), width, mode="wrap")
    return noise / max(float(noise.std()), 1e-6)
