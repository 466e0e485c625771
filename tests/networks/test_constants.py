"""Tensors that follow from numbers alone, moved to a device by several threads."""

from __future__ import annotations

import torch

from grcsf_fast.networks import constants

META = torch.device("meta")


def test_constants_that_others_put_out():
    """While one is being handed out, other threads make so many that all are forgotten."""
    made = constants.constant_tensors(lambda size: (torch.zeros(size, device="cpu"),))

    class Holding(list):
        def extend(self, tensors):
            super().extend(tensors)
            constants._held.set(None)
            for size in range(2, 2 + constants.KEPT):
                made(size, device=META)

    token = constants._held.set(held := Holding())
    try:
        (found,) = made(1, device=META)
    finally:
        constants._held.reset(token)
    assert found.shape == (1,)
    assert held[0] is found
    assert made(1, device=META)[0] is not found
