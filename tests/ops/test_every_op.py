"""Both ops of every backend against the reference: any layout, any dtype, gradients included."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from calling import arguments
from every_backend import BACKENDS, DTYPES, skip_unserved, skip_unserved_sizes
from loops import ALL, ATTENTION_SIZES, gated
from tolerances import tolerance
from torch import Tensor

from grcsf_fast import reference
from grcsf_fast.ops import triton
from grcsf_fast.runtime.patches import from_patches, to_patches


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


# For Triton's interpreter: still several tiles, which take as long there as an image elsewhere.
SMALLER = {(38, 70): (6, 38), (6, 1030): (2, 70), (36, 6, 10): (4, 6, 10), (16, 24): (8, 16), (8, 24): (8, 16)}
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
    if triton.interpreted():
        sizes = {key: SMALLER.get(value, value) for key, value in sizes.items()}
    make = request.getfixturevalue(maker)
    inputs = gated(make(**sizes, **settings, dtype=dtype))
    if name == "patch_cross_attention":
        skip_unserved_sizes(ops, where, inputs, **settings)
    assert_as_the_reference(ops, name, inputs, settings)


@pytest.mark.parametrize("ops", [name for name in BACKENDS if name.startswith("cpp")], indirect=True)
@pytest.mark.parametrize("channels", [256, 257, 512])
@pytest.mark.parametrize(
    ("maker", "name", "spatial", "settings"),
    [
        ("compensation_inputs", "global_compensation", (24, 30), {}),
        ("compensation_inputs", "global_compensation", (2, 12, 30), {}),
        ("attention_inputs", "patch_cross_attention", (2, 4), {"patch_size": 2}),
        ("attention_inputs", "patch_cross_attention", (8, 8), {"patch_size": 8}),
    ],
)
def test_many_channels(request, ops, maker, name, spatial, settings, channels):
    """As the deepest levels of a network have them; tiles hold fewer pixels there."""
    inputs = request.getfixturevalue(maker)(spatial, channels=channels, dtype=torch.float32, **settings)
    assert_as_the_reference(ops, name, gated(inputs), settings)


def assert_as_the_reference(ops, name, inputs, settings):
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
    if triton.interpreted():
        shapes = [(5, (4, 34)), (17, (2, 18))] if dims == 2 else [(5, (2, 4, 18)), (17, (2, 2, 10))]
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
