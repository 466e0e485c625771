"""A page of HTML in one file: a template, and what it shows as JSON inside, from which nothing can break out.

The page asks for nothing from a network: style and script are in it, and its policy (Content-Security-Policy) forbids
all but pictures beside it. A template names by ``{{head}}``, ``{{style}}``, ``{{body}}`` and ``{{script}}`` the files
beside this one that all pages share, and by ``{{NAME}}`` a block of data.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .files import replace_when_done

__all__ = ["in_address", "is_page", "write_page"]

HERE = Path(__file__).parent
SHARED = {"head": "page.head.html", "style": "page.css", "body": "page.body.html", "script": "page.js"}
PLACE = re.compile(r"\{\{(\w+)\}\}")
GENERATOR = b'<meta name="generator" content="grcsf-fast">'  # in page.head.html
HEAD_BYTES = 4096
# In JSON these stand within strings alone, where their escapes mean the same; HTML finds no end of a script in them.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def write_page(target: str | Path, template: str | Path, blocks: Mapping[str, Any]) -> Path:
    """Write a page; it appears under its name when it is complete.

    Args:
        target: the file.
        template: file of HTML with places for what is shared and for blocks.
        blocks: by the name of a place, anything that JSON takes. Of an iterator the items become a list; they are
            taken one by one and not kept, so that they may be large. Numbers that are not finite become null.

    Returns:
        ``target``.

    Raises:
        KeyError: the template names a block that is not given.
        OSError: the file cannot be written.
    """
    target = Path(target)
    parts = PLACE.split(Path(template).read_text(encoding="utf-8"))
    try:
        with replace_when_done(target) as (part,), part.open("w", encoding="utf-8", newline="\n") as file:
            for text, name in zip(parts[::2], [*parts[1::2], None], strict=True):
                file.write(text)
                if name in SHARED:
                    file.write((HERE / SHARED[name]).read_text(encoding="utf-8"))
                elif name is not None:
                    file.writelines(_lines(blocks[name]))
    except OSError as error:
        raise OSError(f"{target}: could not be written: {error.strerror or error}") from error
    return target


def is_page(path: str | Path, title: str) -> bool:
    """Whether a file is a page of that title that some version of this package wrote."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False
    return GENERATOR in head and f"<title>{title}</title>".encode() in head


def in_address(name: str) -> str:
    """A file's name as a relative address: its bytes, UTF-8 or not, with an escape for all that means something."""
    return quote(os.fsencode(name), safe="")


def _lines(block: Any) -> Iterator[str]:
    if not isinstance(block, Iterator):
        yield _text(block)
        return
    before = "["
    for item in block:
        yield before + _text(item)
        before = ",\n"
    yield "[]" if before == "[" else "]"


def _text(value: Any) -> str:
    return json.dumps(_finite(value), allow_nan=False, separators=(",", ":")).translate(ESCAPES)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
