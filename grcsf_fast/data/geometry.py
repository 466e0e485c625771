"""Where voxels lie: sform, qform and voxel sizes of a NIfTI header, weighed against each other, in millimetres.

The order is nibabel's: the sform, the qform, the voxel sizes alone. A form that cannot be true is passed over for the
next that is one; where the header contradicts itself, a remark says so with the numbers.
"""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np

from ..errors import GrcsfError

__all__ = ["VolumeError", "header_geometry", "image_geometry", "unit_in_mm"]

UNITS = {1: ("metres", 1000.0), 2: ("millimetres", 1.0), 3: ("micrometres", 1e-3)}
MIN_STEP, MAX_STEP = 1e-3, 1e3  # mm
MIN_EXTENT, MAX_EXTENT = 1.0, 1e4  # mm, of the longest side: what is outside has another unit than it says
MIN_DETERMINANT = 1e-3  # of axes of length 1: flatter ones span no volume
STEP_TOLERANCE = 0.005  # relative; pixdim is often rounded
MAX_QUATERNION = 1.001  # squared length of b, c, d; a little above 1 by rounding is a rotation by 180 degrees


class VolumeError(GrcsfError, ValueError):
    """A volume that cannot be used; the message names the file, what was expected and what was found."""


def unit_in_mm(header: Any) -> float:
    """Millimetres of one unit of length of a header; a unit that is not stated is the millimetre."""
    return UNITS.get(int(header["xyzt_units"]) & 7, UNITS[2])[1]


def header_geometry(header: Any, shape: tuple[int, int, int], name: str) -> tuple[np.ndarray, list[str]]:
    """The affine of a volume by its header as it lies in the file.

    Args:
        header: NIfTI, before nibabel repairs it.
        shape: (3,) voxels.
        name: for messages.

    Returns:
        (4, 4) float64, voxel to RAS mm; and what is doubtful about it, a sentence each.

    Raises:
        VolumeError: no form of the header can be true.
    """
    remarks = _unit_remarks(header)
    sform, qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    by_sform, no_sform = _sform(header, shape)
    by_qform, no_qform = _qform(header, shape)
    if sform and by_sform is not None:
        remarks += _size_remarks(header, by_sform)
        if qform and by_qform is None:
            remarks.append(f"its qform cannot be used, it needs {no_qform}; the sform is")
        elif qform:
            remarks += _form_remarks(by_sform, by_qform, shape)
        return by_sform, remarks
    if qform and by_qform is not None:
        if sform:
            remarks.append(f"its sform cannot be used, it needs {no_sform}; the qform is")
        return by_qform, remarks + _sign_remarks(header)
    if sform or qform:
        faults = [fault for set_, fault in ((sform, no_sform), (qform, no_qform)) if set_]
        raise VolumeError(f"{name}: expected {'; and in its other form '.join(faults)}")
    affine, fault = _sizes_alone(header, shape)
    if affine is None:
        raise VolumeError(f"{name}: expected {fault}")
    remarks.append(
        "its header says nothing about orientation (qform_code and sform_code are 0); its axes are taken to run "
        "to the left, to the front and up"
    )
    return affine, remarks + _sign_remarks(header)


def image_geometry(
    image: nib.spatialimages.SpatialImage, shape: tuple[int, int, int], name: str
) -> tuple[np.ndarray, list[str]]:
    """As :func:`header_geometry`, of an image in memory: where its affine is not its header's, the affine holds."""
    if image.affine is None:
        raise VolumeError(f"{name}: expected a finite affine, found none")
    try:
        own = np.allclose(image.affine, image.header.get_best_affine(), equal_nan=True)
    # A quaternion that is no rotation raises ValueError, a qfac or pixdim that cannot be nibabel's own.
    except (ValueError, nib.spatialimages.HeaderDataError):
        own = False
    if own:
        return header_geometry(image.header, shape, name)
    affine, fault = _checked(np.asarray(image.affine, dtype=np.float64), image.header, shape)
    if affine is None:
        raise VolumeError(f"{name}: expected {fault}")
    return affine, _unit_remarks(image.header)


def _checked(affine: np.ndarray, header: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray | None, str]:
    """An affine in mm, or None and what it would have to be."""
    found = f"found {affine.tolist()}"
    if not np.isfinite(affine).all():
        return None, f"a finite affine, {found}"
    factor = unit_in_mm(header)
    affine = np.diag([factor, factor, factor, 1.0]) @ affine
    steps = nib.affines.voxel_sizes(affine)
    if not np.isfinite(steps).all() or not (steps > 0).all():
        return None, f"an invertible affine, {found}"
    if abs(np.linalg.det(affine[:3, :3] / steps)) < MIN_DETERMINANT:
        return None, f"an invertible affine, {found}"
    if steps.min() < MIN_STEP or steps.max() > MAX_STEP:
        return None, f"voxels of {MIN_STEP:g} to {MAX_STEP:g} mm, found {_numbers(steps)} mm{_by_unit(header)}"
    longest = float((steps * shape).max())
    if not MIN_EXTENT <= longest <= MAX_EXTENT:
        return None, (
            f"a longest side of {MIN_EXTENT:g} to {MAX_EXTENT:g} mm, found {longest:g} mm: {shape} voxels of "
            f"{_numbers(steps)} mm{_by_unit(header)}"
        )
    return affine, ""


def _sform(header: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray | None, str]:
    return _checked(header.get_sform(), header, shape)


def _qform(header: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray | None, str]:
    steps = np.abs(header["pixdim"][1:4].astype(np.float64))
    if not np.isfinite(steps).all() or not (steps > 0).all():
        return None, f"voxel sizes above 0 in pixdim, found {_numbers(header['pixdim'][1:4])}"
    bcd = np.array([header[f"quatern_{axis}"] for axis in "bcd"], np.float64)
    with np.errstate(over="ignore"):
        length = float(bcd @ bcd)
    if not length <= MAX_QUATERNION:
        return None, f"a quaternion of a rotation, found b, c, d {_numbers(bcd)}"
    quaternion = nib.quaternions.fillpositive(bcd / max(1.0, length) ** 0.5, header.quaternion_threshold)
    # The third axis runs the other way where qfac is -1; the standard takes 0 for 1, and so does nibabel any other.
    steps[2] *= -1 if header["pixdim"][0] == -1 else 1
    affine = np.eye(4)
    affine[:3, :3] = nib.quaternions.quat2mat(quaternion) * steps
    affine[:3, 3] = [header[f"qoffset_{axis}"] for axis in "xyz"]
    return _checked(affine, header, shape)


def _sizes_alone(header: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray | None, str]:
    """nibabel's reading of a header without forms: to the left, to the front, up, the world's origin in the middle."""
    steps = np.abs(header["pixdim"][1:4].astype(np.float64))
    if not np.isfinite(steps).all() or not (steps > 0).all():
        return None, f"voxel sizes above 0 in pixdim, found {_numbers(header['pixdim'][1:4])}"
    affine = np.diag([-steps[0], steps[1], steps[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return _checked(affine, header, shape)


def _unit_remarks(header: Any) -> list[str]:
    code = int(header["xyzt_units"]) & 7
    if code in (0, 2):
        return []
    if code in UNITS:
        return [f"its unit is {UNITS[code][0]}; converted to mm"]
    return [f"its unit has the code {code}, which does not exist; taken as mm"]


def _size_remarks(header: Any, affine: np.ndarray) -> list[str]:
    """Of pixdim, which the sform should agree with."""
    steps, stated = nib.affines.voxel_sizes(affine), np.abs(header["pixdim"][1:4].astype(np.float64))
    stated *= unit_in_mm(header)
    if np.isfinite(stated).all() and (np.abs(steps - stated) <= STEP_TOLERANCE * stated).all():
        return []
    return [f"its voxels are {_numbers(steps)} mm by the sform and {_numbers(stated)} mm by pixdim; the sform is used"]


def _form_remarks(by_sform: np.ndarray, by_qform: np.ndarray, shape: tuple[int, int, int]) -> list[str]:
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    places = [nib.affines.apply_affine(affine, corners) for affine in (by_sform, by_qform)]
    apart = float(np.linalg.norm(places[0] - places[1], axis=1).max())
    if apart <= 0.5 * nib.affines.voxel_sizes(by_sform).min():
        return []
    return [f"its sform and its qform place a corner {apart:.4g} mm apart; the sform is used"]


def _sign_remarks(header: Any) -> list[str]:
    if (header["pixdim"][1:4] > 0).all():
        return []
    return [f"its voxel sizes in pixdim are {_numbers(header['pixdim'][1:4])}; their signs are ignored"]


def _by_unit(header: Any) -> str:
    code = int(header["xyzt_units"]) & 7
    return f" (its unit is {UNITS[code][0]})" if code in UNITS else ""


def _numbers(values: np.ndarray) -> str:
    return " x ".join(f"{float(value):.5g}" for value in values)
