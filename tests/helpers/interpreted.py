"""A pytest plugin for a process under Triton's interpreter: mends it, and guards every launch.

TRITON_INTERPRET=1 python -m pytest -p interpreted tests/ops -k triton
"""

import os
from typing import Any

from triton.runtime import interpreter

from benchmarks.triton_interpreter import mend

mend()
os.environ.setdefault("GRCSF_CHECK", "0")  # the tests are the check
begin = interpreter.GridExecutor._init_args_hst


def begin_guarded(self: Any, values: Any, named: Any) -> Any:
    """The kernels read every tensor as dense: one that is not would be misread without a word."""
    for name, value in (*zip(self.arg_names, values, strict=False), *named.items()):
        for tensor in value if isinstance(value, tuple) else (value,):
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
