"""Other forms of the units, for measuring what each of their parts is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import NETWORK_MULTIPLE
from grcsf_fast import functional
from grcsf_fast.networks.gcu import GlobalCompensationUnit
from grcsf_fast.networks.grcsf import GRCSF, CompensationMaps
from grcsf_fast.networks.rcu import RegionCompensationUnit
from grcsf_fast.networks.unet import crop_to, pad_to_multiple

__all__ = [
    "FEATURES", "AttentionAlone", "ContextAtPatch", "ContextBeforeNorm", "Peer", "ScoreAlone", "ScoreLossAlone",
    "WithoutContext", "WithoutResidual", "as_channels", "grcsf", "max_pooled", "with_gcu", "with_rcu",
]  # fmt: skip

FEATURES = (16, 32, 64, 96)
RCU_LEVELS = (1, 2)
PATCH_SIZE = 4
Output = tuple[Tensor, CompensationMaps]


def grcsf(gcu: bool = False, rcu: bool = False, in_channels: int = 1, **arguments: Any) -> GRCSF:
    """The small 2-D network with some of the units."""
    levels = RCU_LEVELS if rcu else ()
    return GRCSF(2, in_channels, 1, FEATURES, patch_size=PATCH_SIZE, rcu_levels=levels, gcu=gcu, **arguments)


class AsChannels(GRCSF):
    """The network with the first of the maps that it is given as further channels of its input.

    Channels beyond those are residual maps; where none are left, an RCU's are blank.
    """

    def forward(self, image: Tensor, residual_maps: Tensor, return_maps: bool = False) -> Tensor | Output:
        beside = self.in_channels - 1
        seen, maps = torch.cat([image, residual_maps[:, :beside]], 1), residual_maps[:, beside:]
        return super().forward(seen, maps if maps.shape[1] else None, return_maps)


def as_channels(beside: int = 2, rcu: bool = False) -> GRCSF:
    levels = RCU_LEVELS if rcu else ()
    return AsChannels(2, 1 + beside, 1, FEATURES, patch_size=PATCH_SIZE, rcu_levels=levels, gcu=False)


class WithoutResidual(GlobalCompensationUnit):
    """``F + g (F - E)``: what the coarser scale lost is given back everywhere alike."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.feature_gate, self.coarse_gate

    def forward(self, features: Tensor, coarse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        coarse = F.avg_pool2d(features, 2) if coarse is None else coarse
        lost = features - F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        return features + self.strength[:, None, None] * lost, torch.ones_like(features[:, :1])


def with_gcu(unit: type[GlobalCompensationUnit]) -> GRCSF:
    """The network with another unit on its skip connections."""
    network = grcsf(gcu=True)
    network.gcu = nn.ModuleList(unit(channels) for channels in FEATURES[:-1])
    return network


def max_pooled() -> GRCSF:
    """The GCU against what the encoder goes down with, the maximum instead of the average."""
    network = grcsf(gcu=True)
    for down in network.down:
        down.mean = False
    return network


class ScoreAlone(RegionCompensationUnit):
    """``x + s b``: the patch's score times a learned vector of channels, and no attention."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for name in ("stem", "query_weight", "query_bias", "position_bias", "output_weight"):
            delattr(self, name)

    def forward(
        self, features: Tensor, residual_maps: Tensor, context: Tensor, threshold: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        means = F.avg_pool2d(features, self.patch_size)
        hidden = F.conv2d(means, self.score_weight[:, :, None, None]) + self.score_context(context)[:, :, None, None]
        score = (torch.einsum("bshw,s->bhw", hidden.relu(), self.score_vector) + self.score_bias).sigmoid()[:, None]
        wide = score.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
        return features + wide * self.output_bias[:, None, None], score


class ScoreLossAlone(ScoreAlone):
    """Scores that are learned and change nothing: a further loss for the decoder."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.output_bias.requires_grad_(False)


class AttentionAlone(RegionCompensationUnit):
    """``x + y``: the score is 1 in every patch."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        with torch.no_grad():
            # The sigmoid of 30 is 1 in float32, and nothing else reaches the score.
            for parameter, value in ((self.score_vector, 0.0), (self.score_bias, 30.0)):
                parameter.fill_(value)
        for parameter in (self.score_vector, self.score_bias, self.score_weight, *self.score_context.parameters()):
            parameter.requires_grad_(False)


class WithoutContext(RegionCompensationUnit):
    """The score of a patch knows the patch alone."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.score_context.weight.requires_grad_(False)

    def forward(
        self, features: Tensor, residual_maps: Tensor, context: Tensor, threshold: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        return super().forward(features, residual_maps, torch.zeros_like(context), threshold)


class ContextBeforeNorm(RegionCompensationUnit):
    """The context is the bottleneck's mean from before its last instance norm, after which every mean is the same."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[Tensor] = []

    def watch(self, norm: nn.Module) -> None:
        def see(_: nn.Module, inputs: tuple[Tensor]) -> None:
            self.seen[:] = [inputs[0].flatten(2).mean(2)]

        norm.register_forward_pre_hook(see)

    def forward(
        self, features: Tensor, residual_maps: Tensor, context: Tensor, threshold: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        return super().forward(features, residual_maps, self.seen.pop(), threshold)


class ContextAtPatch(RegionCompensationUnit):
    """The context of a patch is the bottleneck's features where it lies, instead of their mean over the image."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[Tensor] = []

    def watch(self, bottleneck: nn.Module) -> None:
        def see(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            self.seen[:] = [output]

        bottleneck.register_forward_hook(see)

    def forward(
        self, features: Tensor, residual_maps: Tensor, context: Tensor, threshold: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        means = F.avg_pool2d(features, self.patch_size)
        local = F.interpolate(self.seen.pop(), means.shape[2:], mode="bilinear", align_corners=False)
        hidden = F.conv2d(means, self.score_weight[:, :, None, None])
        hidden = hidden + F.conv2d(local, self.score_context.weight[:, :, None, None], self.score_context.bias)
        score = (torch.einsum("bshw,s->bhw", hidden.relu(), self.score_vector) + self.score_bias).sigmoid()[:, None]
        # The attention by itself, with the score of 1 that AttentionAlone has, and weighed here.
        maps = residual_maps.split(1, dim=1)
        stem = self.stem(torch.cat(maps)).unflatten(0, (len(maps), len(features))).transpose(0, 1)
        keys, values = stem.chunk(2, dim=2)
        weights = functional.AttentionWeights(
            self.query_weight, self.query_bias, self.position_bias, self.output_weight, self.output_bias,
            self.score_weight, features.new_zeros(len(features), len(self.score_vector)),
            torch.zeros_like(self.score_vector), torch.full_like(self.score_bias, 30.0),
        )  # fmt: skip
        attended = functional.patch_cross_attention(features, keys, values, weights, self.patch_size)[0]
        wide = score.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
        return features + wide * (attended - features), score


def with_rcu(unit: Callable[..., RegionCompensationUnit]) -> GRCSF:
    """The network with another unit in its decoder."""
    network = grcsf(rcu=True)
    for level, own in network.rcu.items():
        network.rcu[level] = unit(
            own.spatial_dims, own.channels, own.context_channels, own.num_maps, own.level,
            network.config["residual_channels"], network.config["num_heads"], own.patch_size,
        )  # fmt: skip
        if unit is ContextBeforeNorm:
            network.rcu[level].watch(network.encoder[-1][4])
        if unit is ContextAtPatch:
            network.rcu[level].watch(network.encoder[-1])
    return network


class Peer(nn.Module):
    """A network of others as ours are called: any size of image, and no maps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, residual_maps: Tensor | None = None, return_maps: bool = False) -> Tensor | Output:
        padded = pad_to_multiple(image, NETWORK_MULTIPLE, NETWORK_MULTIPLE)
        logits = crop_to(self.network(padded), image.shape[2:])
        return (logits, CompensationMaps({}, {}, None)) if return_maps else logits
