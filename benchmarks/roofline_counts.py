"""What a GPU has to move and to multiply for a network: counted from the operations that PyTorch dispatches.

The network runs once on fake tensors, which have shapes and no numbers, with the Triton kernels as single operations.
For the reference each of these is then taken apart into the operations of its plain PyTorch form, at the same shapes,
and all others stay. What an operation moves is what it is given and what it makes, once each; views move nothing. Of
convolutions, as cuDNN runs them, the bias is an operation of its own, and the backward one per gradient. How often the
Triton kernels read something again comes from benchmarks/triton_dram.py, how often they launch from a recorded call.
"""

from __future__ import annotations

import os

os.environ |= {"TRITON_INTERPRET": "1", "GRCSF_CHECK": "0"}  # before triton is imported: the kernels serve the CPU

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import triton_dram
from benchmarks.peers import OPS
from benchmarks.triton_cache import recorded
from benchmarks.triton_traffic import matrix_operations
from grcsf_fast import GRCSF, GRCSFLoss, reference, use_backend
from grcsf_fast.kernels.triton import norm, patches, pooling
from grcsf_fast.ops import plain
from grcsf_fast.reference import AttentionWeights

__all__ = ["KINDS", "OURS", "Count", "Item", "counted_forward", "counted_step"]

HALF, TF32, THREE_TF32, VECTOR = "half precision", "tf32", "three of tf32", "float32"
"""What multiplies: the matrix units in bfloat16 or float16, in tf32, or three times for one; or none of them."""
CONVOLUTIONS, BIASES, UPSAMPLING = "convolutions", "biases of convolutions", "upsampling"
NORM, POOLING, OP_1, OP_2 = "norm and activation", "pooling", "op 1", "op 2"
OP_2_APART = "op 2, in two launches"  # its backward
COPIES, LOSS, OPTIMIZER, REST = "copies and conversions", "loss", "optimizer", "the rest"
KINDS = (OP_1, OP_2, NORM, POOLING, CONVOLUTIONS, BIASES, UPSAMPLING, COPIES, LOSS, OPTIMIZER, REST)
OURS = KINDS[:4]  # those with Triton kernels
NAMED = {
    "cat": COPIES, "copy_": COPIES, "_to_copy": COPIES, "clone": COPIES, "constant_pad_nd": COPIES, "repeat": COPIES,
    "slice_backward": COPIES, "split_with_sizes": COPIES, "max_pool2d_with_indices": POOLING,
}  # fmt: skip
UNWRITTEN = ("empty", "detach", "alias")  # operations that make a tensor and write nothing
NOT_READ = ("copy_", "fill_", "zero_")  # in place, and what was there before does not matter


class Item(NamedTuple):
    """An operation: kind, bytes, multiplications and additions, by which unit these are done, and launches."""

    kind: str
    bytes: float
    operations: float
    unit: str
    launches: int


class Count(NamedTuple):
    """The same work by the Triton kernels and by plain PyTorch."""

    ours: list[Item]
    reference: list[Item]


def _tensors(of: Any) -> list[Tensor]:
    return [one for one in tree_leaves(of) if isinstance(one, Tensor)]


def moved(op: Any, arguments: Any, named: Any, result: Any) -> int:
    """Bytes read and written: 0 of a view, or of memory that is only asked for."""
    short = op._schema.name.rpartition("::")[2]
    if short.startswith(UNWRITTEN) or short.startswith("new_empty"):
        return 0
    inputs = _tensors((arguments, named))
    given = zip(op._schema.arguments, arguments, strict=False)
    changed = _tensors([value for one, value in given if one.alias_info is not None and one.alias_info.is_write])
    stored = {one.untyped_storage()._cdata for one in inputs}
    made = changed or [one for one in _tensors(result) if one.untyped_storage()._cdata not in stored]
    if not made:
        return 0
    unread = {id(one) for one in changed} if short in NOT_READ else set()
    # An expanded tensor is as large as its storage.
    reads = {
        one.untyped_storage()._cdata: min(one.nbytes, one.untyped_storage().nbytes())
        for one in inputs
        if id(one) not in unread
    }
    return sum(reads.values()) + sum(one.nbytes for one in made)


def _matrix_unit(tensor: Tensor, float32: str) -> str:
    return HALF if tensor.element_size() == 2 else float32


def _flops(op: Any, arguments: Any, named: Any, result: Any) -> float:
    return float(flop_registry[op.overloadpacket](*arguments, **named, out_val=result))


def _convolution(op: Any, arguments: Any, named: Any, result: Tensor) -> Iterator[Item]:
    x, weight, bias, *_ = arguments
    kind, size = UPSAMPLING if arguments[6] else CONVOLUTIONS, result.nbytes
    unit = _matrix_unit(x, TF32)  # which PyTorch lets convolutions in float32 take
    yield Item(kind, x.nbytes + weight.nbytes + size, _flops(op, arguments, named, result), unit, 1)
    if bias is not None:
        yield Item(BIASES, 2 * size, result.numel(), VECTOR, 1)


def _convolution_backward(op: Any, arguments: Any, named: Any, result: Any) -> Iterator[Item]:
    grad, x, weight, *_ = arguments
    wanted = arguments[10]
    kind, each = UPSAMPLING if arguments[7] else CONVOLUTIONS, grad.nbytes + x.nbytes + weight.nbytes
    count = sum(wanted[:2])
    for _ in range(count):
        yield Item(kind, each, _flops(op, arguments, named, result) / count, _matrix_unit(x, TF32), 1)
    if wanted[2]:
        yield Item(BIASES, grad.nbytes, grad.numel(), VECTOR, 1)


SPECIAL = {"aten::convolution": _convolution, "aten::convolution_backward": _convolution_backward}


class _Counter(TorchDispatchMode):
    """Fills ``own`` with our ops, whose arguments are ``calls``, and ``items`` with all other operations.

    Args:
        kind: of these; None: by their names.
    """

    def __init__(self, kind: str | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.own: list[Item] = []
        self.items: list[Item] = []
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        result = op(*arguments, **named)
        name = op._schema.name
        size = moved(op, arguments, named, result)
        if name.startswith("grcsf_fast::"):
            self.own.append(_ours(name, arguments, size))
            self.calls.append((name, arguments))
        elif name in SPECIAL:
            items = SPECIAL[name](op, arguments, named, result)
            self.items += [one if self.kind is None else one._replace(kind=self.kind) for one in items]
        elif size:
            operations, unit = float(sum(one.numel() for one in _tensors(result))), VECTOR
            if op.overloadpacket in flop_registry:
                # PyTorch leaves products in float32 as they are unless it is told otherwise.
                operations, unit = _flops(op, arguments, named, result), _matrix_unit(_tensors(arguments)[0], VECTOR)
            short = name.rpartition("::")[2]
            self.items.append(Item(self.kind or NAMED.get(short, REST), size, operations, unit, 1))
        return result

    @contextmanager
    def within(self, kind: str) -> Iterator[None]:
        """All operations inside are of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before


KIND_OF = {"multiscale": OP_1, "patch": OP_2, "normalize": NORM, "pool": POOLING}


def _kind_of(name: str) -> str:
    return next(kind for start, kind in KIND_OF.items() if name.startswith(f"grcsf_fast::{start}"))


def _ours(name: str, arguments: Any, size: int) -> Item:
    """A call of one of our ops, by the Triton kernels; ``size``: of what it is given and makes, once each."""
    kind, backward = _kind_of(name), name.endswith("_backward")
    x = _tensors(arguments)[0]
    operations, unit, called = float(x.numel()), VECTOR, kind
    if kind == OP_1:
        features = arguments[1] if backward else arguments[0]
        pixels = sum(one.numel() for one in features)
        factors = sum(one.numel() * _over_ideal(OPS[0], backward, one) for one in features)
        size, operations = size * factors / pixels, _compensation_operations(backward, features)
    elif kind == OP_2:
        x = arguments[2] if backward else arguments[0]
        weights, patch = (arguments[5], arguments[6]) if backward else (arguments[3], arguments[4])
        maps, heads, residual, channels = weights[0].shape
        size *= _over_ideal(OPS[1], backward, x)
        pixels, tokens = x.numel() // channels, patch ** (x.dim() - 2)
        operations = matrix_operations(backward, pixels, maps * heads * residual, channels, tokens)
        unit = _matrix_unit(x, THREE_TF32)
        plan = patches.Launch(x, AttentionWeights(*weights), patch).plan_backward(torch.device("cpu"))
        called = kind if plan.fused else OP_2_APART
    elif kind == NORM:  # reads x, and in the backward its gradient, twice
        size += arguments[0].nbytes + (arguments[1].nbytes if backward else 0)
    return Item(kind, size, operations, unit, launches()[called, backward])


def _over_ideal(op: str, backward: bool, x: Tensor) -> float:
    batch, channels, *spatial = x.shape
    kind, size = "backward" if backward else "forward", "x".join(map(str, spatial))
    return triton_dram.most_over_ideal(f"{op} {kind}, {batch} x C{channels} {size}")


def _compensation_operations(backward: bool, features: Sequence[Tensor]) -> float:
    """Of the loops of kernels/triton/gcu.py; E of a pixel is a product and a sum for each coarse pixel around it.

    A program makes E twice in either direction, and for dD, at each fine pixel around, once more.
    """
    taps = 2 ** (features[0].dim() - 2)
    each = 4 * taps + 14
    if backward:
        each = 4 * taps + 33 + taps * (2 * taps + 13)
    return float(each * sum(one.numel() for one in features))


@functools.cache
def launches() -> dict[tuple[str, bool], int]:
    """Kernels and operations of PyTorch's in a call of our ops, by kind and whether backward; none of them runs."""
    found: dict[tuple[str, bool], int] = {}

    def count(kind: str, backward: bool, call: Callable[[], Any]) -> None:
        with recorded(lambda kernel, grid: ()) as kernels, _Counter() as counter:
            call()
        found[kind, backward] = len(kernels) + sum(one.launches for one in counter.items)

    for op, kind, channels in ((OPS[0], OP_1, 16), (OPS[1], OP_2, 16), (OPS[1], OP_2_APART, 80)):
        tensors = triton_dram.tensors_of(op, channels, (8, 8), torch.float32)
        count(kind, False, lambda op=op, given=tensors: triton_dram.call(op, [], given, 8))
        grads = triton_dram.incoming(op, tensors, 8)
        count(kind, True, lambda op=op, given=tensors, grads=grads: triton_dram.call(op, grads, given, 8))
    x, weight = torch.zeros(1, 4, 8, 8), torch.zeros(4)
    statistics, half = torch.zeros(1, 2, 4), torch.zeros(1, 4, 4, 4)
    count(NORM, False, lambda: norm.forward(x, weight, weight, 1e-5, 0.01))
    count(NORM, True, lambda: norm.backward(x, x, weight, weight, statistics, 0.01))
    count(POOLING, False, lambda: pooling.forward(x, torch.contiguous_format))
    count(POOLING, True, lambda: pooling.backward(half, half, x))
    return found


def _plainly(name: str, arguments: Any) -> tuple[Callable[..., Any], list[Tensor], list[Tensor], list[bool]]:
    """Of a call of one of our ops: its plain form, the tensors that it takes, their gradients, whose are wanted."""
    kind, backward = _kind_of(name), name.endswith("_backward")
    grads: list[Tensor] = []
    needed = None
    if backward and kind in (OP_1, OP_2):
        *arguments, _, needed = arguments
        count = 1 if kind == OP_1 else 2
        grads, arguments = _tensors(arguments[:count]), arguments[count:]
    elif backward:
        count = 1 if kind == NORM else 2
        grads, arguments = list(arguments[:count]), arguments[count:]
    if kind == OP_1:
        *five, eps = arguments[:6]
        scales = len(five[0])

        def run(*tensors: Tensor) -> Any:
            lists = [list(tensors[start : start + scales]) for start in range(0, len(tensors), scales)]
            pairs = reference.multiscale_compensation(*lists, eps)
            return [pair[index] for index in range(2) for pair in pairs]

        tensors = _tensors(five)
    elif kind == OP_2:
        x, keys, values, weights, patch, threshold = arguments[:6]

        def run(*tensors: Tensor) -> Any:
            return reference.patch_cross_attention(*tensors[:3], AttentionWeights(*tensors[3:]), patch, threshold)

        tensors = [x, keys, values, *weights]
    else:
        tensors = list(arguments[: 3 if kind == NORM else 1])
        run = plain.normalize_activate if kind == NORM else plain.pool_with_mean
    return run, tensors, grads, list(needed) if needed is not None else [True] * len(tensors)


def _taken_apart(calls: Sequence[tuple[str, Any]], autocast: Callable[[], Any]) -> list[Item]:
    """Our ops as operations of PyTorch's; fake tensors are on."""
    items: list[Item] = []
    for name, arguments in calls:
        run, tensors, grads, needed = _plainly(name, arguments)
        counter = _Counter(_kind_of(name))
        if not name.endswith("_backward"):
            with torch.no_grad(), autocast(), counter:
                run(*tensors)
        else:
            leaves = [one.detach().requires_grad_(wanted) for one, wanted in zip(tensors, needed, strict=True)]
            with torch.enable_grad(), autocast():
                outputs = run(*leaves)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            grads = [grad.to(one.dtype) for grad, one in zip(grads, outputs, strict=True)]
            with counter:
                torch.autograd.grad(outputs, [one for one in leaves if one.requires_grad], grads)
        items += counter.items
    return items


def _both(counter: _Counter, autocast: Callable[[], Any]) -> Count:
    return Count(counter.own + counter.items, counter.items + _taken_apart(counter.calls, autocast))


@contextmanager
def _fake(backend: str) -> Iterator[None]:
    launches()  # counted on tensors that there are
    with FakeTensorMode(allow_non_fake_inputs=True), use_backend(backend):
        yield


def _inputs(network: GRCSF, batch: int, spatial: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    image = torch.empty(batch, network.seen_channels, *spatial)
    return image, torch.empty(batch, len(network.mask_ratios), *spatial) if network.rcu else None


def counted_forward(
    build: Callable[[], GRCSF], batch: int, spatial: Sequence[int], dtype: torch.dtype, backend: str = "triton"
) -> Count:
    """A forward for inference, its weights in ``dtype``.

    Args:
        build: makes the network.
        batch: images.
        spatial: their size.
        dtype: float32, bfloat16 or float16.
        backend: "reference" counts it directly, for tests.
    """
    network = build().optimized_for_inference(dtype, fused=False)  # a copy, which fake tensors do not allow
    with _fake(backend), torch.no_grad():
        image, maps = _inputs(network, batch, spatial)
        maps = None if maps is None else maps.to(dtype)
        with _Counter() as counter:
            network(image, maps)
        return _both(counter, nullcontext)


def counted_step(
    build: Callable[[], GRCSF], batch: int, spatial: Sequence[int], dtype: torch.dtype, backend: str = "triton"
) -> Count:
    """A training step: forward under autocast to ``dtype``, loss, backward, clipping and AdamW; arguments as above."""

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    with _fake(backend):
        network = build().train()
        criterion = GRCSFLoss(patch_size=network.config["patch_size"])
        optimizer = torch.optim.AdamW(network.parameters(), foreach=True)
        for parameter in network.parameters():  # of which the first step makes what AdamW keeps
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        image, maps = _inputs(network, batch, spatial)
        mask = torch.empty(batch, network.out_channels, *spatial)
        with _Counter() as counter:
            with autocast():
                logits, seen = network(image, maps, return_maps=True)
            # The loss apart, so that its backward counts with it.
            outputs = [logits, *seen.patch_scores.values()]
            with counter.within(LOSS):
                leaves = [one.detach().requires_grad_() for one in outputs]
                scores = dict(zip(seen.patch_scores, leaves[1:], strict=True))
                loss = criterion((leaves[0], seen._replace(patch_scores=scores)), mask)
                grads = torch.autograd.grad(loss, leaves)
            torch.autograd.backward(outputs, grads)
            with counter.within(OPTIMIZER):
                nn.utils.clip_grad_norm_(network.parameters(), 5.0, foreach=True)
                optimizer.step()
        return _both(counter, autocast)
