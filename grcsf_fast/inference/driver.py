"""One thread that computes the batches of all lanes, as a device wants it.

Threads that launch kernels side by side wait for each other in Python and in CUDA, and each would fill batches of its
own. So lanes read, prepare and write; what they want computed goes to the driver, which has one stream of batches.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ..networks.stream import Images, Order, Stream

__all__ = ["Seat", "driving"]


class Seat:
    """A lane's place at the driver's stream; used as a :class:`Stream`, by that lane alone.

    Args:
        asked: the driver's queue.
    """

    def __init__(self, asked: queue.SimpleQueue[tuple[Seat, Order, Images] | None]) -> None:
        self._asked = asked
        self._under_way = 0
        self.ended: queue.SimpleQueue[Order | BaseException] = queue.SimpleQueue()

    def submit(self, images: Images) -> Order:
        """Have images computed; a later :meth:`step` returns the order."""
        order = Order.of(images)
        self._under_way += 1
        self._asked.put((self, order, images))
        return order

    def step(self, partial: bool) -> list[Order] | None:
        """An order that is complete or failed, which is waited for only if ``partial``; None: there is none.

        Raises:
            BaseException: what ended the driver.
        """
        if not self._under_way:
            return None
        try:
            ended = self.ended.get(block=partial)
        except queue.Empty:
            return None
        if isinstance(ended, BaseException):
            raise ended
        self._under_way -= 1
        return [ended]


@contextmanager
def driving(
    stream: Callable[[], Stream], context: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Callable[[], Seat]]:
    """A driver at work until the block ends; a batch that is not full runs when no lane has asked for more.

    Args:
        stream: makes the driver's.
        context: entered by its thread.

    Yields:
        A function that makes a seat.
    """
    asked: queue.SimpleQueue[tuple[Seat, Order, Images] | None] = queue.SimpleQueue()
    drive = contextvars.copy_context().run
    thread = threading.Thread(target=drive, args=(_drive, asked, stream, context), name="lanes-driver", daemon=True)
    thread.start()
    try:
        yield lambda: Seat(asked)
    finally:
        asked.put(None)
        thread.join()


def _drive(
    asked: queue.SimpleQueue[tuple[Seat, Order, Images] | None],
    stream: Callable[[], Stream],
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    seats: dict[Order, Seat] = {}
    try:
        with context():
            _compute(asked, stream(), seats)
    # Lanes that wait must not do so for ever.
    except BaseException as error:
        for seat in seats.values():
            seat.ended.put(error)
        while (one := asked.get()) is not None:
            one[0].ended.put(error)


def _compute(
    asked: queue.SimpleQueue[tuple[Seat, Order, Images] | None], stream: Stream, seats: dict[Order, Seat]
) -> None:
    # In functions of their own, so that nothing here keeps images or results while it waits.
    while _received(asked, stream, seats):
        _computed(stream, seats)


def _received(
    asked: queue.SimpleQueue[tuple[Seat, Order, Images] | None], stream: Stream, seats: dict[Order, Seat]
) -> bool:
    """Take what lanes have asked for, waiting only if there is nothing to compute; False: the run is over."""
    while True:
        try:
            one = asked.get(block=not seats)
        except queue.Empty:
            return True
        if one is None:
            return False
        seat, order, images = one
        seats[order] = seat
        stream.take(order, images)


def _computed(stream: Stream, seats: dict[Order, Seat]) -> None:
    """One batch, and back to the lanes what it ends."""
    ended = stream.step(partial=False)
    if ended is None:
        ended = stream.step(partial=True)
    for order in ended or ():
        seats.pop(order).ended.put(order)
