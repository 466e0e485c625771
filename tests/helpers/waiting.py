"""What a device would have the processor wait for, seen without one.

On torch's device ``meta`` operations give shapes alone, so whatever asks for a number or a size that depends on numbers
fails there, and so does a copy to the processor. What a GPU would do beside that, :class:`Watched` notes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
# That end with a number, or a size, in the processor's hand.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::lift_fresh"}


class Watched(TorchDispatchMode):
    """Notes each operation.

    Attributes:
        waits: names of those that a GPU would have the processor wait for: numbers, sizes, masks as indices.
        mixed: names of those that take tensors of another device beside the CPU's, which are copied on the quiet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.mixed: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name, tensors = func.name().split(".")[0], list(_tensors((args, kwargs or {})))
        by_mask = name == "aten::index" and any(one.dtype in (torch.bool, torch.uint8) for one in _tensors(args[1]))
        if name in WAITING or by_mask:
            self.waits.append(name)
        # Numbers that are tensors of the CPU go with the launch.
        if name not in COPIES and len({one.device for one in tensors if one.dim()}) > 1:
            self.mixed.append(name)
        return result


def _tensors(values) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
