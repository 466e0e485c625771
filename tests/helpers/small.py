"""Networks small enough for any test."""

from __future__ import annotations

from awake import awake

from grcsf_fast import GRCSF, MaskedAutoencoder


def autoencoder(spatial_dims: int = 2, in_channels: int = 1, **settings: object) -> MaskedAutoencoder:
    small = {
        "patch_size": 4,
        "embed_dim": 12,
        "depth": 1,
        "num_heads": 2,
        "decoder_dim": 12,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    }
    return MaskedAutoencoder(spatial_dims, in_channels, **(small | settings))


def network(spatial_dims: int = 2, **settings: object) -> GRCSF:
    """In evaluation mode, two outputs and two levels with an RCU unless asked otherwise."""
    small = {
        "in_channels": 1,
        "out_channels": 2,
        "features": (4, 6, 8),
        "patch_size": 2,
        "residual_channels": 3,
        "rcu_levels": (0, 1),
    }
    return awake(GRCSF(spatial_dims, **(small | settings))).eval()
