"""Region Compensation Unit: decoder patches attend to the residual maps, weighted by their importance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import ArgumentError
from .arguments import KINDS_OF_UNIT, check_tensor, checked_config
from .unet import NormActivation, conv

__all__ = ["RegionCompensationUnit"]

SCORE_LOG_ODDS = -2.0


class RegionCompensationUnit(nn.Module):
    """Lets each patch of decoder features attend to residual maps, as far as it is important: for any backbone.

    Residual stem, scorer and parameters around :func:`grcsf_fast.functional.patch_cross_attention`.

    Args:
        spatial_dims: 2 or 3.
        channels: C of the decoder features.
        context_channels: of the vector that describes the whole image, the mean of the bottleneck, say.
        num_maps: M, residual maps per image.
        level: the features are ``2 ** level`` times smaller than the residual maps along every axis.
        residual_channels: R, channels of keys and values; the attention's scale is ``R ** -0.5``.
        num_heads: h.
        patch_size: p, in pixels of this level.

    Raises:
        ArgumentError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> from grcsf_fast import RegionCompensationUnit
        >>> features, bottleneck = torch.randn(1, 32, 64, 64), torch.randn(1, 256, 4, 4)
        >>> unit = RegionCompensationUnit(spatial_dims=2, channels=32, context_channels=256)
        >>> blank = torch.zeros(1, 2, 64, 64)  # or residual maps of the image
        >>> out, scores = unit(features, blank, bottleneck.mean((2, 3)))
        >>> out.shape, scores.shape
        (torch.Size([1, 32, 64, 64]), torch.Size([1, 1, 8, 8]))

    Source: paper, Region Compensation Unit. The stem (shared by all maps), multi-query attention and the scorer's
    form are our decisions.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        context_channels: int,
        num_maps: int = 2,
        level: int = 0,
        residual_channels: int = 16,
        num_heads: int = 2,
        patch_size: int = 8,
    ) -> None:
        super().__init__()
        spatial_dims, channels, context_channels, num_maps, level, residual_channels, num_heads, patch_size = (
            checked_config(
                KINDS_OF_UNIT, spatial_dims=spatial_dims, channels=channels, context_channels=context_channels,
                num_maps=num_maps, level=level, residual_channels=residual_channels, num_heads=num_heads,
                patch_size=patch_size,
            ).values()
        )  # fmt: skip
        self.spatial_dims, self.channels, self.context_channels = spatial_dims, channels, context_channels
        self.num_maps, self.level, self.patch_size = num_maps, level, patch_size
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
        # The unit starts as the identity, and its scores at the odds of a patch that holds lesion.
        self.output_weight = nn.Parameter(torch.zeros(num_maps, num_heads, channels, residual_channels))
        self.output_bias = nn.Parameter(torch.zeros(channels))
        self.score_context = nn.Linear(context_channels, hidden)
        self.score_weight = nn.Parameter(torch.randn(hidden, channels) * channels**-0.5)
        self.score_vector = nn.Parameter(torch.randn(hidden) * hidden**-0.5)
        self.score_bias = nn.Parameter(torch.tensor(SCORE_LOG_ODDS))

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> RegionCompensationUnit:
        """As of every module, behind ``to``; but memory formats, which are for convolutions, pass by the unit's own
        weights of four axes: ``channels_last_3d`` would fail on them."""
        for child in self.children() if recurse else ():
            child._apply(function)

        def flat(tensor: Tensor) -> Tensor:
            return function(tensor.flatten(1)).unflatten(1, tensor.shape[1:]) if tensor.dim() == 4 else function(tensor)

        return super()._apply(flat, recurse=False)

    def forward(
        self, features: Tensor, residual_maps: Tensor, context: Tensor, threshold: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Compensate one decoder level.

        Args:
            features: (B, C, \\*S/2^level), each axis a multiple of the patch size; floating-point.
            residual_maps: (B, M, \\*S), any floating-point dtype; zeros where there are none.
            context: (B, context_channels).
            threshold: patches scored below it are left as they are, in [0, 1]; above 0 for inference only.

        Returns:
            ``(out, score)``: (B, C, \\*S/2^level), and the importance of each patch, (B, 1, \\*S/2^level/p) in [0, 1].

        Raises:
            ArgumentTypeError: no tensors, or none of floating-point numbers.
            ArgumentError: shapes that do not fit.
        """
        self._check(features, residual_maps, context)
        batch, maps = residual_maps.shape[:2]
        # Every map is an image of its own. Copied, not reshaped, as keys and values below: torch's compiler (2.13)
        # fails where it keeps a view of symbolic sizes for the backward.
        images = residual_maps if maps == 1 else torch.cat(residual_maps.split(1, dim=1))  # (M*B,1,*S)
        stem = self.stem(images.to(features.dtype)).to(features.dtype)  # (M*B,2R,*S/2^level)
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
        return functional.patch_cross_attention(features, keys, values, weights, self.patch_size, threshold)

    def _check(self, features: Tensor, residual_maps: Tensor, context: Tensor) -> None:
        check_tensor("features", features, "(B,C,*S)")
        letters, patch = f"(B,{self.channels},*S)", self.patch_size
        if features.dim() != 2 + self.spatial_dims or features.shape[1] != self.channels:
            raise ArgumentError(
                f"features: expected {letters} with {self.spatial_dims} spatial axes, got {tuple(features.shape)}"
            )
        if any(size % patch for size in features.shape[2:]):
            raise ArgumentError(
                f"features: expected axes that are multiples of the patch size {patch}, got {tuple(features.shape)}"
            )
        batch = features.shape[0]
        maps = (batch, self.num_maps, *(size * 2**self.level for size in features.shape[2:]))
        for name, tensor, expected, letters in (
            ("residual_maps", residual_maps, maps, "(B,M,*S)"),
            ("context", context, (batch, self.context_channels), "(B,context_channels)"),
        ):
            check_tensor(name, tensor, letters)
            if tuple(tensor.shape) != expected:
                raise ArgumentError(f"{name}: expected shape {letters} = {expected}, got {tuple(tensor.shape)}")
