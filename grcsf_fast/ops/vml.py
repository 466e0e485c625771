"""First calls of MKL's vector mathematics, made where no other thread can be inside them."""

from __future__ import annotations

import torch

__all__ = ["FUNCTIONS", "resolve_kernels"]

# Elementwise functions that PyTorch hands to MKL on contiguous CPU tensors (aten/src/ATen/cpu/vml.h).
FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "lgamma", "log", "log10"),
    *("log1p", "log2", "sin", "sinh", "sqrt", "tan", "tanh"),
)


def resolve_kernels() -> None:
    """Call each function once, on one element, on the calling thread.

    MKL 2024.2, which PyTorch's wheels carry, picks a function's kernel during its first call. Two threads in there at
    once may leave one of them with a kernel of 12 bits for that call, silently: square roots wrong by 1e-4 in half an
    image, in one run of many (https://github.com/pytorch/pytorch/issues/188792). ``benchmarks/vml_first_call.py``
    provokes it.
    """
    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(half)
