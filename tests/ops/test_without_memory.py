"""Tensors whose memory was freed, as sharded training frees parameters, or that never had any, and negated views.

The kernels take addresses: without a check each of the first ended the process.
"""

from __future__ import annotations

import re

import pytest
import torch
from awake import awake
from torch import Tensor

from grcsf_fast import GRCSF
from grcsf_fast.errors import ArgumentTypeError
from grcsf_fast.ops import cpp
from grcsf_fast.reference import AttentionWeights

pytestmark = pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built")

ATTENTION = {
    "x": (2, 3, 4, 6), "keys": (2, 2, 4, 4, 6), "values": (2, 2, 4, 4, 6), "query_weight": (2, 2, 4, 3),
    "query_bias": (2, 2, 4), "position_bias": (2, 4, 4), "output_weight": (2, 2, 3, 4), "output_bias": (3,),
    "score_weight": (5, 3), "score_context": (2, 5), "score_vector": (5,), "score_bias": (),
}  # fmt: skip
# Name of the kernel, the shapes of its tensors, and how it is called with them.
CALLS = {
    "gcu_forward": (
        {"features": (2, 3, 4, 6), "coarse": (2, 3, 2, 3), "feature_gate": (2, 3), "coarse_gate": (2, 3),
         "strength": (3,)},
        lambda *t: cpp.gcu_forward(*([one] for one in t), 1e-6),
    ),
    "rcu_forward": (ATTENTION, lambda *t: cpp.rcu_forward(*t[:3], AttentionWeights(*t[3:]), 2, 0.0)),
    "normalize_activate": (
        {"x": (2, 3, 4, 6), "weight": (3,), "bias": (3,)}, lambda *t: cpp.normalize_activate(*t, 1e-5, 0.1),
    ),
    "pool": ({"x": (2, 3, 4, 6)}, cpp.pool),
    "attend": ({"queries": (2, 5, 4), "keys": (2, 6, 4), "values": (2, 6, 4)}, lambda *t: cpp.attend(*t, 2)),
    "transform_filters": ({"weight": (4, 4, 3, 3)}, cpp.transform_filters),
    "convolution_weight_grad": (
        {"out_grad": (1, 4, 6, 6), "x": (1, 4, 6, 6)}, lambda *t: cpp.convolution_weight_grad(*t),
    ),
    "upsample": ({"x": (1, 4, 3, 3), "weight": (4, 2, 4), "bias": (2,)}, cpp.upsample),
}  # fmt: skip
ARGUMENTS = [(name, argument) for name, (shapes, _) in CALLS.items() for argument in shapes]


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


WITHOUT = {"freed": freed, "zeros that are not there": lambda tensor: torch._efficientzerotensor(tensor.shape)}


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_kernels_name_what_has_no_memory(name, argument, kind):
    shapes, run = CALLS[name]
    given = {one: torch.randn(shape) for one, shape in shapes.items()}
    given[argument] = WITHOUT[kind](given[argument])
    with pytest.raises(
        ArgumentTypeError, match=rf"^{argument}: expected numbers in the processor's memory, got .* without memory"
    ):
        run(*given.values())


def test_registered_ops_say_so_too():
    with pytest.raises(ArgumentTypeError, match=r"^x: .* without memory, .* of shape \(1, 1, 4, 4\)$"):
        torch.ops.grcsf_fast.pool(freed(torch.ones(1, 1, 4, 4)))


def test_a_product_on_the_device_meta():
    """Beside a bias of the processor, which is what the kernel was asked for."""
    with pytest.raises(ArgumentTypeError, match=r"^x: expected numbers .* got a tensor on meta of shape \(2, 3\)$"):
        cpp.linear_gelu(torch.empty(2, 4, device="meta"), torch.empty(3, 4, device="meta"), torch.zeros(3))


def test_empty_tensors_have_no_memory_and_need_none():
    assert cpp.pool(torch.empty(0, 1, 4, 4)).shape == (0, 1, 2, 2)
    assert cpp.attend(torch.empty(0, 5, 4), torch.empty(0, 6, 4), torch.empty(0, 6, 4), 2).shape == (0, 5, 4)


@pytest.mark.parametrize("ending", ["gcu.0.strength", "encoder.0.1.weight", "rcu.0.query_weight", "rcu.0.score_bias"])
def test_a_network_whose_parameter_was_freed(ending):
    """As between the layers of sharded training; the message names the parameter as the op does."""
    network = awake(GRCSF(2, 1, 1, features=(4, 8), patch_size=4, residual_channels=4, rcu_levels=(0,))).eval()
    freed(dict(network.named_parameters())[ending])
    with torch.no_grad(), pytest.raises(ArgumentTypeError, match="expected numbers in the processor's memory") as found:
        network(torch.randn(1, 1, 16, 16))
    assert str(found.value).startswith(ending.rpartition(".")[2])


@pytest.mark.parametrize("name", CALLS)
def test_negated_views(name):
    """What lies in their memory has the other sign."""
    shapes, run = CALLS[name]
    views = [torch._neg_view(torch.randn(shape)) for shape in shapes.values()]
    found, expected = (run(*given) for given in (views, [one.resolve_neg() for one in views]))
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert torch.equal(one, other)


def test_a_negated_view_in_figures():
    x = torch._neg_view(torch.arange(16.0).view(1, 1, 4, 4))
    assert cpp.pool(x).flatten().tolist() == [0, -2, -8, -10]
    assert torch.equal(cpp.pool(x), torch.ops.grcsf_fast.pool(x))


def flat(found: object) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [one for part in found for one in flat(part)]


def test_the_check_is_by_the_name_of_the_argument():
    with pytest.raises(ArgumentTypeError, match=re.escape("tensor: expected numbers in the processor's memory")):
        cpp.address(torch.empty(2, device="meta"))
