"""Filters of Winograd's F(4x4, 3x3), transformed once: products at 36 points in the place of convolutions.

Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", arXiv:1509.09308; the points are ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.dtypes import accumulation_dtype

__all__ = ["transformed_filters"]


def transformed_filters(weight: Tensor, near: float, far: float, panel: int) -> Tensor:
    """A convolution's weight at the points of the transform; computed in float64.

    Args:
        weight: (O, C, 3, 3) or (O, C, 3, 3, 3).
        near: the points are 0, infinity, this with both signs,
        far: and this with both signs.
        panel: output channels that lie together.

    Returns:
        (36, panels, inputs, panel), 0 beyond the last channel; float64 for a float64 weight and float32 otherwise.
    """
    # Each row is the value at a point of the polynomial of which the three taps are coefficients, and what the
    # inputs' and outputs' transforms leave to it.
    rows = [(0.0, 1 / (near * far) ** 2)]
    for point, other in ((near, far), (far, near)):
        rows += [(sign * point, 0.5 / (point**2 * (point**2 - other**2))) for sign in (1, -1)]
    matrix = torch.tensor(
        [[scale * point**power for power in range(3)] for point, scale in rows] + [[0.0, 0.0, 1.0]],
        dtype=torch.float64,
        device=weight.device,
    )
    channels = weight.shape[0]
    taps = weight.double().reshape(*weight.shape[:2], -1, 3, 3)  # (O,C,D,3,3)
    points = torch.einsum("ia,ocdab,jb->ijodc", matrix, taps, matrix).reshape(36, channels, -1)
    points = F.pad(points, (0, 0, 0, -channels % panel)).unflatten(1, (-1, panel))
    return points.transpose(2, 3).to(accumulation_dtype(weight.dtype)).contiguous()
