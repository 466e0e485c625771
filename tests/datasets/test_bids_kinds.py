"""BIDS data sets: kinds of images that only some cases have, and masks of other names."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from layouts import bids, head, write
from pairs import AFFINE

from grcsf_fast.cli import main
from grcsf_fast.datasets.folders import LayoutError
from grcsf_fast.datasets.layouts import list_cases_of
from grcsf_fast.errors import ArgumentError


def listed(root, **choices):
    return list_cases_of("bids", [root], **{"folds": 2} | choices)[0]


@pytest.fixture
def root(tmp_path) -> Path:
    """Four subjects with T1w, FLAIR and a mask on one grid."""
    for number in range(1, 5):
        name = f"sub-{number}"
        image, mask = head(number, (8, 9, 7))
        for kind in ("T1w", "FLAIR"):
            write(tmp_path / name / "anat" / f"{name}_{kind}.nii.gz", image)
        write(tmp_path / "derivatives" / name / f"{name}_label-lesion_mask.nii.gz", mask)
    return tmp_path


def flair(root: Path, number: int) -> Path:
    return root / f"sub-{number}/anat/sub-{number}_FLAIR.nii.gz"


def other_grid(path: Path) -> None:
    write(path, head(1)[0], AFFINE @ np.diag([1.1, 1, 1, 1]))


def several_volumes(path: Path) -> None:
    write(path, np.stack([head(1)[0]] * 2, 3))


def linked_to_nothing(path: Path) -> None:
    """As git-annex leaves what was not fetched."""
    path.unlink()
    path.symlink_to("nowhere.nii.gz")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (Path.unlink, "missing"),
        (linked_to_nothing, "a link to nothing"),
        (other_grid, "not on the mask's grid"),
        (several_volumes, "several volumes in a file"),
        (lambda path: path.rename(path.with_name("sub-3_space-MNI_FLAIR.nii.gz")), "not in the mask's space"),
    ],
)
def test_a_kind_that_one_session_lacks_is_named(root, change, why):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert listed(root).channels == ("T1w", "FLAIR")
    change(flair(root, 3))
    with pytest.warns(UserWarning, match="left out") as said:
        assert listed(root).channels == ("T1w",)
    assert [str(one.message) for one in said] == [f"{root}: FLAIR left out: {why} in 1 of 4 sessions (sub-3)"]


def test_every_reason_is_said_once(root):
    for number in (1, 2):
        other_grid(flair(root, number))
    flair(root, 4).unlink()
    write(root / "sub-1/anat/sub-1_T2w.nii.gz", head(1)[0])
    with pytest.warns(UserWarning, match="left out") as said:
        listed(root)
    assert sorted(str(one.message).removeprefix(f"{root}: ") for one in said) == [
        "FLAIR left out: missing in 1 of 4 sessions (sub-4); not on the mask's grid in 2 of 4 sessions (sub-1, sub-2)",
        "T2w left out: missing in 3 of 4 sessions (sub-2, sub-3, sub-4)",
    ]


def test_a_name_that_speaks_of_one_image_leaves_out_the_others(root):
    for path in root.rglob("*_mask.nii.gz"):
        path.rename(path.with_name(path.name.replace("label-lesion_mask", "T1w_label-lesion_roi")))
    said = (
        r"FLAIR left out: the mask's name speaks of another image in 4 of 4 sessions \(sub-1, sub-2, sub-3, \.\.\.\)$"
    )
    with pytest.warns(UserWarning, match=said):
        assert listed(root).channels == ("T1w",)


def test_a_damaged_image_of_a_kind_that_all_have_is_an_error(root):
    flair(root, 3).write_bytes(b"nothing")
    said = rf"^{flair(root, 3)}: .*; else all cases had their FLAIR: mend it, or remove it to do without FLAIR$"
    with pytest.raises(LayoutError, match=said):
        listed(root)
    flair(root, 2).unlink()
    said = r"missing in 1 of 4 sessions \(sub-2\); cannot be read in 1 of 4 sessions \(sub-3\)$"
    with pytest.warns(UserWarning, match=said):
        assert listed(root).channels == ("T1w",)


def test_a_damaged_image_that_nobody_asks_for(root):
    """The session has another one of this kind, beside its mask."""
    flair(root, 3).write_bytes(b"nothing")
    write(root / "derivatives/sub-3/sub-3_FLAIR.nii.gz", head(3)[0])
    assert listed(root).channels == ("T1w", "FLAIR")


def test_a_damaged_mask_is_named(root):
    mask = root / "derivatives/sub-2/sub-2_label-lesion_mask.nii.gz"
    mask.write_bytes(b"nothing")
    with pytest.raises(LayoutError, match=rf"^{mask}: (?!expected an image on)"):
        listed(root)


def test_masks_that_are_links_to_nothing(root):
    for number in (2, 3):
        linked_to_nothing(root / f"derivatives/sub-{number}/sub-{number}_label-lesion_mask.nii.gz")
    with pytest.raises(LayoutError) as caught:
        listed(root)
    assert str(caught.value) == (
        f"{root}: expected lesion masks, found 2 links to nothing, such as "
        "derivatives/sub-2/sub-2_label-lesion_mask.nii.gz, which may have to be fetched first"
    )


def test_a_session_whose_images_are_all_links_to_nothing(root):
    for kind in ("FLAIR", "T1w"):
        linked_to_nothing(root / f"sub-2/anat/sub-2_{kind}.nii.gz")
    with pytest.raises(LayoutError) as caught:
        listed(root)
    assert str(caught.value) == (
        f"{root}/derivatives/sub-2/sub-2_label-lesion_mask.nii.gz: expected an image on the grid of this lesion mask, "
        "found none; 2 links to nothing, such as sub-2/anat/sub-2_FLAIR.nii.gz, which may have to be fetched first"
    )


def test_sessions_without_a_mask_that_lack_a_kind_are_counted(root):
    write(root / "sub-5/anat/sub-5_T1w.nii.gz", head(5)[0])
    with pytest.warns(UserWarning, match=r"left out are sessions without a mask, 1 of them: sub-5 lacks FLAIR$"):
        assert len(listed(root).cases) == 4
    write(flair(root, 5), head(5)[0])
    assert len(listed(root).cases) == 5


def test_the_command_says_what_was_kept(tmp_path, capsys):
    """One channel too, of the look-alike whose FLAIR has a grid of its own."""
    with pytest.warns(UserWarning, match="left out"):
        assert main(["cases", "bids", str(bids(tmp_path)), "-o", str(tmp_path / "cases.json"), "--folds", "2"]) == 0
    assert "\nimage of a case: T1w\n" in capsys.readouterr().out


def test_masks_of_other_names(root, capsys):
    for path in root.rglob("*_mask.nii.gz"):
        path.rename(path.with_name(path.name.replace("label-lesion", "space-FLAIR_label-WMH")))
    write(root / "derivatives/sub-1/sub-1_dseg.nii.gz", head(1)[1])
    with pytest.raises(LayoutError) as caught:
        listed(root)
    assert str(caught.value) == (
        f"{root}: expected lesion masks named lesion, label-lesion, label-L, desc-lesion, lesion-manual or ending in "
        "_msk, such as sub-*_label-lesion_mask.nii.gz; found none among 13 files, the first of them "
        "derivatives/sub-1/sub-1_dseg.nii.gz; for masks of other names, such as derivatives/sub-1/sub-1_dseg.nii.gz, "
        "give --mask '*_dseg.nii.gz', or make a list of two folders by `grcsf-fast cases pairs`"
    )
    found = listed(root, mask="*_space-FLAIR_label-WMH_mask.nii.gz")
    assert found.channels == ("T1w", "FLAIR")
    assert [case.masks[0].name for case in found.cases][:1] == ["sub-1_space-FLAIR_label-WMH_mask.nii.gz"]
    command = ["cases", "bids", str(root), "--mask", "*_label-WMH_mask.nii.gz", "-o", str(root / "cases.json")]
    assert main([*command, "--folds", "2"]) == 0
    assert "images of a case: 0 T1w, 1 FLAIR" in capsys.readouterr().out
    assert len(json.loads((root / "cases.json").read_text())["cases"]) == 4
    with pytest.raises(LayoutError, match=r"expected lesion masks called \*_roi\.nii; found none among"):
        listed(root, mask="*_roi.nii")
    with pytest.raises(ArgumentError, match="--mask: expected none beside nnunet"):
        list_cases_of("nnunet", [root], mask="*")
