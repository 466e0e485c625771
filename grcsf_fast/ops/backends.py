"""Which implementation of an op runs, and why.

A backend is chosen from the tensor at each call, never once per process (a compiled program keeps the choice made when
it was compiled). ``"auto"`` takes the fastest one that serves the tensor's device and dtype and, where a faster one
exists in this version but cannot run here, says so in one warning.
A backend asked for by name runs or raises :class:`BackendUnavailableError`; it never falls back.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cpp, triton

__all__ = ["Backend", "BackendUnavailableError", "backend_info", "select_backend", "use_backend"]

ENVIRONMENT_VARIABLE = "GRCSF_BACKEND"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run; the message carries the reason and the fix."""


@dataclass(frozen=True)
class Backend:
    """One implementation of both ops.

    Args:
        name: what users write.
        devices: ``torch.device.type`` values it serves; empty means every device.
        dtypes: of the large tensors it serves; empty means every float dtype.
        description: one line for ``grcsf-fast info``.
        problem: returns why it cannot run on this machine, or None if it can.
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    description: str
    problem: Callable[[], str | None]

    def serves(self, device_type: str, dtype: torch.dtype) -> bool:
        return (not self.devices or device_type in self.devices) and (not self.dtypes or dtype in self.dtypes)


# In order of preference.
_BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "cpp", ("cpu",), cpp.DTYPES, "C++ kernels for the processor, float32, bfloat16 and float64", cpp.problem
        ),
        Backend(
            "triton",
            # Triton's interpreter works on the CPU.
            ("cuda", "cpu") if triton.interpreted() else ("cuda",),
            triton.DTYPES,
            "Triton kernels for CUDA and ROCm, float32, bfloat16 and float16",
            triton.problem,
        ),
        Backend("reference", (), (), "plain PyTorch, every device and float dtype", lambda: None),
    )
}

_requested: ContextVar[str | None] = ContextVar("grcsf_fast_backend", default=None)
_warned: set[str] = set()


def _check_name(name: str, source: str) -> str:
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"{source}: expected 'auto' or one of {sorted(_BACKENDS)}, got {name!r}")
    return name


def requested_backend() -> str:
    """The name in force: the innermost :func:`use_backend`, else ``$GRCSF_BACKEND``, else ``"auto"``."""
    name = _requested.get()
    if name is not None:
        return name
    return _check_name(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), f"environment variable {ENVIRONMENT_VARIABLE}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on one backend.

    Args:
        name: ``"auto"`` or a name that :func:`backend_info` lists.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: the backend cannot run on this machine.
    """
    _check_name(name, "use_backend")
    if name != "auto" and (problem := _BACKENDS[name].problem()) is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {problem}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def select_backend(tensor: Tensor) -> str:
    """The name of the backend that serves ``tensor``.

    Raises:
        BackendUnavailableError: the backend asked for by name cannot run here or does not serve the device or dtype.
    """
    return _select(tensor.device.type, tensor.dtype)


def _select(device: str, dtype: torch.dtype) -> str:
    name = requested_backend()
    if name != "auto":
        backend = _BACKENDS[name]
        if (problem := backend.problem()) is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot run here: {problem}")
        if not backend.serves(device, dtype):
            dtypes = ", ".join(str(one).removeprefix("torch.") for one in backend.dtypes)
            raise BackendUnavailableError(
                f"backend {name!r} serves {', '.join(backend.devices)} tensors{f' of {dtypes}' if dtypes else ''}, "
                f"got one of {str(dtype).removeprefix('torch.')} on {device!r}: "
                "move or convert the tensor or choose another backend"
            )
        return name
    for backend in _BACKENDS.values():
        if not backend.serves(device, dtype):
            continue
        problem = backend.problem()
        if problem is None:
            return backend.name
        if backend.name not in _warned:
            _warned.add(backend.name)
            warnings.warn(f"backend {backend.name!r} cannot run here: {problem}; using the next one", stacklevel=5)
    raise AssertionError("the reference backend serves every device")


# What torch.compiler.assume_constant_result sets, without which torch.compile would break the graph at the context
# variable. The decorator itself imports the whole of dynamo, a second that `import grcsf_fast` should not cost.
_select._dynamo_marked_constant = True


def backend_info() -> dict[str, dict[str, object]]:
    """Every backend of this version: devices, whether it can run on this machine and, if not, why.

    Returns:
        ``{name: {"available": bool, "reason": str | None, "devices": tuple, "description": str}}``; an empty
        ``devices`` means all of them.
    """
    info: dict[str, dict[str, object]] = {}
    for name, backend in _BACKENDS.items():
        problem = backend.problem()
        info[name] = {
            "available": problem is None,
            "reason": problem,
            "devices": backend.devices,
            "description": backend.description,
        }
    return info
