"""The check of a kernel's first use where autograd has a thread for the device, as for each GPU (CPU tensors have
none): a device of Python stands for it, in a process of its own (checked_on_a_device.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from grcsf_fast.ops import cpp

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built"),
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch has no devices of Python",
    ),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[list[list], list[str]]]:
    """Of each case the calls (kernel, thread, whether a program has several patches), and what failed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRCSF_CHECK": "1"}
    for variable in ("GRCSF_BACKEND", "TRITON_INTERPRET"):
        environment.pop(variable, None)
    done = subprocess.run(
        [sys.executable, "tests/ops/checked_on_a_device.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,  # where a thread waits for itself
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return {name: (calls, failed) for name, calls, failed in map(json.loads, done.stdout.splitlines())}


def test_what_autograd_asks_for_is_checked_in_its_thread(cases):
    """A thread of its own would wait for autograd's, which would wait for it."""
    calls, failed = cases["recomputed"]
    assert not failed
    assert calls == [
        ["gcu_forward", "grcsf-fast check", True],
        ["gcu_forward", "main", False],
        ["gcu_forward", "autograd", True], ["gcu_backward", "autograd", True],
        ["gcu_forward", "autograd", False], ["gcu_backward", "autograd", False],
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [False, True])
def test_a_program_of_a_checked_backward_has_several_patches(cases, wrong):
    """Also where autograd launches it; and of no later one, whatever the checked one did."""
    calls, failed = cases["wrong_attention" if wrong else "attention"]
    assert len(failed) == wrong
    checked = [
        ["rcu_forward", "grcsf-fast check", True],
        ["rcu_forward", "grcsf-fast check", True], ["rcu_backward", "autograd", True],
    ]  # fmt: skip
    used = [["rcu_forward", "main", False], ["rcu_backward", "autograd", False]]
    assert calls == [*checked, *([] if wrong else used), ["afterwards", "autograd", False]]


def test_the_reference_needs_nothing_of_the_device(cases):
    """Where it has no pooling of volumes whose backward is the same in every run, kernels that have it serve."""
    calls, failed = cases["pooling"]
    assert not failed
    assert calls[-1] == ["pool_backward", "autograd", False]
