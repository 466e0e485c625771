"""What is measured on held-out subjects beside Dice."""

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.held_out import Drawn, enhanced, less, of_the_grid, smoothed, told_apart
from grcsf_fast.data.volumes import Preprocessing, Volume, prepare


def test_voxels_are_told_apart_as_by_ranks_and_thresholds():
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000).round(1)  # with ties
    positive = rng.random(2000) < 0.1 + 0.1 * (values > 0)
    area, precision = told_apart(values, positive)
    found = stats.mannwhitneyu(values[positive], values[~positive]).statistic
    assert area == pytest.approx(found / (positive.sum() * (~positive).sum()))
    recall, expected = 0.0, 0.0
    for threshold in np.unique(values)[::-1]:
        marked = values >= threshold
        before, recall = recall, (marked & positive).sum() / positive.sum()
        expected += (recall - before) * (marked & positive).sum() / marked.sum()
    assert precision == pytest.approx(expected)
    assert told_apart(positive.astype(float), positive) == (1, 1)


def test_smoothing_knows_the_brain_alone():
    brain = np.zeros((20, 20, 20), bool)
    brain[4:16, 4:16, 4:16] = True
    values = np.where(brain, 3.0, 1000.0)
    np.testing.assert_allclose(smoothed(values, brain, 2.0, np.diag([1, 2, 1, 1])), 3.0, rtol=1e-5)


def test_a_lesion_of_more_contrast_in_the_same_head():
    healthy = np.full((4, 4, 4), 5.0, np.float32)
    lesion = np.zeros(healthy.shape, bool)
    lesion[1:3, 1:3, 1:3] = True
    subject = Drawn(healthy - 2 * lesion, lesion, lesion, np.eye(4), healthy)
    assert np.array_equal(enhanced(subject, 2.0).image, healthy - 4 * lesion)
    assert enhanced(subject, 2.0).lesion is lesion


@pytest.mark.parametrize(("edge", "least", "most"), [(8, 0.99, 1.0), (1, 0.0, 0.0)])
def test_dice_that_the_grid_leaves(edge, least, most):
    """A block of whole voxels of 2 mm comes back; a single voxel of 1 mm is an eighth of one and goes."""
    rng = np.random.default_rng(0)
    head = np.zeros((48, 48, 48), np.float32)
    head[8:40, 8:40, 8:40] = 100 + rng.normal(size=(32, 32, 32))
    lesion = np.zeros(head.shape, bool)
    lesion[16 : 16 + edge, 16 : 16 + edge, 16 : 16 + edge] = True
    volume = Volume(head, np.eye(4), None, "head")
    found = of_the_grid(lesion, prepare(volume, Preprocessing((2.0, 2.0, 2.0)), torch.device("cpu")))
    assert least <= found <= most


def test_weights_are_compared_subject_by_subject():
    earlier = {"weights_sha256": "old", "cases": {str(seed): {"dice": 0.1 * seed} for seed in range(8)}}
    now = {str(seed): {"dice": 0.1 * seed + 0.2} for seed in range(8)}
    found = less(now, earlier)
    assert found["weights_sha256"] == "old"
    assert found["dice_difference"] == pytest.approx({"mean": 0.2, "low": 0.2, "high": 0.2})
    now["3"]["dice"] += 0.4
    wider = less(now, earlier)["dice_difference"]
    assert wider["low"] == pytest.approx(0.2)
    assert wider["high"] > wider["mean"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="expected a report on the subjects"):
        less(now, {"weights_sha256": "old", "cases": {"9": {"dice": 1.0}}})


def test_halves_of_subjects_by_how_much_their_lesions_changed_the_image():
    cases = {str(seed): {"dice": 0.5, "change_by_lesion": 9.0 - seed} for seed in range(8)}
    earlier = {"weights_sha256": "old", "cases": cases}
    now = {str(seed): {"dice": 0.5 if seed < 4 else 0.75} for seed in range(8)}
    found = less(now, earlier)
    assert found["dice_difference"]["mean"] == 0.125
    assert found["dice_difference_of_the_half_changed_less"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert found["dice_difference_of_the_half_changed_more"] == {"mean": 0, "low": 0, "high": 0}


def test_subjects_with_the_contrast_of_t1_and_the_others():
    earlier = {"weights_sha256": "old", "cases": {str(seed): {"dice": 0.5} for seed in range(4)}}
    now = {str(seed): {"dice": 0.75 if seed < 3 else 0.25, "t1": float(seed < 3)} for seed in range(4)}
    found = less(now, earlier)
    assert found["dice_difference_of_t1"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert found["dice_difference_of_other_contrasts"] == {"mean": -0.25, "low": -0.25, "high": -0.25}
