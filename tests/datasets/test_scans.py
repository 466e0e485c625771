"""Scans in folders of their own: listed by their names, and segmented."""

import json
import re
import shlex
from pathlib import Path

import pytest
from heads import save_scan, save_tiny_bundle
from layouts import files

from grcsf_fast.cli import main
from grcsf_fast.data.names import MAX_NAME
from grcsf_fast.datasets.cases_file import CasesError
from grcsf_fast.datasets.folders import LayoutError
from grcsf_fast.datasets.layouts import list_cases_of
from grcsf_fast.errors import ArgumentError

PATTERN = "*_T1w.nii.gz"


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
    with pytest.warns(UserWarning, match="several are called T1, so all cases are called by their paths"):
        assert listed(tmp_path, "*") == {
            "a_T1": ("a/T1.nii.gz", "a_T1"),
            "b_T1": ("b/T1.nii.gz", "b_T1"),
            "b_first_other": ("b/first/other.nii", "b_first_other"),
        }
    files(tmp_path, "a_T1.nii.gz")
    both = f"found a_T1 of {tmp_path}/a/T1.nii.gz and {tmp_path}/a_T1.nii.gz"
    with pytest.warns(UserWarning, match="by their paths"), pytest.raises(LayoutError, match=both):
        listed(tmp_path, "*")


def test_names_that_are_too_long_for_results(tmp_path):
    """By their paths, where two have one name."""
    files(tmp_path, *(f"{folder * 200}/{'x' * 40}.nii" for folder in "ab"))
    said = rf"^{tmp_path}: expected a name of at most {MAX_NAME} bytes, .*, found one of 241, a{{20}}\.\.\.$"
    with pytest.warns(UserWarning, match="by their paths"), pytest.raises(CasesError, match=said):
        listed(tmp_path, "*")
    (tmp_path / ("b" * 200) / f"{'x' * 40}.nii").unlink()
    assert list(listed(tmp_path, "*")) == ["x" * 40]


def test_channels_of_one_case_are_no_scans(tmp_path):
    files(tmp_path, "a/x_0000.nii.gz", "a/x_0001.nii.gz", "b/y_0001.nii.gz")
    with pytest.raises(LayoutError, match=rf"^{tmp_path}/a/x_0001\.nii\.gz: expected one image of each case"):
        listed(tmp_path, "*")
    assert list(listed(tmp_path, "*y*")) == ["y_0001"]


def test_what_is_left_out_is_said(tmp_path):
    files(tmp_path, "a/x.nii.gz", "a/pair.img", "a/pair.hdr", "derivatives/p/y.nii.gz", "a/z.mgz", "out/x.nii.gz")
    files(tmp_path, "out/x_residual50.nii.gz", "out/not_ours.nii.gz")
    (tmp_path / "out" / "x_report.json").write_text('{"outputs": {"x.nii.gz": "", "x_residual50.nii.gz": ""}}')
    (tmp_path / "out" / "other_report.json").write_text("[]")
    said = "left out of what is called .*: 1 derivatives or sourcedata, 1 of formats that are not read, 2 results of"
    with pytest.warns(UserWarning, match=said):
        assert list(listed(tmp_path, "*")) == ["not_ours", "pair", "x"]
    assert list(listed(tmp_path, "derivatives/*/*")) == ["y"]


def test_links_to_nothing_are_named(tmp_path):
    """As git-annex leaves what was not fetched."""
    files(tmp_path, "a/x_T1w.nii.gz", "a/x_FLAIR.nii.gz", "b/y_FLAIR.nii.gz", "b/out/notes.txt")
    for place in ("b/y_T1w.nii.gz", "derivatives/z_T1w.nii.gz"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).symlink_to("nowhere")
    said = (
        rf"^{tmp_path}: left out of what is called \*_T1w.nii.gz: 1 derivatives or sourcedata, 1 links to nothing, "
        r"such as b/y_T1w\.nii\.gz, which may have to be fetched first$"
    )
    with pytest.warns(UserWarning, match=said):
        assert list(listed(tmp_path)) == ["x_T1w"]
    both = ["T1w=*_T1w.nii.gz", "FLAIR=*_FLAIR.nii.gz"]
    with pytest.warns(UserWarning, match="left out") as warned:
        assert [case.name for case in list_cases_of("scans", [tmp_path, *both])[0].cases] == ["x"]
    assert [re.match(said, str(one.message)) is not None for one in warned] == [True, False]
    (tmp_path / "a/x_T1w.nii.gz").unlink()
    none = (
        r"; found none among 5 files, the first of them a/x_FLAIR\.nii\.gz; 2 links to nothing, such as "
        r"b/y_T1w\.nii\.gz, which may have to be fetched first$"
    )
    with pytest.warns(UserWarning, match=said), pytest.raises(LayoutError, match=none):
        listed(tmp_path)


def test_linked_folders_are_searched_once(tmp_path):
    root = files(tmp_path / "root", "b/x_T1w.nii.gz")
    elsewhere = files(tmp_path / "elsewhere", "y_T1w.nii.gz")
    for name, target in {"a": elsewhere, "again": elsewhere, "loop": root}.items():
        (root / name).symlink_to(target)
    assert [place for place, _ in listed(root).values()] == ["b/x_T1w.nii.gz", "a/y_T1w.nii.gz"]


@pytest.mark.parametrize("pattern", ["", ".", "/a/*.nii", "**/*.nii", "../*.nii"])
def test_patterns_that_are_no_ends_of_paths(tmp_path, pattern):
    with pytest.raises(ArgumentError, match="scans: expected how the paths of scans end"):
        listed(files(tmp_path, "a.nii"), pattern)


def test_what_needs_masks_says_so(tmp_path, capsys):
    cases = tmp_path / "cases.json"
    root = str(files(tmp_path / "root", "a.nii"))
    assert main(["cases", "scans", root, "*", "-o", str(cases), "--labels", "1"]) == 2
    assert "--labels: expected masks to choose values of, but no case has one" in capsys.readouterr().err
    assert main(["cases", "scans", root, "*", "-o", str(cases)]) == 0
    assert main(["train", "--cases", str(cases), "-o", str(tmp_path / "run"), "--rcu-levels", ""]) == 2
    assert f"{cases}: expected cases to train on that have a mask, found none" in capsys.readouterr().err
    assert main(["predict", "--cases", str(cases), "--fold", "0", "-o", str(tmp_path / "out")]) == 2
    assert "--fold: expected no number, as the list has no folds, got 0" in capsys.readouterr().err


def test_folders_of_dicom_files_are_scans(tmp_path):
    files(tmp_path, "1/T1/notes.txt", "2/T1/IM0001", "2/T2/IM0001")
    for image in tmp_path.rglob("IM*"):
        image.write_bytes(bytes(128) + b"DICM" + bytes(99))
    assert listed(tmp_path, "T1") == {"T1": ("2/T1", "T1")}
    files(tmp_path, "2/T1/a.dcm")
    assert listed(tmp_path, "*") == {"T1": ("2/T1", "T1"), "T2": ("2/T2", "T2")}


def test_nothing_there(tmp_path):
    with pytest.raises(LayoutError, match=rf"^{tmp_path}/none: expected a folder with scans called \*_T1w"):
        listed(tmp_path / "none")
    files(tmp_path, "a/b.nii.gz")
    with pytest.raises(LayoutError, match=r"expected scans called .*; found none among 1 files, the first of them a/b"):
        listed(tmp_path)
    with pytest.raises(ValueError, match="scans: expected ROOT PATTERN, got "):
        list_cases_of("scans", [tmp_path])


@pytest.mark.parametrize(
    ("file", "pattern"), [("sub-1/anat/sub-1_T1w.nii.gz", "*_T1w.nii.gz"), ("1/scan.nii", "*.nii")]
)
def test_who_gives_their_root_to_predict_is_told_of_them(tmp_path, capsys, monkeypatch, file, pattern):
    """The command that the message names is one that runs."""
    root = files(tmp_path / "my scans", file)
    assert main(["predict", "-i", str(root), "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    command = f"`grcsf-fast cases scans '{root}' '{pattern}' -o cases.json`"
    assert f"the first of them {root / file}; {command} lists scans in subfolders, for --cases\n" in said
    _, *words = shlex.split(command.strip("`"))
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0


def test_who_lists_bids_without_masks_is_told_of_them(tmp_path, capsys):
    root = files(tmp_path / "bids", "sub-1/anat/sub-1_FLAIR.nii.gz", "sub-1/anat/sub-1_FLAIR.json")
    assert main(["cases", "bids", str(root), "-o", str(tmp_path / "cases.json")]) == 2
    said = capsys.readouterr().err
    command = f"grcsf-fast cases scans {root} '*_FLAIR.nii.gz' -o cases.json"
    assert f"; without masks, `{command}` lists the scans alone\n" in said


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
