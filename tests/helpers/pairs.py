"""Small pairs of an image and a mask on disk."""

from __future__ import annotations

import nibabel as nib
import numpy as np

SHAPE = (24, 26, 22)
AFFINE = np.array([[-2, 0, 0, 20], [0, 2, 0, -30], [0, 0, 2, 5], [0, 0, 0, 1.0]])


def write_case(root, name, suffix="", corner=(8, 9, 7)):
    """A head with a dark cube of 4 voxels at ``corner``, and its mask."""
    rng = np.random.default_rng(len(name))
    image = np.zeros(SHAPE, np.float32)
    image[3:21, 3:23, 3:19] = rng.uniform(90, 110, (18, 20, 16))
    mask = np.zeros(SHAPE, np.uint8)
    mask[tuple(slice(first, first + 4) for first in corner)] = 1
    image[mask > 0] = 50
    for folder, data, file in (("images", image, f"{name}{suffix}"), ("masks", mask, name)):
        (root / folder).mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(data, AFFINE), root / folder / f"{file}.nii.gz")


def write_thick(root, names, affine):
    """Heads of few slices with a dark box of lesion each, and their masks."""
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        image, mask = np.zeros((44, 40, 10), np.float32), np.zeros((44, 40, 10), np.uint8)
        image[2:42, 2:38, 1:9] = rng.uniform(90, 110, (40, 36, 8))
        mask[20:24, 18:22, 4:6] = 1
        image[mask > 0] = 50
        nib.save(nib.Nifti1Image(image, affine), root / "images" / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(mask, affine), root / "masks" / f"{name}.nii.gz")
