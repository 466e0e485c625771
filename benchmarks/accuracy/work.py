"""What the processes of ``make accuracy`` are called with: a subject to draw, a run to make."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.accuracy.cases import Size, draw_case
from benchmarks.accuracy.runs import Run, store
from benchmarks.accuracy.train import run
from benchmarks.machine import processor
from grcsf_fast.pretrained.bundle import load_bundle
from grcsf_fast.runtime.versions import versions

__all__ = ["draw_one", "make_one"]


def draw_one(folder: Path, name: str, index: int, size: Size, mae: str) -> None:
    """A subject, with the maps of the bundle ``mae``."""
    draw_case(folder, name, index, size.subjects()[name], load_bundle(mae))


def make_one(folder: Path, one: Run, size: Size, mae: str, device: str) -> None:
    """A run; ``mae`` being the start of the bundle's hash."""
    where = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()
    store(folder, one, mae, run(*one, folder, size, mae, device) | {"machine": where, "versions": versions()})
