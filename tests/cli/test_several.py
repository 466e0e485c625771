"""Two channels and three labels, from files to metrics."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from commands import TINY_MAE, run

from grcsf_fast.data.channels import find_images

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
SHAPE = (24, 26, 22)
CLASSES = "oedema=1,core=2,rim=3"
SMALL = [
    *("--steps", "2", "--batch-size", "2", "--crop-size", "16,16", "--crop-size-jitter", "0", "--warmup-steps", "1"),
    *("--cache-size", "2", "--log-every", "1", "--validate-every", "2", "--precision", "float32", "--augment", "none"),
]


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate("abcd"):
        rng = np.random.default_rng(number)
        mask = np.zeros(SHAPE, np.uint8)
        for label, corner in enumerate(((6, 6, 6), (10, 8, 8), (14, 14, 10)), start=1):
            mask[tuple(slice(first, first + 4) for first in corner)] = label
        for channel in range(2):
            image = np.zeros(SHAPE, np.float32)
            image[3:21, 3:23, 3:19] = rng.uniform(90, 110, (18, 20, 16))
            image[mask > 0] += 20.0 * mask[mask > 0] * (1 - 2 * channel)
            write(tmp_path / "imagesTr" / f"{name}_{channel:04d}.nii.gz", image)
        write(tmp_path / "labelsTr" / f"{name}.nii.gz", mask)
    text = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "oedema": 1, "core": 2, "rim": 3},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(text))
    return tmp_path


def write(path, data):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(data, AFFINE), path)


@pytest.mark.parametrize(
    ("listed", "labels", "modality"),
    [
        pytest.param(True, ("--classes", CLASSES), "mri", marks=pytest.mark.slow),
        (False, ("--regions", "whole=1+2+3,core=2+3,rim=3"), "mri,ct"),
    ],
)
def test_end_to_end(folder, listed, labels, modality, capsys):
    images, masks, out = folder / "imagesTr", folder / "labelsTr", folder / "out"
    if modality == "mri,ct":
        for path in images.glob("*_0001.nii.gz"):
            values = np.asarray(nib.load(path).dataobj)
            write(path, np.where(values, values - 60, -1000))
    assert run("cases", "nnunet", folder, "-o", folder / "cases.json", "--folds", 2) == 0
    case_list = ("--cases", folder / "cases.json", "--fold", 0)
    channels = ("--channels", "T1,FLAIR", "--modality", modality)
    given = case_list if listed else ("-i", images)
    assert run("train-mae", *given, *channels, "-o", out / "mae", *SMALL, *TINY_MAE) == 0
    given = case_list if listed else ("-i", images, "-l", masks, "--validation", 1)
    network = ("--features", "4,8,8", "--rcu-levels", "1", "--mae", out / "mae" / "bundle")
    assert run("train", *given, *labels, "-o", out / "other", *SMALL, *network, "--channels", "FLAIR,T1") == 2
    assert "(T1, FLAIR), which its networks know them by, got FLAIR, T1" in capsys.readouterr().err
    assert run("train", *given, *labels, "-o", out / "net", *SMALL, *network) == 0
    given = case_list if listed else ("-i", images)
    assert run("predict", *given, "-m", out / "net" / "bundle", "-o", out / "predicted") == 0
    settings = json.loads((out / "net" / "bundle" / "config.json").read_text())["preprocessing"]
    channel_settings = [settings, *settings.get("others", [settings])]
    assert [one["modality"] for one in channel_settings] == (["mri", "mri"] if listed else ["mri", "ct"])
    name = next((out / "predicted").glob("*_report.json")).name.removesuffix("_report.json")
    report = json.loads((out / "predicted" / f"{name}_report.json").read_text())
    mask = np.asarray(nib.load(out / "predicted" / f"{name}.nii.gz").dataobj)
    assert mask.shape == SHAPE
    assert set(np.unique(mask)) <= {0, 1, 2, 3}
    assert [one["channel"] for one in report["inputs"]] == ["T1", "FLAIR"]
    for one in report["labels"].values():
        assert one["total_volume_ml"] == pytest.approx(np.isin(mask, one["numbers"]).sum() * 0.008, abs=1e-3)
    given = case_list if listed else ("-t", masks)
    with (out / "predicted" / "summary.csv").open(newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["case"] == name]
    for label, one in [("", report), *((f"{label}_", one) for label, one in report["labels"].items())]:
        for key in ("lesion_count", "total_volume_ml"):
            assert float(row[label + key]) == one[key]
    assert run("evaluate", "-p", out / "predicted", *given, *labels, "-o", out / "scores") == 0
    truth = np.asarray(nib.load(masks / f"{name}.nii.gz").dataobj)
    rows = list(csv.DictReader((out / "scores" / "labels.csv").open(newline="")))
    for label, one in report["labels"].items():
        (row,) = [row for row in rows if (row["case"], row["label"]) == (name, label)]
        found, true = (np.isin(values, one["numbers"]) for values in (mask, truth))
        dice = 2 * (found & true).sum() / (found.sum() + true.sum())
        assert float(row["dice"]) == pytest.approx(dice)
        assert float(row["truth_ml"]) == pytest.approx(true.sum() * 0.008)


def test_crossval_has_a_table_for_each_label(folder, capsys):
    """Of folds whose scores are there; predicted is what the truth is, without core in one case."""
    cases, out = folder / "cases.json", folder / "out"
    assert run("cases", "nnunet", folder, "-o", cases, "--folds", 2) == 0
    predicted = folder / "predicted"
    for name in "abcd":
        mask = np.asarray(nib.load(folder / "labelsTr" / f"{name}.nii.gz").dataobj).copy()
        if name == "b":
            mask[mask == 2] = 0
        write(predicted / f"{name}.nii.gz", mask)
    recipe = {"format": "grcsf-fast recipe", "version": 1, "evaluate": {"classes": CLASSES}}
    recipe |= {"trainings": {"channels": "T1,FLAIR"}, "train": {"classes": CLASSES}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    chosen = ("--recipe", folder / "recipe.json", "--cases", cases)
    for fold in range(2):
        scores = out / f"fold{fold}" / "scores"
        assert run("evaluate", *chosen, "--fold", fold, "-p", predicted, "-o", scores) == 0
    capsys.readouterr()
    assert run("crossval", *chosen, "-o", out) == 0
    printed = capsys.readouterr().out
    assert "All labels together:" in printed
    lines = (out / "table.md").read_text().splitlines()
    assert [line for line in lines if line.endswith(":")] == ["All labels together:", "oedema:", "core:", "rim:"]
    assert [line.split("|")[6].strip() for line in lines if line.startswith("| all ")][1:] == [
        "1.000 ± 0.000 (1.000)", "0.750 ± 0.500 (1.000)", "1.000 ± 0.000 (1.000)"
    ]  # fmt: skip
    table = json.loads((out / "table.json").read_text())
    assert table["labels"]["core"]["rows"][0]["missed"] == 1
    means = [fold["mean_dice_of_labels"]["core"] for fold in table["folds"].values()]
    assert sorted(means) == [0.5, 1]
    assert {fold["mean_dice_of_labels"]["rim"] for fold in table["folds"].values()} == {1}


def test_a_missing_channel_is_named(folder):
    (folder / "imagesTr" / "b_0001.nii.gz").unlink()
    cases, problems = find_images(folder / "imagesTr", 2)
    assert sorted(cases) == ["a", "c", "d"]
    assert "b: expected channel 1 in" in str(problems["b"])
