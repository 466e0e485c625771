"""What the package has to beat: other ways to compute the two ops, which a user could write in PyTorch in an hour, and
the networks that a user would take instead, at their published sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.networks import nets
from torch import Tensor, nn

from benchmarks.plain import BATCH, restored
from grcsf_fast import reference
from grcsf_fast.data.volumes import Preprocessing, like, load_volume, prepare
from grcsf_fast.networks.unet import crop_to, pad_to_multiple
from grcsf_fast.reference import AttentionWeights
from grcsf_fast.runtime.patches import from_patches, to_patches

__all__ = [
    "NETWORKS", "NETWORK_MULTIPLE", "OPS", "cosine_compensation", "dynunet", "flex_attention", "peers_of",
    "predict_slices", "sdpa_attention", "swin_unetr", "unet",
]  # fmt: skip


def _attention(
    x: Tensor, keys: Tensor, values: Tensor, weights: AttentionWeights, patch_size: int, attend: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Op 2 around ``attend(queries, keys, values, bias)``.

    The heads of a map share its keys and values, so their queries lie behind each other: (B*P, M, h*T, R) queries
    against (B*P, M, T, R) keys and values, and nothing is repeated.
    """
    (
        query_weight, query_bias, position_bias, output_weight, output_bias,
        score_weight, score_context, score_vector, score_bias,
    ) = (tensor.to(x.dtype) for tensor in weights)  # fmt: skip
    spatial = tuple(x.shape[2:])
    dims = len(spatial)
    batch = x.shape[0]
    maps, heads, width, _ = query_weight.shape
    tokens = to_patches(x, patch_size, dims)  # (B,C,P,T)
    hidden = torch.einsum("sc,bcp->bps", score_weight, tokens.mean(-1)) + score_context[:, None]
    score = torch.sigmoid(torch.relu(hidden) @ score_vector + score_bias)  # (B,P)
    queries = torch.einsum("mhrc,bcpt->bpmhtr", query_weight, tokens) + query_bias[:, :, None]
    patches, length = queries.shape[1], queries.shape[4]

    def split(volume: Tensor) -> Tensor:
        return to_patches(volume, patch_size, dims).permute(0, 3, 1, 4, 2).reshape(-1, maps, length, width)

    queries = queries.reshape(batch * patches, maps, heads * length, width)
    attended = attend(queries, split(keys), split(values), position_bias.reshape(heads * length, length))
    attended = attended.reshape(batch, patches, maps, heads, length, width)
    update = torch.einsum("mhcr,bpmhtr->bcpt", output_weight, attended) + output_bias[:, None, None]
    out = x + from_patches(score[:, None, :, None] * update, patch_size, spatial)
    return out, score.reshape(batch, 1, *(size // patch_size for size in spatial)).float()


def sdpa_attention(*arguments: Any, patch_size: int) -> tuple[Tensor, Tensor]:
    """Op 2 on :func:`torch.nn.functional.scaled_dot_product_attention`."""
    return _attention(
        *arguments, patch_size, lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    )


def flex_attention(*arguments: Any, patch_size: int) -> tuple[Tensor, Tensor]:
    """Op 2 on FlexAttention, compiled by itself: as part of a larger graph torch 2.13 fails to compile it on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled = torch.compile(flex, dynamic=False)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        def add_bias(score: Tensor, _batch: Tensor, _map: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + bias[query, key]

        return compiled(queries, keys, values, score_mod=add_bias)

    return _attention(*arguments, patch_size, attend)


def cosine_compensation(
    features: Tensor, coarse: Tensor, feature_gate: Tensor, coarse_gate: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """Op 1 on :func:`torch.nn.functional.cosine_similarity`."""
    dims = features.dim() - 2
    weights = (one.to(features.dtype)[(..., *[None] * dims)] for one in (feature_gate, coarse_gate, strength))
    by_feature, by_coarse, given = weights
    upsampled = F.interpolate(coarse, scale_factor=2, mode="bilinear" if dims == 2 else "trilinear")
    residual = 1 - F.cosine_similarity(features * by_feature, upsampled * by_coarse, dim=1, eps=1e-6)[:, None]
    return features + given * residual * (features - upsampled), residual


OPS = ("global_compensation", "patch_cross_attention")


def peers_of(op: str, compiled: bool = True) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """The contestants of an op that are not ours; arguments as for :mod:`grcsf_fast.reference`."""
    if op == "global_compensation":
        plain = {"reference": reference.global_compensation, "cosine_similarity": cosine_compensation}
    else:
        plain = {"reference": reference.patch_cross_attention, "SDPA": sdpa_attention}
    if not compiled:
        return plain
    found = plain | {f"compiled {name}": torch.compile(run, dynamic=False) for name, run in plain.items()}
    return found if op == "global_compensation" else found | {"FlexAttention": flex_attention}


def unet() -> nn.Module:
    """MONAI's UNet as its tutorials build it, in 2-D."""
    return nets.UNet(2, 1, 1, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)


def dynunet() -> nn.Module:
    """nnU-Net's 2-D network for images of about 224 pixels: six stages of two convolutions, at most 512 channels."""
    filters = (32, 64, 128, 256, 512, 512)
    stages = len(filters)
    return nets.DynUNet(
        2, 1, 1, kernel_size=[3] * stages, strides=[1] + [2] * (stages - 1), upsample_kernel_size=[2] * (stages - 1),
        filters=filters, norm_name=("INSTANCE", {"affine": True}),
    )  # fmt: skip


def swin_unetr(feature_size: int) -> nn.Module:
    """SwinUNETR in 2-D: 24 is MONAI's default, 48 the published size."""
    return nets.SwinUNETR(1, 1, spatial_dims=2, feature_size=feature_size)


# What a user would take instead; one channel in, one out, image sizes a multiple of 32.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MONAI UNet": unet,
    "DynUNet (nnU-Net)": dynunet,
    "SwinUNETR 24": functools.partial(swin_unetr, 24),
    "SwinUNETR 48": functools.partial(swin_unetr, 48),
}
NETWORK_MULTIPLE = 32


@torch.no_grad()
def predict_slices(
    network: nn.Module, preprocessing: Preprocessing, path: Path, output: Path, planes: slice = slice(None)
) -> None:
    """Segment a volume by a network that takes an image alone, slices in batches, and write the mask.

    With ``planes`` only these slices are looked at; voxels that depend on others become 2.
    """
    volume = load_volume(path)
    prepared = prepare(volume, preprocessing)
    slices = prepared.data.permute(2, 0, 1)[:, None].to(next(network.parameters()).dtype)  # (Z,1,X,Y)
    padded = pad_to_multiple(slices[planes], NETWORK_MULTIPLE, NETWORK_MULTIPLE)
    logits = torch.cat([network(part) for part in padded.split(BATCH)])
    probability = torch.full_like(slices[:, 0], torch.nan)
    probability[planes] = crop_to(logits, slices.shape[2:])[:, 0].sigmoid()
    found = restored(probability.permute(1, 2, 0), prepared)
    mask = np.where(np.isnan(found), 2, found >= 0.5).astype(np.uint8)
    output.parent.mkdir(parents=True, exist_ok=True)
    nib.save(like(mask, volume), output)
