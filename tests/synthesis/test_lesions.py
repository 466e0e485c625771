"""The template, synthetic subjects and their lesions, at 4 mm for speed."""

import importlib.util
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from grcsf_fast.synthesis import lesions
from grcsf_fast.synthesis.lesions import _box, _lesion_shape, _lesion_volumes, _Random, synthesize_subject
from grcsf_fast.synthesis.template import load_template

SEEDS = range(20)


@pytest.fixture(scope="module")
def template():
    return load_template(4.0)


@pytest.fixture(scope="module")
def subjects(template):
    """Twenty subjects without skull, each with the tissue that its lesions were put into."""
    tissues = []
    insert = lesions._insert_lesions

    def watched(image, tissue, *others):
        tissues.append(tissue)
        return insert(image, tissue, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lesions, "_insert_lesions", watched)
        drawn = [synthesize_subject(template, seed, skull=False) for seed in SEEDS]
    return list(zip(drawn, tissues, strict=True))


@pytest.mark.parametrize("skull", [False, True])
def test_a_seed_says_everything(template, skull):
    state = torch.get_rng_state()
    first = synthesize_subject(template, 5, skull=skull)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global state must not matter
    second = synthesize_subject(template, 5, skull=skull)
    torch.set_rng_state(state)
    for name in ("image", "lesion", "brain"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    np.testing.assert_array_equal(first.affine, second.affine)
    assert first.record == second.record


def test_smooth_noise_is_linear_interpolation():
    shape, scale = (13, 9, 17), 4.0
    smooth = _Random(3).smooth(shape, scale, 2)
    nodes = torch.randn(1, 2, 6, 5, 7, generator=_Random(3).torch)
    expected = torch.nn.functional.interpolate(nodes, size=shape, mode="trilinear", align_corners=True)[0]
    torch.testing.assert_close(smooth, expected)


def test_the_box_of_a_mask():
    mask = torch.zeros(8, 9, 10, dtype=torch.bool)
    mask[2, 3:5, 9] = True
    assert _box(mask, [1, 0, 2]) == (slice(1, 4), slice(3, 5), slice(7, 10))


def test_another_seed_is_another_subject(template, subjects):
    images = [subject.image for subject, _ in subjects]
    assert not any(torch.equal(images[0], image) for image in images[1:])
    assert len({subject.record["lesion_volume_ml"] for subject, _ in subjects}) > 15
    assert len({synthesize_subject(template, seed).record["skull"] for seed in range(6)}) == 2


def test_drawing_does_not_change_the_template(template):
    before = [tensor.clone() for tensor in (template.t1, template.gm, template.wm)], template.affine.copy()
    synthesize_subject(template, 1, skull=True)
    for tensor, old in zip((template.t1, template.gm, template.wm), before[0], strict=True):
        assert torch.equal(tensor, old)
    np.testing.assert_array_equal(template.affine, before[1])


def test_types_and_shapes(template, subjects):
    for subject, _ in subjects:
        assert subject.image.shape == subject.lesion.shape == subject.brain.shape == template.t1.shape
        assert (subject.image.dtype, subject.lesion.dtype, subject.brain.dtype) == (
            torch.float32,
            torch.bool,
            torch.bool,
        )
        assert subject.image.isfinite().all()
        assert subject.image.min() >= 0
        assert (subject.image[~subject.brain] == 0).all()
        np.testing.assert_array_equal(subject.affine, template.affine)


def test_the_record_matches_the_mask(template, subjects):
    voxel_ml = np.prod(template.spacing) / 1000
    counts = []
    for seed, (subject, _) in zip(SEEDS, subjects, strict=True):
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


def test_lesions_lie_in_the_tissue(subjects):
    for subject, tissue in subjects:
        assert subject.lesion.any()
        assert not (subject.lesion & ~tissue).any()
        assert not (subject.lesion & ~subject.brain).any()


def test_lesions_lie_in_the_brain_under_a_skull(template):
    for seed in range(4):
        subject = synthesize_subject(template, seed, skull=True)
        assert subject.lesion.any()
        assert not (subject.lesion & ~subject.brain).any()


def test_lesions_are_darker_than_the_tissue_around(subjects):
    """Mean in the lesion over mean of the tissue up to 2 voxels away; measured: 0.51 on average, 0.83 at most."""
    ratios = []
    for subject, tissue in subjects:
        near = torch.from_numpy(ndimage.binary_dilation(subject.lesion.numpy(), iterations=2))
        around = near & tissue & ~subject.lesion
        ratios.append(float(subject.image[subject.lesion].mean() / subject.image[around].mean()))
    assert np.mean(ratios) < 0.7, ratios
    assert max(ratios) < 1, ratios


def test_healthy_subject(template):
    subject = synthesize_subject(template, 3, lesions=False)
    assert not subject.lesion.any()
    assert subject.record["lesions"] == []
    assert subject.record["lesion_volume_ml"] == 0


def test_skull_widens_the_grid_and_keeps_the_position(template):
    """14 mm are 3 voxels of 4 mm. Brains of the same seed lie at the same place with and without skull."""
    off = []
    for seed in range(6):
        with_skull = synthesize_subject(template, seed, skull=True, lesions=False)
        without = synthesize_subject(template, seed, skull=False, lesions=False)
        assert tuple(with_skull.image.shape) == tuple(size + 6 for size in template.t1.shape)
        np.testing.assert_allclose(
            nib.affines.apply_affine(with_skull.affine, [3, 3, 3]), template.affine[:3, 3], atol=1e-9
        )
        np.testing.assert_array_equal(with_skull.affine[:3, :3], template.affine[:3, :3])
        places = [
            nib.affines.apply_affine(subject.affine, subject.brain.nonzero().numpy().mean(0))
            for subject in (with_skull, without)
        ]
        off.append(places[0] - places[1])
        assert float(with_skull.image[~with_skull.brain].mean()) > 0
    assert np.abs(np.mean(off, 0)).max() < 3, off


def test_volume_distribution():
    """Totals are log-normal around 5 mL, as in ATLAS R2.0; counts fall from 1 to 6."""
    drawn = [_lesion_volumes(_Random(seed)) for seed in range(400)]
    totals = np.array([volumes.sum() for volumes in drawn])
    counts = np.bincount([len(volumes) for volumes in drawn], minlength=7)
    assert totals.min() >= 0.01
    assert totals.max() <= 500 * (1 + 1e-9)
    assert 3 < np.median(totals) < 8
    assert 15 < totals.mean() < 40
    assert counts[0] == 0
    assert counts.sum() == counts[1:7].sum() == 400
    assert counts[1] > counts[2] > counts[4] > 0
    assert counts[6] > 0
    assert min(volumes.min() for volumes in drawn) >= 0.01


def test_the_number_of_lesions_can_be_given(template):
    subject = synthesize_subject(template, 3, total_ml=60, count=12)
    other = synthesize_subject(template, 3, total_ml=60)
    assert 6 < len(subject.record["lesions"]) <= 12
    assert len(other.record["lesions"]) <= 6
    assert subject.record["lesion_volume_ml"] == pytest.approx(60, rel=0.2)
    with pytest.raises(ValueError, match="count: expected 1 or more, got 0"):
        synthesize_subject(template, 3, count=0)


@pytest.mark.parametrize("volume", [0.01, 0.5, 5.0, 60.0, 500.0])
def test_lesion_shape_is_one_region_of_about_the_volume(template, volume):
    """In grey and white matter; measured over 30 seeds: 0.91 to 1.3 of the volume, above 1.04 for few voxels alone."""
    free = template.gm + template.wm > 0.5
    voxel_ml = np.prod(template.spacing) / 1000
    sizes = []
    for seed in range(5):
        shape = _lesion_shape(free, volume, template.spacing, _Random(seed))
        assert not (shape & ~free).any()
        assert ndimage.label(shape.numpy())[1] == 1
        sizes.append(float(shape.sum()) * voxel_ml)
    assert max(sizes) <= 1.4 * max(volume, voxel_ml)
    assert min(sizes) >= 0.85 * volume


def test_lesion_shape_without_room(template):
    none = torch.zeros_like(template.t1, dtype=torch.bool)
    assert not _lesion_shape(none, 5.0, template.spacing, _Random(0)).any()


def test_template_contrast_is_the_real_average(template):
    """Of grey and white matter, in order; and the drawn contrasts differ from it."""
    subject = synthesize_subject(template, 0, lesions=False, skull=False, contrast="template")
    assert subject.record["contrast"] == "template"
    assert 0 < float(subject.image[subject.brain].median()) < np.inf
    other = synthesize_subject(template, 0, lesions=False, skull=False)
    assert not torch.equal(other.image, subject.image)
    assert torch.equal(other.brain, subject.brain)


def test_another_contrast(template):
    with pytest.raises(ValueError, match="contrast: expected 'random' or 'template', got 't2'"):
        synthesize_subject(template, 0, contrast="t2")


@pytest.mark.parametrize("spacing", [4.0, 6.0, 9.5])
def test_templates_of_every_spacing_cover_the_same_box(spacing):
    """197 x 233 x 189 voxels of 1 mm."""
    template = load_template(spacing)
    box = np.array([197, 233, 189])
    assert template.spacing == pytest.approx((spacing,) * 3, rel=0.05)
    assert template.gm.shape == template.wm.shape == template.t1.shape
    shape = np.array(template.t1.shape)
    low = nib.affines.apply_affine(template.affine, [-0.5] * 3)
    high = nib.affines.apply_affine(template.affine, shape - 0.5)
    np.testing.assert_allclose(low, [-98.5, -134.5, -72.5], atol=1e-6)
    np.testing.assert_allclose(high - low, box, atol=1e-6)


def test_the_templates_values(template):
    for name in ("t1", "gm", "wm"):
        values = getattr(template, name)
        assert values.dtype == torch.float32
        assert values.min() >= 0
        assert values.isfinite().all()
    assert max(float(template.gm.max()), float(template.wm.max())) <= 1 + 1e-5
    assert float(template.t1[template.wm > 0.9].median()) == pytest.approx(1, abs=0.05)
    # About 1.9 litres inside the skull and half a litre or more of each kind of matter.
    voxel_ml = np.prod(template.spacing) / 1000
    assert 1200 < float((template.t1 > 0.05).sum()) * voxel_ml < 2300
    assert 500 < float(template.gm.sum()) * voxel_ml < 1300
    assert 350 < float(template.wm.sum()) * voxel_ml < 900


def test_template_folder_without_the_files(tmp_path):
    expected = f"{tmp_path / 'mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz'}: expected the ICBM 2009a t1 map"
    with pytest.raises(FileNotFoundError, match=re.escape(expected)):
        load_template(4.0, tmp_path)


def test_template_without_nilearn(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps nilearn"):
        load_template(7.77)
