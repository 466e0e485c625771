"""``grcsf-fast export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..data.files import check_writable
from ..errors import ArgumentError
from ..pretrained.bundle import load_bundle
from ..pretrained.export import export_onnx, export_program
from ..pretrained.monai_bundle import export_monai
from .shared import new_command, printable

__all__ = ["add"]

WRITERS = {".onnx": export_onnx, ".pt2": export_program}


def add(commands: Any) -> None:
    command = new_command(
        commands, "export", run,
        "Write a model for other programs: its network as ONNX or as a program of torch.export, or all of it as a "
        "bundle of MONAI.",
    )  # fmt: skip
    command.add_argument("-m", "--model", default="demo", help="a bundle's folder, or the name of a packaged one")
    command.add_argument("-o", "--output", metavar="FILE", help="ending in .onnx or .pt2: the network")
    command.add_argument(
        "--monai", metavar="FOLDER", help="a bundle that `python -m monai.bundle run` executes, MONAI's command, "
        "which needs the package fire",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    if options.output is None and options.monai is None:
        raise ArgumentError("expected --output or --monai, got neither")
    output = Path(options.output) if options.output is not None else None
    if output is not None and (output.suffix.lower() not in WRITERS or output.is_dir()):
        raise ArgumentError(f"--output: expected the name of a file ending in .onnx or .pt2, got {output}")
    for folder in (output.parent if output is not None else None, options.monai):
        if folder is not None:
            check_writable(folder)
    bundle = load_bundle(options.model)
    if output is not None:
        print(printable(f"wrote {WRITERS[output.suffix.lower()](bundle, output)}"))
    if options.monai is not None:
        print(printable(f"wrote {export_monai(bundle, options.monai)}"))
    return 0
