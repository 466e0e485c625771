"""What only the Triton kernels promise; run by test_triton.py in a process under the interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

from grcsf_fast import functional, use_backend
from grcsf_fast.kernels.triton import gcu, rcu
from grcsf_fast.ops import triton as triton_ops


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
    tl.store(out + CHANNELS + channel, gcu._channel_offsets(CHANNELS, stride, WIDE))


def test_offsets_beyond_2_to_the_31(backend):
    """By their arithmetic: 64 channels of 2^26 pixels are 2^32 numbers, which nobody allocates here."""
    out = torch.zeros(128, dtype=torch.int64)
    _offsets_kernel[(1,)](out, 64, 2**26, 64, True)
    assert out.tolist() == 2 * [channel * 2**26 for channel in range(64)]


@pytest.mark.parametrize(("spatial", "wide"), [((2**14, 2**12), True), ((2**11, 2**12), False)])
def test_wide_offsets_where_they_are_needed(backend, spatial, wide):
    features = torch.empty(1, 64, *spatial, device="meta")
    assert gcu._Launch([features], backward=False).blocks[0][-1] is wide
    weights = [torch.empty(2, 2, 16, 64, device="meta"), *[None] * 4, torch.empty(32, 64, device="meta")]
    assert rcu._Launch("forward", features, weights, 8).blocks["WIDE"] is wide


@pytest.mark.parametrize("wide", [False, True])
def test_wide_offsets_change_nothing(backend, monkeypatch, compensation_inputs, attention_inputs, wide):
    """Both kinds of arithmetic on a tensor small enough for either."""
    if wide:
        blocks, sizes = gcu._Launch.__init__, rcu._Launch.__init__

        def widened(self, features, backward):
            blocks(self, features, backward)
            self.blocks = [(*block[:-1], True) for block in self.blocks]

        def widened_attention(self, *arguments):
            sizes(self, *arguments)
            self.blocks["WIDE"] = True

        monkeypatch.setattr(gcu._Launch, "__init__", widened)
        monkeypatch.setattr(rcu._Launch, "__init__", widened_attention)
    for name, inputs, settings in (
        ("global_compensation", compensation_inputs((8, 12)), {}),
        ("patch_cross_attention", attention_inputs((8, 12), 4), {"patch_size": 4}),
    ):
        outputs = getattr(functional, name)(**inputs, **settings)
        with use_backend("reference"):
            expected = getattr(functional, name)(**inputs, **settings)
        for one, other in zip(outputs, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


LAYOUTS = {
    "expanded": lambda tensor: tensor[..., :1].expand_as(tensor),
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_guard_sees_a_gradient_that_would_be_misread(
    backend, monkeypatch, compensation_inputs, attention_inputs, layout
):
    """With the copy left out, the launch fails; with it, it does not."""
    for name, inputs, settings in (
        ("global_compensation", compensation_inputs(), {}),
        ("patch_cross_attention", attention_inputs(), {"patch_size": 2}),
    ):
        inputs = {key: tensor.requires_grad_() for key, tensor in inputs.items()}
        outputs = getattr(functional, name)(**inputs, **settings)
        incoming = [LAYOUTS[layout](torch.randn_like(output)) for output in outputs]
        torch.autograd.grad(outputs, list(inputs.values()), incoming, retain_graph=True)
        with monkeypatch.context() as seeded:
            seeded.setattr(triton_ops, "dense", lambda name, tensor, *rest: tensor)
            with pytest.raises((AssertionError, InterpreterError), match="launched with a tensor of strides"):
                torch.autograd.grad(outputs, list(inputs.values()), incoming)
