"""Volumes through SimpleITK: voxels and geometry as it has them, and what it would read and is refused here."""

import gzip
import re
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the name its users know
from itk_volumes import itk_image, write_series
from scans import refused, rotation

from grcsf_fast.data.channels import find_images
from grcsf_fast.data.files import case_name, list_cases, volume_files, volume_sha256
from grcsf_fast.data.intensities import Preprocessing
from grcsf_fast.data.itk import write_volume
from grcsf_fast.data.masks import load_mask
from grcsf_fast.data.volumes import bytes_needed, load_volume

SHAPE = (7, 6, 5)
DATA = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
OBLIQUE = rotation(25) @ np.diag([1.0, -1.0, -1.0])
DIRECTIONS = {
    "straight": np.eye(3),
    "oblique": OBLIQUE,
    "turned": OBLIQUE @ np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    "left-handed": np.diag([1.0, 1.0, -1.0]),
}


def in_ras(image, index):
    """Where ITK says that a voxel lies."""
    return np.array(image.TransformContinuousIndexToPhysicalPoint(index)) * (-1, -1, 1)


def assert_same_place(affine, image, atol=1e-4):
    for index in ((0.0, 0.0, 0.0), (6.0, 0.0, 0.0), (0.0, 5.0, 0.0), (0.0, 0.0, 4.0), (1.5, 2.0, 3.25)):
        assert np.allclose(nib.affines.apply_affine(affine, index), in_ras(image, index), atol=atol)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("packed", [True, False])
def test_files_lie_where_simpleitk_says(tmp_path, ending, packed, direction):
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(itk_image(DATA, direction=DIRECTIONS[direction]), str(path), useCompression=packed)
    volume = load_volume(path)
    assert np.array_equal(volume.data, DATA)
    assert_same_place(volume.affine, sitk.ReadImage(str(path)))
    volume.data[0, 0, 0] = 1  # as in an array of one's own


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "i8", "f4", "f8"])
def test_types(tmp_path, dtype):
    path = tmp_path / "a.nrrd"
    data = np.abs(DATA % 100).astype(dtype)
    sitk.WriteImage(itk_image(data), str(path))
    assert np.array_equal(load_volume(path).data, data)


def test_nrrd_in_folders_and_by_its_bytes(tmp_path):
    sitk.WriteImage(itk_image(DATA), str(tmp_path / "a.nrrd"))
    assert list_cases(tmp_path) == {"a": tmp_path / "a.nrrd"}
    assert case_name("b_0000.nrrd") == "b"
    (tmp_path / "a.nrrd").rename(tmp_path / "b.nii")
    assert np.array_equal(load_volume(tmp_path / "b.nii").data, DATA)


def test_nrrd_masks(tmp_path):
    sitk.WriteImage(itk_image((DATA > 500).astype(np.uint8)), str(tmp_path / "a.nrrd"))
    assert np.array_equal(load_mask(tmp_path / "a.nrrd").voxels, DATA > 500)


HEADER = {
    "type": "short",
    "dimension": "3",
    "space": "RAS",
    "sizes": "7 6 5",
    "space directions": "(1,0,0) (0,2,0) (0,0,3)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(1,2,3)",
}
RAW = DATA.tobytes(order="F")


def write_nrrd(path, raw=RAW, **changes):
    """None leaves a field out; underscores stand for spaces."""
    fields = HEADER | {name.replace("_", " "): value for name, value in changes.items()}
    lines = [f"{name}: {value}\n" for name, value in fields.items() if value is not None]
    path.write_bytes(("NRRD0004\n# made by hand\n" + "".join(lines) + "\n").encode() + raw)
    return path


def test_nrrd_of_other_spaces(tmp_path):
    volume = load_volume(write_nrrd(tmp_path / "a.nrrd"))
    assert np.allclose(nib.affines.apply_affine(volume.affine, [1, 1, 1]), [2, 4, 6])
    volume = load_volume(write_nrrd(tmp_path / "b.nrrd", space="left-anterior-superior", space_units='"mm" "mm" "mm"'))
    assert np.allclose(nib.affines.apply_affine(volume.affine, [1, 1, 1]), [-2, 4, 6])


def test_an_axis_of_an_nrrd_that_is_none_of_space(tmp_path):
    """Of one number a voxel, as programs that cut a channel out leave it; it has no direction."""
    whole = {"dimension": "4", "sizes": "1 7 6 5", "space directions": "none " + HEADER["space directions"]}
    expected = load_volume(write_nrrd(tmp_path / "a.nrrd"))
    for kind in ("scalar", "stub"):
        volume = load_volume(write_nrrd(tmp_path / "b.nrrd", **whole, kinds=f"{kind} domain domain domain"))
        assert np.array_equal(volume.data, DATA)
        assert np.array_equal(volume.affine, expected.affine)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"space": None}, "expected its space and space directions, by the patient's sides, found none"),
        ({"space": "scanner-xyz"}, "found scanner-xyz"),
        ({"space_directions": None}, "with none"),
        ({"space_origin": None}, "expected 3 numbers as its space origin, found none"),
        ({"space_origin": "none"}, "expected 3 numbers as its space origin, found none"),
        ({"space_origin": "(nan,nan,nan)"}, "expected 3 numbers as its space origin, found (nan,nan,nan)"),
        ({"space_directions": "(1,0,0) (0,2,0) none"}, "expected 9 numbers as its space directions, found (1,0,0)"),
        ({"space_directions": "(1,0,0) (0,2,0) (nan,nan,nan)"}, "expected 9 numbers as its space directions"),
        ({"space_units": '"um" "um" "um"'}, "expected mm as space units"),
        ({"encoding": "ascii"}, "expected raw or gzip as encoding, found ascii"),
        ({"data_file": "b.raw"}, "expected all of it in one file, found data file: b.raw"),
        ({"byte_skip": "-1"}, "found byte skip: -1"),
        ({"sizes": "7 6 6"}, "expected 504 bytes of voxels, which a.nrrd cannot hold"),
        ({"sizes": "7 6 4"}, "expected 336 bytes of voxels, found more"),
        ({"sizes": "7 30", "dimension": "2", "space": None}, "expected its space"),
        ({"space_directions": "(1,0,0) (1,0,0) (0,0,3)"}, ""),
        ({"type": "block", "block_size": "2"}, ""),
        ({"type": "nothing"}, ""),
    ],
)
def test_what_is_refused_of_nrrd(tmp_path, changes, part):
    refused(write_nrrd(tmp_path / "a.nrrd", **changes), part)


def test_a_packed_nrrd_is_checked_to_its_end(tmp_path):
    packed = gzip.compress(RAW, mtime=0)
    path = write_nrrd(tmp_path / "a.nrrd", packed, encoding="gzip")
    assert np.array_equal(load_volume(path).data, DATA)
    for bad in (packed[:-2], packed[:-40], packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]):
        refused(write_nrrd(path, bad, encoding="gzip"), "reading them failed")
    refused(write_nrrd(path, packed, encoding="gzip", sizes="7 6 4"), "found more")
    refused(write_nrrd(path, packed, encoding="gzip", sizes="7 6 6"), "expected 504 bytes of voxels, found 420")
    refused(write_nrrd(path, packed, encoding="gzip", sizes="7000 6000 5000"), "cannot hold")


@pytest.mark.parametrize("direction", ["straight", "oblique", "turned"])
def test_a_series_lies_where_simpleitk_says(tmp_path, direction):
    written = itk_image(DATA, direction=DIRECTIONS[direction])
    folder = write_series(tmp_path / "scan", written)
    (folder / "README").write_text("no DICOM")
    volume = load_volume(folder)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    read = sitk.ReadImage(names)
    assert np.array_equal(volume.data, sitk.GetArrayFromImage(read).T)
    assert_same_place(volume.affine, read)
    if np.linalg.det(DIRECTIONS[direction]) > 0:
        assert np.array_equal(volume.data, DATA)
        assert_same_place(volume.affine, written)
    assert bytes_needed(folder, Preprocessing(spacing=(1.0, 1.0, 1.0))) > 0


def test_scale_factors_of_slices(tmp_path):
    data = DATA.astype(np.float32)
    data[:, :, 1::2] += 0.5
    folder = write_series(tmp_path / "a", itk_image(data), slopes=(1.0, 0.5))
    assert np.array_equal(load_volume(folder).data, data)


def test_the_files_of_a_series(tmp_path):
    folder = write_series(tmp_path / "a", itk_image(DATA))
    assert list_cases(folder) == {"a": folder}
    assert len(volume_files(folder)) == 5
    before = volume_sha256(folder)
    write_series(folder, itk_image(DATA + 1))
    assert volume_sha256(folder) != before


def test_two_series_are_named(tmp_path):
    folder = write_series(tmp_path / "a", itk_image(DATA))
    write_series(folder, itk_image(DATA), "1.2.4", "T2 axial", left_out=(0,))
    refused(
        folder,
        "expected a DICOM series, could not read it: expected one series, found 2: 1.2.3 (T1, 5 files), "
        "1.2.4 (T2 axial, 4 files); put each into a folder of its own",
    )


def test_a_series_with_a_gap_is_refused(tmp_path):
    refused(
        write_series(tmp_path / "a", itk_image(DATA), left_out=(2,)), "expected 4 slices at equal distances", "missing"
    )


@pytest.mark.parametrize("number", [0, 4])
def test_a_damaged_slice_is_refused(tmp_path, number):
    """SimpleITK would go on without it."""
    folder = write_series(tmp_path / "a", itk_image(DATA))
    path = next(folder.glob(f"*-{number}.dcm"))
    path.write_bytes(path.read_bytes()[:-30])
    refused(folder, "found 1 files that are damaged or none, the first of them " + path.name)


def test_slices_of_nothing(tmp_path):
    """Bytes that only begin as DICOM, and a header that SimpleITK stumbles over when it lists a folder."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "IM1").write_bytes(bytes(128) + b"DICM" + bytes(999))
    refused(tmp_path / "a", "expected one series, found none")
    folder = write_series(tmp_path / "b", itk_image(DATA))
    path = next(folder.glob("*-2.dcm"))
    tag = b"\x28\x00\x02\x00\x02\x00\x00\x00"  # samples per pixel
    content = path.read_bytes()
    assert tag + b"\x01\x00" in content
    path.write_bytes(content.replace(tag + b"\x01\x00", tag + b"\x07\x00"))
    refused(folder, "expected a DICOM series, could not read it: ")


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("tag", "name"),
    [("28003000", "PixelSpacing"), ("20003200", "ImagePositionPatient"), ("20003700", "ImageOrientationPatient")],
)
def test_a_slice_that_does_not_say_where_it_lies(tmp_path, tag, name, alone):
    """As after an anonymiser: GDCM takes 1 mm, or the axes of the body, and every volume in mL would be wrong."""
    data = DATA[:, :, :1] if alone else DATA
    folder = write_series(tmp_path / "a", itk_image(data, spacing=(0.45, 0.45, 3.0)), thickness="3")
    path = sorted(folder.glob("*.dcm"))[-1]
    content, element = path.read_bytes(), bytes.fromhex(tag)
    assert content.count(element) == 1
    path.write_bytes(content.replace(element, bytes.fromhex(tag[:4] + "f000")))  # another tag of its group
    refused(folder, "expected an image with a place in the body", f"{path.name} without {name}")


@pytest.mark.parametrize(
    ("tag", "text", "said"),
    [
        ("28003000", "0\\0", "expected PixelSpacing that can be used, found 0\\0 in "),
        (
            "20003700",
            "0\\0\\0\\0\\0\\0",
            "expected ImageOrientationPatient that can be used, found 0\\0\\0\\0\\0\\0 in ",
        ),
        ("20003700", "1\\0\\0\\0.5\\0.866\\0", "expected ImageOrientationPatient that can be used, found 1"),
    ],
)
def test_slices_that_lie_where_nothing_can(tmp_path, tag, text, said):
    """Zeros of an anonymiser, say: GDCM takes 1 mm and the axes of the body for them too."""
    folder = write_series(tmp_path / "a", itk_image(DATA, spacing=(0.45, 0.45, 3.0)))
    for path in folder.glob("*.dcm"):
        state(path, tag, text)
    refused(folder, said)


def test_directions_that_were_rounded(tmp_path):
    """As some scanners write them: their lengths are not quite 1."""
    folder = write_series(tmp_path / "a", itk_image(DATA, spacing=(0.45, 0.45, 3.0)))
    for path in folder.glob("*.dcm"):
        state(path, "20003700", "0.70\\0.70\\0\\-0.70\\0.70\\0")
    assert np.allclose(nib.affines.voxel_sizes(load_volume(folder).affine), (0.45, 0.45, 3))


def state(path, tag, text):
    """Give an element of a DICOM file, implicit in its kind, another text."""
    content, element = path.read_bytes(), bytes.fromhex(tag)
    assert content.count(element) == 1
    before, _, rest = content.partition(element)
    value = text.encode() + b" " * (len(text) % 2)
    path.write_bytes(
        before + element + len(value).to_bytes(4, "little") + value + rest[4 + int.from_bytes(rest[:4], "little") :]
    )


def test_a_slice_alone(tmp_path):
    """Whose extent along the third axis nothing else says; SimpleITK takes 1 mm."""
    folder = write_series(tmp_path / "a", itk_image(DATA[:, :, 2:3], spacing=(0.45, 0.45, 3.0)), thickness="5")
    assert np.allclose(nib.affines.voxel_sizes(load_volume(folder).affine), (0.45, 0.45, 5))
    (path,) = folder.glob("*.dcm")
    content = path.read_bytes()
    for tag in ("18005000", "18008800"):  # the step to the next is now and then written too
        content = content.replace(bytes.fromhex(tag), bytes.fromhex("1800f000"))
    path.write_bytes(content)
    refused(folder, "expected the SliceThickness of a single slice, found none")


def test_slices_that_do_not_belong_together(tmp_path):
    folder = write_series(tmp_path / "a", itk_image(DATA))
    write_series(folder, itk_image(DATA[:, :5]), left_out=(0, 1, 2, 3))
    refused(folder, "expected slices of one size, as of the first of them (7, 6), found others")
    write_series(folder, itk_image(DATA, direction=rotation(10)), left_out=(0, 1, 2, 3))
    refused(folder, "expected parallel slices, found several directions")


def test_one_file_of_a_series(tmp_path):
    folder = write_series(tmp_path / "a", itk_image(DATA))
    refused(next(folder.glob("*.dcm")), "this is a DICOM file; give the folder with its series")


def test_without_simpleitk_the_extra_is_named(tmp_path, monkeypatch):
    folder = write_series(tmp_path / "a", itk_image(DATA))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    for path, purpose in ((write_nrrd(tmp_path / "a.nrrd"), "read an NRRD file"), (folder, "read DICOM")):
        named = f"expected the package SimpleITK, to {purpose}, found none; in a checkout of grcsf-fast: "
        refused(path, f'{named}pip install ".[io]"')


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_what_is_written_lies_where_it_was(tmp_path, ending, direction):
    written = itk_image(DATA, direction=DIRECTIONS[direction])
    sitk.WriteImage(written, str(tmp_path / "a.nrrd"))
    volume = load_volume(tmp_path / "a.nrrd")
    mask = (DATA > 0).astype(np.uint8)
    for name in ("b", "c"):
        write_volume(tmp_path / f"{name}{ending}", mask, volume.affine)
    assert (tmp_path / f"b{ending}").read_bytes() == (tmp_path / f"c{ending}").read_bytes()
    found = sitk.ReadImage(str(tmp_path / f"b{ending}"))
    assert np.array_equal(sitk.GetArrayFromImage(found).T, mask)
    assert_same_place(volume.affine, found)
    assert np.allclose(load_mask(tmp_path / f"b{ending}").affine, volume.affine, atol=1e-5)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match=re.escape("a.nrrd")):
        write_volume(tmp_path / "nowhere" / "a.nrrd", DATA, np.eye(4))


@pytest.mark.parametrize("ending", [".mha", ".mhd"])
def test_why_metaimages_are_not_left_to_simpleitk(tmp_path, ending):
    """A damaged stream gives wrong voxels there, and no error."""
    path = tmp_path / f"a{ending}"
    data = np.random.default_rng(1).integers(-1000, 1000, (40, 40, 40)).astype(np.int16)
    sitk.WriteImage(itk_image(data), str(path), useCompression=True)
    voxels = path if ending == ".mha" else tmp_path / "a.zraw"
    content = bytearray(voxels.read_bytes())
    content[len(content) // 2] ^= 0xFF
    voxels.write_bytes(content)
    assert not np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T, data)
    refused(path, "reading them failed")


def test_files_that_lost_all_or_their_beginning(tmp_path):
    """As of an interrupted copy: without them the first slices or the last ones would be missed by nobody."""
    for number, left in enumerate((0, 60)):
        folder = write_series(tmp_path / f"{number}", itk_image(DATA))
        last = sorted(folder.glob("*.dcm"))[-1]
        last.write_bytes(bytes(left))
        refused(folder, "found 1 files that are damaged or none", last.name)


def test_several_frames_in_a_file(tmp_path):
    """Whose places GDCM does not read one by one."""
    folder = tmp_path / "a"
    folder.mkdir()
    sitk.WriteImage(sitk.Cast(itk_image(DATA), sitk.sitkUInt8), str(folder / "all.dcm"))
    refused(folder, "expected a file for each slice, found 5 frames in all.dcm")


def test_dicom_beside_volumes_is_named(tmp_path):
    """Files without an ending, as scanners write them."""
    (tmp_path / "a.nii.gz").write_bytes(b"")
    (tmp_path / "notes").write_text("nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list_cases(tmp_path) == {"a": tmp_path / "a.nii.gz"}
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM")
    with pytest.warns(match="1 files of other formats are not read, the first of them IM0001"):
        assert list_cases(tmp_path) == {"a": tmp_path / "a.nii.gz"}
    (tmp_path / "a.nii.gz").rename(tmp_path / "a_0000.nii.gz")
    (tmp_path / "a_0001.nii.gz").write_bytes(b"")
    with pytest.warns(match="1 files of other formats are not read, the first of them IM0001"):
        assert set(find_images(tmp_path, 2)[0]) == {"a"}
