"""Which voxels of a file are lesion, what is no mask, grids of pairs, and masks on the networks' grid."""

import re
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import prepared_on

from grcsf_fast.data.masks import ANY_LABEL, Mask, check_grid, load_mask, load_numbers, mark_lesion
from grcsf_fast.data.volumes import VolumeError, prepare_mask

SHAPE = (8, 9, 7)
AFFINE = np.array([[-2, 0, 0, 20], [0, 2, 0, -30], [0, 0, 3, 5], [0, 0, 0, 1.0]])


def placed(values, dtype):
    """The values in a row of a volume of zeros, and where they are."""
    data = np.zeros(SHAPE, dtype)
    data[2, 1 : 1 + len(values), 3] = values
    return data


def save(path, data, affine=AFFINE, slope=None, units=None):
    image = nib.Nifti1Image(data, affine, dtype=data.dtype)
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    if units is not None:
        image.header.set_xyzt_units(units)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("label", [1, 2, 100])
def test_one_label_of_any_type(tmp_path, dtype, label):
    data = placed([label, 0, label], dtype)[..., None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = load_mask(save(tmp_path / "m.nii.gz", data))
    assert mask.voxels.dtype == bool
    np.testing.assert_array_equal(mask.voxels, data[..., 0] > 0)
    assert mask.labels == (label,)
    assert mask.shape == SHAPE
    assert mask.share == 2 / np.prod(SHAPE)
    np.testing.assert_allclose(mask.affine, AFFINE)


@pytest.mark.parametrize(
    ("values", "lesion", "labels"),
    [
        ([1, 1e-15, -1e-15, 1e-7, 0.9999999], [1, 0, 0, 0, 1], (1,)),  # dust, as resampling leaves it
        ([255, 1e-3, 0.2, 254.9], [1, 0, 0, 1], (255,)),
        ([255, 255], [1, 1], (255,)),
        ([0.75, 0.75, 1e-9], [1, 1, 0], (0.75,)),
        ([1 / 255, 1 / 255], [1, 1], (1 / 255,)),
        ([0.01, 0.01], [1, 1], (0.01,)),
        ([1 / 65535, 0], [1, 0], (1 / 65535,)),
        ([0.5, 0.5], [1, 1], (0.5,)),
        ([0, 0], [0, 0], ()),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_cut_is_at_half_of_the_label(values, lesion, labels, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        voxels, found = mark_lesion(placed(values, dtype), "m")
    np.testing.assert_array_equal(voxels, placed(lesion, bool))
    assert found == pytest.approx(labels)


def test_scaled_masks(tmp_path):
    """0 and 255 stored with a slope of 1/255, and 0 and 1 with one of 1/255."""
    for stored in (255, 1):
        mask = load_mask(save(tmp_path / "m.nii.gz", placed([stored, stored], np.uint8), slope=1 / 255))
        np.testing.assert_array_equal(mask.voxels, placed([1, 1], bool))
        assert mask.labels == pytest.approx((stored / 255,))


def test_bool_masks():
    voxels = placed([1], bool)
    assert mark_lesion(voxels, "m") == (voxels, (1.0,))
    assert mark_lesion(~voxels & voxels, "m")[1] == ()


@pytest.mark.parametrize(
    ("values", "lesion", "text"),
    [
        (
            [0.2, 0.49, 0.5, 0.7, 1],
            [0, 0, 1, 1, 1],
            r"a mask of 5 values from 0 to 1 (0.2, 0.49, 0.5, 0.7, 1) is cut at 0.5",
        ),
        ([0.1, 0.3], [0, 0], "a mask of 2 values from 0 to 1 (0.1, 0.3) is cut at 0.5"),
        ([1, 2, 3, 1e-9], [1, 1, 1, 0], "3 labels (1, 2, 3) are merged into one lesion mask"),
        ([1, 255], [1, 1], "2 labels (1, 255) are merged"),
        ([1e-9, 1e-12], [0, 0], "no value is above 1e-09, which is taken for 0"),
        *(
            ([value, value, 1e-9], [1, 1, 0], f"{value}, the only value beside 0, is taken for a label and counts")
            for value in (0.3, 0.25, 0.499, 0.0071)
        ),
    ],
)
def test_what_is_decided_is_said(tmp_path, values, lesion, text):
    path = save(tmp_path / "m.nii.gz", placed(values, np.float64))
    with pytest.warns(UserWarning, match=re.escape(f"{path}: {text}")):
        mask = load_mask(path)
    np.testing.assert_array_equal(mask.voxels, placed(lesion, bool))


def test_a_smoothed_cube_is_a_soft_mask():
    from scipy import ndimage

    cube = np.zeros((20, 20, 20))
    cube[7:13, 7:13, 7:13] = 1
    with pytest.warns(UserWarning, match=r"m: a mask of \d+ values from 0 to 1 \(.*\) is cut at 0\.5"):
        voxels, labels = mark_lesion(ndimage.uniform_filter(cube, 3), "m")
    # A face's voxel has two thirds of its cube of 27 inside, an edge's 12 of 27, a corner's 8.
    expected = cube.astype(bool)
    for axis in range(3):
        for other in range(axis):
            edges = [slice(None)] * 3
            edges[axis], edges[other] = slice(7, 13, 5), slice(7, 13, 5)
            expected[tuple(edges)] = False
    np.testing.assert_array_equal(voxels, expected)
    assert labels == (1.0,)


def head(rng, scale=1.0):
    image = np.zeros((16, 16, 16))
    image[3:13, 3:13, 3:13] = np.clip(rng.normal(0.5, 0.15, (10, 10, 10)), 0.01, 1) * scale
    return image


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (lambda rng: head(rng), "expected a mask of whole numbers or of values from 0 to 1"),
        (lambda rng: head(rng, 700.0), "expected a mask of whole numbers or of values from 0 to 1"),
        (lambda rng: rng.random((6, 6, 6)), "found 216 values as in an image"),
        (lambda rng: head(rng, 700).astype(np.int16), "expected a mask of at most 32 labels, found "),
        (lambda rng: head(rng, 255).astype(np.uint8), "expected a mask of at most 32 labels, found "),
        (lambda rng: rng.normal(size=(6, 6, 6)), "expected a mask, found negative values: -"),
        (lambda rng: placed([0, -1, 1], np.int16), "expected a mask, found negative values: -1, 1"),
        (lambda rng: placed([-1000, -1000], np.float32), "expected a mask, found negative values: -1000"),
        (lambda rng: placed([1, np.nan], np.float32), "expected a mask of finite values, found 1 NaN or infinite ones"),
        (lambda rng: placed([1, np.inf], np.float64), "expected a mask of finite values, found 1 NaN or infinite ones"),
        (lambda rng: placed([0.5, 1.7, 2.5], np.float32), "found 3 values as in an image: 0.5, 1.7, 2.5"),
        (lambda rng: placed([1j], np.complex64), "complex numbers"),
        (lambda rng: np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), "several channels such as RGB"),
        (lambda rng: np.full(SHAPE, "1"), "expected a mask of integers or floating-point numbers"),
    ],
)
def test_what_is_no_mask_is_refused_by_its_values(values, text):
    with pytest.raises(VolumeError, match="^m: .*" + re.escape(text)):
        mark_lesion(values(np.random.default_rng(0)), "m")


def test_colours_and_complex_numbers_in_files_are_refused_by_name(tmp_path):
    for dtype in (np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]):
        path = save(tmp_path / "m.nii.gz", np.zeros(SHAPE, dtype))
        with pytest.raises(VolumeError, match=re.escape(str(path))):
            load_mask(path)


def test_files_that_are_no_mask(tmp_path):
    path = tmp_path / "m.nii.gz"
    path.write_bytes(b"garbage")
    with pytest.raises(VolumeError, match=re.escape(f"{path}: expected a NIfTI")):
        load_mask(path)
    save(path, np.zeros((3, 4, 5, 2), np.uint8))
    with pytest.raises(VolumeError, match=re.escape(str(path)) + r".*\(3, 4, 5, 2\)"):
        load_mask(path)
    whole = save(path, placed([1], np.uint8)).read_bytes()
    for cut in (whole[:60], whole[:-9], whole[:-8] + bytes(8)):  # the last: another checksum
        path.write_bytes(cut)
        with pytest.raises(VolumeError, match=re.escape(str(path))):
            load_mask(path)
    with pytest.raises(FileNotFoundError, match="nobody"):
        load_mask(tmp_path / "nobody.nii")


@pytest.mark.filterwarnings("ignore:.*its unit is")
@pytest.mark.parametrize(("unit", "factor"), [("micron", 1e-3), ("meter", 1e3), ("mm", 1)])
def test_affines_are_in_millimetres(tmp_path, unit, factor):
    scaled = AFFINE.copy()
    scaled[:3] /= factor
    mask = load_mask(save(tmp_path / "m.nii.gz", placed([1], np.uint8), scaled, units=unit))
    np.testing.assert_allclose(mask.affine, AFFINE, rtol=1e-6)


def test_a_mask_is_not_its_image(tmp_path):
    path = save(tmp_path / "m.nii.gz", placed([1, 1], np.uint8))
    with pytest.raises(VolumeError, match=r"m\.nii\.gz: expected a mask, found the voxels of the image i\.nii itself"):
        load_mask(path, placed([1, 1], np.float32), "i.nii")
    assert load_mask(path, placed([1, 2], np.float32)).labels == (1,)


def mask_of(affine, shape=SHAPE):
    return Mask(np.zeros(shape, bool), affine, "m.nii", ())


def test_grids_within_a_tenth_of_a_voxel_are_one():
    for step, allowed in ((0.19, True), (0.21, False)):
        moved = AFFINE.copy()
        moved[0, 3] += step
        if allowed:
            check_grid(mask_of(moved), "i.nii", SHAPE, AFFINE)
            continue
        text = (
            "m.nii: expected the grid of i.nii (8, 9, 7), found shape (8, 9, 7) and corners up to 0.21 mm from that "
            "grid's, where 0.2 mm are allowed"
        )
        with pytest.raises(VolumeError, match=re.escape(text)):
            check_grid(mask_of(moved), "i.nii", SHAPE, AFFINE)


def test_corners_count_and_not_the_origin_alone():
    """A scale of 1.5 % more moves the corner at the origin by 0.015 mm and the one 17 mm further by 0.255 mm."""
    scaled = AFFINE.copy()
    scaled[1, 1] *= 1.015
    with pytest.raises(VolumeError, match=r"corners up to 0\.255 mm"):
        check_grid(mask_of(scaled), "i.nii", SHAPE, AFFINE)
    with pytest.raises(VolumeError, match=r"found shape \(8, 9, 6\)"):
        check_grid(mask_of(AFFINE, (8, 9, 6)), "i.nii", SHAPE, AFFINE)
    with pytest.raises(VolumeError, match="nan mm"):
        check_grid(mask_of(AFFINE * np.nan), "i.nii", SHAPE, AFFINE)


def test_masks_with_different_numbers_at_one_voxel_are_refused(tmp_path):
    """The evaluation would count such a voxel to both labels, the training to one."""
    first, second = (tmp_path / f"{name}.nii.gz" for name in "ab")
    save(first, placed([1, 1, 2, 0, 0], np.uint8))
    save(second, placed([0, 1, 2, 3, 1], np.uint8))
    joined = load_numbers([first, second], None, "its image", range(1, 4))
    assert joined.voxels[2, 1:6, 3].tolist() == [1, 1, 2, 3, 1]
    save(second, placed([2, 3, 2, 3, 1], np.uint8))
    message = f"{second}: expected the label that the case's other masks, the first of them {first}, give a voxel, "
    with pytest.raises(VolumeError, match=re.escape(f"{message}found another at 2 voxels")):
        load_numbers([first, second], None, "its image", range(1, 4))
    # A label that does not count is none.
    assert load_numbers([first, second], None, "its image", [1]).voxels[2, 1:6, 3].tolist() == [1, 1, 0, 0, 1]


def covered_by_counting(mask, target):
    """At least half of each voxel, by cutting both grids into their common pieces."""
    for axis, size in enumerate(target):
        mask = np.repeat(mask, size, axis)
    old = mask.shape
    pieces = mask.reshape([n for size, whole in zip(target, old, strict=True) for n in (size, whole // size)])
    return 2 * pieces.sum((1, 3, 5)) >= np.prod(pieces.shape[1::2])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_half_covered_voxels_are_lesion(data):
    """Any ratio of sizes, larger and smaller, any orientation, masks dense and sparse."""
    shape = data.draw(st.tuples(*[st.integers(1, 7)] * 3), "shape")
    target = data.draw(st.tuples(*[st.integers(1, 7)] * 3), "target")
    orientation = data.draw(st.sampled_from(["RAS", "LPS", "PSL", "AIR", "ILA"]), "orientation")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), "seed"))
    ras = rng.random(shape) < data.draw(st.sampled_from([0.1, 0.5, 0.7]), "share")
    prepared = prepared_on(shape, target, orientation)
    mask = nib.apply_orientation(ras, prepared.orientation)
    lesion = prepare_mask(mask, prepared)
    assert lesion.dtype == torch.bool
    np.testing.assert_array_equal(lesion.numpy(), covered_by_counting(ras, target))


@pytest.mark.parametrize("value", [1, 255, 0.25])
def test_a_lesion_of_exactly_one_voxel_stays(value):
    """The antialiased filter spread it over its neighbours, under half in each."""
    mask = np.zeros((12, 12, 12))
    mask[4:6, 6:8, 2:4] = value
    lesion = prepare_mask(mask, prepared_on((12, 12, 12), (6, 6, 6)))
    assert lesion.nonzero().tolist() == [[2, 3, 1]]
    mask[4:6, 6:8, 3] = 0  # half of it
    assert prepare_mask(mask, prepared_on((12, 12, 12), (6, 6, 6))).nonzero().tolist() == [[2, 3, 1]]
    mask[4, 6, 2] = 0
    assert not prepare_mask(mask, prepared_on((12, 12, 12), (6, 6, 6))).any()


def test_whole_numbers_stay_exact_on_large_grids():
    """Half of so many voxels is no number of float32, which would round it down."""
    shape = (330, 333, 333)
    half = 330 * 333 * 333 // 2
    assert int(np.float32(half)) < half
    mask = np.zeros(2 * half, bool)
    mask[:half] = True
    assert prepare_mask(mask.reshape(shape), prepared_on(shape, (1, 1, 1))).tolist() == [[[True]]]
    mask[0] = False
    assert prepare_mask(mask.reshape(shape), prepared_on(shape, (1, 1, 1))).tolist() == [[[False]]]


def test_the_box_is_cut_out_and_other_shapes_are_refused():
    mask = np.zeros((4, 4, 4), bool)
    mask[2:, 2:, 2:] = True
    box = (slice(1, 2), slice(0, 2), slice(1, 2))
    assert prepare_mask(mask, prepared_on((4, 4, 4), (2, 2, 2), box=box)).tolist() == [[[False], [True]]]
    with pytest.raises(ValueError, match=r"mask: expected the shape of v, got \(4, 4, 3\)"):
        prepare_mask(mask[:, :, :3], prepared_on((4, 4, 4), (2, 2, 2)))


def test_numbers_beyond_a_byte(tmp_path):
    for values in ([1000, 1000], [1, 1000]):
        path = save(tmp_path / "m.nii.gz", placed(values, np.int32))
        with pytest.raises(VolumeError, match=r"expected labels from 1 to 255, found 1000"):
            load_numbers([path], None, "", ANY_LABEL)
    # A single value that is no whole number stands for 1.
    path = save(tmp_path / "m.nii.gz", placed([1, 1], np.uint8), slope=1 / 255)
    assert set(np.unique(load_numbers([path], None, "", ANY_LABEL).voxels)) == {0, 1}
