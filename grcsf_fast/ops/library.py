"""How a kernel becomes an op of ``torch.library``, and what torch may then do to it.

A kernel knows one thing: tensors in, tensors out, and for some a backward. Whatever else torch does to an op, such as
derivatives of derivatives, forward-mode derivatives and the transforms of :mod:`torch.func`, would give zeros or
nothing in silence; it raises NotImplementedError here, whichever way the op was reached. :func:`torch.vmap` runs the op
once per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ..errors import ArgumentError
from ..runtime.transforms import transformed

__all__ = ["differentiable", "registered"]

NAMESPACE = "grcsf_fast"
REMEDY = 'run the forward inside `with grcsf_fast.use_backend("reference"):`'


def _refuse(name: str, arguments: Sequence[Any]) -> None:
    """Raise where the result would lack what torch wants to follow through the op."""
    what = transformed()
    if what is None:
        return
    if not torch._C._are_functorch_transforms_active():
        tensors = (one for one in pytree.tree_leaves(arguments) if isinstance(one, Tensor))
        if all(forward_ad.unpack_dual(one).tangent is None for one in tensors):
            return
    raise NotImplementedError(f"{name}: its kernels do not follow {what}; {REMEDY}")


class _Guarded(torch.library.Library):
    """A library whose autograd kernels refuse what they would leave out."""

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **settings: Any) -> None:
        def guarded(keyset: Any, *arguments: Any) -> Any:
            _refuse(op_name, arguments)
            return fn(keyset, *arguments)

        super().impl(op_name, guarded if dispatch_key == "Autograd" else fn, dispatch_key, **settings)


_LIBRARY = _Guarded(NAMESPACE, "FRAGMENT")


def registered(
    name: str, devices: tuple[str, ...] = ("cpu", "cuda")
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """The function as the kernel of ``grcsf_fast::name`` on these devices, its schema from its annotations.

    Not ``torch.library.custom_op``: the first call of such an op imports the whole of torch's compiler.
    """

    def register(kernel: Callable[..., Any]) -> torch._ops.OpOverload:
        def run(*arguments: Any) -> Any:
            return kernel(*map(_plain, arguments))

        schema = torch.library.infer_schema(kernel, mutates_args=())
        torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,), lib=_LIBRARY)
        torch.library.impl(f"{NAMESPACE}::{name}", devices, lib=_LIBRARY)(run)
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        torch.library.register_vmap(op, _one_by_one(op), lib=_LIBRARY)
        _LIBRARY.impl(name, _refuse_batches(name), "Batched")
        return op

    return register


def _plain(argument: Any) -> Any:
    """A tensor of a subclass as one of torch's own: kernels need no method that a subclass may have changed."""
    if isinstance(argument, list):
        return [_plain(one) for one in argument]
    if isinstance(argument, Tensor) and type(argument) not in (Tensor, torch.nn.Parameter):
        return Tensor.as_subclass(argument, Tensor)
    return argument


def _one_by_one(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The batching rule of an op: one call per sample."""

    def batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, int]:
        if not info.batch_size:
            raise ArgumentError(f"{op._opname}: expected a sample or more along the axis that vmap maps over, got 0")
        leaves, structure = pytree.tree_flatten(arguments)
        axes = pytree.tree_leaves(in_dims, is_leaf=lambda one: one is None)
        calls = [
            op(*pytree.tree_unflatten(
                [one if axis is None else one.select(axis, sample) for one, axis in zip(leaves, axes, strict=True)],
                structure,
            ))
            for sample in range(info.batch_size)
        ]  # fmt: skip
        return pytree.tree_map(lambda *samples: torch.stack(samples), *calls), 0

    return batched


def _refuse_batches(name: str) -> Callable[..., None]:
    """For the older batching, which is behind ``is_grads_batched`` and ``jacobian(vectorize=True)``."""

    def refused(*arguments: Any) -> None:
        raise NotImplementedError(
            f"{name}: its kernels do not follow batches of gradients (is_grads_batched); {REMEDY}"
        )

    return refused


def differentiable(
    op: torch._ops.OpOverload,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Register the backward of an op; without one, a backward that says who has it."""

    def refused(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op._opname}: its kernels cannot be differentiated{' a second time' if is_backward else ''}; {REMEDY}"
        )

    is_backward = op._opname.endswith("_backward")
    torch.library.register_autograd(op, backward or refused, setup_context=setup_context, lib=_LIBRARY)
