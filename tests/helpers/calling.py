"""Ops called by the tensors that fixtures make, one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from grcsf_fast import functional, reference
from grcsf_fast.functional import AttentionWeights, internal
from grcsf_fast.ops import plain

__all__ = ["OURS", "PLAIN", "arguments", "example", "grouped"]

# Every op by one name, as the networks call it and in PyTorch's own operations.
OURS, PLAIN = (
    SimpleNamespace(**{name: getattr(module, name) for module in modules for name in module.__all__})
    for modules in ((functional, internal), (reference, plain))
)


def grouped(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """The twelve tensors of ``patch_cross_attention``, in their order, as it takes them."""
    x, keys, values, *weights = tensors
    return x, keys, values, AttentionWeights(*weights)


def arguments(inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """The tensors of an op, by name and in its order, as it takes them."""
    return grouped(inputs.values()) if "query_weight" in inputs else tuple(inputs.values())


def example() -> list[Tensor]:
    """Arguments of ``global_compensation``, large enough for several threads."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 16, 64, 64), (2, 16, 32, 32), (2, 16), (2, 16), (16,))
    return [torch.rand(shape, generator=generator) for shape in shapes]
