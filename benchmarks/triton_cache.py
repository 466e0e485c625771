"""Bytes that the Triton kernels move between a GPU's memory and its L2 cache, by a model of that cache.

What the model is:

- An L2 of the GPU's size, fully associative, of 32-byte sectors; the one goes that was used longest ago. A load of a
  sector that is not there reads it; what was stored is written when it goes, or at the end.
- Programs begin in the order of the launch, so many at once as a multiprocessor has room for, and go on in step; all of
  them have finished before the next ones begin.
- In front of it each program has a share of the multiprocessor's L1: what lies within so many bytes of what it asked
  for last, it does not ask the L2 for again.

Sizes: NVIDIA H100 and A100 Tensor Core GPU Architecture (white papers), Ada GPU Architecture (white paper); sectors and
lines: "Memory Tables" of the Nsight Compute documentation. Real caches hash addresses, are cut into partitions and
choose what goes by rules that are not published.

What a program asks for is recorded in Triton's interpreter, from a few programs of a launch: those at the edges of the
image and one between. All others between them ask for the same, moved by as much as one is from the next; that this is
so is checked on a second one along each axis.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from triton.runtime import interpreter

__all__ = ["GPUS", "Gpu", "Launched", "Lru", "recorded", "replay", "to_record"]

SECTOR, UNIT = 32, 4  # bytes; of a sector, and of the steps by which programs are moved


@dataclass(frozen=True)
class Gpu:
    """L2 and L1 in bytes; ``multiprocessors`` run so many programs of a kernel at once, each."""

    l2: int
    l1: int
    multiprocessors: int


GPUS = {
    "H100": Gpu(50 * 2**20, 256 * 2**10, 132),
    "A100": Gpu(40 * 2**20, 192 * 2**10, 108),
    "RTX 4090": Gpu(72 * 2**20, 128 * 2**10, 128),
}

Access = tuple[str, bool, np.ndarray]
"""Argument, whether stored, and bytes from the argument's first one."""


@dataclass
class Launched:
    """A launch: ``regions`` are first byte and size of each argument; ``programs`` the accesses of those recorded."""

    kernel: str
    grid: tuple[int, ...]
    regions: dict[str, tuple[int, int]]
    programs: dict[tuple[int, ...], list[Access]] = field(default_factory=dict)


def _labelled(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        for place, one in enumerate(value):
            yield from _labelled(f"{name}[{place}]", one)
    elif hasattr(value, "data_ptr") and value.numel():
        yield name, value


@contextmanager
def recorded(chosen: Callable[[str, tuple[int, ...]], Sequence[tuple[int, ...]]]) -> Iterator[list[Launched]]:
    """Launches inside run only the programs ``chosen`` by kernel and grid; the list gets what they asked for."""
    launches: list[Launched] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    accesses: list[Access] = []

    def see(pointers: Any, mask: Any, stored: bool) -> None:
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        found = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape).astype(bool)]
        if found.size:
            label, begin = next(
                (label, begin)
                for label, (begin, size) in launches[-1].regions.items()
                if begin <= found.flat[0] < begin + size
            )
            accesses.append((label, stored, found.astype(np.int64) - begin))

    def load_seen(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        see(pointers, mask, False)
        return load(self, pointers, mask, *rest)

    def store_seen(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        see(pointers, mask, True)
        return store(self, pointers, value, mask, *rest)

    def run(self: Any, *values: Any, **named: Any) -> None:
        named = {key: value for key, value in named.items() if key in self.arg_names}
        given = inspect.getcallargs(self.fn, *values, **named)
        regions = {}
        for name, value in given.items():
            for label, one in _labelled(name, value):
                last = sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True))
                regions[label] = one.data_ptr(), (last + 1) * one.element_size()
        grid = tuple(self.grid)
        launched = Launched(self.fn.__name__, grid, regions)
        launches.append(launched)
        scope = interpreter._patch_lang(self.fn)
        try:
            converted = {
                name: value if name in self.constexprs else interpreter._implicit_cvt(value)
                for name, value in given.items()
            }
            interpreter.interpreter_builder.set_grid_dim(*grid, *[1] * (3 - len(grid)))
            for program in chosen(launched.kernel, grid):
                accesses.clear()
                interpreter.interpreter_builder.set_grid_idx(*program, *[0] * (3 - len(program)))
                self.fn(**converted)
                launched.programs[program] = list(accesses)
        finally:
            scope.restore()

    executor.__call__, builder.create_masked_load, builder.create_masked_store = run, load_seen, store_seen
    try:
        yield launches
    finally:
        executor.__call__, builder.create_masked_load, builder.create_masked_store = call, load, store


class Lru:
    """The cache, for sectors numbered from 0; counts bytes ``read`` and ``written``."""

    def __init__(self, size: int, sectors: int) -> None:
        self.capacity, self.held = size // SECTOR, 0
        self.used = np.full(sectors, -1, np.int32)  # the round of its last use, -1 where it is not there
        self.dirty = np.zeros(sectors, bool)
        self.marks = np.zeros(sectors, bool)
        self.rounds: list[np.ndarray | None] = []
        self.oldest = self.read = self.written = 0

    def use(self, sectors: np.ndarray, stored: bool) -> None:
        """A round: all of these at once, each counts once."""
        fresh = sectors[self.used[sectors] < 0]
        self.held += fresh.size
        if stored:
            self.dirty[sectors] = True
        else:
            self.read += fresh.size * SECTOR
        self.used[sectors] = len(self.rounds)
        self.rounds.append(sectors)
        while self.held > self.capacity:
            self._drop()

    def use_all(self, first: int, size: int, stored: bool) -> None:
        """So many bytes, from their first to their last, a megabyte a round."""
        sectors = np.arange(first, first + -(-size // SECTOR))
        for begin in range(0, sectors.size, 2**20 // SECTOR):
            self.use(sectors[begin : begin + 2**20 // SECTOR], stored)

    def _drop(self) -> None:
        """The sectors of the oldest round that were not used since, as many as have to go."""
        sectors = self.rounds[self.oldest]
        gone = sectors[self.used[sectors] == self.oldest][: self.held - self.capacity]
        if not gone.size:
            self.rounds[self.oldest] = None
            self.oldest += 1
            return
        self.written += int(self.dirty[gone].sum()) * SECTOR
        self.dirty[gone] = False
        self.used[gone] = -1
        self.held -= gone.size

    def end(self) -> None:
        """What is left of the stores is written."""
        self.written += int(self.dirty.sum()) * SECTOR
        self.dirty[:] = False


def _edges(size: int) -> list[int]:
    """Places along an axis that are recorded: all, or both ends and the second."""
    return list(range(size)) if size <= 3 else [0, 1, size - 1]


def to_record(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Places among programs of so many along each axis, from which :func:`replay` knows all others."""
    places = list(itertools.product(*map(_edges, sizes)))
    between = tuple(1 if size > 3 else 0 for size in sizes)
    for axis, size in enumerate(sizes):
        if size > 3:
            places.append(tuple(2 if other == axis else one for other, one in enumerate(between)))
    return places


def _steps(records: dict[tuple[int, ...], list[Access]], sizes: Sequence[int]) -> list[list[int]]:
    """By how many bytes each access of a program differs from that of the next program along each axis."""
    between = tuple(1 if size > 3 else 0 for size in sizes)
    steps = []
    for axis, size in enumerate(sizes):
        if size <= 3:
            steps.append([0] * len(records[between]))
            continue
        step = []
        other = records[tuple(2 if one == axis else place for one, place in enumerate(between))]
        for (label, stored, first), (_, _, second) in zip(records[between], other, strict=True):
            moved = second - first
            if (moved != moved[0]).any() or moved[0] % UNIT:
                raise AssertionError(f"{label}, {'stored' if stored else 'loaded'}: programs are not alike")
            step.append(int(moved[0]))
        steps.append(step)
    return steps


@dataclass
class _Part:
    """Accesses in a row that the L1 holds together: by (argument, stored, steps) units, each once."""

    groups: list[tuple[str, bool, tuple[int, ...], np.ndarray]]


def _parts(accesses: list[Access], steps: list[list[int]], l1: int) -> list[_Part]:
    parts: list[_Part] = []
    collected: dict[tuple[str, bool, tuple[int, ...]], list[np.ndarray]] = {}
    seen: dict[tuple[str, bool], set[int]] = {}
    held = 0

    def close() -> None:
        nonlocal held
        if collected:
            groups = [(*key, np.unique(np.concatenate(units))) for key, units in collected.items()]
            parts.append(_Part(groups))
        collected.clear()
        seen.clear()
        held = 0

    for number, (label, stored, found) in enumerate(accesses):
        sectors = set(np.unique(found // SECTOR).tolist())
        have = seen.setdefault((label, stored), set())
        if collected and held + len(sectors - have) * SECTOR > l1:
            close()
            have = seen.setdefault((label, stored), set())
        held += len(sectors - have) * SECTOR
        have |= sectors
        key = label, stored, tuple(step[number] for step in steps)
        collected.setdefault(key, []).append(np.unique(found // UNIT))
    close()
    return parts


def replay(
    launched: Launched,
    sizes: Sequence[int],
    place_of: Mapping[tuple[int, ...], tuple[int, ...]],
    backwards: bool,
    cache: Lru,
    first_sector: dict[int, int],
    resident: int,
    l1: int,
    private: dict[str, int],
    left: dict[str, int],
) -> None:
    """A launch of so many programs along each axis through the cache.

    Args:
        launched: what :func:`recorded` has of the programs of :func:`to_record`.
        sizes: programs along each axis, the fastest one last.
        place_of: of a program's number in the grid its place along the axes.
        backwards: whether the last one begins first.
        cache: where it goes.
        first_sector: number of the first sector of a tensor, by its address.
        resident: programs at once.
        l1: bytes that a program's share of the L1 holds.
        private: arguments of which each resident program has so many bytes of its own: read, but for the first time,
            and written.
        left: arguments of which so many bytes are written in the end.
    """
    records = {}
    own: list[Access] = []
    for program, accesses in launched.programs.items():
        records[place_of[program]] = [one for one in accesses if one[0] not in private and one[0] not in left]
        own = [one for one in accesses if one[0] in private and one[1]]
    own_units = {
        label: np.unique(np.concatenate([found for name, _, found in own if name == label]) // UNIT)
        for label in dict.fromkeys(label for label, _, _ in own)
    }
    steps = _steps(records, sizes)
    parts = {place: _parts(accesses, steps, l1) for place, accesses in records.items()}
    total = math.prod(sizes)
    order = np.arange(total)[::-1] if backwards else np.arange(total)
    places = np.stack(np.unravel_index(order, sizes), 1)
    likes, moves = [], []
    for axis, size in enumerate(sizes):
        along = places[:, axis]
        interior = (along > 1) & (along < size - 1) & (size > 3)
        likes.append(np.where(interior, 1, along))
        moves.append(np.where(interior, along - 1, 0))
    likes, moves = np.stack(likes, 1), np.stack(moves, 1)
    for begin in range(0, total, resident):
        like, move = likes[begin : begin + resident], moves[begin : begin + resident]
        kinds, which = np.unique(like, axis=0, return_inverse=True)
        which = which.reshape(-1)
        longest = max(len(parts[tuple(kind)]) for kind in kinds.tolist())
        for number in range(longest):
            asked: dict[bool, list[np.ndarray]] = {False: [], True: []}
            for kind, place in enumerate(kinds.tolist()):
                if number >= len(parts[tuple(place)]):
                    continue
                shifts = move[which == kind]
                for label, stored, step, units in parts[tuple(place)][number].groups:
                    base = launched.regions[label][0]
                    moved = np.unique(shifts @ np.asarray(step, np.int64)) // UNIT
                    sectors = (units[None, :] + moved[:, None] + base % SECTOR // UNIT) * UNIT // SECTOR
                    asked[stored].append(first_sector[base] + sectors.ravel())
            for stored in (False, True):
                if asked[stored]:
                    cache.use(_distinct(np.concatenate(asked[stored]), cache), stored)
        for label, units in own_units.items():
            base, each = launched.regions[label][0], private[label]
            local = units - units.min()
            slots = np.arange(len(like))[:, None] * (each // UNIT)
            sectors = np.unique(first_sector[base] + (local[None, :] + slots) * UNIT // SECTOR)
            if begin:
                cache.use(sectors, False)
            cache.use(sectors, True)
    for label, size in left.items():
        cache.use_all(first_sector[launched.regions[label][0]], size, True)


def _distinct(sectors: np.ndarray, cache: Lru) -> np.ndarray:
    """Each once, in their order: by marks, which is faster than sorting."""
    marks = cache.marks
    marks[sectors] = True
    low = int(sectors.min())
    found = np.flatnonzero(marks[low : int(sectors.max()) + 1]) + low
    marks[found] = False
    return found
