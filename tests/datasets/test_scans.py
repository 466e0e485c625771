"""Scans in folders of their own: listed by their names, and segmented."""

import json
from pathlib import Path

import pytest
from heads import save_scan, save_tiny_bundle

from grcsf_fast.cli import main
from grcsf_fast.datasets.folders import LayoutError
from grcsf_fast.datasets.layouts import list_cases_of

PATTERN = "*_T1w.nii.gz"


def files(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def listed(root, pattern=PATTERN):
    listing, _ = list_cases_of("scans", [root, pattern])
    assert listing.folds == 0
    return {case.name: (case.images[0].relative_to(root).as_posix(), case.subject) for case in listing.cases}


def test_scans_are_called_by_their_files(tmp_path):
    files(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_FLAIR.nii.gz", "sub-1/anat/sub-1_T1w.json")
    files(tmp_path, "sub-2/ses-1/anat/sub-2_ses-1_T1w.nii.gz", "x_T1w.nii.gz", ".hidden/y_T1w.nii.gz", "._z_T1w.nii.gz")
    assert listed(tmp_path) == {
        "sub-1_T1w": ("sub-1/anat/sub-1_T1w.nii.gz", "sub-1"),
        "sub-2_ses-1_T1w": ("sub-2/ses-1/anat/sub-2_ses-1_T1w.nii.gz", "sub-2"),
        "x_T1w": ("x_T1w.nii.gz", "x_T1w"),
    }
    assert list(listed(tmp_path, "sub-2/*/*/*.nii.gz")) == ["sub-2_ses-1_T1w"]


def test_scans_of_one_name_are_called_by_their_paths(tmp_path):
    files(tmp_path, "a/T1.nii.gz", "b/T1.nii.gz", "b/first/other.nii")
    assert listed(tmp_path, "*") == {
        "a_T1": ("a/T1.nii.gz", "a_T1"),
        "b_T1": ("b/T1.nii.gz", "b_T1"),
        "b_first_other": ("b/first/other.nii", "b_first_other"),
    }
    files(tmp_path, "a_T1.nii.gz")
    with pytest.raises(ValueError, match="expected a file name of its own for every case, found a_T1 several times"):
        listed(tmp_path, "*")


def test_folders_of_dicom_files_are_scans(tmp_path):
    files(tmp_path, "1/T1/notes.txt", "2/T1/IM0001", "2/T2/IM0001")
    for image in tmp_path.rglob("IM*"):
        image.write_bytes(bytes(128) + b"DICM" + bytes(99))
    assert listed(tmp_path, "T1") == {"T1": ("2/T1", "T1")}
    assert listed(tmp_path, "*") == {"T1": ("2/T1", "T1"), "T2": ("2/T2", "T2")}


def test_nothing_there(tmp_path):
    with pytest.raises(LayoutError, match=rf"^{tmp_path}/none: expected a folder with scans called \*_T1w"):
        listed(tmp_path / "none")
    files(tmp_path, "a/b.nii.gz")
    with pytest.raises(LayoutError, match=r"expected scans called .*; found none among 1 files, the first of them a/b"):
        listed(tmp_path)
    with pytest.raises(ValueError, match="scans: expected ROOT PATTERN, got "):
        list_cases_of("scans", [tmp_path])


def test_they_are_segmented(tmp_path, capsys):
    root = files(tmp_path / "bids", "sub-1/anat/sub-1_FLAIR.nii.gz")
    scan = save_scan(root / "sub-1" / "anat" / "sub-1_T1w.nii.gz")
    bundle, cases, output = save_tiny_bundle(scan, tmp_path / "bundle"), tmp_path / "t1.json", tmp_path / "results"
    assert main(["cases", "scans", str(root), PATTERN, "-o", str(cases)]) == 0
    said = capsys.readouterr().out
    assert "1 cases of 1 subjects: 0 with lesion, 0 without, 1 without a mask and in no fold\nwrote " in said
    assert main(["predict", "--cases", str(cases), "-m", str(bundle), "-o", str(output)]) == 0
    report = json.loads((output / "sub-1_T1w_report.json").read_text())
    assert Path(report["input"]) == scan
    assert (output / "sub-1_T1w.nii.gz").exists()
