"""Bytes between memory and L2 of each call of the two ops, and what they may be at the most.

An image stands for the batch: it has that part of the L2 and of the multiprocessors, and reads the weights, which count
as ideal. Operations of PyTorch's within a backward count with all that they read and write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.ops import HEADS, MAPS, RESIDUAL, patch_of
from benchmarks.peers import OPS
from benchmarks.triton_cache import GPUS, SECTOR, Lru, recorded, replay, to_record
from grcsf_fast.kernels.triton import gcu, grouped, patches, rcu, rcu_backward
from grcsf_fast.reference import AttentionWeights

__all__ = [
    "GPU", "RESIDENT", "Moved", "Shape", "TorchBytes", "call", "incoming", "measure", "most_launches",
    "most_over_ideal", "tensors_of",
]  # fmt: skip

Shape = tuple[int, int, tuple[int, ...]]

GPU = "H100"
# Programs of a kernel that a multiprocessor of an H100 has registers for, the fewest of all entries (column "occupancy"
# of the compile report); of the backward of op 2 no more are launched.
RESIDENT = {
    (OPS[0], "_forward_kernel"): 2, (OPS[0], "_fine_kernel"): 2, (OPS[0], "_coarse_kernel"): 3,
    (OPS[1], "_forward_kernel"): 2, (OPS[1], "_patches_kernel"): 2, (OPS[1], "_channels_kernel"): 2,
}  # fmt: skip
# Kernels whose programs begin with the last pixels or patches.
BACKWARDS = {OPS[0]: ("_forward_kernel", "_fine_kernel"), OPS[1]: ("_channels_kernel",)}
# Patterns of an entry of the report, and the most bytes over the ideal; the first row counts that matches. Both kernels
# of the backward of op 1, and of op 2 in two launches, read the features (or x) and the incoming gradient, from memory
# where these are larger than the L2; the latter pass on 128 numbers per pixel, and where tensors are small the
# programs' sums count. So the rows of backwards are not what one could wish for but what the model gave, rounded up;
# one that grows shows.
MOST: tuple[tuple[str, float], ...] = (
    ("global_compensation forward", 1.10),
    ("patch_cross_attention forward", 1.15),
    ("global_compensation backward.* 96x96x96", 1.80),
    ("global_compensation backward.* 48x48x48", 1.60),
    ("global_compensation backward.* 224x224", 1.55),
    ("global_compensation backward", 1.50),
    ("patch_cross_attention backward.* C32 ", 1.15),
    ("patch_cross_attention backward.* C64 ", 1.40),
    ("patch_cross_attention backward, bfloat16, .* C128 ", 1.61),
    ("patch_cross_attention backward.* C128 ", 1.90),
    ("patch_cross_attention backward", 1.40),
)
# Kernels of a call, sums and operations of PyTorch's included.
LAUNCHES = {(OPS[0], False): 1, (OPS[0], True): 3, (OPS[1], False): 1, (OPS[1], True): 4}


def most_over_ideal(entry: str) -> float:
    return next(most for pattern, most in MOST if re.search(pattern, entry))


def most_launches(op: str, backward: bool) -> int:
    return LAUNCHES[op, backward]


@dataclass
class Moved:
    """Of one image: launches; bytes by kernel (read, written), those of PyTorch's operations and how many these are;
    the ideal of all tensors."""

    launches: list[str]
    kernels: dict[str, tuple[int, int]]
    torch_bytes: int
    torch_calls: int
    ideal: int

    @property
    def launched(self) -> int:
        return len(self.launches) + self.torch_calls

    @property
    def ratio(self) -> float:
        return (sum(map(sum, self.kernels.values())) + self.torch_bytes) / self.ideal


class TorchBytes(TorchDispatchMode):
    """What operations of PyTorch's read and write; views and memory that is only asked for move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = op(*arguments, **(named or {}))
        inputs = [one for one in tree_leaves((arguments, named)) if isinstance(one, Tensor)]
        outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        stored = {one.untyped_storage().data_ptr() for one in inputs}
        fresh = [one for one in outputs if one.untyped_storage().data_ptr() not in stored]
        if fresh and "empty" not in op._schema.name:
            self.calls += 1
            self.bytes += sum(one.nbytes for one in (*inputs, *fresh))
        return result


def tensors_of(
    op: str, channels: int, spatial: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """Arguments of an image, all zeros, of which most is never touched."""

    def zeros(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=device)

    if op == OPS[0]:
        half = [size // 2 for size in spatial]
        large = zeros(1, channels, *spatial, kind=dtype), zeros(1, channels, *half, kind=dtype)
        return [*large, zeros(1, channels), zeros(1, channels), zeros(channels)]
    tokens, width = patch_of(spatial) ** len(spatial), channels // 2
    maps = zeros(1, MAPS, RESIDUAL, *spatial, kind=dtype)
    return [
        zeros(1, channels, *spatial, kind=dtype), maps, torch.zeros_like(maps), zeros(MAPS, HEADS, RESIDUAL, channels),
        zeros(MAPS, HEADS, RESIDUAL), zeros(HEADS, tokens, tokens), zeros(MAPS, HEADS, channels, RESIDUAL),
        zeros(channels), zeros(width, channels), zeros(1, width), zeros(width), zeros(),
    ]  # fmt: skip


def incoming(op: str, tensors: Sequence[Tensor], patch: int) -> list[Tensor]:
    """Gradients of the two outputs."""
    if op == OPS[0]:
        return [torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0][:, :1])]
    batch, _, *spatial = tensors[0].shape
    return [torch.zeros_like(tensors[0]), torch.zeros(batch, 1, *(size // patch for size in spatial))]


def call(op: str, grads: Sequence[Tensor], tensors: Sequence[Tensor], patch: int) -> list[Tensor]:
    """The kernels: those of the backward where there are gradients, else those of the forward."""
    if op == OPS[0]:
        scales = [tuple(tensors)]
        return list(
            (gcu.backward([tuple(grads)], scales, 1e-6, [[True] * 5]) if grads else gcu.forward(scales, 1e-6))[0]
        )
    given = *tensors[:3], AttentionWeights(*tensors[3:]), patch, 0.0
    return list(rcu_backward.backward(*grads, *given, [True] * 12) if grads else rcu.forward(*given))


def _axes(op: str, kernel: str, channels: int, spatial: Sequence[int]) -> tuple[int, ...]:
    """Programs along each axis of a launch, the fastest one last."""
    volume = (1, *spatial) if len(spatial) == 2 else tuple(spatial)
    if op == OPS[1]:
        patch = patch_of(spatial)
        grid = tuple(-(-size // (patch if size > 1 else 1)) for size in volume)
        tokens, blocks = patch ** len(spatial), -(-channels // 32)
        return (*grid, *{"_forward_kernel": (-(-tokens // 32),), "_channels_kernel": (blocks,)}.get(kernel, ()))
    pixels = gcu.PIXELS // (4 if kernel == "_coarse_kernel" else len(spatial) - 1)
    if kernel == "_coarse_kernel":
        volume = tuple(max(1, size // 2) for size in volume)
    tile = grouped.tile_of(channels, volume, pixels)
    tiles = tuple(-(-size // edge) for size, edge in zip(volume, tile[1:4], strict=True))
    return (*tiles, -(-channels // tile.channels)) if kernel == "_coarse_kernel" else tiles


@contextmanager
def _a_patch_per_program() -> Iterator[None]:
    """In both kernels of the backward of op 2, so that a program is known from one of its patches."""
    plan = patches.Launch.plan_backward

    def spread(self: patches.Launch, device: torch.device) -> patches.BackwardPlan:
        return plan(self, device)._replace(programs=self.patches, splits=self.patches)

    patches.Launch.plan_backward = spread
    try:
        yield
    finally:
        patches.Launch.plan_backward = plan


def _plan(tensors: Sequence[Tensor], patch: int, batch: int) -> patches.BackwardPlan:
    """Of the backward of op 2, for a batch of such images."""
    launch = patches.Launch(tensors[0], AttentionWeights(*tensors[3:]), patch)
    launch.patches *= batch
    return launch.plan_backward(torch.device("cpu"))


def measure(op: str, backward: bool, dtype: torch.dtype, shape: Shape) -> Moved:
    """An image of the batch through the model of the caches."""
    batch, channels, spatial = shape
    patch, dims = patch_of(spatial), len(spatial)
    if op == OPS[1]:
        spatial = tuple(-(-size // patch) * patch for size in spatial)
    tensors = tensors_of(op, channels, spatial, dtype)
    grads = incoming(op, tensors, patch) if backward else []

    def number(kernel: str, grid: tuple[int, ...], place: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
        flat = 0
        for at, size in zip(place, sizes, strict=True):
            flat = flat * size + at
        if op == OPS[0] and kernel in BACKWARDS[op]:
            return (grid[0] - 1 - flat,)
        if kernel == "_channels_kernel":
            return flat % sizes[-1], math.prod(sizes[:-1]) - 1 - flat // sizes[-1]
        return (flat,)

    places: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}

    def chosen(kernel: str, grid: tuple[int, ...]) -> list[tuple[int, ...]]:
        if kernel == "_sums_kernel":
            return []
        sizes = _axes(op, kernel, channels, spatial)
        found = {number(kernel, grid, place, sizes): place for place in to_record(sizes)}
        places.update({(kernel, program): place for program, place in found.items()})
        return list(found)

    plan = _plan(tensors, patch, batch) if op == OPS[1] else None
    with _a_patch_per_program(), TorchBytes() as counted, recorded(chosen) as launches:
        made = call(op, grads, tensors, patch)
    first_sector: dict[int, int] = {}
    sectors = 0
    known: list[tuple[int, int]] = []
    for launched in launches:
        for begin, size in launched.regions.values():
            whole = next((one for one, end in known if one <= begin < end), None)
            if whole is None:
                known.append((begin, begin + size))
                first_sector[begin] = sectors
                sectors += size // SECTOR + 2
            elif begin != whole:  # a view
                first_sector[begin] = first_sector[whole] + begin // SECTOR - whole // SECTOR
    limits = GPUS[GPU]
    cache = Lru(limits.l2 // batch, sectors)
    moved: dict[str, tuple[int, int]] = {}
    parts: dict[int, int] = {}  # bytes of what programs leave, by their address
    for launched in launches:
        before = cache.read, cache.written
        if launched.kernel == "_sums_kernel":
            for begin, size in (one for name, one in launched.regions.items() if name.startswith("parts")):
                cache.use_all(first_sector[begin], parts.get(begin, size), False)
        else:
            each = RESIDENT[op, launched.kernel]
            resident = max(1, each * limits.multiprocessors // batch)
            sizes = _axes(op, launched.kernel, channels, spatial)
            private, left = {}, {}
            row = MAPS * HEADS * RESIDUAL * 4
            rows = row * channels, row * channels, row, channels * 4  # of the weights' gradients
            if launched.kernel == "_patches_kernel":
                resident = min(resident, -(-plan.programs // batch))
                private = {"position_parts": HEADS * patch ** (2 * dims) * 4}
                if plan.fused:
                    kept = patch**dims * MAPS * HEADS * RESIDUAL * dtype.itemsize
                    private |= {f"weights_parts[{number}]": size for number, size in enumerate(rows)}
                    private |= {"query_grads": kept, "reads": kept}
            if launched.kernel == "_channels_kernel":
                splits = -(-plan.splits // batch)
                left = {f"weights_parts[{number}]": splits * size for number, size in enumerate(rows)}
                # By the first block of channels.
                left |= {name: launched.regions[name][1] for name in ("unit_grads", "vector_parts")}
            of_program = {program: places[launched.kernel, program] for program in launched.programs}
            replay(
                launched, sizes, of_program, launched.kernel in BACKWARDS[op], cache, first_sector, resident,
                limits.l1 // each, private, left,
            )  # fmt: skip
            programs = min(resident, math.prod(sizes))
            kept_places = ("query_grads", "reads")
            sizes_of = left | {name: size * programs for name, size in private.items() if name not in kept_places}
            parts |= {launched.regions[name][0]: size for name, size in sizes_of.items()}
        if launched is launches[-1]:
            cache.end()
        read, written = moved.get(launched.kernel, (0, 0))
        moved[launched.kernel] = read + cache.read - before[0], written + cache.written - before[1]
    once = sum(one.nbytes for one in (*tensors, *grads, *made))
    return Moved([one.kernel for one in launches], moved, counted.bytes, counted.calls, once)
