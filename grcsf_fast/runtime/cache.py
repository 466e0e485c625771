"""Where what was found out once is kept for a user."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(kind: str) -> Path:
    """``$XDG_CACHE_HOME/grcsf-fast/KIND``, or ``~/.cache/...``; not made here.

    Raises:
        RuntimeError: there is no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The specification wants relative paths ignored.
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "grcsf-fast" / kind
