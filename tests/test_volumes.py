"""Reading NIfTI volumes, the way to the networks' grid and back, and the intensity recipes."""

import gzip
import re
import struct
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch

from grcsf_fast.data.volumes import (
    Preprocessing,
    VolumeError,
    axial_slices,
    blocks_on_grid,
    bounding_box,
    bytes_needed,
    like,
    load_volume,
    prepare,
    prepare_mask,
    resize,
    restore,
    save_on_grid,
    scaled_affine,
)

SHAPE = (12, 10, 9)
# Offsets in the 348 bytes of a NIfTI-1 header.
DIM, DATATYPE, QFORM_CODE, SROW_X = 40, 70, 252, 280


@pytest.fixture(autouse=True)
def one_thread():
    """Volumes this small lose more to waiting threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def noise():
    return np.random.default_rng(0).random(SHAPE, dtype=np.float32)


def save(path, data, affine=None):
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def patched(path, data, *changes):
    """A file whose header is changed byte by byte, past the checks of nibabel's setters."""
    save(path, data)
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


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_load_reads_data_affine_and_name(tmp_path, noise, suffix):
    affine = np.array([[0, -2, 0, 5], [3, 0, 0, -7], [0, 0, 1.5, 2], [0, 0, 0, 1.0]])
    path = save(tmp_path / f"a{suffix}", noise, affine)
    for source in (path, str(path)):
        volume = load_volume(source)
        assert volume.data.dtype == np.float32
        np.testing.assert_array_equal(volume.data, noise)
        np.testing.assert_allclose(volume.affine, affine)
        assert volume.name == str(path)


def test_load_takes_an_image_in_memory(noise):
    volume = load_volume(nib.Nifti1Image(noise, np.eye(4)))
    np.testing.assert_array_equal(volume.data, noise)
    assert volume.name == "<nibabel image>"


def test_load_applies_the_files_scaling(tmp_path):
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = nib.Nifti1Image(data, np.eye(4))
    image.header.set_slope_inter(2.0, -7.0)
    nib.save(image, tmp_path / "scaled.nii.gz")
    np.testing.assert_allclose(load_volume(tmp_path / "scaled.nii.gz").data, 2 * data - 7.0)


def test_missing_file(tmp_path):
    path = tmp_path / "nowhere.nii.gz"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{path}: expected a NIfTI file, found none")):
        load_volume(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("size", [0, 40, 4000])
def test_garbage(tmp_path, name, size):
    path = tmp_path / name
    path.write_bytes(np.random.default_rng(1).bytes(size))
    refused(path, "expected a NIfTI volume", "could not read it")


def test_gzip_of_something_else(tmp_path):
    path = tmp_path / "text.nii.gz"
    path.write_bytes(gzip.compress(b"patient list\n" * 200))
    refused(path, "expected a NIfTI volume", "could not read it")


def test_rotten_gzip_stream(tmp_path):
    """The magic number is right, the compressed stream is not: zlib.error, which is no OSError."""
    path = tmp_path / "rotten.nii.gz"
    path.write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff" + np.random.default_rng(0).bytes(2000))
    refused(path, "expected a NIfTI volume", "could not read it")


def test_unknown_data_type(tmp_path, noise):
    """nibabel's HeaderDataError derives from Exception alone."""
    path = patched(tmp_path / "type.nii", noise, (DATATYPE, "<h", 9999))
    refused(path, "expected a NIfTI volume", "9999")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9])
def test_truncated_gz(tmp_path, noise, share):
    path = save(tmp_path / "cut.nii.gz", noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path)


@pytest.mark.parametrize(("size", "parts"), [(200, ["could not read it"]), (352, ["1080 voxels", "found 0 bytes"])])
def test_truncated_nii_before_the_voxels(tmp_path, noise, size, parts):
    path = save(tmp_path / "cut.nii", noise)
    path.write_bytes(path.read_bytes()[:size])
    refused(path, *parts)


def test_truncated_nii_states_what_was_expected(tmp_path, noise):
    path = save(tmp_path / "cut.nii", noise)
    path.write_bytes(path.read_bytes()[:2352])
    refused(path, "expected 1080 voxels of 4320 bytes, found 2000 bytes")


def test_several_frames(tmp_path, noise):
    path = save(tmp_path / "frames.nii.gz", np.stack([noise, noise], -1))
    refused(path, "expected one 3-D volume", "(12, 10, 9, 2)")


def test_two_axes(tmp_path, noise):
    refused(save(tmp_path / "plane.nii.gz", noise[..., 0]), "expected one 3-D volume", "(12, 10)")


def test_one_frame_is_accepted(tmp_path, noise):
    volume = load_volume(save(tmp_path / "frame.nii.gz", noise[..., None]))
    assert volume.data.shape == SHAPE
    np.testing.assert_array_equal(volume.data, noise)


def test_empty_axis(noise):
    image = nib.Nifti1Image(noise[:, :0], np.eye(4))
    with pytest.raises(VolumeError, match=r"expected voxels, found an empty volume of shape \(12, 0, 9\)"):
        load_volume(image)


@pytest.mark.parametrize("value", [0, 41.5])
def test_constant(tmp_path, value):
    path = save(tmp_path / "flat.nii.gz", np.full(SHAPE, value, np.float32))
    refused(path, "expected an image", f"constant volume of value {value:g}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_few_bad_voxels_become_zero_with_a_warning(tmp_path, noise, value):
    noise.flat[:10] = value
    path = save(tmp_path / "bad.nii", noise)
    with pytest.warns(UserWarning, match=re.escape(f"{path}: 10 NaN or infinite voxels of 1080")):
        volume = load_volume(path)
    assert (volume.data.flat[:10] == 0).all()
    np.testing.assert_array_equal(volume.data.flat[10:], noise.flat[10:])


def test_many_bad_voxels(tmp_path, noise):
    """1 % of 1080 voxels are 10.8."""
    noise.flat[:11] = np.nan
    path = save(tmp_path / "bad.nii", noise)
    refused(path, "at most 1% NaN or infinite voxels", "found 11 of 1080", "(1.0%)")


def test_clean_volume_does_not_warn(tmp_path, noise):
    path = save(tmp_path / "clean.nii", noise)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_volume(path).data.shape == SHAPE


def test_zero_affine(tmp_path, noise):
    path = patched(tmp_path / "zero.nii", noise, (QFORM_CODE, "<2h", 0, 1), (SROW_X, "<12f", *[0.0] * 12))
    refused(path, "expected an invertible affine", "[[0.0, 0.0, 0.0, 0.0]")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_affine_that_is_not_finite(tmp_path, noise, value):
    path = patched(tmp_path / "nan.nii", noise, (QFORM_CODE, "<2h", 0, 1), (SROW_X + 12, "<f", value))
    refused(path, "expected a finite affine", str(value))


def test_image_without_affine(noise):
    with pytest.raises(VolumeError, match="expected a finite affine"):
        load_volume(nib.Nifti1Image(noise, None))


def test_analyze(tmp_path, noise):
    path = tmp_path / "old.img"
    nib.save(nib.AnalyzeImage(noise, np.eye(4)), path)
    refused(path, "expected a NIfTI volume", "ANALYZE 7.5")


def test_other_image_class(noise):
    with pytest.raises(VolumeError, match="a NIfTI image of nibabel, found MGHImage"):
        load_volume(nib.MGHImage(noise, np.eye(4)))


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


def centroid(mask, affine):
    return nib.affines.apply_affine(affine, np.argwhere(np.asarray(mask)).mean(0))


def dice(first, second):
    return 2 * (first & second).sum() / (first.sum() + second.sum())


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 6.5), (2.3, 1.1, 1.7)])
@pytest.mark.parametrize("degrees", [0, 15, 30])
@pytest.mark.parametrize("axcodes", ["RAS", "LAS", "LPS", "PSL", "ILA"])
def test_blob_goes_to_the_model_grid_and_back(axcodes, degrees, spacing):
    """A mask keeps its place in the world on the 2 mm grid, and comes back to the file's grid.

    Least Dice of the orientations and rotations: 0.966 at 1 mm, 0.969 at 2.3 x 1.1 x 1.7 mm, 0.974 at
    0.8 mm with slices of 6.5 mm.
    """
    image, blob = phantom(axcodes, degrees, spacing)
    volume = load_volume(image)
    prepared = prepare(volume, Preprocessing(spacing=(2.0, 2.0, 2.0)))
    assert nib.aff2axcodes(prepared.affine) == ("R", "A", "S")
    on_model_grid = prepare_mask(blob, prepared)
    assert on_model_grid.shape == prepared.data.shape
    assert on_model_grid.dtype == torch.bool

    where = centroid(blob, image.affine)
    there = centroid(on_model_grid, prepared.affine)
    back = restore(on_model_grid, prepared)
    assert back.shape == blob.shape
    assert back.dtype == np.float32
    mask = back >= 0.5
    off = np.linalg.inv(image.affine[:3, :3]) @ (centroid(mask, image.affine) - where)
    assert (np.abs(off) < 0.5).all(), f"{off} voxels"
    off = np.linalg.inv(prepared.affine[:3, :3]) @ (there - where)
    assert (np.abs(off) < 0.5).all(), f"{off} model voxels"
    assert dice(mask, blob) >= 0.9

    inside = prepared.data[on_model_grid].mean()
    assert inside < prepared.data[~on_model_grid & (prepared.data > 0)].mean() - 1


@pytest.mark.parametrize("axcodes", ["RAS", "PSL", "AIR"])
def test_prepare_is_exact_where_nothing_is_resampled(axcodes):
    """At the file's own spacing, voxels move but keep their values, and the affine says where each came from."""
    image, _ = phantom(axcodes, 15, (2.0, 2.0, 2.0))
    prepared = prepare(load_volume(image), Preprocessing(spacing=(2.0, 2.0, 2.0)))
    # Shifted, so that no voxel inside is 0 as all outside are.
    shift = 1 - float(prepared.data.min())
    back = restore(prepared.data + shift, prepared)
    voxels = np.argwhere(back > 0)
    world = nib.affines.apply_affine(image.affine, voxels)
    on_model_grid = nib.affines.apply_affine(np.linalg.inv(prepared.affine), world)
    np.testing.assert_allclose(on_model_grid, np.rint(on_model_grid), atol=1e-4)
    index = tuple(np.rint(on_model_grid).astype(int).T)
    np.testing.assert_array_equal((prepared.data + shift).numpy()[index], back[back > 0])
    assert len(voxels) == prepared.data.numel()


def test_restore_fills_outside_the_box():
    image, _ = phantom("RAS", 0, (2.0, 2.0, 2.0))
    prepared = prepare(load_volume(image), Preprocessing(spacing=(2.0, 2.0, 2.0)))
    back = restore(torch.ones(prepared.data.shape), prepared)
    assert (back == 1).sum() == prepared.data.numel()
    assert (back == 0).sum() == back.size - prepared.data.numel() > 0


@pytest.mark.parametrize("margin", [0, 2, 1000])
def test_the_box_holds_the_head_and_the_margin(margin):
    image, _ = phantom("RAS", 0, (2.0, 2.0, 2.0))
    prepared = prepare(load_volume(image), Preprocessing(spacing=(2.0, 2.0, 2.0), margin=margin))
    for axis, (part, size) in enumerate(zip(prepared.box, prepared.resampled_shape, strict=True)):
        expected = min(2 * HEAD_RADII[axis] / 2 + 2 * margin, size)
        # Planes at the poles hold under 1 % of head.
        assert abs(part.stop - part.start - expected) <= 4


def test_prepare_refuses_what_is_no_head():
    data = np.zeros((20, 20, 20), np.float32)
    data[3, 3, 3:6] = 1
    volume = load_volume(nib.Nifti1Image(data, np.diag([2, 2, 2, 1.0])))
    with pytest.raises(VolumeError, match="expected a head, found 3 voxels above the background"):
        prepare(volume, Preprocessing())


def test_prepare_refuses_a_head_of_one_intensity():
    data = np.zeros((20, 20, 20), np.float32)
    data[4:16, 4:16, 4:16] = 7
    volume = load_volume(nib.Nifti1Image(data, np.diag([2, 2, 2, 1.0])))
    with pytest.raises(VolumeError, match=r"expected a head, found one intensity \(7\)"):
        prepare(volume, Preprocessing())


@pytest.mark.parametrize("qform", [0, 1, 2])
@pytest.mark.parametrize("sform", [0, 1, 4])
def test_like_keeps_affine_codes_units_and_shape(tmp_path, noise, qform, sform):
    affine = np.eye(4)
    affine[:3, :3] = rotation(15) @ np.diag([2.0, 2.0, 3.0])
    affine[:3, 3] = [-20, 30, 4]
    image = nib.Nifti1Image(noise, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    image.header.set_xyzt_units("mm", "msec")
    nib.save(image, tmp_path / "in.nii.gz")
    volume = load_volume(tmp_path / "in.nii.gz")
    nib.save(like(np.ones(SHAPE, np.uint8), volume), tmp_path / "out.nii.gz")

    out = nib.load(tmp_path / "out.nii.gz")
    assert out.shape == SHAPE
    assert out.get_data_dtype() == np.uint8
    np.testing.assert_allclose(out.affine, volume.affine, atol=1e-5)
    # A file without any code would leave its affine unsaid: only then one is set.
    assert int(out.header["qform_code"]) == qform
    assert int(out.header["sform_code"]) == (sform if qform or sform else 1)
    assert out.header.get_xyzt_units() == ("mm", "msec")


def test_like_keeps_a_qform_of_its_own(tmp_path, noise):
    """Registered files say scanner space in the qform and standard space in the sform."""
    scanner = np.diag([2.0, 2.0, 3.0, 1.0])
    scanner[:3, 3] = [-9, 8, 7]
    standard = np.diag([2.0, 2.0, 3.0, 1.0])
    image = nib.Nifti1Image(noise, standard)
    image.set_sform(standard, 4)
    image.set_qform(scanner, 1)
    nib.save(image, tmp_path / "in.nii")
    nib.save(like(np.ones(SHAPE, np.uint8), load_volume(tmp_path / "in.nii")), tmp_path / "out.nii")
    out = nib.load(tmp_path / "out.nii")
    np.testing.assert_allclose(out.get_sform(), standard)
    np.testing.assert_allclose(out.get_qform(), scanner)


def ramp(size, axis):
    shape = [3, 3, 3]
    shape[axis] = size
    values = torch.arange(size, dtype=torch.float32)
    return values.view([-1 if other == axis else 1 for other in range(3)]).expand(shape)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        # Centres at 1, 3, 5, 7 (voxel edges count from 0), triangle of half width 2: at the border the weights
        # 3/4, 3/4, 1/4 of the values 0, 1, 2 divide by their sum.
        (8, 4, [5 / 7, 2.5, 4.5, 7 - 5 / 7]),
        # Half width 1: linear interpolation, the border value repeated.
        (4, 8, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]),
        # Centres at 1.5, 4.5, 7.5, half width 3; at the border 2/3, 1, 2/3, 1/3 of 0, 1, 2, 3.
        (9, 3, [5 / 4, 4, 8 - 5 / 4]),
    ],
)
def test_resize_of_a_ramp_by_hand(axis, size, target, expected):
    volume = ramp(size, axis)
    shape = [3, 3, 3]
    shape[axis] = target
    out = resize(volume, tuple(shape))
    assert tuple(out.shape) == tuple(shape)
    wanted = torch.tensor(expected).view([-1 if other == axis else 1 for other in range(3)]).expand(shape)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", [7, 11, 17, 24, 31, 53])
def test_a_ramp_stays_a_ramp_away_from_the_borders(target):
    """Voxel i of the new grid lies at (i + 1/2) * 24 / target - 1/2 of the old one.

    An even filter keeps a line only where its weights are symmetric; at ratios that are no integers they are not
    quite. Worst measured: 0.064 voxels at 24 -> 17.
    """
    out = resize(ramp(24, 1), (3, target, 3))[1, :, 1]
    expected = (torch.arange(target) + 0.5) * 24 / target - 0.5
    reach = max(1.0, 24 / target)
    inner = (expected > reach) & (expected < 23 - reach)
    assert inner.sum() >= 3
    torch.testing.assert_close(out[inner], expected[inner], atol=0.08, rtol=0)


@pytest.mark.parametrize(("target", "tolerance"), [((12, 16, 20), 1e-5), ((8, 32, 10), 1e-5), ((17, 23, 29), 0.01)])
def test_resize_keeps_the_mean(target, tolerance):
    """Exact for whole ratios; within 1 % for others. The border is 0, as its values count once more or less."""
    volume = torch.zeros(24, 32, 40)
    volume[6:18, 6:26, 6:34] = torch.rand(12, 20, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize(volume, target).mean(), volume.mean(), atol=0, rtol=tolerance)


def test_resize_to_the_same_shape_changes_nothing(noise):
    torch.testing.assert_close(resize(torch.from_numpy(noise), SHAPE), torch.from_numpy(noise), atol=0, rtol=0)
    assert resize(torch.ones(2, 3, 4, dtype=torch.int16), (2, 3, 4)).dtype == torch.float32


@pytest.mark.parametrize("target", [(1, 1, 1), (5, 1, 30), (40, 7, 2)])
def test_resize_of_a_constant(target):
    torch.testing.assert_close(resize(torch.full(SHAPE, 3.5), target), torch.full(target, 3.5))


def test_scaled_affine_keeps_the_corners():
    affine = np.eye(4)
    affine[:3, :3] = rotation(30) @ np.diag([1.0, 2.0, 3.0])
    affine[:3, 3] = [4, 5, 6]
    shape, target = (10, 11, 12), (7, 22, 5)
    scaled = scaled_affine(affine, shape, target)
    for corner in np.ndindex(2, 2, 2):
        old = nib.affines.apply_affine(affine, np.array(corner) * shape - 0.5)
        new = nib.affines.apply_affine(scaled, np.array(corner) * target - 0.5)
        np.testing.assert_allclose(new, old, atol=1e-9)


def box_volume(data):
    return load_volume(nib.Nifti1Image(data.astype(np.float32), np.diag([2, 2, 2, 1.0])))


def test_ct_is_cut_at_the_window():
    data = np.full((16, 16, 16), -1000.0)
    data[4:12, 4:12, 4:12] = np.random.default_rng(0).uniform(-400, 600, (8, 8, 8))
    data[5, 5, 5:10] = [-160, 240, 40, -500, 3000]
    prepared = prepare(box_volume(data), Preprocessing(modality="ct", margin=100))
    expected = (np.clip(data, -160, 240) + 160) / 400 * 2 - 1
    np.testing.assert_allclose(prepared.data.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(prepared.data[5, 5, 5:10].numpy(), [-1, 1, 0, -1, 1], atol=1e-6)


def test_ct_box_is_the_body():
    """Air is below -300 HU; one voxel of margin."""
    data = np.full((16, 16, 16), -1000.0)
    data[4:12, 5:12, 6:12] = 30
    prepared = prepare(box_volume(data), Preprocessing(modality="ct", margin=1, hu_window=(0.0, 80.0)))
    assert prepared.box == (slice(3, 13), slice(4, 13), slice(5, 13))
    assert prepared.data.min() == -1
    assert prepared.data.max() == pytest.approx(30 / 80 * 2 - 1)


def head_data():
    image, _ = phantom("RAS", 0, (2.0, 2.0, 2.0))
    rng = np.random.default_rng(0)
    data = image.get_fdata(dtype=np.float32)
    return data * rng.uniform(0.9, 1.1, data.shape) * 3 + rng.uniform(0, 2, data.shape), data > 0


def test_mri_is_a_z_score_of_the_head():
    data, head = head_data()
    prepared = prepare(box_volume(data), Preprocessing())
    inside = prepared.data[torch.from_numpy(head)[prepared.box]]
    assert float(inside.mean()) == pytest.approx(0, abs=0.02)
    assert float(inside.std()) == pytest.approx(1, abs=0.02)


def test_mri_cuts_the_brightest_voxels():
    """One voxel in ten thousand of a vessel or an artefact moves nothing."""
    data, _ = head_data()
    plain = prepare(box_volume(data), Preprocessing()).data
    data[23, 23, 20:30] = 1e5
    cut = prepare(box_volume(data), Preprocessing())
    assert float(cut.data.max()) == pytest.approx(float(plain.max()), abs=0.05)


@pytest.mark.parametrize("scale", [1e-3, 0.37, 4096.0])
def test_mri_does_not_depend_on_the_scale(scale):
    """Units of MRI are arbitrary, the zero is not: a positive offset changes the result, as air is told by it."""
    data, _ = head_data()
    plain = prepare(box_volume(data), Preprocessing())
    scaled = prepare(box_volume(data * scale), Preprocessing())
    assert scaled.box == plain.box
    torch.testing.assert_close(scaled.data, plain.data, atol=1e-4, rtol=1e-4)


def test_mri_takes_the_least_value_for_air_where_it_is_negative():
    """Undone: an offset that makes the darkest voxel negative, as files of unsigned data read as signed have."""
    data, _ = head_data()
    data -= data.min()
    plain = prepare(box_volume(data), Preprocessing())
    moved = prepare(box_volume(data - 500), Preprocessing())
    assert moved.box == plain.box
    torch.testing.assert_close(moved.data, plain.data, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "pet"}, "modality: expected 'mri' or 'ct', got 'pet'"),
        ({"spacing": (1.0, 1.0)}, "spacing: expected three numbers above 0 in mm, got (1.0, 1.0)"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing: expected three numbers above 0 in mm, got (1.0, 0.0, 1.0)"),
        ({"spacing": (1.0, float("nan"), 1.0)}, "spacing: expected three numbers above 0"),
        ({"percentiles": (99.0, 1.0)}, "percentiles: expected 0 <= lower < upper <= 100, got (99.0, 1.0)"),
        ({"percentiles": (-1.0, 50.0)}, "percentiles: expected 0 <= lower"),
        ({"percentiles": (1.0, 101.0)}, "percentiles: expected 0 <= lower"),
        ({"hu_window": (40.0, 40.0)}, "hu_window: expected lower < upper, got (40.0, 40.0)"),
    ],
)
def test_preprocessing_errors(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Preprocessing(**changes)


@pytest.mark.parametrize(("unit", "found", "factor"), [("meter", "metres", 1e3), ("micron", "micrometres", 1e-3)])
def test_other_units_than_millimetres_are_converted(noise, unit, found, factor):
    affine = np.array([[0, -2, 0, 5], [3, 0, 0, -7], [0, 0, 1.5, 2], [0, 0, 0, 1.0]])
    image = nib.Nifti1Image(noise, np.diag([1 / factor, 1 / factor, 1 / factor, 1]) @ affine)
    image.header.set_xyzt_units(unit)
    with pytest.warns(UserWarning, match=f"its unit is {found}; converted to mm"):
        volume = load_volume(image)
    np.testing.assert_allclose(volume.affine, affine)


def test_a_grid_that_no_memory_holds_is_refused(noise):
    volume = load_volume(nib.Nifti1Image(noise, np.diag([5e2, 5e2, 5e2, 1.0])))
    with pytest.raises(VolumeError, match="500"):
        prepare(volume, Preprocessing())


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "AIR"])
@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (0.7, 1.0, 2.0)])
def test_blocks_are_the_whole(tmp_path, monkeypatch, noise, axes, spacing):
    """Small blocks, whole volume and file hold the same numbers, on the file's grid; coarser and finer than it."""
    image = nib.Nifti1Image(noise, np.diag([2.0, 1.5, 1.0, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    prepared = prepare(load_volume(image.as_reoriented(turn)), Preprocessing(spacing, modality="ct"))
    values = torch.rand(prepared.data.shape)
    whole = restore(values, prepared)
    full = torch.zeros(prepared.resampled_shape)
    full[prepared.box] = values
    expected = nib.apply_orientation(resize(full, prepared.ras_shape).numpy(), prepared.orientation)
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    monkeypatch.setattr("grcsf_fast.data.volumes.BLOCK_BYTES", 1)
    blocks = list(blocks_on_grid(values, prepared))
    assert [start for start, _ in blocks] == list(range(whole.shape[2]))
    found = torch.cat([block for _, block in blocks]).numpy().transpose(2, 1, 0)
    np.testing.assert_allclose(found, whole, atol=1e-6)
    for name in ("one.nii.gz", "two.nii.gz"):
        save_on_grid(tmp_path / name, values, prepared)
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()
    written = nib.load(tmp_path / "one.nii.gz")
    assert written.get_data_dtype() == np.float32
    np.testing.assert_allclose(written.affine, prepared.volume.affine, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(written.dataobj), found)
    plane = axial_slices(values, prepared, [1])[0]
    source = nib.io_orientation(prepared.volume.affine)
    np.testing.assert_allclose(plane, nib.apply_orientation(whole, source)[:, :, 1], atol=1e-5)


def test_a_written_map_has_the_codes_of_its_input(tmp_path, noise):
    image = nib.Nifti1Image(noise, np.diag([2.0, 2.0, 2.0, 1.0]))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 4)
    image.header.set_xyzt_units("mm")
    prepared = prepare(load_volume(image), Preprocessing((2.0, 2.0, 2.0), modality="ct"))
    save_on_grid(tmp_path / "map.nii.gz", prepared.data, prepared)
    header = nib.load(tmp_path / "map.nii.gz").header
    assert (int(header["qform_code"]), int(header["sform_code"]), int(header["xyzt_units"])) == (1, 4, 2)
    assert header.get_slope_inter() in ((1.0, 0.0), (None, None))


def test_memory_is_estimated_from_the_header(tmp_path, noise):
    settings = Preprocessing((2.0, 2.0, 2.0))
    path = save(tmp_path / "small.nii.gz", noise)
    voxels = noise.size
    assert voxels * 16 < bytes_needed(path, settings) < voxels * 200
    assert bytes_needed(path, Preprocessing((0.5, 0.5, 0.5))) > 4 * bytes_needed(path, settings)
    (tmp_path / "text.nii").write_text("no header")
    assert bytes_needed(tmp_path / "text.nii", settings) == 0
    assert bytes_needed(tmp_path / "none.nii", settings) == 0


def test_bounding_box():
    values = np.zeros((5, 6, 7))
    assert bounding_box(values) is None
    values[1, 2:4, 6] = 1
    assert bounding_box(values) == (slice(1, 2), slice(2, 4), slice(6, 7))


@pytest.mark.parametrize(("claimed", "name"), [((512, 512, 512), "big.nii"), ((1024, 1024, 1024), "big.nii.gz")])
def test_a_header_cannot_claim_more_than_the_file_holds(tmp_path, noise, claimed, name):
    path = save(tmp_path / "small.nii", noise)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<4h", raw, DIM, 3, *claimed)
    target = tmp_path / name
    target.write_bytes(gzip.compress(bytes(raw)) if name.endswith("gz") else bytes(raw))
    refused(target, f"{np.prod(claimed)} voxels")


@pytest.mark.parametrize("value", [1e35, -1e35])
def test_intensities_beyond_float32(tmp_path, noise, value):
    data = noise.copy()
    data[0, 0, 0] = value
    refused(save(tmp_path / "huge.nii", data), "expected intensities within 1e+30")


def test_extensions_larger_than_any_are_not_read(tmp_path, noise):
    path = save(tmp_path / "a.nii", noise)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<f", raw, 108, 3e8)
    path.write_bytes(bytes(raw))
    refused(path, "bytes before the voxels")
