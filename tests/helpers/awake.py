"""Networks whose units do something: both start as the identity, and a training moves them from there."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

__all__ = ["awake"]

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def awake(model: Network) -> Network:
    """The network, with other numbers where the units' parameters start at 0."""
    for name, parameter in model.named_parameters():
        if name.endswith(("strength", "output_weight")):
            fan_in = parameter[..., 0, :].numel() if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * fan_in**-0.5)
    return model
