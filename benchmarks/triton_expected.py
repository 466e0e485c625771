"""What benchmarks/triton_compile.py expects of the compiled kernels: widths of accesses, and what is known to fail.

The figures are those of Triton 3.7.1. A change that makes any of them worse shows; one that makes them better is asked
to write the better ones here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from benchmarks.triton_widths import Widths

__all__ = ["FAILURES", "LARGE", "LEAST_BITS", "failures", "too_narrow"]

# Tensors that grow with the image; all others are small beside them and come from a cache.
LARGE = (
    "features coarse compensated residual features_grad compensated_grad residual_grad coarse_parts "
    "x keys values out x_grad keys_grad values_grad out_grad query_grads reads"
)
# Patterns of target and entry, tensors, and the least bits of an access to them in float32 and in half precision. The
# first row counts that matches and has the tensor. Of the coarse features' accesses the widest counts, because the
# columns beside a tile are read by themselves.
LEAST_BITS: tuple[tuple[str, str, int, int], ...] = (
    # 7 numbers in a row begin anywhere.
    ("patch 7", "x keys values out x_grad keys_grad values_grad out_grad", 32, 16),
    # 16 tokens of 16 channels are a number for each of 256 threads.
    ("C64 2-D patch 4, (attention|position)", LARGE, 32, 16),
    ("C64 2-D patch 4", "keys values", 64, 64),
    # A block of 32 queries and 16 channels.
    ("patch 16", LARGE, 64, 64),
    # Sums over the channels, a number a thread; a part of the coarse gradient has two columns more than its tile.
    ("gcu", "residual coarse_parts", 32, 16),
    ("gcu", "coarse", 64, 32),
    # Tiles of 8 pixels and more in a row, as far as the registers allow it.
    ("sm_.* gcu .*2-D", "features compensated features_grad compensated_grad residual_grad", 128, 64),
    # Rows of a patch of 8 are 16 bytes in half precision.
    ("sm_.* rcu forward .*2-D patch 8", "x out", 128, 128),
    ("", LARGE, 128, 64),
)

FAILURES: dict[str, dict[tuple[str, str, str], str]] = {}
"""By reason: target, dtype and entry, and the failure as it is reported."""


def failures() -> dict[tuple[str, str, str], str]:
    """All that are known."""
    return {entry: text for of_reason in FAILURES.values() for entry, text in of_reason.items()}


def too_narrow(entry: str, kind: str, bits: Widths, itemsize: int) -> Iterator[str]:
    """What is moved in narrower pieces than expected; ``entry`` begins with the target."""
    for tensor, (least, most) in bits.items():
        if tensor in LARGE.split():
            found = most if tensor == "coarse" else least
            expected = _least_bits(entry, tensor, itemsize)
            if found < expected:
                yield f"{tensor}: {kind} of {found} bits, at least {expected} expected"


def _least_bits(entry: str, tensor: str, itemsize: int) -> int:
    for pattern, tensors, single, half in LEAST_BITS:
        if tensor in tensors.split() and re.search(pattern, entry):
            return single if itemsize == 4 else half
    raise AssertionError(f"no row for {tensor} of {entry}")
