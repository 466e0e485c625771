"""A port for processes of a test to meet at, which no other program takes meanwhile."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A port of this machine that the kernel gives to nobody who asks for any.

    A socket is bound to it and does not listen. Who asks for this port and allows its reuse, as PyTorch's stores do,
    may listen there.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
