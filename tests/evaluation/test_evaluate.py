"""Evaluation against figures worked out by hand."""

import csv
import itertools
import json
import subprocess
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grcsf_fast.cli import main
from grcsf_fast.evaluation.folders import evaluate_folders, predictions_without_truth
from grcsf_fast.evaluation.metrics import evaluate_masks
from grcsf_fast.evaluation.summary import summarize, write_results

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])  # 0.02 mL a voxel


def blocks(*corners: tuple[int, int, int], size: int = 4) -> np.ndarray:
    mask = np.zeros((40, 40, 40), np.uint8)
    for x, y, z in corners:
        mask[x : x + size, y : y + size, z : z + size] = 1
    return mask


def test_overlap_and_volumes():
    truth, predicted = blocks((10, 10, 10)), blocks((12, 10, 10))
    row = evaluate_masks(predicted, truth, AFFINE)
    assert row["dice"] == pytest.approx(2 * 32 / 128)
    assert row["truth_ml"] == pytest.approx(64 * 0.02)
    assert row["volume_difference_ml"] == pytest.approx(0)


def test_hausdorff_distance_is_in_millimetres():
    truth = blocks((10, 10, 10))
    assert evaluate_masks(truth, truth, AFFINE)["hausdorff95_mm"] == 0
    for axis, spacing in ((0, 2.0), (2, 5.0)):
        corner = [10, 10, 10]
        corner[axis] += 3
        shifted = blocks(tuple(corner))
        # Every voxel of the far face is 3 voxels from the other mask: more than 5 % of the surface.
        assert evaluate_masks(shifted, truth, AFFINE)["hausdorff95_mm"] == pytest.approx(3 * spacing)


def test_the_direction_of_an_axis_changes_no_figure():
    predicted, truth = blocks((12, 10, 10)), blocks((10, 10, 10), (30, 30, 30))
    found = evaluate_masks(predicted, truth, np.diag([-2.0, 2.0, 5.0, 1.0]))
    assert found == evaluate_masks(predicted, truth, AFFINE)


def test_lesions_found_missed_and_false():
    truth = blocks((2, 2, 2), (12, 2, 2), (22, 2, 2))
    predicted = blocks((3, 3, 3), (30, 30, 30))
    row = evaluate_masks(predicted, truth, AFFINE)
    assert (row["lesions_true"], row["lesions_predicted"]) == (3, 2)
    assert (row["lesions_found"], row["lesions_false"]) == (1, 1)
    assert row["lesion_f1"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 2))
    assert row["lesion_count_difference"] == -1


def test_small_lesions_do_not_count_and_do_not_make_false_ones():
    truth, predicted = blocks((2, 2, 2)), blocks((2, 2, 2))
    truth[30, 30, 30:34] = 1  # 0.08 mL
    predicted[30:32, 30, 30:34] = 1  # 0.16 mL on top of it
    row = evaluate_masks(predicted, truth, AFFINE)
    assert (row["lesions_true"], row["lesions_found"], row["lesions_false"]) == (1, 1, 0)
    truth[30, 30, 34] = 1  # exactly 0.1 mL
    assert evaluate_masks(predicted, truth, AFFINE)["lesions_true"] == 2
    hundred = np.pad(np.ones((10, 10, 1)), 1)  # voxels of 1 mm3, on oblique grids as headers keep them
    for angle in np.linspace(0.05, 0.3, 20):
        affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(angle, angle / 2, angle / 3)).astype(np.float32)
        assert evaluate_masks(hundred, hundred, affine)["lesions_true"] == 1


def test_diagonal_neighbours_are_one_lesion():
    truth = blocks((2, 2, 2), (6, 6, 6))
    assert evaluate_masks(truth, truth, AFFINE)["lesions_true"] == 1


def test_empty_masks():
    empty, full = blocks(), blocks((2, 2, 2))
    both = evaluate_masks(empty, empty, AFFINE)
    assert both["dice"] == 1
    assert np.isnan(both["lesion_f1"])
    assert np.isnan(both["hausdorff95_mm"])
    assert evaluate_masks(empty, full, AFFINE)["dice"] == 0
    assert evaluate_masks(full, empty, AFFINE)["lesions_false"] == 1


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        evaluate_masks(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)), AFFINE)


def counts(n, undefined=0, left_out=0, missing=0, failed=0):
    return {"n": n, "undefined": undefined, "left_out": left_out, "missing": missing, "failed": failed}


def test_a_missed_lesion_counts_as_the_diagonal():
    rows = {
        "a": evaluate_masks(blocks((2, 2, 2)), blocks((2, 2, 2)), AFFINE),
        "b": evaluate_masks(blocks(), blocks((2, 2, 2)), AFFINE),
    }
    summary = summarize(rows)
    assert summary["cases"] == 2
    assert summary["dice"] == {"mean": 0.5, "sd": pytest.approx(0.5**0.5), "median": 0.5, **counts(n=2)}
    diagonal = 40 * (2**2 + 2**2 + 5**2) ** 0.5
    assert summary["hausdorff95_mm"]["mean"] == pytest.approx(diagonal / 2)
    assert summary["hausdorff95_mm"] | counts(n=2, undefined=1) == summary["hausdorff95_mm"]
    assert summary["pooled_lesion_f1"] == pytest.approx(2 / 3)
    assert summarize({}) == {"cases": 0}


def save(path, mask, affine=AFFINE):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(mask, affine), path)


def test_folders_with_a_bad_pair(tmp_path, capsys):
    for name in ("a", "b", "c", "d"):
        save(tmp_path / "truth" / f"{name}.nii.gz", blocks((2, 2, 2)))
    save(tmp_path / "predicted" / "a.nii.gz", blocks((2, 2, 2)))
    save(tmp_path / "predicted" / "b.nii.gz", blocks((2, 2, 2))[:20])
    save(tmp_path / "predicted" / "c.nii.gz", blocks((2, 2, 2)), np.eye(4))
    save(tmp_path / "predicted" / "a_residual50.nii.gz", blocks((2, 2, 2)))
    arguments = ["evaluate", "-p", str(tmp_path / "predicted"), "-t", str(tmp_path / "truth")]
    assert main([*arguments, "-o", str(tmp_path / "scores")]) == 1
    captured = capsys.readouterr()
    assert "3 of 4 cases failed" in captured.err
    for text in ("b.nii.gz: expected the grid", "c.nii.gz: expected the grid", "d.nii.gz"):
        assert text in captured.err
    assert "a: dice 1" in captured.out
    assert "b: prediction failed, as if empty: dice 0, predicted_ml 0, truth_ml 1.28" in captured.out
    assert "d: prediction missing, as if empty: dice 0" in captured.out
    assert "cases 4, missing 1, failed 2" in captured.out
    line = next(line for line in captured.out.splitlines() if line.startswith("dice:"))
    assert line.startswith("dice: mean 0.2500, ")
    assert line.endswith(", n 4, undefined 0, left out 0, missing 1, failed 2")
    with (tmp_path / "scores" / "cases.csv").open() as file:
        rows = {row.pop("case"): row for row in csv.DictReader(file)}
    assert {name: (row["missing"], row["failed"], float(row["dice"])) for name, row in rows.items()} == {
        "a": ("0", "0", 1), "b": ("0", "1", 0), "c": ("0", "1", 0), "d": ("1", "0", 0)
    }  # fmt: skip
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert (summary["cases"], summary["missing"], summary["failed"]) == (4, 1, 2)
    assert summary["dice"]["mean"] == summary["lesion_f1"]["mean"] == 0.25
    diagonal = 40 * (2**2 + 2**2 + 5**2) ** 0.5
    assert summary["hausdorff95_mm"]["mean"] == pytest.approx(0.75 * diagonal)
    assert summary["hausdorff95_mm"] | counts(4, missing=1, failed=2) == summary["hausdorff95_mm"]
    assert summary["truth_ml"]["mean"] == pytest.approx(1.28)
    assert summary["volume_difference_ml"]["mean"] == pytest.approx(-0.96)
    assert summary["pooled_lesion_f1"] == pytest.approx(2 / 5)  # one found of four
    assert sorted(summary["errors"]) == ["b", "c", "d"]
    assert summary["without_truth"] == []


@pytest.mark.parametrize("kind", ["grid", "affine", "text"])
def test_one_bad_pair_exits_with_2(kind, tmp_path, capsys):
    save(tmp_path / "truth.nii.gz", blocks((2, 2, 2)))
    predicted = tmp_path / "predicted.nii.gz"
    if kind == "grid":
        save(predicted, blocks((2, 2, 2))[:, :30])
    elif kind == "affine":
        save(predicted, blocks((2, 2, 2)), np.diag([1.0, 1.0, 1.0, 1.0]))
    else:
        predicted.write_text("text")
    arguments = ["-p", str(predicted), "-t", str(tmp_path / "truth.nii.gz"), "-o", str(tmp_path / "out")]
    assert main(["evaluate", *arguments]) == 2
    assert "predicted.nii.gz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_against_a_folder(tmp_path, capsys):
    save(tmp_path / "truth.nii.gz", blocks((2, 2, 2)))
    assert main(["evaluate", "-p", str(tmp_path), "-t", str(tmp_path / "truth.nii.gz")]) == 2
    assert "two files or two folders" in capsys.readouterr().err


BETTER = {"dice": 1, "lesion_f1": 1, "hausdorff95_mm": -1}
PIECES = [blocks(corner)[:16, :16, :16] for corner in itertools.product((0, 5, 10), (0, 9), (3,))]
DUST = np.zeros((16, 16, 16), np.uint8)
DUST[14, 14, 14:] = 1  # 0.04 mL, under the smallest lesion that counts
NOTHING = np.zeros((16, 16, 16), np.uint8)


def drawn(data, label):
    chosen = data.draw(st.lists(st.sampled_from([*PIECES, DUST]), max_size=3), label)
    return np.maximum.reduce([NOTHING, *chosen])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_leaving_a_prediction_out_improves_no_mean(data):
    """Emptied, missing or failed, whatever the others are; where the truth holds lesion, however small."""
    pairs = [(drawn(data, "predicted"), drawn(data, "truth")) for _ in range(data.draw(st.integers(1, 4), "cases"))]
    pairs[0] = pairs[0][0], np.maximum(pairs[0][1], data.draw(st.sampled_from([*PIECES, DUST]), "lesion"))
    rows = {str(index): evaluate_masks(*pair, AFFINE) | {"missing": 0, "failed": 0} for index, pair in enumerate(pairs)}
    before = summarize(rows)
    truth = pairs[0][1]
    empty = evaluate_masks(NOTHING, truth, AFFINE)
    for flags in ({"missing": 0, "failed": 0}, {"missing": 1, "failed": 0}, {"missing": 0, "failed": 1}):
        after = summarize(rows | {"0": empty | flags})
        for name, sign in BETTER.items():
            assert np.isfinite(after[name]["mean"])
            if before[name]["n"]:
                assert sign * after[name]["mean"] <= sign * before[name]["mean"] + 1e-9, name
            assert after[name]["n"] + after[name]["left_out"] == len(pairs)
        # False lesions count in the pooled score, so nothing may be better than more of them than were found.
        if rows["0"]["lesions_false"] <= rows["0"]["lesions_found"] and np.isfinite(before["pooled_lesion_f1"]):
            assert after["pooled_lesion_f1"] <= before["pooled_lesion_f1"] + 1e-9


def test_what_stands_for_undefined_figures():
    """Truth and prediction each empty, dust alone, or a lesion that counts."""
    lesion, diagonal = PIECES[0], 16 * (2**2 + 2**2 + 5**2) ** 0.5
    expected = {  # (predicted, truth): counted Dice, F1 and distance; None: left out
        ("empty", "empty"): (1, None, None), ("dust", "empty"): (0, None, diagonal),
        ("lesion", "empty"): (0, 0, diagonal), ("empty", "dust"): (0, 0, diagonal), ("dust", "dust"): (1, None, 0),
        ("empty", "lesion"): (0, 0, diagonal), ("lesion", "lesion"): (1, 1, 0),
    }  # fmt: skip
    masks = {"empty": NOTHING, "dust": DUST, "lesion": lesion}
    for (predicted, truth), figures in expected.items():
        row = evaluate_masks(masks[predicted], masks[truth], AFFINE)
        summary = summarize({"a": row})
        for name, figure in zip(BETTER, figures, strict=True):
            found = summary[name]
            left_out = figure is None
            assert found["n"] == 1 - left_out, (predicted, truth, name)
            assert found["left_out"] == left_out
            assert found["undefined"] == (not np.isfinite(row[name]))
            np.testing.assert_allclose(
                found["mean"], np.nan if left_out else figure, err_msg=f"{predicted} {truth} {name}"
            )


def test_a_missing_prediction_is_the_worst_even_where_the_truth_is_empty(tmp_path):
    for name in "ab":
        save(tmp_path / "truth" / f"{name}.nii.gz", NOTHING)
    save(tmp_path / "predicted" / "a.nii.gz", NOTHING)
    results, failures, _, _ = evaluate_folders(tmp_path / "predicted", tmp_path / "truth")
    assert list(failures) == ["b"]
    assert (results["a"]["dice"], results["b"]["dice"]) == (1, 0)
    summary = summarize(results)
    assert summary["dice"] == {"mean": 0.5, "sd": pytest.approx(0.5**0.5), "median": 0.5, **counts(2, missing=1)}
    assert summary["hausdorff95_mm"] | counts(1, undefined=1, left_out=1, missing=1) == summary["hausdorff95_mm"]
    assert summary["lesion_f1"]["mean"] == 0


def test_undefined_figures_are_null_in_json(tmp_path):
    results = {"a": evaluate_masks(NOTHING, NOTHING, AFFINE)}
    _, path = write_results(tmp_path, results, summarize(results))
    summary = json.loads(path.read_text())
    assert summary["hausdorff95_mm"]["mean"] is None
    assert summary["hausdorff95_mm"] | counts(0, undefined=1, left_out=1) == summary["hausdorff95_mm"]
    assert summary["pooled_lesion_f1"] is None


def test_tables_of_an_earlier_run_do_not_stay(tmp_path):
    results = {"a": evaluate_masks(NOTHING, NOTHING, AFFINE)}
    summary = summarize(results)
    write_results(tmp_path, results, summary, {"a": {"agatston_true": 1.0}}, {"core": results})
    assert {path.name for path in tmp_path.iterdir()} == {"cases.csv", "calcium.csv", "labels.csv", "summary.json"}
    write_results(tmp_path, results, summary, by_label={"core": results})
    assert {path.name for path in tmp_path.iterdir()} == {"cases.csv", "labels.csv", "summary.json"}
    write_results(tmp_path, results, summary)
    assert {path.name for path in tmp_path.iterdir()} == {"cases.csv", "summary.json"}


def test_lesions_of_missing_predictions_are_missed(tmp_path):
    truth = blocks((2, 2, 2), (12, 2, 2))
    for name in ("a", "b_0000"):
        save(tmp_path / "truth" / f"{name}.nii.gz", truth)
    save(tmp_path / "predicted" / "a.nii.gz", truth)
    summary = summarize(evaluate_folders(tmp_path / "predicted", tmp_path / "truth")[0])
    assert summary["pooled_lesion_f1"] == pytest.approx(4 / 6)
    assert summary["lesions_true"]["mean"] == 2


def test_a_truth_that_cannot_be_read_leaves_the_means(tmp_path, capsys):
    for name in ("a", "b"):
        save(tmp_path / "truth" / f"{name}.nii.gz", blocks((2, 2, 2)))
        save(tmp_path / "predicted" / f"{name}.nii.gz", blocks((2, 2, 2)))
    (tmp_path / "truth" / "b.nii.gz").write_text("text")
    arguments = ["evaluate", "-p", str(tmp_path / "predicted"), "-t", str(tmp_path / "truth")]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "cases 1, missing 0, failed 0" in captured.out
    assert "1 of 2 cases failed" in captured.err
    assert "truth/b.nii.gz" in captured.err


def test_predictions_without_a_truth_are_named(tmp_path, capsys):
    for name in ("a", "a_residual50", "a_residual75", "b_0000", "c", "d_residual50", "a_residual"):
        save(tmp_path / "predicted" / f"{name}.nii.gz", blocks((2, 2, 2)))
    for name in ("a", "b"):
        save(tmp_path / "truth" / f"{name}.nii.gz", blocks((2, 2, 2)))
    folders = tmp_path / "predicted", tmp_path / "truth"
    assert predictions_without_truth(*folders) == ["a_residual", "c", "d_residual50"]
    arguments = ["-p", str(folders[0]), "-t", str(folders[1]), "-o", str(tmp_path / "scores")]
    assert main(["evaluate", *arguments]) == 0
    captured = capsys.readouterr()
    assert "3 predictions without a truth were not compared: a_residual, c, d_residual50" in captured.err
    assert "cases 2, missing 0, failed 0" in captured.out
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["without_truth"] == [
        "a_residual", "c", "d_residual50"
    ]  # fmt: skip
    assert predictions_without_truth(folders[0] / "c.nii.gz", folders[1] / "a.nii.gz") == []


def test_folders_without_a_common_name(tmp_path, capsys):
    save(tmp_path / "truth" / "a.nii.gz", NOTHING)
    save(tmp_path / "predicted" / "b.nii.gz", NOTHING)
    arguments = ["-p", str(tmp_path / "predicted"), "-t", str(tmp_path / "truth"), "-o", str(tmp_path / "out")]
    assert main(["evaluate", *arguments]) == 2
    assert "expected predictions of the names of a" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("smallest", ["-1", "nan", "inf"])
def test_the_smallest_lesion_is_a_volume(tmp_path, capsys, smallest):
    save(tmp_path / "a.nii.gz", NOTHING)
    file = str(tmp_path / "a.nii.gz")
    assert main(["evaluate", "-p", file, "-t", file, f"--min-lesion-ml={smallest}"]) == 2
    assert f"min_lesion_ml: expected mL from 0 up, got {float(smallest)}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="min_lesion_ml"):
        evaluate_masks(NOTHING, NOTHING, AFFINE, float(smallest))


@pytest.mark.parametrize("affine", [np.eye(3), AFFINE * np.nan, np.zeros((4, 4))])
def test_what_is_no_affine_is_refused(affine):
    with pytest.raises(ValueError, match=r"affine: expected a finite, invertible \(4, 4\) matrix"):
        evaluate_masks(NOTHING, NOTHING, affine)


def test_masks_of_two_axes_are_refused():
    with pytest.raises(ValueError, match="truth: expected a mask of three axes"):
        evaluate_masks(NOTHING[0], NOTHING[0], AFFINE)


def test_values_count_from_half_of_the_label(tmp_path):
    """Dust beside 1, 0 and 255, and the same by the API; an image as its own mask is refused."""
    truth = blocks((2, 2, 2))
    dusty = np.where(truth > 0, 1.0, 1e-15)
    for predicted in (dusty, truth * 255, truth / np.float32(255)):
        assert evaluate_masks(predicted, truth, AFFINE)["dice"] == 1
        save(tmp_path / "predicted" / "a.nii.gz", predicted)
        save(tmp_path / "truth" / "a.nii.gz", dusty)
        results, failures, _, _ = evaluate_folders(tmp_path / "predicted", tmp_path / "truth")
        assert not failures
        assert results["a"]["dice"] == 1
        assert results["a"]["predicted_ml"] == pytest.approx(1.28)
    image = np.random.default_rng(0).normal(100, 10, truth.shape).astype(np.float32)
    save(tmp_path / "image.nii.gz", image)
    results, failures, _, _ = evaluate_folders(tmp_path / "image.nii.gz", tmp_path / "image.nii.gz")
    assert not results
    assert "expected a mask of whole numbers" in failures["image"]
    with pytest.raises(ValueError, match="predicted: expected a mask of whole numbers"):
        evaluate_masks(image, truth, AFFINE)


@pytest.mark.parametrize(("predicted", "truth", "said"), [(40, 1, "predicted"), (1, 21, "truth"), (1, 40, "truth")])
def test_a_mask_of_most_of_the_volume_is_said(tmp_path, predicted, truth, said):
    """A prediction may be that bad, but of every voxel; a truth of over half is none."""
    for name, planes in (("predicted", predicted), ("truth", truth)):
        save(tmp_path / f"{name}.nii.gz", (np.arange(40)[:, None, None] < planes) * np.ones((40, 40, 40), np.uint8))
    share = {"predicted": predicted, "truth": truth}[said] / 40
    with pytest.warns(UserWarning, match=rf"{said}\.nii\.gz: {share:.0%} of the volume are marked as lesion"):
        results, *_ = evaluate_folders(tmp_path / "predicted.nii.gz", tmp_path / "truth.nii.gz")
    assert results["truth"]["predicted_ml"] == pytest.approx(1600 * predicted * 0.02)


def test_a_prediction_of_half_the_volume_is_just_a_bad_one(tmp_path):
    save(tmp_path / "truth.nii.gz", blocks((2, 2, 2)))
    save(tmp_path / "predicted.nii.gz", (np.arange(40)[:, None, None] < 39) * np.ones((40, 40, 40), np.uint8))
    results, failures, _, _ = evaluate_folders(tmp_path / "predicted.nii.gz", tmp_path / "truth.nii.gz")
    assert not failures
    assert results["truth"]["dice"] == pytest.approx(2 * 64 / (64 + 39 * 1600))


@pytest.mark.filterwarnings("ignore:.*its unit is")
@pytest.mark.parametrize(("unit", "factor"), [("micron", 1e-3), ("meter", 1e3)])
def test_volumes_are_in_millilitres_whatever_the_unit(tmp_path, unit, factor):
    """One mask in micrometres or metres, the other in mm."""
    save(tmp_path / "predicted" / "a.nii.gz", blocks((2, 2, 2)))
    scaled = AFFINE.copy()
    scaled[:3] /= factor
    image = nib.Nifti1Image(blocks((2, 2, 2)), scaled)
    image.header.set_xyzt_units(unit)
    (tmp_path / "truth").mkdir()
    nib.save(image, tmp_path / "truth" / "a.nii.gz")
    results, failures, _, _ = evaluate_folders(tmp_path / "predicted", tmp_path / "truth")
    assert not failures
    assert results["a"]["truth_ml"] == pytest.approx(1.28)
    assert results["a"]["hausdorff95_mm"] == 0


def test_affines_may_differ_by_a_tenth_of_a_voxel(tmp_path):
    save(tmp_path / "truth.nii.gz", blocks((2, 2, 2)))
    for shift, apart in ((0.19, False), (0.21, True)):
        moved = AFFINE.copy()
        moved[2, 3] += shift
        save(tmp_path / "predicted.nii.gz", blocks((2, 2, 2)), moved)
        results, failures, _, _ = evaluate_folders(tmp_path / "predicted.nii.gz", tmp_path / "truth.nii.gz")
        assert bool(failures) == apart
        if apart:
            assert "corners up to 0.21 mm from that grid's, where 0.2 mm are allowed" in failures["truth"]
        else:
            assert results["truth"]["dice"] == 1


def test_no_warning_is_an_error_of_ours(tmp_path):
    """``python -W error`` for one pair of masks that differ, so that every metric is computed."""
    save(tmp_path / "truth.nii.gz", blocks((2, 2, 2)))
    save(tmp_path / "predicted.nii.gz", blocks((3, 2, 2)))
    files = ["-p", str(tmp_path / "predicted.nii.gz"), "-t", str(tmp_path / "truth.nii.gz")]
    command = [sys.executable, "-W", "error", "-m", "grcsf_fast", "evaluate", *files, "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A slow machine shows a bar there as well.
    assert "Warning" not in done.stderr
    assert "truth: dice 0.75," in done.stdout


def test_a_warning_taken_for_an_error_is_one_line(tmp_path):
    save(tmp_path / "truth.nii.gz", blocks((2, 2, 2)) * 2 + blocks((12, 2, 2)))
    save(tmp_path / "predicted.nii.gz", blocks((2, 2, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, failures, _, _ = evaluate_folders(tmp_path / "predicted.nii.gz", tmp_path / "truth.nii.gz")
    assert failures["truth"] == f"{tmp_path / 'truth.nii.gz'}: 2 labels (1, 2) are merged into one lesion mask"


def test_defaults_of_torch_change_nothing():
    predicted, truth = blocks((3, 2, 2)), blocks((2, 2, 2))
    expected = evaluate_masks(predicted, truth, AFFINE)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        assert evaluate_masks(predicted, truth, AFFINE) == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
