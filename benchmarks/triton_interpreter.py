"""Triton's interpreter mended for bfloat16 and tf32, and an audit of what a kernel reads and writes in it.

The interpreter (TRITON_INTERPRET=1, set before triton is imported) keeps bfloat16 as bit patterns: its products
multiply them, and its casts cut instead of rounding; tf32 products it computes in full float32. :func:`mend` puts that
right, for Triton 3.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from benchmarks.triton_interpreter_speed import hasten

__all__ = ["Audit", "OutOfBoundsError", "RaceError", "Traffic", "mend"]

SECTOR = 32  # bytes; the least that a GPU's memory moves


def _widen(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even, as bits; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _tf32(numbers: np.ndarray) -> np.ndarray:
    """To the nearest number of 10 bits, ties away from 0, as ``cvt.rna.tf32``; what is not finite stays."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(numbers), rounded, numbers)


def _cut(numbers: np.ndarray) -> np.ndarray:
    """As a matrix unit reads float32: without the last 13 bits."""
    return (np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _three_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product as Triton compiles "tf32x3": what rounding leaves of each factor goes in two products of its own."""
    with np.errstate(invalid="ignore"):
        large_a, large_b = _tf32(a), _tf32(b)
        small = np.matmul(_cut(a - large_a), large_b) + np.matmul(large_a, _cut(b - large_b))
        return np.matmul(large_a, large_b) + np.where(np.isnan(small), np.float32(0), small)


def _is_narrow(handle: Any) -> bool:
    return handle.dtype is tl.bfloat16 or (not handle.dtype.is_ptr() and handle.dtype.scalar.name == "bf16")


def mend() -> None:
    """Once a process, before the first launch. bfloat16 arithmetic other than products raises: kernels cast first."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_mended", False):
        return
    builder._mended = True
    hasten()
    handle_of = interpreter.TensorHandle
    cast, dot, convert = builder.cast_impl, builder.create_dot, interpreter._convert_float

    def cast_rightly(self: Any, source: Any, target: Any) -> Any:
        if _is_narrow(source) and target.scalar != tl.bfloat16:
            wide = handle_of(_widen(source.data).reshape(source.data.shape), tl.float32)
            return wide if target.scalar == tl.float32 else cast(self, wide, target)
        if target.scalar == tl.bfloat16 and not _is_narrow(source):
            return handle_of(_narrow(source.data.astype(np.float32)).reshape(source.data.shape), tl.bfloat16)
        return cast(self, source, target)

    def convert_rightly(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.bfloat16 and target == tl.float32:
            return _widen(data).view(np.uint32).reshape(data.shape)
        if source == tl.float32 and target == tl.bfloat16 and rounding in (None, ir.ROUNDING_MODE.RTNE):
            return _narrow(data.view(np.float32)).reshape(data.shape)
        return convert(data, source, target, rounding)

    def dot_rightly(self: Any, a: Any, b: Any, into: Any, precision: Any, imprecise: Any) -> Any:
        def operand(handle: Any) -> Any:
            if _is_narrow(handle):
                return handle_of(_widen(handle.data).reshape(handle.data.shape), tl.float32)
            if handle.data.dtype == np.float16:
                return handle_of(handle.data.astype(np.float32), tl.float32)
            if handle.data.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32:
                return handle_of(_cut(handle.data).reshape(handle.data.shape), tl.float32)
            return handle

        if a.data.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32x3:
            return handle_of((_three_products(a.data, b.data) + into.data).astype(np.float32), into.dtype)
        return dot(self, operand(a), operand(b), into, precision, imprecise)

    builder.cast_impl, builder.create_dot, interpreter._convert_float = cast_rightly, dot_rightly, convert_rightly
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", lambda self, source, target: self.cast_impl(source, target))

    def refusing(operation: Any) -> Any:
        def checked(self: Any, *arguments: Any) -> Any:
            if operation.__name__ != "ternary_op" and any(
                isinstance(one, handle_of) and _is_narrow(one) for one in arguments
            ):
                raise TypeError("bfloat16 arithmetic in the interpreter would work on bit patterns: cast to float32")
            return operation(self, *arguments)

        return checked

    builder.binary_op, builder.unary_op = refusing(builder.binary_op), refusing(builder.unary_op)


class OutOfBoundsError(Exception):
    """A lane that is not masked off points outside every tensor of the launch."""


class RaceError(Exception):
    """Two programs of a launch use the same bytes, and at least one of them stores there; or one program stores and
    loads them, in whichever order, without a barrier between its threads."""


NOBODY, SEVERAL = -1, -2  # instead of a program's number
# Sums that are added to in place (add_part in kernels/triton): what is stored is made of what was loaded, so no lane
# stores before that. To load what was stored takes a barrier there too: other lanes may do it.
ADDED_TO = ("position_parts", "weights_parts")


@dataclass
class Traffic:
    """What a kernel moved of one argument, in bytes."""

    requested: int = 0
    sectors: int = 0
    touched: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    program: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # of the launch, which touched a byte
    phase: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # barriers of the launch before that


def _labelled(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An argument, or what is in a tuple and the tuples in it."""
    if isinstance(value, tuple):
        for place, one in enumerate(value):
            yield from _labelled(f"{name}[{place}]", one)
    else:
        yield name, value


class Audit:
    """Counts loads and stores of every launch inside ``with audit.on():``, and raises where one is wrong by itself.

    ``loads`` and ``stores`` are keyed by the kernel's argument; ``written_twice`` counts bytes that were
    stored more than once in a launch.
    """

    def __init__(self) -> None:
        self.loads: dict[str, Traffic] = {}
        self.stores: dict[str, Traffic] = {}
        self.written_twice = 0
        self._barriers = 0
        self._regions: list[tuple[int, int, str]] = []

    def _begin(self, names: list[str], values: list[Any]) -> None:
        self._regions = []
        for name, value in zip(names, values, strict=True):
            for label, one in _labelled(name, value):
                if not hasattr(one, "data_ptr") or not one.numel():
                    continue
                # From its first to its last element: a view's lie apart.
                last = sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True))
                size = (last + 1) * one.element_size()
                self._regions.append((one.data_ptr(), one.data_ptr() + size, label))
                for kind in (self.loads, self.stores):
                    kind[label] = kind.get(label, Traffic(touched=np.zeros(size, bool)))
                    kind[label].program = np.full(size, NOBODY, np.int32)
                    kind[label].phase = np.full(size, -1, np.int32)
                # Each launch writes anew.
                self.stores[label].touched = np.zeros(size, bool)

    def _check_alone(self, label: str, offsets: np.ndarray, storing: bool) -> None:
        """Raises where another program has used these bytes; notes that this one did."""
        place = interpreter.interpreter_builder.grid_idx
        sizes = interpreter.interpreter_builder.grid_dim
        program = (place[2] * sizes[1] + place[1]) * sizes[0] + place[0]
        for kind, what in ((self.stores, "stored"), (self.loads, "loaded"))[: 2 if storing else 1]:
            others = kind[label].program[offsets]
            others = others[(others != NOBODY) & (others != program)]
            if others.size:
                other = f"program {others[0]}" if others[0] >= 0 else "several programs"
                mine = "stores" if storing else "loads"
                raise RaceError(f"{label}: program {program} {mine} {others.size} bytes that {other} {what}")
        mine, other = (self.stores, self.loads) if storing else (self.loads, self.stores)
        near = other[label].phase[offsets] == self._barriers
        if near.any() and not (storing and label.startswith(ADDED_TO)):
            does, did = ("stores", "loaded") if storing else ("loads", "stored")
            raise RaceError(
                f"{label}: program {program} {does} {near.sum()} bytes that it {did} before, without a barrier"
            )
        mine[label].phase[offsets] = self._barriers
        users = mine[label].program
        users[offsets] = np.where((users[offsets] == NOBODY) | (users[offsets] == program), program, SEVERAL)

    def _see(self, kind: dict[str, Traffic], pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        used = np.broadcast_to(mask.data, shape).astype(bool)
        addresses = np.broadcast_to(pointers.data, shape)[used].astype(np.int64)
        for begin, end, label in self._regions:
            inside = (addresses >= begin) & (addresses + size <= end)
            if not inside.any():
                continue
            found = addresses[inside]
            traffic = kind[label]
            traffic.requested += found.size * size
            traffic.sectors += np.unique(found // SECTOR).size * SECTOR
            offsets = ((found - begin)[:, None] + np.arange(size)).ravel()
            self._check_alone(label, offsets, kind is self.stores)
            if kind is self.stores:
                self.written_twice += int(traffic.touched[offsets].sum()) + offsets.size - np.unique(offsets).size
            traffic.touched[offsets] = True
            addresses = addresses[~inside]
        if addresses.size:
            nearest = min(
                (
                    (min(abs(addresses[0] - begin), abs(addresses[0] - end)), label)
                    for begin, end, label in self._regions
                )
            )
            raise OutOfBoundsError(
                f"{addresses.size} lanes outside every tensor, the first {nearest[0]} bytes off {nearest[1]}"
            )

    @contextmanager
    def on(self) -> Iterator[Audit]:
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store = builder.create_masked_load, builder.create_masked_store
        rmw, begin, barrier = builder.create_atomic_rmw, executor._init_args_hst, builder.create_barrier
        audit = self

        def load_seen(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            audit._see(audit.loads, pointers, mask)
            return load(self, pointers, mask, *rest)

        def store_seen(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            audit._see(audit.stores, pointers, mask)
            return store(self, pointers, value, mask, *rest)

        def rmw_seen(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            raise AssertionError("these kernels promise to use no atomics")

        def barrier_seen(self: Any) -> Any:
            audit._barriers += 1
            return barrier(self)

        def begin_seen(self: Any, values: Any, named: Any) -> Any:
            on_host, named_on_host = begin(self, values, named)
            audit._begin([*self.arg_names[: len(on_host)], *named_on_host], [*on_host, *named_on_host.values()])
            return on_host, named_on_host

        builder.create_masked_load, builder.create_masked_store = load_seen, store_seen
        builder.create_atomic_rmw, executor._init_args_hst = rmw_seen, begin_seen
        builder.create_barrier = barrier_seen
        try:
            yield self
        finally:
            builder.create_masked_load, builder.create_masked_store = load, store
            builder.create_atomic_rmw, executor._init_args_hst = rmw, begin
            builder.create_barrier = barrier

    @property
    def requested(self) -> int:
        return sum(one.requested for kind in (self.loads, self.stores) for one in kind.values())

    @property
    def sectors(self) -> int:
        return sum(one.sectors for kind in (self.loads, self.stores) for one in kind.values())
