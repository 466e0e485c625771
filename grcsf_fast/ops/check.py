"""Kernels against the reference on small inputs: before their first use on a GPU, and for ``grcsf-fast info --check``.

The Triton kernels were written where no GPU was at hand. So before one serves for the first time in a process, it is
run once on a small input, with the channels and in the layout that it is about to serve, and compared with the
reference in float64 by the tolerances of the tests. The reference runs on the CPU, whatever the caller's modes: on a
GPU some of its operations raise where ``torch.use_deterministic_algorithms`` is on. A kernel that raises or is off is
out of use for the rest of the process (:class:`Kernel` says how much of the package that is); what the reference raises
goes to the caller. ``GRCSF_CHECK=0`` turns the check off. Programs that ``torch.compile`` or ``torch.export`` made keep
the choice of their first call.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import cpp, examples, triton
from .tolerances import TOLERANCES

__all__ = ["PASSES", "VARIABLE", "Kernel", "Result", "architecture", "examine", "examine_all", "failure"]

VARIABLE = "GRCSF_CHECK"
PASSES = ("forward", "backward")
REPORT = "please open an issue with the output of `grcsf-fast info --check`"

CPU = torch.device("cpu")
# At a kink, such as that of a leaky ReLU at 0, either slope is right.
KINK = 1e-5

T = TypeVar("T")


class Kernel(NamedTuple):
    """What is taken out of use together.

    Args:
        backend: "cpp" or "triton".
        op: its name in :mod:`grcsf_fast.ops.registered`.
        which: one of ``PASSES``.
        dtype: of the large tensors.
        dims: spatial axes, 0 for an op without.
        architecture: of the device.
    """

    backend: str
    op: str
    which: str
    dtype: torch.dtype
    dims: int
    architecture: str

    def __str__(self) -> str:
        axes = f"{self.dims} spatial axes, " if self.dims else ""
        return f"{self.op} {self.which} ({str(self.dtype).removeprefix('torch.')}, {axes}{self.architecture})"


class Result(NamedTuple):
    """How far a kernel is off.

    Args:
        error: the largest in proportion to its tolerance; of sums, such as gradients, in units of the largest number
            of the tensor where that is above 1. NaN counts as infinite.
        tolerance: for that error.
        tensor: where it is.
    """

    error: float
    tolerance: float
    tensor: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    @property
    def share(self) -> float:
        """Of what is tolerated."""
        return self.error / self.tolerance


_lock = threading.Lock()
_passed: set[tuple[Kernel, examples.Sizes, bool]] = set()
_failed: dict[Kernel, str] = {}


@functools.cache
def architecture(device: torch.device) -> str:
    """Of a device, as compilers name it."""
    if device.type != "cuda":
        return "interpreter" if triton.interpreted() else device.type
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def failure(kernel: Kernel, device: torch.device, sizes: examples.Sizes, last: bool = False) -> str | None:
    """Why the kernel is out of use, or None; examined if these sizes are new in this layout.

    Args:
        kernel: that is about to serve.
        device: of the tensors.
        sizes: what chooses among its variants.
        last: whether the large tensors have their channels last in memory, which is other machine code.

    Raises:
        RuntimeError: a CUDA graph is being captured, where nothing can be compared.
    """
    if os.environ.get(VARIABLE) == "0":
        return None
    served = kernel, sizes, last
    if kernel not in _failed and served not in _passed:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{kernel}: its first use is checked, which cannot be done while a CUDA graph is captured; call the "
                f"network once before, as every capture needs, or set {VARIABLE}=0"
            )
        # Who has the lock may wait for autograd's thread, so that one must not wait for the lock.
        with nullcontext() if _in_autograd() else _lock:
            if kernel not in _failed and served not in _passed:
                _decide(kernel, device, sizes, last)
    return _failed.get(kernel)


def _decide(kernel: Kernel, device: torch.device, sizes: examples.Sizes, last: bool) -> None:
    result = examine(kernel, device, sizes, last)
    if isinstance(result, Exception):
        what = f"raised {type(result).__name__}: {result}"
    elif result.passed:
        _passed.add((kernel, sizes, last))
        return
    else:
        what = f"is off by {result.error:.1e} in {result.tensor}, where {result.tolerance:.1e} is tolerated"
    _failed[kernel] = (
        f"backend {kernel.backend!r}: {kernel} failed the check of its first use, with {examples.described(sizes)}"
        f"{', channels last' if last else ''}: it {what}; {REPORT}"
    )


def examine(kernel: Kernel, device: torch.device, sizes: examples.Sizes, last: bool = False) -> Result | Exception:
    """Run a kernel once against the reference.

    Returns:
        The result that is furthest off, or what the kernel raised.

    Raises:
        Exception: what the reference raised.
        MemoryError, OutOfMemoryError: these say nothing about the kernel.
    """
    return _alone(lambda: _worst(_compared(kernel, device, sizes, last)), device)


def _worst(results: Iterable[Result | Exception]) -> Result | Exception:
    """The first exception, else the result that is furthest off."""
    found: list[Result] = []
    for one in results:
        if isinstance(one, Exception):
            return one
        found.append(one)
    return max(found, key=lambda one: one.share)


def _compared(kernel: Kernel, device: torch.device, sizes: examples.Sizes, last: bool) -> Iterator[Result | Exception]:
    """Of every tensor that the kernel makes of each example."""
    backward = kernel.which == "backward"
    for example in examples.made(kernel.op, kernel.which, kernel.dims, sizes, large=device.type == "cuda"):
        inputs = {name: tensor.to(kernel.dtype) for name, tensor in example.tensors.items()}
        if last:
            inputs = {name: examples.channels_last(name, tensor) for name, tensor in inputs.items()}
        exact = {name: tensor.double().detach().requires_grad_(backward) for name, tensor in inputs.items()}
        expected, incoming = example.run("reference", exact), None
        if backward:
            incoming = [
                examples.numbers(output.shape, seed).to(kernel.dtype).masked_fill(output.abs() < KINK, 0)
                for seed, output in enumerate(expected.values())
            ]
            expected = _gradients(expected, exact, [one.double() for one in incoming])
        there = {name: tensor.to(device).requires_grad_(backward) for name, tensor in inputs.items()}
        try:
            with _crowded(device, backward) if kernel.backend == "triton" else nullcontext():
                found = example.run(kernel.backend, there)
                if incoming is not None:
                    grads = [
                        torch.empty_like(output).copy_(one)
                        for output, one in zip(found.values(), incoming, strict=True)
                    ]
                    found = _gradients(found, there, grads)
                # Where a launch has failed this raises.
                found = {name: one.detach().to(CPU) for name, one in found.items()}
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            yield error
            return
        for name, one in found.items():
            yield _result(name, one, expected[name].detach(), backward or example.sums)


def _gradients(outputs: dict[str, Tensor], inputs: dict[str, Tensor], incoming: list[Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(list(outputs.values()), list(inputs.values()), incoming)
    return {f"the gradient of {name}": gradient for name, gradient in zip(inputs, found, strict=True)}


@contextmanager
def _crowded(device: torch.device, backward: bool) -> Iterator[None]:
    """A program of Triton's kernels has several patches one after another, which of small inputs it would not have."""
    try:
        crowded = importlib.import_module("grcsf_fast.kernels.triton.grouped").crowded
    except ImportError:  # without Triton other kernels stand for its own, in tests
        yield
        return
    threads = (_here, _where_gradients_are_made) if backward else (_here,)
    try:
        for call in threads:
            call(device, lambda: crowded.set(True))
        yield
    finally:
        for call in threads:
            call(device, lambda: crowded.set(False))


def _here(device: torch.device, function: Callable[[], object]) -> None:
    function()


def _where_gradients_are_made(device: torch.device, function: Callable[[], object]) -> None:
    """Call it in the thread in which autograd runs a device's part of a backward: each GPU has one of its own."""
    leaf = torch.zeros((), device=device, requires_grad=True)
    output = leaf.clone()
    output.register_hook(lambda grad: function() and None)
    torch.autograd.grad(output, leaf, torch.zeros_like(output))


def _result(name: str, found: Tensor, expected: Tensor, sums: bool) -> Result:
    size = max(1.0, float(expected.detach().abs().max())) if sums else 1.0
    atol, rtol = TOLERANCES[found.dtype]
    difference = (found.double() - expected).abs() / size
    worst = int((difference / (atol + rtol * expected.abs() / size)).nan_to_num(math.inf).argmax())
    tolerance = atol + rtol * float(expected.flatten()[worst].abs()) / size
    error = float(difference.flatten()[worst])
    return Result(math.inf if math.isnan(error) else error, tolerance, name)


def _in_autograd() -> bool:
    """Whether autograd called this, in a hook or in the second forward of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def _alone(function: Callable[[], T], device: torch.device) -> T:
    """Call it in a thread of its own: there, none of the caller's modes is on.

    Those are torch's, each a thread's own: gradients, inference, autocast, default device, torch.func's transforms,
    fake tensors and tracing, hooks of saved tensors, the stream.

    Not where autograd called this: a GPU's part of every backward waits for one thread, which would wait here.
    """
    if _in_autograd():
        with _without_modes(device):
            return function()
    outcome: list[tuple[T | None, BaseException | None]] = []

    def call() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, name="grcsf-fast check")
    thread.start()
    thread.join()
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


@contextmanager
def _without_modes(device: torch.device) -> Iterator[None]:
    """The modes that may be on where autograd calls, switched off."""
    with ExitStack() as modes:
        modes.enter_context(_disable_current_modes())
        modes.enter_context(torch._C.DisableTorchFunction())
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for kind in filter(torch.amp.is_autocast_available, {"cpu", device.type}):
            modes.enter_context(torch.autocast(kind, enabled=False))
        with suppress(RuntimeError):  # where hooks are forbidden there are none
            modes.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def kernels() -> Iterator[tuple[Kernel, torch.device]]:
    """Every kernel that can run here, once for each architecture."""
    for backend, module in (("cpp", cpp), ("triton", triton)):
        if module.problem() is not None:
            continue
        gpus = backend == "triton" and not triton.interpreted()
        devices = [torch.device("cuda", one) for one in range(torch.cuda.device_count())] if gpus else [CPU]
        for device in {architecture(one): one for one in reversed(devices)}.values():
            for op, which, dims in examples.KINDS[backend]:
                for dtype in module.DTYPES:
                    yield Kernel(backend, op, which, dtype, dims, architecture(device)), device


def examine_all() -> Iterator[tuple[Kernel, Result | Exception]]:
    """The worst result of every kernel that can run here over all sizes of the examples, in both layouts where it reads
    both, or what it raised."""
    for kernel, device in kernels():
        layouts = (False, True) if kernel.backend == "triton" else (False,)
        tried = [(sizes, last) for sizes in examples.sizes(kernel.op, kernel.dims) for last in layouts]
        try:
            yield kernel, _worst(examine(kernel, device, *one) for one in tried)
        except (torch.OutOfMemoryError, MemoryError) as error:
            yield kernel, error
