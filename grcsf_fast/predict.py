"""NIfTI volume in, lesion mask out."""

from __future__ import annotations

import torch
from torch import Tensor

from .networks.grcsf import GRCSF

__all__ = ["segment"]


@torch.no_grad()
def segment(
    network: GRCSF,
    volume: Tensor,
    residual: Tensor | None,
    batch_size: int = 16,
    window: tuple[int, ...] | None = None,
) -> Tensor:
    """Lesion probability of one preprocessed volume.

    Args:
        network: in evaluation mode, one output channel.
        volume: (X, Y, Z) on the network's device.
        residual: (M, X, Y, Z), or None for a network without RCU.
        batch_size: slices at once, for a 2-D network.
        window: sliding window of a 3-D network; None: the whole volume at once.

    Returns:
        (X, Y, Z) float32 in [0, 1].
    """
    if network.spatial_dims == 2:
        slices = volume.permute(2, 0, 1)[:, None]  # (Z,1,X,Y)
        maps = residual.permute(3, 0, 1, 2) if residual is not None else None  # (Z,M,X,Y)
        logits = [
            network(slices[first : first + batch_size], None if maps is None else maps[first : first + batch_size])
            for first in range(0, len(slices), batch_size)
        ]
        return torch.cat(logits)[:, 0].permute(1, 2, 0).float().sigmoid()
    inputs = volume[None, None] if residual is None else torch.cat([volume[None], residual])[None]

    def forward(window_inputs: Tensor) -> Tensor:
        return network(window_inputs[:, :1], window_inputs[:, 1:] if residual is not None else None)

    if window is None:
        return forward(inputs)[0, 0].float().sigmoid()
    from monai.inferers import sliding_window_inference

    return sliding_window_inference(inputs, window, 1, forward, overlap=0.25, mode="gaussian")[0, 0].float().sigmoid()
