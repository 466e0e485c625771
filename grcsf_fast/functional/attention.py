"""Patch cross-attention, the RCU's core: arguments checked, the backend chosen from the tensors."""

from __future__ import annotations

from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError
from ..ops.backends import implementation
from ..ops.examples import attention_sizes
from ..reference import AttentionWeights
from .checks import check_like, check_same_dtype, check_shape, spatial_dims

__all__ = ["AttentionWeights", "patch_cross_attention"]


def patch_cross_attention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: AttentionWeights,
    patch_size: int,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Let each patch of ``x`` attend to the same patch of the residual maps, weighted by its importance score.

    Inside every patch the T tokens of ``x`` query the T tokens of each of the M residual maps; the keys and values
    of a map are shared by its h heads. The projected result, times the patch's score, is added to ``x``. The score is
    ``sigmoid(score_vector . relu(score_weight mean(x) + score_context) + score_bias)``. Patches whose score is below
    ``threshold`` are passed on unchanged, so ``|out - out(threshold=0)| <= threshold * max|update|``.
    Differentiable in every tensor, through both outputs.

    Args:
        x: (B, C, \\*S) decoder features, S of 2 or 3 axes; float16, bfloat16, float32 or float64.
        keys: (B, M, R, \\*S), dtype of ``x``.
        values: (B, M, R, \\*S), dtype of ``x``.
        weights: see :class:`AttentionWeights`; any float dtypes.
        patch_size: edge p of a patch in pixels; divides every axis of S.
        threshold: score below which a patch is left as it is, in [0, 1]; above 0 for inference only.

    Returns:
        ``(out, score)``: (B, C, \\*S) in the dtype of ``x``; (B, 1, \\*S/p) in [0, 1], float64 for a float64 ``x``
        and float32 otherwise.

    Raises:
        ArgumentTypeError: a tensor that is not floating-point, or keys or values of another dtype than ``x``.
        ArgumentError: a shape, device or number that does not fit; the message names the argument.

    Source: paper, Region Compensation Unit; multi-query keys, the position bias and the two-layer scorer are our
    decisions.
    """
    dims = spatial_dims("x", x)
    batch, channels, *spatial = x.shape
    if not isinstance(patch_size, int) or isinstance(patch_size, bool):
        raise ArgumentTypeError(f"patch_size: expected an int, got {patch_size!r}")
    if patch_size < 1 or any(size % patch_size or size == 0 for size in spatial):
        raise ArgumentError(f"patch_size: expected a divisor of every axis of {tuple(spatial)}, got {patch_size}")
    if not 0 <= threshold <= 1:
        raise ArgumentError(f"threshold: expected a number in [0, 1], got {threshold}")
    if not isinstance(weights, AttentionWeights):
        raise ArgumentTypeError(f"weights: expected AttentionWeights, got {type(weights).__qualname__}")
    query_weight, score_weight = weights.query_weight, weights.score_weight
    check_like("query_weight", query_weight, "x", x)
    if query_weight.dim() != 4 or query_weight.shape[3] != channels:
        raise ArgumentError(
            f"query_weight: expected shape (M,h,R,C) with C = {channels}, got {tuple(query_weight.shape)}"
        )
    maps, heads, residual_channels, _ = query_weight.shape
    if not maps or not heads or not residual_channels:
        raise ArgumentError(
            f"query_weight: expected at least one map, head and channel, got {tuple(query_weight.shape)}"
        )
    check_like("score_weight", score_weight, "x", x)
    if score_weight.dim() != 2 or score_weight.shape[1] != channels:
        raise ArgumentError(f"score_weight: expected shape (Hs,C) with C = {channels}, got {tuple(score_weight.shape)}")
    width = score_weight.shape[0]
    tokens = patch_size**dims
    for name, tensor, shape, letters in (
        ("keys", keys, (batch, maps, residual_channels, *spatial), "(B,M,R,*S)"),
        ("values", values, (batch, maps, residual_channels, *spatial), "(B,M,R,*S)"),
        ("query_bias", weights.query_bias, (maps, heads, residual_channels), "(M,h,R)"),
        ("position_bias", weights.position_bias, (heads, tokens, tokens), "(h,T,T)"),
        ("output_weight", weights.output_weight, (maps, heads, channels, residual_channels), "(M,h,C,R)"),
        ("output_bias", weights.output_bias, (channels,), "(C,)"),
        ("score_context", weights.score_context, (batch, width), "(B,Hs)"),
        ("score_vector", weights.score_vector, (width,), "(Hs,)"),
        ("score_bias", weights.score_bias, (), "()"),
    ):
        check_like(name, tensor, "x", x)
        check_shape(name, tensor, shape, letters)
    check_same_dtype("keys", keys, "x", x)
    check_same_dtype("values", values, "x", x)
    run = implementation(
        "patch_cross_attention",
        (x, keys, values, *weights),
        lambda: attention_sizes(*map(int, (channels, maps, heads, residual_channels, width, patch_size))),
    )
    return run(x, keys, values, weights, patch_size, threshold)
