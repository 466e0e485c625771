"""Fixtures of the two ops: each backend in turn."""

from __future__ import annotations

import pytest
import torch
from every_backend import BACKENDS

from grcsf_fast import functional, use_backend
from grcsf_fast.ops import triton
from grcsf_fast.ops.backends import select_backend


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
