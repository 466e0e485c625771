"""Kernels against the reference on small inputs: before their first use on a GPU, and for ``grcsf-fast info --check``.

The Triton kernels were written where no GPU was at hand. So before one serves for the first time in a process, it is
run once on a small input, with the channels it is about to serve, and compared with the reference in float64 on the
same device by the tolerances of the tests. One that raises or is off is out of use for the rest of the process
(:class:`Kernel` says how much of the package that is). ``GRCSF_CHECK=0`` turns the check off. Programs that
``torch.compile`` or ``torch.export`` made keep the choice of their first call.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from . import cpp, examples, triton
from .tolerances import TOLERANCES

__all__ = ["PASSES", "VARIABLE", "Kernel", "Result", "architecture", "examine", "examine_all", "failure"]

VARIABLE = "GRCSF_CHECK"
PASSES = ("forward", "backward")
REPORT = "please open an issue with the output of `grcsf-fast info --check`"

CPU = torch.device("cpu")

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


_lock = threading.Lock()
_passed: set[tuple[Kernel, examples.Sizes]] = set()
_failed: dict[Kernel, str] = {}


@functools.cache
def architecture(device: torch.device) -> str:
    """Of a device, as compilers name it."""
    if device.type != "cuda":
        return "interpreter" if triton.interpreted() else device.type
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def failure(kernel: Kernel, device: torch.device, sizes: examples.Sizes) -> str | None:
    """Why the kernel is out of use, or None; examined if these sizes are new.

    Raises:
        RuntimeError: a CUDA graph is being captured, where nothing can be compared.
    """
    if os.environ.get(VARIABLE, "1") in ("", "0"):
        return None
    if kernel not in _failed and (kernel, sizes) not in _passed:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{kernel}: its first use is checked, which cannot be done while a CUDA graph is captured; call the "
                f"network once before, as every capture needs, or set {VARIABLE}=0"
            )
        with _lock:
            if kernel not in _failed and (kernel, sizes) not in _passed:
                _decide(kernel, device, sizes)
    return _failed.get(kernel)


def _decide(kernel: Kernel, device: torch.device, sizes: examples.Sizes) -> None:
    try:
        result = examine(kernel, device, sizes)
    except (torch.OutOfMemoryError, MemoryError):
        raise  # says nothing about the kernel
    except Exception as error:
        what = f"raised {type(error).__name__}: {error}"
    else:
        if result.passed:
            _passed.add((kernel, sizes))
            return
        what = f"is off by {result.error:.1e} in {result.tensor}, where {result.tolerance:.1e} is tolerated"
    _failed[kernel] = (
        f"backend {kernel.backend!r}: {kernel} failed the check of its first use, with {examples.described(sizes)}: it "
        f"{what}; {REPORT}"
    )


def examine(kernel: Kernel, device: torch.device, sizes: examples.Sizes) -> Result:
    """Run a kernel once against the reference.

    Raises:
        Exception: whatever the kernel raises.
    """
    return _alone(lambda: _compared(kernel, device, sizes))


def _compared(kernel: Kernel, device: torch.device, sizes: examples.Sizes) -> Result:
    example = examples.made(kernel.op, kernel.which, kernel.dims, sizes)
    backward = kernel.which == "backward"
    inputs = {
        name: tensor.to(device, kernel.dtype).requires_grad_(backward) for name, tensor in example.tensors.items()
    }
    exact = {name: tensor.detach().double().requires_grad_(backward) for name, tensor in inputs.items()}
    found, expected = example.run(kernel.backend, inputs), example.run("reference", exact)
    if backward:
        incoming = [
            examples.numbers(output.shape, seed).to(device, output.dtype) for seed, output in enumerate(found.values())
        ]
        found = _gradients(found, inputs, incoming)
        expected = _gradients(expected, exact, [one.double() for one in incoming])
    results = (_result(name, found[name], expected[name], backward or example.sums) for name in found)
    return max(results, key=lambda one: one.error / one.tolerance)


def _gradients(outputs: dict[str, Tensor], inputs: dict[str, Tensor], incoming: list[Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(list(outputs.values()), list(inputs.values()), incoming)
    return {f"the gradient of {name}": gradient for name, gradient in zip(inputs, found, strict=True)}


def _result(name: str, found: Tensor, expected: Tensor, sums: bool) -> Result:
    size = max(1.0, float(expected.detach().abs().max())) if sums else 1.0
    atol, rtol = TOLERANCES[found.dtype]
    difference = (found.double() - expected).abs() / size
    worst = int((difference / (atol + rtol * expected.abs() / size)).nan_to_num(math.inf).argmax())
    tolerance = atol + rtol * float(expected.flatten()[worst].abs()) / size
    error = float(difference.flatten()[worst])
    return Result(math.inf if math.isnan(error) else error, tolerance, name)


def _alone(function: Callable[[], T]) -> T:
    """Call it in a thread of its own: there, none of the caller's modes is on.

    Those are torch's, each a thread's own: gradients, inference, autocast, default device, torch.func's transforms,
    fake tensors and tracing, hooks of saved tensors, the stream.
    """
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
    """The worst result of every kernel that can run here over all sizes of the examples, or what it raised."""
    for kernel, device in kernels():
        try:
            results = [examine(kernel, device, sizes) for sizes in examples.sizes(kernel.op, kernel.dims)]
            yield kernel, max(results, key=lambda one: one.error / one.tolerance)
        except Exception as error:
            yield kernel, error
