"""MetaImages: voxels and where they lie, as ITK reads them; what is refused."""

import nibabel as nib
import numpy as np
import pytest
from metaimages import write_metaimage

from grcsf_fast.data.files import case_name, list_cases, volume_files, volume_sha256
from grcsf_fast.data.masks import load_mask
from grcsf_fast.data.volumes import VolumeError, like, load_volume

SHAPE = (7, 6, 5)
DATA = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


@pytest.mark.parametrize("ending", [".mhd", ".mha"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_voxels(tmp_path, ending, packed, order):
    stored = DATA.astype(DATA.dtype.newbyteorder(order))
    path = write_metaimage(tmp_path / f"a{ending}", stored, packed, BinaryDataByteOrderMSB=order == ">")
    volume = load_volume(path)
    assert np.array_equal(volume.data, DATA)
    assert volume.data.dtype == np.float32
    volume.data[0, 0, 0] = 1  # as in an array of one's own


@pytest.mark.parametrize("true", ["True", "true", "T", "1"])
def test_what_counts_as_true(tmp_path, true):
    """As for ITK, by the first character."""
    flags = {"BinaryData": true, "BinaryDataByteOrderMSB": true, "CompressedData": true, "DistanceUnits": "mm"}
    path = write_metaimage(tmp_path / "a.mha", DATA.astype(">i2"), **flags)
    assert np.array_equal(load_volume(path).data, DATA)


def test_coordinates_of_itk_are_to_the_left_and_the_back(tmp_path):
    """Voxel (1, 2, 3) lies at offset + direction * spacing in LPS, which is (-x, -y, z) in RAS."""
    volume = load_volume(write_metaimage(tmp_path / "a.mhd", DATA))
    assert np.allclose(nib.affines.apply_affine(volume.affine, [1, 2, 3]), [-12, -24, 39])
    turned = {"TransformMatrix": "0 1 0 0 0 -1 1 0 0", "ElementSpacing": "2 3 4", "Offset": "1 2 3"}
    volume = load_volume(write_metaimage(tmp_path / "b.mhd", DATA, **turned))
    # The first axis runs to the back, the second down, the third to the left.
    assert np.allclose(nib.affines.apply_affine(volume.affine, [1, 0, 0]), [-1, -4, 3])
    assert np.allclose(nib.affines.apply_affine(volume.affine, [0, 1, 0]), [-1, -2, 0])
    assert np.allclose(nib.affines.apply_affine(volume.affine, [0, 0, 1]), [-5, -2, 3])


def test_results_lie_on_its_grid(tmp_path):
    volume = load_volume(write_metaimage(tmp_path / "a.mhd", DATA, TransformMatrix="0.6 0.8 0 -0.8 0.6 0 0 0 1"))
    nib.save(like(np.zeros(SHAPE, np.uint8), volume), tmp_path / "mask.nii.gz")
    saved = load_mask(tmp_path / "mask.nii.gz")
    assert np.allclose(saved.affine, volume.affine, atol=1e-5)


def test_masks(tmp_path):
    data = (DATA > 500).astype(np.uint8)
    assert np.array_equal(load_mask(write_metaimage(tmp_path / "a.mha", data)).voxels, data > 0)


def test_in_a_folder(tmp_path):
    path = write_metaimage(tmp_path / "a.mhd", DATA)
    other = write_metaimage(tmp_path / "b.mha", DATA)
    assert list_cases(tmp_path) == {"a": path, "b": other}
    assert case_name(path) == "a"
    assert volume_files(path) == [path, tmp_path / "a.zraw"]
    before = volume_sha256(path)
    write_metaimage(tmp_path / "a.mhd", DATA + 1)
    assert volume_sha256(path) != before


def test_voxels_beside_an_mha_belong_to_it(tmp_path):
    """Read as those of an .mhd: a case of it with other voxels is not finished."""
    header = write_metaimage(tmp_path / "a.mhd", DATA).rename(tmp_path / "a.mha")
    assert np.array_equal(load_volume(header).data, DATA)
    assert volume_files(header) == [header, tmp_path / "a.zraw"]
    assert volume_files(write_metaimage(tmp_path / "b.mha", DATA)) == [tmp_path / "b.mha"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NDims": 2}, "expected NDims = 3, found 2"),
        ({"ElementNumberOfChannels": 3}, "expected ElementNumberOfChannels = 1, found 3"),
        ({"DistanceUnits": "cm"}, "expected mm as DistanceUnits, found cm"),
        ({"ElementType": "MET_OTHER"}, "as ElementType, found MET_OTHER"),
        ({"DimSize": "7 6"}, "expected 3 numbers as DimSize, found 7 6"),
        ({"DimSize": "7 6 0"}, "expected sizes of 1 and more as DimSize, found (7, 6, 0)"),
        ({"DimSize": "7 6 6"}, "expected 504 bytes of voxels, which a.raw of 420 bytes cannot hold"),
        ({"DimSize": "7 6 4"}, "expected 336 bytes in a.raw, found more"),
        ({"TransformMatrix": None}, "expected 9 numbers as TransformMatrix, found none"),
        ({"ElementSpacing": "1 1 nan"}, "expected 3 numbers as ElementSpacing, found 1 1 nan"),
        ({"ElementSpacing": "1 1 0"}, "expected steps above 0 and axes of their own, found [1. 1. 0.] mm"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "expected steps above 0 and axes of their own"),
        ({"ElementDataFile": "b.raw"}, "expected its voxels b.raw beside it, found none"),
        ({"ElementDataFile": "../a.raw"}, "expected the name of a file beside it as ElementDataFile, found ../a.raw"),
        ({"ElementDataFile": "a%03d.raw 1 5 1"}, "expected the name of a file beside it as ElementDataFile"),
        ({"ElementDataFile": "LIST"}, "expected the name of a file beside it as ElementDataFile, found LIST"),
        ({"ElementDataFile": None}, "expected the name of a file beside it as ElementDataFile, found none"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    path = write_metaimage(tmp_path / "a.mhd", DATA, packed=False, **changes)
    with pytest.raises(VolumeError) as caught:
        load_volume(path)
    assert str(caught.value).startswith(f"{path}: expected ")
    assert message in str(caught.value)


def test_a_packed_file_is_checked_to_its_end(tmp_path):
    path = write_metaimage(tmp_path / "a.mhd", DATA)
    voxels = tmp_path / "a.zraw"
    content = voxels.read_bytes()
    for bad in (content[:-2], content[:-40], content[:-1] + bytes([content[-1] ^ 1])):
        voxels.write_bytes(bad)
        with pytest.raises(VolumeError, match=r"a\.mhd: expected \d+ voxels, reading them failed"):
            load_volume(path)
    write_metaimage(path, np.zeros((7, 6, 6), np.int16), DimSize="7 6 5")
    with pytest.raises(VolumeError, match=r"expected 420 bytes in a\.zraw, found more"):
        load_volume(path)
    write_metaimage(path, DATA, DimSize="7000 6000 5000")
    with pytest.raises(VolumeError, match="cannot hold"):
        load_volume(path)


def test_bytes_before_the_voxels(tmp_path):
    path = write_metaimage(tmp_path / "a.mhd", DATA, packed=False, HeaderSize=-1)
    voxels = tmp_path / "a.raw"
    voxels.write_bytes(b"12345678" + voxels.read_bytes())
    assert np.array_equal(load_volume(path).data, DATA)
