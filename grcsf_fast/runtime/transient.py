"""Errors of file systems that pass by themselves, as those of a network do when its server starts anew."""

from __future__ import annotations

import errno
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

from ..errors import GrcsfError

__all__ = ["PAUSES", "patiently"]

PASSING = {errno.ESTALE, errno.EIO, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", errno.EIO)}
PAUSES = (1.0, 5.0, 30.0)  # seconds before another try

Found = TypeVar("Found")


def patiently(name: str, read: Callable[[], Found]) -> Found:
    """What ``read`` returns, tried again with a warning while an error may pass.

    Args:
        name: of what is read, for the warning.

    Raises:
        OSError, GrcsfError: the last of four that may pass, or another error at once.
    """
    for pause in PAUSES:
        try:
            return read()
        except (OSError, GrcsfError) as error:
            if not _may_pass(error):
                raise
            warnings.warn(f"{name}: {error}; is tried again in {pause:g} s", stacklevel=2)
        time.sleep(pause)
    return read()


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made of, is one of those."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in PASSING:
            return True
        error = error.__cause__
    return False
