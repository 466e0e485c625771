"""How far a result may lie from the float64 oracle: the one table, of the tests and of a kernel's first use."""

from __future__ import annotations

import torch

__all__ = ["TOLERANCES", "tolerance"]

# dtype of the result -> (atol, rtol). Beside it the worst |error| / (1 + |expected|) of the reference's results over
# the sizes of tests/ops/test_global_compensation.py and test_patch_cross_attention.py and five seeds; half precision is
# one rounding of the result, of at most half a ulp.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-12),  # 9.5e-16
    torch.float32: (1e-5, 1e-5),  # 4.4e-7
    torch.float16: (1e-3, 1e-3),  # 4.2e-4
    torch.bfloat16: (8e-3, 8e-3),  # 3.3e-3
}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Keyword arguments for ``torch.testing.assert_close``."""
    atol, rtol = TOLERANCES[dtype]
    return {"atol": atol, "rtol": rtol}
