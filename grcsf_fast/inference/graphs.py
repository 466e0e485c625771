"""Batches on a GPU as one launch each: what a network does, captured once for each size of images and replayed.

A forward pass is a few hundred kernels, and the processor may take longer to launch one than it runs. Batches of a
stream always have one size, so what is launched for the next is the same but for the numbers.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..networks.constants import held_constants

__all__ = ["CudaCapture", "Graphs"]

Run = Callable[[Tensor], Tensor]

KEPT = 32  # sizes that came last
# Batches of a size before it is captured, which more than one volume has: to capture takes as long as some batches do.
WORTH = 8


class CudaCapture:
    """Captures computations on one GPU as CUDA graphs, which share their memory: one of them runs at a time."""

    # PyTorch allows one capture at a time in a process.
    _capturing = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Graphs of one pool have to be captured on one stream.
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __reduce__(self) -> tuple[type[CudaCapture], tuple[torch.device]]:
        """A copy, pickled ones too, has memory and a stream of its own."""
        return CudaCapture, (self.device,)

    def __call__(self, run: Run, images: Tensor) -> Run:
        """What replays a computation on images of one size, on the current stream; the outputs are the caller's.

        Weights have to stay where they are as long as it is used. Other threads may use the GPU meanwhile.

        Args:
            run: the computation, which has run on such images: all is compiled, checked and at its place.
            images: (N, ...), on the GPU.

        Raises:
            RuntimeError: it does what cannot be captured, such as waiting.
        """
        graph, seen = torch.cuda.CUDAGraph(), images.clone()
        # The outer stream is the current one again however the capture ends.
        outer = torch.cuda.stream(torch.cuda.current_stream(self.device))
        with self._capturing, torch.cuda.device(self.device), outer, held_constants() as constants:
            capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
            with capture:
                outputs = run(seen)
        return _CudaGraph(graph, seen, outputs, constants)


@dataclass(frozen=True)
class _CudaGraph:
    """A graph, its input and outputs, and the constants that it reads, which nobody else may keep."""

    graph: torch.cuda.CUDAGraph
    seen: Tensor
    outputs: Tensor
    constants: list[Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.copy_(images)
        self.graph.replay()
        return self.outputs.clone()


@dataclass
class _Size:
    """How many batches of a size there were, and what replays them."""

    batches: int = 0
    replay: Run | None = None


class Graphs:
    """The captured computations of one model; for threads that use the same stream of the GPU.

    Where a capture fails, a warning says so once, and from then on batches run as they are.

    Args:
        capture: makes what replays a computation on images of one size.
    """

    def __init__(self, capture: Callable[[Run, Tensor], Run]) -> None:
        self._capture = capture
        self._lock = threading.Lock()
        self._sizes: OrderedDict[Hashable, _Size] = OrderedDict()
        self._refused = False

    def __reduce__(self) -> tuple[type[Graphs], tuple[Callable[[Run, Tensor], Run]]]:
        """A copy, pickled ones too, has captured nothing yet: what is captured belongs to one model in one process."""
        return Graphs, (self._capture,)

    def replayed(self, run: Run, state: Hashable) -> Run:
        """The computation, which is replayed for sizes of images that come often.

        Args:
            run: (N, ...) to (N, ...), which launches the same for all images of a size.
            state: what decides beside their size what is launched, and where weights are.
        """
        return partial(self._run, run, state)

    def _run(self, run: Run, state: Hashable, images: Tensor) -> Tensor:
        if self._refused:
            return run(images)
        # One at a time, as input and outputs of a graph have their place: in the order of the stream.
        with self._lock:
            size = self._of((state, images.shape, images.dtype))
            if size.replay is not None:
                return size.replay(images)
            size.batches += 1
            found = run(images)
            if size.batches == WORTH:
                try:
                    size.replay = self._capture(run, images)
                except Exception as error:  # whatever it is, the batch has been computed without
                    self._refuse(images, error)
            return found

    def _of(self, key: Hashable) -> _Size:
        size = self._sizes.setdefault(key, _Size())
        self._sizes.move_to_end(key)
        if len(self._sizes) > KEPT:
            self._sizes.popitem(last=False)
        return size

    def _refuse(self, images: Tensor, error: Exception) -> None:
        self._refused = True
        self._sizes.clear()
        warnings.warn(
            f"batches are launched kernel by kernel, which is slower: one of {tuple(images.shape)} could not be "
            f"captured as a CUDA graph, {type(error).__name__}: {error}",
            stacklevel=2,
        )
