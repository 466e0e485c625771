"""Case names, folders, and files that appear under their name only when complete."""

import errno
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.data.files import (
    case_name,
    check_writable,
    find_cases,
    list_cases,
    replace_when_done,
)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b/sub-01_T1w.nii.gz", "sub-01_T1w"),
        ("sub.v1.2.nii", "sub.v1.2"),
        ("UPPER.NII.GZ", "UPPER"),
        ("scan.gz", "scan.gz"),
        ("scan", "scan"),
        ("a/sub 01.hdr", "sub 01"),
        ("sub.01.IMG", "sub.01"),
        ("sub_0000.img.gz", "sub"),
        ("sub_0001.nii.gz", "sub_0001"),
    ],
)
def test_case_name(path, name):
    assert case_name(path) == name
    assert case_name(Path(path)) == name


def touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"x")


def test_list_cases_of_a_folder(tmp_path):
    touch(tmp_path, "b.nii", "a.nii.gz", "C.NII.GZ", "sub 1.v2.nii.gz", "notes.txt", "a.json")
    touch(tmp_path, ".a.nii.gz", "._b.nii", ".partial-7-d.nii.gz", "e.nii.gz.part", "f.nii.gz~", "g.nii.gz.tmp")
    cases = list_cases(tmp_path)
    names = {"C": "C.NII.GZ", "a": "a.nii.gz", "b": "b.nii", "sub 1.v2": "sub 1.v2.nii.gz"}
    assert cases == {name: tmp_path / file for name, file in names.items()}
    assert list(cases) == ["C", "a", "b", "sub 1.v2"]
    assert list_cases(str(tmp_path)) == cases


def nested(folder):
    """Three NIfTI files below a folder, and some that are none."""
    for below in ("sub-01/anat", "sub-02", ".hidden"):
        (folder / below).mkdir(parents=True)
        touch(folder / below, "a.nii.gz", "a.json", ".b.nii")
    (folder / "deeper.nii").mkdir()
    touch(folder / "deeper.nii", "e.nii")
    return "subfolders are not searched, and hold 3 NIfTI files, the first of them " + str(folder / "deeper.nii/e.nii")


def test_subfolders_beside_files_are_named(tmp_path):
    touch(tmp_path, "b.nii")
    message = nested(tmp_path)
    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path}: {message}")) as caught:
        assert list_cases(tmp_path) == {"b": tmp_path / "b.nii"}
    assert len(caught) == 1


def test_subfolders_instead_of_files_are_named(tmp_path):
    message = nested(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"none; {message}")):
        list_cases(tmp_path)


def test_a_subfolder_that_is_a_link_counts(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    touch(tmp_path / "elsewhere", "a.nii")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="hold 1 NIfTI files"):
        list_cases(tmp_path / "images")


def test_of_a_large_tree_a_part_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("grcsf_fast.data.files.MAX_LOOKED_AT", 2)
    nested(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"hold at least [12] NIfTI files"):
        list_cases(tmp_path)


def test_subfolders_without_volumes_are_nobodys_business(tmp_path):
    touch(tmp_path, "b.nii")
    (tmp_path / "notes").mkdir()
    touch(tmp_path / "notes", "a.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(list_cases(tmp_path)) == ["b"]


def test_pairs_are_cases(tmp_path):
    touch(tmp_path, "a.hdr", "a.img", "b.hdr.gz", "b.img.gz", "C.HDR", "C.IMG", "d.nii")
    names = {"C": "C.IMG", "a": "a.img", "b": "b.img.gz", "d": "d.nii"}
    assert list_cases(tmp_path) == {name: tmp_path / file for name, file in names.items()}


@pytest.mark.parametrize("half", ["a.hdr", "a.img", "a.img.gz"])
def test_half_a_pair_is_named(tmp_path, half):
    touch(tmp_path, half, "d.nii")
    cases, problems = find_cases(tmp_path)
    assert list(cases) == ["d"]
    assert list(problems) == [half]
    assert "expected its other half a." in str(problems[half])


def test_a_pair_and_a_single_file_of_one_case(tmp_path):
    touch(tmp_path, "a.hdr", "a.img", "a.nii.gz")
    with pytest.raises(ValueError, match=r"a\.img and a\.nii\.gz are the same case"):
        list_cases(tmp_path)


def test_channels_of_a_case_are_no_cases(tmp_path):
    """nnU-Net's names; the networks here take one image."""
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "c_0001.nii.gz", "d.nii", "d_0002.nii")
    cases, problems = find_cases(tmp_path)
    assert list(cases) == ["b", "c_0001"]
    assert list(problems) == ["a_0000.nii.gz", "a_0001.nii.gz", "d.nii", "d_0002.nii"]
    assert "a_0000.nii.gz and a_0001.nii.gz are channels of one case" in str(problems["a_0001.nii.gz"])


@pytest.mark.parametrize("name", ["a.mgz", "a.mnc", "a.nhdr", "a.nii.bz2", "a.NII.ZST", "a.dcm"])
def test_other_formats_are_named(tmp_path, name):
    touch(tmp_path, name)
    message = f"1 files of other formats are not read, the first of them {name}"
    with pytest.raises(FileNotFoundError, match=re.escape(f"none; {message}")):
        list_cases(tmp_path)
    touch(tmp_path, "b.nii")
    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path}: {message}")):
        assert list(list_cases(tmp_path)) == ["b"]


def dicom(path):
    """As far as a folder's list looks at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + bytes(99))


def test_a_folder_of_dicom_files_is_a_case(tmp_path, monkeypatch):
    dicom(tmp_path / "series" / "IM0001")
    touch(tmp_path / "series", "README", "a.dcm")
    assert list_cases(tmp_path / "series") == {"series": tmp_path / "series"}
    monkeypatch.chdir(tmp_path / "series")
    assert list_cases(".") == {"series": Path(".")}


def test_folders_of_dicom_files_are_cases(tmp_path):
    dicom(tmp_path / "b.1" / "IM0001")
    dicom(tmp_path / "a" / "x.dcm")
    dicom(tmp_path / ".hidden" / "x.dcm")
    (tmp_path / "notes").mkdir()
    cases = list_cases(tmp_path)
    assert cases == {"a": tmp_path / "a", "b.1": tmp_path / "b.1"}


def test_beside_volumes_they_are_none(tmp_path):
    """What a volume was made of often lies beside it, and may be another patient's."""
    dicom(tmp_path / "a" / "IM0001")
    touch(tmp_path, "a.nii.gz")
    with pytest.warns(match=f"1 subfolders with DICOM files are not read, the first of them {tmp_path / 'a'}$"):
        assert list_cases(tmp_path) == {"a": tmp_path / "a.nii.gz"}


def test_folders_beside_those_of_dicom_files_are_named(tmp_path):
    for name in ("a", "c"):
        (tmp_path / name).mkdir()
    touch(tmp_path / "a", *(f"{number:03d}.txt" for number in range(99)))
    dicom(tmp_path / "a" / "IM0001")
    dicom(tmp_path / "b" / "deeper" / "IM0001")
    touch(tmp_path / "c", "c.nii.gz")
    with pytest.warns(match="2 folders without a DICOM file directly in them are not read, the first of them b$"):
        assert list_cases(tmp_path) == {"a": tmp_path / "a"}


def test_entries_that_may_not_be_looked_at(tmp_path, monkeypatch):
    """As behind a link into a folder of somebody else's."""
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    real = Path.is_dir

    def is_dir(path):
        if path.name == "b.nii.gz":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    cases, problems = find_cases(tmp_path)
    assert cases == {"a": tmp_path / "a.nii.gz"}
    assert {name: str(error) for name, error in problems.items()} == {
        "b.nii.gz": f"{tmp_path / 'b.nii.gz'}: Permission denied"
    }


def test_list_cases_of_one_file(tmp_path):
    touch(tmp_path, "b.nii", "a.nii.gz")
    assert list_cases(tmp_path / "a.nii.gz") == {"a": tmp_path / "a.nii.gz"}


def test_list_cases_of_nothing(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{missing}: expected a NIfTI file or a folder")):
        list_cases(missing)


def test_list_cases_of_a_folder_without_any(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}: expected files ending in .nii or .nii.gz")):
        list_cases(tmp_path)


def test_list_cases_refuses_two_files_of_one_case(tmp_path):
    touch(tmp_path, "a.nii", "a.nii.gz")
    with pytest.raises(ValueError, match=r"a\.nii and a\.nii\.gz are the same case"):
        list_cases(tmp_path)


@pytest.mark.parametrize("below", [".", "a", "a/b"])
def test_check_writable_leaves_no_trace(tmp_path, below):
    assert check_writable(tmp_path / below) == tmp_path / below
    assert check_writable(str(tmp_path / below)) == tmp_path / below
    assert list(tmp_path.iterdir()) == []


def test_check_writable_of_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_writable("a/b") == Path("a/b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        *("mask.nii.gz", "mask.nii", "MASK.NII.GZ", "a.hdr", "a.img", "a.img.gz", "a.mgz", "a.nrrd", "a.gz"),
        *("summary.json", "cases.csv", "overlay.png", "network.pt", "model.safetensors"),
    ],
)
def test_a_folder_by_the_name_of_a_file_is_refused(tmp_path, name):
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / name}: expected a folder for several files, found")):
        check_writable(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).mkdir()
    assert check_writable(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("name", ["results", "run.v1", "nii", "2026.11.25", "gz", "a.nii.gz.results"])
def test_a_folder_by_another_name_with_dots(tmp_path, name):
    assert check_writable(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("below", ["file", "file/folder", "file/a/b"])
def test_check_writable_below_a_regular_file(tmp_path, below):
    """No permission bits here, which do not stop root."""
    touch(tmp_path, "file")
    folder = tmp_path / below
    with pytest.raises(OSError, match=re.escape(f"{folder}: expected a folder to write to: ")):
        check_writable(folder)
    assert (tmp_path / "file").read_bytes() == b"x"


def test_check_writable_where_no_file_can_be_made(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match=re.escape(f"{tmp_path}: expected a folder to write to: Read-only file system")):
        check_writable(tmp_path)


def test_replace_writes_beside_and_renames(tmp_path):
    final = tmp_path / "mask.nii.gz"
    with replace_when_done(final) as (part,):
        assert part.parent == tmp_path
        assert part != final
        assert part.name.endswith(".nii.gz")
        assert part.name.startswith(".")
        part.write_text("new")
        assert not final.exists()
    assert final.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["mask.nii.gz"]


def test_replace_makes_missing_folders(tmp_path):
    with replace_when_done(tmp_path / "a" / "b" / "c") as (part,):
        part.write_text("new")
    assert (tmp_path / "a" / "b" / "c").read_text() == "new"


def test_replace_of_an_older_file(tmp_path):
    final = tmp_path / "a"
    final.write_text("old")
    with replace_when_done(final) as (part,):
        part.write_text("new")
        assert final.read_text() == "old"
    assert final.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_replace_after_an_exception(tmp_path, error):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")

    def write():
        with replace_when_done(first, second) as parts:
            for part in parts:
                part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert first.read_text() == "old"


def test_replace_where_one_of_two_was_not_written(tmp_path):
    """All or nothing: the first is written, the second forgotten."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    with pytest.raises(FileNotFoundError), replace_when_done(first, second) as (part, _):
        part.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert first.read_text() == "old"


def test_replace_when_the_disk_is_full(tmp_path, monkeypatch):
    """The writer puts half a file and then meets ENOSPC."""

    def full(image, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nib, "save", full)
    final = tmp_path / "mask.nii.gz"
    final.write_text("old")
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    with pytest.raises(OSError, match="No space left") as caught, replace_when_done(final) as (part,):
        nib.save(image, part)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["mask.nii.gz"]
    assert final.read_text() == "old"


def test_replace_when_flushing_to_disk_fails(tmp_path, monkeypatch):
    """Some file systems report a full disk no sooner than at fsync."""

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    final = tmp_path / "a"
    final.write_text("old")
    with pytest.raises(OSError, match="No space left"), replace_when_done(final) as (part,):
        part.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert final.read_text() == "old"


LIMITED = """
import os, resource, sys
from pathlib import Path
import nibabel as nib
import numpy as np
from grcsf_fast.data.files import replace_when_done

folder, name = Path(sys.argv[1]), sys.argv[2]
image = nib.Nifti1Image(np.random.default_rng(0).random((40, 40, 40), dtype=np.float32), np.eye(4))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    with replace_when_done(folder / name) as (part,):
        try:
            nib.save(image, part)
        finally:
            print("part", part.stat().st_size)
except OSError as error:
    print("OSError", error.errno)
print("left", sorted(os.listdir(folder)))
"""


@pytest.mark.parametrize(("name", "older"), [("volume.nii", False), ("volume.nii.gz", True)])
def test_replace_when_writing_really_fails(tmp_path, name, older):
    """A process that may write 50 kB a file meets EFBIG in the middle of a volume of 256 kB."""
    if older:
        (tmp_path / name).write_text("old")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path), name], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0].startswith("part ")
    assert 0 <= int(lines[0].split()[1]) <= 50_000
    assert lines[1] == f"OSError {errno.EFBIG}"
    assert lines[2] == f"left {[name] if older else []}"
    assert not older or (tmp_path / name).read_text() == "old"
