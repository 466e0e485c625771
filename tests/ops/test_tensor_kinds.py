"""What may be passed to the ops beside plain tensors, under which settings of PyTorch, and what is refused."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from awake import awake
from calling import grouped
from tolerances import tolerance
from torch import Tensor, nn

from grcsf_fast import GRCSF, functional, reference, use_backend
from grcsf_fast.functional import internal
from grcsf_fast.ops import cpp, registered

BACKENDS = ["auto", "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, device="cpu").to(dtype) for shape in shapes]


# Name of the op, its tensors' shapes, those of its outputs, how it is called with them. Batch and pixels come first.
CALLS = {
    "global_compensation": (
        ((2, 3, 4, 6), (2, 3, 2, 3), (2, 3), (2, 3), (3,)),
        lambda *t: functional.global_compensation(*t),
        ("features", "coarse", "feature_gate", "coarse_gate", "strength"),
    ),
    "global_compensation 3-D": (
        ((2, 3, 2, 4, 6), (2, 3, 1, 2, 3), (2, 3), (2, 3), (3,)),
        lambda *t: functional.global_compensation(*t),
        ("features", "coarse", "feature_gate", "coarse_gate", "strength"),
    ),
    "patch_cross_attention": (
        (
            *((2, 3, 4, 6), (2, 2, 4, 4, 6), (2, 2, 4, 4, 6), (2, 2, 4, 3), (2, 2, 4), (2, 4, 4), (2, 2, 3, 4), (3,)),
            *((5, 3), (2, 5), (5,), ()),
        ),
        lambda *t: functional.patch_cross_attention(*grouped(t), 2),
        (
            *("x", "keys", "values", "query_weight", "query_bias", "position_bias", "output_weight", "output_bias"),
            *("score_weight", "score_context", "score_vector", "score_bias"),
        ),
    ),
    "normalize_activate": (
        ((2, 3, 4, 6), (3,), (3,)),
        lambda *t: (internal.normalize_activate(*t),),
        ("x", "weight", "bias"),
    ),
    "pool": (((2, 3, 4, 6),), lambda *t: (internal.pool(*t),), ("x",)),
    "pool_with_mean": (((2, 3, 4, 6),), lambda *t: internal.pool_with_mean(*t), ("x",)),
    "attend": (
        ((2, 5, 4), (2, 6, 4), (2, 6, 4)),
        lambda *t: (internal.attend(*t, 2),),
        ("queries", "keys", "values"),
    ),
    "linear_gelu": (((2, 5, 4), (7, 4), (7,)), lambda *t: (internal.linear_gelu(*t),), ("x", "weight", "bias")),
}
ARGUMENTS = [(name, index) for name, (shapes, _, _) in CALLS.items() for index in range(len(shapes))]


@pytest.fixture(params=CALLS)
def call(request):
    """Tensors, and the op as a function of them that returns a tuple."""
    shapes, run, _ = CALLS[request.param]
    return tensors(*shapes), run


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(plain(one), plain(other))


def plain(tensor: Tensor) -> Tensor:
    return Tensor.as_subclass(tensor.detach(), Tensor)


class Labelled(Tensor):
    """A user's subclass that keeps its class, as PyTorch has it by default, and whose methods are its own."""

    def new_empty(self, *sizes):
        raise AssertionError("the kernels need no method of a subclass")

    contiguous = data_ptr = to = new_empty


class Silent(Tensor):
    """A user's subclass that is a plain tensor to PyTorch's functions."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def meta_tensor(tensor: Tensor) -> Tensor:
    monai = pytest.importorskip("monai.data")
    return monai.MetaTensor(tensor, meta={"name": "case 1"})


MAKERS = {
    "MetaTensor": meta_tensor,
    "a subclass": lambda tensor: tensor.as_subclass(Silent),
    "Parameter": lambda tensor: nn.Parameter(tensor),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_subclasses(backend, call, kind, gradients):
    """The class of what comes back is that of PyTorch's own functions, and so are the metadata."""
    given, run = call
    expected = run(*(tensor.clone().requires_grad_(gradients) for tensor in given))
    made = [MAKERS[kind](tensor.clone()).requires_grad_(gradients) for tensor in given]
    found = run(*made)
    assert_equal(found, expected)
    for one in found:
        assert type(one) is type(made[0] + 1)
        if kind == "MetaTensor":
            assert one.meta["name"] == "case 1"
    if gradients:
        sum(one.square().sum() for one in found).backward()
        given = [tensor.requires_grad_() for tensor in given]
        sum(one.square().sum() for one in run(*given)).backward()
        for one, other in zip(made, given, strict=True):
            torch.testing.assert_close(plain(one.grad), other.grad)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_subclass_beside_plain_tensors(backend, call, gradients):
    given, run = call
    given = [one.requires_grad_(gradients) for one in given]
    expected = run(*given)
    for index in range(len(given)):
        mixed = [meta_tensor(one.detach()) if place == index else one for place, one in enumerate(given)]
        assert_equal(run(*(one.requires_grad_(gradients) for one in mixed)), expected)


@pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built")
def test_kernels_use_no_method_of_a_subclass(call):
    given, run = call
    with use_backend("cpp"), torch.no_grad():
        expected = run(*given)
        found = run(*(tensor.as_subclass(Labelled) for tensor in given))
    assert_equal(found, expected)
    assert all(type(one) is Labelled for one in found)


@pytest.mark.parametrize(("dims", "size"), [(2, (22, 20)), (3, (8, 7, 8))])
def test_networks_take_meta_tensors(backend, dims, size):
    """As MONAI's loaders give them."""
    torch.manual_seed(0)
    network = awake(GRCSF(dims, 1, 1, features=(4, 6, 8), patch_size=2, residual_channels=4, rcu_levels=(0, 1)))
    image, maps = torch.randn(1, 1, *size), torch.rand(1, 2, *size)
    expected = network(image, maps)
    found = network(meta_tensor(image), meta_tensor(maps))
    assert torch.equal(plain(found), plain(expected))
    found.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    expected.square().sum().backward()
    for one, parameter in zip(gradients, network.parameters(), strict=True):
        torch.testing.assert_close(plain(one), parameter.grad)


@pytest.mark.parametrize(("name", "index"), ARGUMENTS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda tensor: tensor.numpy(),
            "expected a torch.Tensor of floating-point numbers, got numpy.ndarray; torch.as",
        ),
        (lambda tensor: np.float32(1), "expected a torch.Tensor of floating-point numbers, got numpy.float32"),
        (lambda tensor: tensor.tolist(), "expected a torch.Tensor of floating-point numbers, got (list|float)"),
        (lambda tensor: None, "expected a torch.Tensor of floating-point numbers, got NoneType"),
        (lambda tensor: 3, "expected a torch.Tensor of floating-point numbers, got int"),
        (lambda tensor: tensor.long(), "expected a floating-point tensor, got torch.int64"),
        (lambda tensor: tensor.bool(), "expected a floating-point tensor, got torch.bool"),
        (lambda tensor: tensor.cfloat(), "expected a floating-point tensor, got torch.complex64"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "expected float16, bfloat16, float32 or float64, got .*float8"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "expected a .*, got torch.qint8"),
        (lambda tensor: tensor.to_sparse(), "expected a dense tensor, got a torch.sparse_coo one"),
    ],
)
def test_refused(name, index, make, message):
    """Each argument says what it takes and what came."""
    shapes, run, names = CALLS[name]
    given = tensors(*shapes)
    given[index] = make(given[index])
    with pytest.raises(TypeError, match=rf"^{names[index]}s?: {message}"):
        run(*given)


def test_a_tensor_where_a_list_is_wanted():
    (features, coarse, gates, strength) = tensors((2, 3, 4, 6), (2, 3, 2, 3), (2, 3), (3,))
    for given, name in (
        ((features, [coarse], [gates], [gates], [strength]), "features"),
        (([features], [coarse], [gates], [gates], None), "strengths"),
        (([features], coarse.numpy(), [gates], [gates], [strength]), "coarse"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a list with a tensor per scale"):
            functional.multiscale_compensation(*given)


@pytest.mark.parametrize("name", CALLS)
def test_scalars_and_images_without_pixels(backend, name):
    shapes, run, names = CALLS[name]
    with pytest.raises(ValueError, match=f"^{names[0]}: expected"):
        run(torch.tensor(1.0), *tensors(*shapes[1:]))
    if name in ("normalize_activate", "pool", "pool_with_mean"):
        for empty in ((2, 0, 4, 6), (2, 3, 0, 6)):
            with pytest.raises(ValueError, match=r"^x: expected a channel and a pixel"):
                run(*tensors(empty, *((empty[1],) for _ in shapes[1:])))


def test_a_patch_size_that_is_a_truth_value():
    shapes = CALLS["patch_cross_attention"][0]
    with pytest.raises(TypeError, match=r"^patch_size: expected an int, got True"):
        functional.patch_cross_attention(*grouped(tensors(*shapes)), True)


# Places of the arguments that have a row or an image for each of the batch.
PER_IMAGE = {
    "global_compensation": (0, 1, 2, 3), "patch_cross_attention": (0, 1, 2, 9), "normalize_activate": (0,),
    "pool": (0,), "pool_with_mean": (0,), "attend": (0, 1, 2), "linear_gelu": (0,),
}  # fmt: skip


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_empty_batch(backend, name, gradients):
    """Empty results; gradients of what the batch shares are 0."""
    shapes, run, _ = CALLS[name]
    per_image = PER_IMAGE[name.split()[0]]
    empty = [(0, *shape[1:]) if index in per_image else shape for index, shape in enumerate(shapes)]
    given = [tensor.requires_grad_(gradients) for tensor in tensors(*empty)]
    found, full = run(*given), run(*tensors(*shapes))
    for one, other in zip(found, full, strict=True):
        assert (one.shape, one.dtype) == ((0, *other.shape[1:]), other.dtype)
    if gradients:
        sum(one.sum() for one in found).backward()
        for tensor in given:
            assert tensor.grad.shape == tensor.shape
            assert not tensor.grad.any()


def test_no_hidden_units(backend):
    with torch.no_grad():
        assert internal.linear_gelu(*tensors((2, 3), (0, 3), (0,))).shape == (2, 0)


@pytest.mark.parametrize("gradients", [False, True])
def test_settings_of_the_process_disturb_nothing(backend, call, gradients):
    given, run = call

    def results():
        inputs = [tensor.clone().requires_grad_(gradients) for tensor in given]
        outputs = run(*inputs)
        if gradients:
            sum(one.square().sum() for one in outputs).backward()
        return [*outputs, *(tensor.grad for tensor in inputs if gradients)]

    expected = results()
    torch.set_default_dtype(torch.float64)
    try:
        assert_equal(results(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        assert_equal(results(), expected)
    finally:
        torch.set_default_device(None)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(results(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built")
def test_filters_under_a_default_device():
    weight, x, bias = tensors((4, 8, 3, 3), (1, 8, 6, 6), (4,))
    with torch.device("meta"):
        filters = cpp.transform_filters(weight)
        found = registered.convolve(x, filters, bias)
    expected = nn.functional.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(found, expected, **tolerance(torch.float32))


@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_storage(name):
    """On the device "meta": the shapes and dtypes of real ones."""
    shapes, run, _ = CALLS[name]
    given = tensors(*shapes)
    found = run(*(tensor.to("meta") for tensor in given))
    for one, other in zip(found, run(*given), strict=True):
        assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta")


VIEWS = {
    "expanded": lambda tensor: tensor[..., :1].expand_as(tensor) if tensor.dim() else tensor,
    "every second": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() else tensor,
    "behind others": lambda tensor: torch.cat([torch.full((3,), torch.nan), tensor.flatten()])[3:].view(tensor.shape),
    "channels last": lambda tensor: tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 2 else tensor,
    "negated lazily": lambda tensor: torch.complex(torch.zeros_like(tensor), -tensor).conj().imag,
    "zeros that are not there": lambda tensor: torch._efficientzerotensor(tensor.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(backend, call, view):
    given, run = call
    views = [VIEWS[view](tensor) for tensor in given]
    copies = [torch.zeros(one.shape) if view.startswith("zeros") else one.clone().contiguous() for one in views]
    with torch.no_grad():
        found, expected = run(*views), run(*copies)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_of_what_asks_for_them(backend, wanted):
    given = tensors(*CALLS["global_compensation"][0])
    given[wanted].requires_grad_()
    functional.global_compensation(*given)[0].square().sum().backward()
    assert [tensor.grad is not None for tensor in given] == [index == wanted for index in range(5)]


def test_copies_and_pickles():
    """Of the ops, and of networks that hold them."""
    op = pickle.loads(pickle.dumps(functional.global_compensation))
    assert op is functional.global_compensation
    assert pickle.loads(pickle.dumps(partial(internal.attend, heads=2))).func is internal.attend
    torch.manual_seed(0)
    network = awake(GRCSF(2, 1, 1, features=(4, 6), patch_size=2, residual_channels=4, rcu_levels=(0,))).eval()
    image, maps = torch.randn(1, 1, 8, 8), torch.rand(1, 2, 8, 8)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(image, maps), network(image, maps))


def test_the_reference_takes_what_the_ops_take():
    """It has no checks of its own, and needs none for tensors of a subclass."""
    given = [meta_tensor(one) for one in tensors(*CALLS["global_compensation"][0])]
    assert_equal(reference.global_compensation(*given), reference.global_compensation(*map(plain, given)))
