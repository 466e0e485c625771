"""Every backend's ops against loops written from DESIGN sections 3 and 4, their gradients, and against each other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from calling import arguments, grouped
from tolerances import tolerance
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from grcsf_fast import BackendUnavailableError, functional, reference, use_backend
from grcsf_fast.ops import cpp, triton
from grcsf_fast.ops.backends import select_backend
from grcsf_fast.runtime.patches import from_patches, to_patches

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ALL = slice(None)
# The reference, the C++ kernels in every instruction set of this processor, and Triton's on a GPU or interpreted.
BACKENDS = ["reference", *(f"cpp-{name}" for name in (cpp.instruction_sets() if cpp.problem() is None else ()))]
if triton.problem() is None:
    BACKENDS.append("triton")


@pytest.fixture(params=BACKENDS)
def ops(request, monkeypatch, where):
    """The two ops on one backend."""
    backend, _, instruction_set = request.param.partition("-")
    if instruction_set:
        monkeypatch.setenv("GRCSF_CPU_ISA", instruction_set)
    if backend == "triton":
        where.dtype = torch.float32
        where.device = "cpu" if triton.interpreted() else "cuda"
    with use_backend(backend):
        yield functional


@pytest.fixture
def double(where):
    """For tests that need float64, such as gradcheck."""
    if where.dtype != torch.float64:
        pytest.skip("this backend has no float64")


def skip_unserved(ops, where, dtype: torch.dtype) -> None:
    try:
        select_backend(torch.zeros(1, dtype=dtype, device=where.device))
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def reference_alone(ops, where):
    if select_backend(torch.zeros(1, device=where.device)) != "reference":
        pytest.skip("only the reference can be differentiated twice")


COMPENSATION_SIZES = [(2, 2), (4, 6), (14, 2), (10, 26), (2, 2, 2), (2, 4, 6), (6, 2, 10)]
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
    features: np.ndarray, coarse: np.ndarray, feature_gate: np.ndarray, coarse_gate: np.ndarray, eps: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """DESIGN section 3, pixel by pixel."""
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
            compensated[(image, ALL, *pixel)] = features[(image, ALL, *pixel)] * (2 - cosine)
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
    """DESIGN section 4, token by token: ``(out, score, y)``."""
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


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3),
        lambda: torch.empty_like(torch.ones(3)),
        lambda: torch.empty_strided((3,), (2,)),
        lambda: torch.ones(1).new_empty(3),
        lambda: torch.empty(3, requires_grad=True),
    ],
)
def test_unwritten_memory_is_nan(allocate):
    """The fixture that the other tests rely on is in force."""
    assert allocate().isnan().all()
    assert torch.empty(3, dtype=torch.int64).shape == (3,)


class TestGlobalCompensation:
    @pytest.mark.parametrize("batch", [0, 1, 2])
    @pytest.mark.parametrize("channels", [1, 3, 17])
    @pytest.mark.parametrize("spatial", COMPENSATION_SIZES)
    def test_matches_loop(self, ops, compensation_inputs, spatial, channels, batch):
        inputs = compensation_inputs(spatial, batch, channels)
        compensated, residual = ops.global_compensation(**inputs)
        expected_compensated, expected_residual = loop_compensation(**as_numpy(inputs))
        assert compensated.dtype == residual.dtype == inputs["features"].dtype
        assert_matches(compensated, expected_compensated)
        assert_matches(residual, expected_residual)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("spatial", [(10, 26), (6, 2, 10)])
    def test_every_dtype_against_float64(self, ops, where, compensation_inputs, spatial, dtype):
        skip_unserved(ops, where, dtype)
        inputs = compensation_inputs(spatial, channels=17, dtype=dtype)
        compensated, residual = ops.global_compensation(**inputs)
        expected_compensated, expected_residual = loop_compensation(**as_numpy(inputs))
        assert compensated.dtype == residual.dtype == dtype
        assert_matches(compensated, expected_compensated)
        assert_matches(residual, expected_residual)

    @pytest.mark.parametrize("eps", [1e-6, 0.5, 10.0])
    def test_eps_is_the_floor_of_the_denominator(self, ops, compensation_inputs, eps):
        inputs = compensation_inputs()
        compensated, residual = ops.global_compensation(**inputs, eps=eps)
        expected_compensated, expected_residual = loop_compensation(**as_numpy(inputs), eps=eps)
        assert_matches(compensated, expected_compensated)
        assert_matches(residual, expected_residual)

    def test_residual_of_parallel_and_opposite_features(self, ops, where):
        """0 where the up-sampled features point the same way, 2 where they point the other way."""
        features = torch.ones(1, 4, 4, 4, dtype=where.dtype, device=where.device)
        gate = torch.full((1, 4), 0.3, dtype=where.dtype, device=where.device)
        for sign, expected in ((1.0, 0.0), (-1.0, 2.0)):
            _, residual = ops.global_compensation(features, sign * features[..., ::2, ::2], gate, gate)
            torch.testing.assert_close(residual, torch.full_like(residual, expected), **tolerance(where.dtype))

    @pytest.mark.parametrize("spatial", [(4, 2), (2, 4, 2)])
    def test_gradients(self, ops, double, compensation_inputs, spatial):
        inputs = gated(compensation_inputs(spatial))
        assert gradcheck(ops.global_compensation, tuple(inputs.values()))

    @pytest.mark.parametrize("spatial", [(2, 4), (2, 2, 2)])
    def test_second_gradients(self, ops, reference_alone, compensation_inputs, spatial):
        inputs = gated(compensation_inputs(spatial, batch=1, channels=2))
        assert gradgradcheck(ops.global_compensation, tuple(inputs.values()))

    def test_gradients_where_eps_is_in_force(self, ops, double, compensation_inputs):
        inputs = gated(compensation_inputs((4, 2)))
        assert gradcheck(lambda *tensors: ops.global_compensation(*tensors, eps=100.0), tuple(inputs.values()))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("zeros", [("features",), ("coarse",), ("feature_gate",), ("features", "coarse")])
    @pytest.mark.parametrize("spatial", [(4, 6), (2, 4, 2)])
    def test_zeros_are_finite(self, ops, where, compensation_inputs, spatial, zeros, dtype):
        """A pixel without a direction has residual 1 and finite gradients."""
        skip_unserved(ops, where, dtype)
        inputs = compensation_inputs(spatial, dtype=dtype)
        inputs = gated(inputs | {name: torch.zeros_like(inputs[name]) for name in zeros})
        compensated, residual = ops.global_compensation(**inputs)
        assert torch.equal(residual, torch.ones_like(residual))
        assert torch.equal(compensated, 2 * inputs["features"])
        (compensated.sum() + residual.sum()).backward()
        for name, tensor in inputs.items():
            assert tensor.grad.isfinite().all(), name

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_zeros_are_finite_under_a_tiny_eps(self, ops, where, compensation_inputs, dtype):
        """Any eps above 0 is a floor, one whose square float32 cannot hold too."""
        skip_unserved(ops, where, dtype)
        inputs = compensation_inputs(dtype=dtype)
        inputs = gated(inputs | {"features": torch.zeros_like(inputs["features"])})
        compensated, residual = ops.global_compensation(**inputs, eps=1e-30)
        assert torch.equal(residual, torch.ones_like(residual))
        assert torch.equal(compensated, torch.zeros_like(compensated))
        compensated.sum().backward()
        assert inputs["features"].grad.isfinite().all()

    @pytest.mark.parametrize("spatial", [(6, 10), (4, 6, 10)])
    def test_nan_feature_stays_in_its_pixel(self, ops, compensation_inputs, spatial):
        inputs = compensation_inputs(spatial)
        clean, clean_residual = ops.global_compensation(**inputs)
        pixel = (1, *[1] * (len(spatial) - 1))
        inputs["features"][(1, 2, *pixel)] = math.nan
        compensated, residual = ops.global_compensation(**inputs)
        spoiled = torch.zeros_like(residual, dtype=torch.bool)
        spoiled[(1, 0, *pixel)] = True
        assert torch.equal(residual.isnan(), spoiled)
        assert torch.equal(compensated.isnan(), spoiled.expand_as(compensated))
        torch.testing.assert_close(residual[~spoiled], clean_residual[~spoiled], atol=0, rtol=0)
        untouched = ~spoiled.expand_as(compensated)
        torch.testing.assert_close(compensated[untouched], clean[untouched], atol=0, rtol=0)

    def test_nan_coarse_pixel_stays_in_its_footprint(self, ops, compensation_inputs):
        """One coarse pixel reaches the 4 by 4 pixels that are interpolated from it."""
        inputs = compensation_inputs((14, 14))
        inputs["coarse"][0, 1, 3, 2] = math.nan
        compensated, residual = ops.global_compensation(**inputs)
        spoiled = torch.zeros_like(residual, dtype=torch.bool)
        spoiled[0, 0, 5:9, 3:7] = True
        assert torch.equal(residual.isnan(), spoiled)
        assert torch.equal(compensated.isnan(), spoiled.expand_as(compensated))


class TestPatchCrossAttention:
    @pytest.mark.parametrize("batch", [0, 1, 2])
    @pytest.mark.parametrize("maps", [1, 2, 3])
    @pytest.mark.parametrize(("patch_size", "spatial"), ATTENTION_SIZES)
    def test_matches_loop(self, ops, attention_inputs, patch_size, spatial, maps, batch):
        inputs = attention_inputs(spatial, patch_size, batch, maps=maps)
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=patch_size)
        expected_out, expected_score, _ = loop_attention(**as_numpy(inputs), patch_size=patch_size)
        assert out.dtype == score.dtype == inputs["x"].dtype
        assert_matches(out, expected_out)
        assert_matches(score, expected_score)

    @pytest.mark.parametrize("sizes", [{"channels": 1}, {"heads": 1}, {"heads": 3}, {"residual_channels": 1}])
    def test_matches_loop_over_channels_and_heads(self, ops, attention_inputs, sizes):
        inputs = attention_inputs((4, 6), 2, **sizes)
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        expected_out, expected_score, _ = loop_attention(**as_numpy(inputs), patch_size=2)
        assert_matches(out, expected_out)
        assert_matches(score, expected_score)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("patch_size", "spatial"), [(4, (12, 8)), (7, (7, 14)), (3, (3, 6, 9))])
    def test_every_dtype_against_float64(self, ops, where, attention_inputs, patch_size, spatial, dtype):
        skip_unserved(ops, where, dtype)
        inputs = attention_inputs(spatial, patch_size, channels=17, residual_channels=16, dtype=dtype)
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=patch_size)
        expected_out, expected_score, _ = loop_attention(**as_numpy(inputs), patch_size=patch_size)
        assert out.dtype == dtype
        assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_matches(out, expected_out)
        assert_matches(score, expected_score)

    def test_large_logits(self, ops, attention_inputs):
        """The softmax of logits beyond exp's range is finite: attention to one token."""
        inputs = attention_inputs()
        inputs["keys"] *= 1e4
        out, _ = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        assert_matches(out, loop_attention(**as_numpy(inputs), patch_size=2)[0])

    @pytest.mark.parametrize(("patch_size", "spatial"), [(2, (2, 4)), (1, (2, 1)), (2, (2, 2, 2))])
    def test_gradients(self, ops, double, attention_inputs, patch_size, spatial):
        inputs = gated(attention_inputs(spatial, patch_size, batch=2, channels=2, residual_channels=2, width=3))
        assert gradcheck(
            lambda *tensors: ops.patch_cross_attention(*grouped(tensors), patch_size=patch_size), tuple(inputs.values())
        )
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=patch_size)
        (out.square().sum() + score.square().sum()).backward()
        # A single token has nothing to choose from: the logits' parameters cannot move the output.
        unused = {"keys", "query_weight", "query_bias", "position_bias"} if patch_size == 1 else set()
        assert {name for name, tensor in inputs.items() if not tensor.grad.any()} == unused

    def test_gradients_above_a_threshold(self, ops, double, attention_inputs):
        inputs = gated(attention_inputs((2, 8), channels=2, residual_channels=2, width=3))
        score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)[1]
        ranked = score.flatten().sort().values
        threshold = ranked[3:5].mean().item()
        assert gradcheck(
            lambda *tensors: ops.patch_cross_attention(*grouped(tensors), patch_size=2, threshold=threshold),
            tuple(inputs.values()),
        )

    def test_zeros_are_finite(self, ops, attention_inputs):
        inputs = gated({name: torch.zeros_like(tensor) for name, tensor in attention_inputs().items()})
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(score, torch.full_like(score, 0.5))
        (out.sum() + score.sum()).backward()
        for name, tensor in inputs.items():
            assert tensor.grad.isfinite().all(), name

    @pytest.mark.parametrize(("name", "scored"), [("x", True), ("keys", False), ("values", False)])
    @pytest.mark.parametrize("spatial", [(4, 6), (2, 4, 6)])
    def test_nan_stays_in_its_patch(self, ops, attention_inputs, spatial, name, scored):
        inputs = attention_inputs(spatial)
        clean, clean_score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        place = (Ellipsis, 3, 2)  # in the patch of rows 2-3 and columns 2-3, the first along the depth
        inputs[name][(1, 0, 0) if name == "x" and len(spatial) == 3 else (1, 0)][place] = math.nan
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        spoiled = torch.zeros_like(out, dtype=torch.bool)
        spoiled[1, ..., 2:4, 2:4] = True
        spoiled_score = torch.zeros_like(score, dtype=torch.bool)
        spoiled_score[1, ..., 1, 1] = scored
        assert out[1, ..., 3, 2].isnan().all()
        assert torch.equal(score.isnan(), spoiled_score)
        torch.testing.assert_close(out[~spoiled], clean[~spoiled], atol=0, rtol=0)
        torch.testing.assert_close(score[~spoiled_score], clean_score[~spoiled_score], atol=0, rtol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("spatial", [(4, 6), (2, 4, 6), (4, 78)])
    def test_patches_below_the_threshold_pass_unchanged(self, ops, where, attention_inputs, spatial, dtype):
        skip_unserved(ops, where, dtype)
        inputs = attention_inputs(spatial, dtype=dtype)
        full, score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        threshold = float(score.median())
        out, same_score = ops.patch_cross_attention(*arguments(inputs), patch_size=2, threshold=threshold)
        skipped = score < threshold
        for axis in range(2, 2 + len(spatial)):
            skipped = skipped.repeat_interleave(2, axis)
        skipped = skipped.expand_as(out)
        assert skipped.any()
        assert not skipped.all()
        assert torch.equal(same_score, score)
        assert torch.equal(out[skipped], inputs["x"][skipped])
        assert torch.equal(out[~skipped], full[~skipped])

    @pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9, 1.0])
    def test_threshold_error_is_bounded(self, ops, attention_inputs, threshold):
        inputs = attention_inputs((8, 12))
        full, _ = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        out, _ = ops.patch_cross_attention(*arguments(inputs), patch_size=2, threshold=threshold)
        expected, _, update = loop_attention(**as_numpy(inputs), patch_size=2, threshold=threshold)
        assert_matches(out, expected)
        assert (out - full).abs().max() <= threshold * np.abs(update).max()

    def test_score_at_the_threshold_is_attended(self, ops, attention_inputs):
        inputs = attention_inputs()
        full, score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        out, _ = ops.patch_cross_attention(*arguments(inputs), patch_size=2, threshold=float(score.min()))
        assert torch.equal(out, full)

    def test_skipped_patch_ignores_a_broken_update(self, ops, attention_inputs):
        inputs = attention_inputs()
        inputs["keys"].fill_(math.nan)
        out, _ = ops.patch_cross_attention(*arguments(inputs), patch_size=2, threshold=1.0)
        assert torch.equal(out, inputs["x"])


# Large enough for several tiles and parts, odd enough for remainders.
LARGER = [
    ("compensation_inputs", "global_compensation", {"spatial": (38, 70), "channels": 17}, {}),
    ("compensation_inputs", "global_compensation", {"spatial": (6, 1030), "channels": 3}, {}),
    ("compensation_inputs", "global_compensation", {"spatial": (36, 6, 10), "channels": 5}, {}),
    ("attention_inputs", "patch_cross_attention", {"spatial": (16, 24), "channels": 33}, {"patch_size": 8}),
    ("attention_inputs", "patch_cross_attention", {"spatial": (14, 7), "maps": 3, "width": 17}, {"patch_size": 7}),
    ("attention_inputs", "patch_cross_attention", {"spatial": (16, 32), "residual_channels": 20}, {"patch_size": 16}),
    ("attention_inputs", "patch_cross_attention", {"spatial": (8, 4, 12), "residual_channels": 16}, {"patch_size": 4}),
    ("attention_inputs", "patch_cross_attention", {"spatial": (12, 20), "maps": 1, "batch": 3}, {"patch_size": 4}),
    ("attention_inputs", "patch_cross_attention", {"spatial": (8, 24), "channels": 150, "maps": 1}, {"patch_size": 8}),
    ("attention_inputs", "patch_cross_attention", {"spatial": (5, 10, 5), "heads": 1}, {"patch_size": 5}),
    ("attention_inputs", "patch_cross_attention", {"spatial": (9, 18)}, {"patch_size": 9}),
    ("attention_inputs", "patch_cross_attention", {"spatial": (7, 7, 14)}, {"patch_size": 7}),
    ("compensation_inputs", "global_compensation", {"batch": 0}, {}),
    ("attention_inputs", "patch_cross_attention", {"batch": 0}, {"patch_size": 2}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("maker", "name", "sizes", "settings"), LARGER)
def test_outputs_and_gradients_against_the_reference(request, ops, where, maker, name, sizes, settings, dtype):
    """Of every tensor, both outputs weighed, against the reference in float64 on the same numbers."""
    skip_unserved(ops, where, dtype)
    make = request.getfixturevalue(maker)
    inputs = gated(make(**sizes, **settings, dtype=dtype))
    exact = gated({key: tensor.double() for key, tensor in inputs.items()})
    outputs = getattr(ops, name)(*arguments(inputs), **settings)
    expected = getattr(reference, name)(*arguments(exact), **settings)
    incoming = [torch.randn_like(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), incoming)
    expected_gradients = torch.autograd.grad(expected, list(exact.values()), [one.double() for one in incoming])
    for one, other in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        # Sums over many pixels are as exact as their own size, not as each of their terms.
        size = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one.double() / size, other / size, **tolerance(one.dtype))


@pytest.mark.parametrize("dims", [2, 3])
def test_several_scales_in_one_call(ops, compensation_inputs, dims):
    """Bit for bit what one call a scale gives, gradients included."""
    shapes = [(5, (16, 36)), (17, (8, 18))] if dims == 2 else [(5, (4, 16, 12)), (17, (2, 8, 6))]
    scales = [gated(compensation_inputs(spatial, channels=channels)) for channels, spatial in shapes]
    together = ops.multiscale_compensation(*zip(*(list(one.values()) for one in scales), strict=True))
    apart = [ops.global_compensation(**one) for one in scales]
    tensors = [tensor for one in scales for tensor in one.values()]
    results = []
    for outputs in (together, apart):
        flat = [output for pair in outputs for output in pair]
        results.append((*flat, *torch.autograd.grad(sum(one.square().sum() for one in flat), tensors)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def every_second(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def expanded(tensor: Tensor) -> Tensor:
    return tensor[..., :1].expand_as(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 2 else tensor


LAYOUTS = [every_second, transposed, expanded, channels_last]
OPS = [  # fixture of the inputs, name, settings
    ("compensation_inputs", "global_compensation", {}),
    ("attention_inputs", "patch_cross_attention", {"patch_size": 2}),
]


def laid_out(tensors: dict[str, Tensor], layout) -> dict[str, Tensor]:
    return {name: layout(tensor) if tensor.dim() else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(4, 6), (2, 4, 6)])
@pytest.mark.parametrize(("maker", "name", "settings"), OPS)
def test_any_layout_of_inputs(request, ops, maker, name, settings, spatial, layout):
    """Strided, transposed and expanded inputs give what their contiguous copies give, gradients included."""
    views = laid_out(request.getfixturevalue(maker)(spatial), layout)
    assert not all(tensor.is_contiguous() for tensor in views.values())
    results = []
    for copy in (lambda tensor: tensor, Tensor.contiguous):
        inputs = {name: copy(tensor).requires_grad_() for name, tensor in views.items()}
        first, second = getattr(ops, name)(*arguments(inputs), **settings)
        gradients = torch.autograd.grad(first.square().sum() + second.square().sum(), list(inputs.values()))
        results.append((first, second, *gradients))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **tolerance(actual.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(4, 6), (2, 4, 6)])
@pytest.mark.parametrize(("maker", "name", "settings"), OPS)
def test_any_layout_of_gradients(request, ops, maker, name, settings, spatial, layout):
    """Incoming gradients that are strided, transposed or expanded count like contiguous ones."""
    inputs = gated(request.getfixturevalue(maker)(spatial))
    results = []
    incoming = [layout(torch.randn_like(output)) for output in getattr(ops, name)(*arguments(inputs), **settings)]
    assert not incoming[0].is_contiguous()
    for gradients in (incoming, [gradient.contiguous() for gradient in incoming]):
        outputs = getattr(ops, name)(*arguments(inputs), **settings)
        results.append(torch.autograd.grad(outputs, list(inputs.values()), gradients))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **tolerance(actual.dtype))


@pytest.mark.parametrize(("patch_size", "spatial"), ATTENTION_SIZES)
def test_patches_are_row_major_and_invertible(patch_size, spatial):
    volume = torch.arange(math.prod(spatial) * 2.0).reshape(2, *spatial)
    patches = to_patches(volume, patch_size, len(spatial))
    counts = [size // patch_size for size in spatial]
    for index, patch in enumerate(np.ndindex(*counts)):
        box = tuple(slice(n * patch_size, (n + 1) * patch_size) for n in patch)
        assert torch.equal(patches[:, index], volume[(ALL, *box)].flatten(1))
    assert torch.equal(from_patches(patches, patch_size, spatial), volume)
