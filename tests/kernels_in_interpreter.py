"""What only the Triton kernels promise; run by test_triton.py in a process under the interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

from grcsf_fast import functional, use_backend
from grcsf_fast.kernels.triton import gcu, rcu, tuning
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
    assert gcu._Launch([features], gcu._entry([features], backward=False)).blocks[0][-1] is wide
    weights = [torch.empty(2, 2, 16, 64, device="meta"), *[None] * 4, torch.empty(32, 64, device="meta")]
    block = rcu.block_of("forward", 64, 8, 2, 4, 32, "sm_90")
    assert rcu._Launch(features, weights, 8, block).blocks["WIDE"] is wide


@pytest.mark.parametrize("wide", [False, True])
def test_wide_offsets_change_nothing(backend, monkeypatch, compensation_inputs, attention_inputs, wide):
    """Both kinds of arithmetic on a tensor small enough for either."""
    if wide:
        blocks, sizes = gcu._Launch.__init__, rcu._Launch.__init__

        def widened(self, *arguments):
            blocks(self, *arguments)
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


def results(name, inputs, settings):
    """Outputs and all gradients."""
    inputs = {key: tensor.detach().requires_grad_() for key, tensor in inputs.items()}
    outputs = getattr(functional, name)(**inputs, **settings)
    incoming = [torch.linspace(-1, 1, one.numel()).reshape(one.shape) for one in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(inputs.values()), incoming)]


def check_against_the_reference(name, inputs, settings):
    found = results(name, inputs, settings)
    with use_backend("reference"):
        expected = results(name, inputs, settings)
    for one, other in zip(found, expected, strict=True):
        size = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one / size, other / size, atol=1e-5, rtol=1e-5)


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
    entries = gcu._entry([torch.empty(2, 3, 8, 12)], backward=False)
    assert gcu._neighbours(entries)[-1] in tuning._kept.values()


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
