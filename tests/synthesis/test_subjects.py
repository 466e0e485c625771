"""Synthetic subjects, at 4 mm for speed."""

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from grcsf_fast.synthesis import distractors, subjects
from grcsf_fast.synthesis.anatomy import draw_anatomy
from grcsf_fast.synthesis.contrast import SEQUENCES
from grcsf_fast.synthesis.streams import Streams
from grcsf_fast.synthesis.subjects import synthesize_subject

SEEDS = range(20)
NO_CHANCE = dict.fromkeys(distractors.CHANCES, 0.0)


@pytest.fixture(scope="module")
def drawn(template):
    """Twenty subjects without skull."""
    return [synthesize_subject(template, seed, skull=False) for seed in SEEDS]


@pytest.fixture
def undistracted(monkeypatch):
    monkeypatch.setattr(distractors, "CHANCES", NO_CHANCE)


@pytest.mark.parametrize("skull", [False, True])
def test_a_seed_says_everything(template, skull):
    state = torch.get_rng_state()
    first = synthesize_subject(template, 5, skull=skull)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global state must not matter
    second = synthesize_subject(template, 5, skull=skull)
    torch.set_rng_state(state)
    for name in ("image", "lesion", "brain", "healthy"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    np.testing.assert_array_equal(first.affine, second.affine)
    assert first.record == second.record


def test_another_seed_is_another_subject(template, drawn):
    assert not any(torch.equal(drawn[0].image, subject.image) for subject in drawn[1:])
    assert len({subject.record["lesion_volume_ml"] for subject in drawn}) > 15
    assert len({synthesize_subject(template, seed).record["skull"] for seed in range(6)}) == 2


def test_drawing_does_not_change_the_template(template):
    before = [tensor.clone() for tensor in (template.t1, template.gm, template.wm)], template.affine.copy()
    synthesize_subject(template, 1, skull=True)
    for tensor, old in zip((template.t1, template.gm, template.wm), before[0], strict=True):
        assert torch.equal(tensor, old)
    np.testing.assert_array_equal(template.affine, before[1])


def test_types_and_shapes(template, drawn):
    for subject in drawn:
        for name, dtype in (
            ("image", torch.float32), ("healthy", torch.float32), ("lesion", torch.bool), ("brain", torch.bool),
        ):  # fmt: skip
            part = getattr(subject, name)
            assert part.shape == template.t1.shape
            assert part.dtype == dtype
            assert part.is_contiguous()
        for image in (subject.image, subject.healthy):
            assert image.isfinite().all()
            assert image.min() >= 0
        assert (subject.healthy[~subject.brain] == 0).all()
        if "remnants" not in subject.record["distractors"]:
            assert (subject.image[~subject.brain] == 0).all()
        np.testing.assert_array_equal(subject.affine, template.affine)


def test_the_record_matches_the_mask(template, drawn):
    voxel_ml = np.prod(template.spacing) / 1000
    counts = []
    for seed, subject in zip(SEEDS, drawn, strict=True):
        record = subject.record
        counts.append(len(record["lesions"]))
        volume = float(subject.lesion.sum()) * voxel_ml
        assert record["lesion_volume_ml"] == pytest.approx(volume)
        assert sum(lesion["volume_ml"] for lesion in record["lesions"]) == pytest.approx(volume)
        assert record["seed"] == seed
        assert record["skull"] is False
        assert record["spacing_mm"] == pytest.approx(template.spacing)
        # Lesions may touch, never overlap: as many regions as lesions at most.
        assert ndimage.label(subject.lesion.numpy())[1] <= len(record["lesions"])
    assert min(counts) == 1
    assert max(counts) > 2
    assert set(counts) <= set(range(1, 7))


@pytest.mark.parametrize("skull", [False, True])
def test_lesions_lie_in_the_brain(template, drawn, skull):
    for subject in [synthesize_subject(template, seed, skull=True) for seed in range(4)] if skull else drawn:
        assert subject.lesion.any()
        assert not (subject.lesion & ~subject.brain).any()


def test_lesions_of_t1_are_darker_than_the_healthy_head(drawn):
    """Mean of the image over the healthy one's in the lesion; measured: 0.61 on average, 1.15 at most (old blood)."""
    ratios = [
        float(subject.image[subject.lesion].mean() / subject.healthy[subject.lesion].mean())
        for subject in drawn
        if subject.record["sequence"] == "t1"
    ]
    assert len(ratios) >= 10
    assert np.mean(ratios) < 0.85, ratios
    assert max(ratios) < 1.2, ratios


def test_the_healthy_head_does_not_depend_on_lesions_or_distractors(template, monkeypatch):
    for seed, skull in ((3, False), (4, True)):
        subject = synthesize_subject(template, seed, skull=skull)
        without = synthesize_subject(template, seed, lesions=False, skull=skull)
        given = synthesize_subject(template, seed, skull=skull, total_ml=80, count=3)
        monkeypatch.setattr(distractors, "CHANCES", dict.fromkeys(distractors.CHANCES, 1.0))
        distracted = synthesize_subject(template, seed, skull=skull)
        monkeypatch.undo()
        for other in (without, given, distracted):
            assert torch.equal(other.healthy, subject.healthy)
            assert torch.equal(other.brain, subject.brain)


@pytest.mark.parametrize("skull", [False, True])
def test_without_lesions_and_distractors_the_image_is_the_healthy_head(template, undistracted, skull):
    for seed in range(3):
        subject = synthesize_subject(template, seed, lesions=False, skull=skull)
        assert torch.equal(subject.image, subject.healthy)
        assert subject.record["distractors"] == {}
        assert not subject.lesion.any()
        assert subject.record["lesions"] == []
        assert subject.record["lesion_volume_ml"] == 0
        assert subject.record["effect"] is None


def test_lesions_change_what_is_near_alone(template, undistracted):
    """Their rims, of 0.9 mm at most, and the acquisition's blur and slices reach 3 voxels; a mass or a gap further."""
    effects = set()
    for seed in (0, 1, 2, 3, 7, 16, 17, 27):
        subject = synthesize_subject(template, seed, skull=False, total_ml=20)
        near = torch.from_numpy(ndimage.binary_dilation(subject.lesion.numpy(), np.ones((3, 3, 3)), iterations=3))
        effect = subject.record["effect"]
        if effect is not None:
            effects.add(effect["kind"])
            places = np.stack(np.meshgrid(*map(np.arange, near.shape), indexing="ij"), -1)
            away = np.linalg.norm((places - effect["centre"]) * template.spacing, axis=-1)
            near |= torch.from_numpy(away < effect["reach_mm"] + 3 * template.spacing[0])
        changed = subject.image != subject.healthy
        assert (changed & subject.lesion).sum() > 0.9 * subject.lesion.sum()
        assert not (changed & ~near).any()
    assert effects == {"mass", "ex vacuo"}


@pytest.mark.parametrize("name", list(distractors.CHANCES))
def test_a_distractor_changes_the_image_and_not_the_mask(template, monkeypatch, name):
    plain = NO_CHANCE
    monkeypatch.setattr(distractors, "CHANCES", plain)
    seed = 2
    before = synthesize_subject(template, seed, skull=False)
    monkeypatch.setattr(distractors, "CHANCES", plain | {name: 1.0})
    after = synthesize_subject(template, seed, skull=False)
    assert list(after.record["distractors"]) == [name]
    assert torch.equal(after.lesion, before.lesion)
    assert torch.equal(after.healthy, before.healthy)
    changed = after.image != before.image
    assert changed.any()
    if name not in ("motion", "ringing", "spike"):
        assert (changed & after.brain).sum() < 0.3 * after.brain.sum()
    if name == "remnants":
        assert (changed & ~after.brain).any()
    if name == "bite":
        assert (after.image[changed] == 0).all()
        assert not (changed & after.lesion).any()


def test_vessel_disease_spares_the_lesions(template):
    """The disease itself; the acquisition's blur mixes neighbours."""
    seen = []

    def watched(head, lesion, middle, random):
        image, record = add(head, lesion, middle, random)
        seen.append(((image != head.image) & lesion).any())
        assert (image != head.image).any()
        return image, record

    add = subjects.add_tissue_distractors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "add_tissue_distractors", watched)
        patch.setattr(distractors, "CHANCES", NO_CHANCE | {"white_matter": 1.0, "perivascular": 1.0})
        for seed in range(6):
            synthesize_subject(template, seed, total_ml=30)
    assert len(seen) == 6
    assert not any(seen)


def test_other_contrasts_come_by_chance(template):
    sequences = [synthesize_subject(template, seed, skull=False).record["sequence"] for seed in range(60)]
    assert set(sequences) == {"t1", "t2", "flair", "pd"}
    assert 30 < sequences.count("t1") < 55


def test_skull_widens_the_grid_and_keeps_the_position(template):
    """14 mm are 3 voxels of 4 mm. The brain of a seed is the same with and without skull."""
    for seed in range(3):
        with_skull = synthesize_subject(template, seed, skull=True, lesions=False)
        without = synthesize_subject(template, seed, skull=False, lesions=False)
        assert tuple(with_skull.image.shape) == tuple(size + 6 for size in template.t1.shape)
        np.testing.assert_allclose(
            nib.affines.apply_affine(with_skull.affine, [3, 3, 3]), template.affine[:3, 3], atol=1e-9
        )
        np.testing.assert_array_equal(with_skull.affine[:3, :3], template.affine[:3, :3])
        assert torch.equal(with_skull.brain[3:-3, 3:-3, 3:-3], without.brain)
        assert float(with_skull.image[~with_skull.brain].mean()) > 0


@pytest.mark.parametrize("volume", [0.2, 5.0, 60.0, 300.0])
def test_a_total_can_be_given(template, volume):
    for seed in range(4):
        record = synthesize_subject(template, seed, total_ml=volume, count=1).record
        assert record["lesion_volume_ml"] == pytest.approx(volume, rel=0.25, abs=0.064)


def test_the_number_of_lesions_can_be_given(template):
    subject = synthesize_subject(template, 3, total_ml=60, count=12)
    other = synthesize_subject(template, 3, total_ml=60)
    assert 6 < len(subject.record["lesions"]) <= 12
    assert len(other.record["lesions"]) <= 6
    assert subject.record["lesion_volume_ml"] == pytest.approx(60, rel=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrast": "dwi"}, "contrast: expected one of .*'template', 't1', 't2', 'flair', 'pd'.*, got 'dwi'"),
        ({"count": 0}, "count: expected 1 or more, got 0"),
        ({"total_ml": 501.0}, "total_ml: expected 0.01 to 500.0 mL, got 501.0"),
    ],
)
def test_ill_arguments(template, options, message):
    with pytest.raises(ValueError, match=message):
        synthesize_subject(template, 0, **options)


def test_template_contrast_is_the_real_average(template):
    """Of grey and white matter, in order; and the drawn contrasts differ from it."""
    subject = synthesize_subject(template, 0, lesions=False, skull=False, contrast="template")
    assert subject.record["contrast"] == "template"
    assert subject.record["sequence"] == "t1"
    assert 0 < float(subject.image[subject.brain].median()) < np.inf
    other = synthesize_subject(template, 0, lesions=False, skull=False)
    assert not torch.equal(other.image, subject.image)
    assert torch.equal(other.brain, subject.brain)


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_a_sequence_orders_the_tissues_as_its_scans_do(template, sequence):
    levels = []
    for seed in range(3):
        subject = synthesize_subject(template, seed, lesions=False, skull=False, contrast=sequence)
        assert subject.record["sequence"] == sequence
        anatomy = draw_anatomy(template, Streams.of(seed).anatomy)
        # Where there is much of one tissue, not at its border, which the acquisition blurs.
        white, grey = (subject.healthy[(tissue > 0.9) & subject.brain].median() for tissue in (anatomy.wm, anatomy.gm))
        levels.append(bool(white > grey))
    assert levels == [sequence == "t1"] * 3


def test_a_named_sequence_changes_no_random_draw_of_it(template):
    """`random` subjects whose sequence came by chance are those that its name asks for."""
    sequences = set()
    for seed in range(8):
        by_chance = synthesize_subject(template, seed)
        sequences.add(by_chance.record["sequence"])
        named = synthesize_subject(template, seed, contrast=by_chance.record["sequence"])
        assert torch.equal(by_chance.image, named.image)
    assert len(sequences) > 1
