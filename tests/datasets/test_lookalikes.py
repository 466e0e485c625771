"""The look-alikes of CT data sets: real anatomy, and lesions where such lesions are."""

import nibabel as nib
import numpy as np
import pytest
from chest import NEEDS_CHEST, individual, load_chest
from lookalikes import hearts, nodules
from scipy import ndimage

from grcsf_fast.data.masks import load_numbers
from grcsf_fast.data.volumes import load_volume
from grcsf_fast.datasets.layouts import list_cases_of

pytestmark = NEEDS_CHEST


def read(layout, root):
    """Volume and mask of every case that has one."""
    for case in list_cases_of(layout, [root])[0].cases:
        if case.masks:
            yield load_volume(case.images[0]), load_numbers(case.masks, None, "", range(1, 4)).voxels


def test_lungs_and_heart_of_the_ct():
    chest = load_chest()
    assert chest.spacing == pytest.approx((3.0469, 3.0469, 5), abs=1e-3)
    litres = float(np.prod(chest.spacing)) / 1e6
    assert 5 < chest.lungs.sum() * litres < 7
    assert 0.3 < chest.heart.sum() * litres < 0.8
    assert -900 < np.median(chest.hu[chest.lungs]) < -780
    assert 20 < np.median(chest.hu[chest.heart]) < 60
    # Its tip points to the left and to the front: in RAS to lower x and higher y.
    lungs, heart, tip = (
        nib.affines.apply_affine(chest.affine, np.argwhere(part)).mean(0)
        for part in (chest.lungs, chest.heart, chest.heart * (np.arange(chest.hu.shape[2]) < 30))
    )
    assert tip[0] < lungs[0] - 5
    assert tip[1] > heart[1] > lungs[1]


def test_individuals_differ_and_have_no_calcium_of_their_own():
    corner, shape = (28, 42, 23), (64, 60, 18)
    one, other, again = (individual(np.random.default_rng(seed), corner, shape) for seed in (1, 2, 1))
    assert np.array_equal(one.hu, again.hu)
    assert 8 < np.abs(one.hu - other.hu).mean() < 400
    whole = load_chest()
    assert whole.hu[whole.heart].max() > 130
    assert max(part.hu[part.heart].max() for part in (one, other)) <= 130


def test_calcifications_lie_on_the_heart(tmp_path):
    places = {1: [], 2: [], 3: []}
    for number, (volume, reference) in enumerate(read("orcascore", hearts(tmp_path))):
        spots = 0 if number == 7 else 1 + number % 3
        assert (volume.data[reference > 0] >= 200).all()
        assert (volume.data[reference > 0] <= 900).all()
        for artery, found in places.items():
            labels, count = ndimage.label(reference == artery)
            assert count == spots
            for spot in range(1, count + 1):
                voxels = labels == spot
                assert 2 <= voxels.sum() <= 30
                around = volume.data[ndimage.binary_dilation(voxels, iterations=3) & (reference == 0)]
                assert around.min() < -50  # fat or lung
                assert np.median(around[around > -50]) > 0  # muscle and blood
                found.append(nib.affines.apply_affine(volume.affine, np.argwhere(voxels)).mean(0))
    lad, lcx, rca = (np.mean(found, axis=0) for found in places.values())
    assert lad[0] < rca[0] - 20  # on the left
    assert lcx[0] < rca[0] - 20
    assert lad[1] > lcx[1] + 20  # in front


def test_nodules_lie_in_lungs(tmp_path):
    sizes = []
    for volume, mask in read("decathlon", nodules(tmp_path)):
        assert ndimage.label(mask)[1] == 1
        spacing = nib.affines.voxel_sizes(volume.affine)
        sizes.append(mask.sum() * np.prod(spacing))
        around = ndimage.binary_dilation(mask, iterations=3) & ~ndimage.binary_dilation(mask, np.ones((3, 3, 3)))
        assert np.median(volume.data[around]) < -780
        if sizes[-1] > 500:
            assert -50 < volume.data[mask > 0].max() < 130
            assert volume.data[mask > 0].min() > -500
    one = float(np.prod(spacing))
    assert len(sizes) == 8
    assert min(sizes) == pytest.approx(one)  # of 2 mm, in one voxel
    assert max(sizes) == pytest.approx(np.pi / 6 * 15**3, rel=0.15)
