"""Names of files, which have at most 255 bytes on all common file systems."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Container

__all__ = ["MAX_FILE", "MAX_LISTED", "MAX_NAME", "bytes_of", "is_map", "short_name", "too_long"]

MAX_FILE = 255  # bytes of a file's name
MAX_NAME = MAX_FILE - len("_residual100.nii.gz")  # of a case's: the longest ending of its files fits behind it
MAX_LISTED = MAX_FILE - len(".nii.gz")  # of a case's in lists of earlier versions: its mask alone does


def bytes_of(name: str) -> bytes | None:
    """As file systems hold it; None: they cannot, as it has a zero, or surrogates but those of names that are no UTF-8.

    A locale that is not of UTF-8 may still keep its file from being found.
    """
    try:
        encoded = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return None
    return None if b"\0" in encoded else encoded


def too_long(name: str, most: int = MAX_NAME) -> str:
    """Why a name of more bytes is too long for a case, in words; empty: it is not."""
    size = len(bytes_of(name) or b"")
    found = f"expected a name of at most {most} bytes, as files of results begin with it, found one of {size}"
    return f"{found}, {name[:20]}..." if size > most else ""


def is_map(name: str, cases: Container[str]) -> bool:
    """Whether a file is called as the residual maps that ``predict`` writes beside the mask of one of these cases."""
    case, _, ratio = name.rpartition("_residual")
    return re.fullmatch(r"\d+", ratio) is not None and case in cases


def short_name(name: str) -> str:
    """A hash in place of a name of any length, with its ending; both files of a pair have the same hash."""
    stem, ending = os.path.splitext(name)
    if ending.lower() == ".gz":
        stem = os.path.splitext(stem)[0]
    return hashlib.sha256(stem.encode(errors="surrogatepass")).hexdigest()[:12] + name[len(stem) :]
