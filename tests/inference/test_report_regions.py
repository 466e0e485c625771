"""Masks of several labels are those of the probabilities that are saved beside them."""

import nibabel as nib
import numpy as np
import pytest
import torch

from grcsf_fast.data.intensities import Preprocessing
from grcsf_fast.data.labels import Labels, any_label
from grcsf_fast.data.volumes import Volume, prepare, restore
from grcsf_fast.inference import report
from grcsf_fast.inference.report import lesions_on_grid, levels_on_grid

CLASSES = Labels(("a", "b", "c"), ((1,), (2,), (3,)))
REGIONS = Labels(("a", "b", "c"), ((1, 2, 3), (2, 3), (3,)), exclusive=False)


@pytest.fixture
def prepared(monkeypatch):
    """A grid whose axes run all other ways and whose blocks are a few planes."""
    monkeypatch.setattr("grcsf_fast.data.volumes.BLOCK_BYTES", 4 * 20 * 22 * 5)
    affine = np.array([[0, 1.1, 0, 3], [-1.3, 0, 0, 5], [0, 0, -2.7, 7], [0, 0, 0, 1.0]])
    data = np.random.default_rng(0).normal(0, 100, (20, 22, 18)).astype(np.float32)
    return prepare(Volume(data, affine, nib.Nifti1Header(), "v"), Preprocessing((2.0, 2.0, 2.0), "ct", margin=100))


def drawn(prepared, seed):
    return torch.rand(3, *prepared.data.shape, generator=torch.Generator().manual_seed(seed))


def levels_of(found, threshold, peak):
    return (found >= threshold).astype(np.uint8) + (found >= max(threshold, peak))


def in_memory(found):
    return torch.from_numpy(np.ascontiguousarray(found.transpose(2, 1, 0)))


@pytest.mark.parametrize("seed", range(3))
def test_a_mask_of_regions_is_where_a_saved_probability_reaches_the_threshold(prepared, seed):
    """The largest of the networks' grid, interpolated, reached it where none of them did."""
    probability = drawn(prepared, seed)
    saved = np.stack([restore(one, prepared) for one in probability])
    levels = levels_on_grid(probability, prepared, 0.5, 0.6, REGIONS)
    assert torch.equal(levels.reached, in_memory(levels_of(saved.max(0), 0.5, 0.6)))
    assert torch.equal(levels.numbers, in_memory(REGIONS.chosen(torch.from_numpy(saved)).numpy()))
    mask, _ = lesions_on_grid(levels_on_grid(probability, prepared, 0.5, 0.0, REGIONS), 0.5, 0.0)
    np.testing.assert_array_equal(mask > 0, saved.max(0) >= 0.5)
    # So it was not before, on these very fields.
    assert ((restore(any_label(probability, REGIONS), prepared) >= 0.5) & (mask == 0)).sum() > 0.01 * (mask > 0).sum()


@pytest.mark.parametrize("labels", [None, CLASSES], ids=["one", "classes"])
def test_of_one_label_and_of_classes_the_sum_is_restored(prepared, labels):
    probability = drawn(prepared, 5)[0] if labels is None else (4 * drawn(prepared, 5)).softmax(0) * 0.9
    whole = restore(probability if labels is None else any_label(probability, labels), prepared)
    levels = levels_on_grid(probability, prepared, 0.4, 0.5, labels)
    assert torch.equal(levels.reached, in_memory(levels_of(whole, 0.4, 0.5)))
    assert (levels.numbers is None) == (labels is None)


@pytest.mark.parametrize(("labels", "expected"), [(None, 1), (CLASSES, 4), (REGIONS, 3)], ids=["one", "c", "r"])
def test_how_often_something_is_restored(prepared, monkeypatch, labels, expected):
    calls, real = [], report.blocks_on_grid
    monkeypatch.setattr(report, "blocks_on_grid", lambda *given: calls.append(given) or real(*given))
    probability = drawn(prepared, 1)
    levels_on_grid(probability[0] if labels is None else probability, prepared, 0.5, 0.6, labels)
    assert len(calls) == expected
