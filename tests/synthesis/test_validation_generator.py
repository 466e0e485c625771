"""The generator of the validation: one seed says everything, the mask is in the brain, training does not know it."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.validation_generator import draw_subject

ROOT = next(folder for folder in Path(__file__).parents if (folder / "setup.py").exists())


def test_a_seed_says_everything(template):
    first, second, other = (draw_subject(template, seed, 20.0) for seed in (1, 1, 2))
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("volume", [0.5, 8.0, 100.0])
def test_masks(template, volume):
    voxel_ml = float(np.prod(template.spacing)) / 1000
    for seed in range(4):
        image, lesion, affine, brain = draw_subject(template, seed, volume)
        assert image.shape == lesion.shape == brain.shape == template.t1.shape
        assert (image.dtype, lesion.dtype, brain.dtype) == (np.float32, bool, bool)
        assert np.isfinite(image).all()
        assert image.min() >= 0
        assert not (lesion & ~brain).any()
        assert lesion.sum() * voxel_ml == pytest.approx(volume, rel=0.35, abs=2 * voxel_ml)
        np.testing.assert_array_equal(affine, template.affine)


def test_it_shares_nothing_but_the_template():
    text = (ROOT / "benchmarks" / "validation_generator.py").read_text()
    assert [line for line in text.splitlines() if "import" in line and "grcsf_fast" in line] == [
        "from grcsf_fast.synthesis.template import Template"
    ]
    assert not [path for path in (ROOT / "grcsf_fast").rglob("*.py") if "validation_generator" in path.read_text()]
