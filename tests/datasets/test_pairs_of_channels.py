"""Lists of two folders with several channels: said as of scans, by a pattern for each; from the list to the scores."""

import csv
import json
import shlex

import nibabel as nib
import numpy as np
import pytest
from commands import TINY_MAE, run
from layouts import files, head, write

from grcsf_fast.datasets.folders import LayoutError
from grcsf_fast.datasets.layouts import list_cases_of
from grcsf_fast.errors import ArgumentError

SMALL = [
    *("--steps", "2", "--batch-size", "2", "--crop-size", "16,16", "--crop-size-jitter", "0", "--warmup-steps", "1"),
    *("--cache-size", "2", "--augment", "none", "--precision", "float32", "--workers", "0"),
]
MAE = ["--spacing", "2,2,2", *TINY_MAE]
RECIPE = {
    **{"steps": 2, "batch-size": 2, "crop-size": [16, 16], "crop-size-jitter": 0, "warmup-steps": 1, "cache-size": 2},
    **{"augment": "none", "precision": "float32", "channels": "T1w,FLAIR"},
}
# How four forms are written: the image of a channel, or None for a file of both; the mask; and how the command says it.
FORMS = {
    "a folder for each channel": (
        "{channel}/{case}.nii.gz", "masks/{case}.nii.gz",
        (".", "masks", "T1w=T1w/*.nii.gz", "FLAIR=FLAIR/*.nii.gz"),
    ),
    "nnU-Net's suffixes": (
        "images/{case}_{number:04d}.nii.gz", "masks/{case}.nii.gz",
        ("images", "masks", "T1w=*_0000.nii.gz", "FLAIR=*_0001.nii.gz"),
    ),
    "4-D files": (None, "masks/{case}.nii.gz", ("images", "masks", "T1w,FLAIR=*.nii.gz")),
    "a folder for each case": (
        "data/{case}/{case}_{channel}.nii.gz", "data/{case}/{case}_seg.nii.gz",
        ("data", "data", "T1w=*_T1w.nii.gz", "FLAIR=*_FLAIR.nii.gz", "--mask", "*_seg.nii.gz"),
    ),
}  # fmt: skip


def data(root, form, cases=("sub-1", "sub-2", "sub-3", "sub-4")):
    """Cases whose FLAIR is bright where T1w is dark."""
    image_at, mask_at, said = FORMS[form]
    for number, case in enumerate(cases):
        t1, mask = head(number, (8, 9, 7))
        both = {"T1w": t1, "FLAIR": np.where(mask > 0, 150, t1).astype(np.float32)}
        if image_at is None:
            write(root / "images" / f"{case}.nii.gz", np.stack([*both.values()], 3))
        else:
            for place, (channel, image) in enumerate(both.items()):
                write(root / image_at.format(case=case, channel=channel, number=place), image)
        write(root / mask_at.format(case=case), mask)
    return [str(root / said[0]), str(root / said[1]), *said[2:]]


def listed(*roots, mask=None, **changes):
    return list_cases_of("pairs", roots, folds=2, mask=mask, **changes)[0]


def voxels(image):
    """Mean of a listed image in its lesion, which tells the channels apart."""
    found = nib.load(getattr(image, "path", image)).get_fdata()
    return (found[..., image.channel] if found.ndim == 4 else found)[8:12, 9:13, 7:11].mean()


@pytest.mark.parametrize("form", FORMS)
def test_ways_that_channels_lie(tmp_path, form):
    roots = data(tmp_path, form)
    mask = roots.pop() if "--mask" in roots else None
    listing = listed(*(root for root in roots if root != "--mask"), mask=mask)
    assert listing.channels == ("T1w", "FLAIR")
    assert [case.name for case in listing.cases] == ["sub-1", "sub-2", "sub-3", "sub-4"]
    assert {case.fold for case in listing.cases} == {0, 1}
    for case in listing.cases:
        assert [voxels(image) for image in case.images] == [50, 150]
        assert all(case.name in str(image) for image in case.images)
        assert case.lesion_ml == pytest.approx(0.512)
        assert len(case.masks) == 1


def test_in_the_order_that_they_are_named_and_some_of_them(tmp_path):
    images, masks, first, second = data(tmp_path, "a folder for each channel")
    assert listed(images, masks, second, first).channels == ("FLAIR", "T1w")
    alone = listed(images, masks, second)
    assert (alone.channels, len(alone.cases[0].images)) == (("FLAIR",), 1)
    assert listed(images, masks, first, second, channel=1).channels == ("FLAIR",)


def test_a_mask_of_a_pattern_for_images_without_names(tmp_path):
    data(tmp_path, "a folder for each channel")
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_name(path.name.replace(".nii", "_lesion.nii")))
    listing = listed(tmp_path / "T1w", tmp_path, mask="masks/*_lesion.nii.gz")
    assert listing.channels == ("image",)
    assert [case.masks[0].name[:5] for case in listing.cases] == [case.name for case in listing.cases]


def test_a_missing_channel_and_a_missing_mask_are_named(tmp_path):
    roots = data(tmp_path, "a folder for each channel")
    (tmp_path / "FLAIR" / "sub-2.nii.gz").unlink()
    (tmp_path / "T1w" / "sub-3.nii.gz").unlink()
    said = r"expected T1w and FLAIR of every case, found 2 of 4 without: sub-2 lacks FLAIR; sub-3 lacks T1w; move "
    with pytest.raises(LayoutError, match=said):
        listed(*roots)
    roots = data(tmp_path, "a folder for each channel")
    (tmp_path / "masks" / "sub-4.nii.gz").unlink()
    with pytest.raises(LayoutError, match=r"expected a mask .*; found sub-1\.nii\.gz, but not sub-4$"):
        listed(*roots)
    with pytest.raises(LayoutError, match=r"expected a mask called \*\.nii of every case; found none"):
        listed(*roots, mask="*.nii")


def test_cases_of_one_name(tmp_path):
    """They are called by their paths, images and masks alike."""
    for site in "ab":
        data(tmp_path / "in" / site, "a folder for each channel", ["s1", "s2"])
    patterns, mask = ("T1w=T1w/*.nii.gz", "FLAIR=FLAIR/*.nii.gz"), "masks/*.nii.gz"
    with pytest.warns(UserWarning, match="several are called s1, so all cases are called by their paths"):
        cases = listed(tmp_path / "in", tmp_path / "in", *patterns, mask=mask).cases
    assert [case.name for case in cases] == ["a_s1", "a_s2", "b_s1", "b_s2"]
    assert all(f"/{case.name[0]}/masks/{case.name[2:]}" in str(case.masks[0]) for case in cases)
    for folder in ("T1w", "FLAIR", "masks"):
        for name in ("b", "b_s1"):
            write(tmp_path / "in" / name / folder / ("s1_s2.nii.gz" if name == "b" else "s2.nii.gz"), head(0)[0])
    with (
        pytest.warns(UserWarning, match="called by their paths"),
        pytest.raises(LayoutError, match="expected a name of its own for every case, found b_s1_s2 several times"),
    ):
        listed(tmp_path / "in", tmp_path / "in", *patterns, mask=mask)


def test_two_masks_of_a_case_are_refused(tmp_path):
    *roots, _, pattern = data(tmp_path, "a folder for each case")
    files(tmp_path / "data" / "sub-2", "sub-2__seg.nii.gz")
    with pytest.raises(LayoutError, match=r"expected one mask of sub-2, found .*/sub-2__seg\.nii\.gz and .*/sub-2_seg"):
        listed(*roots, mask=pattern)


SESSIONS = ("T1w=*_T1w.nii.gz", "FLAIR=*_FLAIR.nii.gz")


def session(folder, name, mask=True):
    """A case of two channels in a folder of its own."""
    image, lesion = head(0, (8, 9, 7))
    for channel in ("T1w", "FLAIR"):
        write(folder / f"{name}_{channel}.nii.gz", image)
    if mask:
        write(folder / f"{name}_seg.nii.gz", lesion)


def test_a_mask_of_another_session_is_none_of_the_case(tmp_path):
    session(tmp_path / "pat01" / "ses1", "pat01")
    session(tmp_path / "pat02" / "ses1", "pat02", mask=False)
    write(tmp_path / "pat02" / "ses2" / "pat02_seg.nii.gz", head(0, (8, 9, 7))[1])
    said = r"but not pat02 \(pat02/ses2/pat02_seg\.nii\.gz lies in another folder than its images, pat02/ses1\)$"
    for masks in (tmp_path, tmp_path / "pat02" / ".."):
        with pytest.raises(LayoutError, match=said):
            listed(tmp_path, masks, *SESSIONS, mask="*_seg.nii.gz")
    session(tmp_path / "pat01" / "ses2", "pat01")  # so that all are called by their paths
    said = r"not pat02_ses1_pat02 \(pat02/ses2/pat02_seg\.nii\.gz is of pat02_ses2_pat02\)$"
    with pytest.warns(UserWarning, match="called by their paths"), pytest.raises(LayoutError, match=said):
        listed(tmp_path, tmp_path, *SESSIONS, mask="*_seg.nii.gz")


def test_predictions_elsewhere_are_no_masks(tmp_path):
    """Neither beside a mask nor in the place of one; below the images' folder or above it."""
    for name in ("pat01", "pat02"):
        session(tmp_path / "in" / name, name)
        write(tmp_path / "in" / "pseudo" / "out" / f"{name}_seg.nii.gz", head(0, (8, 9, 7))[1])
    for masks in (tmp_path / "in", tmp_path):
        cases = listed(tmp_path / "in", masks, *SESSIONS, mask="*_seg.nii.gz").cases
        assert [case.masks[0].parent.name for case in cases] == ["pat01", "pat02"]
    (tmp_path / "in" / "pat01" / "pat01_seg.nii.gz").unlink()
    with pytest.raises(LayoutError, match=r"but not pat01 \(pseudo/out/pat01_seg\.nii\.gz lies in another folder"):
        listed(tmp_path / "in", tmp_path / "in", *SESSIONS, mask="*_seg.nii.gz")


def test_masks_in_other_folders_below_a_root_of_their_own(tmp_path):
    """They go by their names, where one has it."""
    for name in ("pat01", "pat02"):
        session(tmp_path / "images" / name, name, mask=False)
        write(tmp_path / "masks" / "second" / f"{name}_seg.nii.gz", head(0, (8, 9, 7))[1])
    roots = (tmp_path / "images", tmp_path / "masks", *SESSIONS)
    assert [case.masks[0].name for case in listed(*roots, mask="*_seg.nii.gz").cases] == [
        "pat01_seg.nii.gz", "pat02_seg.nii.gz",
    ]  # fmt: skip
    write(tmp_path / "masks" / "third" / "pat01_seg.nii.gz", head(0, (8, 9, 7))[1])
    with pytest.raises(LayoutError, match=r"expected one mask of pat01, found .*second/pat01.* and .*third/pat01"):
        listed(*roots, mask="*_seg.nii.gz")


def test_masks_whose_paths_say_the_session_in_their_names(tmp_path):
    for name in ("pat01/ses1", "pat02/ses1", "pat02/ses2"):
        session(tmp_path / name, "", mask=False)
        write(tmp_path / "masks" / f"{name.replace('/', '_')}_seg.nii.gz", head(0, (8, 9, 7))[1])
    cases = listed(tmp_path, tmp_path, *SESSIONS, mask="masks/*_seg.nii.gz").cases
    assert [case.masks[0].name[:10] for case in cases] == ["pat01_ses1", "pat02_ses1", "pat02_ses2"]


def test_sessions_of_a_patient_are_in_one_fold(tmp_path):
    """A folder for each patient is the subject, also below one that all share."""
    image, lesion = head(0, (8, 9, 7))
    for patient in range(6):
        for name in ("ses1", "ses2"):
            for file in ("T1w", "FLAIR"):
                write(tmp_path / "longi" / f"pat{patient:02d}" / name / f"{file}.nii.gz", image)
            write(tmp_path / "longi" / f"pat{patient:02d}" / name / "mask.nii.gz", lesion)
    for root in (tmp_path / "longi", tmp_path):
        roots = (root, root, "T1w=T1w.nii.gz", "FLAIR=FLAIR.nii.gz")
        cases = list_cases_of("pairs", roots, folds=3, mask="mask.nii.gz")[0].cases
        assert len(cases) == 12
        assert {case.subject for case in cases} == {f"pat{patient:02d}" for patient in range(6)}
        assert len({(case.subject, case.fold) for case in cases}) == 6
    with pytest.raises(ArgumentError, match=r"at most 6, the .* \(pat00, pat01, pat02, \.\.\.\), got 7$"):
        list_cases_of("pairs", roots, folds=7, mask="mask.nii.gz")


def test_a_mask_of_another_name_is_named(tmp_path):
    for patient in ("pat00", "pat01"):
        session(tmp_path / patient, "", mask=False)
        write(tmp_path / patient / "seg" / "lesion.nii.gz", head(0, (8, 9, 7))[1])
    with pytest.raises(
        LayoutError, match=r"found none; missing: pat00 \(pat00/seg/lesion\.nii\.gz is of pat00_seg\) and 1 more$"
    ):
        listed(tmp_path, tmp_path, *SESSIONS, mask="lesion.nii.gz")
    assert len(listed(tmp_path, tmp_path, *SESSIONS, mask="seg/lesion.nii.gz").cases) == 2


def test_images_are_not_their_own_masks(tmp_path):
    *roots, _, _ = data(tmp_path, "a folder for each case")
    with pytest.raises(LayoutError, match="found the images themselves as masks of sub-1, sub-2"):
        listed(*roots, mask="*_FLAIR.nii.gz")
    images, _, both = data(tmp_path, "4-D files")
    with pytest.raises(LayoutError, match="found the images themselves as masks of sub-1, sub-2"):
        listed(images, images, both)


def test_files_of_other_numbers_of_channels(tmp_path):
    images, masks, both = data(tmp_path, "4-D files")
    with pytest.raises(
        LayoutError, match=r"sub-1\.nii\.gz: expected 3 channels \(a, b, c\) as the fourth axis, found 2"
    ):
        listed(images, masks, "a,b,c=*.nii.gz")
    said = r"sub-1\.nii\.gz: expected one image, found 2 along its fourth axis and 3 more files of several; "
    for given in ((), ("T1w=*.nii.gz",)):
        with pytest.raises(LayoutError, match=said) as caught:
            listed(images, masks, *given, mask="*.nii.gz")
        command = str(caught.value).split("`")[1]
        assert f"{images} {masks} {'T1w_0,T1w_1' if given else 'image_0,image_1'}='*.nii.gz' --mask" in command
        assert run(*shlex.split(command)[1:-1], tmp_path / "cases.json", "--folds", 2) == 0
    write(tmp_path / "images" / "sub-2.nii.gz", head(0)[0])
    with pytest.raises(LayoutError, match=r"sub-2\.nii\.gz: expected 2 channels .* as the fourth axis, found 1"):
        listed(images, masks, both)


def test_names_that_a_channel_cannot_have(tmp_path):
    images, masks, *_ = data(tmp_path, "a folder for each channel")
    said = r"3D-T1=\*\.nii: expected as name of a channel first a letter, then letters, digits, _ or -, got '3D-T1'$"
    with pytest.raises(ArgumentError, match=said):
        listed(images, masks, "T1w=T1w/*.nii.gz", "3D-T1=*.nii")


@pytest.mark.parametrize("given", [("*.nii.gz",), ("T1w=T1w/*.nii.gz", "FLAIR/*.nii.gz"), ("T1w,T1w=*.nii.gz",)])
def test_patterns_without_names_of_their_own(tmp_path, given):
    images, masks, *_ = data(tmp_path, "a folder for each channel")
    with pytest.raises(ArgumentError, match="pairs: expected after IMAGES MASKS a pattern for each channel"):
        listed(images, masks, *given)


def test_channels_of_4_d_scans_are_said_the_same_way(tmp_path):
    images, *_, both = data(tmp_path, "4-D files")
    listing, _ = list_cases_of("scans", [images, both])
    assert listing.channels == ("T1w", "FLAIR")
    assert [[voxels(image) for image in case.images] for case in listing.cases] == [[50, 150]] * 4


@pytest.mark.parametrize("form", ["4-D files", "a folder for each case"])
def test_from_the_list_to_the_scores(tmp_path, form, capsys):
    said = data(tmp_path, form)
    cases, out = tmp_path / "cases.json", tmp_path / "out"
    assert run("cases", "pairs", *said, "-o", cases, "--folds", 2) == 0
    assert "images of a case: 0 T1w, 1 FLAIR; " in capsys.readouterr().out
    fold = ("--cases", cases, "--fold", 0)
    assert run("train-mae", *fold, "--channels", "FLAIR,T1w", "-o", out / "mae", *SMALL, *MAE) == 0
    network = ("--features", "4,8", "--rcu-levels", "0", "--mae", out / "mae" / "bundle")
    assert run("train", *fold, "-o", out / "net", *SMALL, *network) == 0
    assert run("predict", *fold, "-m", out / "net" / "bundle", "-o", out / "predicted") == 0
    reports = sorted((out / "predicted").glob("*_report.json"))
    assert len(reports) == 2
    for path in reports:
        assert [one["channel"] for one in json.loads(path.read_text())["inputs"]] == ["FLAIR", "T1w"]
    assert run("evaluate", *fold, "-p", out / "predicted", "-o", out / "scores") == 0
    with (out / "scores" / "cases.csv").open(newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == [path.name[:5] for path in reports]


def test_a_channel_on_another_grid_is_named_by_the_training(tmp_path, capsys):
    said = data(tmp_path, "a folder for each channel")
    write(tmp_path / "FLAIR" / "sub-3.nii.gz", head(2)[0][:, :, ::2])
    cases = tmp_path / "cases.json"
    assert run("cases", "pairs", *said, "-o", cases, "--folds", 2) == 0
    capsys.readouterr()
    arguments = ("--cases", cases, "--channels", "T1w,FLAIR", "-o", tmp_path / "mae", *SMALL, *MAE)
    assert run("train-mae", *arguments) == 2
    said = capsys.readouterr().err
    assert "1 of 4 cases cannot be used" in said
    assert "sub-3: channel 1 (FLAIR): " in said


@pytest.mark.slow
def test_every_fold_by_a_recipe(tmp_path):
    cases, out = tmp_path / "cases.json", tmp_path / "out"
    assert run("cases", "pairs", *data(tmp_path, "nnU-Net's suffixes"), "-o", cases, "--folds", 2) == 0
    mae = {"embed-dim": 16, "depth": 1, "num-heads": 2, "decoder-dim": 16, "decoder-num-heads": 2}
    recipe = {
        "format": "grcsf-fast recipe", "version": 1, "trainings": RECIPE,
        "train-mae": mae | {"spacing": [2, 2, 2]}, "train": {"features": [4, 8], "rcu-levels": [0]},
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert run("crossval", "--recipe", tmp_path / "recipe.json", "--cases", cases, "-o", out, "--device", "cpu") == 0
    rows = json.loads((out / "table.json").read_text())
    assert rows["failed_folds"] == {}
    assert {fold: found["cases"] for fold, found in rows["folds"].items()} == {"0": 2, "1": 2}
