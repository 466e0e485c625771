"""The template, at 4 mm for speed."""

import importlib.util
import re

import nibabel as nib
import numpy as np
import pytest
import torch

from grcsf_fast.synthesis.template import load_template


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
    with pytest.raises(FileNotFoundError, match=r"pip install \"\.\[synthesize\]\""):
        load_template(7.77)
