"""Calcium of a list of cases: masks in files against the reference, from the command line to what is written."""

import json

import nibabel as nib
import numpy as np
import pytest
from commands import run
from layouts import orcascore
from pages import block, read_page

from grcsf_fast.data.images import open_image, read_voxels
from grcsf_fast.datasets.cases_file import read_cases
from grcsf_fast.evaluation.calcium import compare_calcium, summarize_calcium
from grcsf_fast.evaluation.summary import read_results

# 3 voxels of 400 HU in each of three arteries, 2 x 2 x 3 mm.
SCORE_OF_AN_ARTERY = 3 * 4 * 4


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orcascore")
    assert run("cases", "orcascore", orcascore(folder), "-o", folder / "cases.json", "--folds", 2) == 0
    assert (
        run("cases", "orcascore", folder / "Challenge_data", "-o", folder / "lad.json", "--folds", 2, "--labels", 1)
        == 0
    )
    return folder / "cases.json"


def predict(listing, folder, **changed):
    """Masks of all cases, the reference's own but for what is changed; without those that become None."""
    folder.mkdir()
    for case in read_cases(listing).cases:
        if not case.masks:
            continue
        reference = open_image(case.masks[0])
        mask = (read_voxels(reference) > 0).astype(np.uint8)
        change = changed.get(case.name, lambda mask: mask)
        if change is not None:
            nib.save(nib.Nifti1Image(change(mask), reference.affine), folder / f"{case.name}.nii.gz")
    return folder


def without_rca(mask):
    mask[:, 15] = 0
    return mask


def with_bone(mask):
    mask[12, 12, 12] = 1
    return mask


def test_the_report_of_a_folder(listing, tmp_path, capsys):
    predicted = predict(listing, tmp_path / "predicted", TRV1P1=without_rca, TRV1P2=None, TRV2P1=with_bone)
    evaluate = ["evaluate", "--cases", listing, "-p", predicted, "-o", tmp_path / "scores", "--recipe", "orcascore"]
    assert run(*evaluate) == 1
    said = capsys.readouterr()
    assert "1 of 6 cases failed" in said.err
    assert (
        f"TRV1P1: Agatston {2 * SCORE_OF_AN_ARTERY:.1f} (11-100) predicted, {3 * SCORE_OF_AN_ARTERY:.1f} (101-400) true"
        in said.out
    )
    assert "TRV1P2: prediction missing, as if empty: Agatston 0.0 (0) predicted, 144.0 (101-400) true" in said.out
    results, calcium, errors = read_results(tmp_path / "scores")
    assert (sorted(results), sorted(errors)) == (sorted(calcium), ["TRV1P2"])
    assert calcium["TRV1P1"]["RCA_lesions_found"] == 0
    # The voxel of 130 HU that the reference marks beside each is no calcium.
    assert calcium["TRV1P1"]["RCA_true_mm3"] == pytest.approx(3 * 12)
    # Bone of 900 HU in a voxel of 4 mm2.
    assert calcium["TRV2P1"]["agatston_predicted"] == pytest.approx(3 * SCORE_OF_AN_ARTERY + 4 * 4)
    assert (calcium["TRV2P1"]["lesions_predicted"], calcium["TRV2P1"]["lesions_false"]) == (4, 1)
    measures = json.loads((tmp_path / "scores" / "summary.json").read_text())["calcium"]
    sensitivity, ppv = 14 / 18, 14 / 15
    assert measures["patients"] == 6
    assert measures["lesions"] == pytest.approx(
        {"sensitivity": sensitivity, "ppv": ppv, "f1": 2 * sensitivity * ppv / (sensitivity + ppv)}
    )
    assert measures["volume"]["ppv"] == pytest.approx(42 / 43)
    assert measures["arteries"]["RCA"] == pytest.approx(
        {"lesions": 6, "sensitivity": 4 / 6, "volume_sensitivity": 4 / 6}
    )
    assert measures["categories"]["101-400"] == {"0": 1, "1-10": 0, "11-100": 1, "101-400": 4, ">400": 0}
    assert measures["kappa"] == 0  # all are of one category in truth
    page = {
        case["name"]: case["figures"] for case in block(read_page(tmp_path / "scores" / "evaluation.html"), "cases")
    }
    assert page["TRV1P1"]["agatston_predicted"] == pytest.approx(2 * SCORE_OF_AN_ARTERY)


@pytest.mark.parametrize("calcium", [[], ["--calcium"]])
def test_voxels_up_to_the_limit_count_in_no_prediction(listing, tmp_path, capsys, calcium):
    """As in the truth: of what the reference marks at 130 HU beside each calcification, Dice says nothing."""
    predicted = predict(listing, tmp_path / "predicted")
    assert run("evaluate", "--cases", listing, "-p", predicted, "-o", tmp_path / "scores", *calcium) == 0
    results, *_ = read_results(tmp_path / "scores")
    assert [row["dice"] for row in results.values()] == [1.0] * 6
    assert [row["predicted_ml"] for row in results.values()] == pytest.approx([9 * 0.012] * 6)
    capsys.readouterr()


def test_a_prediction_that_is_no_good_agrees_with_nothing(listing, tmp_path, capsys):
    """Neither one from before a failed run nor a missing one, even where both scores would be 0."""
    predicted = predict(listing, tmp_path / "predicted", TRV1P2=None)
    (predicted / "failures.json").write_text(json.dumps({"TRV1P1": {"error": "no memory"}}))
    assert run("evaluate", "--cases", listing, "-p", predicted, "--calcium", "-o", tmp_path / "scores") == 1
    said = capsys.readouterr().out
    assert "TRV1P1: prediction failed, as if empty: Agatston 0.0 (0) predicted, 144.0" in said
    assert "2 without a usable prediction count as if nothing was predicted" in said
    _, calcium, _ = read_results(tmp_path / "scores")
    flags = {name: (row["missing"], row["failed"]) for name, row in calcium.items()}
    assert flags == dict.fromkeys(calcium, (0, 0)) | {"TRV1P1": (0, 1), "TRV1P2": (1, 0)}
    nothing = np.zeros((4, 4, 4))
    row = compare_calcium(nothing > 0, nothing, nothing, np.eye(4))
    for flag, same, kappa in (("missing", 0.0, 0.0), ("other", 1.0, None)):
        measures = summarize_calcium([row | {flag: 1}] * 2)
        assert measures["same_category"] == same
        assert measures["without_prediction"] == 2 * (flag == "missing")
        assert kappa is None or measures["kappa"] == pytest.approx(kappa)


def test_references_of_a_single_value(listing, tmp_path, capsys):
    """A scale factor makes it another than 1, and it is the first label all the same."""
    text = json.loads(listing.read_text())
    case = next(case for case in text["cases"] if case["masks"])
    text["cases"] = [case | {"masks": ["scaled.nii.gz"]}]
    (scaled := listing.with_name("scaled.json")).write_text(json.dumps(text))
    reference = open_image(listing.parent / case["masks"][0])
    numbers = read_voxels(reference)
    nib.save(
        nib.Nifti1Image(((numbers == 1) / 255).astype(np.float32), reference.affine),
        listing.with_name("scaled.nii.gz"),
    )
    (folder := tmp_path / "predicted").mkdir()
    mask = (numbers == 1).astype(np.uint8)
    nib.save(nib.Nifti1Image(mask, reference.affine), folder / f"{case['name']}.nii.gz")
    assert run("evaluate", "--cases", scaled, "-p", folder, "--calcium", "-o", tmp_path / "scores") == 0
    capsys.readouterr()
    (row,) = read_results(tmp_path / "scores")[1].values()
    assert row["agatston_true"] == row["agatston_predicted"] == pytest.approx(SCORE_OF_AN_ARTERY)
    assert (row["lesions_true"], row["lesions_found"], row["lesions_false"]) == (1, 1, 0)


def test_a_list_of_one_artery(listing, tmp_path, capsys):
    predicted = predict(listing, tmp_path / "predicted")
    assert run("evaluate", "--cases", listing.with_name("lad.json"), "-p", predicted, "--calcium") == 0
    said = capsys.readouterr().out
    assert "TRV1P1: Agatston 144.0 (101-400) predicted, 48.0 (11-100) true" in said
    assert "| LAD " in said
    assert "LCX" not in said


def test_an_image_that_is_gone_is_named(listing, tmp_path, capsys):
    predicted = predict(listing, tmp_path / "predicted")
    text = json.loads(listing.read_text())
    text["cases"] = [case for case in text["cases"] if case["masks"]]
    text["cases"][0]["images"] = [{"file": "gone.mhd"}]
    broken = listing.with_name("broken.json")
    broken.write_text(json.dumps(text))
    assert run("evaluate", "--cases", broken, "-p", predicted, "--calcium", "-o", tmp_path / "scores") == 1
    said = capsys.readouterr()
    assert "1 of 6 cases failed" in said.err
    assert "gone.mhd" in said.err
    assert "5 patients: " in said.out


def test_calcium_needs_images(tmp_path, capsys):
    assert run("evaluate", "-p", tmp_path, "-t", tmp_path, "--calcium") == 2
    assert "--calcium: expected --cases with images in Hounsfield units, got none" in capsys.readouterr().err


def test_an_odd_entry_is_a_failed_prediction_and_stops_no_other(listing, tmp_path, capsys):
    predicted = predict(listing, tmp_path / "predicted", TRV1P1=None)
    (predicted / "TRV1P1.nii.gz").symlink_to("gone.nii.gz")
    assert run("evaluate", "--cases", listing, "-p", predicted, "--calcium", "-o", tmp_path / "scores") == 1
    assert "TRV1P1: prediction failed, as if empty" in capsys.readouterr().out
    _, calcium, _ = read_results(tmp_path / "scores")
    assert {name: row["failed"] for name, row in calcium.items()} == dict.fromkeys(calcium, 0) | {"TRV1P1": 1}
    assert not any(row["missing"] for row in calcium.values())
