"""Which implementation of an op runs, and why.

A backend is chosen from the tensor at each call, never once per process (a compiled program keeps the choice made when
it was compiled). ``"auto"`` takes the fastest one that serves the tensor's device and dtype and, where a faster one
exists in this version but cannot run here, says so in one warning.
A backend asked for by name runs or raises :class:`BackendUnavailableError`; it never falls back.

Kernels cannot follow the transforms of torch.func nor forward-mode derivatives: ``"auto"`` leaves them to the
reference, by name they raise where they meet one (:mod:`grcsf_fast.ops.library`). Triton's kernels are checked before
they serve for the first time (:mod:`grcsf_fast.ops.check`).
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ..errors import ArgumentError, GrcsfError
from ..runtime.transforms import transformed
from . import check, cpp, plain, registered, stages, triton
from .examples import Sizes

if TYPE_CHECKING:
    from contextlib import _GeneratorContextManager

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "backend_info",
    "fallbacks",
    "implementation",
    "kernels_for_inference",
    "kernels_with_gradients",
    "select_backend",
    "stage_implementation",
    "use_backend",
]

ENVIRONMENT_VARIABLE = "GRCSF_BACKEND"


class BackendUnavailableError(GrcsfError, RuntimeError):
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
        Backend("cpp", ("cpu",), cpp.DTYPES, cpp.description(), cpp.problem),
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
_warned: set[Hashable] = set()
_fell_back: dict[str, str] = {}
_warning = threading.Lock()
PRODUCTS = ("attend", "linear_gelu")
_OWN = ("grcsf_fast.functional", "grcsf_fast.ops.")


def _check_name(name: str, source: str) -> str:
    if name != "auto" and name not in _BACKENDS:
        raise ArgumentError(f"{source}: expected 'auto' or one of {sorted(_BACKENDS)}, got {name!r}")
    return name


def requested_backend() -> str:
    """The name in force: the innermost :func:`use_backend`, else ``$GRCSF_BACKEND``, else ``"auto"``."""
    name = _requested.get()
    if name is not None:
        return name
    return _check_name(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", f"environment variable {ENVIRONMENT_VARIABLE}")


def use_backend(name: str) -> _GeneratorContextManager[None]:
    """Run the two ops inside the ``with`` block on one backend; their backward runs on it too, wherever it is called.

    A block or a decorator: the call by itself checks the name and changes nothing.

    The two ops are :func:`~grcsf_fast.functional.global_compensation` (of one scale or several) and
    :func:`~grcsf_fast.functional.patch_cross_attention`. What else the networks compute follows it where there are
    kernels: on the CPU convolutions, norms with their activations and pooling and, where no gradients are wanted, the
    autoencoder's attention and GELU; on a GPU norms and pooling. The rest is PyTorch's.

    As PyTorch's ``no_grad`` and ``autocast``, the block holds for its own thread and for what that calls, asyncio's
    tasks and ``asyncio.to_thread`` included. A thread that the block starts otherwise (``threading``, executors,
    ``nn.DataParallel``) begins without it: enter it there, start the thread's function by
    ``contextvars.copy_context().run``, or set ``GRCSF_BACKEND``, which holds for the whole process. A generator that
    yields inside the block lends it to its caller until it goes on.

    A forward that ``torch.utils.checkpoint`` repeats in the backward is not in the block any more, or on a GPU in a
    thread of PyTorch's: give it ``use_reentrant=False, context_fn=lambda: (use_backend(name), use_backend(name))``, or
    set ``GRCSF_BACKEND``.

    Args:
        name: ``"auto"`` or a name that :func:`backend_info` lists.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: the backend cannot run on this machine.
    """
    _check_name(name, "use_backend")
    if name != "auto" and (problem := _BACKENDS[name].problem()) is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {problem}")
    return _requesting(name)


@contextmanager
def _requesting(name: str) -> Iterator[None]:
    token = _requested.set(name)
    try:
        yield
    finally:
        # A generator with the block inside may be closed in another context, by the garbage collector for one. There is
        # nothing to restore there.
        with suppress(ValueError):
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
        if backend.name == "reference":
            return backend.name
        if (problem := backend.problem()) is not None:
            _warn_once(backend.name, f"backend {backend.name!r} cannot run here: {problem}; using the next one")
        elif (what := transformed()) is not None:
            _warn_once("transforms", f"backend {backend.name!r} does not follow {what}; 'reference' serves")
        else:
            return backend.name
    raise AssertionError("the reference backend serves every device")


# What torch.compiler.assume_constant_result sets, without which torch.compile would break the graph at the context
# variable. The decorator itself imports the whole of dynamo, a second that `import grcsf_fast` should not cost.
_select._dynamo_marked_constant = True


def implementation(op: str, tensors: Sequence[Tensor], sizes: Callable[[], Sizes]) -> Callable[..., Any]:
    """What runs one of the two ops: the reference, or the registered op with the kernels of the backend.

    Args:
        op: its name in :mod:`grcsf_fast.reference`.
        tensors: its arguments, a large one first.
        sizes: what chooses among the kernels' variants, from :mod:`grcsf_fast.ops.examples`.

    Raises:
        BackendUnavailableError: see :func:`select_backend`; or kernels asked for by name fail their check.
    """
    first = tensors[0]
    backend = select_backend(first)
    if backend == "triton":
        backward = _wants_gradients(tensors)
        # Sizes are symbols while something is compiled.
        far = None if torch.compiler.is_compiling() else triton.too_far(op, tensors, backward)
        last = _channels_last(first)
        backend = _checked(op, backward, first.dtype, first.dim() - 2, first.device, sizes(), far, last)
    return getattr(reference, op) if backend == "reference" else partial(getattr(registered, op), backend=backend)


def stage_implementation(op: str, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """What runs an op of :mod:`.plain`: a kernel where one serves, else PyTorch's operations.

    Where gradients are wanted, those of :mod:`.stages` do. A compiler fuses PyTorch's operations better; products under
    autocast are of another dtype than the C++ kernel's.

    Raises:
        BackendUnavailableError: see :func:`select_backend`; or kernels asked for by name fail their check.
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or transformed() is not None:
        return getattr(plain, op)
    backend = select_backend(first)
    if backend == "triton" and op in stages.__all__:
        sizes = (("channels", first.shape[1]),)
        backward, last = _wants_gradients(tensors), _channels_last(first)
        checked = _checked(op, backward, first.dtype, first.dim() - 2, first.device, sizes, None, last)
        return partial(getattr(stages, op), backend=backend) if checked == "triton" else getattr(plain, op)
    if backend != "cpp" or first.device.type != "cpu" or (op in PRODUCTS and _autocast_elsewhere(first)):
        return getattr(plain, op)
    if not _wants_gradients(tensors):
        return getattr(registered, op)
    if op in stages.__all__:
        return partial(getattr(stages, op), backend=backend)
    return getattr(plain, op)


def kernels_for_inference(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the C++ kernels without a backward serve this tensor, or one like it of another dtype.

    Raises:
        BackendUnavailableError: see :func:`select_backend`.
    """
    return _select(tensor.device.type, tensor.dtype if dtype is None else dtype) == "cpp"


def kernels_with_gradients(tensors: Sequence[Tensor]) -> bool:
    """Whether C++ kernels that have a backward serve these tensors.

    Raises:
        BackendUnavailableError: see :func:`select_backend`.
    """
    return (
        tensors[0].device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and transformed() is None
        and select_backend(tensors[0]) == "cpp"
    )


def _autocast_elsewhere(tensor: Tensor) -> bool:
    """Whether a product of this tensor is of another dtype under the autocast in force."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != tensor.dtype


def _wants_gradients(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _channels_last(tensor: Tensor) -> bool:
    """Whether the kernels read it in that layout; where neither is, they have the code of C order."""
    if tensor.stride(1) != 1:  # a condition, which torch.compile decides, and no result, which may be a symbol
        return False
    return not tensor.is_contiguous()


def _checked(
    op: str,
    backward: bool,
    dtype: torch.dtype,
    dims: int,
    device: torch.device,
    sizes: Sizes,
    far: str | None = None,
    last: bool = False,
) -> str:
    """ "triton", where it was selected, or "reference" where it does not serve the device, of several, or the sizes, or
    its kernels fail the check of their first use.

    Args:
        op: its name in :mod:`grcsf_fast.ops.registered`.
        backward: whether gradients may be asked for.
        dtype: of the large tensors.
        dims: spatial axes.
        device: of the tensors.
        sizes: from :mod:`grcsf_fast.ops.examples`.
        far: from :func:`grcsf_fast.ops.triton.too_far`.
        last: whether the channels are last in memory.

    Raises:
        BackendUnavailableError: kernels asked for by name do not serve or fail.
    """
    problem = (triton.device_problem(device, op, dtype) if device.type == "cuda" else None) or triton.unserved(
        op, dims, sizes
    )
    if (problem := problem or far) is not None:
        if requested_backend() != "auto":
            raise BackendUnavailableError(f"backend 'triton': {op}: {problem}; use_backend(\"reference\") serves there")
        return _fall_back(op, backward, (op, problem), f"backend 'triton': {op}: {problem}")
    for which in check.PASSES[: 2 if backward else 1]:
        kernel = check.Kernel("triton", op, which, dtype, dims, check.architecture(device))
        if (problem := check.failure(kernel, device, sizes, last)) is not None:
            if requested_backend() != "auto":
                raise BackendUnavailableError(problem)
            return _fall_back(op, backward, kernel, problem)
    return "triton"


_checked._dynamo_marked_constant = True


def _fall_back(op: str, backward: bool, about: Hashable, problem: str) -> str:
    _warn_once(about, f"{problem}; 'reference' serves")
    if not backward:
        _fell_back.setdefault(op, problem)
    return "reference"


def fallbacks() -> dict[str, str]:
    """Ops that the reference has served in this process, without gradients, though Triton was chosen, and why.

    A warning said so at their first call; what keeps results keeps this beside them.
    """
    return dict(_fell_back)


def _warn_once(about: Hashable, message: str) -> None:
    """With the place where an op is called, outside of this package's own ways to its backend."""
    with _warning:
        if about in _warned:
            return
        _warned.add(about)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OWN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


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
