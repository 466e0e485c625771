"""Where voxels lie by a header that may contradict itself: which form holds, and what is said about it."""

import gzip
import warnings

import nibabel as nib
import numpy as np
import pytest
from scans import PIXDIM, QFORM_CODE, QUATERN, SHAPE, SROW_X, UNITS, patched, refused, rotation

from grcsf_fast.data.images import open_image
from grcsf_fast.data.volumes import (
    Preprocessing,
    Volume,
    VolumeError,
    bytes_needed,
    like,
    load_volume,
    prepare,
    save_on_grid,
)


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


@pytest.mark.parametrize(("unit", "found", "factor"), [("meter", "metres", 1e3), ("micron", "micrometres", 1e-3)])
def test_other_units_than_millimetres_are_converted(noise, unit, found, factor):
    affine = np.array([[0, -2, 0, 5], [3, 0, 0, -7], [0, 0, 1.5, 2], [0, 0, 0, 1.0]])
    image = nib.Nifti1Image(noise, np.diag([1 / factor, 1 / factor, 1 / factor, 1]) @ affine)
    image.header.set_xyzt_units(unit)
    with pytest.warns(UserWarning, match=f"its unit is {found}; converted to mm"):
        volume = load_volume(image)
    np.testing.assert_allclose(volume.affine, affine)


FORMS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
# What a file says and how it is changed past nibabel's checks: codes, pixdim[0:4], unit, srow.
KEPT = {
    "both codes": [],
    "sform alone": [(QFORM_CODE, "<2h", 0, 1)],
    "qform alone": [(QFORM_CODE, "<2h", 1, 0)],
    "neither": [(QFORM_CODE, "<2h", 0, 0)],
    "neither, left-handed": [(QFORM_CODE, "<2h", 0, 0), (PIXDIM, "<f", -1)],
    "qfac 0": [(QFORM_CODE, "<2h", 1, 0), (PIXDIM, "<f", 0)],
    "negative pixdim": [(QFORM_CODE, "<2h", 1, 0), (PIXDIM + 4, "<f", -2)],
    "sform singular": [(QFORM_CODE, "<2h", 1, 2), (SROW_X, "<12f", *[0.0] * 12)],
    "sform not finite": [(QFORM_CODE, "<2h", 1, 2), (SROW_X + 12, "<f", np.nan)],
    "pixdim 0": [(QFORM_CODE, "<2h", 1, 4), (PIXDIM + 4, "<f", 0)],
    "metres": [
        *((UNITS, "<B", 1), (QFORM_CODE, "<2h", 0, 1), (PIXDIM + 4, "<3f", 2e-3, 2e-3, 3e-3)),
        (SROW_X, "<12f", 2e-3, 0, 0, -0.02, 0, 2e-3, 0, 0.03, 0, 0, 3e-3, 0.004),
    ],
    "seconds too": [(UNITS, "<B", 2 + 8)],
    "unit unknown": [(UNITS, "<B", 0)],
    "codes beyond the standard": [(QFORM_CODE, "<2h", 7, 9)],
}  # fmt: skip


def oblique(noise):
    affine = np.eye(4)
    affine[:3, :3] = rotation(15) @ np.diag([2.0, 2.0, 3.0])
    affine[:3, 3] = [-20, 30, 4]
    image = nib.Nifti1Image(noise, affine)
    image.set_sform(affine, 2)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    return image


def raw_header(path):
    raw = path.read_bytes()
    return nib.Nifti1Header((gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)[:348], check=False)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("changes", KEPT.values(), ids=KEPT)
def test_outputs_say_where_they_lie_as_their_input_does(tmp_path, noise, changes):
    """Every form, code, voxel size and unit bit by bit, of images nibabel saves and of maps written in blocks.

    So whatever another program makes of the input's header, it makes of the output's.
    """
    path = patched(tmp_path / "in.nii", oblique(noise), *changes)
    volume = load_volume(path)
    prepared = prepare(volume, Preprocessing((2.0, 2.0, 2.0)))
    nib.save(like(np.ones(SHAPE, np.uint8), volume), tmp_path / "mask.nii.gz")
    save_on_grid(tmp_path / "map.nii.gz", prepared.data, prepared)
    given = raw_header(path)
    for name in ("mask.nii.gz", "map.nii.gz"):
        found = raw_header(tmp_path / name)
        for field in FORMS:
            assert found[field].tobytes() == given[field].tobytes(), (name, field, found[field], given[field])
        assert found.get_data_shape() == SHAPE
        again = load_volume(tmp_path / "map.nii.gz")
        np.testing.assert_array_equal(again.affine, volume.affine)


def test_reorienting_an_output_moves_it_with_its_affine(tmp_path, noise):
    """The forms of the input are those of the input's grid, not of what nibabel derives from an output."""
    path = patched(tmp_path / "in.nii", oblique(noise))
    image = like(noise, load_volume(path))
    nib.save(nib.as_closest_canonical(image.slicer[2:, ::-1]), tmp_path / "out.nii")
    expected = nib.as_closest_canonical(nib.load(path).slicer[2:, ::-1])
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii").affine, expected.affine, atol=1e-5)


def test_an_output_of_a_header_that_does_not_say_where_the_volume_lies_gets_an_sform(tmp_path, noise):
    """As synthetic volumes have."""
    affine = oblique(noise).affine
    volume = Volume(noise, affine, nib.Nifti1Header(), "synthetic")
    nib.save(like(noise, volume), tmp_path / "out.nii")
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii").affine, affine, atol=1e-5)


def itk_affine(header):
    """Where ITK places a file: without codes by voxel sizes alone, from the origin to the left, back and up."""
    if header["qform_code"] > 0 or header["sform_code"] > 0:
        return header.get_best_affine()
    return np.diag([-header["pixdim"][1], -header["pixdim"][2], header["pixdim"][3], 1])


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1), (1, 2)])
@pytest.mark.filterwarnings("ignore:.*nothing about orientation")
def test_other_programs_place_a_mask_where_they_place_its_image(tmp_path, noise, codes):
    path = patched(tmp_path / "in.nii", oblique(noise), (QFORM_CODE, "<2h", *codes))
    nib.save(like(np.ones(SHAPE, np.uint8), load_volume(path)), tmp_path / "mask.nii")
    theirs = [itk_affine(raw_header(file)) for file in (path, tmp_path / "mask.nii")]
    np.testing.assert_array_equal(*theirs)
    np.testing.assert_array_equal(nib.load(path).affine, nib.load(tmp_path / "mask.nii").affine)


def test_a_qform_of_its_own_is_kept_and_named(tmp_path, noise):
    """Registered files say scanner space in the qform and standard space in the sform."""
    scanner = np.diag([2.0, 2.0, 3.0, 1.0])
    scanner[:3, 3] = [-9, 8, 7]
    standard = np.diag([2.0, 2.0, 3.0, 1.0])
    image = nib.Nifti1Image(noise, standard)
    image.set_sform(standard, 4)
    image.set_qform(scanner, 1)
    nib.save(image, tmp_path / "in.nii")
    apart = np.linalg.norm([9, 8, 7])
    with pytest.warns(UserWarning, match=f"place a corner {apart:.4g} mm apart; the sform is used"):
        volume = load_volume(tmp_path / "in.nii")
    np.testing.assert_array_equal(volume.affine, standard)
    nib.save(like(np.ones(SHAPE, np.uint8), volume), tmp_path / "out.nii")
    out = nib.load(tmp_path / "out.nii")
    np.testing.assert_allclose(out.get_sform(), standard)
    np.testing.assert_allclose(out.get_qform(), scanner)


SFORM, QFORM = np.diag([2.0, 2.0, 3.0, 1.0]), np.diag([1.0, 2.0, 3.0, 1.0])
ALONE = np.diag([-2.0, 2.0, 3.0, 1.0])  # nibabel's reading of voxel sizes alone: to the left, the origin in the middle
ALONE[:3, 3] = [11, -9, -12]


def plain(noise):
    image = nib.Nifti1Image(noise, SFORM)
    image.set_sform(SFORM, 1)
    image.set_qform(SFORM, 1)
    return image


@pytest.mark.parametrize(
    ("changes", "expected", "parts"),
    [
        # 10 % in each of three axes: 13.3 mL where it was 10.
        ([(SROW_X, "<12f", *(SFORM * 1.1)[:3].ravel())], SFORM * [1.1, 1.1, 1.1, 1],
         ["2.2 x 2.2 x 3.3 mm by the sform and 2 x 2 x 3 mm by pixdim; the sform is used", "mm apart"]),
        ([(QFORM_CODE, "<h", 0), (PIXDIM + 4, "<f", 1)], SFORM,
         ["2 x 2 x 3 mm by the sform and 1 x 2 x 3 mm by pixdim; the sform is used"]),
        ([(QFORM_CODE, "<h", 0), (PIXDIM + 4, "<f", 0)], SFORM, ["and 0 x 2 x 3 mm by pixdim; the sform is used"]),
        ([(QFORM_CODE, "<h", 0), (PIXDIM + 8, "<f", np.nan)], SFORM, ["and 2 x nan x 3 mm by pixdim"]),
        ([(PIXDIM + 4, "<f", 0)], SFORM,
             ["qform cannot be used, it needs voxel sizes above 0 in pixdim, found 0 x 2", "0 x 2 x 3 mm by pixdim"]),
        ([(QUATERN, "<f", 2)], SFORM, ["qform cannot be used, it needs a quaternion of a rotation, found b, c, d 2 x"]),
        ([(SROW_X, "<12f", *[0.0] * 12)], SFORM, ["sform cannot be used, it needs an invertible affine"]),
        ([(SROW_X, "<4f", 0, 2, 0, 0)], SFORM, ["sform cannot be used, it needs an invertible affine"]),
        ([(SROW_X, "<f", np.inf)], SFORM, ["sform cannot be used, it needs a finite affine"]),
        ([(SROW_X + 12, "<f", np.nan)], SFORM, ["sform cannot be used, it needs a finite affine"]),
        ([(SROW_X, "<12f", *(SFORM * 1e-6)[:3].ravel())], SFORM, ["sform cannot be used, it needs voxels of 0.001"]),
        ([(SROW_X, "<12f", *(SFORM * 1e6)[:3].ravel())], SFORM, ["found 2e+06 x 2e+06 x 3e+06 mm; the qform is"]),
        ([(QFORM_CODE, "<2h", 1, 0), (PIXDIM + 4, "<f", -2)], SFORM,
             ["pixdim are -2 x 2 x 3; their signs are ignored"]),
        ([(QFORM_CODE, "<2h", 0, 0)], ALONE, ["nothing about orientation"]),
        ([(QFORM_CODE, "<2h", 0, 0), (PIXDIM + 8, "<f", -2)], ALONE, ["nothing about orientation", "2 x -2 x 3"]),
        ([(UNITS, "<B", 5)], SFORM, ["its unit has the code 5, which does not exist; taken as mm"]),
        # Within rounding, or what everybody does: no word.
        ([(PIXDIM + 4, "<f", 2.005)], SFORM, []),
        ([(PIXDIM, "<f", 0)], SFORM, []),
        ([(UNITS, "<B", 0)], SFORM, []),
    ],
)  # fmt: skip
def test_headers_that_contradict_themselves(tmp_path, noise, changes, expected, parts):
    path = patched(tmp_path / "a.nii", plain(noise), *changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = open_image(path)
    messages = [str(warning.message) for warning in caught]
    assert all(message.startswith(f"{path}: ") for message in messages)
    assert len(messages) == len(parts)
    for part in parts:
        assert any(part in message for message in messages), messages
    np.testing.assert_allclose(opened.affine, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ([(QFORM_CODE, "<2h", 0, 0), (PIXDIM + 4, "<f", 0)], ["voxel sizes above 0 in pixdim, found 0 x 2 x 3"]),
        ([(QFORM_CODE, "<2h", 0, 0), (PIXDIM + 4, "<f", np.nan)], ["voxel sizes above 0 in pixdim, found nan x 2 x 3"]),
        ([(QFORM_CODE, "<2h", 1, 0), (PIXDIM + 4, "<f", 0)], ["voxel sizes above 0 in pixdim, found 0 x 2 x 3"]),
        ([(QFORM_CODE, "<2h", 1, 0), (QUATERN, "<f", 1.5)], ["a quaternion of a rotation, found b, c, d 1.5 x 0 x 0"]),
        ([(QFORM_CODE, "<2h", 0, 1), (SROW_X, "<12f", *[0.0] * 12)], ["an invertible affine"]),
        ([(SROW_X, "<f", np.nan), (PIXDIM + 4, "<f", 0)], ["a finite affine", "in its other form voxel sizes above 0"]),
        ([(UNITS, "<B", 3)], ["a longest side of 1 to 10000 mm, found 0.027 mm"]),
        ([(UNITS, "<B", 1)], ["voxels of 0.001 to 1000 mm, found 2000 x 2000 x 3000 mm (its unit is metres)"]),
    ],
)  # fmt: skip
def test_headers_of_which_nothing_is_certain(tmp_path, noise, changes, parts):
    refused(patched(tmp_path / "a.nii", plain(noise), *changes), *parts)


@pytest.mark.parametrize("above", [2e-7, 1e-6, 5e-4])
def test_a_quaternion_longer_than_1_by_rounding_is_half_a_turn(tmp_path, noise, above):
    """nibabel alone raises on these; NIfTI's own library shortens them."""
    path = patched(
        tmp_path / "a.nii", plain(noise), (QFORM_CODE, "<2h", 1, 0), (QUATERN, "<3f", (1 + above) ** 0.5, 0, 0)
    )
    np.testing.assert_allclose(open_image(path).affine, np.diag([2.0, -2.0, -3.0, 1]), atol=1e-6)


def test_a_form_agrees_with_nibabel(tmp_path, noise):
    for codes in ((1, 0), (0, 1), (1, 1)):
        for qfac in (1, -1):
            changes = [(QFORM_CODE, "<2h", *codes), (PIXDIM, "<f", qfac)]
            path = patched(tmp_path / "a.nii", oblique(noise), *changes)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                np.testing.assert_allclose(open_image(path).affine, nib.load(path).affine, rtol=0, atol=1e-9)


def test_a_volume_in_micrometres_is_judged_in_millimetres(tmp_path, noise):
    """It once asked for 60 GiB."""
    image = nib.Nifti1Image(noise, np.diag([2000.0, 2000.0, 3000.0, 1.0]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "micrometres.nii.gz")
    nib.save(nib.Nifti1Image(noise, np.diag([2.0, 2.0, 3.0, 1.0])), tmp_path / "millimetres.nii.gz")
    one, other = (bytes_needed(tmp_path / f"{unit}.nii.gz", Preprocessing()) for unit in ("micrometres", "millimetres"))
    assert one == other > 0


def test_the_estimate_of_memory_does_not_warn(tmp_path, noise):
    """Reading does, once."""
    path = patched(tmp_path / "a.nii", plain(noise), (QFORM_CODE, "<2h", 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bytes_needed(path, Preprocessing()) > 0


@pytest.mark.parametrize("value", [np.nan, 0])
def test_an_image_that_nibabel_loaded_falls_back_as_its_file_does(tmp_path, noise, value):
    path = patched(tmp_path / "a.nii", plain(noise), (SROW_X, "<12f", *[value] * 12))
    for source in (path, nib.load(path)):
        with pytest.warns(UserWarning, match="its sform cannot be used"):
            np.testing.assert_allclose(load_volume(source).affine, SFORM)


def test_an_image_in_memory_whose_affine_is_not_its_headers(noise):
    image = plain(noise)
    image.affine[:3, 3] = [7, 8, 9]
    volume = load_volume(image)
    np.testing.assert_array_equal(volume.affine[:3, 3], [7, 8, 9])
    np.testing.assert_array_equal(like(noise, volume).affine, volume.affine)
    image.affine[0, 0] = np.nan
    with pytest.raises(VolumeError, match="expected a finite affine"):
        load_volume(image)


def test_a_written_map_has_the_codes_of_its_input(tmp_path, noise):
    image = nib.Nifti1Image(noise, np.diag([2.0, 2.0, 2.0, 1.0]))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 4)
    image.header.set_xyzt_units("mm")
    prepared = prepare(load_volume(image), Preprocessing((2.0, 2.0, 2.0)))
    save_on_grid(tmp_path / "map.nii.gz", prepared.data, prepared)
    header = nib.load(tmp_path / "map.nii.gz").header
    assert (int(header["qform_code"]), int(header["sform_code"]), int(header["xyzt_units"])) == (1, 4, 2)
    assert header.get_slope_inter() in ((1.0, 0.0), (None, None))
