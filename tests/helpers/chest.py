"""A real chest CT without contrast medium: its lungs and heart, and lesions drawn into it.

The CT is a sample of 3D Slicer in the package slicerio (MIT), whose files are read and whose code is not imported:
128x128x34 voxels of 3.05 x 3.05 x 10 mm of one adult. It has no labels of the heart; levels and angles of the arteries
were read off its pictures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from grcsf_fast.data.volumes import load_volume, resize, scaled_affine

SLICES = 68  # of 5 mm, that its 34 of 10 mm are resampled to
HEART = slice(24, 53)  # of these slices: from above the diaphragm to the arch of the aorta
ABOVE_HU = 130  # what counts as calcium
# By artery, where it begins and ends on the surface of the heart: slice, and degrees from the front to the left.
COURSES = {1: ((37, 55), (26, 35)), 2: ((37, 90), (27, 130)), 3: ((37, -55), (26, -115))}


@dataclass(frozen=True)
class Chest:
    """All (X, Y, Z), from left to right, back to front and feet to head.

    Attributes:
        hu: float32, Hounsfield units.
        lungs: bool, with airways and without vessels.
        heart: bool, with the great vessels and without the fat around.
        affine: (4, 4), voxel to RAS mm.
        first: the slice of the whole CT that is the first one here.
    """

    hu: np.ndarray
    lungs: np.ndarray
    heart: np.ndarray
    affine: np.ndarray
    first: int = 0

    @property
    def spacing(self) -> np.ndarray:
        return nib.affines.voxel_sizes(self.affine)


def _file() -> Path | None:
    found = importlib.util.find_spec("slicerio")
    places = found.submodule_search_locations if found else None
    return Path(places[0]) / "data" / "CTChest4.nrrd" if places else None


NEEDS_CHEST = pytest.mark.skipif(_file() is None, reason="no chest CT: pip install --no-deps -r requirements-data.txt")


@lru_cache(maxsize=1)
def load_chest() -> Chest:
    """The whole CT, in slices of 5 mm."""
    volume = load_volume(_file())
    shape = (*volume.data.shape[:2], SLICES)
    hu = resize(torch.from_numpy(volume.data), shape).numpy()
    affine = scaled_affine(volume.affine, volume.data.shape, shape)
    lungs = _lungs(hu)
    return Chest(hu, lungs, _heart(hu, lungs), affine)


def _lungs(hu: np.ndarray) -> np.ndarray:
    """The largest air of those that do not reach the sides of the picture."""
    labels, _ = ndimage.label(hu < -500)
    sizes = np.bincount(labels.ravel())
    sides = np.concatenate([labels[[0, -1]].ravel(), labels[:, [0, -1]].ravel(), [0]])
    sizes[sides] = 0
    return labels == sizes.argmax()


def _heart(hu: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """The largest soft tissue with lung to its left and right, less what is thinner than 24 mm."""
    smooth = ndimage.uniform_filter(hu, (3, 3, 1))
    beside = np.maximum.accumulate(lungs) & np.maximum.accumulate(lungs[::-1])[::-1]
    soft = (smooth > 0) & (smooth < ABOVE_HU) & beside & ~lungs
    steps = np.stack(np.mgrid[-4:5, -4:5, -2:3], -1) * (3.05, 3.05, 5)
    labels, _ = ndimage.label(ndimage.binary_opening(soft, np.linalg.norm(steps, axis=-1) <= 12))
    heart = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    heart[:, :, : HEART.start] = heart[:, :, HEART.stop :] = False
    return heart


def individual(rng: np.random.Generator, corner: tuple[int, int, int], shape: tuple[int, int, int]) -> Chest:
    """A part of the CT as another scan: moved by up to two and a half voxels, with noise of 8 to 16 HU more.

    Bright voxels at the heart, calcifications of the person's own, are made soft tissue.
    """
    whole = load_chest()
    start = np.array(corner) + rng.integers(-2, 3, 3)
    part = tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
    hu, lungs, heart = (values[part].copy() for values in (whole.hu, whole.lungs, whole.heart))
    affine = whole.affine @ nib.affines.from_matvec(np.eye(3), start)
    around = ndimage.binary_dilation(heart, np.ones((5, 5, 1)))
    hu[around & (hu > 70)] = 40
    hu = ndimage.shift(hu, (*rng.uniform(-0.5, 0.5, 2), 0), order=1, mode="nearest")
    hu += rng.normal(0, rng.uniform(8, 16), shape).astype(np.float32)
    hu[around] = np.minimum(hu[around], ABOVE_HU - 10)
    return Chest(hu, lungs, heart, affine, int(start[2]))


def on_artery(chest: Chest, artery: int, share: float) -> tuple[int, int, int]:
    """A voxel of the border of heart and fat, so far along the course of an artery: 0 its beginning, 1 its end."""
    begin, end = np.array(COURSES[artery])
    level, degrees = begin + share * (end - begin)
    z = round(level) - chest.first
    places = np.argwhere(_border(chest)[:, :, z])
    x, y = (places - np.argwhere(chest.heart[:, :, z]).mean(0)).T
    off = np.angle(np.exp(1j * (np.arctan2(-x, y) - np.deg2rad(degrees))))
    x, y = places[np.abs(off).argmin()].tolist()
    return x, y, z


def _border(chest: Chest) -> np.ndarray:
    """In each slice the outermost voxels of the heart, and those around them."""
    cross = ndimage.generate_binary_structure(2, 1)[:, :, None]
    return ndimage.binary_dilation(chest.heart, cross) & ~ndimage.binary_erosion(chest.heart, cross)


def calcify(
    chest: Chest, reference: np.ndarray, artery: int, place: tuple[int, int, int], count: int, peak: float, slices: int
) -> None:
    """Draw a calcification of ``count`` voxels, connected by faces, along the border of heart and fat.

    Its HU fall from ``peak`` at ``place`` to half of it, and not below 200; it goes up so many ``slices`` at most.
    """
    allowed = _border(chest) & (reference == 0)
    allowed[:, :, : place[2]] = allowed[:, :, place[2] + slices :] = False
    assert allowed[place]
    found = [place]
    while len(found) < count:
        edge = {near for voxel in found for near in _neighbours(voxel, allowed)} - set(found)
        found.append(min(edge, key=lambda voxel: (np.linalg.norm((np.array(voxel) - place) * chest.spacing), voxel)))
    where = tuple(np.transpose(found))
    chest.hu[where] = np.linspace(peak, max(200, peak / 2), count)
    reference[where] = artery


def _neighbours(voxel: tuple[int, int, int], allowed: np.ndarray) -> Iterator[tuple[int, int, int]]:
    for axis in range(3):
        for step in (-1, 1):
            near = tuple(place + step * (axis == other) for other, place in enumerate(voxel))
            if all(0 <= place < size for place, size in zip(near, allowed.shape, strict=True)) and allowed[near]:
                yield near


def add_nodule(chest: Chest, rng: np.random.Generator, diameter: float, left: bool) -> np.ndarray:
    """Draw a ball of 35 HU into a lung, a random place that holds it whole.

    Voxels take its HU by the share of them that is inside. The mask has those of at least a half, and the middle one.
    """
    middle = chest.hu.shape[0] // 2
    depth = ndimage.distance_transform_edt(chest.lungs, chest.spacing)
    smooth = ndimage.uniform_filter(chest.hu, 3)
    room = (depth > diameter / 2 + 3) & (smooth < -780)
    room[middle:] &= not left
    room[:middle] &= left
    room[:, :, :2] = room[:, :, -2:] = False
    centre = rng.choice(np.argwhere(room))
    fine = (np.arange(5) - 2) / 5
    reach = np.ceil(diameter / 2 / chest.spacing).astype(int)
    # (x, y, z, fine x, fine y, fine z)
    squared = 0
    for axis, (edge, size) in enumerate(zip(reach, chest.spacing, strict=True)):
        steps = (np.arange(-edge, edge + 1)[:, None] + fine) * size
        squared = squared + np.expand_dims(steps**2, [k for k in range(6) if k not in (axis, axis + 3)])
    share = (squared <= (diameter / 2) ** 2).mean((3, 4, 5))
    box = tuple(slice(place - edge, place + edge + 1) for place, edge in zip(centre, reach, strict=True))
    chest.hu[box] += share * (35 - smooth[box])  # over the noise that is there
    mask = np.zeros(chest.hu.shape, np.uint8)
    mask[box] = share >= 0.5
    mask[tuple(centre)] = 1
    return mask
