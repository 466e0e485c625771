"""The ops in processes that others start: forked and spawned ones, and the workers of a DataLoader."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from calling import example
from torch.utils.data import DataLoader, Dataset

from grcsf_fast import functional, reference
from grcsf_fast.ops import compiled, cpp

pytestmark = pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built")


class Compensated(Dataset):
    """An op as a transform of the data."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return functional.global_compensation(*example())[0][index]


FORKED = """
import sys, torch
from grcsf_fast import functional
from grcsf_fast.functional import internal
from calling import example

torch.set_num_threads(2)
inputs = [tensor.requires_grad_() for tensor in example()]
ones = torch.ones(2, 16, 64, 64)  # made here: PyTorch's own operations would wait in the child

def result():
    out = functional.global_compensation(*inputs)[0]
    (gradient,) = torch.autograd.grad(out, inputs[0], ones)
    x = inputs[0].detach()
    with torch.no_grad():
        stages = [internal.pool(x), internal.normalize_activate(x, torch.ones(16), torch.zeros(16))]
    return [one.detach().numpy().tobytes() for one in (out, gradient, *stages)]

expected = result()  # with OpenMP's threads, which the child lacks
import os
child = os.fork()
if child == 0:
    os._exit(0 if result() == expected else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_forked_after_threads_ran():
    """The child has the same bits; it would wait forever on more than one thread, hence the limit."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[1] / "helpers",
    )
    assert done.returncode == 0, done.stderr


def test_a_forked_process_has_one_thread(monkeypatch):
    monkeypatch.setattr(compiled, "_forked", False)
    assert compiled._threads() == torch.get_num_threads()
    compiled._note_fork()
    assert compiled._threads() == 1


def test_a_forked_process_says_so_once(monkeypatch):
    """Not where PyTorch has one thread, as in a worker of a DataLoader."""
    monkeypatch.setattr(compiled, "_forked", True)
    compiled._warn_of_fork.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled._threads()
        assert not caught
        torch.set_num_threads(2)
        assert [compiled._threads() for _ in range(2)] == [1, 1]
        torch.set_num_threads(1)
    (warning,) = caught
    assert "forked runs the C++ kernels on one thread, not on 2: " in str(warning.message)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method):
    functional.global_compensation(*example())
    loader = DataLoader(Compensated(), batch_size=2, num_workers=1, multiprocessing_context=method)
    (found,) = loader
    torch.testing.assert_close(found, reference.global_compensation(*example())[0])
