"""What the check of a kernel's first use looks at: both layouts, the backward where gradients are wanted, sizes of
large images on a GPU; and that what is wrong elsewhere is no fault of a kernel.

As in test_check.py the C++ kernels stand for Triton's.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from calling import arguments
from kernels_of_triton import stand_in
from torch.utils._python_dispatch import TorchDispatchMode

from grcsf_fast import functional
from grcsf_fast.functional import internal
from grcsf_fast.ops import adapters, check, cpp, examples, plain

pytestmark = pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
POOLING = check.Kernel("triton", "pool_with_mean", "backward", torch.float32, 3, "cpu")
CHANNELS = (("channels", 3),)


@pytest.fixture
def calls(monkeypatch):
    """The kernels that ran since, and whether the channels of their last tensor with some were last."""
    calls = []

    def noted(name):
        def call(*given):
            first = given[0][0] if isinstance(given[0], list) else given[0]
            calls.append((name, first.stride(1) == 1))
            return getattr(cpp, name)(*given)

        return call

    names = [f"{op}_{which}" for op in ("gcu", "rcu", "norm", "pool") for which in check.PASSES]
    stand_in(monkeypatch, {name: noted(name) for name in names})
    return calls


@pytest.fixture(params=["gcu", "rcu", "norm", "pool"])
def used(request):
    """(prefix of the kernels, a call of the op in a layout, with tensors that want gradients or not)."""
    prefix = request.param

    def call(last: bool = False, trained: bool = False):
        if prefix == "gcu":
            inputs, op = (
                request.getfixturevalue("compensation_inputs")(dtype=torch.float32),
                functional.global_compensation,
            )
        elif prefix == "rcu":
            inputs = request.getfixturevalue("attention_inputs")(dtype=torch.float32)
            op = lambda *given: functional.patch_cross_attention(*given, patch_size=2)  # noqa: E731
        else:
            inputs = {"x": torch.rand(2, 3, 4, 6)}
            op = internal.pool_with_mean
            if prefix == "norm":
                inputs |= {"weight": torch.rand(3), "bias": torch.rand(3)}
                op = lambda *given: [internal.normalize_activate(*given)]  # noqa: E731
        given = {
            name: (examples.channels_last(name, one) if last else one).detach().requires_grad_(trained)
            for name, one in inputs.items()
        }
        return op(*(given.values() if prefix in ("norm", "pool") else arguments(given)))

    return prefix, call


def test_each_layout_is_checked_when_it_first_serves(calls, used):
    prefix, call = used
    seen = []
    for last in (False, True, True, False):
        call(last)
        seen.append(calls.copy())
        calls.clear()
    forward = f"{prefix}_forward"
    assert seen == [[(forward, False)] * 2, [(forward, True)] * 2, [(forward, True)], [(forward, False)]]


def test_keys_and_values_are_laid_out_too(calls, monkeypatch):
    layouts = []

    def rcu_forward(x, keys, values, *others):
        layouts.append((x.stride(1), keys.stride(2), values.stride(2)))
        return cpp.rcu_forward(x, keys, values, *others)

    monkeypatch.setattr(adapters._ADAPTERS["triton"], "rcu_forward", rcu_forward)
    kernel = check.Kernel("triton", "patch_cross_attention", "forward", torch.float32, 2, "cpu")
    assert check.failure(kernel, CPU, examples.attention_sizes(3, 2, 2, 16, 24, 8), last=True) is None
    assert layouts == [(1, 1, 1)]


def test_a_kernel_wrong_in_one_layout(calls, used, monkeypatch):
    prefix, call = used
    kernel = getattr(adapters._ADAPTERS["triton"], f"{prefix}_forward")

    def wrong(*given):
        outputs = kernel(*given)
        if calls[-1][1]:
            (outputs[0][0] if prefix == "gcu" else outputs[0]).add_(1e-2)
        return outputs

    monkeypatch.setattr(adapters._ADAPTERS["triton"], f"{prefix}_forward", wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    with pytest.warns(UserWarning, match=r"with channels .*, channels last: it is off by 1\.0e-02"):
        call(last=True)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(1, 3, 3, padding=1)
        self.strength = torch.nn.Parameter(torch.rand(3))

    def forward(self, x):
        features = self.convolution(x)
        gate = features.mean((2, 3)).sigmoid()
        return functional.global_compensation(features, plain.mean_pool(features), gate, gate, self.strength)[0]


@pytest.mark.parametrize("last", [False, True])
def test_a_program_for_any_size_knows_its_layout(calls, last):
    """Where strides are symbols."""
    network = Network().to(memory_format=torch.channels_last if last else torch.contiguous_format)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="eager")
    for size in (4, 6):
        compiled(torch.rand(2, 1, size, size))
    assert {layout for *_, layout in check._passed} == {last}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_backward_is_not_examined_where_none_follows(calls, used, mode):
    """Also of weights that require gradients: who predicts does not wait for it."""
    _, call = used
    with mode():
        call(trained=True)
    assert not any("backward" in name for name, _ in calls)


def test_what_autograd_asks_for_waits_for_no_other_check(calls, monkeypatch):
    """Which may wait for autograd."""

    class Held:
        def __enter__(self):
            raise AssertionError("waited for")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(check, "_lock", Held())
    leaf = torch.zeros(1, requires_grad=True)
    output = leaf.clone()
    output.register_hook(lambda _: check.failure(POOLING, CPU, CHANNELS))
    output.backward()
    assert check._passed == {(POOLING, CHANNELS, False)}
    with pytest.raises(AssertionError, match="waited for"):
        check.failure(POOLING, CPU, CHANNELS, last=True)


def test_what_the_reference_raises_is_raised(calls, monkeypatch):
    """And not held against the kernel."""
    right = plain.pool_with_mean

    def broken(x):
        raise RuntimeError("has no deterministic implementation")

    monkeypatch.setattr(plain, "pool_with_mean", broken)
    with pytest.raises(RuntimeError, match="deterministic"):
        check.failure(POOLING, CPU, CHANNELS)
    with pytest.raises(RuntimeError, match="deterministic"):
        check.examine(POOLING, CPU, CHANNELS)
    assert not check._failed
    monkeypatch.setattr(plain, "pool_with_mean", right)
    assert check.failure(POOLING, CPU, CHANNELS) is None


def test_at_a_kink_either_slope_is_right(monkeypatch):
    def run(backend, tensors):
        moved = tensors["x"] + (1e-8 if backend == "triton" else -1e-8)
        return {"the output": moved.relu()}

    example = examples.Example({"x": torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)}, run)
    monkeypatch.setattr(examples, "made", lambda *_, **__: [example])
    assert check.examine(POOLING, CPU, CHANNELS).passed


def test_a_gpu_is_asked_for_sizes_of_large_images(monkeypatch):
    asked = []

    def made(*given, large):
        asked.append(large)
        return [examples.Example({"x": torch.ones(1)}, lambda backend, tensors: 1 / 0)]

    monkeypatch.setattr(examples, "made", made)
    for device in (CPU, GPU):
        with pytest.raises(ZeroDivisionError):
            check.examine(POOLING, device, CHANNELS)
    assert asked == [False, True]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [3, 40, 512])
def test_sizes_of_large_images(channels, dims):
    """Strides that 16 divides, and a norm of more than 8192 pixels."""
    few, many = examples.made("normalize_activate", "forward", dims, (("channels", channels),), large=True)
    few, many = few.tensors["x"], many.tensors["x"]
    assert few.shape[1] == channels
    assert few[0, 0].numel() < 8192 < 2 * 8192 < many[0, 0].numel()
    assert many.shape[1] % 16 == channels % 16
    pooled = examples.made("pool_with_mean", "forward", dims, (("channels", channels),), large=True)[1].tensors["x"]
    compensated = examples.made(
        "multiscale_compensation", "forward", dims, (("channels", (channels, channels)),), large=True
    )[0].tensors
    half = plain.mean_pool(pooled)
    for one in (many, pooled, half, compensated["features[0]"], compensated["coarse[0]"]):
        assert all(stride % 16 == 0 for stride in one.stride()[:-1])
    assert compensated["coarse[1]"].stride(-2) % 16


@pytest.mark.parametrize("shape", [(2, 3, 4, 6, 8), (1, 2, 5, 7, 9), (1, 1, 2, 3, 2)])
def test_the_mean_that_a_gpu_takes_where_all_has_to_be_deterministic(shape):
    """Without PyTorch's pooling of volumes, whose backward raises there. Seen on a device without numbers."""
    ops = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            ops.append(str(op))
            return op(*args, **(kwargs or {}))

    torch.use_deterministic_algorithms(True)
    try:
        with Noting():
            x = torch.zeros(shape, device="meta", requires_grad=True)
            pooled = plain.mean_pool(x)
            pooled.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert pooled.shape == (*shape[:2], *(size // 2 for size in shape[2:]))
    assert not any("pool" in op for op in ops)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6, 8), (1, 2, 5, 7, 9), (1, 1, 2, 3, 2)])
def test_that_mean_is_the_same(shape, dtype):
    x = torch.rand(shape, dtype=torch.float64).to(dtype)
    x[0, 0, 0, 0, 0] = torch.nan
    results = []
    for pool in (plain.mean_of_windows, lambda one: F.avg_pool3d(one.double(), 2).to(dtype)):
        leaf = x.clone().requires_grad_()
        pooled = pool(leaf)
        results.append((pooled, torch.autograd.grad(pooled.nan_to_num().square().sum(), leaf)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
