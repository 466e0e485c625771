"""Opening and reading NIfTI files: what is accepted, what is refused, and with which message."""

import gzip
import re
import struct
import warnings

import nibabel as nib
import numpy as np
import pytest
from scans import DATATYPE, DIM, SHAPE, noise_volume, patched, refused, save

from grcsf_fast.data.volumes import Preprocessing, VolumeError, bytes_needed, load_volume

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def noise():
    return noise_volume()


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


def test_clean_volume_does_not_warn(tmp_path, noise):
    path = save(tmp_path / "clean.nii", noise)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_volume(path).data.shape == SHAPE


def test_analyze(tmp_path, noise):
    path = tmp_path / "old.img"
    nib.save(nib.AnalyzeImage(noise, np.eye(4)), path)
    refused(path, "expected a NIfTI volume", "ANALYZE 7.5")


def test_other_image_class(noise):
    with pytest.raises(VolumeError, match="a NIfTI image of nibabel, found MGHImage"):
        load_volume(nib.MGHImage(noise, np.eye(4)))


def test_memory_is_estimated_from_the_header(tmp_path, noise):
    settings = Preprocessing((2.0, 2.0, 2.0))
    path = save(tmp_path / "small.nii.gz", noise)
    voxels = noise.size
    assert voxels * 16 < bytes_needed(path, settings) < voxels * 200
    assert bytes_needed(path, Preprocessing((0.5, 0.5, 0.5))) > 4 * bytes_needed(path, settings)
    (tmp_path / "text.nii").write_text("no header")
    assert bytes_needed(tmp_path / "text.nii", settings) == 0
    assert bytes_needed(tmp_path / "none.nii", settings) == 0


@pytest.mark.parametrize(("claimed", "name"), [((512, 512, 512), "big.nii"), ((1024, 1024, 1024), "big.nii.gz")])
def test_a_header_cannot_claim_more_than_the_file_holds(tmp_path, noise, claimed, name):
    path = save(tmp_path / "small.nii", noise)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<4h", raw, DIM, 3, *claimed)
    target = tmp_path / name
    target.write_bytes(gzip.compress(bytes(raw)) if name.endswith("gz") else bytes(raw))
    refused(target, f"{np.prod(claimed)} voxels")


def test_extensions_larger_than_any_are_not_read(tmp_path, noise):
    path = save(tmp_path / "a.nii", noise)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<f", raw, 108, 3e8)
    path.write_bytes(bytes(raw))
    refused(path, "bytes before the voxels")
