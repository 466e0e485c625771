"""What only the Triton kernels promise, and both ops as the default networks call them.

Run by test_triton.py in a process under the interpreter. The tests that are not slow are as small as they can be: a
program takes some milliseconds there.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from calling import arguments
from tolerances import tolerance
from triton.runtime.interpreter import InterpreterError

from benchmarks.triton_interpreter import Audit
from grcsf_fast import GRCSF, functional, reference, use_backend
from grcsf_fast.kernels.triton import gcu, grouped, rcu, tuning
from grcsf_fast.ops import registered
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
    at, _ = rcu._at(channel, channels, stride, tl.zeros([1], tl.int32), tl.zeros([1], tl.int1), WIDE)
    tl.store(out + channel[:, None], at)
    other, _ = grouped.channels_of(0, channels, ((CHANNELS, 1, 1, 1, WIDE),), 0)
    tl.store(out + CHANNELS + channel[:, None], other * stride)


def test_offsets_beyond_2_to_the_31(backend):
    """By their arithmetic: 64 channels of 2^26 pixels are 2^32 numbers, which nobody allocates here."""
    out = torch.zeros(128, dtype=torch.int64)
    _offsets_kernel[(1,)](out, 64, 2**26, 64, True)
    assert out.tolist() == 2 * [channel * 2**26 for channel in range(64)]


@pytest.mark.parametrize(("spatial", "wide"), [((2**14, 2**12), True), ((2**11, 2**12), False)])
def test_wide_offsets_where_they_are_needed(backend, spatial, wide):
    features = torch.empty(1, 64, *spatial, device="meta")
    assert grouped.Launch([[features]], 64).tiles[0].wide is wide
    weights = SimpleNamespace(
        query_weight=torch.empty(2, 2, 16, 64, device="meta"), score_weight=torch.empty(32, 64, device="meta")
    )
    block = rcu.block_of("forward", 64, 8, 2, 4, 32, "sm_90")
    assert rcu._Launch(features, weights, 8, block).blocks["WIDE"] is wide


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spatial", [(4, 140), (2, 4, 18)])
def test_op_1_in_every_dtype(backend, compensation_inputs, spatial, dtype):
    """Several tiles, the last of them not full."""
    inputs = compensation_inputs(spatial, batch=1, channels=17, dtype=dtype)
    check_against_the_reference("global_compensation", inputs, {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spatial", "patch"), [((4, 12), 4), ((3, 6), 3), ((4, 4, 8), 4)])
def test_op_2_in_every_dtype(backend, attention_inputs, spatial, patch, dtype):
    """Groups of patches, the last of them not full, and tokens that do not fill their block."""
    inputs = attention_inputs(spatial, patch, batch=1, channels=17, residual_channels=16, dtype=dtype)
    check_against_the_reference("patch_cross_attention", inputs, {"patch_size": patch})


DEFAULTS = {name: one.default for name, one in inspect.signature(GRCSF).parameters.items()}
# The network's stages that are downsampled, what is just beyond a block of channels, and the smallest images.
COMPENSATED = [
    *((2, channels, (4, 4)) for channels in DEFAULTS["features"][:-2]),
    *((3, channels, (2, 2, 4)) for channels in DEFAULTS["features"][:2]),
    (2, DEFAULTS["features"][-1], (2, 2)),
    *(
        pytest.param(*one, marks=pytest.mark.slow)
        for one in (
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


@pytest.mark.parametrize("level", DEFAULTS["rcu_levels"])
@pytest.mark.parametrize(("patch", "spatial"), [(8, (8, 8)), (4, (4, 4, 4))])
def test_op_2_at_the_levels_of_the_default_networks(backend, attention_inputs, patch, spatial, level):
    channels = DEFAULTS["features"][level]
    inputs = attention_inputs(
        spatial, patch, batch=1, channels=channels, maps=len(DEFAULTS["mask_ratios"]), heads=DEFAULTS["num_heads"],
        residual_channels=DEFAULTS["residual_channels"], width=max(channels // 2, 8),
    )  # fmt: skip
    check_against_the_reference("patch_cross_attention", inputs, {"patch_size": patch})


# Not one channel, whose gradients are 0 in exact arithmetic alone.
EDGES = [
    *itertools.product((3, 31, 33, 63, 65), [(2, 4, 2), (4, 2, 10), (6, 10, 6), (6, 38)]),
    *itertools.product((127, 129, 255, 256, 257, 511, 513, 2048), [(2, 4, 2), (2, 12)]),
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
        ((9, 9), 9, {}),
        ((12, 12), 12, {}),
        ((5, 5, 5), 5, {}),
        ((2, 2), 2, {}),
        ((2, 2, 2), 2, {}),
        ((1, 3), 1, {}),
        ((4, 20), 4, {"maps": 3, "heads": 3, "residual_channels": 12}),
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
    """And those that an autotune would try."""
    entries = (gcu.FORWARD, gcu.BACKWARD)
    for pixels, warps in (*entries, *itertools.chain(*map(gcu._neighbours, entries))):
        assert 1 <= warps <= 16
        for channels, spatial in itertools.product(
            (1, 3, 32, 33, 512, 2048), [(1, 1, 1), (1, 2, 2), (1, 224, 224), (1, 7, 300), (2, 2, 2), (96, 96, 96)]
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
    *((33, (4, 38), layout) for layout in list(LAID_OUT)[:4]),
    (33, (2, 2, 4), "channels last"),
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


@pytest.mark.parametrize("layout", ["channels last", "a view", "odd strides of single pixels"])
@pytest.mark.parametrize(("channels", "spatial"), [(5, (2, 4)), *AMBIGUOUS[:3]])
def test_the_fake_kernels_of_op_1_lay_out_as_the_kernels(backend, compensation_inputs, channels, spatial, layout):
    scales = lay_out(compensation_inputs(spatial, batch=1, channels=channels), layout)
    grads = [torch.randn_like(scales[0][0]), torch.randn_like(scales[0][0][:, :1])]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(registered._compensate, (*scales, 1e-6, "triton"), test_utils=checks)
    wanted = [True, True, False, True, True]
    torch.library.opcheck(registered._compensate_backward, (grads, *scales, 1e-6, "triton", wanted), test_utils=checks)


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


WRONG_BLOCKS = [
    ("forward", {"queries": 32, "resident": False}, "either or of none"),
    ("forward", {"keys": 16}, "either or of none"),
    ("forward", {"group": 2}, "are blocks of queries"),
    ("forward", {"queries": 16, "keys": 16}, "in registers is one block"),
    ("attention", {"queries": 32}, "either or of none"),
    ("attention", {"keys": 16}, "either or of none"),
    ("channels", {"group": 2}, "are blocks of queries"),
]


@pytest.mark.parametrize(("kernel", "change", "message"), WRONG_BLOCKS)
def test_a_block_that_would_be_misread_does_not_run(backend, monkeypatch, attention_inputs, kernel, change, message):
    """Of patches of 49 tokens in blocks of 64."""
    right = rcu.block_of

    def wrong(name, *rest):
        block = right(name, *rest)
        return dataclasses.replace(block, **change) if name == kernel else block

    monkeypatch.setattr(rcu, "block_of", wrong)
    inputs = attention_inputs((7, 14), 7, batch=1)
    with pytest.raises((AssertionError, InterpreterError), match=message):
        results("patch_cross_attention", inputs, {"patch_size": 7})


def test_wide_offsets_change_nothing(backend, monkeypatch, compensation_inputs, attention_inputs):
    """64-bit arithmetic on a tensor small enough for either."""
    sizes = rcu._Launch.__init__

    def widened_attention(self, *arguments):
        sizes(self, *arguments)
        self.blocks["WIDE"] = True

    monkeypatch.setattr(grouped, "_is_wide", lambda tensor: True)
    monkeypatch.setattr(rcu._Launch, "__init__", widened_attention)
    check_against_the_reference("global_compensation", compensation_inputs((4, 12), batch=1), {})
    check_against_the_reference("patch_cross_attention", attention_inputs((4, 4), 4, batch=1), {"patch_size": 4})


def test_images_beyond_2_to_the_31_pixels_are_refused(backend):
    """Positions inside an image are 32-bit numbers; nobody allocates that much here."""
    features = torch.zeros(1).expand(1, 1, 2**11, 2**10, 2**10)
    with pytest.raises(ValueError, match=r"features: expected fewer than 2\^31 pixels per image, got \(1, 1, 2048"):
        triton_ops.gcu_forward([features], [features[..., ::2, ::2, ::2]], [features], [features], [features], 1e-6)
    with pytest.raises(ValueError, match=r"x: expected fewer than 2\^31 pixels"):
        triton_ops.rcu_forward(features, features, features, [torch.zeros(2, 2, 16, 1)], 4, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "patch", "spatial"),
    [
        ("sm_80", 4, (4, 12)),
        ("sm_100", 4, (4, 12)),
        ("sm_100", 8, (8, 16)),
        ("gfx942", 4, (4, 12)),
        ("sm_80", 9, (9, 9)),
    ],
)
def test_entries_of_other_gpus(backend, monkeypatch, attention_inputs, architecture, patch, spatial):
    monkeypatch.setattr(tuning, "architecture", lambda: architecture)
    inputs = attention_inputs(spatial, patch, channels=40, batch=1)
    check_against_the_reference("patch_cross_attention", inputs, {"patch_size": patch})


@pytest.fixture
def tuned(monkeypatch):
    """Autotune on, with a timer that runs nothing and finds the candidates faster and faster; the list of its calls."""
    calls = []

    def measure(run):
        calls.append(run)
        return -len(calls)

    monkeypatch.setenv("GRCSF_TRITON_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(tuning, "_kept", {})
    return calls


@pytest.mark.slow
def test_autotune_measures_a_kind_once_and_keeps_the_fastest(backend, tuned, compensation_inputs, attention_inputs):
    """Its results are the same as with the table's entries."""
    for name, inputs, settings in (
        ("global_compensation", compensation_inputs((8, 12)), {}),
        ("patch_cross_attention", attention_inputs((4, 8), 4, batch=1), {"patch_size": 4}),
    ):
        tuned.clear()
        check_against_the_reference(name, inputs, settings)
        measured = len(tuned)
        assert measured > 4
        results(name, inputs, settings)
        assert len(tuned) == measured
    assert len(tuning._kept) == 4
    assert gcu._neighbours(gcu.FORWARD)[-1] in tuning._kept.values()


def test_autotune_is_off_and_bounded(backend, tuned, monkeypatch):
    def failing(entry):
        raise AssertionError("nothing to run here")

    for kind in range(tuning.MOST + 5):
        found = tuning.chosen(kind, "table", lambda: ["other"], failing)
        assert found == ("other" if kind < tuning.MOST else "table")
    assert len(tuning._kept) == tuning.MOST
    monkeypatch.setenv("GRCSF_TRITON_AUTOTUNE", "0")
    assert tuning.chosen(0, "table", lambda: ["other"], failing) == "table"


def test_autotune_passes_over_what_does_not_fit(tuned, monkeypatch):
    def run(entry):
        if entry == "large":
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")

    monkeypatch.setattr(tuning, "measure", lambda call: call() or 1.0)
    assert tuning.chosen("kind", "table", lambda: ["large"], run) == "table"


LAYOUTS = {
    "expanded": lambda tensor: tensor[..., :1].expand_as(tensor),
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize(
    "layout", ["expanded", *(pytest.param(name, marks=pytest.mark.slow) for name in ("transposed", "sliced"))]
)
def test_the_guard_sees_a_gradient_that_would_be_misread(backend, monkeypatch, attention_inputs, layout):
    """Of op 2, which takes dense tensors: with the copy left out, the launch fails; with it, it does not."""
    inputs = {key: tensor.requires_grad_() for key, tensor in attention_inputs((2, 4)).items()}
    outputs = functional.patch_cross_attention(*arguments(inputs), patch_size=2)
    incoming = [LAYOUTS[layout](torch.randn_like(output)) for output in outputs]
    torch.autograd.grad(outputs, list(inputs.values()), incoming, retain_graph=True)
    with monkeypatch.context() as seeded:
        seeded.setattr(triton_ops, "dense", lambda name, tensor, *rest: tensor)
        with pytest.raises((AssertionError, InterpreterError), match="launched with a tensor of strides"):
            torch.autograd.grad(outputs, list(inputs.values()), incoming)
