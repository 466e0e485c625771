"""Region Compensation Unit: decoder patches attend to the residual maps, weighted by their importance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional
from .unet import NormActivation, conv

__all__ = ["RegionCompensationUnit"]


class RegionCompensationUnit(nn.Module):
    """Residual stem and parameters around :func:`grcsf_fast.functional.patch_cross_attention`.

    Args:
        spatial_dims: 2 or 3.
        channels: C of the decoder features.
        context_channels: channels of the global context vector (the bottleneck's).
        num_maps: M, residual maps of an image.
        level: the features are ``2 ** level`` times smaller than the residual maps along every axis.
        residual_channels: R, channels of keys and values; the attention's scale is ``R ** -0.5``.
        num_heads: h.
        patch_size: p, in pixels of this level.

    Source: paper, Region Compensation Unit. The stem (shared by all maps), multi-query attention and the scorer's
    form are our decisions.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        context_channels: int,
        num_maps: int,
        level: int,
        residual_channels: int = 16,
        num_heads: int = 2,
        patch_size: int = 8,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        stride = 2**level
        self.stem = nn.Sequential(
            conv(spatial_dims, 1, residual_channels, kernel=max(3, stride + 1), stride=stride),
            NormActivation(residual_channels),
            nn.Identity(),
            conv(spatial_dims, residual_channels, 2 * residual_channels),
        )
        tokens = patch_size**spatial_dims
        hidden = max(channels // 2, 8)
        self.query_weight = nn.Parameter(torch.randn(num_maps, num_heads, residual_channels, channels) * channels**-0.5)
        self.query_bias = nn.Parameter(torch.zeros(num_maps, num_heads, residual_channels))
        self.position_bias = nn.Parameter(torch.zeros(num_heads, tokens, tokens))
        fan_in = num_maps * num_heads * residual_channels
        self.output_weight = nn.Parameter(torch.randn(num_maps, num_heads, channels, residual_channels) * fan_in**-0.5)
        self.output_bias = nn.Parameter(torch.zeros(channels))
        self.score_context = nn.Linear(context_channels, hidden)
        self.score_weight = nn.Parameter(torch.randn(hidden, channels) * channels**-0.5)
        self.score_vector = nn.Parameter(torch.randn(hidden) * hidden**-0.5)
        self.score_bias = nn.Parameter(torch.zeros(()))

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> RegionCompensationUnit:
        """As of every module, behind ``to``; but memory formats, which are for convolutions, pass by the unit's own
        weights of four axes: ``channels_last_3d`` would fail on them."""
        for child in self.children() if recurse else ():
            child._apply(function)

        def flat(tensor: Tensor) -> Tensor:
            return function(tensor.flatten(1)).unflatten(1, tensor.shape[1:]) if tensor.dim() == 4 else function(tensor)

        return super()._apply(flat, recurse=False)

    def forward(
        self, x: Tensor, residual_maps: Tensor, context: Tensor, threshold: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Compensate one decoder level.

        Args:
            x: (B, C, \\*S/2^level).
            residual_maps: (B, M, \\*S).
            context: (B, context_channels).
            threshold: patches scored below it are left as they are.

        Returns:
            ``(out, score)``: (B, C, \\*S/2^level) and (B, 1, \\*S/2^level/p).
        """
        batch, maps = residual_maps.shape[:2]
        # Every map is an image of its own. Copied, not reshaped, as keys and values below: torch's compiler (2.13)
        # fails where it keeps a view of symbolic sizes for the backward.
        images = residual_maps if maps == 1 else torch.cat(residual_maps.split(1, dim=1))  # (M*B,1,*S)
        stem = self.stem(images.to(x.dtype)).to(x.dtype)  # (M*B,2R,*S/2^level)
        keys, values = stem.unflatten(0, (maps, batch)).transpose(0, 1).chunk(2, dim=2)
        if torch.compiler.is_compiling():
            keys, values = keys.contiguous(), values.contiguous()
        weights = functional.AttentionWeights(
            self.query_weight,
            self.query_bias,
            self.position_bias,
            self.output_weight,
            self.output_bias,
            self.score_weight,
            self.score_context(context),
            self.score_vector,
            self.score_bias,
        )
        return functional.patch_cross_attention(x, keys, values, weights, self.patch_size, threshold)
