"""The Triton kernels on a GPU at the sizes that networks use, and under what PyTorch does there; ``make gpu`` runs it.

Everything is compared with the reference in float64 on the same GPU. Without one they are skipped: the interpreter's
tests (test_triton.py) say what can be said then, which is not all: a kernel that was right there read memory that was
not its own on an H200.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from calling import arguments
from heads import tiny_bundle
from tolerances import tolerance

from benchmarks.ops import SHAPES, make_inputs, patch_of
from grcsf_fast import GRCSF, functional, reference, save_bundle, use_backend
from grcsf_fast.functional import internal
from grcsf_fast.ops import plain, triton

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or triton.problem() is not None, reason="no GPU that the kernels run on"
)
OPS = ("global_compensation", "patch_cross_attention")
# The default networks' levels, in 2-D and 3-D, and sizes that are no powers of two.
SIZES = [
    *SHAPES, (2, 512, (16, 16)), (1, 256, (12, 12, 12)), (1, 128, (24, 24, 24)), (3, 17, (16, 40)), (2, 40, (8, 8, 12)),
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _float32_convolutions(monkeypatch):
    """Not in TF32, whose rounding would count as the kernels' own."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def sized(op, shape):
    """Of op 2 images are whole patches."""
    batch, channels, spatial = shape
    edge = patch_of(spatial) if op == OPS[1] else 1
    return batch, channels, tuple(-(-size // edge) * edge for size in spatial)


def results(op, inputs, settings):
    """Outputs and all gradients."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = getattr(functional, op)(*arguments(leaves), **settings)
    # Small enough that gradients which are sums over all pixels fit into float16.
    incoming = [
        torch.empty_like(one).copy_(torch.linspace(-1, 1, one.numel(), device=one.device).reshape(one.shape) / 16)
        for one in outputs
    ]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), incoming)]


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_right_and_the_same_in_every_run(op, shape, dtype, layout):
    batch, channels, spatial = sized(op, shape)
    inputs = {name: one.cuda().to(dtype) for name, one in make_inputs(op, batch, channels, spatial, dtype).items()}
    if layout == "channels last":
        last = torch.channels_last if len(spatial) == 2 else torch.channels_last_3d
        for name in ("x", "features", "coarse"):
            if name in inputs:
                inputs[name] = inputs[name].contiguous(memory_format=last)
    settings = {} if op == OPS[0] else {"patch_size": patch_of(spatial)}
    with use_backend("triton"):
        found = results(op, inputs, settings)
        again = [results(op, inputs, settings) for _ in range(3)]
    with use_backend("reference"):
        expected = results(op, {name: one.double() for name, one in inputs.items()}, settings)
    assert found[0].stride() == next(iter(inputs.values())).stride()
    for one, other in zip(found, expected, strict=True):
        size = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one.double() / size, other / size, **tolerance(one.dtype))
    for others in again:
        assert all(map(torch.equal, found, others))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("op", ["normalize_activate", "pool_with_mean"])
def test_norm_and_pooling_too(op, shape, dtype, layout):
    batch, channels, spatial = shape
    x = torch.randn(batch, channels, *spatial, device="cuda").mul(3).add(1).to(dtype)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last if len(spatial) == 2 else torch.channels_last_3d)
    tensors = [x, *([torch.rand(channels, device="cuda") for _ in range(2)] if op == "normalize_activate" else [])]

    def run(ops, tensors):
        leaves = [one.detach().requires_grad_() for one in tensors]
        outputs = getattr(ops, op)(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        incoming = [
            torch.linspace(-1, 1, one.numel(), device="cuda").reshape(one.shape).to(dtype).to(one.dtype)
            for one in outputs
        ]
        return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)]

    with use_backend("triton"):
        found, again = run(internal, tensors), run(internal, tensors)
    assert all(map(torch.equal, found, again))
    assert found[-len(tensors)].stride() == x.stride()
    expected = run(plain, [one.double() for one in tensors])
    if op == "normalize_activate":  # at the kink either slope is right
        kink, gradient = expected[0].abs() < 1e-5, len(found) - len(tensors)
        assert kink.float().mean() < 1e-2
        found[gradient] = found[gradient].masked_fill(kink, 0)
        expected[gradient] = expected[gradient].masked_fill(kink, 0)
    for one, other in zip(found, expected, strict=True):
        size = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one.double() / size, other / size, **tolerance(one.dtype))


def network(dims, **arguments):
    torch.manual_seed(0)
    features = {} if dims == 2 else {"features": (32, 64, 128, 256), "patch_size": 4}
    model = GRCSF(dims, 1, 1, **features, **arguments).cuda()
    with torch.no_grad():  # the units begin as the identity, which would hide them
        for unit in model.rcu.values():
            unit.output_weight.normal_(std=0.1)
        for unit in model.gcu:
            unit.strength.normal_(std=0.1)
    edge = (160, 160) if dims == 2 else (64, 64, 64)
    return model, torch.randn(2, 1, *edge, device="cuda"), torch.randn(2, 2, *edge, device="cuda")


def step(model, image, maps, dtype=torch.float32):
    """Loss and gradients of a training step."""
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = model(image, maps).float().square().mean()
    loss.backward()
    return [loss.detach(), *(one.grad.clone() for one in model.parameters() if one.grad is not None)]


def close(found, expected, share):
    """Of all numbers together: single gradients of a deep network are sums that cancel."""
    found, expected = (torch.cat([one.double().flatten() for one in numbers]) for numbers in (found, expected))
    assert float((found - expected).norm() / expected.norm()) < share


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_training_step(dims, dtype, share):
    model, image, maps = network(dims)
    with use_backend("triton"):
        found = step(model, image, maps, dtype)
        assert all(map(torch.equal, found[:1], step(model, image, maps, dtype)[:1]))
    with use_backend("reference"):
        close(found, step(model, image, maps, dtype), share)


def test_a_scaled_step_in_half_precision():
    model, image, maps = network(2)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with use_backend("triton"), torch.autocast("cuda", torch.float16):
        loss = model(image, maps).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 256.0
    with use_backend("reference"):
        close(found, step(model, image, maps)[1:], 5e-2)


@torch.no_grad()
def test_a_captured_graph_replays():
    model, image, maps = network(2)
    model.eval()
    with use_backend("triton"):
        expected = model(image, maps)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(image, maps)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(image, maps)
    graph.replay()
    assert torch.equal(captured, expected)
    image.copy_(image.flip(-1))
    graph.replay()
    with use_backend("triton"):
        assert torch.equal(captured, model(image, maps))


@torch.no_grad()
def test_a_side_stream():
    model, image, maps = network(2)
    with use_backend("triton"):
        expected = model(image, maps)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = model(image, maps)
        stream.synchronize()
    assert torch.equal(found, expected)


def test_compiled():
    model, image, maps = network(2)
    with use_backend("triton"):
        expected = step(model, image, maps)
        close(step(torch.compile(model), image, maps), expected, 2e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@torch.no_grad()
def test_a_second_gpu():
    model, image, maps = network(2)
    with use_backend("triton"):
        expected = model(image, maps)
        found = model.to("cuda:1")(image.to("cuda:1"), maps.to("cuda:1"))
    torch.testing.assert_close(found.cpu(), expected.cpu())


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_channels_last_goes_through_the_network(dims):
    model, image, maps = network(dims)
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    with use_backend("triton"):
        expected = model(image, maps)
        torch.testing.assert_close(model.to(memory_format=last)(image, maps), expected, atol=2e-3, rtol=2e-3)


def test_after_a_warm_up_nothing_is_compiled(tmp_path, monkeypatch):
    """In processes of their own: what a process has launched it does not compile again."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    bundle = save_bundle(tiny_bundle(), tmp_path / "bundle")
    program = "import sys; from grcsf_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    said = [
        subprocess.run(
            [sys.executable, "-c", program, "info", "--warm-up", "-m", str(bundle)],
            capture_output=True, text=True, check=True,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    counts = [re.search(r"(\d+) kernels compiled, (\d+) were there already", one).groups() for one in said]
    (compiled, found), (again, found_again) = (map(int, pair) for pair in counts)
    assert compiled > 0
    assert (again, found_again) == (0, compiled + found)


@torch.no_grad()
def test_optimized_for_inference():
    model, image, maps = network(2)
    with use_backend("triton"):
        optimized = model.optimized_for_inference()
        assert optimized.encoder[1][0].bias is None
        torch.testing.assert_close(optimized(image, maps), model(image, maps), atol=1e-4, rtol=1e-4)


def test_the_reference_is_the_reference():
    """That what the kernels are compared with is the same on this GPU as on the processor."""
    inputs = make_inputs(OPS[1], 1, 17, (8, 16), torch.float64)
    host = reference.patch_cross_attention(*arguments({name: one.double() for name, one in inputs.items()}), 8)
    there = reference.patch_cross_attention(*arguments({name: one.double().cuda() for name, one in inputs.items()}), 8)
    for one, other in zip(there, host, strict=True):
        torch.testing.assert_close(one.cpu(), other)
