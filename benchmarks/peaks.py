"""What GPUs can do at the most, as their vendor documents it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PEAKS", "Peak"]


@dataclass(frozen=True)
class Peak:
    """Bytes a second from memory; multiplications and additions a second, none of them counted for zeros.

    Attributes:
        bandwidth: of memory.
        half: matrix units, bfloat16 or float16 with sums in float32.
        tf32: matrix units, float32 rounded to tf32.
        vector: float32 without matrix units.
    """

    bandwidth: float
    half: float
    tf32: float
    vector: float


PEAKS = {
    # NVIDIA H100 Tensor Core GPU, datasheet, column SXM; dense is half of what it says with sparsity.
    "H100 SXM": Peak(3.35e12, 989e12, 494e12, 67e12),
    # NVIDIA A100 Tensor Core GPU, datasheet, column 80 GB SXM.
    "A100 SXM": Peak(2.04e12, 312e12, 156e12, 19.5e12),
    # NVIDIA Ada GPU Architecture, white paper, appendix A; matrix units with sums in float32, dense.
    "RTX 4090": Peak(1.008e12, 165.2e12, 82.6e12, 82.6e12),
}
