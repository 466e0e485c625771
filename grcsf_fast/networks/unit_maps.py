"""What the two units of a network saw in an image, as channels behind the logits: for looking at."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .grcsf import GRCSF
from .unet import crop_to

__all__ = ["GCU_RESIDUAL", "PATCH_SCORE", "unit_maps", "with_unit_maps"]

GCU_RESIDUAL, PATCH_SCORE = "gcu_residual", "patch_score"


def unit_maps(network: GRCSF) -> tuple[str, ...]:
    """The maps of :func:`with_unit_maps`: one of each unit that the network has."""
    return (*((GCU_RESIDUAL,) if network.gcu else ()), *((PATCH_SCORE,) if network.rcu else ()))


def with_unit_maps(network: GRCSF) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A call that gives the logits and, as further channels, the maps of both units at full resolution.

    They cost next to nothing, as the network computes them in any case.

    Args:
        network: in evaluation mode.

    Returns:
        Of images (B, seen_channels, \\*S) and residual maps (B, M, \\*S) the logits, the GCU's residual of level 0, in
        [0, 2], and the RCU's score of each patch of its finest level, in [0, 1], for all its pixels:
        (B, out_channels + maps, \\*S), in the dtype of the logits.
    """

    def forward(image: Tensor, residual_maps: Tensor | None) -> Tensor:
        logits, maps = network(image, residual_maps, return_maps=True)
        found = [logits]
        if maps.gcu_residuals:
            found.append(maps.gcu_residuals[0].to(logits.dtype))
        if maps.patch_scores:
            level = min(maps.patch_scores)
            edge = float(network.rcu[str(level)].patch_size * 2**level)
            scores = F.interpolate(maps.patch_scores[level], scale_factor=edge, mode="nearest")
            found.append(crop_to(scores, image.shape[2:]).to(logits.dtype))
        return torch.cat(found, 1) if len(found) > 1 else logits

    return forward
