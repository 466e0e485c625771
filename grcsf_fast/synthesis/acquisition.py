"""How a scanner shows a head: skull, bias field, blur, thick slices, gamma, noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from .contrast import TissueIntensities
from .streams import Random

__all__ = ["Acquisition", "draw_skull", "gaussian"]

STRONG_BIAS = 0.06


class Acquisition:
    """One drawn acquisition, the same for every image that it is called with: a subject and its healthy twin.

    Attributes:
        record: what was drawn, ready for JSON.
    """

    def __init__(self, shape: tuple[int, ...], spacing: tuple[float, ...], random: Random) -> None:
        self.shape, self.spacing = shape, spacing
        strength = random.uniform(0, 0.2)
        if random.chance(STRONG_BIAS):
            strength = random.uniform(0.25, 0.5)
        self.bias = torch.exp_(random.smooth(shape, 80 / spacing[0])[0].clamp_(-1.8, 1.8) * strength)
        self.blur = random.uniform(0.3, 1.0) if random.chance(0.5) else 0.0
        self.thickness = random.uniform(2.5, 6.5) if random.chance(0.25) else 0.0
        self.gamma = random.uniform(0.8, 1.3)
        self.noise = random.uniform(0.003, 0.05)
        self.scale = random.uniform(100, 2000)
        self.real, imaginary = random.white(shape).mul_(self.noise), random.white(shape).mul_(self.noise)
        self.power = imaginary.square_()
        self.record: dict[str, Any] = {
            "bias": strength,
            "blur_mm": self.blur,
            "slice_mm": self.thickness,
            "gamma": self.gamma,
            "noise": self.noise,
        }

    def __call__(self, image: Tensor, mask: Tensor | None) -> Tensor:
        """(X, Y, Z) of the same shape; ``mask`` zeroes the background of stripped heads."""
        image = image * self.bias
        if self.blur:
            image = gaussian(image, self.blur, self.spacing)
        slices = max(8, round(self.shape[2] * self.spacing[2] / self.thickness)) if self.thickness else self.shape[2]
        if slices < self.shape[2]:
            thick = F.adaptive_avg_pool3d(image[None, None], (self.shape[0], self.shape[1], slices))
            image = F.interpolate(thick, size=self.shape, mode="trilinear", align_corners=False)[0, 0]
        # Rician noise.
        image = image.clamp_min_(0).pow_(self.gamma).add_(self.real).square_().add_(self.power).sqrt_()
        if mask is not None:
            image *= mask
        return image.mul_(self.scale)


def gaussian(image: Tensor, width_mm: float, spacing: tuple[float, ...]) -> Tensor:
    """(X, Y, Z) smoothed by a Gaussian of a standard deviation in mm, cut at three of them; edges are repeated."""
    return torch.from_numpy(
        ndimage.gaussian_filter(image.numpy(), [width_mm / step for step in spacing], mode="nearest", truncate=3.0)
    )


def draw_skull(inside: Tensor, intensities: TissueIntensities, spacing: tuple[float, ...], random: Random) -> Tensor:
    """(X, Y, Z) float32: fluid, bone and scalp in layers around the brain, and soft tissue below it; 0 inside."""
    shape = tuple(inside.shape)
    # The distance transform is slow and the rim smooth: a coarse grid does.
    coarse = [max(1, round(n * step / 2.5)) for n, step in zip(shape, spacing, strict=True)]
    small = F.interpolate(inside[None, None].float(), size=coarse, mode="trilinear")[0, 0] > 0.5
    away = np.asarray(ndimage.distance_transform_edt(~small.numpy(), sampling=[2.5] * 3), np.float32)
    distance = F.interpolate(torch.from_numpy(away)[None, None], size=shape, mode="trilinear")[0, 0]
    distance += random.smooth(shape, 25 / spacing[0])[0].mul_(1.2)
    fluid = random.uniform(1.0, 4.0)
    bone = fluid + random.uniform(3, 7)
    scalp = bone + random.uniform(3, 9)
    fluid_level = intensities.csf * random.uniform(0.7, 1.3)
    bone_level, scalp_level = random.uniform(0.02, 0.2), random.uniform(0.5, 1.4)
    # Layers by the distance: the last boundary below it decides.
    edges, values = [fluid, bone, scalp], [fluid_level, bone_level, scalp_level, 0.0]
    if random.chance(0.4):  # marrow between the tables of the bone
        middle, half = (fluid + bone) / 2, (bone - fluid) / 6
        edges[1:1] = [middle - half, middle + half]
        values[1:2] = [bone_level, random.uniform(0.3, 0.9), bone_level]
    rim = torch.tensor(values)[torch.bucketize(distance, torch.tensor(edges))]
    if random.chance(0.7):  # muscles, face and neck: blobs in the lower half
        depth = torch.linspace(1, -1, shape[2])[None, None, :]
        blobs = random.smooth(shape, 12 / spacing[0])[0]
        flesh = (distance > bone) & (distance < scalp + 15) & (blobs + depth - 0.8 > 0)
        rim = torch.where(flesh, (0.5 + 0.25 * random.smooth(shape, 8 / spacing[0])[0]).clamp_(0.05, 1.3), rim)
    rim *= ~inside
    rim *= random.smooth(shape, 5 / spacing[0])[0].mul_(0.15).add_(1)
    return gaussian(rim, 0.7, spacing).clamp_min_(0).mul_(~inside)
