"""Memory: what this process may take, and what it keeps."""

from __future__ import annotations

import ctypes

__all__ = ["keep_memory"]


def keep_memory(whole_volumes: bool = False) -> None:
    """Tell glibc to keep freed memory: fresh pages are slow, and the same large tensors come again and again.

    Whole volumes, from 32 MiB on, are given back all the same unless ``whole_volumes`` are kept, and lanes share two
    pools, so that a long run takes no more than a short one. It is process-wide, so a program does it and the library
    does not.
    """
    trim_threshold, top_pad, mmap_threshold, mmap_max, arena_max = -1, -2, -3, -4, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    mallopt(mmap_threshold, 2**25)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)
    mallopt(arena_max, 2)
    if whole_volumes:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never
