"""What counts as air and as head in an MRI, whatever was done to its intensities before."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scans import box_volume, head_data
from scipy import ndimage

from grcsf_fast.data.intensities import head_box, normalise
from grcsf_fast.data.volumes import Preprocessing, prepare


@pytest.mark.parametrize("kind", ["one voxel", "undershoots", "of noise", "normalised", "normalised whole"])
def test_air_where_some_voxels_lie_below_zero(kind):
    """It stays air, and the head is the same: what is darkest does not decide it alone."""
    data, head = head_data()
    noise = np.random.default_rng(0).normal(0, 2, data.shape)
    plain = np.where(head, data, noise if kind == "of noise" else 0).astype(np.float32)
    scale, given = float(data[head].mean()), plain.copy()
    if kind in ("one voxel", "of noise"):
        given[2, 2, 2] = -0.5 * scale
    elif kind == "undershoots":
        given[ndimage.binary_dilation(head, iterations=2) & ~head] = -0.1 * scale
    elif kind == "normalised":
        given = np.where(head, (data - scale) / data[head].std(), 0).astype(np.float32)
    else:
        given = ((plain - plain.mean()) / plain.std()).astype(np.float32)
    expected, found = (prepare(box_volume(one), Preprocessing()) for one in (plain, given))
    assert found.box == expected.box
    share, same = found.foreground.float().mean(), expected.foreground.float().mean()
    assert float(share) == pytest.approx(float(same), rel=0.1)
    both = found.foreground & expected.foreground
    assert float((found.data - expected.data)[both].abs().mean()) < 0.1
    assert float(found.data[both].mean()) == pytest.approx(0, abs=0.1)
    # Around the head it is as dark, as far as the head's own darkest voxels say.
    around = ~(found.foreground | expected.foreground)
    assert float(found.data[around].mean()) < float(found.data[both].quantile(0.05))


def stripped():
    """Intensities of a head with 0 around it, and the head."""
    data, head = head_data()
    return np.where(head, data, 0).astype(np.float32), head


@pytest.mark.parametrize("kind", ["offset", "normalised from 0", "normalised and enlarged"])
def test_air_of_one_value_above_zero(kind):
    """As of an image that was shifted, or normalised and then stored in whole numbers from 0 up."""
    data, head = stripped()
    normalised = np.where(head, (data - data[head].mean()) / data[head].std(), 0)
    given = {
        "offset": data + 100,
        "normalised from 0": normalised - normalised.min(),
        "normalised and enlarged": np.round(1000 * (normalised - normalised.min())),
    }[kind].astype(np.float32)
    expected, found = (prepare(box_volume(one), Preprocessing()) for one in (data, given))
    assert found.box == expected.box
    both = found.foreground & expected.foreground
    assert both.sum() > 0.9 * (found.foreground | expected.foreground).sum()
    assert float((found.data - expected.data)[both].abs().mean()) < 0.1
    around = ~(found.foreground | expected.foreground)
    assert float(found.data[around].mean()) < float(found.data[both].quantile(0.05))


def test_air_of_one_value_as_bundles_of_before_take_it():
    """To which an offset is part of the head, and what lies around a normalised head as bright as it."""
    data, head = stripped()
    before = replace(Preprocessing(), constant_background=False)
    assert prepare(box_volume(data + 100), before).foreground.float().mean() > 0.9
    normalised = np.where(head, (data - data[head].mean()) / data[head].std(), 0).astype(np.float32)
    found = prepare(box_volume(normalised), before)
    assert float(found.data[~found.foreground].mean()) == pytest.approx(0, abs=0.1)
    for one in (Preprocessing(), before):
        assert Preprocessing.from_json(one.as_json()) == one
    assert "constant_background" not in before.as_json()


def test_a_brightest_value_of_many_voxels_is_no_air():
    data = torch.from_numpy(np.random.default_rng(0).uniform(0, 140, (20, 20, 20)).astype(np.float32)).clamp(max=100)
    found, before = (
        normalise(data, replace(Preprocessing(), constant_background=new), "made by the test") for new in (True, False)
    )
    assert (data == 100).float().mean() > 0.2
    assert all(torch.equal(one, other) for one, other in zip(found, before, strict=True))


def test_air_is_looked_for_in_all_planes():
    """A sample whose step divides the size of an axis would be one plane, here one that a resampling left empty."""
    data, head = np.random.default_rng(0).normal(0, 0.05, (128, 128, 128)), np.zeros((128, 128, 128), bool)
    head[20:110, 20:110, 20:110] = True
    data[head] += 6
    data[..., 0] = 0
    found = normalise(torch.from_numpy(data.astype(np.float32)), Preprocessing(), "made by the test")[1].numpy()
    assert (found == head).mean() > 0.99


def test_a_head_in_a_wide_volume_keeps_its_ends():
    """A plane counts by what it holds of the fullest one too, so that padding takes nothing away."""
    ball = sum(np.square(axis - 31.5) for axis in np.ogrid[:64, :64, :64]) < 30**2
    box = head_box(torch.from_numpy(ball), 0)
    padded = np.pad(ball, 96)
    assert [(one.start - 96, one.stop - 96) for one in head_box(torch.from_numpy(padded), 0)] == [
        (one.start, one.stop) for one in box
    ]
    assert head_box(torch.from_numpy(padded), 0, padded=False)[0].start > box[0].start + 96
