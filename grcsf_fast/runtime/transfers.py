"""Copies between the processor's memory and a device's, for which nobody waits longer than needed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["CPU", "fetch", "to_device", "volumes_on"]

CPU = torch.device("cpu")


def volumes_on(device: torch.device) -> torch.device:
    """Where whole volumes are worked on, beside networks on a device.

    On a GPU of CUDA's itself, so that a volume goes there once; beside other devices, which lack some of the operations
    (antialiased resampling), on the CPU.
    """
    return device if device.type == "cuda" else CPU


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there, itself where it is there already.

    To a GPU it goes through pinned memory and behind what the GPU has been given so far; the call does not wait for
    it. The pinned memory is torch's, which uses it again when the copy is done.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the processor's memory, by the same names; those that are there are not copied.

    From a GPU with one wait for all of them, in which the thread sleeps.
    """
    devices = {one.device for one in tensors.values() if one.device.type == "cuda"}
    if not devices:
        return {name: one.cpu() for name, one in tensors.items()}
    staged = {
        name: torch.empty(one.shape, dtype=one.dtype, device=CPU, pin_memory=True).copy_(one, non_blocking=True)
        for name, one in tensors.items()
    }
    for device in devices:
        copied = torch.cuda.Event(blocking=True)
        copied.record(torch.cuda.current_stream(device))
        copied.synchronize()
    # Into memory of their own: results may be kept for long, and what is pinned no other program can have.
    return {name: one.clone() for name, one in staged.items()}
