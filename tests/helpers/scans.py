"""Volumes and files that tests of reading, geometry, intensities and the way back share."""

import struct

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.data.volumes import Prepared, Volume, VolumeError, load_volume

SHAPE = (12, 10, 9)
# Offsets in the 348 bytes of a NIfTI-1 header.
DIM, DATATYPE, PIXDIM, SLOPE, UNITS, QFORM_CODE, QUATERN, SROW_X = 40, 70, 76, 112, 123, 252, 256, 280


def noise_volume():
    return np.random.default_rng(0).random(SHAPE, dtype=np.float32)


def save(path, data, affine=None):
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def patched(path, data, *changes):
    """A file of an array or image whose header is changed byte by byte, past the checks of nibabel's setters."""
    if isinstance(data, np.ndarray):
        save(path, data)
    else:
        nib.save(data, path)
    content = bytearray(path.read_bytes())
    for offset, layout, *values in changes:
        struct.pack_into(layout, content, offset, *values)
    path.write_bytes(content)
    return path


def refused(path, *parts):
    """The volume is refused, and the message names the file and holds each of ``parts``."""
    with pytest.raises(VolumeError) as caught:
        load_volume(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected "), message
    for part in parts:
        assert part in message


CENTRE = np.array([5.0, -12.0, 20.0])  # of the head, world mm
HEAD_RADII = np.array([34.0, 40.0, 36.0])
BLOB_CENTRE = CENTRE + np.array([10.0, -12.0, 8.0])
BLOB_RADII = np.array([17.0, 14.0, 15.0])
FIELD_OF_VIEW = 92.0  # mm, every axis


def rotation(degrees):
    """Rotation about an axis between all three of the coordinate axes."""
    x, y, z = np.array([1.0, -2.0, 3.0]) / np.sqrt(14)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def phantom(axcodes, degrees, spacing):
    """A head with a dark blob, both placed in world mm: the NIfTI image and the blob's mask on its grid."""
    directions = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(axcodes), (1, 1, 1))[:3, :3].T
    shape = tuple(int(np.ceil(FIELD_OF_VIEW / step)) for step in spacing)
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) @ directions @ np.diag(spacing)
    affine[:3, 3] = CENTRE - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    assert nib.aff2axcodes(affine) == tuple(axcodes)
    i, j, k = np.ogrid[tuple(slice(0, n) for n in shape)]
    world = [row[0] * i + row[1] * j + row[2] * k + row[3] for row in affine[:3]]
    head = sum(((x - c) / r) ** 2 for x, c, r in zip(world, CENTRE, HEAD_RADII, strict=True)) <= 1
    blob = sum(((x - c) / r) ** 2 for x, c, r in zip(world, BLOB_CENTRE, BLOB_RADII, strict=True)) <= 1
    data = head * (100 + 0.2 * (world[1] - CENTRE[1])) - 50 * blob
    return nib.Nifti1Image(data.astype(np.float32), affine), blob


def box_volume(data):
    return load_volume(nib.Nifti1Image(data.astype(np.float32), np.diag([2, 2, 2, 1.0])))


def head_data():
    image, _ = phantom("RAS", 0, (2.0, 2.0, 2.0))
    rng = np.random.default_rng(0)
    data = image.get_fdata(dtype=np.float32)
    return data * rng.uniform(0.9, 1.1, data.shape) * 3 + rng.uniform(0, 2, data.shape), data > 0


def prepared_on(shape, target, orientation="RAS", box=None):
    """What prepare_mask and prepare_numbers need of a volume: its grids, given the shape and target in RAS."""
    codes = nib.orientations.axcodes2ornt(orientation)
    places = codes[:, 0].astype(int)
    affine = np.eye(4)
    for axis, (place, sign) in enumerate(codes):
        affine[:3, axis] = 0
        affine[int(place), axis] = sign
    file_shape = tuple(shape[place] for place in places)
    volume = Volume(np.broadcast_to(np.float32(0), file_shape), affine, None, "v")
    box = box or tuple(slice(0, size) for size in target)
    return Prepared(None, None, box, shape, target, nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), codes), affine, volume)  # fmt: skip
