"""The two units by themselves, in backbones of others."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from awake import awake
from cancelled import cancelled
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from grcsf_fast import GlobalCompensationUnit, GRCSFLoss, RegionCompensationUnit, compensate
from grcsf_fast.errors import ArgumentError, GrcsfError
from grcsf_fast.networks import gcu, grcsf, rcu
from grcsf_fast.training import losses


class WithUnits(nn.Module):
    """MONAI's U-Net, unchanged: both units join it by hooks at its finest skip connection."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.backbone = BasicUNet(spatial_dims, 1, 1, features=(8, 8, 16, 16, 16, 8))
        self.gcu = GlobalCompensationUnit(8)
        self.rcu = RegionCompensationUnit(spatial_dims, 8, context_channels=16, patch_size=4)
        self.backbone.conv_0.register_forward_hook(self._compensate)
        self.backbone.down_4.register_forward_hook(self._remember)
        self.backbone.upcat_1.register_forward_hook(self._attend)

    def _compensate(self, _: nn.Module, __: object, skip: Tensor) -> Tensor:
        return self.gcu(skip)[0]

    def _remember(self, _: nn.Module, __: object, bottleneck: Tensor) -> None:
        self.context = bottleneck.flatten(2).mean(2)

    def _attend(self, _: nn.Module, __: object, features: Tensor) -> Tensor:
        out, self.scores = self.rcu(features, self.maps, self.context)
        return out

    def forward(self, image: Tensor, residual_maps: Tensor) -> Tensor:
        self.maps = residual_maps
        return self.backbone(image)


@pytest.mark.parametrize("spatial", [(32, 48), (16, 16, 32)])
def test_both_in_a_backbone_of_monai(spatial):
    model = awake(WithUnits(len(spatial))).train()
    image, maps = torch.randn(2, 1, *spatial), torch.rand(2, 2, *spatial)
    logits = model(image, maps)
    assert logits.shape == (2, 1, *spatial)
    assert model.scores.shape == (2, 1, *[size // 4 for size in spatial])
    (GRCSFLoss()(logits, image > 1) + model.scores.mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # MONAI's convolutions go into instance norms too.
        assert parameter.grad.any() or cancelled(name) or name.endswith(".conv.bias"), name
    assert not torch.equal(model(image, 1 - maps), logits)


def test_several_scales_at_once():
    units = [GlobalCompensationUnit(4), GlobalCompensationUnit(6)]
    features = [torch.randn(2, 4, 16, 8), torch.randn(2, 6, 8, 4)]
    coarse = [F.avg_pool2d(one, 2) for one in features]
    for unit, one, low, (compensated, residual) in zip(
        units, features, coarse, compensate(units, features, coarse), strict=True
    ):
        alone = unit(one, low)
        torch.testing.assert_close(compensated, alone[0])
        torch.testing.assert_close(residual, alone[1])
    with pytest.raises(ArgumentError, match=r"^units, features, coarse: expected as many of each, got 2, 2 and 1"):
        compensate(units, features, coarse[:1])


@pytest.mark.parametrize("spatial", [(8, 12), (4, 6, 8)])
def test_the_global_unit_written_out(spatial):
    """Its two gates, the residual and what is given back, in PyTorch's own operations."""
    unit, features = awake(GlobalCompensationUnit(6)), torch.randn(2, 6, *spatial)
    wide = (..., *[None] * len(spatial))
    coarse = (F.avg_pool2d if len(spatial) == 2 else F.avg_pool3d)(features, 2)
    gates = []
    for gate in (unit.feature_gate.excite, unit.coarse_gate.excite):
        hidden = (features.flatten(2).mean(2) @ gate[0].weight.T + gate[0].bias).clamp(min=0)
        gates.append((1 / (1 + (-hidden @ gate[2].weight.T - gate[2].bias).exp()))[wide])
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    upsampled = F.interpolate(coarse, scale_factor=2, mode=mode, align_corners=False)
    residual = 1 - F.cosine_similarity(gates[0] * features, gates[1] * upsampled, 1)[:, None]
    compensated = features + unit.strength[wide] * residual * (features - upsampled)
    assert (compensated - features).abs().max() > 0.1
    for given in (None, coarse):
        found = unit(features, given)
        torch.testing.assert_close(found[0], compensated, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1], residual, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("features", "coarse", "message"),
    [
        ((2, 5, 8, 8), (2, 5, 4, 4), r"^features: expected \(B,C,\*S\) with C = 4 .*got \(2, 5, 8, 8\)"),
        ((2, 4, 8), (2, 4, 4), r"^features: .*2 or 3 spatial axes"),
        ((2, 4, 8, 8), (2, 4, 8, 8), r"^coarse: .*half of features \(2, 4, 8, 8\), got \(2, 4, 8, 8\)"),
        ((2, 4, 8, 8), (2, 8, 4, 4), r"^coarse: .*got \(2, 8, 4, 4\)"),
        ((2, 4, 7, 8), (2, 4, 3, 4), r"^features: expected even spatial axes, got \(2, 4, 7, 8\)"),
    ],
)
def test_features_that_the_global_unit_is_not_for(features, coarse, message):
    with pytest.raises(GrcsfError, match=message):
        GlobalCompensationUnit(4)(torch.zeros(features), torch.zeros(coarse))


@pytest.mark.parametrize(
    ("features", "maps", "context", "message"),
    [
        ((2, 5, 8, 8), (2, 2, 16, 16), (2, 3), r"^features: expected \(B,4,\*S\) with 2 spatial axes, got \(2, 5, 8"),
        ((2, 4, 8, 8, 8), (2, 2, 16, 16), (2, 3), r"^features: "),
        ((2, 4, 8, 6), (2, 2, 16, 12), (2, 3), r"^features: expected axes that are multiples of the patch size 4"),
        ((2, 4, 8, 8), (2, 2, 8, 8), (2, 3), r"^residual_maps: expected shape \(B,M,\*S\) = \(2, 2, 16, 16\), got"),
        ((2, 4, 8, 8), (2, 1, 16, 16), (2, 3), r"^residual_maps: "),
        ((2, 4, 8, 8), (2, 2, 16, 16), (2, 4), r"^context: expected shape \(B,context_channels\) = \(2, 3\), got"),
        ((2, 4, 8, 8), (2, 2, 16, 16), (1, 3), r"^context: "),
    ],
)
def test_features_that_the_regional_unit_is_not_for(features, maps, context, message):
    unit = RegionCompensationUnit(2, 4, context_channels=3, level=1, patch_size=4)
    unit(torch.zeros(2, 4, 8, 8), torch.zeros(2, 2, 16, 16), torch.zeros(2, 3))
    with pytest.raises(GrcsfError, match=message):
        unit(torch.zeros(features), torch.zeros(maps), torch.zeros(context))


def test_what_is_no_tensor():
    with pytest.raises(GrcsfError, match=r"^features: expected a floating-point"):
        GlobalCompensationUnit(4)([1.0], torch.zeros(1, 4, 4, 4))
    with pytest.raises(GrcsfError, match=r"^context: expected a floating-point"):
        RegionCompensationUnit(2, 4, 3)(torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(1, 3).long())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("spatial_dims", {"spatial_dims": 1}),
        ("channels", {"channels": 0}),
        ("context_channels", {"context_channels": 0}),
        ("num_maps", {"num_maps": 0}),
        ("level", {"level": -1}),
        ("residual_channels", {"residual_channels": 0}),
        ("num_heads", {"num_heads": 0}),
        ("patch_size", {"patch_size": 0}),
        ("channels", {"channels": 8.5}),
        ("channels", {"channels": "8"}),
        ("level", {"level": 0.5}),
        ("level", {"level": None}),
    ],
)
def test_arguments_of_the_regional_unit(name, settings):
    with pytest.raises(GrcsfError, match=rf"^{name}: expected .*, got "):
        RegionCompensationUnit(**({"spatial_dims": 2, "channels": 4, "context_channels": 3} | settings))


@pytest.mark.parametrize("channels", [0, 8.5, "8", None])
def test_arguments_of_the_global_unit(channels):
    with pytest.raises(GrcsfError, match=r"^channels: expected a whole number from 1 up, of 63 bits, got "):
        GlobalCompensationUnit(channels)


@pytest.mark.parametrize("module", [gcu, rcu, grcsf, losses])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted
    assert not result.failed
