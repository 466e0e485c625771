"""Triton's interpreter without what it does again and again: a third of the time for the same results.

A kernel on small blocks spends nearly all of its time there in Python, not in numpy: every call of a function patches
``triton.language`` anew, and every operation builds descriptions of types and shapes that were built before.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

__all__ = ["hasten"]

_POINTERS = np.dtype(np.uint64)


class _Scope:
    """What was patched since a launch began; :meth:`restore` is the launch's end, that of a function in it nothing."""

    def __init__(self, restore: Any = None) -> None:
        self.restore = restore or (lambda: None)


def _patch_once() -> None:
    """A launch patches ``triton.language``, as each module names it, at the first function that needs it."""
    patch = interpreter._patch_lang
    modules: dict[int, frozenset[str]] = {}
    patched: dict[frozenset[str], Any] = {}

    def restore() -> None:
        for scope in reversed(patched.values()):
            scope.restore()
        patched.clear()

    def patch_once(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in modules:
            modules[id(names)] = frozenset(one.__name__ for one in names.values() if one is tl or one is core)
        first = not patched
        if modules[id(names)] not in patched:
            patched[modules[id(names)]] = patch(function)
        return _Scope(restore if first else None)

    interpreter._patch_lang = patch_once


def _number_types() -> None:
    """A lookup by name, where a table of all types was made for each question."""
    original, known = interpreter._get_np_dtype, {}

    def number_type(kind: Any) -> np.dtype:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if isinstance(element, tl.pointer_type):
            return _POINTERS
        if element.name not in known:
            known[element.name] = original(element)
        return known[element.name]

    interpreter._get_np_dtype = number_type


def _shapes() -> None:
    """Types of blocks and shapes of tensors are made once each; nothing changes them later."""
    make_block, check = core.block_type.__init__, core.block_type.with_element_ty

    @functools.cache
    def described(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])

    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def block(self: Any, element: Any, shape: Any) -> None:
        sizes = tuple(one.value if isinstance(one, core.constexpr) else one for one in shape)
        key = element.name, sizes
        if key in blocks:
            vars(self).update(blocks[key])
            self.element_ty = element
        else:
            make_block(self, element, shape)
            blocks[key] = dict(vars(self))

    def with_element(self: Any, scalar: Any) -> Any:
        return self if scalar is self.element_ty else check(self, scalar)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = described(tuple(type.shape) if type.is_block() else ())

    core.block_type.__init__, core.block_type.with_element_ty = block, with_element
    core.tensor.__init__ = tensor


def _broadcasts() -> None:
    """Two of one shape already are what they are broadcast to."""
    original = TritonSemantic.broadcast_impl_value

    def broadcast(self: Any, left: Any, right: Any) -> Any:
        if left.type.is_block() and right.type.is_block() and left.type.shape.values == right.type.shape.values:
            return left, right
        return original(self, left, right)

    TritonSemantic.broadcast_impl_value = broadcast


def _overflow() -> None:
    """The check of sums and products of integers in one comparison of numpy's instead of eight operations."""
    original = TritonSemantic.binary_op_sanitize_overflow_impl
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, left: Any, right: Any, operation: Any) -> None:
        kind, run = left.type.scalar, operations.get(operation.__name__)
        if run is not None and kind.is_int() and kind.int_bitwidth <= 32:
            exact = run(left.handle.data, right.handle.data, dtype=np.int64)
            if exact.min() >= kind.get_int_min_value() and exact.max() <= kind.get_int_max_value():
                return
        original(self, left, right, operation)

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _equality() -> None:
    """Of types: most that are compared are the same object."""
    original = core.dtype.__eq__

    def equal(self: Any, other: Any) -> bool:
        return self is other or original(self, other)

    core.dtype.__eq__ = equal
    core.dtype.__hash__ = lambda self: hash(self.name)


def hasten() -> None:
    """Once a process, before the first launch; for Triton 3.7."""
    for change in (_equality, _patch_once, _number_types, _shapes, _broadcasts, _overflow):
        change()
