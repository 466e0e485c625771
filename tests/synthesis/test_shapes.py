"""Volumes and forms of lesions, at 4 mm for speed."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from grcsf_fast.synthesis.anatomy import box
from grcsf_fast.synthesis.shapes import draw_shape, draw_site, lesion_volumes
from grcsf_fast.synthesis.streams import Random, Streams


def test_smooth_noise_is_linear_interpolation():
    shape, scale = (13, 9, 17), 4.0
    smooth = Random(3).smooth(shape, scale, 2)
    nodes = torch.randn(1, 2, 6, 5, 7, generator=Random(3).torch)
    expected = torch.nn.functional.interpolate(nodes, size=shape, mode="trilinear", align_corners=True)[0]
    torch.testing.assert_close(smooth, expected)


def test_streams_do_not_disturb_each_other():
    first, second = Streams.of(7), Streams.of(7)
    first.lesions.white((100,))
    first.contrast.numpy.random(10)
    assert first.anatomy.uniform(0, 1) == second.anatomy.uniform(0, 1)
    assert torch.equal(first.distractors.white((4,)), second.distractors.white((4,)))
    assert first.anatomy.uniform(0, 1) != second.skull.uniform(0, 1)


def test_the_box_of_a_mask():
    mask = torch.zeros(8, 9, 10, dtype=torch.bool)
    mask[2, 3:5, 9] = True
    assert box(mask, [1, 0, 2]) == (slice(1, 4), slice(3, 5), slice(7, 10))


def test_volume_distribution():
    """Totals are log-normal around 5 mL, as in ATLAS R2.0; counts fall from 1 to 6."""
    drawn = [lesion_volumes(Random(seed)) for seed in range(400)]
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


@pytest.mark.parametrize("volume", [0.01, 0.5, 5.0, 60.0, 500.0])
def test_a_shape_is_one_region_of_about_the_volume(template, volume):
    """In grey and white matter, of every kind that is drawn for the volume."""
    free = template.gm + template.wm > 0.5
    middle = (np.array(free.shape) - 1) / 2
    voxel_ml = np.prod(template.spacing) / 1000
    sizes, kinds = [], set()
    for seed in range(12):
        random = Random(seed)
        site = draw_site(free, template.gm, middle, volume, template.spacing, random)
        shape = draw_shape(free, template.gm, site, middle, volume, template.spacing, random)
        assert not (shape.region & ~free[shape.window]).any()
        assert ndimage.label(shape.region.numpy())[1] == 1
        inside = shape.depth[shape.region]
        assert inside.min() == 0
        assert inside.max() <= 1
        if volume > 1:
            sides = shape.region.any(2).any(1).nonzero().flatten() + shape.window[0].start >= middle[0]
            assert sides.all() or not sides.any()
        sizes.append(float(shape.region.sum()) * voxel_ml)
        kinds.add(site[0])
    assert len(kinds) > 1
    assert max(sizes) <= 1.4 * max(volume, voxel_ml)
    assert min(sizes) >= 0.85 * volume


def test_a_single_free_voxel_is_found(template):
    free = torch.zeros_like(template.t1, dtype=torch.bool)
    free[20, 30, 10] = True
    kind, centre = draw_site(free, template.gm, np.array([24.0, 29, 23]), 5.0, template.spacing, Random(0))
    assert kind == "any"
    assert tuple(centre) == (20, 30, 10)


def test_no_site_without_room(template):
    none = torch.zeros_like(template.t1, dtype=torch.bool)
    assert draw_site(none, template.gm, np.array([24.0, 29, 23]), 5.0, template.spacing, Random(0)) is None
