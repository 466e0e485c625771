"""Norm and pooling by the Triton kernels, the sums of programs, and views that the adapters of all of them are called
with; run by test_triton.py in a process under the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from awake import awake
from tolerances import tolerance
from torch.utils._pytree import tree_leaves

from benchmarks.triton_interpreter import Audit
from grcsf_fast import GRCSF, use_backend
from grcsf_fast.functional import internal
from grcsf_fast.kernels.triton import norm, sums
from grcsf_fast.ops import plain, stages
from grcsf_fast.ops import triton as triton_ops
from grcsf_fast.reference import AttentionWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=FORMATS[x.dim()]),
    "a view": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
# Several tiles, several blocks of channels, widths that fill none, and a single pixel more than one.
SHAPES = [
    *((2, 3, 4, 6), (2, 5, 2, 2, 6), (1, 1, 2, 2), (0, 3, 4, 4)),
    *(pytest.param(one, marks=pytest.mark.slow) for one in ((2, 3, 8, 12), (1, 33, 6, 34), (1, 2, 70, 140))),
]
OPS = {"normalize_activate": 3, "pool_with_mean": 1}


@pytest.fixture(autouse=True)
def backend():
    with use_backend("triton"):
        yield


def given(name, shape, dtype=torch.float32, layout="contiguous"):
    x = LAYOUTS[layout]((torch.randn(shape) * 3 + 1).to(dtype))
    return [x, torch.rand(shape[1]) + 0.5, torch.randn(shape[1])][: OPS[name]]


def results(ops, name, tensors, incoming):
    """Outputs and all gradients."""
    leaves = [one.detach().requires_grad_() for one in tensors]
    outputs = getattr(ops, name)(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [one.to(out.dtype) for one, out in zip(incoming, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)]


def incoming_of(name, x):
    """Gradients of the outputs, in their dtype."""
    shape = x.shape if name == "normalize_activate" else (*x.shape[:2], *(size // 2 for size in x.shape[2:]))
    one = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(x.dtype)
    return [one] if name == "normalize_activate" else [one, one.flip(-1)]


def check(name, tensors, incoming=None):
    incoming = incoming or incoming_of(name, tensors[0])
    with Audit().on():
        found = results(internal, name, tensors, incoming)
    expected = results(plain, name, [one.double() for one in tensors], incoming)
    for one, other in zip(found, expected, strict=True):
        size = max(1.0, float(other.detach().nan_to_num(0, 0, 0).abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one.double() / size, other / size, **tolerance(one.dtype), equal_nan=True)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_against_float64(name, shape, layout):
    """And laid out as x, whose incoming gradient need not be."""
    tensors = given(name, shape, layout=layout)
    out, *_ = found = check(name, tensors)
    x, x_grad = tensors[0], found[-OPS[name]]
    if layout != "a view" and x.numel():
        assert x_grad.stride() == x.stride()
        lying = FORMATS[x.dim()] if layout == "channels last" else torch.contiguous_format
        assert out.is_contiguous(memory_format=lying)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", OPS)
def test_half_precision(name, dtype):
    check(name, given(name, (1, 17, 6, 34), dtype, "channels last"))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_large_mean_costs_no_digits(layout):
    """Of the variance, which from sums of squares would have none left: float32 does not tell 1e8 from 1e8 + 1.

    The mean itself is a number near 1e4, exact to 5e-4.
    """
    x, weight, bias = given("normalize_activate", (1, 2, 48, 96))
    x = LAYOUTS[layout](1e4 + torch.randn(x.shape))
    found = internal.normalize_activate(x, weight, bias)
    expected = plain.normalize_activate(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-3)


def test_not_finite_numbers_stay_in_their_plane():
    tensors = given("normalize_activate", (2, 3, 8, 8))
    tensors[0][0, 1, 2, 3] = torch.nan
    found = check("normalize_activate", tensors)
    assert found[0].isfinite().flatten(2).all(2).tolist() == [[True, False, True], [True, True, True]]


@pytest.fixture
def few_tiles(monkeypatch):
    """As of a large volume: three tiles an image at most, of more than eight blocks, and two results read at once."""
    for name, number in (("LOOPS", 1), ("MOST_TILES", 3), ("PARTS", 2)):
        monkeypatch.setattr(norm, name, number)


# 5 blocks of 1024 pixels side by side, so tiles of 2, 2 and 1; 67 blocks of 64, the last of them not full, so 3 of 23.
MANY_BLOCKS = [((1, 3, 46, 92), "contiguous"), ((2, 5, 4, 19, 56), "channels last")]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "layout"), MANY_BLOCKS)
def test_tiles_of_several_blocks(few_tiles, shape, layout):
    """The same bits in every run, and of an image whatever is beside it."""
    tensors = given("normalize_activate", shape, layout=layout)
    tensors[0] += 20 * torch.randn(shape[:2]).reshape(*shape[:2], *[1] * (len(shape) - 2))
    found = check("normalize_activate", tensors)
    incoming = incoming_of("normalize_activate", tensors[0])
    assert all(map(torch.equal, found, results(internal, "normalize_activate", tensors, incoming)))
    alone = results(internal, "normalize_activate", [tensors[0][-1:], *tensors[1:]], [incoming[0][-1:]])
    assert all(torch.equal(one[-1:], other) for one, other in zip(found[:2], alone, strict=False))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "layout"), MANY_BLOCKS)
def test_not_finite_numbers_of_a_later_block(few_tiles, shape, layout):
    tensors = given("normalize_activate", shape, layout=layout)
    tensors[0][(0, 1, *(size * 2 // 3 for size in shape[2:]))] = torch.nan
    found = check("normalize_activate", tensors)
    for one in found[:2]:  # out and the gradient of x
        finite = one.isfinite().flatten(2)
        assert not finite[0, 1].any()
        assert finite.all(2).sum() == shape[0] * shape[1] - 1


@pytest.mark.parametrize("layout", list(LAYOUTS)[:2])
@pytest.mark.parametrize("edge", [12, 96, 128, 512])
def test_tiles_of_a_volume_are_few(edge, layout):
    """Each program reads what all of them have left. Of a small volume they are as short as they were."""
    x = LAYOUTS[layout](torch.empty((1, 32, *[edge] * 3), device="meta"))
    for tensors in (1, 2):
        _, (tiles, loops), constants = norm._launch(norm._rows(x), 1, tensors)
        block = loops * constants["PIXELS"]
        assert (tiles - 1) * block < edge**3 <= tiles * block
        assert tiles <= 256
        assert loops == 8 or tiles > 250


@pytest.mark.parametrize("tiles", [1, 513, 4 * 512 + 7])
def test_sums_of_many_tiles(tiles):
    """In one launch: of an image each, of all images, and of no image; in their order, so always the same bits."""
    parts = [torch.randn(rows * tiles, 9) for rows in (2, 1)]
    outcomes = []
    for _ in range(2):
        found = [torch.empty(2, 9), torch.empty(9), torch.empty(0, 9)]
        with Audit().on():
            sums.add_rows(list(zip([*parts, torch.empty(0, 9)], found, strict=True)))
        outcomes.append(found)
    assert all(map(torch.equal, *outcomes))
    for part, one in zip(parts, outcomes[0], strict=False):
        expected = part.double().reshape(-1, tiles, 9).sum(1).reshape(one.shape)
        torch.testing.assert_close(one.double(), expected, atol=1e-4, rtol=1e-5)


def test_pooling_gives_the_gradient_to_whom_pytorch_gives_it():
    """To the first of equal pixels and to the last of several NaN."""
    x = torch.randint(0, 2, (1, 2, 8, 12)).float()
    x[0, 0, :2, :2] = torch.tensor([[torch.nan, 1.0], [torch.nan, 2.0]])
    x[0, 1, :2, :2] = -torch.inf
    x_grad = check("pool_with_mean", [x], [torch.randn(1, 2, 4, 6), torch.zeros(1, 2, 4, 6)])[2]
    assert int((x_grad != 0).sum()) == 48


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_registered_ops(name, layout):
    tensors = [one.requires_grad_() for one in given(name, (2, 3, 4, 6), layout=layout)]
    op = stages._normalize if name == "normalize_activate" else stages._pool
    torch.library.opcheck(
        op, (*tensors, 1e-5, 0.01, "triton") if name == "normalize_activate" else (*tensors, "triton")
    )


LYING = {
    "some channels": lambda x: x[:, 1:4],
    "some columns": lambda x: x[..., 2:6],
    "transposed": lambda x: x.transpose(2, 3),
    "some columns transposed": lambda x: x[..., 2:6].transpose(2, 3),
    "one image": lambda x: x[:1],
    "every other image": lambda x: x[::2],
    "expanded": lambda x: x[:, :1].expand(-1, 3, *x.shape[2:]),
}


@pytest.mark.slow
@pytest.mark.parametrize("lying", LYING)
@pytest.mark.parametrize("layout", list(LAYOUTS)[:2])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_fake_kernels_lay_out_as_the_kernels(dims, layout, lying):
    """Of views with gaps too, of which nothing says what memory format they have."""
    x = LYING[lying](LAYOUTS[layout](torch.randn((3, 4, *(4, 4, 8)[-dims:]))))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(stages._pool, (x, "triton"), test_utils=checks)
    torch.library.opcheck(stages._pool, (x, "cpp"), test_utils=checks)
    pooled = stages._pool(x, "triton")
    torch.library.opcheck(stages._pool_backward, (*pooled, x, "triton"), test_utils=checks)
    weights = torch.ones(2, x.shape[1])
    torch.library.opcheck(stages._normalize, (x, *weights, 1e-5, 0.01, "triton"), test_utils=checks)
    if lying == "some channels":  # as PyTorch's own
        own = torch.nn.functional.max_pool2d if dims == 2 else torch.nn.functional.max_pool3d
        assert pooled[0].stride() == own(x, 2).stride()


def turned(one):
    """The same numbers, as the negative of others: a view that shows in no stride."""
    return torch._neg_view(-one)


def test_negated_views():
    """As the registered ops never pass them on; called directly, the adapters have to read them for themselves."""
    x, weight, bias = given("normalize_activate", (1, 3, 4, 6))
    coarse, half = torch.randn(1, 3, 2, 3), torch.randn(1, 3, 2, 3)
    gates = [torch.rand(1, 3), torch.rand(1, 3), torch.randn(3)]
    _, statistics = triton_ops.norm_forward(x, weight, bias, 1e-5, 0.01)
    maps, residual = torch.randn(1, 1, 2, 4, 6), torch.randn(1, 1, 4, 6)
    weights = AttentionWeights(
        torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2), torch.randn(1, 4, 4), torch.randn(1, 1, 3, 2), torch.randn(3),
        torch.randn(2, 3), torch.randn(1, 2), torch.randn(2), torch.randn(()),
    )  # fmt: skip
    score = torch.randn(1, 1, 2, 3)
    calls = {
        "gcu_forward": (lambda *all_: triton_ops.gcu_forward(*([one] for one in all_), 1e-6), [x, coarse, *gates]),
        "gcu_backward": (
            lambda *all_: triton_ops.gcu_backward(*([one] for one in all_), 1e-6, [[True] * 5]),
            [x.flip(-1), residual, x, coarse, *gates],
        ),
        "rcu_forward": (lambda *all_: triton_ops.rcu_forward(*all_, weights, 2, 0.0), [x, maps, maps.flip(-1)]),
        "rcu_backward": (
            lambda *all_: triton_ops.rcu_backward(*all_, weights, 2, 0.0, [True] * 12),
            [x.flip(-1), score, x, maps, maps.flip(-1)],
        ),
        "norm_forward": (lambda *all_: triton_ops.norm_forward(*all_, 1e-5, 0.01), [x, weight, bias]),
        "norm_backward": (
            lambda *all_: triton_ops.norm_backward(*all_, 0.01), [x.flip(-1), x, weight, bias, statistics]
        ),
        "pool_forward": (triton_ops.pool_forward, [x]),
        "pool_backward": (triton_ops.pool_backward, [half, coarse, x]),
    }  # fmt: skip
    for name, (call, tensors) in calls.items():
        found, expected = (tree_leaves(call(*given)) for given in (map(turned, tensors), tensors))
        assert all(map(torch.equal, found, expected)), name


def test_a_gradient_of_another_layout():
    tensors = given("normalize_activate", (1, 5, 4, 6))
    check("normalize_activate", tensors, [torch.randn(1, 5, 4, 6).contiguous(memory_format=torch.channels_last)])
    x = given("pool_with_mean", (1, 5, 4, 6))
    check("pool_with_mean", x, [torch.randn(1, 5, 2, 3).transpose(2, 3).contiguous().transpose(2, 3) for _ in range(2)])


def test_what_is_needed_alone():
    x, weight, bias = given("normalize_activate", (1, 3, 4, 6))
    incoming = incoming_of("normalize_activate", x)
    every = results(internal, "normalize_activate", [x, weight, bias], incoming)
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(internal.normalize_activate(x, weight, bias), [weight], incoming)
    assert torch.equal(grad, every[2])


@pytest.mark.parametrize("layout", [pytest.param("contiguous", marks=pytest.mark.slow), "channels last"])
def test_a_network_of_these_kernels(layout):
    """Its logits and gradients, every kernel of ours in it."""
    network = awake(GRCSF(2, 1, 1, (4, 6), 2, 3, rcu_levels=(0,))).to(memory_format=torch.channels_last)
    image, maps = LAYOUTS[layout](torch.randn(1, 1, 8, 8)), torch.randn(1, 2, 8, 8)
    outcomes = []
    for name in ("triton", "reference"):
        with use_backend(name):
            logits = network(image, maps)
            outcomes.append((logits, *torch.autograd.grad(logits.square().sum(), list(network.parameters()))))
    for one, other in zip(*outcomes, strict=True):
        size = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one / size, other / size, atol=1e-4, rtol=1e-4)
