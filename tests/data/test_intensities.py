"""Intensities: damage, background and outliers, and the recipes of both modalities."""

import math
import re
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from scans import SHAPE, box_volume, head_data, refused, save

from grcsf_fast.data.intensities import SAMPLE, Intensities, _fill, _limits, _sample, without_outliers
from grcsf_fast.data.volumes import Preprocessing, VolumeError, load_volume, prepare
from grcsf_fast.errors import ArgumentError


@pytest.mark.parametrize("value", [0, 41.5])
def test_constant(tmp_path, value):
    path = save(tmp_path / "flat.nii.gz", np.full(SHAPE, value, np.float32))
    refused(path, "expected an image", f"constant volume of value {value:g}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_few_bad_voxels_get_the_median_of_their_neighbours(tmp_path, noise, value):
    given = noise.copy()
    given[5, 5, 5] = given[0, 0, 0] = given[0, 0, 1] = value
    path = save(tmp_path / "bad.nii", given)
    with pytest.warns(UserWarning, match=re.escape(f"{path}: 3 NaN or infinite voxels of 1080 got the median")):
        volume = load_volume(path)
    assert volume.data[5, 5, 5] == pytest.approx(np.median(np.delete(noise[4:7, 4:7, 4:7], 13)))
    assert volume.data[0, 0, 0] == pytest.approx(np.median(np.delete(noise[:2, :2, :2], [0, 1])))
    sound = np.isfinite(given)
    np.testing.assert_array_equal(volume.data[sound], noise[sound])


def test_a_damaged_region_is_filled_from_its_rim():
    data = np.full((9, 9, 9), 4, np.float32)
    data[:, :, 0] = 3
    bad = np.zeros((9, 9, 9), bool)
    bad[2:7, 2:7, 2:7] = True
    data[bad] = np.nan
    _fill(data, bad)
    assert not bad.any()
    np.testing.assert_array_equal(data[:, :, 1:], 4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_many_bad_voxels(tmp_path, noise, value):
    """1 % of 1080 voxels are 10.8."""
    noise[1:11:2, 1:9:3, 4] = value
    path = save(tmp_path / "bad.nii", noise)
    refused(path, "at most 1% NaN or infinite voxels", "found 15 of 1080", "(1.4%)")


def head_of_nan():
    """A phantom as SPM writes it: NaN outside the head, and the same with 0."""
    data, head = head_data()
    data = np.where(head, data, 0).astype(np.float32)
    return np.where(head, data, np.float32(np.nan)), data


def test_nan_around_a_head_is_background(tmp_path):
    given, expected = head_of_nan()
    share = np.isnan(given).mean()
    assert share > 0.6
    affine = np.diag([2, 2, 2, 1.0])
    path = save(tmp_path / "spm.nii.gz", given, affine)
    with pytest.warns(UserWarning, match=re.escape(f"{path}: {np.isnan(given).sum()} NaN voxels of {given.size}")):
        volume = load_volume(path)
    np.testing.assert_array_equal(volume.data, expected)
    plain = prepare(box_volume(expected), Preprocessing())
    torch.testing.assert_close(prepare(volume, Preprocessing()).data, plain.data)


def test_nan_beside_the_air_of_a_head_that_was_turned_in_its_box():
    data, _ = head_data()
    data = data.astype(np.float32)
    given = data.copy()
    i, j, _ = np.indices(data.shape)
    wedge = i + j < 16
    given[wedge] = np.nan
    assert wedge.mean() > 0.05
    with pytest.warns(UserWarning, match=f"{wedge.sum()} NaN voxels of {data.size} around the head"):
        volume = box_volume(given)
    np.testing.assert_array_equal(volume.data, np.where(wedge, 0, data))


def test_nan_around_a_ct_is_air():
    """0 would be water."""
    given, _ = head_of_nan()
    given = np.where(np.isnan(given), given, given - 1000)
    given[18:28, 18:28, 18:28] = -1000
    with pytest.warns(UserWarning, match=r"around the head were taken as background \(-1000\)"):
        volume = box_volume(given)
    np.testing.assert_array_equal(volume.data, np.where(np.isnan(given), -1000, given))


def test_holes_in_a_head_beside_its_background():
    given, expected = head_of_nan()
    given[23, 23, 20:24] = np.nan
    with pytest.warns(UserWarning, match="; 4 NaN or infinite voxels of 97336 got the median of their neighbours"):
        volume = box_volume(given)
    changed = volume.data != expected
    assert 0 < changed.sum() <= 4
    assert volume.data[changed] == pytest.approx(expected[changed], rel=0.2)


def missing_slices(data):
    data[:, :, 15:30:10] = np.nan


def scattered(data):
    data[np.random.default_rng(0).random(data.shape) < 0.5] = np.nan


def hole(data):
    data[15:30, 15:30, 15:30] = np.nan


def end_of_the_head(data):
    """As if the last slices were lost."""
    data[np.isnan(data)] = 0
    data[:, :, 25:] = np.nan


def infinite(data):
    data[np.isnan(data)] = np.inf


@pytest.mark.parametrize("damage", [missing_slices, scattered, hole, end_of_the_head, infinite])
def test_other_nan_than_around_a_head_is_refused(tmp_path, damage):
    given, _ = head_of_nan()
    damage(given)
    refused(save(tmp_path / "bad.nii", given), "at most 1% NaN or infinite voxels beside a background")


def test_nothing_but_nan(tmp_path):
    path = save(tmp_path / "nan.nii", np.full(SHAPE, np.nan, np.float32))
    refused(path, "found nothing but NaN or infinite voxels")


OUTLIERS = {
    "one of 1e9": lambda data: data.flat.__setitem__([40000], 1e9),
    "one of -1e9": lambda data: data.flat.__setitem__([40000], -1e9),
    "one of 1e35": lambda data: data.flat.__setitem__([40000], 1e35),
    "one at a corner": lambda data: data.flat.__setitem__([0], 1e9),
    "one in the lesion": lambda data: data.__setitem__((30, 20, 28), 1e9),
    "a few of both signs": lambda data: data.flat.__setitem__([100, 30000, 50000], [-1e6, 3e7, 2e9]),
    "a line": lambda data: data.__setitem__((slice(None), 23, 23), 65535),
}


@pytest.mark.parametrize("spacing", [1.0, 2.0])
@pytest.mark.parametrize("damage", OUTLIERS.values(), ids=OUTLIERS)
def test_outliers_change_nothing_but_their_place(damage, spacing):
    """Normalised values are within 1e-3 of those without; at the outlier, by as much as its neighbours differ."""
    data, _ = head_data()
    data = data.astype(np.float32)
    preprocessing = Preprocessing((2.0, 2.0, 2.0))
    affine = np.diag([spacing, spacing, spacing, 1])
    plain = prepare(load_volume(nib.Nifti1Image(data, affine)), preprocessing)
    given = data.copy()
    damage(given)
    where = given != data
    with pytest.warns(UserWarning, match=f"{where.sum()} voxels of {data.size}, from .* far outside of all others"):
        prepared = prepare(load_volume(nib.Nifti1Image(given, affine)), preprocessing)
    assert prepared.box == plain.box
    off = (prepared.data - plain.data).abs()
    assert (off > 1e-3).sum() <= 27 * where.sum()
    assert off.max() < 1
    assert float(off.flatten().quantile(0.95)) < 1e-3


@pytest.mark.parametrize("share", [0.001, 0.01, 0.013])
@pytest.mark.parametrize("stripped", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_scattered_outliers_leave_the_statistics(share, stripped, sign):
    data, head = head_data()
    data = np.where(head, data, 0 if stripped else data).astype(np.float32)
    plain = prepare(box_volume(data), Preprocessing())
    rng = np.random.default_rng(1)
    given = data.copy()
    where = rng.random(data.shape) < share
    given[where] = sign * rng.uniform(32767, 1e9, where.sum())
    with pytest.warns(UserWarning, match=f"{where.sum()} voxels of {data.size}"):
        prepared = prepare(box_volume(given), Preprocessing())
    assert prepared.box == plain.box
    off = (prepared.data - plain.data).abs()[torch.from_numpy(~where)[prepared.box]]
    assert float(off.mean()) < 4e-3  # worst measured 2.7e-3: voxels at the head's rim move the spread a little
    assert int((prepared.data < -2).sum()) == pytest.approx(int((plain.data < -2).sum()), rel=0.02)


def test_limits_do_not_depend_on_how_a_volume_lies_in_memory():
    values = np.random.default_rng(0).gamma(2, 100, (40, 40, 41)).astype(np.float32)
    assert values.size > SAMPLE
    ways = [values, np.asfortranarray(values), np.ascontiguousarray(values[::-1, :, ::-1])[::-1, :, ::-1]]
    assert len({_limits(_sample(one)) for one in ways}) == 1


def test_what_is_no_outlier_stays_as_it_is():
    """Vessels of five times the tissue, metal of ten, a small head in a large field of view, noise in the air."""
    data, head = head_data()
    data[20:22, 20:22, 10:30] *= 5
    data[25, 25, 20:24] *= 10
    small = np.random.default_rng(0).uniform(0, 3, (100, 100, 100))
    small[:46, :46, :46] = data
    stripped = np.zeros((120, 120, 120))
    stripped[40:86, 40:86, 40:86] = np.where(head, data, 0)
    negative = data - 32768
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (data, small, stripped, negative, data * 1e-4):
            given = values.astype(np.float32)
            assert without_outliers(given, Preprocessing(), "a")[0] is given


def ct_head() -> np.ndarray:
    data = np.full((24, 24, 24), -1000, np.float32)
    data[4:20, 4:20, 4:20] = np.random.default_rng(0).uniform(0, 80, (16, 16, 16))
    return data


def test_ct_outliers_do_not_smear():
    preprocessing = Preprocessing(modality="ct", hu_window=(0.0, 80.0))
    affine, given = np.eye(4), ct_head()
    plain = prepare(load_volume(nib.Nifti1Image(given, affine)), preprocessing)
    given[10, 10, 10], given[12, 12, 12] = 1e9, -1e9
    with pytest.warns(UserWarning, match="2 voxels of 13824, from -1e\\+09 to 1e\\+09"):
        prepared = prepare(load_volume(nib.Nifti1Image(given, affine)), preprocessing)
    assert float((prepared.data - plain.data).abs().max()) < 0.2
    given[10, 10, 10], given[12, 12, 12] = 30000, -3024  # metal, and outside of the scanner's circle
    assert without_outliers(given, preprocessing, "a")[0] is given


def test_ct_padding_below_all_units_becomes_air():
    preprocessing = Preprocessing(modality="ct", hu_window=(0.0, 80.0))
    affine, given = np.eye(4), ct_head()
    plain = prepare(load_volume(nib.Nifti1Image(given, affine)), preprocessing)
    given[:3] = -33792
    with pytest.warns(UserWarning, match="became air"):
        prepared = prepare(load_volume(nib.Nifti1Image(given, affine)), preprocessing)
    assert torch.equal(prepared.data, plain.data)
    given[10, 10, 10] = 1e9  # beside the padding an outlier, which is still one
    found, remarks = without_outliers(given, preprocessing, "a")
    assert 0 <= found[10, 10, 10] <= 80
    assert "became air" in remarks[-2]
    assert remarks[-1].startswith("1 voxels of 13824, from 1e+09")
    for wrong in (np.full((9, 9, 9), 1e6, np.float32), np.full((9, 9, 9), -1e6, np.float32)):
        with pytest.raises(VolumeError, match="a: expected a CT in Hounsfield units"):
            without_outliers(wrong, preprocessing, "a")


def test_mri_of_small_units():
    """Such as diffusivities in square metres a second."""
    data = np.zeros((24, 24, 24), np.float32)
    data[4:20, 4:20, 4:20] = np.random.default_rng(0).uniform(0.5, 1, (16, 16, 16))
    one, other = (
        prepare(load_volume(nib.Nifti1Image(data * scale, np.eye(4))), Preprocessing()) for scale in (1, 1e-9)
    )
    torch.testing.assert_close(one.data, other.data, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("modality", "values", "doubtful"),
    [
        ("mri", lambda data: data, False),
        ("mri", lambda data: data - 500, False),
        ("mri", lambda data: np.maximum(data - 1000, -1000), True),
        ("mri", lambda data: np.maximum(data - 1024, -1024), True),
        ("ct", lambda data: np.maximum(data - 1000, -1000), False),
        ("ct", lambda data: data, True),
        ("ct", lambda data: (data - data.mean()) / data.std(), True),
        ("ct", lambda data: data - 32768, True),
    ],
)
def test_values_of_the_other_modality_are_named(modality, values, doubtful):
    data, _ = head_data()
    data = values(data).astype(np.float32)
    _, remarks = without_outliers(data, Preprocessing(modality=modality), "a")
    assert len(remarks) == doubtful
    if doubtful:
        assert f"expected {'an MRI' if modality == 'mri' else 'a CT'}" in remarks[0]
        named = [float(number) for number in re.search(r"found values from (\S+) to ([^\s:]+)", remarks[0]).groups()]
        # Of a sample, whose ends are off by a share of the range, not of numbers that may be near 0.
        assert named == pytest.approx(np.quantile(data, (0.001, 0.999)), rel=0.1, abs=1e-5 * float(np.ptp(data)))


def test_an_mri_for_a_ct_bundle_is_named_with_its_file(tmp_path):
    data, _ = head_data()
    path = save(tmp_path / "t1.nii.gz", data.astype(np.float32), np.diag([2, 2, 2, 1.0]))
    with pytest.warns(UserWarning, match=re.escape(f"{path}: expected a CT in Hounsfield units")):
        prepare(load_volume(path), Preprocessing(modality="ct"))


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


@pytest.mark.parametrize(("hu", "head"), [(-250, True), (-350, False)])
def test_fat_of_a_ct_is_head_whatever_the_window_is(hu, head):
    data = np.full((16, 16, 16), -1000.0)
    data[4:12, 4:12, 4:12] = 30
    data[12, 4:12, 4:12] = hu
    prepared = prepare(box_volume(data), Preprocessing(modality="ct", margin=100, hu_window=(-160.0, 240.0)))
    assert prepared.foreground[4:12, 4:12, 4:12].all()
    assert prepared.foreground[12, 4:12, 4:12].unique().tolist() == [head]


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
    data[23, 23, 20:30] = 3e3
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


@pytest.mark.parametrize("sign", [1, -1])
def test_intensities_beyond_float32(tmp_path, noise, sign):
    path = save(tmp_path / "huge.nii", noise * np.float32(sign * 1e35))
    with pytest.raises(VolumeError, match=re.escape(f"{path}: expected intensities within 1e+30, found ")):
        prepare(load_volume(path), Preprocessing((1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("spacing", 1.0, "three numbers above 0 in mm, got 1.0"),
        ("spacing", "1,1", "three numbers above 0 in mm, got '1,1'"),
        ("spacing", (1, 1, "2"), "three numbers above 0 in mm"),
        ("spacing", (1, 1, math.inf), "three numbers above 0 in mm"),
        ("percentiles", 99.5, "0 <= lower < upper <= 100, got 99.5"),
        ("percentiles", (0.5, 50, 99.5), "0 <= lower < upper <= 100"),
        ("hu_window", None, "lower < upper, got None"),
        ("hu_window", ("a", "b"), "lower < upper"),
        ("others", Intensities(), r"a tuple of Intensities of the channels after the first, got Intensities\("),
        ("others", ("mri",), r"a tuple of Intensities of the channels after the first, got \('mri',\)"),
    ],
)
def test_settings_of_another_kind(name, given, expected):
    with pytest.raises(ArgumentError, match=f"^{name}: expected {expected}"):
        Preprocessing(**{name: given})
    found = Preprocessing(spacing=np.full(3, 1.5), percentiles=[np.float32(1), 99])
    assert (found.spacing, found.percentiles) == ((1.5,) * 3, (1.0, 99.0))
