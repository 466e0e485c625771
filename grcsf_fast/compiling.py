"""The network through torch's compiler: convolutions, norms and activations fused, weights folded in."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from .networks.grcsf import GRCSF

__all__ = ["compile_network"]


def compile_network(network: GRCSF) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A compiled form of a network in evaluation mode, with its weights as constants ("freezing").

    Compiled when a batch of a new size first comes, which takes a minute; torch keeps the result on disk and finds it
    in later runs.
    """
    import torch._inductor.config as inductor

    forward = torch.compile(network, dynamic=False)
    compiling = threading.Lock()
    known: set[tuple[torch.Size, torch.device]] = set()

    def run(image: Tensor, residual_maps: Tensor | None) -> Tensor:
        key = image.shape, image.device
        if key in known:
            return forward(image, residual_maps)
        # One thread at a time: others wait for what they need as well.
        with compiling, inductor.patch(freezing=True):
            result = forward(image, residual_maps)
            known.add(key)
        return result

    return run
