"""Synthetic cases with their healthy heads."""

import pytest
import torch

from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.synthesis import distractors
from grcsf_fast.training.synthetic import SyntheticSource

PREPROCESSING = Preprocessing(spacing=(6.0, 6.0, 6.0))


def test_no_healthy_head_is_there_unless_asked_for():
    assert SyntheticSource(PREPROCESSING, 0)[1].healthy is None


@pytest.mark.parametrize("drawn_at", [None, (4.0,)])
def test_healthy_heads_lie_on_the_image(monkeypatch, drawn_at):
    """Without lesions and distractors the normalised healthy head is the normalised image, also when resampled."""
    monkeypatch.setattr(distractors, "CHANCES", dict.fromkeys(distractors.CHANCES, 0.0))
    for index in range(3):
        case = SyntheticSource(PREPROCESSING, 0, lesions=False, drawn_at=drawn_at, healthy=True)[index]
        torch.testing.assert_close(case.healthy, case.image, atol=1e-4, rtol=1e-4)


def test_healthy_heads_differ_at_the_lesion(monkeypatch):
    monkeypatch.setattr(distractors, "CHANCES", dict.fromkeys(distractors.CHANCES, 0.0))
    for index in range(4):
        case = SyntheticSource(PREPROCESSING, 0, healthy=True)[index]
        assert case.healthy.dtype == torch.float32
        assert case.healthy.shape == case.image.shape
        off = (case.image - case.healthy).abs()
        if case.lesion.any():
            assert off[case.lesion].mean() > 5 * off[~case.lesion].mean()


def test_healthy_slices_are_those_of_the_image():
    plain, with_healthy = (SyntheticSource(PREPROCESSING, 5, slices=6, healthy=asked)[0] for asked in (False, True))
    assert with_healthy.healthy.shape == with_healthy.image.shape == plain.image.shape
    assert torch.equal(with_healthy.image, plain.image)
