"""From probabilities to lesions: mask, number, volumes and places."""

from __future__ import annotations

from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ..data.labels import Labels, any_label
from ..data.reports import rounded_ml
from ..data.volumes import Prepared, blocks_on_grid, bounding_box
from ..errors import ArgumentError
from ..evaluation.calcium import agatston
from ..evaluation.metrics import as_affine, as_voxels

__all__ = [
    "Levels",
    "counting",
    "described",
    "described_labels",
    "lesion_mask",
    "lesion_report",
    "lesions_on_grid",
    "levels_on_grid",
    "numbered_lesions",
    "scored",
]

CORNERS = np.ones((3, 3, 3))  # lesions are connected by faces, edges and corners


class Levels(NamedTuple):
    """What a mask is made of, on the file's grid with its axes in reverse, as its voxels lie in memory.

    Attributes:
        reached: (Z, Y, X) uint8, 1 where the probability reaches the threshold, 2 where it reaches the peak as well.
        numbers: (Z, Y, X) uint8, the number of each voxel, should it be in a lesion; None: there is one kind alone.
    """

    reached: Tensor
    numbers: Tensor | None


def levels_on_grid(
    probability: Tensor, prepared: Prepared, threshold: float, peak: float, labels: Labels | None = None
) -> Levels:
    """From the probability on the networks' grid to the file's, on the device of the probability; nobody waits for it.

    With labels the probability is (K, X, Y, Z), and a lesion is what has any of them: of classes, where the sum of
    theirs on the networks' grid reaches the threshold there; of regions, where one of theirs on the file's grid does.
    """
    reached = torch.empty(prepared.volume.data.shape[::-1], dtype=torch.uint8, device=probability.device)

    def reach(start: int, block: Tensor) -> None:
        found = (block >= threshold).to(torch.uint8) + (block >= max(threshold, peak)).to(torch.uint8)
        reached[start : start + len(block)] = found

    if labels is None or labels.exclusive:
        whole = probability if labels is None else any_label(probability, labels)
        for start, block in blocks_on_grid(whole, prepared):
            reach(start, block)
        if labels is None:
            return Levels(reached, None)
    numbers = torch.empty_like(reached)
    for blocks in zip(*(blocks_on_grid(one, prepared) for one in probability), strict=True):
        start, each = blocks[0][0], torch.stack([block for _, block in blocks])
        # Of the networks' grid the largest would be interpolated to more than any region has there.
        if not labels.exclusive:
            reach(start, any_label(each, labels))
        numbers[start : start + each.shape[1]] = labels.chosen(each)
    return Levels(reached, numbers)


def counting(levels: Levels, image: np.ndarray, above: float | None) -> Levels:
    """Levels of which voxels of the image up to a limit reach none, whatever their probability; changed in place.

    Args:
        levels: on the CPU.
        image: (X, Y, Z), as it lies in its file.
        above: the limit; None: there is none.
    """
    if above is not None:
        reached = levels.reached.numpy()
        np.multiply(reached, above < image.T, out=reached)
    return levels


def lesions_on_grid(levels: Levels, threshold: float, peak: float) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """As :func:`lesion_mask`, of levels on the CPU, where connected regions are found; with what :func:`described`
    takes. Where the levels have numbers, the mask holds them."""
    mask, lesions = _lesions(levels.reached.numpy().transpose(2, 1, 0), 2 if peak > threshold else 1)
    return (mask if levels.numbers is None else mask * levels.numbers.numpy().transpose(2, 1, 0)), lesions


def lesion_mask(probability: np.ndarray, probability_threshold: float, hysteresis_threshold: float = 0.0) -> np.ndarray:
    """Lesions of a probability by two thresholds, as a prediction's mask is made of one kind of lesion.

    The lower one draws the outline, the higher one decides whether there is a lesion (hysteresis). Of a bundle with
    ``above_hu`` the probability is 0 where the image is not above.

    Args:
        probability: (X, Y, Z) in [0, 1], on the grid that the mask is to have: the voxels of
            ``Prediction.probability``.
        probability_threshold: lesion are voxels of at least this,
        hysteresis_threshold: in connected regions (26 neighbours) that reach this somewhere; not above the other one:
            all regions.

    Returns:
        (X, Y, Z) bool.

    Raises:
        ArgumentError: no three axes.
        ArgumentTypeError: an image of nibabel.
    """
    probability = _voxels(probability, "probability")
    levels = (probability >= probability_threshold).astype(np.uint8)
    levels += probability >= max(probability_threshold, hysteresis_threshold)
    return _lesions(levels, 2 if hysteresis_threshold > probability_threshold else 1)[0] > 0


def _voxels(values: Any, name: str) -> np.ndarray:
    values = as_voxels(values, name)
    if values.ndim != 3:
        raise ArgumentError(f"{name}: expected three axes, got shape {values.shape}")
    return values


def _lesions(levels: np.ndarray, needed: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """The connected regions above 0 that reach ``needed``.

    Returns:
        (X, Y, Z) uint8 mask, and of each lesion, largest first, its voxels and centroid in voxel coordinates.
    """
    mask = np.zeros_like(levels)
    box = bounding_box(levels)
    if box is None:
        return mask, []
    inside = levels[box]
    regions, count = _connected(inside)
    kept = np.zeros(count + 1, bool)
    kept[regions[inside >= needed]] = True
    kept[0] = False
    mask[box] = kept[regions]
    # Sizes and summed places of each region, plane by plane: counting all at once would copy them in 64 bits.
    sizes, places = np.zeros(count + 1, np.int64), np.zeros((count + 1, 3))
    rows, columns = (np.arange(size, dtype=np.float64) for size in inside.shape[:2])
    for z in range(inside.shape[2]):
        plane = regions[:, :, z].ravel()
        here = np.bincount(plane, minlength=count + 1)
        sizes += here
        places[:, 0] += np.bincount(plane, np.repeat(rows, len(columns)), count + 1)
        places[:, 1] += np.bincount(plane, np.tile(columns, len(rows)), count + 1)
        places[:, 2] += here * z
    origin = np.array([part.start for part in box])
    return mask, [
        (int(sizes[region]), places[region] / sizes[region] + origin) for region in _largest_first(sizes, kept)
    ]


def _connected(inside: np.ndarray) -> tuple[np.ndarray, int]:
    """Regions of what is above 0, numbered from 1, and how many there are."""
    from scipy import ndimage

    return ndimage.label(inside, structure=CORNERS)


def _largest_first(sizes: np.ndarray, kept: np.ndarray) -> list[int]:
    return [int(region) for region in np.argsort(-sizes, kind="stable") if kept[region]]


def numbered_lesions(mask: np.ndarray) -> np.ndarray:
    """The lesions of a mask by their numbers in :func:`lesion_report`.

    Args:
        mask: (X, Y, Z), above 0 in lesions.

    Returns:
        (X, Y, Z) int32: 1 in the largest connected (26 neighbours) lesion, 2 in the next one, and so on.
    """
    numbered = np.zeros(mask.shape, np.int32)
    box = bounding_box(mask)
    if box is None:
        return numbered
    regions, count = _connected(mask[box] > 0)
    sizes = np.zeros(count + 1, np.int64)
    for z in range(regions.shape[2]):  # as above, for memory's sake
        sizes += np.bincount(regions[:, :, z].ravel(), minlength=count + 1)
    kept = np.arange(count + 1) > 0
    numbers = np.zeros(count + 1, np.int32)
    numbers[_largest_first(sizes, kept)] = np.arange(1, count + 1)
    numbered[box] = numbers[regions]
    return numbered


def lesion_report(mask: np.ndarray, affine: np.ndarray) -> dict[str, Any]:
    """Number, volumes in mL and centroids in RAS mm of the connected (26 neighbours) lesions, as in reports.

    Args:
        mask: (X, Y, Z), above 0 in lesions.
        affine: (4, 4), voxel to RAS mm.

    Returns:
        ``lesion_count``, ``total_volume_ml`` and ``lesions``, the largest first, each with ``number`` (from 1),
        ``volume_ml`` and ``centroid_mm``; ready for JSON.

    Raises:
        ArgumentError: no three axes, or another affine.
        ArgumentTypeError: an image of nibabel.
    """
    mask, affine = _voxels(mask, "mask"), as_affine(affine)
    return described(_lesions((mask > 0).astype(np.uint8), 1)[1], affine)


def described(lesions: list[tuple[int, np.ndarray]], affine: np.ndarray) -> dict[str, Any]:
    """As :func:`lesion_report`, of voxels and centroid (in voxels) of each lesion."""
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    return {
        "lesion_count": len(lesions),
        "total_volume_ml": rounded_ml(sum(size for size, _ in lesions) * voxel_ml),
        "lesions": [
            {
                "number": number,
                "volume_ml": rounded_ml(size * voxel_ml),
                "centroid_mm": [round(float(value), 2) for value in nib.affines.apply_affine(affine, centre)],
            }
            for number, (size, centre) in enumerate(lesions, 1)
        ],
    }


def described_labels(
    mask: np.ndarray, affine: np.ndarray, labels: Labels, hu: np.ndarray | None = None
) -> dict[str, dict[str, Any]]:
    """As :func:`lesion_report`, of each label by name, with its numbers in the mask and, of calcium, its score."""
    found = {}
    for name, numbers in zip(labels.names, labels.numbers, strict=True):
        own = labels.marked(mask, name)
        found[name] = {"numbers": list(numbers), **scored(own, affine, hu), **lesion_report(own, affine)}
    return found


def scored(mask: np.ndarray, affine: np.ndarray, hu: np.ndarray | None) -> dict[str, float]:
    """The Agatston score of a mask, above 0 in lesions, where there is an image in Hounsfield units."""
    return {} if hu is None else {"agatston": round(agatston(mask > 0, hu, affine), 4)}
