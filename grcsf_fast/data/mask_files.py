"""Masks out: in NIfTI, or in the format of the image that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from .itk import simple_itk, write_volume
from .volumes import as_pair

__all__ = ["MASK_FORMATS", "check_endings", "mask_endings", "save_mask"]

MASK_FORMATS = ("nifti", "same")
# An .mhd names the file of its voxels, which would change when both get their final names: MetaImage in one file.
SAME = {
    (".nii",): (".nii",),
    (".hdr", ".img", ".hdr.gz", ".img.gz"): (".hdr", ".img"),
    (".mha", ".mhd"): (".mha",),
    (".nrrd",): (".nrrd",),
}
OF_ITK = (".mha", ".nrrd")


def mask_endings(source: Path | None, mask_format: str) -> tuple[str, ...]:
    """Endings of the files of a mask, ``.nii.gz`` where nothing else is asked for.

    Args:
        source: the image's file; None: it is in memory.
        mask_format: ``"nifti"``, or ``"same"``: the image's own by the ending of its name; a DICOM series has none
            for masks here.
    """
    if mask_format == "same" and source is not None:
        for endings, found in SAME.items():
            if source.name.lower().endswith(endings):
                return found
    return (".nii.gz",)


def check_endings(endings: Iterable[str]) -> None:
    """See that masks with such endings can be written, before any is computed.

    Raises:
        ArgumentError: a format needs SimpleITK, which is not installed.
    """
    for ending in sorted(set(endings) & set(OF_ITK)):
        simple_itk(f"write a file ending in {ending}")


def save_mask(paths: Sequence[Path], mask: nib.Nifti1Image, affine: np.ndarray) -> None:
    """Write a mask.

    Args:
        paths: of its files, with the endings of :func:`mask_endings`.
        mask: with the forms of its image, see :func:`grcsf_fast.data.volumes.like`.
        affine: (4, 4), voxel to RAS mm.

    Raises:
        OSError: a file cannot be written.
        ArgumentError: the format needs SimpleITK, which is not installed.
    """
    if paths[-1].suffix in OF_ITK:
        write_volume(paths[-1], np.asarray(mask.dataobj), affine)
    else:
        nib.save(as_pair(mask) if len(paths) > 1 else mask, paths[-1])
