"""The command line: ``grcsf-fast`` or ``python -m grcsf_fast``.

Exit codes:

- 0: all done.
- 1: some cases of a folder or folds failed, the others are done; a training stopped after its first step, or a
  folder's run on its way, with what was done on disk; or a kernel failed its check.
- 2: bad input or usage.
- 70: a bug of this program, with its traceback.
- 129, 130, 141, 143: ended by SIGHUP, Ctrl-C, a closed pipe or SIGTERM; what is written is whole.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, GrcsfError, UnfinishedError
from ..runtime.control_groups import usable_cores
from ..runtime.memory import is_out_of_memory, keep_memory
from ..runtime.processes import described_world, end_if_left
from ..runtime.signals import terminable
from . import cases, crossval, evaluate, export, info, predict, synthesize, train, train_mae
from .options import joined
from .recipes import parse
from .shared import BAD_INPUT, BUG, CLOSED_PIPE, UNFINISHED, Parser, in_lines, printable

__all__ = ["main"]

# By the extra that brings them.
OPTIONAL_PACKAGES = {
    "app": {"monai", "safetensors", "isal", "scipy", "tqdm", "matplotlib", "PIL"},
    "synthesize": {"nilearn"},
    "export": {"onnx", "onnxscript"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    code = _ran(arguments)
    end_if_left(code)
    return code


def _ran(arguments: Sequence[str] | None) -> int:
    try:
        options = parse(_parser(), joined(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as ended:  # help was asked for, or usage is wrong and was said
        return int(ended.code or 0)
    except (GrcsfError, OSError) as error:  # of its recipe
        return _failed(error)
    keep_memory()
    # Lanes compute while one of them draws its picture in Python, for which they would else wait 5 ms at every op.
    sys.setswitchinterval(0.0005)
    try:
        with terminable(), _warnings_in_one_line(), _own_errors_of_output():
            _check_alone(options)
            torch.set_num_threads(getattr(options, "threads", None) or min(torch.get_num_threads(), usable_cores()))
            code = options.run(options)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except KeyboardInterrupt as error:
        print(in_lines(str(error) or options.interrupted), file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    except BrokenPipeError:
        _close_output()
        return CLOSED_PIPE
    except _OutputError as error:
        _close_output()
        whole = options.interrupted.removeprefix("interrupted; ")
        print(f"error: {error}; {whole}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except (OSError, ValueError):
            _close_output()
        return _failed(error)


class _OutputError(OSError):
    """Standard output cannot be written; Python's own error does not say what."""


class _Output:
    """Standard output, with errors of its own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._own_errors():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._own_errors():
            self._stream.flush()

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise _OutputError(f"standard output could not be written: {reason}") from error


@contextmanager
def _own_errors_of_output() -> Iterator[None]:
    before = sys.stdout
    if before is not None:
        sys.stdout = _Output(before)
    try:
        yield
    finally:
        sys.stdout = before


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Warnings of ours name a file and what is odd about it; the line of source that Python adds says nothing more."""
    before = warnings.formatwarning
    ours = str(Path(__file__).parents[1])

    def format_warning(message: Any, category: type[Warning], filename: str, *others: Any) -> str:
        if filename.startswith(ours):
            return f"warning: {printable(str(message))}\n"
        return in_lines(before(message, category, filename, *others)) + "\n"

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = before


def _failed(error: Exception) -> int:
    """Say what failed; the exit code."""
    if isinstance(error, ModuleNotFoundError):
        for extra, packages in OPTIONAL_PACKAGES.items():
            if (error.name or "").partition(".")[0] in packages:
                print(
                    f"error: the package {error.name!r} is missing; in a checkout of grcsf-fast: "
                    f'pip install ".[{extra}]"',
                    file=sys.stderr,
                )
                return BAD_INPUT
    if is_out_of_memory(error) and not isinstance(error, UnfinishedError):
        print(f"error: not enough memory, try a smaller --batch-size: {in_lines(str(error))}", file=sys.stderr)
        return BAD_INPUT
    # Warnings come here under -W error.
    if isinstance(error, GrcsfError | OSError | Warning):
        if isinstance(error, UnfinishedError):  # what was the matter, and in a line of its own what is done
            print(f"error: {in_lines(str(error))}", file=sys.stderr)
            return UNFINISHED
        # Errors that list something have an indented line for each.
        print("error: " + "\n  ".join(map(printable, str(error).split("\n  "))), file=sys.stderr)
        return BAD_INPUT
    print(in_lines("".join(traceback.format_exception(error))), file=sys.stderr)
    print("error: this is a bug of grcsf-fast; please report it with the lines above", file=sys.stderr)
    return BUG


def _close_output() -> None:
    """Nobody reads any more; Python would complain when it flushes at its end."""
    with suppress(OSError, ValueError, AttributeError):  # no file at all, as in a notebook
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _check_alone(options: argparse.Namespace) -> None:
    """Commands that write the same files in every process are refused where there are several."""
    if options.command in ("predict", "info", "train-mae", "train"):
        return
    world = described_world()
    if world.size > 1:
        raise ArgumentError(
            f"{options.command} works in one process, and this is number {world.rank} of {world.size} by RANK and "
            "WORLD_SIZE: start it without torchrun, or unset these variables"
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="grcsf-fast",
        description="Lesion segmentation with global and regional feature compensation. Not for clinical use.",
        epilog="Exit codes: 0 done; 1 some cases or folds failed and the others are done, a training or a folder's "
        "run stopped on its way, or a kernel failed its check; 2 bad input or usage; 70 a bug of this program; 129, "
        "130, 141, 143 ended by SIGHUP, Ctrl-C, a closed pipe, SIGTERM.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (predict, evaluate, cases, synthesize, train_mae, train, crossval, export, info):
        command.add(commands)
    return parser
