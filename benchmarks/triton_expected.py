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
    "features coarse compensated residual features_grad coarse_grad compensated_grad residual_grad pixels "
    "x keys values out x_grad keys_grad values_grad out_grad query_grads reads"
)
# Patterns of target and entry, tensors, and the least bits of an access to them in float32 and in half precision. The
# first row counts that matches and has the tensor.
LEAST_BITS: tuple[tuple[str, str, int, int], ...] = (
    # 7 numbers in a row begin anywhere.
    ("patch 7", "x keys values out x_grad keys_grad values_grad out_grad", 32, 16),
    # 16 tokens of 16 channels are a number for each of 256 threads.
    ("C64 2-D patch 4, (attention|position)", LARGE, 32, 16),
    ("sm_(8|12).* C64 2-D patch 4, channels", "x out_grad x_grad", 32, 64),
    ("C64 2-D patch 4", "keys values", 64, 64),
    # Blocks of 32 tokens by 16 channels are two numbers for each of 256 threads.
    ("patch 16", LARGE, 64, 32),
    ("sm_100 rcu backward .*, attention", LARGE, 128, 32),
    ("sm_100 rcu forward C(256|512)", "keys values", 128, 32),
    ("sm_100 rcu forward C(256|512) 2-D", "x out", 128, 64),
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
    # Rows of a patch of 8 are 16 bytes in half precision.
    ("sm_.* rcu forward .*2-D patch 8", "x out", 128, 128),
    ("", LARGE, 128, 64),
)

# By reason: targets, dtypes and entry, and the failure as it is reported.
FAILURES: dict[str, str] = {
    "op 1 in 3-D: some numbers more than there are registers": """\
sm_80 float32 gcu backward, four 3-D scales, channels last, coarse pixels: stack 16, spills 16
""",
    "op 2 in float32: products are three of tf32, whose operands need more registers than there are": """\
sm_80 float32 rcu backward C32 2-D patch 8, attention: stack 152, spills 88
sm_80 float32 rcu backward C32 2-D patch 8, position bias: stack 144, spills 60
sm_80 float32 rcu backward C64 2-D patch 8, attention: stack 120, spills 69
sm_80 float32 rcu backward C64 2-D patch 8, position bias: stack 144, spills 58
sm_80 float32 rcu backward C128 2-D patch 8, attention: stack 128, spills 75
sm_80 float32 rcu backward C128 2-D patch 8, position bias: stack 144, spills 58
sm_80 float32 rcu backward C256 2-D patch 8, attention: stack 128, spills 75
sm_80 float32 rcu backward C256 2-D patch 8, position bias: stack 144, spills 58
sm_80 float32 rcu backward C512 2-D patch 8, attention: stack 128, spills 69
sm_80 float32 rcu backward C512 2-D patch 8, position bias: stack 144, spills 60
sm_80 float32 rcu backward C32 3-D patch 4, attention: stack 160, spills 91
sm_80 float32 rcu backward C32 3-D patch 4, position bias: stack 144, spills 60
sm_80 float32 rcu backward C64 3-D patch 4, attention: stack 144, spills 87
sm_80 float32 rcu backward C64 3-D patch 4, position bias: stack 144, spills 60
sm_80 float32 rcu backward C128 3-D patch 4, attention: stack 128, spills 75
sm_80 float32 rcu backward C128 3-D patch 4, position bias: stack 160, spills 62
sm_80 float32 rcu backward C256 3-D patch 4, attention: stack 128, spills 75
sm_80 float32 rcu backward C256 3-D patch 4, position bias: stack 160, spills 62
sm_80,sm_86,sm_89 float32 rcu backward C64 2-D patch 4, position bias: stack 24, spills 12
sm_80 float32 rcu backward C64 2-D patch 7, attention: stack 232, spills 134
sm_80 float32 rcu backward C64 2-D patch 7, position bias: stack 144, spills 60
sm_80 float32 rcu backward C64 2-D patch 16, attention: stack 8, spills 2
sm_86,sm_89 float32 rcu backward C32 2-D patch 8, attention: stack 120, spills 58
sm_86,sm_89 float32 rcu backward C32 2-D patch 8, position bias: stack 88, spills 34
sm_86,sm_89 float32 rcu backward C64 2-D patch 8, attention: stack 96, spills 58
sm_86,sm_89 float32 rcu backward C64 2-D patch 8, position bias: stack 64, spills 24
sm_86,sm_89 float32 rcu backward C128 2-D patch 8, attention: stack 104, spills 60
sm_86,sm_89 float32 rcu backward C128 2-D patch 8, position bias: stack 64, spills 24
sm_86,sm_89 float32 rcu backward C256 2-D patch 8, attention: stack 104, spills 66
sm_86,sm_89 float32 rcu backward C256 2-D patch 8, position bias: stack 80, spills 30
sm_86,sm_89 float32 rcu backward C512 2-D patch 8, attention: stack 88, spills 50
sm_86,sm_89 float32 rcu backward C512 2-D patch 8, position bias: stack 80, spills 30
sm_86,sm_89 float32 rcu backward C32 3-D patch 4, attention: stack 112, spills 56
sm_86,sm_89 float32 rcu backward C32 3-D patch 4, position bias: stack 104, spills 40
sm_86,sm_89 float32 rcu backward C64 3-D patch 4, attention: stack 88, spills 48
sm_86,sm_89 float32 rcu backward C64 3-D patch 4, position bias: stack 104, spills 40
sm_86,sm_89 float32 rcu backward C128 3-D patch 4, attention: stack 112, spills 62
sm_86,sm_89 float32 rcu backward C128 3-D patch 4, position bias: stack 72, spills 27
sm_86,sm_89 float32 rcu backward C256 3-D patch 4, attention: stack 112, spills 70
sm_86,sm_89 float32 rcu backward C256 3-D patch 4, position bias: stack 88, spills 33
sm_86,sm_89 float32 rcu backward C64 2-D patch 7, attention: stack 152, spills 110
sm_86,sm_89 float32 rcu backward C64 2-D patch 7, position bias: stack 128, spills 47
sm_90 float32 rcu backward C64 2-D patch 8, channels: stack 8, spills 2
sm_90 float32 rcu backward C128 2-D patch 8, channels: stack 8, spills 2
sm_90 float32 rcu backward C256 2-D patch 8, channels: stack 8, spills 2
sm_90 float32 rcu backward C512 2-D patch 8, channels: stack 8, spills 2
sm_90 float32 rcu backward C128 3-D patch 4, channels: stack 8, spills 4
sm_90 float32 rcu backward C256 3-D patch 4, channels: stack 8, spills 4
sm_90 float32 rcu backward C64 2-D patch 7, attention: stack 16, spills 10
sm_90 float32 rcu backward C64 2-D patch 16, attention: stack 32, spills 22
sm_100 float32 rcu backward C64 2-D patch 16, attention: stack 32, spills 19
sm_120 float32 rcu backward C32 2-D patch 8, attention: stack 152, spills 99
sm_120 float32 rcu backward C32 2-D patch 8, position bias: stack 176, spills 72
sm_120 float32 rcu backward C64 2-D patch 8, attention: stack 136, spills 88
sm_120 float32 rcu backward C64 2-D patch 8, position bias: stack 96, spills 36
sm_120 float32 rcu backward C128 2-D patch 8, attention: stack 144, spills 91
sm_120 float32 rcu backward C128 2-D patch 8, position bias: stack 96, spills 36
sm_120 float32 rcu backward C256 2-D patch 8, attention: stack 144, spills 91
sm_120 float32 rcu backward C256 2-D patch 8, position bias: stack 96, spills 36
sm_120 float32 rcu backward C512 2-D patch 8, attention: stack 144, spills 92
sm_120 float32 rcu backward C512 2-D patch 8, position bias: stack 96, spills 36
sm_120 float32 rcu backward C32 3-D patch 4, attention: stack 152, spills 100
sm_120 float32 rcu backward C32 3-D patch 4, position bias: stack 176, spills 73
sm_120 float32 rcu backward C64 3-D patch 4, attention: stack 160, spills 100
sm_120 float32 rcu backward C64 3-D patch 4, position bias: stack 184, spills 74
sm_120 float32 rcu backward C128 3-D patch 4, attention: stack 136, spills 89
sm_120 float32 rcu backward C128 3-D patch 4, position bias: stack 96, spills 36
sm_120 float32 rcu backward C256 3-D patch 4, attention: stack 136, spills 89
sm_120 float32 rcu backward C256 3-D patch 4, position bias: stack 96, spills 36
sm_120 float32 rcu forward C64 2-D patch 4: stack 104, spills 47
sm_120 float32 rcu backward C64 2-D patch 7, attention: stack 176, spills 99
sm_120 float32 rcu backward C64 2-D patch 7, position bias: stack 136, spills 52
sm_120 float32 rcu backward C64 2-D patch 16, attention: stack 32, spills 21
""",
    "op 2 in half precision: some numbers more than there are registers; sm_120 has the entries of sm_80": """\
sm_80 bfloat16,float16 rcu backward C64 2-D patch 4, position bias: stack 40, spills 18
sm_90 bfloat16,float16 rcu backward C32 3-D patch 4, channels: stack 8, spills 4
sm_100 bfloat16,float16 rcu backward C64 2-D patch 7, attention: stack 8, spills 4
sm_120 bfloat16,float16 rcu backward C64 2-D patch 8, channels: stack 48, spills 22
sm_120 bfloat16 rcu backward C128 2-D patch 8, attention: stack 8, spills 3
sm_120 bfloat16,float16 rcu backward C128 2-D patch 8, channels: stack 48, spills 22
sm_120 bfloat16 rcu backward C256 2-D patch 8, attention: stack 8, spills 3
sm_120 bfloat16,float16 rcu backward C256 2-D patch 8, channels: stack 48, spills 22
sm_120 bfloat16 rcu backward C512 2-D patch 8, attention: stack 8, spills 3
sm_120 bfloat16,float16 rcu backward C512 2-D patch 8, channels: stack 48, spills 22
sm_120 bfloat16,float16 rcu backward C64 3-D patch 4, channels: stack 64, spills 30
sm_120 bfloat16 rcu backward C128 3-D patch 4, attention: stack 8, spills 3
sm_120 bfloat16,float16 rcu backward C128 3-D patch 4, channels: stack 48, spills 22
sm_120 bfloat16 rcu backward C256 3-D patch 4, attention: stack 8, spills 3
sm_120 bfloat16,float16 rcu backward C256 3-D patch 4, channels: stack 48, spills 22
sm_120 bfloat16,float16 rcu backward C64 2-D patch 4, channels: stack 40, spills 18
sm_120 bfloat16,float16 rcu backward C64 2-D patch 7, channels: stack 48, spills 24
sm_120 bfloat16 rcu backward C64 2-D patch 16, channels: stack 24, spills 10
sm_120 float16 rcu backward C64 2-D patch 16, channels: stack 24, spills 12
""",
}


def failures() -> dict[tuple[str, str, str], str]:
    """All that are known, by target, dtype and entry."""
    found = {}
    for line in "".join(FAILURES.values()).splitlines():
        entry, text = line.split(": ", 1)
        targets, dtypes, label = entry.split(" ", 2)
        for target in targets.split(","):
            for dtype in dtypes.split(","):
                found[target, dtype, label] = text
    return found


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
