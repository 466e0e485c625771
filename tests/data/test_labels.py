"""Several labels: what networks are trained towards, and which number a voxel gets."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from scans import prepared_on

from grcsf_fast.data.labels import Labels, any_label, prepare_numbers
from grcsf_fast.errors import ArgumentError

# Not in the order of their numbers.
CLASSES = Labels(("oedema", "core", "rim"), ((3,), (1,), (7,)))
REGIONS = Labels(("whole", "core", "rim"), ((1, 2, 4), (2, 4), (4,)), exclusive=False)


def test_targets_of_classes():
    """The first channel for what is none of them, then one for each name; a number that nobody named is none."""
    numbers = torch.tensor([[[0, 1, 3, 7, 5]], [[3, 3, 0, 1, 7]]], dtype=torch.float32)
    found = CLASSES.target(numbers)
    assert found.dtype == torch.float32
    assert found[0].tolist() == [[1, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    assert found[1].tolist() == [[0, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert CLASSES.outputs == 4


def test_targets_of_regions():
    """They overlap, and there is no channel for what lies in none."""
    found = REGIONS.target(torch.tensor([[[0, 1, 2, 4, 3]]], dtype=torch.uint8))
    assert found.dtype == torch.uint8
    assert found[0].tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0]]
    assert REGIONS.outputs == 3


@pytest.mark.parametrize(
    ("names", "numbers", "exclusive", "message"),
    [
        ((), (), True, "different names, got none"),
        (("a", "a"), ((1,), (2,)), True, "different names, got a, a"),
        (("a", "b"), ((1,),), True, "numbers for 2 names, got 1"),
        (("a", "b/c"), ((1,), (2,)), True, "a name without any of .*got 'b/c'"),
        (("a", "b"), ((1,), (0,)), True, "whole numbers from 1 to 255 for b"),
        (("a", "b"), ((1,), (256,)), False, "whole numbers from 1 to 255 for b"),
        (("a", "b"), ((1,), ()), False, "whole numbers from 1 to 255 for b"),
        (("a", "b"), ((1,), (2, 3)), True, "one number for the class b"),
        (("a", "b"), ((1,), (1,)), True, "a number of its own for every class"),
    ],
)
def test_labels_that_cannot_be_told_apart(names, numbers, exclusive, message):
    with pytest.raises(ArgumentError, match=f"^labels: expected {message}"):
        Labels(names, numbers, exclusive)


def test_of_classes_the_most_probable_is_chosen():
    """Whether there is any is asked elsewhere; certain ones are none too many."""
    probabilities = torch.tensor(
        [[0.6, 0.2, 0.1, 0.3, 1.0, 0.0], [0.3, 0.5, 0.2, 0.02, 0.0, 0.0], [0.1, 0.3, 0.65, 0.01, 0.0, 1.0]]
    )
    found = CLASSES.chosen(probabilities)
    assert found.dtype == torch.uint8
    assert found.tolist() == [3, 1, 7, 3, 3, 7]
    assert CLASSES.chosen(probabilities.reshape(3, 2, 1, 3)).tolist() == [[[3, 1, 7]], [[3, 3, 7]]]


def test_of_regions_the_most_probable_memberships_are_chosen():
    """Of each number the product over all regions, written out; the regions need not lie within each other."""
    labels = Labels(("left", "deep", "bright"), ((1, 2, 5), (2, 3, 5), (4, 5)), exclusive=False)
    probabilities = torch.rand(3, 500)
    expected = []
    for voxel in probabilities.T.tolist():
        likely = {}
        for number in (1, 2, 3, 4, 5):
            pairs = zip(voxel, labels.numbers, strict=True)
            likely[number] = np.prod([one if number in numbers else 1 - one for one, numbers in pairs])
        expected.append(max(likely, key=likely.get))
    assert set(expected) == {1, 2, 3, 4, 5}
    assert labels.chosen(probabilities).tolist() == expected


def test_overlapping_regions():
    """By hand; of numbers that lie in the same regions the lowest, and certain regions are finite."""
    probabilities = torch.tensor([[0.9, 0.9, 0.9, 0.6, 1.0], [0.2, 0.8, 0.7, 0.6, 1.0], [0.1, 0.3, 0.6, 0.4, 1.0]])
    assert REGIONS.chosen(probabilities).tolist() == [1, 2, 4, 2, 4]
    same = Labels(("whole", "core"), ((3, 2, 5), (5,)), exclusive=False)
    assert same.chosen(torch.tensor([[0.9, 0.9], [0.1, 0.9]])).tolist() == [2, 5]


def test_any_label():
    """Classes exclude each other and sum up, to 1 at most; of regions it is the highest."""
    probabilities = torch.tensor([[0.2, 0.0, 0.6, 0.3], [0.1, 0.0, 0.3, 0.7], [0.3, 0.0, 0.1001, 0.4]])
    torch.testing.assert_close(any_label(probabilities, CLASSES), torch.tensor([0.6, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(any_label(probabilities, REGIONS), torch.tensor([0.3, 0.0, 0.6, 0.7]))


def eighths(*counts: dict[int, int]) -> np.ndarray:
    """(2 n, 2, 2): cubes of eight voxels side by side, and how many voxels of each have which number."""
    cubes = []
    for one in counts:
        values = [number for number, count in one.items() for _ in range(count)]
        cubes.append(np.reshape(values + [0] * (8 - len(values)), (2, 2, 2)))
    return np.concatenate(cubes).astype(np.uint8)


CUBES = (
    ({1: 4}, 1),  # exactly half
    ({1: 3}, 0),
    ({1: 2, 2: 3}, 2),  # half of any together, and the one that covers most
    ({5: 1, 2: 2, 1: 1}, 2),
    ({7: 2, 3: 2}, 3),  # the lowest of equals
    ({1: 1, 2: 2}, 0),
    ({7: 5, 1: 3}, 7),
    ({}, 0),
)


def test_the_number_that_covers_most_of_a_voxel():
    mask = eighths(*(counts for counts, _ in CUBES))
    found = prepare_numbers(mask, prepared_on((16, 2, 2), (8, 1, 1)))
    assert found.dtype == torch.uint8
    assert found.flatten().tolist() == [expected for _, expected in CUBES]


@pytest.mark.parametrize("orientation", ["LPS", "PSL"])
def test_numbers_of_a_turned_file_in_a_box(orientation):
    """The same in RAS, however the file's axes run."""
    ras = eighths(*(counts for counts, _ in CUBES))
    prepared = prepared_on((16, 2, 2), (8, 1, 1), orientation, (slice(2, 7), slice(0, 1), slice(0, 1)))
    found = prepare_numbers(nib.apply_orientation(ras, prepared.orientation), prepared)
    assert found.flatten().tolist() == [expected for _, expected in CUBES][2:7]


def test_numbers_that_share_a_grid_keep_their_voxels():
    """Without resampling nothing is a matter of shares."""
    rng = np.random.default_rng(0)
    mask = rng.choice([0, 1, 2, 255], (5, 4, 3)).astype(np.uint8)
    assert np.array_equal(prepare_numbers(mask, prepared_on((5, 4, 3), (5, 4, 3))), mask)
