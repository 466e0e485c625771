"""The module of compiled C++ kernels, and what every call into it needs: threads, addresses, sizes."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import ArgumentError, ArgumentTypeError

_cpu: Any = None  # the module
_import_error = ""
try:
    _cpu = importlib.import_module("grcsf_fast.kernels._cpu")
except ImportError as error:
    _import_error = str(error)

__all__ = ["CPU", "DTYPES", "address", "addresses_of", "description", "head", "instruction_sets", "problem", "sizes_of"]

ISA_VARIABLE = "GRCSF_CPU_ISA"
# In the order of the kernels' enumeration.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CPU = torch.device("cpu")


def problem() -> str | None:
    """Why the kernels cannot run here, or None."""
    if _cpu is None:
        # Python started in a checkout takes the package there, which has kernels only if it is installed as it lies.
        checkout = Path(__file__).parents[2]
        how = f", by pip install --editable {checkout}" if (checkout / "setup.py").is_file() else ""
        return (
            f"the compiled kernels cannot be imported ({_import_error}); "
            f"install the package again where there is a C++ compiler{how}"
        )
    return None


def description() -> str:
    """One line for ``grcsf-fast info``."""
    threads = "" if _cpu is None else "; threads of OpenMP" if _cpu.openmp else "; threads of their own, without OpenMP"
    return f"C++ kernels for the processor, float32, bfloat16 and float64{threads}"


def instruction_sets() -> list[str]:
    """Those the kernels were compiled for and this processor has, the best last."""
    return _cpu.instruction_sets()


def _instruction_set() -> int:
    """Number of the best instruction set, or of the one that ``$GRCSF_CPU_ISA`` names.

    Raises:
        ArgumentError: a name that there is not, or of a set that this processor lacks.
    """
    known = instruction_sets()
    name = os.environ.get(ISA_VARIABLE) or known[-1]
    if name not in known:
        raise ArgumentError(
            f"environment variable {ISA_VARIABLE}: expected one of {known} on this processor, got {name!r}"
        )
    return known.index(name)


def _threads() -> int:
    """PyTorch's number; 1 in a process that was forked.

    GNU's OpenMP hangs there on more than one thread once its threads have run in the parent, and the threads that the
    kernels have without OpenMP are not there. PyTorch's own operations hang too, which ``torch.set_num_threads(1)`` in
    the child helps (the workers of a DataLoader call it), or the start method "spawn". Whether they have run there
    nobody can ask, so a child has one thread either way.
    """
    threads = torch.get_num_threads()
    if _forked and threads > 1:
        _warn_of_fork(threads)
    return 1 if _forked else threads


@functools.cache
def _warn_of_fork(threads: int) -> None:
    warnings.warn(
        f"a process that was forked runs the C++ kernels on one thread, not on {threads}: those of its parent are not "
        'there, and waiting for them would have no end; the start method "spawn" has them all',
        stacklevel=2,
    )


def _note_fork() -> None:
    global _forked
    _forked = True


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def head(dtype: torch.dtype) -> tuple[int, int, int]:
    """What every call of a kernel begins with.

    Raises:
        ArgumentTypeError: a dtype that the kernels do not have.
    """
    if dtype not in DTYPES:
        raise ArgumentTypeError(f"the C++ kernels: expected tensors of float32, bfloat16 or float64, got {dtype}")
    return _instruction_set(), DTYPES.index(dtype), _threads()


def address(tensor: Tensor | None, name: str = "tensor") -> int:
    """Of its first number; 0 for None.

    Raises:
        ArgumentTypeError: a tensor of FakeTensorMode, which has no numbers; one on a device, or without memory, as one
            on "meta" is and one whose storage was freed.
    """
    if tensor is None:
        return 0
    if isinstance(tensor, FakeTensor):
        raise ArgumentTypeError(
            f"{name}: expected a tensor that has numbers, got one of FakeTensorMode; the ops of torch.ops.grcsf_fast "
            "take those"
        )
    found = tensor.data_ptr()
    if not tensor.is_cpu or (not found and tensor.numel()):
        kind = f"on {tensor.device}" if not tensor.is_cpu else "without memory, which was freed or never taken,"
        raise ArgumentTypeError(
            f"{name}: expected numbers in the processor's memory, got a tensor {kind} of shape {tuple(tensor.shape)}"
        )
    return found


def addresses_of(**tensors: Tensor | None) -> dict[str, int]:
    """By the names of the kernel's structure. The caller keeps the tensors until the kernel is done: an address does
    not."""
    return {name: address(tensor, name) for name, tensor in tensors.items()}


def sizes_of(spatial: Sequence[int]) -> dict[str, int]:
    """An image of two axes has depth 1 and is planar."""
    depth, height, width = (1, *spatial) if len(spatial) == 2 else spatial
    return {"depth": depth, "height": height, "width": width, "planar": int(len(spatial) == 2)}
