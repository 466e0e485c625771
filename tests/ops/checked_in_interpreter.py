"""Triton's own kernels under the check of their first use; run by test_check.py in a process under the interpreter."""

from __future__ import annotations

import warnings

import pytest
import torch
from calling import arguments

from grcsf_fast import BackendUnavailableError, functional, reference, use_backend
from grcsf_fast.cli import main
from grcsf_fast.kernels.triton import grouped, norm, patches
from grcsf_fast.ops import backends, check, examples, triton


@pytest.fixture(autouse=True)
def _nothing_checked(monkeypatch):
    """As in a new process on a machine where ``auto`` takes Triton."""
    without_cpp = {name: one for name, one in backends._BACKENDS.items() if name != "cpp"}
    monkeypatch.setattr(backends, "_BACKENDS", without_cpp)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(check, "_passed", set())
    monkeypatch.setattr(check, "_failed", {})
    monkeypatch.setenv("GRCSF_CHECK", "1")


CASES = {
    "gcu_forward": ("compensation_inputs", "global_compensation", {"spatial": (4, 6)}, {}),
    "rcu_forward": ("attention_inputs", "patch_cross_attention", {"spatial": (4, 4)}, {"patch_size": 4}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wrong", [False, True])
def test_first_use(request, monkeypatch, name, wrong):
    maker, op, sizes, settings = CASES[name]
    inputs = request.getfixturevalue(maker)(**sizes, **settings, batch=1, dtype=torch.float32)
    kernel, calls = getattr(triton, name), []

    def called(*arguments):
        calls.append(name)
        outputs = kernel(*arguments)
        (outputs[0][0] if name == "gcu_forward" else outputs[0]).add_(1e-2 if wrong else 0)
        return outputs

    monkeypatch.setattr(triton, name, called)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = getattr(functional, op)(*arguments(inputs), **settings)
    expected = getattr(reference, op)(*arguments(inputs), **settings)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(calls) == (1 if wrong else 3)
    assert [("interpreter" in str(one.message), "'reference' serves" in str(one.message)) for one in caught] == [
        (True, True)
    ] * wrong
    if wrong:
        with use_backend("triton"), pytest.raises(BackendUnavailableError, match="the check of its first use"):
            getattr(functional, op)(*arguments(inputs), **settings)


def test_backward(compensation_inputs):
    inputs = {name: one.requires_grad_() for name, one in compensation_inputs((4, 6), 1, 3, torch.float32).items()}
    functional.global_compensation(**inputs)[0].square().sum().backward()
    assert {kernel.which for kernel, *_ in check._passed} == {"forward", "backward"}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("op", ["normalize_activate", "pool_with_mean"])
def test_sizes_of_large_images(monkeypatch, op, dims, last):
    """That the kernels are right on them too; and the norm has more programs there."""
    made, launch, programs = examples.made, norm._launch, []

    def launched(*given):
        found = launch(*given)
        programs.append(found[0][0])
        return found

    monkeypatch.setattr(norm, "_launch", launched)
    monkeypatch.setattr(examples, "made", lambda *given, large: made(*given, large=True))
    for which in check.PASSES:
        kernel = check.Kernel("triton", op, which, torch.float32, dims, "interpreter")
        result = check.examine(kernel, torch.device("cpu"), (("channels", 3),), last)
        assert result.passed, result
    if op == "normalize_activate":
        assert max(programs) >= 3 * min(programs)


@pytest.mark.parametrize("last", [False, True])
def test_a_program_of_the_backward_has_several_patches(monkeypatch, last):
    plan, plans = patches.Launch.plan_backward, []

    def planned(launch, device):
        plans.append((plan(launch, device).programs, launch.patches))
        return plan(launch, device)

    monkeypatch.setattr(patches.Launch, "plan_backward", planned)
    kernel = check.Kernel("triton", "patch_cross_attention", "backward", torch.float32, 2, "interpreter")
    sizes = examples.attention_sizes(3, 1, 1, 2, 5, 4)
    assert check.examine(kernel, torch.device("cpu"), sizes, last).passed
    ((programs, count),) = plans
    assert 1 < programs <= count / 3
    assert not grouped.crowded.get()


def test_info_lists_them(monkeypatch, capsys):
    kinds = [("multiscale_compensation", "forward", 2), ("patch_cross_attention", "forward", 3)]
    monkeypatch.setattr(examples, "KINDS", {"triton": kinds, "cpp": []})
    monkeypatch.setattr(examples, "CHANNELS", (3, 20))
    assert main(["info", "--check"]) == 0
    output = capsys.readouterr().out
    assert output.endswith("6 kernels checked, 0 failed\n")
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"multiscale_compensation forward ({dtype}, 2 spatial axes, interpreter)" in output
