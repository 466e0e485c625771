"""The check of a kernel's first use: what it finds, what then serves, and that nobody else notices it.

The C++ kernels, which are right and run here, stand for Triton's, with a fault where a test wants one. That Triton's
own are checked is shown under its interpreter (checked_in_interpreter.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from calling import arguments
from kernels_of_triton import stand_in
from tolerances import tolerance
from torch.utils._python_dispatch import TorchDispatchMode

from grcsf_fast import BackendUnavailableError, functional, reference, use_backend
from grcsf_fast.cli import main
from grcsf_fast.ops import check, cpp, examples, plain

pytestmark = [
    pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built"),
]

KERNELS = ("gcu_forward", "gcu_backward", "rcu_forward", "rcu_backward")
OPS = {
    "global_compensation": ("compensation_inputs", {}, "gcu"),
    "patch_cross_attention": ("attention_inputs", {"patch_size": 2}, "rcu"),
}


@pytest.fixture
def kernels(monkeypatch):
    """What "triton" runs, preferred to everything else on the CPU; nothing checked so far."""
    return stand_in(monkeypatch, {name: getattr(cpp, name) for name in KERNELS})


def counted(kernels, name):
    """The sizes of the large tensors of each call of a kernel, from now on."""
    calls, kernel = [], getattr(kernels, name)

    def call(*arguments):
        first = arguments[0]
        calls.append(tuple((first[0] if isinstance(first, (list, tuple)) else first).shape))
        return kernel(*arguments)

    setattr(kernels, name, call)
    return calls


def off(output, by):
    """Nested results with something added to the first tensor."""
    if isinstance(output, torch.Tensor):
        return output + by
    return type(output)([off(output[0], by), *output[1:]])


def spoil(kernels, name, by=1e-2, when=lambda first: True):
    """The kernel's first result is off, where ``when`` says so of the first tensor."""
    kernel = getattr(kernels, name)

    def spoiled(*arguments):
        output = kernel(*arguments)
        first = arguments[0][0] if isinstance(arguments[0], (list, tuple)) else arguments[0]
        return off(output, by) if when(first) else output

    setattr(kernels, name, spoiled)


def gradients(op, inputs, settings):
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = op(*arguments(inputs), **settings)
    return outputs, torch.autograd.grad(sum(one.square().sum() for one in outputs), list(inputs.values()))


@pytest.fixture(params=OPS)
def case(request):
    """(op of functional, op of reference, maker of inputs, settings, its kernels' prefix)."""
    maker, settings, prefix = OPS[request.param]

    def make(**sizes):
        return request.getfixturevalue(maker)(**{"dtype": torch.float32, **sizes})

    return getattr(functional, request.param), getattr(reference, request.param), make, settings, prefix


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance(torch.float32))


def test_a_right_kernel_is_run_once_more_and_serves(kernels, case):
    op, _, make, settings, prefix = case
    calls = counted(kernels, f"{prefix}_forward")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with use_backend("triton"):
            op(*arguments(make()), **settings)
        first = len(calls)
        op(*arguments(make()), **settings)
        op(*arguments(make(batch=3, spatial=(8, 6))), **settings)
    assert (first, len(calls)) == (2, 4)
    assert calls[0][:2] == (2, 3)
    op(*arguments(make(channels=5)), **settings)
    assert calls[4][1] == calls[5][1] == 5


@pytest.mark.parametrize("fault", ["off", "nan", "raises"])
def test_a_wrong_forward_is_out_of_use(kernels, case, fault):
    op, expected, make, settings, prefix = case
    if fault == "raises":

        def broken(*arguments):
            raise ValueError("no such instruction")

        setattr(kernels, f"{prefix}_forward", broken)
    else:
        spoil(kernels, f"{prefix}_forward", 1e-2 if fault == "off" else torch.nan)
    inputs = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for sizes in ({}, {"channels": 7}):
            inputs = make(**sizes)
            assert_equal(op(*arguments(inputs), **settings), expected(*arguments(inputs), **settings))
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    for part in (expected.__name__.removeprefix("global_"), "forward", "float32", "2 spatial axes", "channels"):
        assert part in text
    assert "no such instruction" in text if fault == "raises" else "1.0e-02" in text or "inf" in text
    assert "grcsf-fast info --check" in text
    assert text.endswith("'reference' serves")
    with use_backend("triton"), pytest.raises(BackendUnavailableError) as error:
        op(*arguments(inputs), **settings)
    assert str(error.value) == text.removesuffix("; 'reference' serves")


def test_a_backward_is_checked_where_gradients_are_wanted(kernels, case):
    op, expected, make, settings, prefix = case
    spoil(kernels, f"{prefix}_backward")
    calls = counted(kernels, f"{prefix}_forward")
    inputs = make()
    with torch.no_grad():
        op(*arguments(inputs), **settings)
    assert len(calls) == 2
    with pytest.warns(UserWarning, match=r"backward .*the gradient of (features|x)"):
        outputs, found = gradients(op, inputs, settings)
    expected_outputs, expected_gradients = gradients(expected, inputs, settings)
    assert_equal(outputs, expected_outputs)
    assert_equal(found, expected_gradients)
    with torch.no_grad():
        op(*arguments(inputs), **settings)
    assert len(calls) == 4  # one in the check of the backward, one in this forward, which still has its kernel
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match="backward"):
        gradients(op, inputs, settings)


def test_a_kernel_wrong_in_one_dtype(kernels, case):
    op, expected, make, settings, prefix = case
    spoil(kernels, f"{prefix}_forward", when=lambda first: first.dtype == torch.bfloat16)
    calls = counted(kernels, f"{prefix}_forward")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op(*arguments(make()), **settings)
    assert len(calls) == 2
    inputs = make(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="bfloat16"):
        found = op(*arguments(inputs), **settings)
    assert_equal(found, expected(*arguments(inputs), **settings))


def test_a_kernel_wrong_from_a_number_of_channels_on(kernels, case):
    """Trusted where it was right, and nowhere once it was wrong."""
    op, expected, make, settings, prefix = case
    spoil(kernels, f"{prefix}_forward", when=lambda first: first.shape[1] >= 256)
    calls = counted(kernels, f"{prefix}_forward")
    op(*arguments(make()), **settings)
    assert len(calls) == 2
    inputs = make(channels=257)
    with pytest.warns(UserWarning, match="257"):
        found = op(*arguments(inputs), **settings)
    assert_equal(found, expected(*arguments(inputs), **settings))
    inputs = make()
    assert_equal(op(*arguments(inputs), **settings), expected(*arguments(inputs), **settings))
    assert len(calls) == 3


def test_a_kernel_wrong_in_three_dimensions(kernels, case):
    op, expected, make, settings, prefix = case
    spoil(kernels, f"{prefix}_forward", when=lambda first: first.dim() == 5)
    op(*arguments(make()), **settings)
    inputs = make(spatial=(2, 4, 6))
    with pytest.warns(UserWarning, match="3 spatial axes"):
        found = op(*arguments(inputs), **settings)
    assert_equal(found, expected(*arguments(inputs), **settings))


def test_patches_above_the_threshold_and_below_are_both_checked(kernels, attention_inputs):
    """A kernel that skips nothing, or everything."""
    for threshold in (0.0, 1.0):
        kernels.rcu_forward = lambda *arguments, at=threshold: cpp.rcu_forward(*arguments[:-1], at)
        check._failed.clear()
        inputs = attention_inputs(dtype=torch.float32)
        with use_backend("triton"), pytest.raises(BackendUnavailableError, match=r"off by .* in out"):
            functional.patch_cross_attention(*arguments(inputs), patch_size=2)


def test_an_empty_variable_does_not_switch_off(kernels, case, monkeypatch):
    op, expected, make, settings, prefix = case
    spoil(kernels, f"{prefix}_forward", by=1.0)
    monkeypatch.setenv("GRCSF_CHECK", "")
    with pytest.warns(UserWarning, match="off by"):
        found = op(*arguments(inputs := make()), **settings)[0]
    torch.testing.assert_close(found, expected(*arguments(inputs), **settings)[0])


def test_switched_off(kernels, case, monkeypatch):
    op, expected, make, settings, prefix = case
    spoil(kernels, f"{prefix}_forward", by=1.0)
    monkeypatch.setenv("GRCSF_CHECK", "0")
    inputs = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = op(*arguments(inputs), **settings)[0]
    assert (found - expected(*arguments(inputs), **settings)[0] - 1).abs().max() < 1e-4


class Refusing(TorchDispatchMode):
    """As the mode of a checkpoint that keeps some results: what it sees has to be of the checkpoint."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        raise AssertionError(op)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda t: None),
        lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: Refusing(),
    ],
)
@pytest.mark.parametrize("by_autograd", [False, True])
def test_the_check_knows_no_modes_of_its_caller(kernels, mode, by_autograd):
    device = torch.device("cpu")
    kernel = check.Kernel("triton", "multiscale_compensation", "backward", torch.float32, 2, "cpu")

    def ask(_):
        with mode():
            assert check.failure(kernel, device, examples.compensation_sizes([3])) is None

    if by_autograd:
        leaf = torch.zeros(1, requires_grad=True)
        output = leaf.clone()
        output.register_hook(ask)
        output.backward()
    else:
        ask(None)
    assert kernel in {passed for passed, _, _ in check._passed}


def test_the_check_leaves_no_trace(kernels, case):
    op, _, make, settings, _ = case
    inputs = make()
    torch.set_default_dtype(torch.float64)
    state = torch.get_rng_state()
    try:
        gradients(op, inputs, settings)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(check._passed) == 2
    assert not check._failed


def test_threads_wait_for_one_check(kernels, case):
    op, expected, make, settings, prefix = case
    calls = counted(kernels, f"{prefix}_forward")
    inputs, barrier, found = make(), threading.Barrier(4), []

    def first_use():
        barrier.wait()
        found.append(op(*arguments(inputs), **settings))

    threads = [threading.Thread(target=first_use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 5
    assert len(found) == 4
    for one in found:
        assert_close(one, expected(*arguments(inputs), **settings))


@pytest.mark.parametrize("wrong", [False, True])
def test_compiled_whole(kernels, case, wrong):
    """Decided while the program is made, by real numbers."""
    op, expected, make, settings, prefix = case
    if wrong:
        spoil(kernels, f"{prefix}_backward")
    calls = counted(kernels, f"{prefix}_forward")
    inputs = make()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: op(*given, **settings), fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs, found = gradients(compiled, inputs, {})
    expected_outputs, expected_gradients = gradients(expected, inputs, settings)
    assert_close(outputs, expected_outputs)
    assert_close(found, expected_gradients)
    assert len(calls) == (2 if wrong else 3)


def test_fake_tensors(kernels, case):
    """The check is of real numbers where the call is not."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    op, expected, make, settings, _ = case
    inputs = make()
    with FakeTensorMode() as mode:
        outputs = op(*arguments({name: mode.from_tensor(one) for name, one in inputs.items()}), **settings)
    for one, other in zip(outputs, expected(*arguments(inputs), **settings), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert len(check._passed) == 1


def test_nothing_is_checked_while_a_graph_is_captured(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kernel = check.Kernel("triton", "multiscale_compensation", "forward", torch.float32, 2, "cpu")
    sizes = examples.compensation_sizes([3])
    with pytest.raises(RuntimeError, match=r"captured; call the network once before.*GRCSF_CHECK=0"):
        check.failure(kernel, torch.device("cuda", 0), sizes)
    assert check.failure(kernel, torch.device("cpu"), sizes) is None
    assert check.failure(kernel, torch.device("cuda", 0), sizes) is None


def test_no_memory_says_nothing_about_a_kernel(kernels, case):
    op, expected, make, settings, prefix = case
    kernel = getattr(kernels, f"{prefix}_forward")

    def hungry(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    setattr(kernels, f"{prefix}_forward", hungry)
    inputs = make()
    with pytest.raises(torch.OutOfMemoryError):
        op(*arguments(inputs), **settings)
    setattr(kernels, f"{prefix}_forward", kernel)
    with use_backend("triton"):
        assert_close(op(*arguments(inputs), **settings), expected(*arguments(inputs), **settings))


def test_info_checks_every_kernel_there_is(monkeypatch, capsys):
    monkeypatch.setattr(examples, "CHANNELS", (3, 20))
    assert main(["info", "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("cpp ")]
    assert len(rows) == (8 + 5 * 2 + 2 + 6) * 3
    assert all(row.split()[1] == "ok" for row in rows)
    assert lines[-1] == f"{len(rows)} kernels checked, 0 failed"


@pytest.mark.parametrize("fault", ["off", "raises"])
def test_info_names_the_kernel_that_fails(monkeypatch, capsys, fault):
    monkeypatch.setattr(examples, "CHANNELS", (3,))
    monkeypatch.setattr(examples, "KINDS", {"cpp": [("pool", "forward", 2), ("attend", "forward", 0)], "triton": []})

    def wrong(x):
        if fault == "raises":
            raise ValueError("no such instruction")
        return plain.pool(x) + 0.1

    monkeypatch.setattr(cpp, "pool", wrong)
    assert main(["info", "--check"]) == 1
    output = capsys.readouterr().out
    failed = [line for line in output.splitlines() if "FAILED" in line]
    assert len(failed) == 3
    assert all("pool forward" in line for line in failed)
    assert ("no such instruction" if fault == "raises" else "1.0e-01") in failed[0]
    assert output.endswith("6 kernels checked, 3 failed\n")


@pytest.mark.slow
def test_tritons_own_kernels():
    """In its interpreter, which is chosen when triton is imported: in a process of its own."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests/helpers")]),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    tests = ["-p", "interpreted", "-p", "no:cacheprovider", "tests/ops/checked_in_interpreter.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
