"""Calcium against figures worked out by hand."""

import math

import numpy as np
import pytest

from grcsf_fast.errors import ArgumentError
from grcsf_fast.evaluation.calcium import (
    CATEGORIES,
    agatston,
    compare_calcium,
    intraclass_correlation,
    risk_category,
    summarize_calcium,
    weighted_kappa,
)

AFFINE = np.diag([0.5, 0.5, 3.0, 1.0])  # 0.25 mm2 a pixel, 0.75 mm3 a voxel


def volume(*regions, shape=(20, 20, 6)):
    """Hounsfield units of tissue with regions of other values, and where these are."""
    hu = np.full(shape, 40.0, np.float32)
    for place, value in regions:
        hu[place] = value
    return hu, hu != 40


@pytest.mark.parametrize(
    ("peak", "weight"), [(131, 1), (199.9, 1), (200, 2), (299, 2), (300, 3), (399, 3), (400, 4), (2000, 4)]
)
def test_a_region_counts_by_its_area_and_peak(peak, weight):
    hu, lesion = volume((np.s_[2:6, 2:6, 3], 131), (np.s_[3, 3, 3], peak))
    assert agatston(lesion, hu, AFFINE) == pytest.approx(16 * 0.25 * weight)


def test_each_slice_has_its_own_peak():
    hu, lesion = volume((np.s_[2:6, 2:6, 3], 450), (np.s_[2:6, 2:4, 4], 150))
    assert agatston(lesion, hu, AFFINE) == pytest.approx(4 * 4 + 2 * 1)


def test_regions_of_a_slice_have_their_own_peaks():
    # They touch by a corner alone.
    hu, lesion = volume((np.s_[2:4, 2:4, 3], 450), (np.s_[4:6, 4:6, 3], 150))
    assert agatston(lesion, hu, AFFINE) == pytest.approx(1 * 4 + 1 * 1)


def test_less_than_a_square_millimetre_does_not_count():
    three, lesion = volume((np.s_[2:5, 2, 3], 450))
    assert agatston(lesion, three, AFFINE) == 0
    four, lesion = volume((np.s_[2:6, 2, 3], 450))
    assert agatston(lesion, four, AFFINE) == pytest.approx(4)


def test_exactly_a_square_millimetre_counts():
    """Five pixels of 0.2 mm2, which rounding makes a little less."""
    edge = 0.2**0.5
    hu, lesion = volume((np.s_[2:7, 2, 3], 450))
    assert agatston(lesion, hu, np.diag([edge, edge, 3.0, 1.0])) == pytest.approx(4)


def test_what_is_not_dense_does_not_count():
    hu, lesion = volume((np.s_[2:6, 2:6, 3], 130))
    assert agatston(lesion, hu, AFFINE) == 0
    assert agatston(np.zeros_like(lesion), hu + 500, AFFINE) == 0


def test_slices_at_other_distances_count_by_it():
    hu, lesion = volume((np.s_[2:6, 2:6, 3], 250))
    assert agatston(lesion, hu, np.diag([0.5, 0.5, 1.5, 1.0])) == pytest.approx(4 * 2 / 2)


def test_slices_of_a_tilted_gantry_are_as_far_apart_as_they_lie():
    """The step from one to the next leads forward too, and is longer than their distance."""
    hu, lesion = volume((np.s_[2:6, 2:6, 3], 250))
    tilted = AFFINE.copy()
    tilted[1, 2] = 1.5
    assert agatston(lesion, hu, tilted) == pytest.approx(agatston(lesion, hu, AFFINE))


def test_slices_are_axial_whatever_the_order_of_axes():
    hu, lesion = volume((np.s_[2:6, 2:6, 3], 450), (np.s_[2:6, 2:4, 4], 150))
    turned = np.zeros((4, 4))
    turned[0, 1], turned[1, 2], turned[2, 0], turned[3, 3] = 0.5, -0.5, 3.0, 1.0
    assert agatston(lesion.transpose(2, 0, 1), hu.transpose(2, 0, 1), turned) == agatston(lesion, hu, AFFINE)


@pytest.mark.parametrize(
    ("score", "category"),
    [(0, "0"), (0.4, "1-10"), (10, "1-10"), (10.5, "11-100"), (100, "11-100"), (100.5, "101-400"), (400, "101-400"),
     (400.1, ">400"), (5000, ">400")],
)  # fmt: skip
def test_risk_categories(score, category):
    assert risk_category(score) == category


@pytest.mark.parametrize("edge", [1.0, 0.5, 0.4])
@pytest.mark.parametrize(("score", "category"), [(100, "11-100"), (400, "101-400")])
def test_the_last_score_of_a_category_is_not_lost_to_rounding(edge, score, category):
    """On a grid as headers keep it, in float32."""
    affine = np.diag([edge, edge, 3.0, 1.0]).astype(np.float32)
    hu, lesion = volume((np.s_[..., 1], 131), shape=(50, 50, 2))
    lesion[..., 1].flat[round(score / edge**2) :] = False
    row = compare_calcium(lesion, lesion, hu, affine)
    assert row["agatston_true"] == pytest.approx(score)
    assert row["category_true"] == category


def test_scores_that_are_none_are_refused():
    for score in (-1, math.nan):
        with pytest.raises(ArgumentError, match="score"):
            risk_category(score)
    with pytest.raises(ArgumentError, match="one shape"):
        agatston(np.zeros((2, 2, 2), bool), np.zeros((2, 2, 3)), AFFINE)


def example():
    """LAD: two calcifications, one found; RCA: one, found in part; one false; dense bone that nobody marks."""
    hu, _ = volume(
        (np.s_[2:4, 2:4, 1], 250), (np.s_[8:10, 2:4, 1], 250), (np.s_[2:4, 10:14, 2], 450),
        (np.s_[12:14, 12:14, 4], 150), (np.s_[16:19, 16:19, :], 900),
    )  # fmt: skip
    truth = np.zeros(hu.shape, np.uint8)
    truth[2:4, 2:4, 1] = truth[8:10, 2:4, 1] = 1
    truth[2:4, 10:14, 2] = 3
    truth[1, 2:4, 1] = 1  # marked, and no calcium by its 40 HU
    predicted = np.zeros(hu.shape, bool)
    predicted[2:4, 2:4, 1] = predicted[2:4, 10:12, 2] = predicted[12:14, 12:14, 4] = True
    predicted[5, 5, 5] = True  # not dense
    return predicted, truth, hu


def test_calcifications_found_missed_and_false():
    row = compare_calcium(*example(), AFFINE, {1: "LAD", 2: "LCX", 3: "RCA"})
    assert (row["lesions_true"], row["lesions_found"]) == (3, 2)
    assert (row["lesions_predicted"], row["lesions_false"]) == (3, 1)
    assert row["true_mm3"] == pytest.approx(16 * 0.75)
    assert row["predicted_mm3"] == pytest.approx(12 * 0.75)
    assert row["both_mm3"] == pytest.approx(8 * 0.75)
    assert row["agatston_true"] == pytest.approx(1 * 2 + 1 * 2 + 2 * 4)
    assert row["agatston_predicted"] == pytest.approx(1 * 2 + 1 * 4 + 1 * 1)
    assert (row["category_true"], row["category_predicted"]) == ("11-100", "1-10")
    assert (row["LAD_lesions_true"], row["LAD_lesions_found"], row["LAD_agatston_true"]) == (2, 1, pytest.approx(4))
    assert (row["LCX_lesions_true"], row["LCX_true_mm3"], row["LCX_agatston_true"]) == (0, 0, 0)
    assert (row["RCA_lesions_true"], row["RCA_lesions_found"]) == (1, 1)
    assert (row["RCA_true_mm3"], row["RCA_both_mm3"]) == (pytest.approx(8 * 0.75), pytest.approx(4 * 0.75))


def test_calcifications_of_two_arteries_that_touch_are_two():
    hu, lesion = volume((np.s_[2:6, 2:6, 1], 250))
    truth = lesion * np.uint8(1)
    truth[4:6, 2:6, 1] = 2
    row = compare_calcium(lesion, truth, hu, AFFINE)
    assert (row["lesions_true"], row["lesions_predicted"], row["lesions_false"]) == (2, 1, 0)


def test_the_measures_over_all_patients():
    predicted, truth, hu = example()
    arteries = {1: "LAD", 2: "LCX", 3: "RCA"}
    nothing = np.zeros_like(predicted)
    pairs = ((predicted, truth), (nothing, truth), (nothing, truth * 0))
    rows = [compare_calcium(first, second, hu, AFFINE, arteries) for first, second in pairs]
    found = summarize_calcium(rows, list(arteries.values()))
    assert found["patients"] == 3
    sensitivity, ppv = 2 / 6, 2 / 3
    assert found["lesions"] == pytest.approx(
        {"sensitivity": sensitivity, "ppv": ppv, "f1": 2 * sensitivity * ppv / (sensitivity + ppv)}
    )
    assert found["volume"] == pytest.approx({"sensitivity": 8 / 32, "ppv": 8 / 12, "f1": 2 * 8 / (32 + 12)})
    assert found["arteries"]["LAD"] == pytest.approx({"lesions": 4, "sensitivity": 1 / 4, "volume_sensitivity": 4 / 16})
    assert found["arteries"]["LCX"]["lesions"] == 0
    assert math.isnan(found["arteries"]["LCX"]["sensitivity"])
    assert found["categories"]["11-100"] == {"0": 1, "1-10": 1, "11-100": 0, "101-400": 0, ">400": 0}
    assert found["categories"]["0"]["0"] == 1
    assert found["same_category"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("edge", "category", "counted"),
    [(0.25, "1-10", ">400"), (0.5, "11-100", ">400"), (2.0, "101-400", "0"), (5.0, ">400", "0")],
)
def test_a_missing_prediction_counts_as_the_furthest_category(edge, category, counted):
    hu, lesion = volume((np.s_[2:6, 2:6, 1], 450))
    missing = compare_calcium(lesion & False, lesion, hu, np.diag([edge, edge, 3.0, 1.0])) | {"missing": 1}
    other = compare_calcium(lesion, lesion, hu, AFFINE)
    assert missing["category_true"] == category
    expected = weighted_kappa([category, "11-100"], [counted, "11-100"], CATEGORIES)
    assert summarize_calcium([missing, other])["kappa"] == pytest.approx(expected)


def test_nothing_found_and_nothing_to_find():
    hu, lesion = volume((np.s_[2:6, 2:6, 1], 250))
    missed = summarize_calcium([compare_calcium(lesion & False, lesion, hu, AFFINE)])
    assert (missed["lesions"]["sensitivity"], missed["lesions"]["f1"]) == (0, 0)
    assert math.isnan(missed["lesions"]["ppv"])
    none = summarize_calcium([compare_calcium(lesion & False, lesion & False, hu, AFFINE)])
    assert all(math.isnan(value) for value in none["lesions"].values())


def test_intraclass_correlation_by_hand():
    # Means of patients 1.5, 3.5, 5.5 and of raters 3, 4: MSR 8, MSC 1.5, MSE 0.
    assert intraclass_correlation([1, 3, 5], [2, 4, 6]) == pytest.approx(8 / (8 + 2 * 1.5 / 3))
    # Means 1.5, 2, 5 and 3, 8/3: squares 43/3 of patients, 1/6 of raters, 113/6 of all, so 13/3 are left.
    expected = (43 / 6 - 13 / 6) / (43 / 6 + 13 / 6 + 2 / 3 * (1 / 6 - 13 / 6))
    assert intraclass_correlation([2, 1, 6], [1, 3, 4]) == pytest.approx(expected)
    assert intraclass_correlation([1, 2, 9], [1, 2, 9]) == pytest.approx(1)


def test_intraclass_correlation_of_too_little():
    assert math.isnan(intraclass_correlation([1], [1]))
    assert math.isnan(intraclass_correlation([2, 2], [2, 2]))
    assert math.isnan(intraclass_correlation([0.7] * 3, [0.7] * 3))
    with pytest.raises(ArgumentError, match="expected 2 values"):
        intraclass_correlation([1, 2], [1])


def test_kappa_by_hand():
    # Apart on average (0 + 1 + 0 + 2) / 4; by chance each of 0, 0, 2, 4 with each of 0, 1, 2, 2.
    first, second = [CATEGORIES[n] for n in (0, 0, 2, 4)], [CATEGORIES[n] for n in (0, 1, 2, 2)]
    by_chance = (2 * (0 + 1 + 2 + 2) + (2 + 1 + 0 + 0) + (4 + 3 + 2 + 2)) / 16
    assert weighted_kappa(first, second, CATEGORIES) == pytest.approx(1 - 0.75 / by_chance)
    assert weighted_kappa(first, first, CATEGORIES) == 1
    assert math.isnan(weighted_kappa(["0", "0"], ["0", "0"], CATEGORIES))
