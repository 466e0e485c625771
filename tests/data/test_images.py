"""Opening and reading NIfTI files: what is accepted, what is refused, and with which message."""

import bz2
import gzip
import io
import lzma
import re
import struct
import tracemalloc
import warnings

import nibabel as nib
import numpy as np
import pytest
from scans import DATATYPE, DIM, SHAPE, SLOPE, noise_volume, patched, refused, save

from grcsf_fast.data import images
from grcsf_fast.data.images import open_image, read_voxels
from grcsf_fast.data.volumes import Preprocessing, VolumeError, bytes_needed, like, load_volume


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


DAMAGE = {
    "checksum": lambda raw: raw.__setitem__(-8, raw[-8] ^ 1),
    "length": lambda raw: raw.__setitem__(slice(-4, None), struct.pack("<I", 5)),
    "no trailer": lambda raw: raw.__delitem__(slice(-8, None)),
    "half a trailer": lambda raw: raw.__delitem__(slice(-3, None)),
    "last block": lambda raw: raw.__delitem__(slice(-40, None)),
    "garbage behind": lambda raw: raw.extend(b"garbage"),
    "one byte behind": lambda raw: raw.extend(b"\x1f"),
    "another stream cut behind": lambda raw: raw.extend(gzip.compress(b"more")[:-5]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_gzip_stream_is_checked_to_its_end(tmp_path, damage):
    """All voxels can be had; only the end says that they may be wrong. Of a small file the header's reader sees it."""
    path = save(tmp_path / "a.nii.gz", noise_volume())
    raw = bytearray(path.read_bytes())
    damage(raw)
    path.write_bytes(raw)
    refused(path, "could not read it")
    save(path, np.random.default_rng(0).random((50, 60, 70), np.float32))
    raw = bytearray(path.read_bytes())
    damage(raw)
    path.write_bytes(raw)
    refused(path, "expected 210000 voxels, reading them failed")
    with pytest.raises(VolumeError, match="reading them failed"):
        load_volume(nib.load(path))


def test_a_changed_voxel_in_a_gzip_stream(tmp_path):
    """Stored, not deflated, so that nothing but the checksum shows it."""
    path = tmp_path / "a.nii.gz"
    raw = bytearray(gzip.compress(nib.Nifti1Image(noise_volume(), np.eye(4)).to_bytes(), 0))
    raw[2000] ^= 255
    path.write_bytes(raw)
    refused(path, "CRC check failed")


@pytest.mark.parametrize("split", [100, 348, 400, 3000])
def test_gzip_members_one_after_the_other_are_one_stream(tmp_path, noise, split):
    raw = nib.Nifti1Image(noise, np.eye(4)).to_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(raw[:split]) + gzip.compress(raw[split:]) + bytes(512))
    np.testing.assert_array_equal(load_volume(path).data, noise)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_bytes_beyond_the_voxels(tmp_path, noise, name):
    path = tmp_path / name
    pack = gzip.compress if name.endswith("gz") else bytes
    raw = nib.Nifti1Image(noise, np.eye(4)).to_bytes()
    path.write_bytes(pack(raw + bytes(4320)))
    with pytest.warns(UserWarning, match=re.escape(f"{path}: 4320 bytes beyond the voxels were ignored")):
        np.testing.assert_array_equal(load_volume(path).data, noise)
    path.write_bytes(pack(raw + bytes(4321)))
    refused(path, "4320 bytes of voxels of shape (12, 10, 9) and type float32, found over twice as many")


@pytest.mark.parametrize(("name", "pack"), [("a.nii", gzip.compress), ("a.nii.gz", bytes), ("a.bak", gzip.compress)])
def test_the_bytes_decide_not_the_name(tmp_path, noise, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(nib.Nifti1Image(noise, np.diag([2, 2, 3, 1.0])).to_bytes()))
    volume = load_volume(path)
    np.testing.assert_array_equal(volume.data, noise)
    np.testing.assert_array_equal(volume.affine, np.diag([2, 2, 3, 1]))
    assert bytes_needed(path, Preprocessing()) > 0


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.nii.bz2", bz2.compress(b"x" * 999), "bzip2 file; unpack it first"),
        ("a.nii.xz", lzma.compress(b"x" * 999), "xz file; unpack it first"),
        ("a.nii.zst", b"\x28\xb5\x2f\xfd" + bytes(999), "Zstandard file; unpack it first"),
        ("a.nii.gz", b"PK\x03\x04" + bytes(999), "zip archive; unpack it first"),
        ("._a.nii.gz", b"\x00\x05\x16\x07" + bytes(999), "AppleDouble"),
        ("a.mnc", b"\x89HDF\r\n" + bytes(999), "HDF5"),
        ("a.dcm", bytes(128) + b"DICM" + bytes(999), "DICOM file; give the folder with its series"),
        ("a.nii.gz", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("a.mgz", gzip.compress(b"\0\0\0\1" + bytes(999), mtime=0), "MGH file of FreeSurfer; convert it to NIfTI"),
        ("a.mgz", gzip.compress(bytes(999), mtime=0), "no NIfTI header"),
    ],
)
def test_other_formats_are_named(tmp_path, name, content, part):
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, "expected a NIfTI volume, could not read it", part)
    assert bytes_needed(path, Preprocessing()) == 0


def test_a_folder_is_no_volume(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}: expected a NIfTI file, found a folder")):
        load_volume(tmp_path)


@pytest.mark.parametrize("axes", [1, 2, 4])
def test_axes_of_length_1_beyond_the_third_are_dropped(tmp_path, noise, axes):
    path = save(tmp_path / "a.nii.gz", noise.reshape(*SHAPE, *[1] * axes))
    volume = load_volume(path)
    np.testing.assert_array_equal(volume.data, noise)
    assert open_image(path).shape == SHAPE
    np.testing.assert_array_equal(load_volume(nib.load(path)).data, noise)


@pytest.mark.parametrize(("more", "count"), [((2,), 2), ((1, 3), 3), ((2, 1, 3), 6)])
def test_several_volumes_in_one_file_are_counted(tmp_path, more, count):
    path = save(tmp_path / "a.nii", np.zeros((*SHAPE, *more), np.float32))
    refused(path, f"expected one 3-D volume, found shape {(*SHAPE, *more)} ({count} volumes; split them first)")


@pytest.mark.parametrize("names", [("R", "G", "B"), ("R", "G", "B", "A")])
def test_colours(tmp_path, names):
    path = save(tmp_path / "a.nii.gz", np.zeros(SHAPE, [(name, "u1") for name in names]))
    refused(path, f"expected one number a voxel, found colours ({', '.join(names)})")


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_numbers(tmp_path, noise, dtype):
    path = save(tmp_path / "a.nii", noise.astype(dtype))
    refused(path, f"expected real numbers, found complex ones ({np.dtype(dtype)})")
    with pytest.raises(VolumeError, match="expected real numbers"):
        load_volume(nib.Nifti1Image(noise.astype(dtype), np.eye(4)))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_every_type_and_byte_order(tmp_path, name, dtype, order):
    data = np.arange(1080).reshape(SHAPE) % 120
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    nib.save(nib.Nifti1Image(data.astype(dtype), np.diag([2, 2, 3, 1.0]), header), tmp_path / name)
    opened = open_image(tmp_path / name)
    found = read_voxels(opened)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, data)
    volume = load_volume(tmp_path / name)
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_array_equal(volume.affine, np.diag([2, 2, 3, 1]))


@pytest.mark.parametrize(
    ("slope", "inter", "expected"),
    [(2, -7, lambda x: 2 * x - 7), (0, 5, lambda x: x), (np.nan, np.nan, lambda x: x), (-1, 0, lambda x: -x)],
)
def test_scaling_of_the_header(tmp_path, slope, inter, expected):
    """A slope of 0 or NaN means none, by the standard and by what nibabel writes."""
    data = np.arange(1080, dtype=np.int16).reshape(SHAPE)
    path = patched(tmp_path / "a.nii", data, (SLOPE, "<2f", slope, inter))
    np.testing.assert_array_equal(load_volume(path).data, expected(data))
    np.testing.assert_array_equal(read_voxels(open_image(path)), expected(data))


def test_a_slope_without_an_intercept_that_is_a_number(tmp_path):
    path = patched(tmp_path / "a.nii", np.ones(SHAPE, np.int16), (SLOPE, "<2f", 1, np.nan))
    refused(path, "could not read it", "inter")


def pair_bytes(data, affine):
    image = nib.Nifti1Pair(data, affine)
    image.file_map = {name: nib.fileholders.FileHolder(fileobj=io.BytesIO()) for name in ("header", "image")}
    image.to_file_map()
    return [image.file_map[name].fileobj.getvalue() for name in ("header", "image")]


@pytest.mark.parametrize("suffixes", [(".hdr", ".img"), (".HDR", ".IMG"), (".hdr.gz", ".img.gz")])
@pytest.mark.parametrize("given", [0, 1])
def test_pairs_of_header_and_voxels(tmp_path, noise, suffixes, given):
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    for name, content in zip(suffixes, pair_bytes(noise, affine), strict=True):
        (tmp_path / f"sub.01{name}").write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    volume = load_volume(tmp_path / f"sub.01{suffixes[given]}")
    np.testing.assert_array_equal(volume.data, noise)
    np.testing.assert_array_equal(volume.affine, affine)


def test_half_a_pair(tmp_path, noise):
    nib.save(nib.Nifti1Pair(noise, np.eye(4)), tmp_path / "a.hdr")
    (tmp_path / "a.img").unlink()
    refused(tmp_path / "a.hdr", "expected its other half a.img beside it, found none")


def test_voxels_of_a_pair_that_end_early(tmp_path, noise):
    nib.save(nib.Nifti1Pair(noise, np.eye(4)), tmp_path / "a.hdr")
    (tmp_path / "a.img").write_bytes((tmp_path / "a.img").read_bytes()[:-1])
    refused(tmp_path / "a.hdr", "1080 voxels of 4320 bytes, found 4319 bytes")


def test_a_single_file_by_the_name_of_a_pair(tmp_path, noise):
    save(tmp_path / "a.nii", noise)
    for name in ("a.hdr", "a.img"):
        (tmp_path / name).write_bytes((tmp_path / "a.nii").read_bytes())
    refused(tmp_path / "a.img", "its header is that of a single file")


def test_nifti_2(tmp_path, noise):
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti2Image(noise, affine), path)
    volume = load_volume(path)
    np.testing.assert_array_equal(volume.data, noise)
    np.testing.assert_array_equal(volume.affine, affine)
    np.testing.assert_array_equal(like(noise, volume).affine, affine)


def test_a_reader_of_masks_gets_them_as_they_are(tmp_path):
    """Constant ones too."""
    path = save(tmp_path / "mask.nii.gz", np.full(SHAPE, 3, np.uint8)[..., None, None])
    opened = open_image(str(path))
    assert opened.name == str(path)
    mask = read_voxels(opened)
    assert mask.shape == SHAPE
    assert mask.dtype == np.uint8
    assert (mask == 3).all()
    assert read_voxels(opened, np.float64).dtype == np.float64


def test_numpy_arrays_are_no_images(noise):
    with pytest.raises(VolumeError, match="expected a path or a NIfTI image of nibabel, found ndarray"):
        load_volume(noise)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_file_is_read_once_into_memory(tmp_path, suffix):
    """Its bytes become the voxels; beside them there are pieces alone."""
    path = tmp_path / f"large{suffix}"
    nib.save(nib.Nifti1Image(np.arange(2**22, dtype=np.float32).reshape(64, 256, 256), np.eye(4)), path)
    opened = open_image(path)
    tracemalloc.start()
    try:
        found = read_voxels(opened, np.float32)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.nbytes <= most < 1.3 * found.nbytes
    assert found[63, 255, 255] == 2**22 - 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [(MemoryError(), "there is not enough memory"), (EOFError(), "EOFError"), (ValueError("odd bytes"), "odd bytes")],
)
def test_a_reason_is_never_empty(tmp_path, noise, monkeypatch, error, reason):
    """Of memory that ran out Python says nothing at all."""
    path = save(tmp_path / "a.nii.gz", noise)
    opened = open_image(path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(images, "ArrayProxy", fail)
    with pytest.raises(VolumeError, match=f"^{re.escape(str(path))}: expected 1080 voxels, .* failed: {reason}$"):
        read_voxels(opened)
