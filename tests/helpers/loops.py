"""The two ops as loops, written from their mathematics and not from ``reference.py``."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from tolerances import tolerance
from torch import Tensor

ALL = slice(None)
# (patch edge, size of the image).
ATTENTION_SIZES = [
    (1, (1, 1)),
    (1, (3, 5)),
    (3, (6, 9)),
    (4, (4, 12)),
    (7, (14, 7)),
    (1, (2, 3, 1)),
    (3, (3, 6, 3)),
    (4, (4, 8, 4)),
    (7, (7, 7, 7)),
]


def as_numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().cpu().numpy() for name, tensor in tensors.items()}


def linear_neighbours(index: int, size: int) -> list[tuple[int, float]]:
    """Sources and weights of one element of an axis of ``size`` up-sampled by 2, pixels as areas."""
    position = max((index + 0.5) / 2 - 0.5, 0.0)
    low = math.floor(position)
    return [(low, 1 - (position - low)), (min(low + 1, size - 1), position - low)]


def loop_compensation(
    features: np.ndarray,
    coarse: np.ndarray,
    feature_gate: np.ndarray,
    coarse_gate: np.ndarray,
    strength: np.ndarray,
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """Global compensation, pixel by pixel."""
    batch, _, *spatial = features.shape
    compensated = np.full(features.shape, np.nan)
    residual = np.full((batch, 1, *spatial), np.nan)
    for image in range(batch):
        for pixel in np.ndindex(*spatial):
            neighbours = [linear_neighbours(i, n) for i, n in zip(pixel, coarse.shape[2:], strict=True)]
            upsampled = 0.0
            for corner in itertools.product(*neighbours):
                source = tuple(index for index, _ in corner)
                upsampled = upsampled + math.prod(weight for _, weight in corner) * coarse[(image, ALL, *source)]
            u = feature_gate[image] * features[(image, ALL, *pixel)]
            v = coarse_gate[image] * upsampled
            cosine = (u * v).sum() / max(math.sqrt((u * u).sum() * (v * v).sum()), eps)
            residual[(image, 0, *pixel)] = 1 - cosine
            fine = features[(image, ALL, *pixel)]
            compensated[(image, ALL, *pixel)] = fine + strength * (1 - cosine) * (fine - upsampled)
    return compensated, residual


def loop_attention(
    x: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    query_weight: np.ndarray,
    query_bias: np.ndarray,
    position_bias: np.ndarray,
    output_weight: np.ndarray,
    output_bias: np.ndarray,
    score_weight: np.ndarray,
    score_context: np.ndarray,
    score_vector: np.ndarray,
    score_bias: np.ndarray,
    patch_size: int,
    threshold: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patch cross-attention, token by token: ``(out, score, y)``."""
    batch, _, *spatial = x.shape
    maps, heads, residual_channels, _ = query_weight.shape
    counts = [size // patch_size for size in spatial]
    out = np.full(x.shape, np.nan)
    update = np.full(x.shape, np.nan)
    score = np.full((batch, 1, *counts), np.nan)
    for image in range(batch):
        for patch in np.ndindex(*counts):
            offsets = np.ndindex(*[patch_size] * len(spatial))
            pixels = [tuple(n * patch_size + o for n, o in zip(patch, offset, strict=True)) for offset in offsets]
            tokens = [x[(image, ALL, *pixel)] for pixel in pixels]
            hidden = np.maximum(score_weight @ np.mean(tokens, 0) + score_context[image], 0)
            importance = 1 / (1 + math.exp(-(score_vector @ hidden + score_bias)))
            score[(image, 0, *patch)] = importance
            for t, pixel in enumerate(pixels):
                y = output_bias.copy()
                for m in range(maps):
                    patch_keys = np.array([keys[(image, m, ALL, *other)] for other in pixels])  # (T,R)
                    patch_values = np.array([values[(image, m, ALL, *other)] for other in pixels])  # (T,R)
                    for h in range(heads):
                        query = query_weight[m, h] @ tokens[t] + query_bias[m, h]
                        logits = patch_keys @ query / math.sqrt(residual_channels) + position_bias[h, t]
                        weights = np.exp(logits - logits.max())
                        y += output_weight[m, h] @ (weights @ patch_values / weights.sum())
                update[(image, ALL, *pixel)] = y
                out[(image, ALL, *pixel)] = tokens[t] if importance < threshold else tokens[t] + importance * y
    return out, score, update


def assert_matches(actual: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(actual.double().cpu(), torch.from_numpy(expected), **tolerance(actual.dtype))


def gated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
