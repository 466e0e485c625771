"""What the commands have in common: how one is declared, exit codes, what is printed."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ArgumentError, GrcsfError
from .options import number

__all__ = [
    "AT_LEAST_1",
    "BAD_INPUT",
    "BUG",
    "CLOSED_PIPE",
    "KERNELS_FAILED",
    "UNFINISHED",
    "Parser",
    "about_arguments",
    "add_device",
    "in_lines",
    "new_command",
    "printable",
    "report_failures",
]


UNFINISHED, BAD_INPUT, BUG, CLOSED_PIPE = 1, 2, 70, 141


KERNELS_FAILED = 1


MAX_THREADS = 1024


AT_LEAST_1 = number(int, least=1)


# What moves the cursor, ends a line or turns the direction of writing: in a name it would show other names and lines.
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse puts the whole usage before it."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {printable(message)}; see {self.prog} --help\n")


def new_command(
    commands: Any, name: str, run: Any, text: str, interrupted: str = "what is written is whole"
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, formatter_class=_WithDefaults)
    command.set_defaults(run=run, interrupted=f"interrupted; {interrupted}")
    return command


class _WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, where they are values and the text does not say them itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        negated = isinstance(action, argparse._StoreFalseAction | argparse._StoreTrueAction)
        if action.default is None or negated or "default:" in (action.help or ""):
            return action.help
        if isinstance(action.default, tuple):  # as it is written on a command line
            return f"{action.help} (default: {','.join(map(str, action.default))})"
        return super()._get_help_string(action)


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or another device of PyTorch")
    command.add_argument(
        "--threads",
        type=number(int, least=1, most=MAX_THREADS),
        metavar="N",
        default=argparse.SUPPRESS,
        help="processor threads (default: all, or what OMP_NUM_THREADS says, which torchrun sets to 1)",
    )


@contextmanager
def about_arguments() -> Iterator[None]:
    """What is built from options alone: its complaints are about them."""
    try:
        yield
    except GrcsfError:
        raise
    except (ValueError, TypeError) as error:
        raise ArgumentError(str(error)) from error


def printable(text: str) -> str:
    """One line: what the terminal cannot show, such as names that are no UTF-8, or would obey, as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def in_lines(text: str) -> str:
    """A text of several lines, each :func:`printable`; those after the first are indented, so that none passes for
    another message."""
    return "\n  ".join(map(printable, text.rstrip("\n").split("\n")))


def report_failures(failures: dict[str, str], total: int) -> int:
    if not failures:
        return 0
    print(f"{len(failures)} of {total} cases failed:", file=sys.stderr)
    for name, text in failures.items():
        # That of an error that nobody foresaw has several lines.
        said = in_lines(text) if "\nTraceback " in text else printable(text)
        print(f"  {printable(name)}: {said}", file=sys.stderr)
    return UNFINISHED
