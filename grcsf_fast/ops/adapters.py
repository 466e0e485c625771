"""Which module calls the kernels for a tensor, by the backend that an op was called with."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..errors import ArgumentError
from . import cpp, triton

__all__ = ["kernels", "laid_out"]

_ADAPTERS = {"cpp": cpp, "triton": triton}


def _adapter(tensor: Tensor, backend: str) -> ModuleType:
    """That of the backend, or the other one of a program that was exported and moved to another device since.

    Raises:
        ArgumentError: a backend that there is not.
    """
    if backend not in _ADAPTERS:
        raise ArgumentError(f"backend: expected one of {', '.join(map(repr, _ADAPTERS))}, got {backend!r}")
    if tensor.is_cuda:
        return triton
    adapter = _ADAPTERS[backend]
    return cpp if adapter is triton and not triton.interpreted() else adapter


def kernels(tensor: Tensor, backend: str) -> ModuleType:
    """Those that run.

    Raises:
        ArgumentError: a backend that there is not.
        RuntimeError: they cannot run here.
    """
    adapter = _adapter(tensor, backend)
    if (problem := adapter.problem()) is not None:
        raise RuntimeError(f"the op has no kernels on {tensor.device.type!r} here: {problem}")
    return adapter


def laid_out(like: Tensor, backend: str) -> Tensor:
    """What kernels make beside a large tensor: Triton's keep the layout, C++'s are in C order."""
    return torch.empty_like(like) if _adapter(like, backend) is triton else like.new_empty(like.shape)
