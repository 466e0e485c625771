"""What is no good, or from before, among masks that are compared: it is named, counts as worst, and stops no other."""

import hashlib
import json
import shutil
import warnings

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.cli import main
from grcsf_fast.data.failures import change_failures, read_failures
from grcsf_fast.datasets.cases_file import CaseList, ListedCase
from grcsf_fast.evaluation import predictions
from grcsf_fast.evaluation.folders import evaluate_cases, evaluate_folders, left_over, predictions_without_truth
from grcsf_fast.evaluation.predictions import failed_before
from grcsf_fast.evaluation.summary import read_results, write_results


def test_results_from_before_a_failed_run_do_not_count(tmp_path):
    """``predict`` notes what failed; the mask of an earlier run may still lie there."""
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[10:14, 10:14, 10:14] = 1
    truth, predicted = tmp_path / "truth", tmp_path / "predicted"
    for folder in (truth, predicted):
        folder.mkdir()
        for name in ("a", "b"):
            nib.save(nib.Nifti1Image(mask, np.diag([2.0, 2.0, 5.0, 1.0])), folder / f"{name}.nii.gz")
    failures = predicted / "failures.json"
    failures.write_text(json.dumps({"b": {"input": "b.nii.gz", "error": "no memory", "traceback": ""}}))
    results, errors, _, _ = evaluate_folders(predicted, truth)
    assert (results["a"]["dice"], results["b"]["dice"]) == (1, 0)
    assert (results["a"]["failed"], results["b"]["failed"]) == (0, 1)
    assert "failed for this case (no memory)" in errors["b"]
    failures.write_text("[")
    with pytest.raises(ValueError, match=r"failures.json: expected the failures that predict notes"):
        evaluate_folders(predicted, truth)


AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])


def save(path, mask=None, affine=AFFINE):
    path.parent.mkdir(exist_ok=True)
    if mask is None:
        mask = np.zeros((20, 20, 20), np.uint8)
        mask[10:14, 10:14, 10:14] = 1
    nib.save(nib.Nifti1Image(mask, affine), path)


def test_entries_that_could_be_no_case_any_more(tmp_path):
    """``predict`` notes a link that broke by the name of its file, and the mask of its case is one from before."""
    for folder in ("truth", "predicted"):
        for name in ("a", "b"):
            save(tmp_path / folder / f"{name}.nii.gz")
    noted = {"b.nii.gz": {"input": "/scans/b.nii.gz", "error": "a link to nothing", "traceback": ""}}
    (tmp_path / "predicted" / "failures.json").write_text(json.dumps(noted))
    results, errors, _, _ = evaluate_folders(tmp_path / "predicted", tmp_path / "truth")
    assert (results["a"]["failed"], results["b"]["failed"], results["b"]["dice"]) == (0, 1, 0)
    assert "a link to nothing" in errors["b"]
    one, other = tmp_path / "predicted" / "b.nii.gz", tmp_path / "truth" / "a.nii.gz"
    results, errors, _, _ = evaluate_folders(one, other)
    assert results["a"]["failed"] == 1
    assert failed_before(one) == {"b": "a link to nothing", "b.nii.gz": "a link to nothing"}
    results, errors, _, _ = evaluate_folders(tmp_path / "predicted" / "a.nii.gz", other)
    assert (results["a"]["failed"], errors) == (0, {})


def test_masks_of_two_runs(tmp_path, monkeypatch):
    """A run with other weights that was killed on its way leaves masks of both."""
    predicted, truth = tmp_path / "predicted", tmp_path / "truth"
    for name in ("a", "b", "c"):
        save(truth / f"{name}.nii.gz")
        save(predicted / f"{name}.nii.gz")

    def report(name, weights, digest=None):
        digest = digest or hashlib.sha256((predicted / f"{name}.nii.gz").read_bytes()).hexdigest()
        text = {"settings": {"weights_sha256": weights}, "outputs": {f"{name}.nii.gz": digest}}
        (predicted / f"{name}_report.json").write_text(json.dumps(text))

    report("a", "1")
    report("b", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_folders(predicted, truth)
    report("b", "2")
    with pytest.warns(match=r"found 2 kinds by their reports, as of a.nii.gz and b.nii.gz: a run ended on its way"):
        assert evaluate_folders(predicted, truth).failures == {}
    real = predictions.sha256
    with monkeypatch.context() as patch:  # as of a mask on a share that is gone
        patch.setattr(predictions, "sha256", lambda path: real(path) if path.name != "a.nii.gz" else real(path / "x"))
        with pytest.warns(match="found 2 kinds"):
            assert len(evaluate_folders(predicted, truth).results) == 3
    report("b", "1", "0" * 64)
    with pytest.warns(match=r"expected the masks that their reports name by their hashes, found 1 others, .* b.nii.gz"):
        evaluate_folders(predicted, truth)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (truth / "b.nii.gz").unlink()
        evaluate_folders(predicted, truth)


def test_a_case_that_is_done_since_counts(tmp_path):
    """Saved by itself after a folder run could not do it."""
    predicted = tmp_path / "predicted"
    predicted.mkdir()
    failures = predicted / "failures.json"
    noted = {name: {"input": f"{name}.nii", "error": "no memory", "traceback": ""} for name in ("b", "c")}
    failures.write_text(json.dumps(noted))
    change_failures(predicted, {}, lambda name, _: name == "b")
    assert json.loads(failures.read_text()) == {"c": noted["c"]}
    change_failures(predicted, {}, lambda name, _: name == "b")
    assert json.loads(failures.read_text()) == {"c": noted["c"]}
    change_failures(predicted, {}, lambda name, failure: failure["input"] == "c.nii")
    assert not failures.exists()


def test_what_other_processes_of_an_interrupted_run_noted(tmp_path):
    noted = {name: {"input": f"{name}.nii", "error": name, "traceback": ""} for name in ("a", "b", "c")}
    for file, own in (("failures.json", "a"), ("failures.1.json", "b"), ("failures.12.json", "c")):
        (tmp_path / file).write_text(json.dumps({own: noted[own]}))
    (tmp_path / "failures.old.json").write_text("of somebody else")
    assert read_failures(tmp_path) == noted
    change_failures(tmp_path, {"a": noted["a"] | {"error": "again"}}, lambda name, _: name in ("a", "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failures.json", "failures.old.json"]
    assert {name: one["error"] for name, one in read_failures(tmp_path).items()} == {"a": "again", "c": "c"}
    for text in ("[]", '{"a": []}', '{"a": {"input": "a.nii"}}', "null"):
        (tmp_path / "failures.1.json").write_text(text)
        with pytest.raises(ValueError, match=r"failures.1.json: expected the failures that predict notes"):
            change_failures(tmp_path, {})


def test_an_odd_entry_stops_no_other(tmp_path):
    for folder in ("predicted", "truth"):
        for name in ("a", "b"):
            save(tmp_path / folder / f"{name}.nii.gz")
    (tmp_path / "predicted" / "b.nii.gz").unlink()
    (tmp_path / "predicted" / "b.nii.gz").symlink_to("gone.nii.gz")
    (tmp_path / "truth" / "c.nii.gz").symlink_to("gone.nii.gz")
    results, errors, _, _ = evaluate_folders(tmp_path / "predicted", tmp_path / "truth")
    assert (results["a"]["dice"], results["b"]["failed"], results["b"]["missing"]) == (1, 1, 0)
    assert set(errors) == {"b", "c.nii.gz"}
    assert "a link to nothing" in errors["b"]
    assert predictions_without_truth(tmp_path / "predicted", tmp_path / "truth") == []
    with pytest.raises(FileNotFoundError, match=r"none: expected a file or a folder of masks"):
        evaluate_folders(tmp_path / "none", tmp_path / "truth")


def test_results_of_an_earlier_run_do_not_stay(tmp_path, capsys):
    save(tmp_path / "predicted" / "a.nii.gz")
    save(tmp_path / "truth" / "a.nii.gz")
    arguments = [
        "evaluate",
        "-p",
        str(tmp_path / "predicted"),
        "-t",
        str(tmp_path / "truth"),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    assert (tmp_path / "out" / "evaluation.html").exists()
    assert main([*arguments, "--no-page"]) == 0
    assert not (tmp_path / "out" / "evaluation.html").exists()
    assert main(arguments) == 0
    (tmp_path / "truth" / "a.nii.gz").write_bytes(b"")
    assert main(arguments) == 1
    results, _, errors = read_results(tmp_path / "out")
    assert (results, set(errors)) == ({}, {"a"})
    assert not (tmp_path / "out" / "evaluation.html").exists()
    capsys.readouterr()


def test_tables_of_somebody_else(tmp_path, capsys):
    for folder in ("predicted", "truth"):
        save(tmp_path / folder / "a.nii.gz")
    given = ["-p", str(tmp_path / "predicted"), "-t", str(tmp_path / "truth"), "-o", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    html = "<html><title>Masks against the truth, by me</title></html>"
    foreign = {"labels.csv": "id,age\n", "summary.json": "[]", "cases.csv": "case,site\na,1\n", "evaluation.html": html}
    for name, text in foreign.items():
        (tmp_path / "out" / name).write_text(text)
        assert main(["evaluate", *given]) == 2
        assert f"{name}: expected no file, or one of an earlier evaluation" in capsys.readouterr().err
        assert [path.read_text() for path in (tmp_path / "out").iterdir()] == [text]
        (tmp_path / "out" / name).unlink()
    assert main(["evaluate", *given, "--regions", "a=1,b=1"]) == 0
    assert (tmp_path / "out" / "labels.csv").is_file()
    assert main(["evaluate", *given]) == 0
    assert not (tmp_path / "out" / "labels.csv").exists()
    # Without a page that of before goes, and one of somebody else stays.
    page = tmp_path / "out" / "evaluation.html"
    assert page.is_file()
    assert main(["evaluate", *given, "--no-page"]) == 0
    assert not page.exists()
    page.write_text(html)
    assert main(["evaluate", *given, "--no-page"]) == 0
    assert page.read_text() == html


def test_names_that_end_like_a_channel(tmp_path):
    """nnU-Net's cases may be called case_0000 and case_0001; predictions of a list's cases have its names."""
    cases = []
    for name in ("case_0000", "case_0001", "x_0000"):
        save(tmp_path / "predicted" / f"{name}.nii.gz")
        save(tmp_path / "truth" / f"{name}.nii.gz")
        truth = tmp_path / "truth" / f"{name}.nii.gz"
        cases.append(ListedCase(name, (truth,), (truth,), name))
    results, errors, _, _ = evaluate_cases(tmp_path / "predicted", CaseList("pairs", tuple(cases)), cases)
    assert not errors
    assert {name: row["dice"] for name, row in results.items()} == {"case_0000": 1, "case_0001": 1, "x_0000": 1}
    assert left_over(tmp_path / "predicted", [case.name for case in cases]) == []


def test_a_reference_on_another_grid_than_its_image(tmp_path):
    """Of the same shape: intensities would be taken from the wrong voxels."""
    image = np.zeros((20, 20, 20), np.int16)
    image[10:14, 10:14, 10:14] = 300
    save(tmp_path / "image.nii.gz", image)
    flipped = AFFINE.copy()
    flipped[0] = [-2.0, 0, 0, 40]
    save(tmp_path / "truth.nii.gz", (image[::-1] > 130).astype(np.uint8), flipped)
    save(tmp_path / "predicted" / "a.nii.gz", (image > 130).astype(np.uint8))
    case = ListedCase("a", (tmp_path / "image.nii.gz",), (tmp_path / "truth.nii.gz",), "a")
    listing = CaseList("orcascore", (case,), above_hu=130)
    results, errors, _, _ = evaluate_cases(tmp_path / "predicted", listing, [case])
    assert not results
    assert "expected the grid of" in errors["a"]


def test_names_that_are_no_utf_8(tmp_path):
    row = {"dice": 1.0}
    write_results(tmp_path, {"caf\udce9": row}, {"cases": 1})
    assert read_results(tmp_path)[0] == {"caf\udce9": row}


def test_a_truth_that_is_not_of_its_image_is_no_failure_of_the_prediction(tmp_path):
    """It leaves the means, and the message names it; without the images nobody can know."""
    moved = AFFINE.copy()
    moved[0, 3] += 3
    cases = []
    for name, affine in (("a", AFFINE), ("b", moved)):
        files = tmp_path / "images" / f"{name}.nii.gz", tmp_path / "truth" / f"{name}.nii.gz"
        save(files[0])
        save(files[1], affine=affine)
        save(tmp_path / "predicted" / f"{name}.nii.gz")
        cases.append(ListedCase(name, files[:1], files[1:], name))
    listing = CaseList("pairs", tuple(cases))
    compared = evaluate_cases(tmp_path / "predicted", listing, cases)
    assert list(compared.results) == ["a"]
    (failure,) = compared.failures.values()
    assert failure.startswith(f"{cases[1].masks[0]}: expected the grid of {cases[1].images[0]} ")
    shutil.rmtree(tmp_path / "images")
    assert list(evaluate_cases(tmp_path / "predicted", listing, cases).results) == ["a", "b"]
