"""Whether a module is what its class says, or somebody has hooked into it."""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import torch.nn.modules.module as torch_module
from torch import Tensor, nn

__all__ = ["has_hooks", "is_plain", "unwrapped"]

Kind = TypeVar("Kind", bound=nn.Module)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's ``forward``."""
    # Some libraries put their own forward on a module instead of a hook.
    return (
        "forward" in vars(module)
        or any(getattr(module, name) for name in HOOKS)
        or any(getattr(torch_module, f"_global{name}") for name in HOOKS)
    )


def is_plain(module: nn.Module, *kinds: type[Kind]) -> TypeGuard[Kind]:
    """Whether the module may be computed from its weights, without being called.

    Not where it is of a subclass (parametrised, quantised, an adapter's), has hooks (weight norm, pruning) or weights
    that are more than tensors (sharded, quantised).
    """
    return (
        type(module) in kinds
        and not has_hooks(module)
        and all(one is None or type(one) in (Tensor, nn.Parameter) for one in module._parameters.values())
    )


def unwrapped(module: Any) -> Any:
    """The module as it was before ``torch.compile`` wrapped it, which gives its weights other names."""
    return getattr(module, "_orig_mod", module)
