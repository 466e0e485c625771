"""Scans of several channels, by a pattern of each: which images are of one case, and what is said of the others."""

import json
import shlex

import numpy as np
import pytest
from layouts import files, head, write

from grcsf_fast import GRCSF
from grcsf_fast.cli import main
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.datasets.folders import LayoutError
from grcsf_fast.datasets.layouts import list_cases_of
from grcsf_fast.errors import ArgumentError
from grcsf_fast.pretrained.bundle import Bundle, save_bundle

BOTH = ("FLAIR=*_FLAIR.nii.gz", "T1w=*_T1w.nii.gz")


def listed(root, *patterns):
    listing, _ = list_cases_of("scans", [root, *patterns])
    return listing.channels, {
        case.name: [image.relative_to(root).as_posix() for image in case.images] for case in listing.cases
    }


def test_images_of_one_case(tmp_path):
    for name in ("sub-1/anat/sub-1", "sub-2/ses-1/anat/sub-2_ses-1", "sub-2/ses-2/anat/sub-2_ses-2"):
        files(tmp_path, f"{name}_T1w.nii.gz", f"{name}_FLAIR.nii.gz")
    channels, cases = listed(tmp_path, *BOTH)
    assert channels == ("FLAIR", "T1w")
    assert list(cases) == ["sub-1", "sub-2_ses-1", "sub-2_ses-2"]
    assert cases["sub-1"] == ["sub-1/anat/sub-1_FLAIR.nii.gz", "sub-1/anat/sub-1_T1w.nii.gz"]
    listing, _ = list_cases_of("scans", [tmp_path, *BOTH])
    assert [case.subject for case in listing.cases] == ["sub-1", "sub-2", "sub-2"]
    listing, _ = list_cases_of("scans", [tmp_path, *BOTH], channel=1)
    assert listing.channels == ("T1w",)


@pytest.mark.filterwarnings("ignore:.* several are called 1, so all cases are called by their paths")
@pytest.mark.parametrize(
    ("names", "patterns", "cases"),
    [
        (("a/T1.nii.gz", "a/T2.nii", "b/T1.nii.gz", "b/T2.nii"), ("x=T1.nii.gz", "y=T2.nii"), ["a", "b"]),
        (("T1/a.nii", "T2/a.nii", "T1/b.nii", "T2/b.nii"), ("x=T1/*.nii", "y=T2/*.nii"), ["a", "b"]),
        (("a_0000.nii", "a_0001.nii"), ("x=*_0000.nii", "y=*_0001.nii"), ["a"]),
        (("a_FLAIR.nii", "a-T1.nii.gz"), ("x=*FLAIR*", "y=*T1*"), ["a"]),
        (("a_FLAIR.nii", "a-T1.nii.gz"), ("x=*_FLAIR.nii*", "y=*-T1.nii*"), ["a"]),
        (("a/p_1.nii", "a/q_1.nii", "b/p_1.nii", "b/q_1.nii"), ("x=p_[0-9].nii", "y=q_?.nii"), ["a_1", "b_1"]),
    ],
)
def test_what_patterns_leave_open_is_alike(tmp_path, names, patterns, cases):
    files(tmp_path, *names)
    assert list(listed(tmp_path, *patterns)[1]) == cases


def test_sessions_in_a_folder_for_each_patient(tmp_path):
    names = [f"{patient}/{name}/{file}.nii" for patient in "pq" for name in "ab" for file in ("T1", "T2")]
    listing, _ = list_cases_of("scans", [files(tmp_path, *names), "x=T1.nii", "y=T2.nii"])
    assert [(case.name, case.subject) for case in listing.cases] == [
        ("p_a", "p"), ("p_b", "p"), ("q_a", "q"), ("q_b", "q"),
    ]  # fmt: skip


def test_cases_of_one_name_are_called_by_their_paths(tmp_path):
    files(tmp_path, *(f"{folder}/anat/{name}.nii" for folder in "ab" for name in ("T1", "T2")))
    assert list(listed(tmp_path, "x=T1.nii", "y=T2.nii")[1]) == ["a_anat", "b_anat"]
    files(tmp_path, *(f"{folder}/s1_{name}.nii" for folder in "ab" for name in ("T1", "T2")))
    with pytest.warns(UserWarning, match="several are called s1, so all cases are called by their paths"):
        assert list(listed(tmp_path, "x=*_T1.nii", "y=*_T2.nii")[1]) == ["a_s1", "b_s1"]


def test_incomplete_cases_are_named(tmp_path):
    for number in range(1, 4):
        files(tmp_path, f"sub-{number}_T1w.nii.gz", f"sub-{number}_FLAIR.nii.gz")
    files(tmp_path, "sub-4_FLAIR.nii.gz", "x/sub-5_T1w.nii.gz")
    said = r"left out are 2 of 5 cases: sub-4 lacks T1w; x/sub-5 lacks FLAIR$"
    with pytest.warns(UserWarning, match=said):
        assert list(listed(tmp_path, *BOTH)[1]) == ["sub-1", "sub-2", "sub-3"]
    (tmp_path / "other").mkdir()
    files(tmp_path / "other", "a_T1w.nii.gz", "b_FLAIR.nii.gz")
    with pytest.raises(LayoutError, match=r"FLAIR and T1w with paths that are alike .*, found none: a lacks FLAIR; b "):
        listed(tmp_path / "other", *BOTH)


def test_files_of_several_channels_as_one_are_refused(tmp_path):
    """The command that the message names is one that runs, and takes no files of the other channels."""
    root = tmp_path / "my scans"
    for name in ("sub-1_FLAIR", "sub-1_T1w", "sub-2_FLAIR", "sub-2_T1w"):
        image = head(1)[0]
        write(root / f"{name}.nii.gz", np.stack([image] * 2, 3) if "T1w" in name else image)
    with pytest.raises(LayoutError) as caught:
        listed(root, *BOTH)
    command = f"grcsf-fast cases scans '{root}' FLAIR='*_FLAIR.nii.gz' T1w_0,T1w_1='*_T1w.nii.gz' -o cases.json"
    said = f"{root}/sub-1_T1w.nii.gz: expected one image, found 2 along its fourth axis"
    assert str(caught.value) == f"{said} and 1 more files of several; channels have to be named: `{command}`"
    _, _, layout, *given, _, _ = shlex.split(command)
    assert list_cases_of(layout, given)[0].channels == ("FLAIR", "T1w_0", "T1w_1")
    write(root / "sub-2_T1w.nii.gz", head(1)[0])
    with pytest.raises(LayoutError) as caught:
        listed(root, *BOTH)
    assert str(caught.value) == f"{said}; make a file of each, or give a pattern that leaves them out"


def test_scans_of_one_pattern_that_hold_several_images_are_refused(tmp_path):
    """When they are listed, and not by each network that meets one; the command of the message names them."""
    for name in ("sub-1", "sub-2"):
        write(tmp_path / f"{name}.nii.gz", np.stack([head(1)[0]] * 2, 3))
    with pytest.raises(LayoutError) as caught:
        listed(tmp_path, "*.nii.gz")
    command = f"grcsf-fast cases scans {tmp_path} image_0,image_1='*.nii.gz' -o cases.json"
    said = f"{tmp_path}/sub-1.nii.gz: expected one image, found 2 along its fourth axis"
    assert str(caught.value) == f"{said} and 1 more files of several; channels have to be named: `{command}`"
    _, _, layout, *given, _, _ = shlex.split(command)
    assert list_cases_of(layout, given)[0].channels == ("image_0", "image_1")


def test_what_cannot_be_told_apart(tmp_path):
    files(tmp_path, "a_T1w.nii", "a__T1w.nii.gz", "a_FLAIR.nii")
    with pytest.raises(LayoutError, match=r"expected one T1w of each case, found .*a_T1w\.nii and .*a__T1w\.nii\.gz$"):
        listed(tmp_path, *(pattern.replace(".gz", "*") for pattern in BOTH))
    for first in ("x", "x,z"):
        with pytest.raises(LayoutError, match=r"expected an image of its own as y, found .*a_FLAIR\.nii as x; "):
            listed(tmp_path, f"{first}=*_FLAIR*", "y=*_FLAIR*")


@pytest.mark.parametrize("patterns", [("*_FLAIR.nii", "*_T1w.nii"), ("x=*_FLAIR.nii", "*_T1w.nii"), ("x=a", "x=b")])
def test_patterns_without_names_of_their_own(tmp_path, patterns):
    """As a shell makes of a pattern that is not quoted."""
    with pytest.raises(ArgumentError, match="scans: expected one pattern in quotes, or one for each of several"):
        listed(files(tmp_path, "a_FLAIR.nii", "a_T1w.nii"), *patterns)


def test_one_channel_with_a_name_that_it_cannot_have(tmp_path):
    with pytest.raises(ArgumentError, match=r"expected as name of a channel first a letter, .*, got '3D-T1'$"):
        listed(files(tmp_path, "a_T1w.nii", "a=b.nii"), "3D-T1=*_T1w.nii")
    assert list_cases_of("scans", [tmp_path, "*=b.nii"])[0].cases[0].name == "a=b"


def test_one_channel_with_a_name(tmp_path):
    assert listed(files(tmp_path, "a_T1w.nii"), "T1w=*_T1w.nii") == (("T1w",), {"a": ["a_T1w.nii"]})


def test_they_are_segmented_by_a_network_of_two_channels(tmp_path, capsys):
    """Whatever the order of the list."""
    for subject in "12":
        image = head(int(subject), (8, 9, 7))[0]
        for kind in ("T1w", "FLAIR"):
            write(tmp_path / f"bids/sub-{subject}/anat/sub-{subject}_{kind}.nii.gz", image)
    bundle = Bundle(
        GRCSF(2, 2, 1, (4, 8), rcu_levels=()), None, Preprocessing((2.0, 2.0, 2.0)), channels=("T1w", "FLAIR")
    )
    save_bundle(bundle, tmp_path / "bundle")
    cases, output = tmp_path / "new.json", tmp_path / "results"
    assert main(["cases", "scans", str(tmp_path / "bids"), *BOTH, "-o", str(cases)]) == 0
    assert "images of a case: 0 FLAIR, 1 T1w; " in capsys.readouterr().out
    assert main(["predict", "--cases", str(cases), "-m", str(tmp_path / "bundle"), "-o", str(output)]) == 0
    report = json.loads((output / "sub-1_report.json").read_text())
    assert [one["channel"] for one in report["inputs"]] == ["T1w", "FLAIR"]
    assert [one["file"].endswith(f"sub-1_{one['channel']}.nii.gz") for one in report["inputs"]] == [True, True]
