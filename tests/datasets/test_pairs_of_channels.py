"""Lists of two folders with several channels: said as of scans, by a pattern for each; from the list to the scores."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from layouts import files, head, write

from grcsf_fast.cli import main
from grcsf_fast.datasets.folders import LayoutError
from grcsf_fast.datasets.layouts import list_cases_of
from grcsf_fast.errors import ArgumentError

SMALL = [
    *("--steps", "2", "--batch-size", "2", "--crop-size", "16,16", "--crop-size-jitter", "0", "--warmup-steps", "1"),
    *("--cache-size", "2", "--augment", "none", "--precision", "float32", "--workers", "0"),
]
TINY_MAE = [
    *("--spacing", "2,2,2", "--embed-dim", "16", "--depth", "1", "--num-heads", "2"),
    *("--decoder-dim", "16", "--decoder-num-heads", "2"),
]
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


def run(*arguments):
    return main([str(argument) for argument in arguments])


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
    said = r"expected T1w and FLAIR of every case, found 2 of 4 without: sub-2 lacks FLAIR; sub-3 lacks T1w$"
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
        with pytest.raises(LayoutError, match=said):
            listed(images, masks, *given)
    write(tmp_path / "images" / "sub-2.nii.gz", head(0)[0])
    with pytest.raises(LayoutError, match=r"sub-2\.nii\.gz: expected 2 channels .* as the fourth axis, found 1"):
        listed(images, masks, both)


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
    assert run("train-mae", *fold, "--channels", "FLAIR,T1w", "-o", out / "mae", *SMALL, *TINY_MAE) == 0
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
    arguments = ("--cases", cases, "--channels", "T1w,FLAIR", "-o", tmp_path / "mae", *SMALL, *TINY_MAE)
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
