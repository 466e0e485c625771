"""Which implementation of an op runs, and why.

A backend is chosen from the tensor at each call, never once per process. ``"auto"`` takes the fastest one that
serves the tensor's device and, where a faster one exists in this version but cannot run here, says so in one warning.
A backend asked for by name runs or raises :class:`BackendUnavailableError`; it never falls back.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

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
        description: one line for ``grcsf-fast info``.
        problem: returns why it cannot run on this machine, or None if it can.
    """

    name: str
    devices: tuple[str, ...]
    description: str
    problem: Callable[[], str | None]

    def serves(self, device_type: str) -> bool:
        return not self.devices or device_type in self.devices


# In order of preference. The fused C++ and Triton kernels enter here, in front of the reference.
_BACKENDS: dict[str, Backend] = {
    "reference": Backend("reference", (), "plain PyTorch, every device and float dtype", lambda: None),
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
        BackendUnavailableError: the backend asked for by name cannot run here or does not serve the device.
    """
    name = requested_backend()
    device = tensor.device.type
    if name != "auto":
        backend = _BACKENDS[name]
        if (problem := backend.problem()) is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot run here: {problem}")
        if not backend.serves(device):
            raise BackendUnavailableError(
                f"backend {name!r} serves {', '.join(backend.devices)} tensors, got one on {device!r}: "
                "move the tensor or choose another backend"
            )
        return name
    for backend in _BACKENDS.values():
        if not backend.serves(device):
            continue
        problem = backend.problem()
        if problem is None:
            return backend.name
        if backend.name not in _warned:
            _warned.add(backend.name)
            warnings.warn(f"backend {backend.name!r} cannot run here: {problem}; using the next one", stacklevel=4)
    raise AssertionError("the reference backend serves every device")


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
