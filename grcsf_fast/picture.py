"""The overlay montage: lesions outlined on axial slices, with a residual map beside each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np

__all__ = ["save_overlay"]

COLUMNS = 6


def save_overlay(
    path: str | Path,
    image: nib.Nifti1Image,
    mask: nib.Nifti1Image,
    residual_maps: Mapping[float, nib.Nifti1Image],
) -> None:
    """Draw six axial slices as a PNG: every lesion first, then wherever there is most of it.

    The first row is the image with the lesions outlined in red, the second the residual map of the highest masking
    ratio with the same outlines. Left of the picture is the right side of the body, as radiologists look at it.

    Args:
        path: of the PNG.
        image: the volume.
        mask: lesions, on the grid of ``image``.
        residual_maps: by masking ratio, on the grid of ``image``; may be empty.
    """
    from matplotlib.figure import Figure

    volume, lesion = (nib.as_closest_canonical(item) for item in (image, mask))
    intensities = np.asarray(volume.dataobj, dtype=np.float32)
    lesions = np.asarray(lesion.dataobj) > 0
    ratio = max(residual_maps, default=None)
    residual = None
    if ratio is not None:
        residual = np.asarray(nib.as_closest_canonical(residual_maps[ratio]).dataobj, dtype=np.float32)
    width, height, thickness = nib.affines.voxel_sizes(volume.affine)
    shown = _choose_slices(intensities, lesions, thickness)
    brightest = float(np.percentile(residual, 99.5)) if residual is not None else 0.0

    rows = 1 if residual is None else 2
    figure = Figure(figsize=(2.4 * COLUMNS, 2.9 * rows + 0.3), layout="constrained", facecolor="black")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    object_ = intensities[intensities > intensities.mean()]
    low, high = float(intensities.min()), float(np.percentile(object_, 99)) if object_.size else 1.0
    for column in range(COLUMNS):
        for row in range(rows):
            axis = axes[row, column]
            axis.set_axis_off()
            if column >= len(shown):
                continue
            z = shown[column]
            plane = intensities[:, :, z] if row == 0 else residual[:, :, z]
            limits = (low, high) if row == 0 else (0, brightest)
            # Rows of the picture run from anterior to posterior, columns from the right of the body to its left.
            axis.imshow(
                plane.T[::-1, ::-1], cmap="gray" if row == 0 else "magma", vmin=limits[0], vmax=limits[1],
                aspect=height / width,
            )  # fmt: skip
            outline = lesions[:, :, z].T[::-1, ::-1]
            if outline.any() and min(outline.shape) > 1:
                axis.contour(outline, [0.5], colors="red" if row == 0 else "cyan", linewidths=0.8)
            if row == 0:
                millimetres = nib.affines.apply_affine(volume.affine, [*(n / 2 for n in plane.shape), z])[2]
                axis.set_title(f"z = {millimetres:.0f} mm", color="white", fontsize=8)
    name = "no lesion found" if not lesions.any() else "lesions outlined"
    below = f"; below: residual map, {ratio:.0%} masked" if ratio is not None else ""
    figure.suptitle(f"{name} (R on the left){below}. Not for clinical use.", color="white", fontsize=9)
    figure.savefig(path, format="png", dpi=100, facecolor="black")


def _choose_slices(intensities: np.ndarray, lesions: np.ndarray, thickness: float) -> list[int]:
    """The largest slice of each lesion, largest lesions first; then slices with most lesion, then others of the head.

    Slices are at least 6 mm apart as long as there is lesion to show.
    """
    from scipy import ndimage

    depth = intensities.shape[2]
    apart = max(1, round(6 / thickness))
    chosen: list[int] = []
    labels, count = ndimage.label(lesions, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    for label in np.argsort(-sizes, kind="stable")[:COLUMNS] + 1:
        largest = int((labels == label).sum((0, 1)).argmax())
        if all(abs(largest - other) >= apart for other in chosen):
            chosen.append(largest)
    area = lesions.sum((0, 1))
    for z in np.argsort(-area, kind="stable"):
        if area[z] and len(chosen) < COLUMNS and all(abs(int(z) - other) >= apart for other in chosen):
            chosen.append(int(z))
    head = np.flatnonzero((intensities > intensities.mean()).mean((0, 1)) > 0.02)
    first, last = (int(head[0]), int(head[-1])) if head.size else (0, depth - 1)
    for z in np.linspace(first, last, COLUMNS + 2).round().astype(int)[1:-1]:
        if len(chosen) < min(COLUMNS, depth) and int(z) not in chosen:
            chosen.append(int(z))
    return sorted(chosen)
