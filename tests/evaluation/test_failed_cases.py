"""Masks beside a note that their cases failed."""

import json

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.evaluation.folders import evaluate_folders


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
    results, errors, _ = evaluate_folders(predicted, truth)
    assert (results["a"]["dice"], results["b"]["dice"]) == (1, 0)
    assert (results["a"]["failed"], results["b"]["failed"]) == (0, 1)
    assert "failed for this case (no memory)" in errors["b"]
    failures.write_text("[")
    with pytest.raises(ValueError, match=r"failures.json: expected the failures that predict notes"):
        evaluate_folders(predicted, truth)
