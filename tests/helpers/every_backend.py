"""Every backend of the two ops that can run here."""

from __future__ import annotations

import pytest
import torch

from grcsf_fast import BackendUnavailableError
from grcsf_fast.ops import cpp, examples, triton
from grcsf_fast.ops.backends import select_backend

__all__ = ["BACKENDS", "DTYPES", "skip_unserved", "skip_unserved_sizes"]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# The reference, the C++ kernels in every instruction set of this processor, and Triton's on a GPU or interpreted.
BACKENDS = ["reference", *(f"cpp-{name}" for name in (cpp.instruction_sets() if cpp.problem() is None else ()))]
if triton.problem() is None:
    BACKENDS.append("triton")


def skip_unserved(ops, where, dtype: torch.dtype) -> None:
    try:
        select_backend(torch.zeros(1, dtype=dtype, device=where.device))
    except BackendUnavailableError as error:
        pytest.skip(str(error))


def skip_unserved_sizes(ops, where, inputs, patch_size: int) -> None:
    """Of patch_cross_attention: skips where the backend that runs has no kernels for such tensors, and says why."""
    if select_backend(torch.zeros(1, device=where.device)) != "triton":
        return
    x, query_weight = inputs["x"], inputs["query_weight"]
    maps, heads, residual, channels = query_weight.shape
    sizes = examples.attention_sizes(channels, maps, heads, residual, len(inputs["score_weight"]), patch_size)
    reason = triton.unserved("patch_cross_attention", x.dim() - 2, sizes)
    if reason is not None:
        pytest.skip(reason)
