"""The network through torch's compiler: convolutions, norms and activations fused, weights folded in."""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor

from .networks.grcsf import GRCSF

__all__ = ["CompiledNetwork"]


class CompiledNetwork:
    """A compiled form of a network in evaluation mode, with its weights as constants ("freezing").

    Compiled when a batch of a new size first comes, which takes a minute; torch keeps the result on disk and finds it
    in later runs. On a processor whose C++ kernels are built, the network as it is was as fast or faster (README).

    Attributes:
        seconds: that the first batches of all sizes took, compiling included.
        sizes: how many there were.
    """

    def __init__(self, network: GRCSF) -> None:
        self.seconds, self.sizes = 0.0, 0
        self._forward = torch.compile(network, dynamic=False)
        self._compiling = threading.Lock()
        self._known: set[torch.Size] = set()

    def __call__(self, image: Tensor, residual_maps: Tensor | None) -> Tensor:
        if image.shape in self._known:
            return self._forward(image, residual_maps)
        import torch._inductor.config as inductor

        # One thread at a time: others wait for what they need as well.
        with self._compiling, inductor.patch(freezing=True):
            began = time.perf_counter()
            result = self._forward(image, residual_maps)
            if image.shape not in self._known:
                self._known.add(image.shape)
                self.seconds += time.perf_counter() - began
                self.sizes += 1
        return result
