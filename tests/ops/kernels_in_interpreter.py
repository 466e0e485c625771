"""What only the Triton kernels promise, and both ops as the default networks call them.

Run by test_triton.py in a process under the interpreter. The tests that are not slow are as small as they can be: a
program takes some milliseconds there.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import triton
import triton.language as tl
from calling import arguments
from tolerances import tolerance
from triton.runtime.interpreter import InterpreterError

from benchmarks.triton_interpreter import Audit
from grcsf_fast import GRCSF, BackendUnavailableError, functional, reference, use_backend
from grcsf_fast.kernels.triton import gcu, grouped, patches, rcu, rcu_backward
from grcsf_fast.ops import backends, registered
from grcsf_fast.ops import triton as triton_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["triton"])
def backend(request, where):
    where.dtype = torch.float32
    with use_backend("triton"):
        yield


@triton.jit
def _offsets_kernel(out, channels, stride, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    channel = tl.arange(0, CHANNELS)
    one, _ = patches.channels_of(0, channels, CHANNELS, WIDE)
    tl.store(out + channel, one * stride)
    other, _ = grouped.channels_of(0, channels, ((CHANNELS, 1, 1, 1, WIDE),), 0)
    tl.store(out + CHANNELS + channel[None, :], other * stride)


def test_offsets_beyond_2_to_the_31(backend):
    """By their arithmetic: 64 channels of 2^26 pixels are 2^32 numbers, which nobody allocates here."""
    out = torch.zeros(128, dtype=torch.int64)
    _offsets_kernel[(1,)](out, 64, 2**26, 64, True)
    assert out.tolist() == 2 * [channel * 2**26 for channel in range(64)]


@pytest.mark.parametrize(("spatial", "wide"), [((2**14, 2**12), True), ((2**11, 2**12), False)])
def test_wide_offsets_where_they_are_needed(backend, spatial, wide):
    features = torch.empty(1, 64, *spatial, device="meta")
    assert grouped.Launch([[features]], 64).tiles[0].wide is wide


@triton.jit
def _product_kernel(a, b, out):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="tf32x3"))


def test_products_of_three(backend):
    """As they are compiled: what rounding to 10 bits leaves is multiplied once more, but not with itself."""
    one = torch.eye(16) * (1 + 2**-11)
    out = torch.empty(16, 16)
    _product_kernel[(1,)](one, one, out)
    assert torch.equal(out, torch.eye(16) * (1 + 2**-10))  # and 2^-22, were it float32
    a, b = torch.randn(2, 16, 16)
    _product_kernel[(1,)](a, b, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), atol=1e-5, rtol=0)
    a[3, 4] = torch.inf
    _product_kernel[(1,)](a, torch.ones(16, 16), out)
    assert out[3].isinf().all()
    assert out[:3].isfinite().all()


def results(name, inputs, settings):
    """Outputs and all gradients."""
    inputs = {key: tensor.detach().requires_grad_() for key, tensor in inputs.items()}
    outputs = getattr(functional, name)(*arguments(inputs), **settings)
    incoming = [torch.linspace(-1, 1, one.numel(), dtype=one.dtype).reshape(one.shape) for one in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(inputs.values()), incoming)]


def check_against_the_reference(name, inputs, settings):
    """Outputs and all gradients, against the reference in float64 on the same numbers; no lane outside a tensor."""
    with Audit().on():
        found = results(name, inputs, settings)
    with use_backend("reference"):
        expected = results(name, {key: tensor.double() for key, tensor in inputs.items()}, settings)
    for one, other in zip(found, expected, strict=True):
        # Sums over many pixels are as exact as their own size, not as each of their terms.
        size = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one.double() / size, other / size, **tolerance(one.dtype))


@pytest.mark.parametrize(
    ("spatial", "dtype"),
    [
        *(((4, 140), dtype) for dtype in DTYPES),
        ((2, 4, 18), torch.float32),
        *(pytest.param((2, 4, 18), dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:]),
    ],
)
def test_op_1_in_every_dtype(backend, compensation_inputs, spatial, dtype):
    """Several tiles, the last of them not full."""
    inputs = compensation_inputs(spatial, batch=1, channels=17, dtype=dtype)
    check_against_the_reference("global_compensation", inputs, {})


@pytest.mark.parametrize(
    ("spatial", "patch", "dtype"),
    [
        *(((4, 12), 4, dtype) for dtype in DTYPES),
        *((*size, DTYPES[0]) for size in (((3, 6), 3), ((4, 4, 8), 4))),
        *(pytest.param((3, 6), 3, dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:]),
        *(pytest.param((4, 4, 8), 4, dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:]),
    ],
)
def test_op_2_in_every_dtype(backend, attention_inputs, spatial, patch, dtype):
    """Groups of patches, the last of them not full, and tokens that do not fill their block."""
    inputs = attention_inputs(spatial, patch, batch=1, channels=17, residual_channels=16, dtype=dtype)
    check_against_the_reference("patch_cross_attention", inputs, {"patch_size": patch})


DEFAULTS = {name: one.default for name, one in inspect.signature(GRCSF).parameters.items()}
# The network's stages that are downsampled, what is just beyond a block of channels, and the smallest images.
COMPENSATED = [
    *((2, channels, (4, 4)) for channels in DEFAULTS["features"][:-2]),
    *((3, channels, (2, 2, 4)) for channels in DEFAULTS["features"][:1]),
    *(
        pytest.param(*one, marks=pytest.mark.slow)
        for one in (
            (2, DEFAULTS["features"][-1], (2, 2)),
            (3, DEFAULTS["features"][1], (2, 2, 4)),
            (2, DEFAULTS["features"][-2], (4, 4)),
            (3, DEFAULTS["features"][2], (2, 2, 4)),
            *((3, channels, (2, 2, 2)) for channels in (256, 257)),
            *((2, channels, (2, 2)) for channels in DEFAULTS["features"][-3:-1]),
        )
    ),
]


@pytest.mark.parametrize(("dims", "channels", "spatial"), COMPENSATED)
def test_op_1_at_the_stages_of_the_default_networks(backend, compensation_inputs, dims, channels, spatial):
    inputs = compensation_inputs(spatial, batch=1, channels=channels)
    check_against_the_reference("global_compensation", inputs, {})


def test_op_1_at_all_stages_of_the_default_network_in_one_call(backend, compensation_inputs):
    """As the network calls it."""
    channels = DEFAULTS["features"][:-1]
    spatial = [(2, 2 << stage, 2 << stage) for stage in range(len(channels))][::-1]
    scales = [compensation_inputs(size, batch=1, channels=c) for size, c in zip(spatial, channels, strict=True)]
    together = functional.multiscale_compensation(*([one[key] for one in scales] for key in scales[0]))
    for pair, inputs in zip(together, scales, strict=True):
        with use_backend("reference"):
            expected = functional.global_compensation(**{key: tensor.double() for key, tensor in inputs.items()})
        for one, other in zip(pair, expected, strict=True):
            torch.testing.assert_close(one.double(), other, **tolerance(one.dtype))


# Where the default networks have it, and wherever else they might.
ATTENDED = [
    *(
        pytest.param(patch, spatial, DEFAULTS["features"][level], marks=pytest.mark.slow if level else ())
        for patch, spatial in ((8, (8, 8)), (4, (4, 4, 4)))
        for level in GRCSF(2, 1, 1).config["rcu_levels"]
    ),
    *(pytest.param(8, (8, 8), channels, marks=pytest.mark.slow) for channels in (256, 512)),
    pytest.param(4, (4, 4, 4), 256, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("patch", "spatial", "channels"), ATTENDED)
def test_op_2_at_the_levels_of_the_default_networks(backend, attention_inputs, patch, spatial, channels):
    inputs = attention_inputs(
        spatial, patch, batch=1, channels=channels, maps=len(DEFAULTS["mask_ratios"]), heads=DEFAULTS["num_heads"],
        residual_channels=DEFAULTS["residual_channels"], width=max(channels // 2, 8),
    )  # fmt: skip
    check_against_the_reference("patch_cross_attention", inputs, {"patch_size": patch})


# Not one channel, whose gradients are 0 in exact arithmetic alone.
EDGES = [
    *itertools.product((3, 31, 33, 63, 65), [(2, 4, 2), (2, 12)]),
    *itertools.product((129, 255, 257, 513), [(2, 4)]),
    *((33, spatial) for spatial in ((4, 2, 10), (6, 38))),
    (3, (6, 10, 6)),
    (257, (2, 2, 4)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "spatial"), EDGES)
def test_op_1_at_the_edges_of_the_table(backend, compensation_inputs, channels, spatial):
    inputs = compensation_inputs(spatial, batch=1, channels=channels)
    check_against_the_reference("global_compensation", inputs, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spatial", "patch", "sizes"),
    [
        ((7, 14), 7, {}),
        ((3, 3, 6), 3, {}),
        ((2, 2), 2, {}),
        ((2, 2, 2), 2, {}),
        ((1, 3), 1, {}),
        ((4, 20), 4, {"maps": 3, "heads": 2, "residual_channels": 12}),
        ((4, 4, 20), 4, {"maps": 3, "heads": 1}),
        ((8, 24), 8, {"residual_channels": 17, "width": 65}),
        ((4, 4), 4, {"channels": 300, "width": 257}),
        ((4, 12), 4, {"channels": 1, "width": 1}),
    ],
)
def test_op_2_at_the_edges_of_the_table(backend, attention_inputs, spatial, patch, sizes):
    inputs = attention_inputs(spatial, patch, **({"batch": 1, "channels": 12} | sizes))
    check_against_the_reference("patch_cross_attention", inputs, {"patch_size": patch})


def test_every_tile_fits():
    for channels, spatial, pixels in itertools.product(
        (1, 3, 32, 33, 512, 2048),
        [(1, 1, 1), (1, 2, 2), (1, 224, 224), (1, 7, 300), (2, 2, 2), (96, 96, 96)],
        (gcu.PIXELS, gcu.PIXELS // 4, 8),
    ):
        tile = grouped.tile_of(channels, spatial, pixels)
        assert tile.planes * tile.rows * tile.columns <= pixels
        assert all(number & (number - 1) == 0 for number in tile[:4])


LAID_OUT = {
    "channels last": lambda tensor: tensor.to(
        memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    ),
    "expanded": lambda tensor: tensor[..., :1].expand_as(tensor),
    "a view": lambda tensor: torch.nn.functional.pad(tensor, (1, 2, 3, 1)).chunk(1, 1)[0][..., 3:-1, 1:-2],
    "transposed": lambda tensor: tensor.transpose(1, -1).contiguous().transpose(1, -1),
    "odd strides of single pixels": lambda tensor: tensor.as_strided(
        tensor.shape, [7 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    ),
}


def lay_out(inputs, layout):
    """Of one scale, as the ops take them: features and coarse features laid out."""
    return [[LAID_OUT[layout](one)] if name in ("features", "coarse") else [one] for name, one in inputs.items()]


# A single channel or pixel is contiguous and channels_last at once, coarse features may be where the features are not.
AMBIGUOUS = [(1, (2, 4)), (3, (2, 2)), (1, (2, 2)), (1, (2, 2, 4)), (3, (2, 2, 2))]
LYING = [
    *((33, (4, 38), layout) for layout in list(LAID_OUT)[:2]),
    (33, (2, 2, 4), "channels last"),
    *(pytest.param(33, (4, 38), layout, marks=pytest.mark.slow) for layout in list(LAID_OUT)[2:4]),
    *(pytest.param(33, (2, 2, 4), layout, marks=pytest.mark.slow) for layout in list(LAID_OUT)[1:4]),
    *(
        pytest.param(*one, layout, marks=pytest.mark.slow if len(one[1]) == 3 else ())
        for one in AMBIGUOUS
        for layout in ("channels last", "odd strides of single pixels")
    ),
]


@pytest.mark.parametrize(("channels", "spatial", "layout"), LYING)
def test_op_1_takes_tensors_as_they_lie(backend, compensation_inputs, channels, spatial, layout):
    """Features, coarse features and the outputs' gradients are not copied, and outputs are laid out as the features."""
    scales = lay_out(compensation_inputs(spatial, batch=2 if channels == 3 else 1, channels=channels), layout)
    grads = [LAID_OUT[layout](torch.randn_like(one)) for one in (scales[0][0], scales[0][0][:, :1])]
    with Audit().on():
        (found,) = triton_ops.gcu_forward(*scales, 1e-6)
        (found_grads,) = triton_ops.gcu_backward([grads[0]], [grads[1]], *scales, 1e-6, [[True] * 5])
    assert found[0].stride() == found_grads[0].stride() == torch.empty_like(scales[0][0]).stride()
    assert found_grads[1].stride() == torch.empty_like(scales[1][0]).stride()
    exact = [one[0].double().requires_grad_() for one in scales]
    expected = reference.global_compensation(*exact)
    expected_grads = torch.autograd.grad(expected, exact, [one.double() for one in grads])
    for one, other in zip((*found, *found_grads), (*expected, *expected_grads), strict=True):
        size = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one.double() / size, other / size, **tolerance(one.dtype))


FAKED = [
    *((5, (2, 4), layout) for layout in ("channels last", "a view", "odd strides of single pixels")),
    *((*one, "channels last") for one in AMBIGUOUS[:3]),
    *(pytest.param(*one, "a view", marks=pytest.mark.slow) for one in AMBIGUOUS[:3]),
    *(pytest.param(*one, "odd strides of single pixels", marks=pytest.mark.slow) for one in AMBIGUOUS[:3]),
]


@pytest.mark.parametrize(("channels", "spatial", "layout"), FAKED)
def test_the_fake_kernels_of_op_1_lay_out_as_the_kernels(backend, compensation_inputs, channels, spatial, layout):
    scales = lay_out(compensation_inputs(spatial, batch=1, channels=channels), layout)
    grads = [torch.randn_like(scales[0][0]), torch.randn_like(scales[0][0][:, :1])]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(registered._compensate, (*scales, 1e-6, "triton"), test_utils=checks)
    wanted = [True, True, False, True, True]
    torch.library.opcheck(registered._compensate_backward, (grads, *scales, 1e-6, "triton", wanted), test_utils=checks)


@pytest.mark.slow
def test_channels_last_compiles_without_a_break(backend, compensation_inputs):
    """A view that only the outputs' true layout allows is traced with that of the fake ones."""
    inputs = {name: one[0].requires_grad_() for name, one in zip(
        ("features", "coarse", "feature_gate", "coarse_gate", "strength"),
        lay_out(compensation_inputs((4, 6), channels=5), "channels last"), strict=True,
    )}  # fmt: skip

    def run(*tensors):
        compensated, residual = functional.global_compensation(*tensors)
        return compensated.movedim(1, -1).view(-1, 5), residual.view(-1)

    torch._dynamo.reset()
    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        outputs = call(*inputs.values())
        loss = sum(one.square().sum() for one in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, list(inputs.values()))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize(
    "needed",
    [(True, False, False, False, False), (False, True, False, False, False), (False, False, False, False, True)],
)
def test_op_1_computes_the_gradients_that_are_needed(backend, compensation_inputs, needed):
    scales = [[one] for one in compensation_inputs((4, 6)).values()]
    grads = [torch.randn_like(scales[0][0])], [torch.randn_like(scales[0][0][:, :1])]
    (every,) = triton_ops.gcu_backward(*grads, *scales, 1e-6, [[True] * 5])
    (some,) = triton_ops.gcu_backward(*grads, *scales, 1e-6, [needed])
    for one, other, wanted in zip(some, every, needed, strict=True):
        assert one is None if not wanted else torch.equal(one, other)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"residual_channels": 33}, "at most 32 residual channels, got 33"),
        ({"maps": 3, "heads": 3}, "at most 128 numbers a pixel, got 256 of 3 maps with 3 heads"),
    ],
)
def test_sizes_that_a_gpu_has_no_room_for_are_refused(backend, attention_inputs, sizes, message):
    inputs = attention_inputs((2, 2), 2, batch=1, **sizes)
    with pytest.raises(BackendUnavailableError, match=message):
        functional.patch_cross_attention(*arguments(inputs), patch_size=2)


def test_large_patches_go_to_the_reference(backend, monkeypatch, attention_inputs):
    """With one warning; asked for by name, the kernels refuse."""
    inputs = attention_inputs((9, 9), 9, batch=1)
    with pytest.raises(BackendUnavailableError, match="patches of at most 64 pixels, got 81"):
        functional.patch_cross_attention(*arguments(inputs), patch_size=9)
    monkeypatch.setattr(backends, "select_backend", lambda tensor: "triton")  # as on a GPU; here, C++ comes first
    with use_backend("auto"), pytest.warns(UserWarning, match="at most 64 pixels, got 81; 'reference' serves"):
        found = functional.patch_cross_attention(*arguments(inputs), patch_size=9)
    assert all(map(torch.equal, found, reference.patch_cross_attention(*arguments(inputs), patch_size=9)))


def test_wide_offsets_change_nothing(backend, monkeypatch, compensation_inputs, attention_inputs):
    """64-bit arithmetic on a tensor small enough for either."""
    for module in (grouped, rcu, rcu_backward):
        monkeypatch.setattr(module, "is_wide", lambda tensor: True)
    check_against_the_reference("global_compensation", compensation_inputs((4, 12), batch=1), {})
    check_against_the_reference("patch_cross_attention", attention_inputs((4, 4), 4, batch=1), {"patch_size": 4})


def test_images_beyond_2_to_the_31_pixels_are_refused(backend):
    """Positions inside an image are 32-bit numbers; nobody allocates that much here."""
    features = torch.zeros(1).expand(1, 1, 2**11, 2**10, 2**10)
    with pytest.raises(ValueError, match=r"features: expected fewer than 2\^31 pixels per image, got \(1, 1, 2048"):
        triton_ops.gcu_forward([features], [features[..., ::2, ::2, ::2]], [features], [features], [features], 1e-6)
    with pytest.raises(ValueError, match=r"x: expected fewer than 2\^31 pixels"):
        triton_ops.rcu_forward(features, features, features, [torch.zeros(2, 2, 16, 1)], 4, 0.0)


ATTENTION_LYING = [
    *(((4, 8), 4, layout) for layout in LAID_OUT),
    *(pytest.param((4, 4, 8), 4, layout, marks=pytest.mark.slow) for layout in list(LAID_OUT)[:2]),
]


def attention_laid_out(inputs, layout):
    return {
        name: one if name not in ("x", "keys", "values") or (layout == "channels last" and name != "x")
        else LAID_OUT[layout](one)
        for name, one in inputs.items()
    }  # fmt: skip


@pytest.mark.parametrize(("spatial", "patch", "layout"), ATTENTION_LYING)
def test_op_2_takes_tensors_as_they_lie(backend, attention_inputs, spatial, patch, layout):
    """x, keys, values and the output's gradient are not copied, and the output is laid out as x."""
    x, keys, values, *weights = attention_laid_out(attention_inputs(spatial, patch, batch=1), layout).values()
    weights = functional.AttentionWeights(*weights)
    grad = LAID_OUT[layout](torch.randn_like(x))
    with Audit().on():
        found = triton_ops.rcu_forward(x, keys, values, weights, patch, 0.0)
        score_grad = torch.randn_like(found[1])
        found_grads = triton_ops.rcu_backward(grad, score_grad, x, keys, values, weights, patch, 0.0, [True] * 12)
    assert found[0].stride() == found_grads[0].stride() == torch.empty_like(x).stride()
    exact = [one.double().requires_grad_() for one in (x, keys, values, *weights)]
    expected = reference.patch_cross_attention(*exact[:3], functional.AttentionWeights(*exact[3:]), patch)
    expected_grads = torch.autograd.grad(expected, exact, [grad.double(), score_grad.double()])
    for one, other in zip((*found, *found_grads), (*expected, *expected_grads), strict=True):
        size = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one.double() / size, other / size, **tolerance(one.dtype))


@pytest.mark.parametrize("layout", ["channels last", "a view"])
def test_the_fake_kernels_of_op_2_lay_out_as_the_kernels(backend, attention_inputs, layout):
    x, keys, values, *weights = attention_laid_out(attention_inputs((2, 4), 2, batch=1), layout).values()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(registered._attend, (x, keys, values, weights, 2, 0.0, "triton"), test_utils=checks)
    grads = torch.randn_like(x), torch.randn(1, 1, 1, 2)
    wanted = [True] * 12
    torch.library.opcheck(
        registered._attend_backward, (*grads, x, keys, values, weights, 2, 0.0, "triton", wanted), test_utils=checks
    )


@pytest.mark.parametrize(("spatial", "patch"), [((2, 4), 2), pytest.param((8, 16), 8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("needed", [range(1), range(1, 3), range(3, 5), range(5, 6), range(6, 12), range(8, 12)])
def test_op_2_computes_the_gradients_that_are_needed(backend, attention_inputs, spatial, patch, needed):
    """In two launches, and in one."""
    x, keys, values, *weights = attention_inputs(spatial, patch, batch=1).values()
    weights = functional.AttentionWeights(*weights)
    given = torch.randn_like(x), torch.randn(1, 1, 1, 2), x, keys, values, weights, patch, 0.0
    every = triton_ops.rcu_backward(*given, [True] * 12)
    some = triton_ops.rcu_backward(*given, [number in needed for number in range(12)])
    for number, (one, other) in enumerate(zip(some, every, strict=True)):
        assert one is None if number not in needed else torch.equal(one, other)


def test_the_guard_sees_a_tensor_that_would_be_misread(backend, monkeypatch, attention_inputs):
    """Of op 2, whose weights are taken as dense: with the copy left out, the launch fails; with it, it does not."""
    inputs = attention_inputs((2, 4))
    inputs["query_weight"] = inputs["query_weight"].transpose(0, -1).contiguous().transpose(0, -1)
    functional.patch_cross_attention(*arguments(inputs), patch_size=2)
    monkeypatch.setattr(triton_ops, "dense", lambda name, tensor, *rest: tensor)
    with pytest.raises((AssertionError, InterpreterError), match="launched with a tensor of strides"):
        functional.patch_cross_attention(*arguments(inputs), patch_size=2)
