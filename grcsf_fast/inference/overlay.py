"""The overlay montage: lesions outlined on axial slices, with maps of what the networks saw below each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from torch import Tensor

from ..data.labels import Labels
from ..data.volumes import Prepared, axial_slices, bounding_box

__all__ = ["ABOVE", "COLUMNS", "ShownMap", "map_title", "save_overlay"]

COLUMNS = 6
# Height of a line of text, in heights of a tile; above the tiles there are two.
ABOVE = 0.14

# Black at 0; blue below it, red above.
DIVERGING = "berlin"

# Black at 0, then brighter.
RISING = "inferno"

# Of labels, in their order: apart on black and grey, also for most who are colour-blind.
COLORS = ("red", "deepskyblue", "gold", "mediumspringgreen", "violet", "darkorange", "white")


class ShownMap(NamedTuple):
    """A map that is drawn below the slices.

    Attributes:
        name: ``"residual75"``, of a masking ratio in percent, ``"patch_score"`` or ``"gcu_residual"``.
        values: (X, Y, Z) on the networks' grid.
        signed: whether there are values below 0.
    """

    name: str
    values: Tensor
    signed: bool = False

    def limits(self) -> tuple[float, float]:
        """Of the colours."""
        brightest = float(np.percentile(self.values.abs().numpy(), 99.5))
        return (-brightest if self.residual else 0.0), brightest

    @property
    def residual(self) -> bool:
        return self.name.startswith("residual")

    def title(self, brightest: float) -> str:
        """With the value of the brightest colour where it has a meaning beyond this image."""
        title = map_title(self.name, self.signed)
        return title if self.residual else f"{title}, up to {brightest:.2g}"


def map_title(name: str, signed: bool) -> str:
    """What a row of maps shows, of a :class:`ShownMap`'s name."""
    if name == "patch_score":
        return "RCU: importance of each patch, brighter is more"
    if name == "gcu_residual":
        return "GCU: what the next coarser features do not show, brighter is more"
    masked = f"residual map, {name.removeprefix('residual')} % masked"
    return f"{masked}: blue darker, red brighter than expected" if signed else masked


def save_overlay(
    path: str | Path,
    prepared: Prepared,
    mask: nib.Nifti1Image,
    maps: Sequence[ShownMap] = (),
    labels: Labels | None = None,
) -> None:
    """Draw six axial slices as a PNG: every lesion first, then wherever there is most of it.

    The first row is the image with the lesions outlined in red, the others are maps with the same outlines. A residual
    map is blue where the image is darker than expected, red where it is brighter, black where it is as expected. Left
    of the picture is the right side of the body, as radiologists look at it.

    Args:
        path: of the PNG.
        prepared: the volume.
        mask: lesions, on the grid of the volume.
        maps: a row each.
        labels: each outlined in its own colour, with a legend; the mask holds their numbers. None: all in red.
    """
    from contourpy import contour_generator
    from matplotlib.collections import LineCollection
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
    planes = [axial_slices(one.values, prepared, shown) for one in maps]
    object_ = sparse[sparse > sparse.mean()]
    low, high = float(sparse.min()), float(np.percentile(object_, 99)) if object_.size else 1.0
    limits = [(low, high), *(one.limits() for one in maps)]
    colors = ["gray", *(DIVERGING if one.residual else RISING for one in maps)]
    rows = 1 + len(maps)
    across, along = intensities.shape[0] * width, intensities.shape[1] * height  # mm of a slice
    # Of a tile, at most three times as high as wide and twice as wide as high, whatever the slice is.
    wide, high_mm = max(across, along / 3), max(along, across / 2)
    above = ABOVE * high_mm
    inches = 2.4 / wide
    figure = Figure(figsize=(2.4 * COLUMNS, inches * (rows * high_mm + 2 * above)), facecolor="black")
    # One pair of axes in millimetres, and the lines of a colour together: those of each tile took most of the time.
    axes = figure.add_axes((0, 0, 1, 1))
    lines: list[dict[str, list[np.ndarray]]] = [{} for _ in outlines]
    for column, z in enumerate(shown):
        for row in range(rows):
            # What is not computed, outside of the head, stays as black as the picture.
            plane = intensities[:, :, z] if row == 0 else np.ma.masked_equal(planes[row - 1][column], 0)
            left, top = column * wide + (wide - across) / 2, row * high_mm + (high_mm - along) / 2
            # Rows of the picture run from anterior to posterior, columns from the right of the body to its left.
            axes.imshow(
                plane.T[::-1, ::-1], cmap=colors[row], vmin=limits[row][0], vmax=limits[row][1],
                extent=(left, left + across, top + along, top),
            )  # fmt: skip
            for (marked, above_color, below_color), drawn in zip(outlines, lines, strict=True):
                outline = marked[:, :, z].T[::-1, ::-1]
                if outline.any() and min(outline.shape) > 1:
                    x = left + (np.arange(outline.shape[1]) + 0.5) * width
                    y = top + (np.arange(outline.shape[0]) + 0.5) * height
                    color = above_color if row == 0 else below_color
                    if row and labels is None and not maps[row - 1].residual:
                        color = "cyan"  # whose brightest colour is yellow
                    drawn.setdefault(color, []).extend(contour_generator(x, y, outline.astype(np.float32)).lines(0.5))
        millimetres = nib.affines.apply_affine(affine, [*(n / 2 for n in intensities.shape[:2]), z])[2]
        axes.text(
            (column + 0.5) * wide, -0.3 * above, f"z = {millimetres:.0f} mm", color="white", fontsize=8, ha="center"
        )
    for drawn in lines:
        for color, segments in drawn.items():
            axes.add_collection(LineCollection(segments, colors=color, linewidths=0.8), autolim=False)
    name = "no lesion found" if not lesions.any() else "lesions outlined"
    axes.text(
        COLUMNS / 2 * wide, -1.25 * above, f"{name} (R on the left). Not for clinical use.", color="white",
        fontsize=9, ha="center",
    )  # fmt: skip
    for row, one in enumerate(maps, 1):
        axes.text(
            0.02 * wide, row * high_mm + 0.02 * high_mm, one.title(limits[row][1]), color="white", fontsize=8, va="top",
            bbox={"facecolor": "black", "edgecolor": "none", "alpha": 0.6, "pad": 1},
        )  # fmt: skip
    if labels is not None:
        # Below the title, where a picture without labels has the line of the places of its slices alone.
        for place, (name, color) in enumerate(_colored(labels)):
            where = (place + 0.5) * COLUMNS * wide / len(labels.names)
            axes.text(where, -0.8 * above, name, color=color, fontsize=8, ha="center", parse_math=False)
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
