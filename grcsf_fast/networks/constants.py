"""Tensors that follow from numbers alone, made outside of whatever traces or redirects the code around them."""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["constant_tensors", "held_constants"]

KEPT = 64  # results of a function

_held: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar("held", default=None)


@contextmanager
def held_constants() -> Iterator[list[Tensor]]:
    """All constants on other devices that are used in the block, for whom their addresses have to stay good."""
    held: list[Tensor] = []
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)


def constant_tensors(make: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """A function that makes tensors from numbers, for use in a network that may be compiled or exported.

    Args:
        make: of positional arguments that are numbers or tuples of them; its tensors are on the CPU, whatever the
            default device, and of dtypes that it names.

    Returns:
        A function of the same arguments and of ``device``, where the tensors are wanted. They are kept from call to
        call: not to be written to. ``torch.compile`` and ``torch.export`` find constants, so what ``make`` does may
        depend on a generator or on the values of tensors; fake tensors stay fake.
    """

    @functools.lru_cache(KEPT)
    def kept(*numbers: object) -> tuple[Tensor, ...]:
        # Neither fake tensors nor ones of inference mode, which a later backward could not save.
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            return make(*numbers)

    def untraced(*numbers: object) -> tuple[Tensor, ...]:
        return kept(*numbers)

    # As torch.compiler.assume_constant_result would, without importing the compiler.
    untraced._dynamo_marked_constant = True
    moved: dict[tuple[object, torch.device], tuple[Tensor, ...]] = {}
    moving = threading.Lock()

    @functools.wraps(make)
    def constants(*numbers: object, device: torch.device) -> tuple[Tensor, ...]:
        if device.type == "cpu" or torch.compiler.is_compiling():
            # Lifted, as torch.tensor() lifts its result: known to a tracer, fake among fake tensors.
            return tuple(torch.ops.aten.lift_fresh(tensor).to(device) for tensor in untraced(*numbers))
        key = numbers, device
        tensors = moved.get(key)
        if tensors is None:
            tensors = tuple(torch.ops.aten.lift_fresh(tensor).to(device) for tensor in untraced(*numbers))
            if any(type(tensor) is not Tensor for tensor in tensors):
                return tensors
            with moving:
                if len(moved) >= KEPT:
                    moved.clear()
                tensors = moved.setdefault(key, tensors)
        if (held := _held.get()) is not None:
            held.extend(tensors)
        return tensors

    return constants
