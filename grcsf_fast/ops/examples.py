"""Small arguments of every op, on which a kernel is compared with the reference (:mod:`grcsf_fast.ops.check`).

Representative rather than small at any price: several images, tiles and patches, sizes that are no powers of two, both
sides of a threshold, and the channels that are asked for. All numbers come from generators of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import AttentionWeights
from ..runtime.dtypes import accumulation_dtype
from . import cpp, plain, registered, stages

__all__ = ["KINDS", "Example", "Sizes", "channels_last", "described", "made", "numbers", "sizes"]

BATCH = 2
CHANNELS = (3, 40, 256, 257)  # odd, several blocks, and both sides of a power of two
PATCH = {2: 8, 3: 4}
# Of the large tensors, which axis the channels are.
AXES = {"x": 1, "features": 1, "coarse": 1, "keys": 2, "values": 2}
# As on large images: 16 divides their strides, by which a GPU reads wide. For the norm more pixels than one program has
# (8192 in C order) and more programs than it adds at once.
ALIGNED = {2: (12, 96), 3: (4, 6, 32)}
MANY = {2: (70, 240), 3: (10, 36, 48)}

# By name, in the order of the op's arguments; ``channels`` of multiscale_compensation is a tuple.
Sizes = tuple[tuple[str, Any], ...]

_BOTH = [
    (op, which, dims)
    for op in ("multiscale_compensation", "patch_cross_attention")
    for dims in (2, 3)
    for which in ("forward", "backward")
]
_STAGES = ("normalize_activate", "pool", "pool_with_mean", "convolve", "upsample")
_TRAINED = [
    (op, which, dims)
    for op in ("normalize_activate", "pool_with_mean") for dims in (2, 3) for which in ("forward", "backward")
]  # fmt: skip
# (op, forward or backward, axes) that a backend has kernels for.
KINDS: dict[str, list[tuple[str, str, int]]] = {
    "triton": [*_BOTH, *_TRAINED],
    "cpp": [
        *_BOTH,
        *((op, "forward", dims) for op in _STAGES for dims in (2, 3)),
        *(kind for kind in _TRAINED if kind[1] == "backward"),
        *(("convolve", "backward", dims) for dims in (2, 3)),
        *((op, "forward", 0) for op in ("attend", "linear_gelu")),
    ],
}


class Example(NamedTuple):
    """Arguments of an op.

    Args:
        tensors: float64 on the CPU, by name.
        run: backend, or "reference", and tensors to named outputs.
        sums: whether an output is a sum of so many terms that it is as exact as its own size, not as each term.
    """

    tensors: dict[str, Tensor]
    run: Callable[[str, dict[str, Tensor]], dict[str, Tensor]]
    sums: bool = False


def numbers(shape: Sequence[int], seed: int) -> Tensor:
    """Normal ones, float64 on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    # Many are drawn in float32, which takes less.
    dtype = torch.float32 if math.prod(shape) > 2**18 else torch.float64
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device="cpu").double()


def described(sizes: Sizes) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes)


def sizes(op: str, dims: int) -> list[Sizes]:
    """Those that ``info --check`` goes through."""
    if op == "multiscale_compensation":
        return [compensation_sizes(CHANNELS), compensation_sizes(CHANNELS[1:2])]
    if op == "patch_cross_attention":
        return [attention_sizes(one, 2, 2, 16, 24, PATCH[dims]) for one in CHANNELS]
    return [(("channels", one),) for one in CHANNELS]


def compensation_sizes(channels: Sequence[int]) -> Sizes:
    """What chooses among the variants of multiscale_compensation's kernels."""
    return (("channels", tuple(channels)),)


def attention_sizes(channels: int, maps: int, heads: int, residual: int, scorer: int, patch: int) -> Sizes:
    """What chooses among the variants of patch_cross_attention's kernels."""
    return (
        ("channels", channels), ("maps", maps), ("heads", heads), ("residual channels", residual),
        ("hidden units", scorer), ("patches of", patch),
    )  # fmt: skip


def channels_last(name: str, tensor: Tensor) -> Tensor:
    """One of an example's tensors laid out as in a network whose channels are last in memory."""
    axis = AXES.get(name.partition("[")[0])
    return tensor if axis is None else tensor.movedim(axis, -1).contiguous().movedim(-1, axis)


def made(op: str, which: str, dims: int, sizes: Sizes, large: bool = False) -> list[Example]:
    """Examples of an op.

    Args:
        op: its name in :mod:`grcsf_fast.ops.registered`.
        which: "forward" or "backward".
        dims: spatial axes.
        sizes: what chooses among the variants of its kernels.
        large: some as on large images, where Triton's kernels are other machine code. For a GPU; elsewhere these take
            long.
    """
    values = [value for _, value in sizes]
    if op == "multiscale_compensation":
        return [_compensation(dims, *values, large)]
    if op == "patch_cross_attention":
        return [_attention(which, dims, *values)]
    examples = [_STAGE_EXAMPLES[op](_space(dims), *values)]
    if large and op == "normalize_activate":
        (channels,) = values
        # Of many channels some are enough, whose number 16 divides where it divides theirs.
        examples.append(_normalization(MANY[dims], min(channels, 32 + channels % 16)))
    elif large and op == "pool_with_mean":
        examples.append(_pooling_with_mean(ALIGNED[dims], *values))
    return examples


def _compensation(dims: int, channels: Sequence[int], large: bool) -> Example:
    tensors: dict[str, Tensor] = {}
    for scale, count in enumerate(channels):
        # Several tiles all the same; of many channels they would take long.
        width = 3 if count > 128 else 9 if count > 32 else 33
        half = [3, 2 * width + 1] if dims == 2 else [2, 3, min(width, 9)]
        if large and 2 * scale < len(channels):  # the first scales are those of the largest images
            half[-1] += -half[-1] % 16
        fine = [2 * size for size in half]
        for number, (name, shape) in enumerate(
            (
                ("features", (BATCH, count, *fine)),
                ("coarse", (BATCH, count, *half)),
                ("feature_gates", (BATCH, count)),
                ("coarse_gates", (BATCH, count)),
                ("strengths", (count,)),
            )
        ):
            drawn = numbers(shape, 10 * scale + number)
            tensors[f"{name}[{scale}]"] = drawn.sigmoid() if name.endswith("gates") else drawn

    def run(backend: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        given = [list(tensors.values())[index::5] for index in range(5)]
        if backend == "reference":
            pairs = reference.multiscale_compensation(*given)
        else:
            pairs = registered.multiscale_compensation(*given, backend=backend)
        return {
            f"{name}[{scale}]": output
            for scale, pair in enumerate(pairs)
            for name, output in zip(("compensated", "residual"), pair, strict=True)
        }

    return Example(tensors, run)


def _attention(
    which: str, dims: int, channels: int, maps: int, heads: int, residual: int, scorer: int, patch: int
) -> Example:
    tokens = patch**dims
    # Few patches where attention from token to token is large.
    counts = {2: (2, 3), 3: (1, 2, 3)} if tokens <= 64 else {2: (1, 3), 3: (1, 1, 3)}
    space = tuple(patch * count for count in counts[dims])
    shapes = {
        "x": (BATCH, channels, *space), "keys": (BATCH, maps, residual, *space),
        "values": (BATCH, maps, residual, *space), "query_weight": (maps, heads, residual, channels),
        "query_bias": (maps, heads, residual), "position_bias": (heads, tokens, tokens),
        "output_weight": (maps, heads, channels, residual), "output_bias": (channels,),
        "score_weight": (scorer, channels), "score_context": (BATCH, scorer), "score_vector": (scorer,),
        "score_bias": (),
    }  # fmt: skip
    # Sums of about 1, whatever their length.
    fan_in = {
        "query_weight": channels, "output_weight": maps * heads * residual, "score_weight": channels / 16,
        "score_vector": scorer,
    }  # fmt: skip
    tensors = {
        name: numbers(shape, seed) * fan_in.get(name, 1) ** -0.5 for seed, (name, shape) in enumerate(shapes.items())
    }
    threshold = 0.0
    if which == "forward":
        # Half of the patches are skipped, and rounding moves no score across.
        ranked = reference.patch_cross_attention(*grouped(tensors), patch)[1].flatten().sort().values
        middle = ranked[len(ranked) // 4 : -(len(ranked) // 4)]
        gap = int(middle.diff().argmax())
        threshold = float(middle[gap : gap + 2].mean())

    def run(backend: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        settings = {"patch_size": patch, "threshold": threshold}
        if backend == "reference":
            outputs = reference.patch_cross_attention(*grouped(tensors), **settings)
        else:
            outputs = registered.patch_cross_attention(*grouped(tensors), **settings, backend=backend)
        return dict(zip(("out", "score"), outputs, strict=True))

    return Example(tensors, run)


def grouped(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, AttentionWeights]:
    """The tensors of patch_cross_attention by name as it takes them."""
    weights = AttentionWeights(*(tensors[name] for name in AttentionWeights._fields))
    return tensors["x"], tensors["keys"], tensors["values"], weights


def _stage(
    shapes: dict[str, Sequence[int]],
    kernel: Callable[..., Tensor],
    torch_form: Callable[..., Tensor],
    sums: bool = False,
    triton_kernel: Callable[..., Tensor] | None = None,
) -> Example:
    """Of an op with one output, from functions of the tensors in their order."""
    tensors = {name: numbers(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    forms = {"reference": torch_form, "cpp": kernel, "triton": triton_kernel}

    def run(backend: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"the output": forms[backend](*tensors.values())}

    return Example(tensors, run, sums)


def _space(dims: int) -> tuple[int, ...]:
    return (10, 26) if dims == 2 else (4, 6, 18)


def _normalization(space: tuple[int, ...], channels: int) -> Example:
    return _stage(
        {"x": (BATCH, channels, *space), "weight": (channels,), "bias": (channels,)},
        lambda *tensors: (
            stages.normalize_activate(*tensors, backend="cpp")
            if tensors[0].requires_grad
            else registered.normalize_activate(*tensors, 1e-5, 0.01)
        ),
        plain.normalize_activate,
        triton_kernel=lambda *tensors: stages.normalize_activate(*tensors, backend="triton"),
    )


def _pooling(space: tuple[int, ...], channels: int) -> Example:
    return _stage({"x": (BATCH, channels, *space)}, registered.pool, plain.pool)


def _pooling_with_mean(space: tuple[int, ...], channels: int) -> Example:
    return _stage(
        {"x": (BATCH, channels, *space)},
        lambda x: torch.cat(
            stages.pool_with_mean(x, backend="cpp") if x.requires_grad else registered.pool_with_mean(x)
        ),
        lambda x: torch.cat(plain.pool_with_mean(x)),
        triton_kernel=lambda x: torch.cat(stages.pool_with_mean(x, backend="triton")),
    )


def _convolution(space: tuple[int, ...], channels: int) -> Example:
    outputs, taps = 19, 3 ** len(space)
    scale = (channels * taps) ** -0.5

    def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if x.requires_grad:
            return stages.convolution(x, weight * scale, bias)
        filters = cpp.transform_filters(weight * scale)
        return registered.convolve(x, filters, bias.to(filters.dtype))

    return _stage(
        {"x": (BATCH, channels, *space), "weight": (outputs, channels, *[3] * len(space)), "bias": (outputs,)},
        kernel,
        lambda x, weight, bias: (F.conv2d if len(space) == 2 else F.conv3d)(x, weight * scale, bias, padding=1),
        sums=True,
    )


def _upsampling(space: tuple[int, ...], channels: int) -> Example:
    outputs = 19
    scale = channels**-0.5

    def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = accumulation_dtype(x.dtype)
        filters = (weight * scale).to(wide).flatten(2).permute(2, 1, 0).contiguous()
        return registered.upsample(x, filters, bias.to(wide))

    transposed = F.conv_transpose2d if len(space) == 2 else F.conv_transpose3d
    return _stage(
        {"x": (BATCH, channels, *space), "weight": (channels, outputs, *[2] * len(space)), "bias": (outputs,)},
        kernel,
        lambda x, weight, bias: transposed(x, weight * scale, bias, stride=2),
        sums=True,
    )


def _transformer_attention(space: tuple[int, ...], channels: int) -> Example:
    heads = 2 if channels % 2 == 0 else 1
    return _stage(
        {"queries": (BATCH, 21, channels), "keys": (BATCH, 35, channels), "values": (BATCH, 35, channels)},
        lambda *tensors: registered.attend(*tensors, heads),
        lambda *tensors: plain.attend(*tensors, heads),
    )


def _linear(space: tuple[int, ...], channels: int) -> Example:
    scale = channels**-0.5
    return _stage(
        {"x": (BATCH, 21, channels), "weight": (35, channels), "bias": (35,)},
        lambda x, weight, bias: registered.linear_gelu(x, weight * scale, bias),
        lambda x, weight, bias: plain.linear_gelu(x, weight * scale, bias),
        sums=True,
    )


_STAGE_EXAMPLES: dict[str, Callable[[tuple[int, ...], int], Example]] = {
    "normalize_activate": _normalization,
    "pool": _pooling,
    "pool_with_mean": _pooling_with_mean,
    "convolve": _convolution,
    "upsample": _upsampling,
    "attend": _transformer_attention,
    "linear_gelu": _linear,
}
