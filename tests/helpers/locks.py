"""Whether a folder is locked."""

from __future__ import annotations

import os

import pytest

__all__ = ["locked"]


def locked(folder) -> bool:
    """By another opening of it, in this process or another; skips where the system has no such locks."""
    fcntl = pytest.importorskip("fcntl")
    own = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(own)
    return False
