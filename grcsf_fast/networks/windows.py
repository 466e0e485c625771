"""Sliding windows over a volume for 3-D networks, and images brought to another size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.transfers import to_device

__all__ = ["OVERLAP", "Windows", "resize_images"]

OVERLAP = 0.25  # of neighbouring windows

Place = tuple[slice, ...]


@dataclass(frozen=True)
class Windows:
    """Sliding windows with MONAI's places and Gaussian weights.

    Attributes:
        roi_size: of each.
        missing: by which an image is smaller than a window, for each axis.
        shape: of the image, padded to a window at least.
        places: of all windows.
        seen: those with foreground.
    """

    roi_size: tuple[int, ...]
    missing: list[int]
    shape: tuple[int, ...]
    places: list[Place]
    seen: list[Place]

    @classmethod
    def over(
        cls, shape: tuple[int, ...], roi_size: tuple[int, ...], foreground: Tensor | None, turned: bool
    ) -> Windows:
        from monai.data.utils import dense_patch_slices

        missing = [max(0, edge - size) for edge, size in zip(roi_size, shape, strict=True)]
        padded = tuple(size + gap for size, gap in zip(shape, missing, strict=True))
        places = dense_patch_slices(padded, roi_size, [max(1, int(edge * (1 - OVERLAP))) for edge in roi_size])
        windows = cls(roi_size, missing, padded, places, places)
        if foreground is None:
            return windows
        foreground = (foreground.flip(0) if turned else foreground)[None, None].float()
        foreground = F.pad((resize_images(foreground, shape) > 0).float(), windows.padding())[0, 0] > 0
        return cls(roi_size, missing, padded, places, [place for place in places if foreground[place].any()])

    def padding(self) -> list[int]:
        """As :func:`torch.nn.functional.pad` wants it."""
        return [side for gap in reversed(self.missing) for side in (gap // 2, gap - gap // 2)]

    def cut(self, image: Tensor) -> Tensor:
        """(1, K, X, Y, Z) to (windows that are seen, K, \\*roi_size)."""
        padded = F.pad(image, self.padding(), mode="replicate")
        return torch.stack([padded[(0, slice(None), *place)] for place in self.seen])

    def assembled(self, outputs: Sequence[Tensor], unseen: Sequence[float], device: torch.device) -> Tensor:
        """Of the windows that are seen, (K, \\*roi_size) each, to (1, K, X, Y, Z).

        Args:
            outputs: of the windows.
            unseen: of each of the K channels its value in windows that no network saw.
            device: of the outputs, and of what becomes of them.
        """
        from monai.data.utils import compute_importance_map

        weights = compute_importance_map(self.roi_size, mode="gaussian", device="cpu", dtype=torch.float32)
        weights = to_device(weights, device)
        weight = torch.zeros(self.shape, dtype=torch.float32, device=device)
        total = weight.new_zeros((len(unseen), *self.shape))
        for place in self.places:
            weight[place] += weights
            if place not in self.seen:
                for channel, value in enumerate(unseen):
                    total[(channel, *place)] += value * weights
        for place, one in zip(self.seen, outputs, strict=True):
            total[(slice(None), *place)] += weights * one
        inner = [slice(gap // 2, size - gap + gap // 2) for gap, size in zip(self.missing, self.shape, strict=True)]
        return (total / weight)[(slice(None), *inner)][None]


def resize_images(images: Tensor, shape: Sequence[int]) -> Tensor:
    """(N, K, \\*S) by linear interpolation; itself where nothing changes."""
    if tuple(images.shape[2:]) == tuple(shape):
        return images
    mode = "bilinear" if images.dim() == 4 else "trilinear"
    return F.interpolate(images, size=tuple(shape), mode=mode, align_corners=False)
