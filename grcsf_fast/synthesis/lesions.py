"""Stroke lesions as they look on a scan, and what they do to the tissue around them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .acquisition import gaussian
from .anatomy import box
from .contrast import Head, TissueIntensities
from .shapes import LesionShape, draw_shape, draw_site, lesion_radius
from .streams import Random

__all__ = ["STAGES", "insert_lesions"]

# Gliosis: a scar. Cavity: fluid with a thin scar around it. Mixed: of both. Acute: swollen, little changed on T1.
# Haemorrhagic: a scar with bright or dark blood in its rim or in spots.
STAGES = {"gliosis": 0.25, "cavity": 0.25, "mixed": 0.25, "acute": 0.15, "haemorrhagic": 0.1}
# The tissue around smaller lesions stays where it is.
EFFECT_ML = 3.0


def insert_lesions(
    head: Head, volumes: np.ndarray, middle: np.ndarray, random: Random
) -> tuple[Head, Tensor, list[dict[str, Any]], dict[str, Any] | None]:
    """Lesions of the given volumes, the largest first.

    Args:
        head: healthy.
        volumes: in mL.
        middle: of the brain, in voxels.

    Returns:
        The head, the exact mask (X, Y, Z), a record per lesion, and the record of the effect on the tissue around the
        largest, or None: ``kind`` (``"mass"`` or ``"ex vacuo"``), ``shift_mm``, ``centre`` in voxels, and
        ``reach_mm``, beyond which nothing is changed.
    """
    mask = torch.zeros_like(head.inside)
    drawn: list[dict[str, Any]] = []
    effect = None
    voxel_ml = float(np.prod(head.spacing)) / 1000
    tissue = head.tissue
    for volume in sorted(volumes, reverse=True):
        free = tissue & ~mask
        site = draw_site(free, head.gm, middle, volume, head.spacing, random)
        if site is None:
            continue
        stage = str(random.numpy.choice(list(STAGES), p=list(STAGES.values())))
        if not drawn and volume > EFFECT_ML and random.chance(0.6):
            head, effect = _around(head, site[1], volume, stage, random)
            tissue = free = head.tissue
        shape = draw_shape(free, head.gm, site, middle, volume, head.spacing, random)
        if shape is None:
            continue
        mask[shape.window] |= shape.region
        head = replace(head, image=head.image.clone()) if not drawn else head
        look = _paint(head.image, shape, stage, head.intensities, head.spacing, random)
        drawn.append({"volume_ml": float(shape.region.sum()) * voxel_ml, "kind": site[0], "stage": stage} | look)
    return head, mask, drawn, effect


def _paint(
    image: Tensor,
    shape: LesionShape,
    stage: str,
    intensities: TissueIntensities,
    spacing: tuple[float, ...],
    random: Random,
) -> dict[str, float]:
    """Blend the lesion into ``image``, in place; returns what was drawn."""
    rim = random.uniform(0.15, 0.9)
    margin = [math.ceil(3 * rim / step) + 1 for step in spacing]
    tight = box(shape.region, margin)  # in the shape's window
    window = tuple(
        slice(part.start + inner.start, part.start + inner.stop)
        for part, inner in zip(shape.window, tight, strict=True)
    )
    region, depth = shape.region[tight], shape.depth[tight].clamp(0, 1)
    local = tuple(region.shape)
    soft = gaussian(region.float(), rim, spacing)
    least, most, strength = {
        "gliosis": (0.0, 0.0, random.uniform(0.5, 1.0)),
        "cavity": (0.75, 0.97, random.uniform(0.85, 1.0)),
        "mixed": (0.3, 0.75, random.uniform(0.8, 1.0)),
        "acute": (0.0, 0.0, random.uniform(0.4, 0.8)),
        "haemorrhagic": (0.0, 0.6, random.uniform(0.7, 1.0)),
    }[stage]
    core = random.uniform(least, most)
    level = torch.full(local, intensities.gliosis)
    if core:
        noise = random.smooth(local, random.uniform(3, 10) / spacing[0])[0].mul_(random.uniform(0.02, 0.2))
        fluid = torch.sigmoid((depth + noise - (1 - core) ** 1.5) / random.uniform(0.02, 0.12))
        level += fluid * (intensities.csf - intensities.gliosis)
    if stage == "haemorrhagic":
        if random.chance(0.5):
            weight = torch.exp(-((depth - random.uniform(0.0, 0.3)) / random.uniform(0.08, 0.25)).square())
        else:
            weight = (random.smooth(local, random.uniform(2, 6) / spacing[0])[0] - random.uniform(0.3, 1)).clamp_(0, 1)
        level += weight * ((intensities.blood if random.chance(0.5) else intensities.iron) - level)
    texture = random.smooth(local, random.uniform(2, 8) / spacing[0])[0].mul_(random.uniform(0.02, 0.2))
    level *= texture.add_(1)
    image[window] += soft * strength * (level - image[window])
    image[window].clamp_(min=0)
    return {"core": core, "strength": strength, "rim_mm": rim}


def _around(
    head: Head, centre: np.ndarray, volume_ml: float, stage: str, random: Random
) -> tuple[Head, dict[str, Any]]:
    """Mass effect of fresh lesions; old ones draw the tissue in and widen sulci and ventricle beside them."""
    width = float(np.clip(1.3 * lesion_radius(volume_ml), 10, 30))
    most = min(0.35 * width, 6.0)
    shift = random.uniform(0.3, 1.0) * most
    mass = stage == "acute" or (stage == "haemorrhagic" and random.chance(0.5))
    reach = 3 * width
    window = tuple(
        slice(max(0, int(c) - math.ceil(reach / step)), min(n, int(c) + math.ceil(reach / step) + 1))
        for c, step, n in zip(centre, head.spacing, head.inside.shape, strict=True)
    )
    axes = [
        torch.arange(part.start, part.stop, dtype=torch.float32).sub(float(c)) * step
        for part, c, step in zip(window, centre, head.spacing, strict=True)
    ]
    x, y, z = (axis.square() for axis in axes)
    squares = x[:, None, None] + (y[:, None] + z)
    maps = torch.stack([part[window] for part in (head.image, head.gm, head.wm, head.csf)])
    inside = head.inside[window]
    maps = _displace(maps, axes, squares, width, shift if mass else -shift, head.spacing)
    # What came from outside of the brain is the fluid around it.
    missing = (1 - maps[1:].sum(0)).clamp_min_(0)
    maps[0] += missing * head.intensities.csf
    maps[3] += missing
    if not mass:
        _widen(maps, squares, width, head.intensities.csf, random.uniform(0.3, 1.0), head.spacing)
    maps *= inside
    parts = []
    for part, changed in zip((head.image, head.gm, head.wm, head.csf), maps, strict=True):
        new = part.clone()
        new[window] = torch.where(squares < reach**2, changed, part[window])
        parts.append(new)
    head = replace(head, image=parts[0], gm=parts[1], wm=parts[2], csf=parts[3])
    kind = "mass" if mass else "ex vacuo"
    return head, {"kind": kind, "shift_mm": shift, "centre": [int(c) for c in centre], "reach_mm": reach}


def _displace(
    maps: Tensor, axes: list[Tensor], squares: Tensor, width: float, shift: float, spacing: tuple[float, ...]
) -> Tensor:
    """Move (K, X, Y, Z) away from the centre, by at most ``shift`` mm at ``width`` mm of it, fading beyond; below 0:
    towards it."""
    fading = (1 - squares / (9 * width**2)).clamp_min_(0)
    factor = 1 - torch.exp(0.5 - 0.5 * squares / width**2) * fading * (shift / width)
    grid = torch.empty(*squares.shape, 3)
    for axis, (points, step) in enumerate(zip(axes, spacing, strict=True)):
        points = points.reshape([-1 if other == axis else 1 for other in range(3)])
        half = max(1, squares.shape[axis] - 1) / 2
        grid[..., 2 - axis] = (points * factor - float(points.flatten()[0])) / (step * half) - 1
    return F.grid_sample(maps[None], grid[None], mode="bilinear", padding_mode="border", align_corners=True)[0]


def _widen(
    maps: Tensor, squares: Tensor, width: float, level: float, strength: float, spacing: tuple[float, ...]
) -> None:
    """Let fluid grow by about 1.5 mm near the centre; (image, gm, wm, csf), in place."""
    reach = max(1, round(1.5 / spacing[0]))
    grown = F.max_pool3d(maps[3][None, None], 2 * reach + 1, stride=1, padding=reach)[0, 0]
    weight = torch.exp(-squares / (1.6 * width) ** 2) * strength * min(1.0, 1.5 / spacing[0])
    gained = (grown - maps[3]).clamp_min_(0).mul_(weight)
    maps[0] += gained * (level - maps[0])
    maps[1:3] *= 1 - gained / (1 - maps[3]).clamp_min(1e-3)
    maps[3] += gained
