"""Images through networks in batches that those who ask for them share.

A batch always has the same number of images; the last one is filled up with repetitions. So an image's result depends
neither on the images beside it nor on how many there were: each is computed by the same instructions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Images", "Made", "Order", "Stage", "Stream"]


@dataclass(frozen=True)
class Made:
    """Images that are made when a batch wants them, and what its outputs become at once: memory is that of a batch.

    Attributes:
        shape: (N, K, \\*S), N from 1.
        make: of a slice of the N, the images (n, K, \\*S).
        finish: of the outputs of n images what the order is to have of them, (n, ...), image by image.
    """

    shape: tuple[int, ...]
    make: Callable[[slice], Tensor]
    finish: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> Tensor:
        return self.make(part)


class Images(NamedTuple):
    """What is to be computed.

    Attributes:
        stage: by which stage of the stream.
        parts: (N, K, \\*S) each, N from 1; of any sizes.
    """

    stage: str
    parts: list[Tensor | Made]


class Stage(NamedTuple):
    """A network in a stream.

    Attributes:
        size: images of each batch.
        run: (size, K, \\*S) to (size, ...).
    """

    size: int
    run: Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Order:
    """Images that were asked for, and what came of them.

    Attributes:
        outputs: (N, ...) for each part; whoever asked may take them out.
        left: parts that are not complete.
        seconds: this order's part of the time that its batches took.
        error: what one of its batches raised; nothing more comes of it then.
    """

    outputs: list[Tensor | None]
    left: int
    seconds: float = 0.0
    error: Exception | None = None

    @classmethod
    def of(cls, images: Images) -> Order:
        """Of which nothing is computed."""
        return cls([None] * len(images.parts), len(images.parts))


@dataclass
class _Strip:
    """A part of an order, of whose images ``sent`` were put into a batch."""

    order: Order
    number: int
    inputs: Tensor | Made
    sent: int = 0

    def make(self, part: slice, images: list[Tensor]) -> bool:
        """Append these of the images, (n, K, \\*S); False: that failed, which is the order's error alone."""
        if self.order.error is not None:  # of another part
            return False
        try:
            images.append(self.inputs[part])
        except Exception as error:
            self.order.error = error
            return False
        return True

    def take(self, part: slice, outputs: list[Tensor]) -> None:
        """Give the order what these of the images became, the first of the outputs, or the error of finishing them."""
        try:
            kept = self.inputs.finish(outputs.pop(0)) if isinstance(self.inputs, Made) else outputs.pop(0)
            if self.order.outputs[self.number] is None:
                self.order.outputs[self.number] = kept.new_empty(len(self.inputs), *kept.shape[1:])
            self.order.outputs[self.number][part] = kept
        except Exception as error:
            self.order.error = error


# Of an order that failed: whoever keeps its error keeps no images.
NOTHING = torch.empty(0, device="cpu")


class _Gather:
    """Collects the strips of one stage, and runs those of equal shape in batches of one size."""

    def __init__(self, stage: Stage) -> None:
        self.size, self.run = stage
        self.waiting: dict[tuple[int, ...], deque[_Strip]] = {}

    def add(self, strip: _Strip) -> None:
        self.waiting.setdefault(tuple(strip.inputs.shape[1:]), deque()).append(strip)

    def count(self, shape: tuple[int, ...]) -> int:
        return sum(len(strip.inputs) - strip.sent for strip in self.waiting[shape])

    def fullest(self) -> tuple[int, tuple[int, ...]]:
        """Images that wait for a batch, and their shape; 0 if none does."""
        return max(((self.count(shape), shape) for shape in self.waiting), default=(0, ()))

    def batch(self, shape: tuple[int, ...]) -> list[Order]:
        """Run up to ``size`` of the images that wait; returns the orders that this ends, or that fail."""
        began = time.perf_counter()
        taken, room = self._take(shape)
        try:
            self._compute(taken)
        # Out of memory, say: the orders of this batch are lost, the others are not.
        except Exception as error:
            for strip, _ in taken:
                strip.order.error = strip.order.error or error
        ended = self._ended(taken, (time.perf_counter() - began) / (self.size - room))
        taken.clear()
        return ended

    def _compute(self, taken: list[tuple[_Strip, slice]]) -> None:
        """Give orders what becomes of their images, or the error of making or finishing them.

        Who keeps such an error keeps the variables here: lists that are empty in the end.
        """
        made, images, outputs = list[tuple[_Strip, slice]](), list[Tensor](), list[Tensor]()
        try:
            for strip, part in taken:
                if strip.make(part, images):
                    made.append((strip, part))
            if not made:
                return
            room = self.size - sum(map(len, images))
            if room:
                images.append(images[-1][-1:].expand(room, *images[-1].shape[1:]))
            images[:] = [torch.cat(images) if len(images) > 1 else images[0]]
            outputs += self.run(images.pop()).split(
                [*(part.stop - part.start for _, part in made), *[room] * (room > 0)]
            )
            for strip, part in made:
                strip.take(part, outputs)
        finally:
            for kept in (made, images, outputs):
                kept.clear()

    def _ended(self, taken: list[tuple[_Strip, slice]], seconds: float) -> list[Order]:
        """The orders that are complete or have failed, after a batch that took so long for each of its images."""
        ended: list[Order] = []
        for strip, part in taken:
            order = strip.order
            order.seconds += seconds * (part.stop - part.start)
            if order.error is None and part.stop == len(strip.inputs):
                order.left -= 1
            if (order.error is not None or not order.left) and order not in ended:
                ended.append(order)
        lost = [order for order in ended if order.error is not None]
        for strip, _ in taken:
            if strip.order in lost:
                strip.inputs = NOTHING
        self._drop(lost)
        return ended

    def _take(self, shape: tuple[int, ...]) -> tuple[list[tuple[_Strip, slice]], int]:
        """The strips that come first, which of their images the batch gets, and how many places stay free."""
        taken: list[tuple[_Strip, slice]] = []
        room, strips = self.size, self.waiting[shape]
        while room and strips:
            strip = strips[0]
            part = slice(strip.sent, min(strip.sent + room, len(strip.inputs)))
            taken.append((strip, part))
            strip.sent = part.stop
            room -= part.stop - part.start
            if strip.sent == len(strip.inputs):
                strips.popleft()
        if not strips:
            del self.waiting[shape]
        return taken, room

    def _drop(self, lost: list[Order]) -> None:
        for shape in list(self.waiting):
            self.waiting[shape] = deque(strip for strip in self.waiting[shape] if strip.order not in lost)
            if not self.waiting[shape]:
                del self.waiting[shape]


class Stream:
    """Stages that run in batches; for one thread.

    Args:
        stages: by name; of several with a full batch the first one runs.
    """

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self._gathers = {name: _Gather(stage) for name, stage in stages.items()}

    def submit(self, images: Images) -> Order:
        """Queue images; a later :meth:`step` returns the order when all of them are computed."""
        order = Order.of(images)
        self.take(order, images)
        return order

    def take(self, order: Order, images: Images) -> None:
        """As :meth:`submit`, of images whose order somebody has already."""
        for number, part in enumerate(images.parts):
            self._gathers[images.stage].add(_Strip(order, number, part))

    def step(self, partial: bool) -> list[Order] | None:
        """Run one batch; a batch that is not full only if ``partial``.

        Returns:
            The orders that it completed, or that it failed; None: there was no batch to run.
        """
        for gather in self._gathers.values():
            count, shape = gather.fullest()
            if count >= gather.size:
                return gather.batch(shape)
        if partial:
            gather = max(self._gathers.values(), key=lambda one: one.fullest()[0] / one.size)
            count, shape = gather.fullest()
            if count:
                return gather.batch(shape)
        return None

    def batches_left(self) -> int:
        """Of the images that wait now."""
        return sum(
            -(-gather.count(shape) // gather.size) for gather in self._gathers.values() for shape in gather.waiting
        )

    def run(self, moved: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Run all batches; ``moved`` is called with (batches done, batches in all) after each."""
        done = 0
        while self.step(partial=True) is not None:
            done += 1
            moved(done, done + self.batches_left())
