"""The network through torch's compiler: convolutions, norms and activations fused, weights folded in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..networks.grcsf import GRCSF
from ..networks.unit_maps import with_unit_maps

__all__ = ["CompiledNetwork"]


class CompiledNetwork:
    """A compiled form of a network in evaluation mode, with its weights as constants ("freezing").

    Compiled when a batch of a new size first comes, which takes a minute; torch keeps the result on disk and finds it
    in later runs.

    Attributes:
        seconds: that the first batches of all sizes took, compiling included.
        sizes: how many there were.
    """

    def __init__(self, network: GRCSF) -> None:
        self.seconds, self.sizes = 0.0, 0
        self._forward = with_unit_maps(network)
        self._compiling = threading.Lock()
        # Compiled code holds for one size of images and one number of threads.
        self._known: dict[tuple[torch.Size, int], Callable[..., Tensor]] = {}

    def __call__(self, image: Tensor, residual_maps: Tensor | None) -> Tensor:
        key = image.shape, torch.get_num_threads()
        if (forward := self._known.get(key)) is not None:
            return forward(image, residual_maps)
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        # One thread at a time: others wait for what they need as well. Without a limit of sizes, beyond which torch
        # would go back to the network as it is.
        limits = {"recompile_limit": 10**6, "accumulated_recompile_limit": 10**6}
        with self._compiling, inductor.patch(freezing=True), dynamo.patch(**limits):
            if key not in self._known:
                began = time.perf_counter()
                forward = torch.compile(self._forward, dynamic=False)
                result = forward(image, residual_maps)
                self._known[key] = forward
                self.seconds += time.perf_counter() - began
                self.sizes += 1
                return result
        return self._known[key](image, residual_maps)
