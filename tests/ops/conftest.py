"""Fixtures of the two ops: each backend in turn; and which tests on a GPU do not run side by side."""

from __future__ import annotations

import math

import pytest
import torch
from every_backend import BACKENDS

from grcsf_fast import functional, use_backend
from grcsf_fast.ops import triton
from grcsf_fast.ops.backends import select_backend

MOST_PIXELS = 10**6  # of a batch; with more, the float64 numbers of the reference's patches are 11 GB and more


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a GPU of larger shapes are one group, which one process runs (``--dist loadgroup``)."""
    for item in items:
        if item.path.name == "test_on_a_gpu.py" and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            batch, _, spatial = item.callspec.params.get("shape", (0, 0, ()))
            if batch * math.prod(spatial) > MOST_PIXELS:
                item.add_marker(pytest.mark.xdist_group("the largest"))


@pytest.fixture(params=BACKENDS)
def ops(request, monkeypatch, where):
    """The two ops on one backend."""
    backend, _, instruction_set = request.param.partition("-")
    if instruction_set:
        monkeypatch.setenv("GRCSF_CPU_ISA", instruction_set)
    if backend == "triton":
        where.dtype = torch.float32
        where.device = "cpu" if triton.interpreted() else "cuda"
    with use_backend(backend):
        yield functional


@pytest.fixture
def double(where):
    """For tests that need float64, such as gradcheck."""
    if where.dtype != torch.float64:
        pytest.skip("this backend has no float64")


@pytest.fixture
def reference_alone(ops, where):
    if select_backend(torch.zeros(1, device=where.device)) != "reference":
        pytest.skip("only the reference can be differentiated twice")
