"""The overlay montage: lesions outlined on axial slices, with a residual map below each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from torch import Tensor

from ..data.labels import Labels
from ..data.volumes import Prepared, axial_slices, bounding_box

__all__ = ["ABOVE", "COLUMNS", "save_overlay"]

COLUMNS = 6
# Height of a line of text, in heights of a tile; above the tiles there are two.
ABOVE = 0.14

# Black at 0; blue below it, red above.
DIVERGING = "berlin"

# Of labels, in their order: apart on black and grey, also for most who are colour-blind.
COLORS = ("red", "deepskyblue", "gold", "mediumspringgreen", "violet", "darkorange", "white")


def save_overlay(
    path: str | Path,
    prepared: Prepared,
    mask: nib.Nifti1Image,
    residual: tuple[float, Tensor] | None,
    signed: bool = True,
    labels: Labels | None = None,
) -> None:
    """Draw six axial slices as a PNG: every lesion first, then wherever there is most of it.

    The first row is the image with the lesions outlined in red, the second a residual map with the same outlines: blue
    where the image is darker than expected, red where it is brighter, black where it is as expected. Left of the
    picture is the right side of the body, as radiologists look at it.

    Args:
        path: of the PNG.
        prepared: the volume.
        mask: lesions, on the grid of the volume.
        residual: a masking ratio and its map (X, Y, Z) on the grid of ``prepared``; None: one row.
        signed: whether the map has a sign.
        labels: each outlined in its own colour, with a legend; the mask holds their numbers. None: all in red.
    """
    from matplotlib.figure import Figure

    source = nib.io_orientation(prepared.volume.affine)
    # Views, no copies: a volume may be large.
    intensities = nib.apply_orientation(prepared.volume.data, source)
    numbers = nib.apply_orientation(np.asarray(mask.dataobj), source)
    lesions = numbers > 0
    outlines = [(lesions, "red", "yellow")]
    if labels is not None:
        outlines = [(labels.marked(numbers, name), color, color) for name, color in _colored(labels)]
    affine = prepared.volume.affine @ nib.orientations.inv_ornt_aff(source, prepared.volume.data.shape)
    width, height, thickness = nib.affines.voxel_sizes(affine)
    sparse = intensities[tuple(slice(None, None, max(1, size // 128)) for size in intensities.shape)]
    shown = _choose_slices(sparse, intensities.shape[2], lesions, thickness)
    ratio = None if residual is None else residual[0]
    planes = None if residual is None else dict(zip(shown, axial_slices(residual[1], prepared, shown), strict=True))
    brightest = float(np.percentile(residual[1].abs().numpy(), 99.5)) if residual is not None else 0.0

    object_ = sparse[sparse > sparse.mean()]
    low, high = float(sparse.min()), float(np.percentile(object_, 99)) if object_.size else 1.0
    rows = 1 if residual is None else 2
    wide, high_mm = intensities.shape[0] * width, intensities.shape[1] * height  # mm of a tile
    above = ABOVE * high_mm
    inches = 2.4 / wide
    figure = Figure(figsize=(2.4 * COLUMNS, inches * (rows * high_mm + 2 * above)), facecolor="black")
    # One pair of axes in millimetres: a pair for each tile took most of the time.
    axes = figure.add_axes((0, 0, 1, 1))
    for column, z in enumerate(shown):
        for row in range(rows):
            # What is not computed, outside of the head, stays as black as the picture.
            plane = intensities[:, :, z] if row == 0 else np.ma.masked_equal(planes[z], 0)
            limits = (low, high) if row == 0 else (-brightest, brightest)
            left, top = column * wide, row * high_mm
            # Rows of the picture run from anterior to posterior, columns from the right of the body to its left.
            axes.imshow(
                plane.T[::-1, ::-1], cmap="gray" if row == 0 else DIVERGING, vmin=limits[0], vmax=limits[1],
                extent=(left, left + wide, top + high_mm, top),
            )  # fmt: skip
            for marked, above_color, below_color in outlines:
                outline = marked[:, :, z].T[::-1, ::-1]
                if outline.any() and min(outline.shape) > 1:
                    x = left + (np.arange(outline.shape[1]) + 0.5) * width
                    y = top + (np.arange(outline.shape[0]) + 0.5) * height
                    color = above_color if row == 0 else below_color
                    axes.contour(x, y, outline, [0.5], colors=color, linewidths=0.8)
        millimetres = nib.affines.apply_affine(affine, [*(n / 2 for n in intensities.shape[:2]), z])[2]
        axes.text(
            (column + 0.5) * wide, -0.3 * above, f"z = {millimetres:.0f} mm", color="white", fontsize=8, ha="center"
        )
    name = "no lesion found" if not lesions.any() else "lesions outlined"
    below = ""
    if ratio is not None:
        below = f"; below: residual map, {ratio:.0%} masked"
        below += ", blue darker and red brighter than expected" if signed else ""
    axes.text(
        COLUMNS / 2 * wide, -1.25 * above, f"{name} (R on the left){below}. Not for clinical use.", color="white",
        fontsize=9, ha="center",
    )  # fmt: skip
    if labels is not None:
        # Below the title, where a picture without labels has the line of the places of its slices alone.
        for place, (name, color) in enumerate(_colored(labels)):
            where = (place + 0.5) * COLUMNS * wide / len(labels.names)
            axes.text(where, -0.8 * above, name, color=color, fontsize=8, ha="center")
    axes.set_xlim(0, COLUMNS * wide)
    axes.set_ylim(rows * high_mm, -2 * above)
    axes.set_axis_off()
    figure.savefig(path, format="png", dpi=100, facecolor="black", pil_kwargs={"compress_level": 1})
    # A figure and its parts refer to each other: all would stay until Python next looks for such circles.
    figure.clear()


def _colored(labels: Labels) -> list[tuple[str, str]]:
    return [(name, COLORS[place % len(COLORS)]) for place, name in enumerate(labels.names)]


def _choose_slices(sparse: np.ndarray, depth: int, lesions: np.ndarray, thickness: float) -> list[int]:
    """The largest slice of each lesion, largest lesions first; then slices with most lesion, then others of the head.

    Slices are at least 6 mm apart as long as there is lesion to show. ``sparse`` is the volume, coarsely sampled.
    """
    from scipy import ndimage

    apart = max(1, round(6 / thickness))
    chosen: list[int] = []
    area = lesions.sum((0, 1))
    for part in _boxes(lesions, ndimage):
        largest = part[1] + int(part[2].argmax())
        if all(abs(largest - other) >= apart for other in chosen):
            chosen.append(largest)
    for z in np.argsort(-area, kind="stable"):
        if area[z] and len(chosen) < COLUMNS and all(abs(int(z) - other) >= apart for other in chosen):
            chosen.append(int(z))
    head = np.flatnonzero((sparse > sparse.mean()).mean((0, 1)) > 0.02) * depth // sparse.shape[2]
    first, last = (int(head[0]), int(head[-1])) if head.size else (0, depth - 1)
    for z in np.linspace(first, last, COLUMNS + 2).round().astype(int)[1:-1]:
        if len(chosen) < min(COLUMNS, depth) and int(z) not in chosen:
            chosen.append(int(z))
    return sorted(chosen)


def _boxes(lesions: np.ndarray, ndimage: Any) -> list[tuple[int, int, np.ndarray]]:
    """Of the largest lesions: voxels, first slice, and voxels in each slice from there on."""
    box = bounding_box(lesions)
    if box is None:
        return []
    labels, _ = ndimage.label(lesions[box], structure=np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())[1:]
    found = ndimage.find_objects(labels)
    chosen = np.argsort(-sizes, kind="stable")[:COLUMNS]
    return [
        (int(sizes[at]), box[2].start + found[at][2].start, (labels[found[at]] == at + 1).sum((0, 1))) for at in chosen
    ]
