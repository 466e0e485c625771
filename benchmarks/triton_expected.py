"""What benchmarks/triton_compile.py expects of the compiled kernels: widths of accesses, how much may spill, and room.

The figures are those of Triton 3.7.1, so that a change that makes any of them worse shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from benchmarks.triton_widths import Widths

__all__ = ["LARGE", "LEAST_BITS", "MOST_SHARED", "MOST_STACK", "least_programs", "most_stack", "too_narrow"]

# Bytes of shared memory that a program of a consumer card has.
MOST_SHARED = 99 * 1024

# Tensors that grow with the image; all others are small beside them and come from a cache.
LARGE = (
    "features coarse compensated residual features_grad coarse_grad compensated_grad residual_grad pixels "
    "x keys values out x_grad keys_grad values_grad out_grad query_grads reads largest mean largest_grad mean_grad"
)
# Patterns of target and entry, tensors, and the least bits of an access to them in float32 and in half precision. The
# first row counts that matches and has the tensor.
LEAST_BITS: tuple[tuple[str, str, int, int], ...] = (
    # 7 numbers in a row begin anywhere.
    ("patch 7", "x keys values out x_grad keys_grad values_grad out_grad", 32, 16),
    ("C64 2-D patch 4", "keys values", 64, 64),
    # 64 lanes for the rows of few pixels.
    ("gfx942 gcu .*coarse pixels", "coarse_grad", 32, 16),
    # 16 rows of 16 numbers, in float32, for the lanes of four warps.
    ("rcu backward .*, patches", "reads query_grads", 64, 64),
    # Numbers per pixel, from a sum over the channels.
    ("gcu", "residual residual_grad pixels", 32, 16),
    # Neighbours of a pixel are gathered; where the channels lie side by side, all at once.
    ("gfx942 gcu .*channels last", "coarse", 32, 32),
    ("gcu .*channels last", "coarse", 64, 64),
    ("gcu", "coarse", 32, 16),
    ("gcu .*coarse pixels", "features compensated_grad", 32, 16),
    # Rows of 28 numbers in half precision begin at multiples of 8 bytes, coarse rows of 6 at multiples of 4.
    ("gcu", "features compensated features_grad compensated_grad", 64, 64),
    ("gcu", "coarse_grad", 64, 32),
    ("pooling .*C256 3-D$", "largest mean largest_grad mean_grad", 64, 32),
    # Rows of a patch of 8 are 16 bytes in half precision.
    ("sm_.* rcu forward .*2-D patch 8", "x out", 128, 128),
    ("", LARGE, 128, 64),
)

# Patterns of target, dtype and entry, and the most bytes of stack: there goes what a kernel has no registers for.
# The first row counts that matches; elsewhere nothing may spill.
MOST_STACK: tuple[tuple[str, int], ...] = (
    # Rows of 7, whose lanes each have a place of their own.
    ("float32 rcu backward C64 2-D patch 7, patches", 208),
    ("sm_80 b?float16 rcu backward C64 2-D patch 7, patches", 88),
    ("float16 rcu backward C64 2-D patch 7, patches", 24),
    ("float32 rcu forward C64 2-D patch 7", 16),
    # Which make dX, the weights' gradients and the scorer's too.
    ("sm_80 float32 rcu backward C32 3-D patch 4, patches", 184),
    ("float32 rcu backward C(32|64) .*, patches", 176),
    ("sm_80 b?float16 rcu backward C(32|64) .*, patches", 64),
    ("float16 rcu backward C(32|64) .*, patches", 48),
    # Three products of tf32 a product, whose operands are two registers a number.
    ("float32 rcu backward .*, patches", 56),
    # Of 8 and 16 blocks of channels only.
    ("float16 rcu backward C(256|512) 2-D patch 8, patches", 64),
    # Two numbers more than the 255 registers, or four.
    ("sm_120 b?float16 rcu forward C128 3-D patch 4", 8),
    ("sm_120 b?float16 rcu backward C128 3-D patch 4, patches", 16),
    # Of 255 registers the assembler takes 128 there, so that more programs fit, and spills a few numbers.
    ("sm_8[69] b?float16 rcu forward C128 2-D patch 8", 8),
    ("sm_120 b?float16 rcu forward C64 3-D patch 4", 8),
    ("sm_120 bfloat16 gcu forward, four 3-D scales$", 24),
    ("sm_100 float32 gcu forward, four 2-D scales$", 24),
    ("sm_100 float16 pooling forward C(256|512) 2-D, channels last", 8),
    # Each pixel reads 16 (64) fine ones, and around each of them 4 (8) coarse ones.
    ("gcu backward.*, coarse pixels", 24),
    # Of volumes; in 2-D a block of 16 channels leaves registers enough.
    ("gcu backward.* 3-D.*, fine pixels", 16),
)


def most_stack(entry: str) -> int:
    """Bytes, of an entry that begins with target and dtype."""
    return next((most for pattern, most in MOST_STACK if re.search(pattern, entry)), 0)


def least_programs(label: str) -> int:
    """Programs of an entry that a multiprocessor has room for at once."""
    # Sums of 49 x 49 numbers, whose rows begin anywhere.
    return 1 if label.endswith("patch 7, sums") else 2


def too_narrow(entry: str, kind: str, bits: Widths, itemsize: int) -> Iterator[str]:
    """What is moved in narrower pieces than expected; ``entry`` begins with the target."""
    for tensor, (least, _) in bits.items():
        if tensor in LARGE.split():
            expected = _least_bits(entry, tensor, itemsize)
            if least < expected:
                yield f"{tensor}: {kind} of {least} bits, at least {expected} expected"


def _least_bits(entry: str, tensor: str, itemsize: int) -> int:
    for pattern, tensors, single, half in LEAST_BITS:
        if tensor in tensors.split() and re.search(pattern, entry):
            return single if itemsize == 4 else half
    raise AssertionError(f"no row for {tensor} of {entry}")
