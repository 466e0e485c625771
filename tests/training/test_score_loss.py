"""The score loss beside a segmentation loss of one's own."""

import pytest
import torch
import torch.nn.functional as F

from grcsf_fast import GRCSF, GRCSFLoss


@pytest.mark.parametrize("dims", [2, 3])
def test_one_channel_is_lesion_of_any_kind_with_softmax_too(dims):
    shape = (32, 48, 16)[:dims]
    network = GRCSF(dims, 1, 3, features=(4, 8), patch_size=4, rcu_levels=(0,))
    _, maps = network(torch.randn(2, 1, *shape), return_maps=True)
    labels = torch.randint(0, 3, (2, 1, *shape)) * (torch.rand(2, 1, *shape) > 0.95)
    lesion = (labels > 0).float()
    one_hot = F.one_hot(labels[:, 0], 3).movedim(-1, 1).float()
    expected = GRCSFLoss().score_loss(maps.patch_scores, lesion)
    assert expected.isfinite()
    assert GRCSFLoss(softmax=True).score_loss(maps.patch_scores, lesion) == expected
    assert GRCSFLoss(softmax=True).score_loss(maps.patch_scores, one_hot) == expected
