"""Global compensation, the GCU's core: arguments checked, the backend chosen from the tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError
from ..ops.backends import implementation
from ..ops.examples import compensation_sizes
from .checks import check_like, check_not_empty, check_same_dtype, check_shape, spatial_dims

__all__ = ["global_compensation", "multiscale_compensation"]


def global_compensation(
    features: Tensor,
    coarse: Tensor,
    feature_gate: Tensor,
    coarse_gate: Tensor,
    strength: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Measure per pixel what a downsampling lost, and give it back to the features (the GCU's core, one scale).

    With ``E = upsample_x2_linear(coarse)``, ``U = feature_gate * features`` and ``V = coarse_gate * E``, the residual
    is ``1 - cos(U, V)`` over the channels, the cosine's denominator floored at ``eps``, and the compensated features
    are ``features + strength * residual * (features - E)``. Differentiable in every tensor; on the reference backend
    twice.

    Args:
        features: (B, C, \\*S), S of 2 or 3 axes; float16, bfloat16, float32 or float64.
        coarse: (B, C, \\*S/2), the features after downsampling by exactly 2, best by their average; dtype of
            ``features``.
        feature_gate: (B, C), squeeze-and-excitation weights of ``features``; any float dtype.
        coarse_gate: (B, C), those of the up-sampled ``coarse``; any float dtype.
        strength: (C,), how much of the loss is given back; any float dtype.
        eps: floor of the product of the two norms, above 0.

    Returns:
        ``(compensated, residual)``: (B, C, \\*S) and (B, 1, \\*S) in [0, 2] up to rounding, dtype of ``features``.

    Raises:
        ArgumentTypeError: a tensor that is not floating-point, or ``coarse`` of another dtype than ``features``.
        ArgumentError: a shape, device or ``eps`` that does not fit; the message names the argument.

    Source: paper, Global Compensation Unit; what is given back, and by how much, is our decision, by measurement
    (docs/explanation/paper.md).
    """
    return multiscale_compensation([features], [coarse], [feature_gate], [coarse_gate], [strength], eps)[0]


def multiscale_compensation(
    features: Sequence[Tensor],
    coarse: Sequence[Tensor],
    feature_gates: Sequence[Tensor],
    coarse_gates: Sequence[Tensor],
    strengths: Sequence[Tensor],
    eps: float = 1e-6,
) -> list[tuple[Tensor, Tensor]]:
    """:func:`global_compensation` of several scales in one call: on a GPU one launch serves them all.

    Args:
        features: a tensor per scale, as for :func:`global_compensation`; all of one dtype, device and number of axes.
        coarse: as many.
        feature_gates: as many.
        coarse_gates: as many.
        strengths: as many.
        eps: for all scales.

    Returns:
        ``[(compensated, residual), ...]``, a pair per scale.

    Raises:
        ArgumentTypeError: as :func:`global_compensation`, or scales of different dtypes.
        ArgumentError: as :func:`global_compensation`, or scales that do not fit each other.
    """
    given = {
        "features": features, "coarse": coarse, "feature_gates": feature_gates, "coarse_gates": coarse_gates,
        "strengths": strengths,
    }  # fmt: skip
    for name, tensors in given.items():
        if not isinstance(tensors, (list, tuple)):
            raise ArgumentTypeError(
                f"{name}: expected a list with a tensor per scale, got {type(tensors).__qualname__}"
            )
        if not features:
            raise ArgumentError("features: expected at least one scale, got none")
        if len(tensors) != len(features):
            raise ArgumentError(f"{name}: expected {len(features)} tensors, as many as features, got {len(tensors)}")
    for scale, tensors in enumerate(zip(features, coarse, feature_gates, coarse_gates, strengths, strict=True)):
        _check_scale(*tensors)
        if scale:
            check_like("features", features[scale], "the first scale", features[0])
            check_same_dtype("features", features[scale], "the first scale", features[0])
            if features[scale].dim() != features[0].dim():
                raise ArgumentError(
                    f"features: expected as many axes as the first scale, {features[0].dim()}, "
                    f"got {tuple(features[scale].shape)}"
                )
    if not eps > 0:
        raise ArgumentError(f"eps: expected a number above 0, got {eps}")
    run = implementation(
        "multiscale_compensation",
        [*features, *coarse, *feature_gates, *coarse_gates, *strengths],
        lambda: compensation_sizes([int(one.shape[1]) for one in features]),
    )
    return run(features, coarse, feature_gates, coarse_gates, strengths, eps)


def _check_scale(features: Tensor, coarse: Tensor, feature_gate: Tensor, coarse_gate: Tensor, strength: Tensor) -> None:
    dims = spatial_dims("features", features)
    batch, channels, *spatial = features.shape
    check_not_empty("features", features)
    check_like("coarse", coarse, "features", features)
    check_same_dtype("coarse", coarse, "features", features)
    if any(size % 2 for size in spatial) or tuple(coarse.shape) != (batch, channels, *(s // 2 for s in spatial)):
        letters = "(B,C,H/2,W/2)" if dims == 2 else "(B,C,D/2,H/2,W/2)"
        raise ArgumentError(
            f"coarse: expected shape {letters} with an exact factor of 2 to features {tuple(features.shape)}, "
            f"got {tuple(coarse.shape)}; pad odd sizes before downsampling"
        )
    for name, gate in (("feature_gate", feature_gate), ("coarse_gate", coarse_gate)):
        check_like(name, gate, "features", features)
        check_shape(name, gate, (batch, channels), "(B,C)")
    check_like("strength", strength, "features", features)
    check_shape("strength", strength, (channels,), "(C,)")
