"""Labels by the names and the choice of a list of cases, one of several labels alone, and what reports call them."""

import json

import nibabel as nib
import numpy as np
import pytest
from commands import run

from grcsf_fast.data.files import sha256
from grcsf_fast.datasets.cases_file import read_cases
from grcsf_fast.evaluation.folders import evaluate_cases
from grcsf_fast.evaluation.summary import read_results
from grcsf_fast.pretrained.bundle import load_bundle

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
SHAPE = (24, 26, 22)
OTHERS = "ignore:.*which count as background"
SMALL = [
    *("--steps", "2", "--batch-size", "2", "--crop-size", "16,16", "--warmup-steps", "1", "--cache-size", "2"),
    *("--log-every", "1", "--validate-every", "2", "--precision", "float32", "--augment", "none"),
    *("--rcu-levels", "", "--features", "4,8", "--no-gcu", "--workers", "0"),
]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, AFFINE), path)


@pytest.fixture
def folder(tmp_path):
    """Of the Decathlon: a large vessel and a small tumour, of which the list ``tumour.json`` chose the tumour."""
    items = []
    for number, name in enumerate("abcd"):
        rng = np.random.default_rng(number)
        mask = np.zeros(SHAPE, np.uint8)
        mask[6:8, 4:20, 5:16] = 1
        mask[14:17, 12:15, 8:12] = 2
        image = np.zeros(SHAPE, np.float32)
        image[3:21, 3:23, 3:19] = rng.uniform(90, 110, (18, 20, 16))
        image[mask > 0] += 30.0 * mask[mask > 0]
        write(tmp_path / "imagesTr" / f"{name}.nii.gz", image)
        write(tmp_path / "labelsTr" / f"{name}.nii.gz", mask)
        write(tmp_path / "binary" / f"{name}.nii.gz", np.where(mask == 2, 255, 0).astype(np.uint8))
        items.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
    labels = {"0": "background", "1": "Vessel", "2": "Tumour"}
    text = {"modality": {"0": "MRI"}, "labels": labels, "training": items, "test": []}
    (tmp_path / "dataset.json").write_text(json.dumps(text))
    assert run("cases", "decathlon", tmp_path, "-o", tmp_path / "all.json", "--folds", 2) == 0
    assert run("cases", "decathlon", tmp_path, "-o", tmp_path / "tumour.json", "--folds", 2, "--labels", 2) == 0
    return tmp_path


SWAPPED = "expected Vessel=1, as {} has Vessel, got Vessel=2; numbers are those of the masks: give this one, or another"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("--classes", "Vessel=2,Tumour=1"), f"--classes: {SWAPPED}"),
        (("--regions", "Vessel=2,any=1+2"), f"--regions: {SWAPPED}"),
        (("--classes", "tumour=1"), "--classes: expected tumour=2, as {} has Tumour, got tumour=1"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_names_that_contradict_the_list_are_refused(folder, capsys, command, labels, message):
    (folder / "imagesTr" / "a.nii.gz").unlink()  # before any image is read
    given = ("-o", folder / "out", *SMALL) if command == "train" else ("-p", folder / "labelsTr")
    capsys.readouterr()
    assert run(command, "--cases", folder / "all.json", *labels, *given) == 2
    assert f"error: {message.format(folder / 'all.json')}" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_choice_of_the_list_is_no_ones_to_drop(folder, capsys, command):
    given = ("-o", folder / "out", *SMALL) if command == "train" else ("-p", folder / "labelsTr")
    capsys.readouterr()
    assert run(command, "--cases", folder / "tumour.json", "--classes", "v=1,t=2", *given) == 2
    path = folder / "tumour.json"
    assert capsys.readouterr().err == (
        f"error: --classes: expected numbers among 2, which {path} was made with (`cases --labels 2`), got 1 in v; "
        "make the list again with --labels 1,2, or without it\n"
    )


def test_names_that_agree_are_taken(folder):
    """In other letters, as other regions, or as names that the list does not know."""
    for labels in (("--classes", "vessel=1,Tumour=2"), ("--regions", "Vessel=1+2,lesion=2"), ("--classes", "a=2,b=1")):
        assert run("evaluate", "--cases", folder / "all.json", *labels, "-p", folder / "labelsTr") == 0


def report(mask, labels=None):
    """Beside a mask, as ``predict`` writes it."""
    held = {"labels": {name: {"numbers": own} for name, own in labels.items()}} if labels else {}
    held["outputs"] = {mask.name: sha256(mask)}
    mask.with_name(mask.name.replace(".nii.gz", "_report.json")).write_text(json.dumps(held))


@pytest.mark.parametrize("listed", [True, False])
def test_reports_that_contradict_are_refused(folder, capsys, listed):
    report(folder / "labelsTr" / "b.nii.gz", {"Vessel": [2], "Tumour": [1]})
    truth = ("--cases", folder / "all.json") if listed else ("-t", folder / "labelsTr")
    capsys.readouterr()
    assert run("evaluate", "-p", folder / "labelsTr", *truth, "--classes", "Vessel=1,Tumour=2") == 2
    said = f"--classes: expected Vessel=2, as the report of {folder / 'labelsTr' / 'b.nii.gz'} has Vessel, got Vessel=1"
    assert said in capsys.readouterr().err
    # Of the labels that a list has chosen too.
    assert run("evaluate", "-p", folder / "labelsTr", "--cases", folder / "tumour.json") == 2
    assert "expected Tumour=1, as the report of" in capsys.readouterr().err


def dice(printed):
    return [line.partition("dice ")[2].partition(",")[0] for line in printed.splitlines() if ": dice " in line]


@pytest.mark.parametrize("reports", [False, True])
def test_predictions_are_of_the_labels_that_the_list_has_chosen(folder, capsys, reports):
    """A perfect prediction of both labels had a Dice of 0.17, with a warning that they were merged; nothing is warned
    of what the list leaves out. In Python the same.
    """
    if reports:
        report(folder / "labelsTr" / "a.nii.gz", {"Vessel": [1], "Tumour": [2]})
    else:  # of the first label alone: the others say that it is one of several
        mask = np.asarray(nib.load(folder / "labelsTr" / "c.nii.gz").dataobj)
        write(folder / "predicted" / "c.nii.gz", np.where(mask == 1, 1, 0).astype(np.uint8))
    for name in "abd" if not reports else "":
        (folder / "predicted" / f"{name}.nii.gz").write_bytes((folder / "labelsTr" / f"{name}.nii.gz").read_bytes())
    predicted = folder / ("labelsTr" if reports else "predicted")
    capsys.readouterr()
    out = folder / "out"
    assert run("evaluate", "-p", predicted, "--cases", folder / "tumour.json", "-o", out, "--no-page") == 0
    printed = capsys.readouterr().out
    assert f"of the predictions the labels 2 count, as {folder / 'tumour.json'} has chosen\n" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["dice"]["mean"] == (1 if reports else 0.75)
    assert "labels" not in summary
    listing = read_cases(folder / "tumour.json")
    found = evaluate_cases(predicted, listing, [case for case in listing.cases if case.masks])
    assert found.by_label == {}
    for name, row in read_results(out)[0].items():
        assert found.results[name] == pytest.approx(row, rel=1e-12, nan_ok=True)
    assert found.chosen is not None
    assert found.chosen.every == (2,)


def test_a_number_that_neither_list_nor_truth_knows(folder):
    """Of a prediction it is warned of, whatever the list has chosen."""
    for name in "abcd":
        mask = np.asarray(nib.load(folder / "labelsTr" / f"{name}.nii.gz").dataobj).astype(np.uint8)
        mask[0, 0, 0] = 7
        write(folder / "predicted" / f"{name}.nii.gz", mask)
    listing = read_cases(folder / "tumour.json")
    with pytest.warns(UserWarning, match="^predicted masks: expected the numbers 2 of the labels, found 7 too"):
        evaluate_cases(folder / "predicted", listing, [case for case in listing.cases if case.masks])


@pytest.mark.parametrize("kind", ["255", "1", "report"])
def test_predictions_of_one_kind_of_lesion_count_as_they_are(folder, capsys, kind):
    """Whose number says nothing about the labels of the truth."""
    for path in (folder / "binary").glob("*.nii.gz"):
        mask = np.asarray(nib.load(path).dataobj)
        write(path, np.where(mask, 255 if kind == "255" else 1, 0).astype(np.uint8))
        if kind == "report":
            report(path)
    capsys.readouterr()
    assert run("evaluate", "-p", folder / "binary", "--cases", folder / "tumour.json") == 0
    assert dice(capsys.readouterr().out) == ["1"] * 4


@pytest.mark.filterwarnings(OTHERS)
@pytest.mark.parametrize(("labels", "outputs"), [(("--classes", "Tumour=2"), 2), (("--regions", "Tumour=2"), 1)])
@pytest.mark.parametrize("listed", [True, False])
def test_one_label_of_several_is_trained_and_scored_by_name(folder, capsys, labels, outputs, listed):
    cases = ("--cases", folder / "all.json", "--fold", 0)
    given = cases if listed else ("-i", folder / "imagesTr", "-l", folder / "labelsTr", "--validation", 1)
    assert run("train", *given, *labels, *SMALL, "-o", folder / "net") == 0
    assert "of no label, and so background, are the numbers 1 of masks" in capsys.readouterr().out
    bundle = load_bundle(folder / "net" / "bundle")
    assert (bundle.labels.names, bundle.labels.numbers) == (("Tumour",), ((2,),))
    assert bundle.network.config["out_channels"] == outputs
    assert run("predict", *cases, "-m", folder / "net" / "bundle", "-o", folder / "predicted") == 0
    for path in (folder / "predicted").glob("*_report.json"):
        found = json.loads(path.read_text())
        mask = np.asarray(nib.load(path.with_name(path.name.replace("_report.json", ".nii.gz"))).dataobj)
        assert set(np.unique(mask)) <= {0, 2}
        assert found["labels"]["Tumour"]["total_volume_ml"] == pytest.approx((mask == 2).sum() * 0.008, abs=1e-3)
    capsys.readouterr()
    assert run("evaluate", *cases, *labels, "-p", folder / "labelsTr", "-o", folder / "scores") == 0
    printed = capsys.readouterr().out
    assert "Tumour: dice: mean 1.0000" in printed
    assert dice(printed) == ["1", "1"]
