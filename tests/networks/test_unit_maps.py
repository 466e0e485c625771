"""What the units saw, behind the logits and over a whole volume."""

import pytest
import torch
from small import network
from streams import together

from grcsf_fast.networks.stream import Stream
from grcsf_fast.networks.unit_maps import unit_maps, with_unit_maps
from grcsf_fast.networks.whole_volume import segment_views, segmentation_stage


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_behind_the_logits(dims):
    model = network(dims, out_channels=2)
    image, maps = torch.randn(2, 1, *(21, 18, 13)[:dims]), torch.rand(2, 2, *(21, 18, 13)[:dims])
    with torch.no_grad():
        logits, seen = model(image, maps, return_maps=True)
        found = with_unit_maps(model)(image, maps)
    assert unit_maps(model) == ("gcu_residual", "patch_score")
    assert torch.equal(found[:, :2], logits)
    assert torch.equal(found[:, 2:3], seen.gcu_residuals[0])
    level = min(seen.patch_scores)
    edge = model.rcu[str(level)].patch_size * 2**level
    # The value of each pixel is that of its patch.
    picked = seen.patch_scores[level]
    for axis in range(dims):
        picked = picked.index_select(axis + 2, torch.arange(image.shape[axis + 2]) // edge)
    assert torch.equal(found[:, 3:], picked)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"gcu": False}, ("patch_score",)),
        ({"rcu_levels": ()}, ("gcu_residual",)),
        ({"gcu": False, "rcu_levels": ()}, ()),
    ],
)
def test_a_network_has_the_maps_of_its_units(config, names):
    model = network(2, out_channels=1, **config)
    image = torch.randn(1, 1, 16, 16)
    maps = torch.rand(1, 2, 16, 16) if model.rcu else None
    assert unit_maps(model) == names
    with torch.no_grad():
        assert with_unit_maps(model)(image, maps).shape[1] == 1 + len(names)


@pytest.mark.parametrize(("dims", "roi_size"), [(2, None), (3, None), (3, (8, 8, 8))])
def test_of_a_volume_they_are_those_of_its_first_view(dims, roi_size):
    model = network(dims, out_channels=1)
    volume, maps = torch.randn(17, 16, 9), torch.rand(2, 17, 16, 9)
    foreground = torch.zeros(17, 16, 9, dtype=torch.bool)
    foreground[:6, :6, 2:5] = True

    def found(foreground, **views):
        work = segment_views(volume, foreground, maps, model, roi_size, **views)
        (segmented,) = together(Stream(segmentation_stage(model, 16, roi_size)), [work])
        assert segmented.probability.shape == volume.shape
        return segmented.unit_maps

    whole = found(None)
    several = found(None, tta_flip=True, tta_scales=(1.0, 1.25))
    assert set(whole) == set(several) == {"gcu_residual", "patch_score"}
    for name, one in whole.items():
        assert torch.equal(one, several[name])
        assert one.unique().numel() > 2
    if dims == 2:
        with torch.no_grad():
            expected = with_unit_maps(model)(volume.permute(2, 0, 1)[:, None], maps.permute(3, 0, 1, 2))
        torch.testing.assert_close(whole["gcu_residual"], expected[:, 1].permute(1, 2, 0))
        for name, one in found(foreground).items():
            assert torch.equal(one[..., 2:5], whole[name][..., 2:5])
            assert not one[..., :2].any()
            assert not one[..., 5:].any()
    if dims == 2 or roi_size is not None:
        for one in found(torch.zeros_like(foreground)).values():
            assert not one.any()
    if roi_size is not None:
        seen = found(foreground)
        assert seen["gcu_residual"].any()
        assert (seen["gcu_residual"] >= 0).all()
        assert not seen["gcu_residual"][15:, 15:].any()  # where no window was looked at


@pytest.mark.parametrize("dims", [2, 3])
def test_a_network_without_units_sees_an_enlarged_volume(dims):
    model = network(dims, out_channels=1, gcu=False, rcu_levels=())
    work = segment_views(torch.randn(17, 16, 9), None, None, model, tta_flip=True, tta_scales=(1.25, 1.0))
    (segmented,) = together(Stream(segmentation_stage(model, 16)), [work])
    assert segmented.probability.shape == (17, 16, 9)
    assert segmented.unit_maps == {}
