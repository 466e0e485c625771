"""The Hausdorff distance: its percentile, its two directions, and grids whose axes are not at right angles."""

import numpy as np
import pytest
from scipy import spatial

from grcsf_fast.evaluation.metrics import _hausdorff95_sheared, evaluate_masks

TILT = np.array([[1.0, 0, 0, 0], [0, 1, 2.887, 0], [0, 0, 5, 0], [0, 0, 0, 1]])  # a gantry of 30 degrees


def points(*places, shape=(30, 30, 12)):
    mask = np.zeros(shape, np.uint8)
    mask[tuple(np.array(places).T)] = 1
    return mask


def surface_distances(first, second, affine):
    """Of masks of single voxels: each voxel is its surface."""
    one, other = (np.argwhere(mask) @ affine[:3, :3].T for mask in (first, second))
    apart = spatial.distance.cdist(one, other)
    return apart.min(1), apart.min(0)


@pytest.mark.parametrize(
    "affine", [np.diag([2.0, 3.0, 5.0, 1.0]), np.diag([1.0, 1.0, 4.0, 1.0])[:, [2, 0, 1, 3]], TILT]
)
def test_of_the_larger_direction_95_percent(affine):
    truth = points(*((x, y, 5) for x in range(0, 30, 3) for y in range(0, 12, 3)))
    one_far = truth.copy()
    one_far[29, 29, 11] = 1  # of 41, so less than 5 %
    half_far = truth | points(*((x, 25, z) for x in range(0, 30, 3) for z in (0, 2, 8, 10)))
    for predicted in (one_far, half_far):
        there, back = surface_distances(predicted, truth, affine)
        expected = max(np.percentile(there, 95), np.percentile(back, 95))
        for pair in ((predicted, truth), (truth, predicted)):
            assert evaluate_masks(*pair, affine)["hausdorff95_mm"] == pytest.approx(expected)
    assert evaluate_masks(one_far, truth, affine)["hausdorff95_mm"] == 0
    assert evaluate_masks(half_far, truth, affine)["hausdorff95_mm"] > 10


def test_a_tilted_gantry():
    first, second = points((5, 5, 2)), points((5, 7, 5))
    apart = float(np.hypot(2 + 3 * 2.887, 15))
    row = evaluate_masks(first, second, TILT)
    assert row["hausdorff95_mm"] == pytest.approx(apart)
    corners = np.array([[x, y, z] for x in (0, 30) for y in (0, 30) for z in (0, 12)]) @ TILT[:3, :3].T
    assert row["grid_diagonal_mm"] == pytest.approx(spatial.distance.pdist(corners).max())


@pytest.mark.parametrize(
    "shears",
    [{(1, 2): 2.887}, {(1, 2): -2.887}, {(0, 2): -2.887}, {(0, 1): -0.5}, {(0, 1): -0.5, (0, 2): -2.0}],
    ids=str,
)
def test_the_longest_diagonal_of_a_sheared_grid(shears):
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    for place, shear in shears.items():
        affine[place] = shear
    corners = np.array([[x, y, z] for x in (0, 30) for y in (0, 30) for z in (0, 12)]) @ affine[:3, :3].T
    found = evaluate_masks(points((5, 5, 2)), points((5, 7, 5)), affine)["grid_diagonal_mm"]
    assert found == pytest.approx(spatial.distance.pdist(corners).max())


def test_sheared_grids_are_measured_as_others():
    """The way for them gives what MONAI's gives where both can be used."""
    random = np.random.default_rng(0)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    for _ in range(5):
        first, second = (np.pad(random.random((8, 9, 7)) < 0.4, 4) for _ in range(2))
        expected = evaluate_masks(first, second, affine)["hausdorff95_mm"]
        assert _hausdorff95_sheared(first, second, affine) == pytest.approx(expected, rel=1e-6)
