"""Which device and which precision, and why.

Some processors multiply bfloat16 no faster than float32, so ``auto`` measures on a processor, once. A result must not
change between runs because a measurement did: the choice is kept in the user's cache folder
(``$XDG_CACHE_HOME/grcsf-fast/precision`` or ``~/.cache/...``), and a folder of results goes on as it began.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .cache import cache_folder
from .threads import one_thread

__all__ = [
    "PRECISIONS",
    "Choice",
    "choose_device",
    "choose_precision",
    "choose_training_precision",
    "measured_choice",
    "multiplies_bfloat16",
    "without_autocast",
]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Times as fast as float32 that bfloat16 must be; more where each run measures anew, so that all of them choose alike.
CLEARLY, CLEARLY_UNKEPT = 1.05, 1.15
ROUNDS = 5  # of both precisions in turn; the best of each counts
ENOUGH_SECONDS = 0.4  # then no further round begins
# Of /proc/cpuinfo, that say how bfloat16 is multiplied.
INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "avx10_2"}


@dataclass(frozen=True)
class Choice:
    """A precision, and why this one.

    Attributes:
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        reason: a few words.
    """

    precision: str
    reason: str


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, operations run in the dtypes of their tensors, whatever autocast is on outside."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def choose_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU; any other device of torch's, such as ``"mps"``, by its name.

    CUDA without a number is the GPU that is the current one now, with its number: each thread has a current one of its
    own, which begins as the first.

    Raises:
        ValueError: no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"device: expected 'auto', 'cpu', 'cuda[:N]' or another device of torch's, got {device!r}"
        ) from error
    if chosen.type == "cpu" and chosen.index:
        raise ArgumentError(f"device: expected 'cpu', of which torch has one alone, got {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count() > 0:
        raise ArgumentError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device: {device!r} was asked for, and torch finds no CUDA device; use 'cpu' or 'auto'")
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if chosen.type not in ("cpu", "cuda"):
        try:
            torch.ones(1, dtype=torch.float32, device=chosen).cpu()
        # Each device has errors of its own; those that hold no values, such as "meta", cannot give any back.
        except Exception as error:
            reason = str(error).split(". ")[0]
            raise ArgumentError(
                f"device: {device!r} was asked for, and torch cannot compute on it: {reason}"
            ) from error
    return chosen


def choose_precision(precision: str, device: torch.device, measure: Callable[[], Choice] | None = None) -> Choice:
    """The precision asked for; ``"auto"`` is bfloat16 where the hardware multiplies it and is faster so.

    Args:
        precision: a name of ``PRECISIONS``, or ``"auto"``.
        device: to compute on.
        measure: decides for a processor that multiplies bfloat16; None: it is not measured.

    Raises:
        ValueError: a precision that there is not, or float16 on the CPU.
    """
    if precision == "auto":
        if not multiplies_bfloat16(device):
            return Choice("float32", "no instructions for bfloat16 here")
        if device.type == "cpu" and measure is not None:
            return measure()
        return Choice("bfloat16", "the hardware multiplies it")
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision: expected one of {[*PRECISIONS, 'auto']}, got {precision!r}")
    if precision == "float16" and device.type == "cpu":
        raise ArgumentError(
            "precision: expected float32 or bfloat16 on the CPU, which has no fast float16, got 'float16'"
        )
    return Choice(precision, "as asked for")


def choose_training_precision(
    precision: str, device: torch.device, model: nn.Module, trial: Callable[[], Tensor]
) -> Choice:
    """bfloat16 or float32 for a training, and why; ``"auto"`` as for :func:`choose_precision`.

    Args:
        precision: ``"auto"``, ``"bfloat16"`` or ``"float32"``.
        device: to train on.
        model: the network in training.
        trial: a loss of fixed input.
    """

    def step(dtype: torch.dtype) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = trial()
        loss.backward()
        model.zero_grad()

    subject = {"kind": "training", "model": getattr(model, "config", type(model).__name__)}
    return choose_precision(precision, device, lambda: measured_choice(subject, step))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has instructions for it: emulated on a processor, it is slower than float32."""
    if device.type == "cuda":  # torch.cuda.is_bf16_supported speaks of the current one
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return "avx512_bf16" in _processor()["instructions"]


def measured_choice(subject: Mapping[str, Any], run: Callable[[torch.dtype], Any]) -> Choice:
    """The faster of float32 and bfloat16 on this processor, in one thread; measured once and kept.

    Args:
        subject: what is measured, JSON values; with processor and versions the key of the choice that is kept.
        run: computes something typical in a dtype.

    Returns:
        The choice; where it cannot be kept, bfloat16 only if it is so much faster that noise would not change it.
    """
    key = {"subject": dict(subject), "processor": _processor(), "versions": _versions()}
    text = json.dumps(key, sort_keys=True)
    if text not in _choices:
        _choices[text] = _kept_choice(key, text, run)
    return _choices[text]


_choices: dict[str, Choice] = {}


def _kept_choice(key: Mapping[str, Any], text: str, run: Callable[[torch.dtype], Any]) -> Choice:
    try:
        path = cache_folder("precision") / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        found = _read(path)
    except (OSError, RuntimeError):  # Path.home() raises RuntimeError where there is none
        path = found = None
    if found is None:
        ratio = _speed_of_bfloat16(run)
        found = _choice("bfloat16" if ratio > CLEARLY_UNKEPT else "float32", ratio)
        if path is not None:
            with contextlib.suppress(OSError):
                kept = {"precision": "bfloat16" if ratio > CLEARLY else "float32", "bfloat16_times_as_fast": ratio}
                _keep(path, {**key, **kept})
                found = _read(path) or found
    return found


def _keep(path: Path, content: Mapping[str, Any]) -> None:
    """Write a choice down, unless another process that measured at the same time was first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".partial-{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        part.write_text(json.dumps(content) + "\n")
        try:
            os.link(part, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _choice(precision: str, ratio: float) -> Choice:
    return Choice(precision, f"bfloat16 was measured {ratio:.2f} times as fast as float32 here")


def _read(path: Path) -> Choice | None:
    """A choice that was kept; None where there is none. A damaged one is removed."""
    try:
        kept = json.loads(path.read_text())
        if kept["precision"] in ("float32", "bfloat16"):
            return _choice(kept["precision"], float(kept["bfloat16_times_as_fast"]))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        pass
    path.unlink(missing_ok=True)
    return None


def _speed_of_bfloat16(run: Callable[[torch.dtype], Any]) -> float:
    """Best time of float32 over that of bfloat16."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    with one_thread():
        for dtype in best:
            run(dtype)  # the first time is slower
        began = perf_counter()
        for _ in range(ROUNDS):
            for dtype in best:
                start = perf_counter()
                run(dtype)
                best[dtype] = min(best[dtype], perf_counter() - start)
            if perf_counter() - began > ENOUGH_SECONDS:
                break
    return best[torch.float32] / max(best[torch.bfloat16], 1e-9)


def _processor() -> dict[str, Any]:
    """Model and instructions that matter here, by /proc/cpuinfo."""
    found: dict[str, Any] = {"model": platform.processor() or platform.machine(), "instructions": []}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                found["model"] = value.strip()
            if name.strip() == "flags":
                found["instructions"] = sorted(INSTRUCTIONS & set(value.split()))
                break
    return found


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["grcsf-fast"] = metadata.version("grcsf-fast")
    return found
