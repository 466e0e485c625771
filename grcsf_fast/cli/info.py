"""``grcsf-fast info``."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..errors import ArgumentError, GrcsfError
from ..inference.predictor import Predictor
from ..inference.warm_up import warm_up
from ..networks.weights import PACKAGED
from ..ops import triton
from ..ops.backends import BackendUnavailableError, backend_info
from ..ops.check import examine_all
from ..pretrained.bundle import read_config
from ..runtime.precision import PRECISIONS, Choice, choose_device, choose_precision
from ..runtime.versions import versions
from .shared import AT_LEAST_1, KERNELS_FAILED, add_device, new_command, printable

__all__ = ["add"]


def add(commands: Any) -> None:
    command = new_command(
        commands, "info", run, "List backends, the precision that auto takes, packaged bundles and versions."
    )
    command.add_argument(
        "--check",
        action="store_true",
        help="also run every kernel that can run here on small inputs against the reference; exit code 1 if one fails",
    )
    command.add_argument(
        "--warm-up", action="store_true",
        help="also compile the Triton kernels that predict will run on this GPU, so that no case waits for them; give "
        "--batch-size, --precision and --device as to predict",
    )  # fmt: skip
    command.add_argument(
        "-m", "--model", metavar="BUNDLE", default=argparse.SUPPRESS, help="to warm up (default: demo)"
    )
    command.add_argument(
        "-i", "--input", metavar="FILE", default=argparse.SUPPRESS,
        help="a volume as large as those to come, to warm up with (default: noise as large as a head)",
    )  # fmt: skip
    command.add_argument(
        "--batch-size", type=AT_LEAST_1, default=argparse.SUPPRESS, metavar="N", help="axial slices at once"
    )
    command.add_argument(
        "--precision", choices=[*PRECISIONS, "auto"], default=argparse.SUPPRESS, help="of the networks"
    )
    add_device(command)


def run(options: argparse.Namespace) -> int:
    given = [name for name in ("model", "input", "batch_size", "precision") if hasattr(options, name)]
    if not options.warm_up and given:
        raise ArgumentError(f"expected --warm-up beside --{given[0].replace('_', '-')}, got it alone")
    if options.warm_up and (problem := triton.problem()) is not None:
        raise BackendUnavailableError(f"--warm-up: expected a GPU with Triton's kernels, got none: {problem}")
    for name, backend in backend_info().items():
        state = "can run" if backend["available"] else f"cannot run: {backend['reason']}"
        print(f"backend {name}: {state}; {backend['description']}")
    device = choose_device(options.device)
    print(f"device: {device}, {torch.get_num_threads()} threads")
    _say_precision(device)
    for path in sorted(PACKAGED.glob("*/config.json")):
        print(f"bundle {path.parent.name}: SHA-256 {read_config(path.parent)['weights_sha256']}")
    for package, version in versions().items():
        print(f"{package} {version}")
    if options.warm_up:
        _warm_up(options)
    return _check_kernels() if options.check else 0


def _say_precision(device: torch.device) -> None:
    """What ``auto`` takes and why; where it is measured, which it is for each network, by the packaged bundle."""

    def measure() -> Choice:
        predictor = Predictor("demo", device)
        return Choice(predictor.precision, f"{predictor.precision_reason}, by bundle demo")

    try:
        choice = choose_precision("auto", device, measure)
        said = f"{choice.precision}; {choice.reason}"
    # A package is missing, or a backend asked for cannot run: the rest of what is listed says more.
    except (ModuleNotFoundError, GrcsfError) as error:
        said = f"not measured; {error}"
    print(printable(f"precision auto: {said}"))


def _warm_up(options: argparse.Namespace) -> None:
    model = getattr(options, "model", "demo")
    given = {name: getattr(options, name) for name in ("batch_size", "precision") if hasattr(options, name)}
    predictor = Predictor(model, options.device, **given)
    done = warm_up(predictor, getattr(options, "input", None))
    print(
        printable(
            f"warmed up {model} on {predictor.device}, {predictor.precision}, in {done.seconds:.1f} s: "
            f"{done.compiled} kernels compiled, {done.found} were there already"
        )
    )


def _check_kernels() -> int:
    """The table of ``info --check``."""
    count = failed = 0
    if triton.interpreted():
        print("Triton's interpreter multiplies bfloat16 numbers as bits; that alone is no fault of a kernel")
    print(f"{'backend':8} {'result':7} {'error':8} {'allowed':8} kernel")
    for kernel, result in examine_all():
        count += 1
        if isinstance(result, Exception):
            state, error, allowed, where = "FAILED", "-", "-", f": {type(result).__name__}: {result}"
        else:
            state, where = ("ok", "") if result.passed else ("FAILED", f": {result.tensor}")
            error, allowed = f"{result.error:.1e}", f"{result.tolerance:.1e}"
        failed += state == "FAILED"
        print(f"{kernel.backend:8} {state:7} {error:8} {allowed:8} {kernel}{where}", flush=True)
    print(f"{count} kernels checked, {failed} failed")
    return KERNELS_FAILED if failed else 0
