"""A pytest plugin for a process under Triton's interpreter: mends it, and guards every launch.

TRITON_INTERPRET=1 python -m pytest -p interpreted tests/ops -k triton
"""

import os
from collections.abc import Iterator
from typing import Any

from triton.runtime import interpreter

from benchmarks.triton_interpreter import mend

mend()
os.environ.setdefault("GRCSF_CHECK", "0")  # the tests are the check
begin = interpreter.GridExecutor._init_args_hst


# What kernels read and write by strides.
STRIDED = {
    "features", "coarse", "compensated", "residual", "compensated_grad", "residual_grad", "features_grad",
    "coarse_grad", "x", "keys", "values", "out", "out_grad", "x_grad", "keys_grad", "values_grad",
    "largest", "mean", "largest_grad", "mean_grad",
}  # fmt: skip


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for one in value:
            yield from flat(one)
    else:
        yield value


def begin_guarded(self: Any, values: Any, named: Any) -> Any:
    """All others are read as dense: one that is not would be misread without a word."""
    for name, value in (*zip(self.arg_names, values, strict=False), *named.items()):
        for tensor in () if name in STRIDED else flat(value):
            if hasattr(tensor, "is_contiguous"):
                assert tensor.is_contiguous(), f"{name}: launched with a tensor of strides {tensor.stride()}"
    return begin(self, values, named)


interpreter.GridExecutor._init_args_hst = begin_guarded


def pytest_collection_modifyitems(config, items):
    """With ``GRCSF_PART=K/N`` every N-th test from the K-th on: parts of the suite run side by side."""
    part, parts = map(int, os.environ.get("GRCSF_PART", "0/1").split("/"))
    dropped = [item for number, item in enumerate(items) if number % parts != part]
    config.hook.pytest_deselected(items=dropped)
    items[:] = items[part::parts]
