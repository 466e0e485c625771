"""How wide a compiled Triton kernel loads and stores each of its tensors, read from its LLVM code.

There every access names its pointer, which leads back to an argument; in machine code it would be a register. No later
step of the compilers makes an access wider than Triton asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = ["Widths", "widths"]

Widths = dict[str, tuple[int, int]]
"""Bits of the narrowest and the widest access, by argument; those of several scales are one."""

_ARGUMENT = re.compile(r"%([\w.-]+): (!tt\.ptr<|[if]\d+)")
_POINTER = re.compile(r"ptr addrspace\([18]\) (?:(?:inreg|nonnull|noundef) )*%([\w.-]+)")
_NAME = re.compile(r"%([\w.-]+)")
_RESULT = re.compile(r"^\s*%([\w.-]+) = (.*)")
_BITS = {"float": 32, "bfloat": 16, "half": 16, "double": 64}
# NVIDIA's accesses are lines of PTX, AMD's are intrinsics or LLVM's own.
_PTX = re.compile(r"\b(ld|st)\.global[\w:.]*?(?:\.v(\d))?\.b(\d+) ")
_PTX_COPY = re.compile(r"cp\.async\.\w+\.shared\.global .*?0x([0-9a-f]+)")
_BUFFER = re.compile(r"\.buffer\.(load|store)\.(?:v(\d+))?(?:i|f|bf)(\d+)\(")
_PLAIN = re.compile(r"(?:^|= )\s*(?:tail )?(load|store) (?:<(\d+) x )?(\w+)")


def _accesses(line: str) -> Iterator[tuple[str, int]]:
    """``("load" or "store", bits)`` of a line's accesses to global memory; one at most."""
    if (found := _PTX.search(line)) is not None:
        yield "load" if found[1] == "ld" else "store", int(found[2] or 1) * int(found[3])
    elif (found := _PTX_COPY.search(line)) is not None:
        yield "load", 8 * int(found[1], 16)
    elif (found := _BUFFER.search(line)) is not None:
        yield found[1], int(found[2] or 1) * int(found[3])
    elif (found := _PLAIN.search(line)) is not None:
        bits = _BITS.get(found[3]) or int(found[3].removeprefix("i"))
        yield found[1], int(found[2] or 1) * bits


def widths(kernel: Any) -> tuple[Widths, Widths]:
    """Of the loads and of the stores of a compiled kernel.

    Accesses whose pointers went through shared memory, where the compiler laid them out anew, have no argument and are
    left out.
    """
    header = next(line for line in kernel.asm["ttir"].splitlines() if "tt.func public" in line)
    arguments = _ARGUMENT.findall(header)
    body = kernel.asm["llir"].split("\ndefine ", 1)[1].split("\n}", 1)[0].splitlines()
    # Arguments have numbers there. What is computed from a pointer leads back to it, unless it was loaded or a call
    # gave it.
    origin = {
        str(number): {re.sub(r"_\d+$", "", name)}
        for number, (name, kind) in enumerate(arguments)
        if kind.startswith("!tt.ptr")
    }
    computed = [
        (result[1], _NAME.findall(result[2]))
        for line in body[1:]
        if (result := _RESULT.match(line)) is not None
        and ("make.buffer.rsrc" in line or not re.match(r"(?:tail )?(?:call|load) ", result[2]))
    ]
    pending = True
    while pending:  # a loop's pointer may come from a later line
        pending = False
        for name, sources in computed:
            known = set().union(*(origin.get(source, set()) for source in sources))
            if not known <= origin.setdefault(name, set()):
                origin[name] |= known
                pending = True
    loads: Widths = {}
    stores: Widths = {}
    for line in body[1:]:
        pointers = _POINTER.findall(line)
        if not pointers:
            continue
        for kind, bits in _accesses(line):
            into = loads if kind == "load" else stores
            for tensor in origin.get(pointers[-1], ()):
                least, most = into.get(tensor, (bits, bits))
                into[tensor] = min(least, bits), max(most, bits)
    return loads, stores
