"""Volumes as SimpleITK writes them."""

from __future__ import annotations

import locale
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the name its users know


def itk_image(
    data: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.5, 3.0),
    origin: Sequence[float] = (10.0, -20.0, 30.0),
    direction: np.ndarray | None = None,
) -> sitk.Image:
    """Of (X, Y, Z), in LPS; each column of the direction is that of an axis."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    image.SetSpacing(list(spacing))
    image.SetOrigin(list(origin))
    if direction is not None:
        image.SetDirection(direction.ravel().tolist())
    return image


def write_series(
    folder: Path,
    image: sitk.Image,
    identifier: str = "1.2.3",
    description: str = "T1",
    slopes: Sequence[float] = (1.0,),
    left_out: Sequence[int] = (),
    thickness: str = "",
) -> Path:
    """A DICOM file per slice, their names in no order; the slopes take turns, and where one is 1 numbers are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    direction = np.reshape(image.GetDirection(), (3, 3))
    for k in range(image.GetDepth()):
        if k in left_out:
            continue
        slope = slopes[k % len(slopes)]
        one = sitk.Cast(image[:, :, k], sitk.sitkInt16 if slope == 1 else sitk.sitkFloat32)
        tags = {
            "0008|0018": f"{identifier}.{k + 1}",
            "0008|0060": "CT",
            "0008|103e": description,
            "0020|000d": "1.2.9",
            "0020|000e": identifier,
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(map(str, image.TransformIndexToPhysicalPoint((0, 0, k)))),
            "0020|0037": "\\".join(map(str, [*direction[:, 0], *direction[:, 1]])),
            "0028|0100": "16",
            "0028|0101": "16",
            "0028|0102": "15",
            "0028|0103": "1",
            "0028|1052": "0",
            "0028|1053": str(slope),
        } | ({"0018|0050": thickness} if thickness else {})
        for tag, value in tags.items():
            one.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{(7 * k) % 10}-{identifier}-{k}.dcm"))
        before = locale.setlocale(locale.LC_ALL)
        writer.Execute(one)
        locale.setlocale(locale.LC_ALL, before)  # which the writing of DICOM files (SimpleITK 2.5.7) leaves another
    return folder
