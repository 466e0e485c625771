"""Memory: what this process may take, and what it keeps."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch

from .control_groups import control_groups

__all__ = ["available_memory", "give_memory_back", "in_units", "is_out_of_memory", "keep_memory", "memory_budget"]

FRACTION = 0.7  # of what is free
MEMINFO = Path("/proc/meminfo")


class _Kept:
    """Whether this process keeps what :func:`give_memory_back` gives back."""

    freed = False


def keep_memory(whole_volumes: bool = False) -> None:
    """Tell glibc to keep freed memory: fresh pages are slow, and the same large tensors come again and again.

    Whole volumes, from 32 MiB on, are given back all the same unless ``whole_volumes`` are kept, and lanes share two
    pools. What is kept grows with time all the same, as what stays long lies between what does not: whoever works for
    long calls :func:`give_memory_back` now and then. It is process-wide, so a program does it and the library does not.
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
    _Kept.freed = not whole_volumes


def give_memory_back() -> None:
    """Give back the freed memory that :func:`keep_memory` has kept so far; nothing where a program did not call it.

    Of many volumes in lanes the memory in use stays the same, and what is free between it grows.
    """
    if _Kept.freed:
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of the processor or of a GPU."""
    # PyTorch has no class of its own for the processor's.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def memory_budget(device: torch.device | None = None) -> int:
    """Bytes that this process takes if nobody says more: most of what is free, divided among torchrun's processes.

    Args:
        device: where volumes are worked on; a GPU may have less, of which its own process may take most.
    """
    # Those of one machine share its memory.
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    budget = int(FRACTION / max(1, int(beside) if beside.isdecimal() else 1) * available_memory())
    if device is None or device.type != "cuda":
        return budget
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps of an earlier run is free for the next.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(budget, int(FRACTION * free))


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of a control group it is in, if that has less.

    Without Linux's files, half of what the machine has, as nobody says how much of it is free; 8 GiB where that is
    unknown too, as on Windows.

    psutil knows no control groups; the lines that it would replace are not worth a dependency.
    """
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = MEMINFO.read_text().splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    for folder, second in control_groups("memory"):
        limit, used = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        # A group's use counts the files it has read, which make room when asked to.
        with suppress(OSError, ValueError):
            most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Of version 1 the use is of a group and those below it, as the numbers that are called total.
            prefix = "" if second else "total_"
            files = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))
            found.append(most - taken + files)
    if not found:
        with suppress(AttributeError, OSError, ValueError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(min(found), 0) if found else 8 * 2**30


def in_units(amount: int) -> str:
    """Bytes as people write them."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if amount >= 2**exponent:
            return f"{amount / 2**exponent:.1f} {unit}"
    return f"{amount} bytes"
