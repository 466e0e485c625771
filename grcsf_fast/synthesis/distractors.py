"""What looks like a lesion and is none: vessel disease, artefacts, bad skull stripping. None of it is in the mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .acquisition import gaussian
from .contrast import Head
from .streams import Random

__all__ = ["CHANCES", "add_artefacts", "add_tissue_distractors", "draw_bad_stripping"]

CHANCES = {"white_matter": 0.3, "perivascular": 0.25, "motion": 0.08, "ringing": 0.06, "spike": 0.03, "remnants": 0.1,
           "bite": 0.08}  # fmt: skip


def add_tissue_distractors(
    head: Head, lesion: Tensor, middle: np.ndarray, random: Random
) -> tuple[Tensor, dict[str, Any]]:
    """White-matter disease and wide perivascular spaces, by chance; the image, and what was drawn."""
    image, record = head.image, {}
    near = F.max_pool3d(lesion[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0 if lesion.any() else lesion
    for name, add in (("white_matter", _white_matter_disease), ("perivascular", _perivascular_spaces)):
        if random.chance(CHANCES[name]):
            if not record:
                image = image.clone()
            record[name] = add(image, head, ~near, middle, random)
    return image, record


def _white_matter_disease(
    image: Tensor, head: Head, free: Tensor, middle: np.ndarray, random: Random
) -> dict[str, float]:
    """Caps and bands at the ventricles and patches in the deep white matter, alike on both sides; in place."""
    spacing = head.spacing
    window = _window(middle + np.array([0, 0, 8]) / spacing, (48, 70, 38), spacing, image.shape)
    local = tuple(part.stop - part.start for part in window)
    deep = 1.0
    for axis, (n, step, reach) in enumerate(zip(local, spacing, (30, 48, 26), strict=True)):
        off = (torch.arange(n) - (n - 1) / 2) * step / reach
        deep = deep - off.square().reshape([-1 if other == axis else 1 for other in range(3)])
    ventricle = (head.csf[window] > 0.6) & (deep > 0)
    close = gaussian(ventricle.float(), 4.0, spacing)
    patches = random.smooth(local, random.uniform(5, 12) / spacing[0])[0]
    score = 0.8 * (patches + patches.flip(0)) / 2 + 0.3 * random.smooth(local, 5 / spacing[0])[0]
    score = score * random.uniform(0.1, 0.8) + close / close.max().clamp_min(1e-6)
    allowed = (head.wm[window] > 0.7) & free[window]
    score = torch.where(allowed, score, -torch.inf)
    volume = float(np.clip(4 * np.exp(random.numpy.normal(0, 1.2)), 0.2, 45))
    count = min(round(volume * 1000 / float(np.prod(spacing))), int(allowed.sum()))
    if count < 1:
        return {"volume_ml": 0.0}
    marked = score >= score.flatten().kthvalue(score.numel() - count + 1).values
    strength = random.uniform(0.3, 0.9)
    texture = random.smooth(local, 4 / spacing[0])[0].mul_(0.08).add_(1)
    soft = gaussian(marked.float(), random.uniform(0.5, 1.2), spacing) * free[window] * head.inside[window]
    image[window] += soft * strength * (head.intensities.gliosis * texture - image[window])
    return {"volume_ml": float(marked.sum()) * float(np.prod(spacing)) / 1000, "strength": strength}


def _perivascular_spaces(
    image: Tensor, head: Head, free: Tensor, middle: np.ndarray, random: Random
) -> dict[str, float]:
    """Dots and strokes of fluid, about a millimetre thin, in basal ganglia and centrum semiovale; in place."""
    numpy = random.numpy
    count = int(numpy.integers(10, 90))
    side = numpy.choice([-1.0, 1.0], count)
    basal = numpy.random(count) < 0.5
    low = np.where(basal[:, None], [10.0, -18.0, -14.0], [12.0, -40.0, 14.0])
    high = np.where(basal[:, None], [27.0, 20.0, 2.0], [32.0, 38.0, 36.0])
    start = numpy.uniform(low, high)
    start[:, 0] *= side
    # Upwards in the basal ganglia, from the ventricles to the cortex above them.
    heading = np.where(basal[:, None], [0.2, 0.1, 1.0], start / np.linalg.norm(start, axis=1, keepdims=True))
    heading = heading + numpy.normal(0, 0.2, (count, 3))
    heading /= np.linalg.norm(heading, axis=1, keepdims=True)
    length, radius = numpy.uniform(0.5, 9, count), numpy.uniform(0.35, 0.9, count)
    steps = np.arange(0, 9, 0.5)
    points = start[:, None] + heading[:, None] * steps[:, None]  # (strokes, steps, 3) in mm
    volume = np.where(steps < length[:, None], 0.5 * np.pi * radius[:, None] ** 2, 0.0) / float(np.prod(head.spacing))
    voxels = np.rint(points / head.spacing + middle).astype(int)
    fits = ((voxels >= 0) & (voxels < image.shape)).all(-1) & (volume > 0)
    place = tuple(torch.from_numpy(voxels[fits].T.copy()))
    amount = torch.zeros_like(image).index_put_(place, torch.from_numpy(volume[fits]).float(), accumulate=True)
    amount = amount.clamp_(max=1.0) * ((head.csf < 0.3) & free & head.inside)
    image += amount * (head.intensities.csf - image)
    return {"strokes": count, "volume_ml": float(amount.sum()) * float(np.prod(head.spacing)) / 1000}


def add_artefacts(image: Tensor, random: Random) -> tuple[Tensor, dict[str, Any]]:
    """Motion during the scan, ringing at edges, a spike in k-space, by chance; the image, and what was drawn."""
    record: dict[str, Any] = {}
    if random.chance(CHANCES["motion"]):
        axis, shift, share = int(random.numpy.integers(3)), random.uniform(0.5, 2.0), random.uniform(0.05, 0.25)
        count = image.shape[axis]
        # Some lines of k-space were read after the head had moved by so many voxels.
        moved = torch.rand(count, generator=random.torch) < share
        phase = -2 * torch.pi * torch.fft.fftfreq(count) * shift * moved
        image = _filtered(image, torch.polar(torch.ones(count), phase), axis)
        record["motion"] = {"axis": axis, "voxels": shift, "share": share}
    if random.chance(CHANCES["ringing"]):
        axis, kept = int(random.numpy.integers(3)), random.uniform(0.5, 0.8)
        image = _filtered(image, (torch.fft.fftfreq(image.shape[axis]).abs() <= kept / 2).float(), axis)
        record["ringing"] = {"axis": axis, "kept": kept}
    if random.chance(CHANCES["spike"]):
        waves, amplitude = random.numpy.uniform(-0.2, 0.2, 3), random.uniform(0.01, 0.05)
        x, y, z = (torch.arange(n) * (2 * torch.pi * float(w)) for n, w in zip(image.shape, waves, strict=True))
        image = (image + amplitude * torch.cos(x[:, None, None] + (y[:, None] + z))).clamp_min_(0)
        record["spike"] = {"amplitude": amplitude}
    return image, record


def _filtered(image: Tensor, response: Tensor, axis: int) -> Tensor:
    """Magnitude of the image after its frequencies along an axis were multiplied by a response."""
    response = response.reshape([-1 if other == axis else 1 for other in range(3)])
    return torch.fft.ifft(torch.fft.fft(image, dim=axis) * response, dim=axis).abs()


def draw_bad_stripping(
    image: Tensor, head: Head, lesion: Tensor, random: Random
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Pieces of the skull left, or a piece of the brain cut off, by chance.

    Returns:
        The image with what was left; what the stripping kept, (X, Y, Z) bool; what was drawn. No lesion is cut.
    """
    record: dict[str, Any] = {}
    kept, spacing = head.inside, head.spacing
    shape = tuple(image.shape)
    if random.chance(CHANCES["remnants"]):
        thickness = random.uniform(2, 7)
        reach = [max(1, round(thickness / step)) for step in spacing]
        grown = kept[None, None].float()
        for axis, r in enumerate(reach):  # three passes along an axis each: much faster than one over a cube
            size, padding = [1, 1, 1], [0, 0, 0]
            size[axis], padding[axis] = 2 * r + 1, r
            grown = F.max_pool3d(grown, size, stride=1, padding=padding)
        left = (grown[0, 0] > 0) & ~kept & (random.smooth(shape, 25 / spacing[0])[0] > random.uniform(0.1, 0.7))
        level = max(head.intensities.gm, head.intensities.wm) * random.uniform(0.4, 1.3)
        image = torch.where(left, random.smooth(shape, 4 / spacing[0])[0].mul_(0.2).add_(1).mul_(level), image)
        image = image.clamp_min_(0)
        kept = kept | left
        record["remnants"] = {"thickness_mm": thickness}
    if random.chance(CHANCES["bite"]):
        for _ in range(3):
            direction = random.numpy.normal(size=3)
            direction /= np.linalg.norm(direction)
            x, y, z = (
                torch.arange(n) * float(step * part) for n, step, part in zip(shape, spacing, direction, strict=True)
            )
            height = x[:, None, None] + (y[:, None] + z) + 2 * random.smooth(shape, 10 / spacing[0])[0]
            depth = random.uniform(5, 18)
            cut = height > height[head.inside].max() - depth
            if not (cut & lesion).any():
                kept = kept & ~cut
                record["bite"] = {"depth_mm": depth}
                break
    return image, kept, record


def _window(
    centre: np.ndarray, half_mm: tuple[float, ...], spacing: tuple[float, ...], shape: tuple[int, ...]
) -> tuple[slice, ...]:
    """A box around a point, symmetric to it as far as the grid goes."""
    slices = []
    for c, half, step, size in zip(np.rint(centre).astype(int), half_mm, spacing, shape, strict=True):
        reach = max(1, min(int(half / step), int(c), size - 1 - int(c)))
        slices.append(slice(int(c) - reach, int(c) + reach + 1))
    return tuple(slices)
