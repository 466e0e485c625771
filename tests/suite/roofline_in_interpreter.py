"""What the predicted times count; run by test_roofline.py in a process that imports Triton as its interpreter."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline, roofline_counts
from benchmarks.peaks import Peak
from benchmarks.roofline_counts import Item, counted_forward, counted_step
from grcsf_fast import GRCSF
from grcsf_fast.functional import internal

DTYPES = (torch.float32, torch.bfloat16)
LAUNCHES = roofline_counts.launches()  # before a fixture fills what is empty
PEAK = Peak(bandwidth=100.0, half=8.0, tf32=6.0, vector=1.0)


def network() -> GRCSF:
    return GRCSF(2, 1, 1, features=(4, 8, 8), patch_size=4, residual_channels=4, rcu_levels=(0, 1))


def total(items):
    return [sum(getattr(one, name) for one in items) for name in ("bytes", "operations", "launches")]


def counted(call, *tensors):
    with torch.no_grad(), roofline_counts._Counter() as counter:
        call(*tensors)
    return counter.items


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forward_taken_apart_is_the_one_that_the_reference_runs(dtype):
    found = counted_forward(network, 2, (30, 32), dtype)
    direct = counted_forward(network, 2, (30, 32), dtype, "reference")
    assert total(found.reference) == total(direct.ours)
    assert {one.kind for one in found.ours} >= set(roofline_counts.OURS)
    assert total(found.ours)[0] < total(found.reference)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_step_too_but_for_gradients_that_it_adds(dtype):
    found = counted_step(network, 2, (32, 32), dtype)
    direct = counted_step(network, 2, (32, 32), dtype, "reference")
    for one, other in zip(total(found.reference), total(direct.ours), strict=True):
        assert one == pytest.approx(other, rel=0.02)
    others = [[one for one in items if one.kind not in roofline_counts.OURS] for items in found]
    assert total(others[0]) == total(others[1])


def test_twice_the_images_are_twice_the_large_tensors():
    """From two on: a batch of one has fewer copies."""
    one, two = (counted_forward(network, batch, (64, 64), torch.float32) for batch in (2, 4))
    for side in (0, 1):
        (bytes_1, operations_1, launches_1), (bytes_2, operations_2, launches_2) = total(one[side]), total(two[side])
        assert launches_1 == launches_2
        assert bytes_2 == pytest.approx(2 * bytes_1, rel=0.02)
        assert operations_2 == pytest.approx(2 * operations_1, rel=0.02)


def test_operations_of_pytorch():
    x = torch.zeros(2, 3, 4, 5)  # 480 bytes
    assert [one.bytes for one in counted(torch.relu, x)] == [960]
    assert [one.bytes for one in counted(torch.relu_, x)] == [960]
    assert [one.bytes for one in counted(torch.zero_, x)] == [480]
    assert [one.bytes for one in counted(lambda one: one.bfloat16(), x)] == [480 + 240]
    assert counted(lambda one: one.transpose(1, 2).detach(), x) == []
    assert counted(torch.ops.aten.empty_like, x) == []
    assert [one.bytes for one in counted(lambda one: one + one[:1].expand_as(one), x)] == [480 + 480]


def test_convolutions_and_their_biases():
    x, weight, bias = torch.zeros(2, 4, 6, 6), torch.zeros(8, 4, 3, 3), torch.zeros(8)
    out = 4 * 2 * 8 * 6 * 6
    convolved, biased = counted(lambda *given: torch.conv2d(*given, padding=1), x, weight, bias)
    assert convolved == Item("convolutions", x.nbytes + weight.nbytes + out, 2 * 2 * 36 * 8 * 36, "tf32", 1)
    assert biased == Item("biases of convolutions", 2 * out, out / 4, "float32", 1)
    assert len(counted(lambda *given: torch.conv2d(*given, padding=1), x, weight)) == 1
    outputs = torch.conv2d(x, weight.requires_grad_(), bias.requires_grad_(), padding=1)
    grad = torch.zeros_like(outputs)
    with roofline_counts._Counter() as counter:
        torch.autograd.grad(outputs, (weight, bias), grad)
    assert [(one.kind, one.operations) for one in counter.items] == [
        ("convolutions", convolved.operations), ("biases of convolutions", out / 4),
    ]  # fmt: skip


def test_our_norm_reads_twice():
    x, weight, bias = torch.zeros(2, 4, 6, 6), torch.zeros(4), torch.zeros(4)
    with roofline_counts._fake("triton"), roofline_counts._Counter() as counter:
        internal.normalize_activate(x, weight, bias)
    (found,) = counter.own
    small = 2 * weight.nbytes + 2 * 2 * 4 * 4
    assert (found.bytes - small, found.launches) == (3 * x.nbytes, 2)


def test_launches_are_those_of_the_traffic_report():
    """And, in the backward of op 2, a product of PyTorch's."""
    assert LAUNCHES["op 1", False] == LAUNCHES["op 2", False] == 1
    assert (LAUNCHES["op 1", True], LAUNCHES["op 2", True]) == (3, 2 + 1)
    assert LAUNCHES[roofline_counts.OP_2_APART, True] == 3 + 1


def test_seconds():
    work = ((200, 1, "float32"), (1, 16, "half precision"), (1, 6, "three of tf32"))
    items = [Item("a", *one, launches=1) for one in work]
    assert roofline.seconds(items, PEAK) == 2 + 2 + 3
    assert roofline.seconds([], PEAK) == 0


def test_the_page(tmp_path, monkeypatch):
    small = roofline.Network("a network", network, (1, (16, 16)), (1, (16, 16)))
    monkeypatch.setattr(roofline, "networks", lambda: [small])
    roofline.main(["-o", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert text.count("| a network, ") == 4
    assert "## a network, training step, 1x16x16, bfloat16" in text
    assert "](page.png)" in text
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_default_networks():
    trained, two, three = roofline.networks()
    assert (trained.forward, trained.step) == ((16, (98, 116)), (8, (96, 112)))
    assert trained.build().seen_channels == 3
    assert [one.build().spatial_dims for one in (two, three)] == [2, 3]
