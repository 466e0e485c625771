"""Evaluation against figures worked out by hand."""

import json

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.cli import main
from grcsf_fast.evaluate import evaluate_masks, summarize

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


def test_summary_leaves_undefined_figures_out():
    rows = {
        "a": evaluate_masks(blocks((2, 2, 2)), blocks((2, 2, 2)), AFFINE),
        "b": evaluate_masks(blocks(), blocks((2, 2, 2)), AFFINE),
    }
    summary = summarize(rows)
    assert summary["cases"] == 2
    assert summary["dice"] == {"mean": 0.5, "sd": pytest.approx(0.5**0.5), "median": 0.5, "n": 2}
    assert summary["hausdorff95_mm"]["n"] == 1
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
    for text in ("b.nii.gz: expected the grid", "c.nii.gz: expected the affine", "d.nii.gz"):
        assert text in captured.err
    assert "a: dice 1" in captured.out
    rows = (tmp_path / "scores" / "cases.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["case", "a"]
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["dice"]["mean"] == 1


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
