"""What PyTorch does to a function beside calling it."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["transformed"]


def transformed() -> str | None:
    """What is being done at the moment that a kernel cannot follow, or None."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap)"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation (torch.autograd.forward_ad)"
    return None


# What torch.compiler.assume_constant_result sets, without which torch.compile would break the graph here. The decorator
# itself imports the whole of dynamo, a second that `import grcsf_fast` should not cost.
transformed._dynamo_marked_constant = True
