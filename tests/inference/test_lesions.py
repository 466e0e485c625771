"""Lesions in Python: other thresholds without the network, the table of any mask, and which voxels a row is of."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from heads import SPACING, noise, tiny_bundle

import grcsf_fast
from grcsf_fast import Bundle, Labels, Predictor
from grcsf_fast.errors import ArgumentError, ArgumentTypeError
from grcsf_fast.inference.report import numbered_lesions

GRID = np.array([[0, -SPACING[1], 0, 9], [SPACING[0], 0, 0, -7], [0, 0, SPACING[2], 5], [0, 0, 0, 1.0]])


def voxels(image):
    return np.asarray(image.dataobj)


@pytest.fixture(scope="module")
def scattered():
    """A prediction of many lesions, most of them of one size, of which a second threshold leaves some out."""
    bundle = tiny_bundle()
    scan = noise(40, 36, 12)
    probability = voxels(Predictor(bundle)(scan, affine=GRID).probability)
    thresholds = [float(np.quantile(probability[probability > 0], share)) for share in (0.9, 0.98)]
    bundle = replace(bundle, probability_threshold=thresholds[0], hysteresis_threshold=thresholds[1])
    return Predictor(bundle)(scan, affine=GRID), thresholds


def test_other_thresholds_without_the_network(scattered):
    prediction, thresholds = scattered
    mask = grcsf_fast.lesion_mask(voxels(prediction.probability), *thresholds)
    np.testing.assert_array_equal(mask, voxels(prediction.mask) > 0)
    assert prediction.report | grcsf_fast.lesion_report(mask, GRID) == prediction.report
    assert grcsf_fast.lesion_mask(voxels(prediction.probability), thresholds[0]).sum() > mask.sum()


def check_rows(rows, numbered, affine):
    """That each row is of the voxels that have its number."""
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    assert [row["number"] for row in rows] == [*range(1, len(rows) + 1)] == np.unique(numbered)[1:].tolist()
    for row in rows:
        places = np.argwhere(numbered == row["number"])
        assert row["volume_ml"] == pytest.approx(len(places) * voxel_ml, abs=1e-4)
        expected = nib.affines.apply_affine(affine, places.mean(0))
        np.testing.assert_allclose(row["centroid_mm"], expected, atol=0.011)


def test_a_row_of_the_report_is_of_the_voxels_with_its_number(scattered, tmp_path):
    prediction, _ = scattered
    image = prediction.lesions()
    rows = prediction.report["lesions"]
    assert len(rows) > len({row["volume_ml"] for row in rows}) > 3
    np.testing.assert_array_equal(image.affine, GRID)
    np.testing.assert_array_equal(voxels(image) > 0, voxels(prediction.mask) > 0)
    check_rows(rows, voxels(image), GRID)
    nib.save(image, tmp_path / "lesions.nii.gz")
    again = nib.load(tmp_path / "lesions.nii.gz")
    assert again.get_data_dtype() == np.int32
    np.testing.assert_array_equal(voxels(again), voxels(image))
    with pytest.raises(ArgumentError, match=r"^label: expected None or one of \[\], got 'core'"):
        prediction.lesions("core")


def test_lesions_of_small_animals_have_volumes():
    """Of voxels of 0.1 mm, each 1e-6 mL."""
    mask = np.zeros((9, 9, 9), np.uint8)
    mask[1, 1, 1] = mask[4:6, 4:7, 4:7] = 1
    found = grcsf_fast.lesion_report(mask, np.diag([0.1, 0.1, 0.1, 1.0]))
    assert [row["volume_ml"] for row in found["lesions"]] == [1.8e-5, 1e-6]
    assert found["total_volume_ml"] == 1.9e-5


def test_lesions_of_one_label():
    labels = Labels(("core", "rim"), ((1,), (2,)), exclusive=False)
    plain = tiny_bundle(rcu_levels=())
    network = grcsf_fast.GRCSF(**(plain.network.config | {"out_channels": 2}))
    with torch.no_grad():  # each label where the other is not
        network.output.weight[1] = -network.output.weight[0]
        network.output.bias[1] = -network.output.bias[0]
    bundle = Bundle(network, None, plain.preprocessing, labels=labels)
    scan = noise(40, 36, 12)
    largest = voxels(Predictor(bundle)(scan, affine=GRID).probability).max(3)
    bundle = replace(bundle, probability_threshold=float(np.quantile(largest[largest > 0], 0.9)))
    prediction = Predictor(bundle)(scan, affine=GRID)
    check_rows(prediction.report["lesions"], voxels(prediction.lesions()), GRID)
    for number, name in enumerate(labels.names, 1):
        found = voxels(prediction.lesions(name))
        np.testing.assert_array_equal(found > 0, voxels(prediction.mask) == number)
        check_rows(prediction.report["labels"][name]["lesions"], found, GRID)
    assert all(one["lesion_count"] for one in prediction.report["labels"].values())
    with pytest.raises(ArgumentError, match=r"^label: expected None or one of \['core', 'rim'\], got 'oedema'"):
        prediction.lesions("oedema")


def test_no_lesion_has_no_number():
    empty = numbered_lesions(np.zeros((3, 4, 5), np.uint8))
    assert empty.shape == (3, 4, 5)
    assert not empty.any()
    assert grcsf_fast.lesion_report(empty, np.eye(4)) == {"lesion_count": 0, "total_volume_ml": 0.0, "lesions": []}


IMAGE = nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4))
ARRAY = np.ones((4, 4, 4), np.float32)
OF_NIBABEL = r": expected an array, got an image of nibabel: np\.asarray\(image\.dataobj\) are its voxels"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grcsf_fast.lesion_mask(IMAGE, 0.5), ArgumentTypeError, "^probability" + OF_NIBABEL),
        (lambda: grcsf_fast.lesion_report(IMAGE, np.eye(4)), ArgumentTypeError, "^mask" + OF_NIBABEL),
        (lambda: grcsf_fast.evaluate_masks(IMAGE, ARRAY, np.eye(4)), ArgumentTypeError, "^predicted" + OF_NIBABEL),
        (lambda: grcsf_fast.evaluate_masks(ARRAY, IMAGE, np.eye(4)), ArgumentTypeError, "^truth" + OF_NIBABEL),
        (lambda: grcsf_fast.agatston(ARRAY, IMAGE, np.eye(4)), ArgumentTypeError, "^hu" + OF_NIBABEL),
        (lambda: grcsf_fast.agatston(IMAGE, ARRAY, np.eye(4)), ArgumentTypeError, "^lesion" + OF_NIBABEL),
        (lambda: grcsf_fast.agatston(ARRAY, ARRAY, np.eye(3)), ArgumentError, r"^affine: expected a finite, inverti"),
        (lambda: grcsf_fast.agatston(ARRAY, ARRAY[0], np.eye(4)), ArgumentError, r"^lesion and hu: expected arrays"),
        (
            lambda: grcsf_fast.lesion_report(ARRAY, "RAS"),
            ArgumentError,
            r"^affine: expected a \(4, 4\) matrix, got str",
        ),
        (
            lambda: grcsf_fast.lesion_mask(np.ones((4, 4, 4, 2)), 0.5),
            ArgumentError,
            r"^probability: expected three axes, got shape \(4, 4, 4, 2\)",
        ),
    ],
)
def test_arguments_that_are_none(call, error, message):
    with pytest.raises(error, match=message):
        call()
