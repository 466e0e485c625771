"""Blocks of a vision transformer, and the positions of its patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import internal
from .constants import constant_tensors
from .plain import is_plain

__all__ = ["CrossBlock", "TransformerBlock", "pick_tokens", "sincos_positions"]

CPU = torch.device("cpu")


def sincos_positions(grid: tuple[int, ...], dim: int, device: torch.device = CPU) -> Tensor:
    """Fixed sine-cosine positions of the patches of a grid, (P, dim) float32, rows in row-major order.

    Coordinates count from the middle of the grid, so that crops and paddings around a centred head leave the
    positions of its parts about where they were. Kept from call to call: not to be written to.
    """
    return _positions(grid, dim, device=device)[0]


@constant_tensors
def _positions(grid: tuple[int, ...], dim: int) -> tuple[Tensor]:
    per_axis = dim // len(grid)
    bands = per_axis // 2
    frequencies = 10000.0 ** (-torch.arange(bands, device=CPU, dtype=torch.float64) / bands)
    axes = []
    for size in grid:
        coordinate = torch.arange(size, device=CPU, dtype=torch.float64) - (size - 1) / 2
        angles = coordinate[:, None] * frequencies
        axes.append(torch.cat([angles.sin(), angles.cos()], 1))  # (size, per_axis)
    mesh = torch.cartesian_prod(*[torch.arange(size, device=CPU) for size in grid]).reshape(-1, len(grid))
    encoded = torch.cat([table[mesh[:, axis]] for axis, table in enumerate(axes)], 1)
    return (F.pad(encoded, (0, dim - encoded.shape[1])).float(),)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP: (B, N, dim) -> (B, N, dim), or the (B, W, dim) of some tokens alone."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, wanted: Tensor | None = None) -> Tensor:
        """All tokens are attended to; those whose indices are ``wanted``, (B, W), are computed; None: all."""
        normed = self.norm1(x)
        if wanted is None:
            query, key, value = self.qkv(normed).chunk(3, 2)
        else:
            query, key, value = self._attention_inputs(normed, wanted)
            x = pick_tokens(x, wanted)
        x = x + self.project(internal.attend(query, key, value, self.num_heads))
        return x + run_mlp(self.mlp, self.norm2(x))

    def _attention_inputs(self, tokens: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the wanted tokens, (B, W, dim); keys and values of all, (B, N, dim) each."""
        if not is_plain(self.qkv, nn.Linear) or self.qkv.bias is None:
            query, key, value = self.qkv(tokens).chunk(3, 2)
            return pick_tokens(query, wanted), key, value
        weight, bias, dim = self.qkv.weight, self.qkv.bias, tokens.shape[2]
        key, value = F.linear(tokens, weight[dim:], bias[dim:]).chunk(2, 2)
        return F.linear(pick_tokens(tokens, wanted), weight[:dim], bias[:dim]), key, value


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP: each of (B, W, dim) looks at (B, N, dim) and at none of its own kind.

    Source: CrossMAE, arXiv:2401.14391.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        key, value = self.key_value(seen).chunk(2, 2)
        x = x + self.project(internal.attend(self.query(self.norm1(x)), key, value, self.num_heads))
        return x + run_mlp(self.mlp, self.norm2(x))


def run_mlp(mlp: nn.Module, tokens: Tensor) -> Tensor:
    """A linear layer, GELU and a linear layer, by the fused op where they are nothing more than that."""
    if not isinstance(mlp, nn.Sequential) or not is_plain(mlp, nn.Sequential) or len(mlp) != 3:
        return mlp(tokens)
    first, activation, last = mlp
    if not (isinstance(first, nn.Linear) and isinstance(activation, nn.GELU)):
        return mlp(tokens)
    if not (is_plain(first, nn.Linear) and is_plain(activation, nn.GELU)):
        return mlp(tokens)
    if first.bias is None or activation.approximate != "none":
        return mlp(tokens)
    return last(internal.linear_gelu(tokens, first.weight, first.bias))


def pick_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, N, dim) and indices (B, W) -> (B, W, dim)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
