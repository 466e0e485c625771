"""Calcium of predictions that name arteries: an artery's figures count its own label, the others any."""

import json

import nibabel as nib
import numpy as np
import pytest
from commands import run
from layouts import orcascore

from grcsf_fast.data.files import sha256
from grcsf_fast.data.images import open_image, read_voxels
from grcsf_fast.data.labels import Labels
from grcsf_fast.datasets.cases_file import read_cases
from grcsf_fast.evaluation.calcium import agatston, compare_calcium, summarize_calcium
from grcsf_fast.evaluation.calcium_files import evaluate_calcium
from grcsf_fast.evaluation.summary import read_results

ARTERIES = {1: "LAD", 2: "LCX", 3: "RCA"}
CLASSES = {"LAD": [1], "LCX": [2], "RCA": [3]}
RIGHT, PERMUTED = {1: 1, 2: 2, 3: 3}, {1: 3, 2: 1, 3: 2}
OF_AN_ARTERY = 3 * 4 * 4  # 3 voxels of 2 x 2 x 3 mm, 400 HU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("orcascore")
    assert run("cases", "orcascore", orcascore(root), "-o", root / "cases.json", "--folds", 2) == 0
    lad = ("cases", "orcascore", root / "Challenge_data", "-o", root / "lad.json", "--folds", 2, "--labels", 1)
    assert run(*lad) == 0
    return root


def predict(folder, output, numbers, labels=None):
    """Masks of all cases, the reference's own with other numbers, and reports that name labels; None: no reports."""
    output.mkdir()
    for case in read_cases(folder / "cases.json").cases:
        if not case.masks:
            continue
        reference = open_image(case.masks[0])
        mask = np.asarray([0, *(numbers[artery] for artery in ARTERIES)], np.uint8)[read_voxels(reference).astype(int)]
        nib.save(nib.Nifti1Image(mask, reference.affine), output / f"{case.name}.nii.gz")
        if labels is not None:
            file = output / f"{case.name}.nii.gz"
            report = {"case": case.name, "input": "", "lesion_count": 3, "outputs": {file.name: sha256(file)}}
            report["labels"] = {name: {"numbers": own} for name, own in labels.items()}
            (output / f"{case.name}_report.json").write_text(json.dumps(report))
    return output


def evaluated(folder, predicted, tmp_path):
    command = ("evaluate", "--cases", folder / "cases.json", "-p", predicted, "--calcium", "-o", tmp_path / "scores")
    # Otherwise masks of several labels are merged with a warning, which is an error here.
    assert run(*command, "--classes", "LAD=1,LCX=2,RCA=3") == 0
    measures = json.loads((tmp_path / "scores" / "summary.json").read_text())["calcium"]
    return measures, read_results(tmp_path / "scores")[1]


def test_of_arrays():
    """LAD is found in part, its other half is called RCA, and LCX is invented in a true RCA."""
    hu = np.full((12, 12, 4), 40.0, np.float32)
    truth, predicted = np.zeros(hu.shape, np.uint8), np.zeros(hu.shape, np.uint8)
    truth[1:5, 1:3, 1], truth[8:10, 8:10, 2] = 1, 3
    predicted[1:3, 1:3, 1], predicted[3:5, 1:3, 1], predicted[8:10, 8:10, 2] = 1, 3, 2
    hu[truth > 0] = 250
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    row = compare_calcium(predicted, truth, hu, affine, ARTERIES, labelled=True)
    blind = compare_calcium(predicted > 0, truth, hu, affine, ARTERIES)
    together = {name: value for name, value in row.items() if name.partition("_")[0] not in ARTERIES.values()}
    assert blind | together == blind
    of = {name: {key.removeprefix(f"{name}_"): row[key] for key in row if key.startswith(name)} for name in CLASSES}
    assert of["LAD"] == pytest.approx(
        {
            "agatston_true": 16, "lesions_true": 1, "lesions_found": 1, "true_mm3": 24, "both_mm3": 12,
            "agatston_predicted": 8, "lesions_predicted": 1, "lesions_false": 0, "predicted_mm3": 12,
        }
    )  # fmt: skip
    assert (of["LCX"]["lesions_true"], of["LCX"]["lesions_predicted"], of["LCX"]["lesions_false"]) == (0, 1, 1)
    assert (of["RCA"]["lesions_found"], of["RCA"]["lesions_predicted"], of["RCA"]["lesions_false"]) == (0, 1, 1)
    assert of["RCA"]["agatston_predicted"] == pytest.approx(agatston(predicted == 3, hu, affine))
    found = summarize_calcium([row], list(CLASSES))
    assert (found["arteries"]["LAD"]["sensitivity"], found["arteries"]["LAD"]["ppv"]) == (1, 1)
    assert (found["arteries"]["LAD"]["volume_sensitivity"], found["arteries"]["LAD"]["volume_ppv"]) == (0.5, 1)
    assert (found["arteries"]["RCA"]["sensitivity"], found["arteries"]["RCA"]["ppv"]) == (0, 0)
    assert found["lesions"]["sensitivity"] == found["lesions"]["ppv"] == 1
    assert summarize_calcium([row, blind], list(CLASSES))["arteries"]["LAD"].keys() == {
        "lesions", "sensitivity", "volume_sensitivity"
    }  # fmt: skip


@pytest.mark.parametrize(("numbers", "share"), [(RIGHT, 1.0), (PERMUTED, 0.0)], ids=["right", "permuted"])
def test_predictions_whose_reports_name_arteries(folder, tmp_path, capsys, numbers, share):
    predicted = predict(folder, tmp_path / "predicted", numbers, CLASSES)
    measures, calcium = evaluated(folder, predicted, tmp_path)
    assert measures["lesions"] == measures["volume"] == {"sensitivity": 1.0, "ppv": 1.0, "f1": 1.0}
    for name in CLASSES:
        own = measures["arteries"][name]
        assert (own["sensitivity"], own["ppv"], own["volume_sensitivity"], own["volume_ppv"]) == (share,) * 4
        assert own["agatston_true"] == own["agatston_predicted"] == pytest.approx(OF_AN_ARTERY)
    row = calcium["TRV1P1"]
    assert (row["LAD_lesions_true"], row["LAD_lesions_predicted"], row["LAD_lesions_false"]) == (1, 1, 1 - share)
    assert row["LAD_agatston_predicted"] == pytest.approx(OF_AN_ARTERY)
    said = capsys.readouterr().out
    assert "| artery, by its label | lesions | sensitivity | PPV " in said
    assert f"| LAD                  | 6       | {share:.3f} " in said


def test_predictions_of_one_label_say_nothing_of_arteries(folder, tmp_path, capsys):
    predicted = predict(folder, tmp_path / "predicted", {1: 1, 2: 1, 3: 1})
    evaluate = ("evaluate", "--cases", folder / "cases.json", "-p", predicted, "--calcium", "-o", tmp_path / "scores")
    assert run(*evaluate) == 0
    measures = json.loads((tmp_path / "scores" / "summary.json").read_text())["calcium"]
    assert measures["arteries"]["LAD"] == {"lesions": 6, "sensitivity": 1.0, "volume_sensitivity": 1.0}
    assert "LAD_agatston_predicted" not in read_results(tmp_path / "scores")[1]["TRV1P1"]
    assert "| true artery, by any prediction | lesions | sensitivity | of volume |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "labelled"),
    [
        (Labels(("LAD", "LCX", "RCA"), ((1,), (2,), (3,))), True),
        (Labels(("any", "LAD", "LCX"), ((1, 2, 3), (1,), (2,)), exclusive=False), True),
        (Labels(("any", "LAD"), ((1, 2, 3), (1,)), exclusive=False), False),  # nothing tells LCX from RCA
        (Labels(("LAD", "LCX"), ((1,), (2,))), False),  # no RCA
        (None, False),
    ],
)
def test_labels_that_are_given(folder, tmp_path, labels, labelled):
    """Without reports, as of ``--classes``; only where they tell all arteries apart."""
    predicted, listing = predict(folder, tmp_path / "predicted", PERMUTED), read_cases(folder / "cases.json")
    cases = [case for case in listing.cases if case.masks][:1]
    if not labelled:  # the numbers that are merged are said, which is an error here
        predicted = predict(folder, tmp_path / "one", dict.fromkeys(ARTERIES, 1))
    rows, failures = evaluate_calcium(predicted, listing, cases, labels=labels)
    assert not failures
    assert ("LAD_lesions_predicted" in rows["TRV1P1"]) == labelled
    assert rows["TRV1P1"]["LAD_lesions_found"] == int(not labelled)


def test_reports_that_do_not_agree(folder, tmp_path):
    """Nobody knows what the numbers of the others mean."""
    predicted = predict(folder, tmp_path / "predicted", dict.fromkeys(ARTERIES, 1), CLASSES)
    report = predicted / "TRV1P2_report.json"
    said = json.loads(report.read_text())
    del said["labels"]
    report.write_text(json.dumps(said))
    listing = read_cases(folder / "cases.json")
    rows, _ = evaluate_calcium(predicted, listing, [case for case in listing.cases if case.masks])
    assert not any("LAD_lesions_predicted" in row for row in rows.values())


def test_of_a_list_of_one_artery_the_others_are_not_false(folder, tmp_path):
    """As Dice has it of such a list."""
    predicted, listing = predict(folder, tmp_path / "predicted", RIGHT, CLASSES), read_cases(folder / "lad.json")
    rows, _ = evaluate_calcium(predicted, listing, [case for case in listing.cases if case.masks])
    assert rows["TRV1P1"]["agatston_predicted"] == pytest.approx(OF_AN_ARTERY)
    measures = summarize_calcium(list(rows.values()), ["LAD"])
    assert measures["lesions"] == {"sensitivity": 1.0, "ppv": 1.0, "f1": 1.0}
    assert measures["arteries"]["LAD"]["ppv"] == 1


def test_of_such_a_list_predictions_without_reports_count_as_in_dice(folder, tmp_path, capsys):
    """Masks of another program: their numbers tell labels apart, and the list's own alone count."""
    predicted = predict(folder, tmp_path / "predicted", RIGHT)
    command = ("evaluate", "--cases", folder / "lad.json", "-p", predicted, "--calcium", "-o", tmp_path / "scores")
    assert run(*command) == 0
    assert "of the predictions the labels 1 count" in capsys.readouterr().out
    results, calcium, _ = read_results(tmp_path / "scores")
    assert [row["dice"] for row in results.values()] == [1.0] * 6
    for row in calcium.values():
        assert row["agatston_predicted"] == row["agatston_true"] == pytest.approx(OF_AN_ARTERY)
        assert (row["lesions_predicted"], row["lesions_false"]) == (1, 0)
        assert row["predicted_mm3"] == row["true_mm3"]


def test_predictions_with_turned_axes_count_alike(folder, tmp_path):
    """As in Dice."""
    straight, turned = predict(folder, tmp_path / "straight", PERMUTED), tmp_path / "turned"
    turned.mkdir()
    for path in straight.iterdir():
        image = nib.load(path)
        other = nib.orientations.axcodes2ornt("SLP")
        moved = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), other))
        assert moved.shape != image.shape or not np.array_equal(moved.affine, image.affine)
        nib.save(moved, turned / path.name)
    listing = read_cases(folder / "cases.json")
    cases = [case for case in listing.cases if case.masks]
    labels = Labels(tuple(CLASSES), ((1,), (2,), (3,)))
    expected, found = (evaluate_calcium(one, listing, cases, iter, labels) for one in (straight, turned))
    assert expected[0]
    assert not expected[1]
    assert found == expected
