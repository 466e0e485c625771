"""Fixtures of the networks' tests."""

import pytest

from grcsf_fast.ops import cpp


@pytest.fixture(params=cpp.instruction_sets() if cpp.problem() is None else [])
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("GRCSF_CPU_ISA", request.param)
