"""From probabilities to lesions: mask, number, volumes and places."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ..data.labels import Labels, any_label
from ..data.volumes import Prepared, blocks_on_grid, bounding_box

__all__ = ["described", "described_labels", "lesion_mask", "lesion_report", "lesions_on_grid"]

CORNERS = np.ones((3, 3, 3))  # lesions are connected by faces, edges and corners


def lesions_on_grid(
    probability: Tensor, prepared: Prepared, threshold: float, peak: float, labels: Labels | None = None
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """As :func:`lesion_mask`, of the probability on the networks' grid; with what :func:`described` takes.

    With labels the probability is (K, X, Y, Z), a lesion is what has any of them, and the mask holds the numbers.
    """
    whole = probability if labels is None else any_label(probability, labels)
    mask, lesions = _lesions(_levels(whole, prepared, threshold, peak), 2 if peak > threshold else 1)
    return (mask if labels is None else _numbered(mask, probability, prepared, labels)), lesions


def _numbered(mask: np.ndarray, probabilities: Tensor, prepared: Prepared, labels: Labels) -> np.ndarray:
    """The number of each voxel of a mask, block by block."""
    numbers = np.zeros_like(mask)
    for blocks in zip(*(blocks_on_grid(one, prepared) for one in probabilities), strict=True):
        start, found = blocks[0][0], labels.chosen(torch.stack([block for _, block in blocks]))
        here = np.s_[:, :, start : start + len(found)]
        numbers[here] = np.where(mask[here] > 0, found.numpy().transpose(2, 1, 0), 0)
    return numbers


def _levels(probability: Tensor, prepared: Prepared, threshold: float, peak: float) -> np.ndarray:
    """On the file's grid, uint8: 1 where the probability reaches the threshold, 2 where it reaches the peak as well."""
    levels = np.empty(prepared.volume.data.shape, np.uint8, order="F")
    for start, block in blocks_on_grid(probability, prepared):
        found = (block >= threshold).to(torch.uint8) + (block >= max(threshold, peak)).to(torch.uint8)
        levels[:, :, start : start + len(block)] = found.numpy().transpose(2, 1, 0)
    return levels


def lesion_mask(probability: np.ndarray, threshold: float, peak: float = 0.0) -> np.ndarray:
    """Voxels of at least ``threshold`` whose connected lesion (26 neighbours) reaches ``peak`` somewhere.

    Two thresholds (hysteresis): the lower one draws the outline, the higher one decides whether there is a lesion.

    Args:
        probability: (X, Y, Z) in [0, 1].
        threshold: of the outline.
        peak: least highest probability of a lesion; not above ``threshold``: every lesion is kept.

    Returns:
        (X, Y, Z) bool.
    """
    levels = (probability >= threshold).astype(np.uint8) + (probability >= max(threshold, peak))
    return _lesions(levels, 2 if peak > threshold else 1)[0] > 0


def _lesions(levels: np.ndarray, needed: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """The connected regions above 0 that reach ``needed``.

    Returns:
        (X, Y, Z) uint8 mask, and of each lesion, largest first, its voxels and centroid in voxel coordinates.
    """
    from scipy import ndimage

    mask = np.zeros_like(levels)
    box = bounding_box(levels)
    if box is None:
        return mask, []
    inside = levels[box]
    labels, count = ndimage.label(inside, structure=CORNERS)
    kept = np.zeros(count + 1, bool)
    kept[labels[inside >= needed]] = True
    kept[0] = False
    mask[box] = kept[labels]
    # Sizes and summed places of each label, plane by plane: counting all at once would copy the labels in 64 bits.
    sizes, places = np.zeros(count + 1, np.int64), np.zeros((count + 1, 3))
    rows, columns = (np.arange(size, dtype=np.float64) for size in inside.shape[:2])
    for z in range(inside.shape[2]):
        plane = labels[:, :, z].ravel()
        here = np.bincount(plane, minlength=count + 1)
        sizes += here
        places[:, 0] += np.bincount(plane, np.repeat(rows, len(columns)), count + 1)
        places[:, 1] += np.bincount(plane, np.tile(columns, len(rows)), count + 1)
        places[:, 2] += here * z
    origin = np.array([part.start for part in box])
    order = [label for label in np.argsort(-sizes, kind="stable") if kept[label]]
    return mask, [(int(sizes[label]), places[label] / sizes[label] + origin) for label in order]


def lesion_report(mask: np.ndarray, affine: np.ndarray) -> dict[str, Any]:
    """Count, volumes in mL and centroids in RAS mm of the connected (26 neighbours) lesions, largest first.

    Args:
        mask: (X, Y, Z), above 0 in lesions.
        affine: (4, 4), voxel to mm.
    """
    return described(_lesions((mask > 0).astype(np.uint8), 1)[1], affine)


def described(lesions: list[tuple[int, np.ndarray]], affine: np.ndarray) -> dict[str, Any]:
    """As :func:`lesion_report`, of voxels and centroid (in voxels) of each lesion."""
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    return {
        "lesion_count": len(lesions),
        "total_volume_ml": round(sum(size for size, _ in lesions) * voxel_ml, 4),
        "lesions": [
            {
                "volume_ml": round(size * voxel_ml, 4),
                "centroid_mm": [round(float(value), 2) for value in nib.affines.apply_affine(affine, centre)],
            }
            for size, centre in lesions
        ],
    }


def described_labels(mask: np.ndarray, affine: np.ndarray, labels: Labels) -> dict[str, dict[str, Any]]:
    """As :func:`lesion_report`, of each label by name, with its numbers in the mask."""
    return {
        name: {"numbers": list(numbers), **lesion_report(labels.marked(mask, name), affine)}
        for name, numbers in zip(labels.names, labels.numbers, strict=True)
    }
