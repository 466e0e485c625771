"""Where crops lie: along each axis by the edge of its own, and of several labels by each as often."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from grcsf_fast.datasets.cases import Case
from grcsf_fast.errors import ArgumentError
from grcsf_fast.training import sampling
from grcsf_fast.training.sampling import CaseCache, sample_crops
from grcsf_fast.training.settings import TrainSettings


def place_of_before(cases, crop, lesion_fraction, rng):
    """With one reach for all axes and one kind of lesion, as versions up to 0.1 drew."""
    case = cases[int(rng.integers(len(cases)))]
    centre = [int(rng.integers(size)) for size in case.image.shape[-3:]]
    if case.slices is not None and len(crop) == 2:
        centre[2] = case.slices[int(rng.integers(len(case.slices)))]
    if case.lesion is not None and rng.random() < lesion_fraction:
        slices = sampling._with_lesion(case, crop)
        if not slices:
            for index in rng.permutation(len(cases)):
                if slices := sampling._with_lesion(cases[index], crop):
                    case = cases[index]
                    break
        if slices and case.lesion is not None:
            z = slices[int(rng.integers(len(slices)))]
            inside = case.lesion[:, :, z].nonzero()
            x, y = inside[int(rng.integers(len(inside)))].tolist()
            reach = min(crop) // 4
            jitter = rng.integers(-reach, reach + 1, 3)
            centre = [x + int(jitter[0]), y + int(jitter[1]), z + (int(jitter[2]) if len(crop) == 3 else 0)]
    return case, centre


def cases_of_one_label(dtype):
    cases = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        lesion = torch.rand(30, 28, 18, generator=generator) > (0.98 if seed else 2)
        cases.append(
            Case(
                str(seed),
                torch.randn(30, 28, 18, generator=generator),
                lesion.to(dtype) * (3 - (dtype == torch.bool) * 2),
            )
        )
    return [cases[0], replace(cases[1], slices=(2, 5, 6)), cases[2]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("crop", [(12, 12), (12, 12, 12), (4, 4, 4), (3, 3)])
def test_with_equal_edges_and_one_label_every_crop_is_as_before(dtype, crop):
    """So that trainings that began before go on as they would have."""
    cases = [replace(case, lesion=case.lesion.to(dtype)) for case in cases_of_one_label(dtype)]
    looked = [sampling._looked_through(case) for case in cases]
    for seed in range(200):
        rng, before = np.random.default_rng(seed), np.random.default_rng(seed)
        case, centre = sampling._place(looked, crop, 0.7, rng)
        expected, place = place_of_before(cases, crop, 0.7, before)
        assert (case.name, centre) == (expected.name, place)
        assert rng.integers(2**60) == before.integers(2**60)


@pytest.mark.parametrize("crop", [(64, 48, 8), (32, 64)])
def test_a_lesion_lies_within_a_quarter_of_each_edge(crop):
    lesion = torch.zeros(160, 160, 40, dtype=torch.bool)
    lesion[80, 80, 20] = True
    batch = sample_crops([Case("a", torch.zeros(160, 160, 40), lesion)], 300, crop, 1.0, np.random.default_rng(0))
    places = batch["lesion"][:, 0].nonzero()[:, 1:]
    assert len(places) == 300
    for axis, edge in enumerate(crop):
        off = places[:, axis] - edge // 2
        assert off.abs().max() <= edge // 4
        # Of a uniform draw; by the shortest edge of all it would be 2 voxels of 64.
        assert off.min() <= -0.9 * (edge // 4)
        assert off.max() >= 0.9 * (edge // 4)


def crowded():
    """A vessel of many slices, and a tumour of three voxels in one of them that is beyond any crop around it."""
    lesion = torch.zeros(80, 80, 24, dtype=torch.uint8)
    lesion[5:30, 5:30, :16] = 1
    lesion[66:69, 66, 20] = 2
    return Case("a", torch.zeros(80, 80, 24), lesion)


@pytest.mark.parametrize("crop", [(24, 24), (24, 24, 8)])
@pytest.mark.parametrize("looked", [False, True])
def test_small_labels_are_seen_as_often_as_large_ones(crop, looked):
    case = crowded()
    pool = [sampling._looked_through(case) if looked else case]
    batch = sample_crops(pool, 100, crop, 1.0, np.random.default_rng(0))
    shares = [float((batch["lesion"] == number).flatten(1).any(1).float().mean()) for number in (1, 2)]
    assert 0.4 < shares[1] < 0.6
    assert shares[0] + shares[1] == pytest.approx(1)
    again = sample_crops([case], 100, crop, 1.0, np.random.default_rng(0))
    assert torch.equal(again["lesion"], batch["lesion"])


def test_labels_of_other_slices_are_not_drawn():
    case = sampling._looked_through(replace(crowded(), slices=(3, 4)))
    batch = sample_crops([case], 40, (24, 24), 1.0, np.random.default_rng(0))
    assert (batch["lesion"] == 1).flatten(1).any(1).all()
    assert not (batch["lesion"] == 2).any()


def test_labels_are_looked_for_once_in_a_case(monkeypatch):
    looks, real = [], sampling._label_slices
    monkeypatch.setattr(sampling, "_label_slices", lambda lesion: looks.append(1) or real(lesion))
    cases = CaseCache([crowded()], 1, 0).at(0)
    sample_crops(cases, 20, (24, 24), 1.0, np.random.default_rng(0))
    assert len(looks) == 1


@pytest.mark.parametrize(
    ("crop", "multiple", "jitters"),
    [
        ((96, 112), 8, (16, 16)), ((64, 64, 24), 8, (16, 16, 0)), ((32, 32, 8), 8, (8, 8, 0)),
        ((64, 64, 32), 8, (16, 16, 8)), ((64, 64, 24), 4, (16, 16, 4)), ((48, 48), 12, (12, 12)),
        ((16, 16), 8, (0, 0)), ((128, 128, 128), 16, (16,) * 3),
    ],
)  # fmt: skip
def test_the_default_jitter_fits_each_edge(crop, multiple, jitters):
    settings = TrainSettings(crop_size=crop).with_jitter(16, multiple)
    assert settings.jitters == jitters
    assert settings.crop_size_jitter == min(jitters)
    assert settings.largest_crop == tuple(map(sum, zip(crop, jitters, strict=True)))
    rng = np.random.default_rng(0)
    drawn = np.array([settings.crop_of_step(rng) for _ in range(60)])
    for axis, (edge, jitter) in enumerate(zip(crop, jitters, strict=True)):
        assert set(drawn[:, axis]) == {edge - jitter, edge, edge + jitter}
    # What is the same for all axes is in a checkpoint as ever.
    assert (settings.crop_size_jitters is None) == (len(set(jitters)) == 1)


def test_jitters_draw_the_numbers_of_one():
    own, one = (
        TrainSettings(crop_size=(64, 64, 24)).with_jitter(16, 8),
        TrainSettings(crop_size=(64,) * 3, crop_size_jitter=16),
    )
    first, second = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(20):
        assert own.crop_of_step(first)[:2] == one.crop_of_step(second)[:2]


@pytest.mark.parametrize(
    ("jitters", "least", "message"),
    [
        ((8, 8), 8, "expected one for each edge"),
        ((8, 8, 4), 8, "the least of them 8, got"),
        ((8, 24, 0), 0, "expected less than the crop's edges"),
    ],
)
def test_jitters_that_do_not_fit(jitters, least, message):
    with pytest.raises(ArgumentError, match=f"^crop_size_jitters: .*{message}"):
        TrainSettings(crop_size=(24, 24, 12), crop_size_jitter=least, crop_size_jitters=jitters)
