"""Which pixels an autoencoder cannot see."""

from __future__ import annotations

import numpy as np
import torch

from grcsf_fast import MaskedAutoencoder

__all__ = ["hidden_pixels", "seeded"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden_pixels(mae: MaskedAutoencoder, visible: torch.Tensor, spatial: tuple[int, ...]) -> torch.Tensor:
    """(B, V) indices -> (B, *S) bool, patch by patch."""
    counts = [size // mae.patch_size for size in spatial]
    hidden = torch.ones(visible.shape[0], *spatial, dtype=torch.bool)
    for image, indices in enumerate(visible.tolist()):
        for index in indices:
            place = np.unravel_index(index, counts)
            box = tuple(slice(n * mae.patch_size, (n + 1) * mae.patch_size) for n in place)
            hidden[(image, *box)] = False
    return hidden
