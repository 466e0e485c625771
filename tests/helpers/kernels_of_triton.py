"""Kernels that stand for Triton's: preferred to everything else on the CPU, and none of them checked so far."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from grcsf_fast.ops import adapters, backends, check, cpp


def stand_in(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, Callable[..., Any]]) -> SimpleNamespace:
    """What "triton" runs from now on, by the names of the adapters' functions."""
    fake = SimpleNamespace(problem=cpp.problem, **kernels)
    monkeypatch.setitem(adapters._ADAPTERS, "triton", fake)
    triton = backends.Backend("triton", ("cpu",), cpp.DTYPES, "for tests", lambda: None)
    monkeypatch.setattr(backends, "_BACKENDS", {"triton": triton, "reference": backends._BACKENDS["reference"]})
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(check, "_passed", set())
    monkeypatch.setattr(check, "_failed", {})
    monkeypatch.delenv("GRCSF_CHECK", raising=False)
    monkeypatch.delenv("GRCSF_BACKEND", raising=False)
    return fake
