"""The way of a volume to the networks' grid and back."""

import gzip

import nibabel as nib
import numpy as np
import pytest
import torch
from scans import HEAD_RADII, SHAPE, phantom, rotation

from grcsf_fast.data.resampling import resampling, resampling_matrix
from grcsf_fast.data.volumes import (
    Preprocessing,
    Volume,
    VolumeError,
    axial_slices,
    blocks_on_grid,
    bounding_box,
    like,
    load_volume,
    prepare,
    prepare_mask,
    resize,
    restore,
    save_on_grid,
    scaled_affine,
)
from grcsf_fast.errors import ArgumentTypeError


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


def test_a_grid_that_no_memory_holds_is_refused(noise):
    volume = load_volume(nib.Nifti1Image(noise, np.diag([5e2, 5e2, 5e2, 1.0])))
    with pytest.raises(VolumeError, match="500"):
        prepare(volume, Preprocessing())


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "AIR"])
@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (0.7, 1.0, 2.0)])
def test_blocks_are_the_whole(tmp_path, monkeypatch, noise, axes, spacing):
    """Small blocks, whole volume and file hold the same numbers, on the file's grid; coarser and finer than it."""
    image = nib.Nifti1Image(400 * noise - 300, np.diag([2.0, 1.5, 1.0, 1.0]))
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
    # nibabel forgets both when it loads a file.
    header = nib.Nifti1Header(gzip.decompress((tmp_path / "one.nii.gz").read_bytes())[:348])
    assert (header["scl_slope"], header["scl_inter"]) == (1, 0)
    written = nib.load(tmp_path / "one.nii.gz")
    assert written.get_data_dtype() == np.float32
    np.testing.assert_allclose(written.affine, prepared.volume.affine, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(written.dataobj), found)
    plane = axial_slices(values, prepared, [1])[0]
    source = nib.io_orientation(prepared.volume.affine)
    np.testing.assert_allclose(plane, nib.apply_orientation(whole, source)[:, :, 1], atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*its unit is")
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("unit", "factor"), [("mm", 1.0), ("micron", 1e3), ("meter", 1e-3)])
def test_what_is_made_like_a_volume_lies_where_it_lies(tmp_path, noise, unit, factor, moved):
    """In its unit, by its header or, where an image in memory was moved, by its affine."""
    affine = nib.affines.from_matvec(factor * rotation(20) @ np.diag([2.0, 2.0, 3.0]), factor * np.array([7, -8, 9]))
    image = nib.Nifti1Image(noise, affine)
    image.header.set_xyzt_units(unit)
    if moved:
        image.affine[:3, 3] += factor * np.array([30, 20, -10])
    volume = load_volume(image)
    made = like(noise, volume)
    nib.save(made, tmp_path / "made.nii")
    for one in (made, nib.load(tmp_path / "made.nii")):
        np.testing.assert_allclose(one.affine, image.affine, rtol=1e-5, atol=1e-5 * factor)
    np.testing.assert_allclose(load_volume(tmp_path / "made.nii").affine, volume.affine, atol=1e-4)


def test_bounding_box():
    values = np.zeros((5, 6, 7))
    assert bounding_box(values) is None
    values[1, 2:4, 6] = 1
    assert bounding_box(values) == (slice(1, 2), slice(2, 4), slice(6, 7))


@pytest.fixture
def restored_defaults():
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


@pytest.mark.parametrize("modality", ["mri", "ct"])
@pytest.mark.parametrize("spacing", [2.0, 3.0])
def test_defaults_of_torch_change_nothing(tmp_path, restored_defaults, modality, spacing):
    """float64 by default, and new tensors on a device that holds no numbers."""
    image, blob = phantom("PSL", 15, (2.0, 2.0, 2.0))
    if modality == "ct":
        image = nib.Nifti1Image(image.get_fdata() * 10 - 1000, image.affine)
    preprocessing = Preprocessing((spacing, spacing, spacing), modality=modality)

    def everything():
        resampling.cache_clear()
        resampling_matrix.cache_clear()
        prepared = prepare(load_volume(image), preprocessing)
        save_on_grid(tmp_path / "map.nii.gz", prepared.data, prepared)
        mask = prepare_mask(blob, prepared)
        slices = np.stack(axial_slices(prepared.data, prepared, [3, 20]))
        return (
            prepared.data,
            prepared.foreground,
            mask,
            restore(prepared.data, prepared),
            slices,
            nib.load(tmp_path / "map.nii.gz").get_fdata(dtype=np.float32),
        )

    expected = everything()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    found = everything()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    resampling.cache_clear()
    resampling_matrix.cache_clear()


def test_what_is_no_volume():
    """A path, above all, and the two the other way round."""
    said = "^volume: expected a Volume, got str; load_volume reads one from a file"
    with pytest.raises(ArgumentTypeError, match=said):
        prepare("scan.nii.gz", Preprocessing())
    volume = Volume(np.ones((4, 4, 4), np.float32), np.eye(4), None, "x")
    with pytest.raises(ArgumentTypeError, match=r"^preprocessing: expected a Preprocessing, got dict$"):
        prepare(volume, {"spacing": (1, 1, 1)})
