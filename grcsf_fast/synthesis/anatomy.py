"""An individual's head from the template: a warp, and how much of each tissue a voxel holds."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from .streams import Random
from .template import Template

__all__ = ["Anatomy", "box", "draw_anatomy"]


@dataclass(frozen=True)
class Anatomy:
    """A healthy head without skull; all (X, Y, Z).

    Attributes:
        t1: float32, the template's own intensities, white matter near 1.
        gm: float32, share of grey matter in [0, 1].
        wm: float32, of white matter.
        csf: float32, of fluid; the three add up to 1 inside.
        inside: bool.
    """

    t1: Tensor
    gm: Tensor
    wm: Tensor
    csf: Tensor
    inside: Tensor

    def padded(self, margin: list[int]) -> Anatomy:
        """With so many empty voxels more on every side."""
        widths = [m for m in reversed(margin) for _ in range(2)]
        return Anatomy(*(F.pad(getattr(self, part.name), widths) for part in fields(self)))

    def cropped(self, window: tuple[slice, ...]) -> Anatomy:
        return Anatomy(*(getattr(self, part.name)[window].contiguous() for part in fields(self)))


def draw_anatomy(template: Template, random: Random) -> Anatomy:
    """Warp the template and draw the widths of the fluid spaces."""
    spacing = template.spacing
    maps = torch.stack([template.t1, template.gm, template.wm, (template.t1 > 0.05).float()])
    t1, gm, wm, brain = _warp(maps, spacing, random)
    inside = brain > 0.5
    window = box(inside, [0, 0, 0])  # outside of it everything is 0
    gm, wm, csf = _tissues(gm[window], wm[window], inside[window], spacing, random)
    widths = [n for part, size in reversed(list(zip(window, inside.shape, strict=True)))
              for n in (part.start, size - part.stop)]  # fmt: skip
    gm, wm, csf = F.pad(torch.stack([gm, wm, csf]), widths)
    return Anatomy(t1, gm, wm, csf, inside)


def box(mask: Tensor, margin: list[int]) -> tuple[slice, ...]:
    """The smallest box around the voxels of a mask that has any, widened on every side."""
    (tight,) = ndimage.find_objects(mask.numpy().astype(np.uint8))
    return tuple(
        slice(max(0, part.start - more), min(size, part.stop + more))
        for part, more, size in zip(tight, margin, mask.shape, strict=True)
    )


def _warp(maps: Tensor, spacing: tuple[float, ...], random: Random) -> Tensor:
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


def _tissues(gm: Tensor, wm: Tensor, inside: Tensor, spacing: tuple[float, ...], random: Random) -> Tensor:
    """(3, X, Y, Z): averaged probabilities sharpened, some fluid spaces widened: a person's sulci are darker."""
    fluid = (1 - gm - wm).clamp_min(0)
    widening = torch.exp(random.smooth(tuple(gm.shape), 30 / spacing[0])[0] * random.uniform(0, 0.5))
    fluid = fluid * widening * random.uniform(0.8, 2.5)
    power = random.uniform(1.0, 3.0)
    stack = torch.stack([gm, wm, fluid]).clamp_min(0).pow_(power)
    return stack / stack.sum(0).clamp_min(1e-6) * inside
