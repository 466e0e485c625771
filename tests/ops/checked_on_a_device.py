"""The check of a kernel's first use on a device for which autograd has a thread, as for each GPU: for each case a line
of JSON.

Run by test_check_on_a_device.py in a process of its own. The device's tensors hold tensors of the CPU, and Triton's
place has the C++ kernels, which note the thread that calls them and what a launch would see there.
"""

from __future__ import annotations

import json
import os
import threading
import warnings

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils.checkpoint import checkpoint

from grcsf_fast import functional
from grcsf_fast.functional import internal
from grcsf_fast.kernels.triton.grouped import crowded
from grcsf_fast.ops import adapters, backends, check, cpp


class Module(_DummyBackendModule):
    """``torch.other``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("other", Module())
OTHER = torch.device("other", 0)


class Held(torch.Tensor):
    """On the device."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Held:
        held = torch.Tensor._make_wrapper_subclass(cls, raw.shape, strides=raw.stride(), dtype=raw.dtype, device=OTHER)
        held.raw = raw
        return held

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "pool3d" in op.__name__ and "backward" in op.__name__ and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{op} has no deterministic implementation")
        comes_back = kwargs.get("device") == torch.device("cpu")
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        args, kwargs = tree_map(lambda one: one.raw if isinstance(one, Held) else one, (args, kwargs))
        result = op(*args, **kwargs)
        if comes_back:
            return result
        return tree_map(lambda one: Held(one) if isinstance(one, torch.Tensor) else one, result)


@torch.library.impl("aten::empty_strided", "privateuseone")
def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Held(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl("aten::empty.memory_format", "privateuseone")
def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Held(torch.empty(size, dtype=dtype))


class Noted:
    """The kernels, which note (name, thread, whether a program has several patches)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bool]] = []
        self.fails = ""

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, thread(), crowded.get()))
            if name == self.fails:
                raise ValueError("no such instruction")
            return getattr(cpp, name)(*arguments)

        return call if name.startswith(("gcu", "rcu", "norm", "pool")) else getattr(cpp, name)


def thread() -> str:
    current = threading.current_thread()
    if current is threading.main_thread():
        return "main"
    return current.name if current.name == "grcsf-fast check" else "autograd"


def held(*shape: int) -> torch.Tensor:
    return Held(torch.rand(shape))


def compensation() -> list[torch.Tensor]:
    return [held(1, 3, 4, 4), held(1, 3, 2, 2), held(1, 3), held(1, 3), held(3)]


def compensated(features, *others):
    return functional.global_compensation(features, *others)[0]


def recomputed() -> None:
    """The backward is first asked for in autograd's thread."""
    features, *others = compensation()
    outputs = checkpoint(
        lambda one, *rest: compensated(2 * one, *rest), features.requires_grad_(), *others, use_reentrant=True
    )
    outputs.sum().backward()


def attention() -> None:
    """Twice, with gradients; then what a launch of autograd's thread would see."""
    given = {
        "query_weight": (1, 1, 2, 3), "query_bias": (1, 1, 2), "position_bias": (1, 4, 4),
        "output_weight": (1, 1, 3, 2), "output_bias": (3,), "score_weight": (5, 3), "score_context": (1, 5),
        "score_vector": (5,), "score_bias": (),
    }  # fmt: skip
    weights = functional.AttentionWeights(**{name: held(*shape) for name, shape in given.items()})
    x = held(1, 3, 4, 4).requires_grad_()
    outputs = functional.patch_cross_attention(x, held(1, 1, 2, 4, 4), held(1, 1, 2, 4, 4), weights, 2)
    outputs[0].sum().backward()
    x.grad = None
    seen = x.clone()
    seen.register_hook(lambda grad: noted.calls.append(("afterwards", thread(), crowded.get())))
    seen.sum().backward()


def wrong_attention() -> None:
    noted.fails = "rcu_backward"
    attention()


def pooling() -> None:
    """Of a volume, where autograd may run nothing that is not the same in every run."""
    torch.use_deterministic_algorithms(True)
    x = held(1, 3, 4, 4, 4).requires_grad_()
    largest, mean = internal.pool_with_mean(x)
    (largest + mean).sum().backward()


noted = Noted()
adapters._ADAPTERS["triton"] = noted
other = backends.Backend("triton", ("other",), cpp.DTYPES, "for tests", lambda: None)
backends._BACKENDS = {"triton": other, "reference": backends._BACKENDS["reference"]}
warnings.simplefilter("ignore")
for case in (recomputed, attention, wrong_attention, pooling):
    noted.__init__()
    check._passed.clear()
    check._failed.clear()
    case()
    print(json.dumps([case.__name__, noted.calls, list(check._failed.values())]), flush=True)
os._exit(0)  # autograd's thread for such a device may abort a process that ends otherwise
