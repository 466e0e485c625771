"""The first synthesizer, frozen on 2026-11-26, so that figures of the held-out subjects stay comparable over the years.

Do not improve this file: the same seed gives the same subject, bit for bit on the same machine. The package's own
synthesizer, ``grcsf_fast/synthesis``, goes on. Lesions are synthetic: figures measured on them say nothing of
patients. Contrasts are randomised tissue by tissue as in SynthSeg (Billot et al., 2023) and SynthStroke (Chalcroft et
al., 2025); the code and the choices are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from grcsf_fast.synthesis.template import Template

__all__ = ["Subject", "lesion_volume_quantile", "synthesize_subject"]

MIN_VOLUME_ML, MAX_VOLUME_ML, MEDIAN_VOLUME_ML = 0.01, 500.0, 5.0
# Spread of the log volume: with a median of 5 mL the mean is near 25 mL, as in ATLAS R2.0.
LOG_VOLUME_SPREAD = 1.8
LESION_COUNT_WEIGHTS = (0.45, 0.22, 0.13, 0.09, 0.06, 0.05)


@dataclass(frozen=True)
class Subject:
    """One synthetic scan.

    Attributes:
        image: (X, Y, Z) float32, arbitrary units, 0 or above.
        lesion: (X, Y, Z) bool, the exact truth.
        brain: (X, Y, Z) bool, inside of the head without skull: tissue and cerebrospinal fluid.
        affine: (4, 4) float64, voxel to RAS millimetres.
        record: what was drawn, ready for JSON.
    """

    image: Tensor
    lesion: Tensor
    brain: Tensor
    affine: np.ndarray
    record: dict[str, Any] = field(default_factory=dict)


class _Random:
    """Scalars from numpy, fields from torch, both from one seed."""

    def __init__(self, seed: int) -> None:
        self.numpy = np.random.default_rng(seed)
        self.torch = torch.Generator().manual_seed(int(self.numpy.integers(2**62)))

    def uniform(self, low: float, high: float) -> float:
        return float(self.numpy.uniform(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self.numpy.random() < probability)

    def smooth(self, shape: tuple[int, ...], scale: float, channels: int = 1) -> Tensor:
        """(channels, *shape) noise of about unit variance at its nodes, which lie ``scale`` voxels apart."""
        nodes = [max(2, int(np.ceil(size / max(scale, 1.0))) + 2) for size in shape]
        coarse = torch.randn(channels, *nodes, generator=self.torch)
        # Trilinear interpolation as three matrix products, several times as fast as F.interpolate.
        x, y, z = (_interpolation(count, size) for count, size in zip(nodes, shape, strict=True))
        planes = y @ (coarse @ z.T)  # (channels, nodes, Y, Z)
        return (x @ planes.flatten(2)).unflatten(2, shape[1:])

    def white(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.torch)


def _interpolation(count: int, size: int) -> Tensor:
    """(size, count): linear interpolation from ``count`` nodes, the outer two at the ends of the axis."""
    return F.interpolate(torch.eye(count)[None], size=size, mode="linear", align_corners=True)[0].T


def synthesize_subject(
    template: Template,
    seed: int,
    lesions: bool = True,
    skull: bool | None = None,
    contrast: str = "random",
    total_ml: float | None = None,
    count: int | None = None,
) -> Subject:
    """Draw an individual from the template: warp, contrast, lesions, skull, bias field, blur, noise.

    Args:
        template: the anatomy and the grid.
        seed: everything follows from it and the template's spacing.
        lesions: put 1 to 6 stroke lesions in.
        skull: with a skull-like rim around the brain; None: by chance.
        contrast: ``"random"``: tissue intensities drawn anew, blended with the template's own by chance;
            ``"template"``: the real average's own intensities.
        total_ml: volume of all lesions together; None: drawn.
        count: of lesions; None: 1 to 6, drawn. Fewer come out where a share falls below 0.01 mL or no tissue is left.

    Returns:
        The subject on the template's grid, widened by 14 mm on every side where there is a skull.

    Raises:
        ValueError: another contrast, a volume outside 0.01 to 500 mL, or a count below 1.
    """
    if contrast not in ("random", "template"):
        raise ValueError(f"contrast: expected 'random' or 'template', got {contrast!r}")
    if total_ml is not None and not MIN_VOLUME_ML <= total_ml <= MAX_VOLUME_ML:
        raise ValueError(f"total_ml: expected {MIN_VOLUME_ML} to {MAX_VOLUME_ML} mL, got {total_ml}")
    if count is not None and count < 1:
        raise ValueError(f"count: expected 1 or more, got {count}")
    random = _Random(seed)
    spacing = template.spacing
    skull = random.chance(0.5) if skull is None else skull
    margin = [round(14 / step) if skull else 0 for step in spacing]
    maps = torch.stack([template.t1, template.gm, template.wm, (template.t1 > 0.05).float()])
    maps = F.pad(maps, [m for m in reversed(margin) for _ in range(2)])
    affine = template.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.array(margin)

    t1, gm, wm, brain = _warp(maps, spacing, random)
    inside = brain > 0.5
    gm, wm, csf = _tissues(gm, wm, inside, spacing, random)
    levels = _tissue_levels(random)
    image = _contrast(t1, gm, wm, csf, levels, 1.0 if contrast == "template" else None, spacing, random)

    lesion = torch.zeros_like(inside)
    drawn: list[dict[str, float]] = []
    if lesions:
        tissue = (gm + wm > 0.5) & inside
        volumes = _lesion_volumes(random, total_ml, count)
        image, lesion, drawn = _insert_lesions(image, tissue, csf > 0.9, gm > 0.8, volumes, spacing, random)
    image = image * inside
    if skull:
        image = _add_skull(image, inside, levels, spacing, random)
    image = _acquire(image, None if skull else inside, spacing, random)
    record = {
        "seed": seed,
        "skull": skull,
        "contrast": contrast,
        "spacing_mm": list(spacing),
        "lesions": drawn,
        "lesion_volume_ml": float(lesion.sum()) * float(np.prod(spacing)) / 1000,
    }
    return Subject(image, lesion, inside, affine, record)


def _warp(maps: Tensor, spacing: tuple[float, ...], random: _Random) -> Tensor:
    """An affine and an elastic deformation of (K, X, Y, Z)."""
    shape = tuple(maps.shape[1:])
    angles = random.numpy.normal(0, np.deg2rad(6), 3)
    scales = random.numpy.uniform(0.9, 1.1) * random.numpy.uniform(0.94, 1.06, 3)
    shears = random.numpy.normal(0, 0.03, 3)
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        first, second = [other for other in range(3) if other != axis]
        turn[[first, first, second, second], [first, second, first, second]] = (
            np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle),
        )  # fmt: skip
        matrix = matrix @ turn
    shear = np.eye(3)
    shear[0, 1], shear[0, 2], shear[1, 2] = shears
    matrix = matrix @ shear / scales
    shift = random.numpy.normal(0, 3, 3)

    offset = random.smooth(shape, 32 / spacing[0], 3) * random.uniform(1, 4.5)
    offset += random.smooth(shape, 14 / spacing[0], 3) * random.uniform(0, 1.6)
    x, y, z = ((torch.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True))
    # grid_sample wants (z, y, x) order in [-1, 1].
    grid = torch.empty(*shape, 3)
    for axis, row in enumerate(matrix.tolist()):
        turned = offset[axis] + (row[0] * x + float(shift[axis]))[:, None, None]
        turned += (row[1] * y)[:, None] + row[2] * z
        grid[..., 2 - axis] = turned / ((shape[axis] - 1) / 2 * spacing[axis])
    return F.grid_sample(maps[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=True)[0]


def _tissues(
    gm: Tensor, wm: Tensor, inside: Tensor, spacing: tuple[float, ...], random: _Random
) -> tuple[Tensor, Tensor, Tensor]:
    """Sharpen the averaged probabilities and widen the fluid spaces here and there: a person's sulci are darker."""
    fluid = (1 - gm - wm).clamp_min(0)
    widening = torch.exp(random.smooth(tuple(gm.shape), 30 / spacing[0])[0] * random.uniform(0, 0.5))
    fluid = fluid * widening * random.uniform(0.8, 2.5)
    power = random.uniform(1.0, 3.0)
    stack = torch.stack([gm, wm, fluid]).clamp_min(0) ** power
    stack = stack / stack.sum(0).clamp_min(1e-6) * inside
    return stack[0], stack[1], stack[2]


def _tissue_levels(random: _Random) -> dict[str, float]:
    white = random.uniform(0.8, 1.1)
    grey = white * random.uniform(0.6, 0.92)
    return {"wm": white, "gm": grey, "csf": grey * random.uniform(0.1, 0.5)}


def _contrast(
    t1: Tensor,
    gm: Tensor,
    wm: Tensor,
    csf: Tensor,
    levels: dict[str, float],
    share: float | None,
    spacing: tuple[float, ...],
    random: _Random,
) -> Tensor:
    """Tissue intensities times slow and fast texture, blended with the real average by ``share`` (None: drawn)."""
    shape = tuple(gm.shape)
    drawn = torch.zeros(shape)
    for name, tissue in (("gm", gm), ("wm", wm), ("csf", csf)):
        slow = random.smooth(shape, 25 / spacing[0])[0] * random.uniform(0, 0.06)
        fast = random.smooth(shape, 4 / spacing[0])[0] * random.uniform(0, 0.04)
        drawn += tissue * levels[name] * (1 + slow + fast)
    if share is None:
        share = 0.0 if random.chance(0.4) else random.uniform(0.2, 1.0)
    return share * t1 + (1 - share) * drawn


def lesion_volume_quantile(share: float) -> float:
    """Total lesion volume in mL below which a share of the subjects lies; the distribution is log-normal and cut."""
    deviation = float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))
    return float(np.clip(MEDIAN_VOLUME_ML * np.exp(LOG_VOLUME_SPREAD * deviation), MIN_VOLUME_ML, MAX_VOLUME_ML))


def _lesion_volumes(random: _Random, total_ml: float | None = None, count: int | None = None) -> np.ndarray:
    """Volumes in mL of the lesions; number and sum are drawn from their distributions, or given."""
    few = 1 + int(random.numpy.choice(len(LESION_COUNT_WEIGHTS), p=LESION_COUNT_WEIGHTS))
    drawn = lesion_volume_quantile(random.uniform(0, 1))
    total = drawn if total_ml is None else total_ml
    shares = random.numpy.dirichlet(np.ones(few if count is None else count)) * total
    kept = shares[shares >= MIN_VOLUME_ML]
    return kept if kept.size else np.array([total])


def _insert_lesions(
    image: Tensor,
    tissue: Tensor,
    fluid: Tensor,
    grey: Tensor,
    volumes: np.ndarray,
    spacing: tuple[float, ...],
    random: _Random,
) -> tuple[Tensor, Tensor, list[dict[str, float]]]:
    """Darken connected regions of the tissue, one a volume; returns the image, the exact mask and what was drawn."""
    fluid_level = float(image[fluid].median()) if fluid.any() else 0.2
    grey_level = float(image[grey].median()) if grey.any() else 0.7
    image = image.clone()
    mask = torch.zeros_like(tissue)
    drawn = []
    voxel_ml = float(np.prod(spacing)) / 1000
    for volume in sorted(volumes, reverse=True):
        free = tissue & ~mask
        shape = _lesion_shape(free, volume, spacing, random)
        if not shape.any():
            continue
        mask |= shape
        # Chronic strokes on T1 range from fluid (cavities) to gliosis, which is still clearly darker than grey matter.
        depth = random.uniform(0.0, 0.45)
        level = fluid_level + depth * (grey_level - fluid_level)
        strength = random.uniform(0.8, 1.0)
        rim = random.uniform(0.2, 0.9)
        window = _box(shape, [math.ceil(4 * rim / step) + 1 for step in spacing])
        soft = torch.from_numpy(
            ndimage.gaussian_filter(shape[window].numpy().astype(np.float32), [rim / step for step in spacing])
        )
        texture = random.smooth(tuple(soft.shape), random.uniform(3, 8) / spacing[0])[0] * random.uniform(0.02, 0.12)
        image[window] += soft * strength * (level * (1 + texture) - image[window])
        drawn.append({"volume_ml": float(shape.sum()) * voxel_ml, "depth": depth, "strength": strength})
    return image.clamp_min(0), mask, drawn


def _box(mask: Tensor, margin: list[int]) -> tuple[slice, ...]:
    """The smallest box around the voxels of a mask that has any, widened on every side."""
    (tight,) = ndimage.find_objects(mask.numpy().astype(np.uint8))
    return tuple(
        slice(max(0, part.start - more), min(size, part.stop + more))
        for part, more, size in zip(tight, margin, mask.shape, strict=True)
    )


def _lesion_shape(free: Tensor, volume_ml: float, spacing: tuple[float, ...], random: _Random) -> Tensor:
    """A connected region of about ``volume_ml`` inside ``free``: an ellipsoid's distance field plus smoothed noise."""
    shape = tuple(free.shape)
    candidates = free.nonzero()
    if not len(candidates):
        return torch.zeros_like(free)
    centre = candidates[int(random.numpy.integers(len(candidates)))].numpy()
    radius = (3 * volume_ml * 1000 / (4 * np.pi)) ** (1 / 3)
    reach = [int(np.ceil((2.5 * radius + 6) / step)) for step in spacing]
    window = tuple(slice(max(0, c - r), min(n, c + r + 1)) for c, r, n in zip(centre, reach, shape, strict=True))
    local = tuple(part.stop - part.start for part in window)
    axes = [
        torch.arange(part.start, part.stop, dtype=torch.float32).sub(float(c)) * step
        for part, c, step in zip(window, centre, spacing, strict=True)
    ]
    # A random orientation and random half axes of product 1.
    turn, _ = np.linalg.qr(random.numpy.normal(size=(3, 3)))
    stretch = np.exp(random.numpy.normal(0, 0.3, 3))
    stretch /= np.prod(stretch) ** (1 / 3)
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    distance = (points @ torch.from_numpy(turn / stretch).float()).norm(dim=-1) / radius
    noise = random.smooth(local, 0.8 * radius / spacing[0])[0] * random.uniform(0.2, 0.6)
    noise += random.smooth(local, 0.3 * radius / spacing[0])[0] * random.uniform(0.05, 0.3)
    height = noise - distance
    height[~free[window]] = -torch.inf
    if volume_ml > 1:
        # A stroke lesion keeps to one side of the brain.
        middle = shape[0] / 2 - window[0].start
        side = torch.arange(local[0]) < middle
        height[(side if centre[0] >= shape[0] / 2 else ~side)] = -torch.inf
    count = min(max(1, round(volume_ml * 1000 / float(np.prod(spacing)))), int(height.isfinite().sum()))
    result = torch.zeros_like(free)
    result[window] = _connected_top(height.numpy(), count)
    return result


def _connected_top(height: np.ndarray, count: int) -> Tensor:
    """The highest voxels that make one connected region of about ``count``; the cut sinks until one is so large."""
    order = np.sort(height[np.isfinite(height)])[::-1]
    largest = np.zeros(height.shape, bool)
    for share in (1.0, 1.15, 1.35, 1.6, 2.0, 2.6, 3.5):
        cut = order[min(round(count * share), len(order)) - 1] if len(order) else np.inf
        labels, found = ndimage.label(height >= cut)
        if not found:
            break
        sizes = np.bincount(labels.ravel())[1:]
        largest = labels == 1 + int(sizes.argmax())
        if sizes.max() >= 0.9 * count:
            break
    return torch.from_numpy(largest)


def _add_skull(
    image: Tensor, inside: Tensor, levels: dict[str, float], spacing: tuple[float, ...], random: _Random
) -> Tensor:
    """Fluid, bone and scalp in layers around the brain, and soft tissue below it."""
    shape = tuple(image.shape)
    # The distance transform is slow and the rim smooth: a coarse grid does.
    coarse = [max(1, round(n * step / 2)) for n, step in zip(shape, spacing, strict=True)]
    small = F.interpolate(inside[None, None].float(), size=coarse, mode="trilinear")[0, 0] > 0.5
    away = ndimage.distance_transform_edt(~small.numpy(), sampling=[2.0] * 3).astype(np.float32)
    distance = F.interpolate(torch.from_numpy(away)[None, None], size=shape, mode="trilinear")[0, 0]
    distance = distance + random.smooth(shape, 25 / spacing[0])[0] * 1.2
    fluid = random.uniform(1.0, 4.0)
    bone = fluid + random.uniform(3, 7)
    scalp = bone + random.uniform(3, 9)
    texture = 1 + 0.15 * random.smooth(shape, 5 / spacing[0])[0]
    rim = torch.zeros(shape)
    outside = ~inside
    rim[outside & (distance <= fluid)] = levels["csf"] * random.uniform(0.7, 1.3)
    bone_level = random.uniform(0.02, 0.2)
    rim[outside & (distance > fluid) & (distance <= bone)] = bone_level
    if random.chance(0.4):  # marrow between the tables of the bone
        middle = (fluid + bone) / 2
        rim[outside & ((distance - middle).abs() < (bone - fluid) / 6)] = random.uniform(0.3, 0.9)
    rim[outside & (distance > bone) & (distance <= scalp)] = random.uniform(0.5, 1.4)
    if random.chance(0.7):  # muscles, face and neck: blobs in the lower half
        depth = torch.linspace(1, -1, shape[2])[None, None, :]
        blobs = random.smooth(shape, 12 / spacing[0])[0]
        flesh = outside & (distance > bone) & (distance < scalp + 15) & (blobs + depth - 0.8 > 0)
        rim[flesh] = (0.5 + 0.25 * random.smooth(shape, 8 / spacing[0])[0]).clamp(0.05, 1.3)[flesh]
    soft = ndimage.gaussian_filter((rim * texture).numpy(), [0.7 / step for step in spacing])
    return torch.where(inside, image, torch.from_numpy(soft)).clamp_min(0)


def _acquire(image: Tensor, mask: Tensor | None, spacing: tuple[float, ...], random: _Random) -> Tensor:
    """Bias field, blur, thick slices, gamma and Rician noise; ``mask`` zeroes the background of stripped heads."""
    shape = tuple(image.shape)
    image = image * torch.exp(random.smooth(shape, 80 / spacing[0])[0] * random.uniform(0, 0.2))
    if random.chance(0.5):
        width = random.uniform(0.3, 1.0)
        image = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), [width / step for step in spacing]))
    if random.chance(0.25):
        thickness = random.uniform(2.5, 6.5)
        slices = max(8, round(shape[2] * spacing[2] / thickness))
        if slices < shape[2]:
            thick = F.adaptive_avg_pool3d(image[None, None], (*shape[:2], slices))
            image = F.interpolate(thick, size=shape, mode="trilinear", align_corners=False)[0, 0]
    image = image.clamp_min(0) ** random.uniform(0.8, 1.3)
    deviation = random.uniform(0.003, 0.05)
    real = image + random.white(shape) * deviation
    image = (real.square() + (random.white(shape) * deviation).square()).sqrt()
    if mask is not None:
        image = image * mask
    return image * random.uniform(100, 2000)
