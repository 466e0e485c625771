"""The ops as users call them: arguments checked, shapes documented, the backend chosen from the tensor.

Tensors of subclasses, such as MONAI's MetaTensor, are served as by PyTorch's own functions: the subclass decides what
comes back, which for a MetaTensor is a MetaTensor with the first one's metadata.

The two ops of the units, and below them what the backbone does between its convolutions and the autoencoder between its
matrix products, for which there are kernels on the CPU when no gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .ops import registered
from .ops.backends import checked_backend, select_backend
from .ops.examples import Sizes, attention_sizes, compensation_sizes
from .runtime.transforms import transformed

__all__ = [
    "attend",
    "global_compensation",
    "linear_gelu",
    "multiscale_compensation",
    "normalize_activate",
    "patch_cross_attention",
    "pool",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _implementation(op: str, tensors: Sequence[Tensor], sizes: Callable[[], Sizes]) -> Callable[..., Any]:
    """The op of the backend that serves ``tensors``, the large one first."""
    first = tensors[0]
    backend = select_backend(first)
    if backend == "triton":
        backend = checked_backend(op, _wants_gradients(tensors), first.dtype, first.dim() - 2, first.device, sizes())
    return getattr(reference, op) if backend == "reference" else partial(getattr(registered, op), backend=backend)


def _check_float(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}".removeprefix("builtins.")
        raise TypeError(
            f"{name}: expected a torch.Tensor of floating-point numbers, got {kind}; torch.as_tensor makes one of an "
            "array or a list"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a {'nested' if tensor.is_nested else tensor.layout} one")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")


def _check_like(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    _check_float(name, tensor)
    if tensor.device != model.device:
        raise ValueError(f"{name}: expected device {model.device} (that of {model_name}), got {tensor.device}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {letters} = {shape}, got {tuple(tensor.shape)}")


def _check_same_dtype(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    if tensor.dtype != model.dtype:
        raise TypeError(f"{name}: expected dtype {model.dtype} (that of {model_name}), got {tensor.dtype}")


def _spatial_dims(name: str, tensor: Tensor) -> int:
    _check_float(name, tensor)
    if tensor.dim() not in (4, 5):
        raise ValueError(f"{name}: expected (B,C,H,W) or (B,C,D,H,W), got {tensor.dim()} axes {tuple(tensor.shape)}")
    return tensor.dim() - 2


def _check_not_empty(name: str, tensor: Tensor) -> None:
    """A batch may be empty, an image may not."""
    if not all(tensor.shape[1:]):
        raise ValueError(f"{name}: expected a channel and a pixel along each axis, got {tuple(tensor.shape)}")


def global_compensation(
    features: Tensor, coarse: Tensor, feature_gate: Tensor, coarse_gate: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Measure per pixel what a downsampling lost, and strengthen the features by it (the GCU's core, one scale).

    With ``U = feature_gate * features`` and ``V = coarse_gate * upsample_x2_linear(coarse)``, the residual is
    ``1 - cos(U, V)`` over the channels, the cosine's denominator floored at ``eps``, and the compensated features
    are ``features * (1 + residual)``. Differentiable in every tensor; on the reference backend twice.

    Args:
        features: (B, C, \\*S), S of 2 or 3 axes; float16, bfloat16, float32 or float64.
        coarse: (B, C, \\*S/2), the features after downsampling by exactly 2; dtype of ``features``.
        feature_gate: (B, C), squeeze-and-excitation weights of ``features``; any float dtype.
        coarse_gate: (B, C), those of the up-sampled ``coarse``; any float dtype.
        eps: floor of the product of the two norms, above 0.

    Returns:
        ``(compensated, residual)``: (B, C, \\*S) and (B, 1, \\*S) in [0, 2] up to rounding, dtype of ``features``.

    Raises:
        TypeError: a tensor that is not floating-point, or ``coarse`` of another dtype than ``features``.
        ValueError: a shape, device or ``eps`` that does not fit; the message names the argument.

    Source: paper, Global Compensation Unit; the form ``features * (1 + residual)`` is our decision.
    """
    return multiscale_compensation([features], [coarse], [feature_gate], [coarse_gate], eps)[0]


def multiscale_compensation(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    eps: float = 1e-6,
) -> list[tuple[Tensor, Tensor]]:
    """:func:`global_compensation` of several scales in one call: on a GPU one launch serves them all.

    Args:
        features: a tensor a scale, as for :func:`global_compensation`; all of one dtype, device and number of axes.
        coarse: as many.
        feature_gates: as many.
        coarse_gates: as many.
        eps: for all scales.

    Returns:
        ``[(compensated, residual), ...]``, a pair a scale.

    Raises:
        TypeError: as :func:`global_compensation`, or scales of different dtypes.
        ValueError: as :func:`global_compensation`, or scales that do not fit each other.
    """
    given = {"features": features, "coarse": coarse, "feature_gates": feature_gates, "coarse_gates": coarse_gates}
    for name, tensors in given.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name}: expected a list with a tensor per scale, got {type(tensors).__qualname__}")
        if not features:
            raise ValueError("features: expected at least one scale, got none")
        if len(tensors) != len(features):
            raise ValueError(f"{name}: expected {len(features)} tensors, as many as features, got {len(tensors)}")
    for scale, tensors in enumerate(zip(features, coarse, feature_gates, coarse_gates, strict=True)):
        _check_scale(*tensors)
        if scale:
            _check_like("features", features[scale], "the first scale", features[0])
            _check_same_dtype("features", features[scale], "the first scale", features[0])
            if features[scale].dim() != features[0].dim():
                raise ValueError(
                    f"features: expected as many axes as the first scale, {features[0].dim()}, "
                    f"got {tuple(features[scale].shape)}"
                )
    if not eps > 0:
        raise ValueError(f"eps: expected a number above 0, got {eps}")
    run = _implementation(
        "multiscale_compensation",
        [*features, *coarse, *feature_gates, *coarse_gates],
        lambda: compensation_sizes([int(one.shape[1]) for one in features]),
    )
    return run(features, coarse, feature_gates, coarse_gates, eps)


def _check_scale(features: Tensor, coarse: Tensor, feature_gate: Tensor, coarse_gate: Tensor) -> None:
    dims = _spatial_dims("features", features)
    batch, channels, *spatial = features.shape
    _check_not_empty("features", features)
    _check_like("coarse", coarse, "features", features)
    _check_same_dtype("coarse", coarse, "features", features)
    if any(size % 2 for size in spatial) or tuple(coarse.shape) != (batch, channels, *(s // 2 for s in spatial)):
        letters = "(B,C,H/2,W/2)" if dims == 2 else "(B,C,D/2,H/2,W/2)"
        raise ValueError(
            f"coarse: expected shape {letters} with an exact factor of 2 to features {tuple(features.shape)}, "
            f"got {tuple(coarse.shape)}; pad odd sizes before downsampling"
        )
    for name, gate in (("feature_gate", feature_gate), ("coarse_gate", coarse_gate)):
        _check_like(name, gate, "features", features)
        _check_shape(name, gate, (batch, channels), "(B,C)")


def patch_cross_attention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    position_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    score_weight: Tensor,
    score_context: Tensor,
    score_vector: Tensor,
    score_bias: Tensor,
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
        query_weight: (M, h, R, C); this and every tensor below: any float dtype.
        query_bias: (M, h, R).
        position_bias: (h, T, T), added to the logits of query token t and key token j.
        output_weight: (M, h, C, R), the learned weights of the residual maps folded in.
        output_bias: (C,).
        score_weight: (Hs, C).
        score_context: (B, Hs), global information, one row an image.
        score_vector: (Hs,).
        score_bias: () scalar tensor.
        patch_size: edge p of a patch in pixels; divides every axis of S.
        threshold: score below which a patch is left as it is, in [0, 1]; above 0 for inference only.

    Returns:
        ``(out, score)``: (B, C, \\*S) in the dtype of ``x``; (B, 1, \\*S/p) in [0, 1], float64 for a float64 ``x``
        and float32 otherwise.

    Raises:
        TypeError: a tensor that is not floating-point, or keys or values of another dtype than ``x``.
        ValueError: a shape, device or number that does not fit; the message names the argument.

    Source: paper, Region Compensation Unit; multi-query keys, the position bias and the two-layer scorer are our
    decisions.
    """
    dims = _spatial_dims("x", x)
    batch, channels, *spatial = x.shape
    if not isinstance(patch_size, int) or isinstance(patch_size, bool):
        raise TypeError(f"patch_size: expected an int, got {patch_size!r}")
    if patch_size < 1 or any(size % patch_size or size == 0 for size in spatial):
        raise ValueError(f"patch_size: expected a divisor of every axis of {tuple(spatial)}, got {patch_size}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}")
    _check_like("query_weight", query_weight, "x", x)
    if query_weight.dim() != 4 or query_weight.shape[3] != channels:
        raise ValueError(f"query_weight: expected shape (M,h,R,C) with C = {channels}, got {tuple(query_weight.shape)}")
    maps, heads, residual_channels, _ = query_weight.shape
    if not maps or not heads or not residual_channels:
        raise ValueError(f"query_weight: expected at least one map, head and channel, got {tuple(query_weight.shape)}")
    _check_like("score_weight", score_weight, "x", x)
    if score_weight.dim() != 2 or score_weight.shape[1] != channels:
        raise ValueError(f"score_weight: expected shape (Hs,C) with C = {channels}, got {tuple(score_weight.shape)}")
    width = score_weight.shape[0]
    tokens = patch_size**dims
    for name, tensor, shape, letters in (
        ("keys", keys, (batch, maps, residual_channels, *spatial), "(B,M,R,*S)"),
        ("values", values, (batch, maps, residual_channels, *spatial), "(B,M,R,*S)"),
        ("query_bias", query_bias, (maps, heads, residual_channels), "(M,h,R)"),
        ("position_bias", position_bias, (heads, tokens, tokens), "(h,T,T)"),
        ("output_weight", output_weight, (maps, heads, channels, residual_channels), "(M,h,C,R)"),
        ("output_bias", output_bias, (channels,), "(C,)"),
        ("score_context", score_context, (batch, width), "(B,Hs)"),
        ("score_vector", score_vector, (width,), "(Hs,)"),
        ("score_bias", score_bias, (), "()"),
    ):
        _check_like(name, tensor, "x", x)
        _check_shape(name, tensor, shape, letters)
    _check_same_dtype("keys", keys, "x", x)
    _check_same_dtype("values", values, "x", x)
    tensors = (
        x, keys, values, query_weight, query_bias, position_bias, output_weight, output_bias,
        score_weight, score_context, score_vector, score_bias,
    )  # fmt: skip
    run = _implementation(
        "patch_cross_attention",
        tensors,
        lambda: attention_sizes(*map(int, (channels, maps, heads, residual_channels, width, patch_size))),
    )
    return run(*tensors, patch_size, threshold)


def normalize_activate(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, slope: float = 0.01) -> Tensor:
    """Instance normalisation and leaky ReLU in one step.

    Args:
        x: (B, C, \\*S), S of 2 or 3 axes and more than one pixel.
        weight: (C,), scale of each channel.
        bias: (C,), shift of each channel.
        eps: added to the variance.
        slope: of the activation below 0.

    Returns:
        (B, C, \\*S) in the dtype of ``x``.

    Raises:
        TypeError: a tensor that is not floating-point.
        ValueError: a shape or device that does not fit.

    Source: the backbone is our decision (DESIGN section 5).
    """
    _spatial_dims("x", x)
    _check_not_empty("x", x)
    for name, one in (("weight", weight), ("bias", bias)):
        _check_like(name, one, "x", x)
        _check_shape(name, one, (x.shape[1],), "(C,)")
    if x.numel() == x.shape[0] * x.shape[1] > 0:
        raise ValueError(f"x: expected more than one pixel a channel, got {tuple(x.shape)}")
    run = registered.normalize_activate if _without_gradients(x, weight, bias) else reference.normalize_activate
    return run(x, weight, bias, eps, slope)


def pool(x: Tensor) -> Tensor:
    """The largest of each 2 x 2 (x 2) pixels.

    Args:
        x: (B, C, \\*S), S of 2 or 3 axes, each even.

    Returns:
        (B, C, \\*S/2) in the dtype of ``x``; NaN where one of the pixels is.

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: another number of axes, or an odd one.
    """
    _spatial_dims("x", x)
    _check_not_empty("x", x)
    if any(size % 2 for size in x.shape[2:]):
        raise ValueError(f"x: expected even spatial axes, got {tuple(x.shape)}")
    return registered.pool(x) if _without_gradients(x) else reference.pool(x)


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Attention of several heads, their channels side by side.

    Args:
        queries: (B, W, D).
        keys: (B, N, D), dtype of the queries.
        values: (B, N, D), dtype of the queries.
        heads: divides D.

    Returns:
        (B, W, D) in the dtype of :func:`torch.nn.functional.scaled_dot_product_attention`: for each head,
        ``softmax(queries keys^T / sqrt(D / heads)) values``.

    Raises:
        TypeError: tensors that are not floating-point or of several dtypes.
        ValueError: a shape, a device or a number of heads that does not fit.
    """
    _check_float("queries", queries)
    if queries.dim() != 3:
        raise ValueError(f"queries: expected (B,W,D), got {queries.dim()} axes {tuple(queries.shape)}")
    batch, _, width = queries.shape
    for name, one in (("keys", keys), ("values", values)):
        _check_like(name, one, "queries", queries)
        _check_same_dtype(name, one, "queries", queries)
        _check_shape(name, one, (batch, *keys.shape[1:2], width), "(B,N,D)")
    if heads < 1 or width % heads or not keys.shape[1]:
        raise ValueError(f"heads: expected a divisor of D = {width}, and one token or more, got {heads}")
    kernel = _without_gradients(queries, keys, values) and not _autocast_elsewhere(queries)
    run = registered.attend if kernel else reference.attend
    return run(queries, keys, values, heads)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer and the exact GELU behind it.

    Args:
        x: (..., D).
        weight: (H, D).
        bias: (H,).

    Returns:
        (..., H) in the dtype of :func:`torch.nn.functional.linear`.

    Raises:
        TypeError: a tensor that is not floating-point.
        ValueError: a shape or device that does not fit.
    """
    _check_float("x", x)
    if not x.dim():
        raise ValueError("x: expected (...,D), got a scalar")
    _check_like("weight", weight, "x", x)
    _check_shape("weight", weight, (*weight.shape[:1], x.shape[-1]), "(H,D)")
    _check_like("bias", bias, "x", x)
    _check_shape("bias", bias, tuple(weight.shape[:1]), "(H,)")
    run = registered.linear_gelu if _without_gradients(x, weight, bias) else reference.linear_gelu
    return run(x, weight, bias)


def _without_gradients(*tensors: Tensor) -> bool:
    """Whether the CPU's kernels without a backward serve; a compiler fuses plain PyTorch better."""
    if torch.compiler.is_compiling() or tensors[0].device.type != "cpu" or transformed() is not None:
        return False
    return select_backend(tensors[0]) == "cpp" and not _wants_gradients(tensors)


def _autocast_elsewhere(tensor: Tensor) -> bool:
    """Whether a product of this tensor is of another dtype under the autocast in force."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != tensor.dtype


def _wants_gradients(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
