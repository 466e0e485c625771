"""What commands take of a list of cases: ``--cases`` and ``--fold``."""

from __future__ import annotations

import argparse
from typing import Any

from ..datasets.cases_file import TEST, CaseList, ListedCase, read_cases, select
from ..errors import ArgumentError
from .options import number

__all__ = ["FOLD", "add_listed", "chosen_cases", "fold_or_test"]

FOLD = number(int, least=0)


def fold_or_test(text: str) -> int | str:
    """A fold's number, or ``test`` for the cases in no fold."""
    return text if text == TEST else FOLD(text)


def add_listed(command: argparse.ArgumentParser, instead: str, fold: Any, fold_help: str) -> None:
    """Add the two options.

    Args:
        command: to add them to.
        instead: of which options a list stands.
        fold: parses a fold.
        fold_help: what the command does with it.
    """
    command.add_argument("--cases", metavar="FILE", help=f"a list that `grcsf-fast cases` wrote, in place of {instead}")
    command.add_argument("--fold", type=fold, metavar="K", help=f"of the list: {fold_help}")


def chosen_cases(options: argparse.Namespace, *instead: str) -> tuple[CaseList, list[ListedCase]] | None:
    """The list and the cases of its fold; None where no list is given.

    Args:
        options: of the command.
        instead: options that the list takes the place of.

    Raises:
        ArgumentError: a list beside what it takes the place of, neither of both, or a fold without a list.
        CasesError: the list cannot be used.
        FileNotFoundError: no such list.
    """
    given = [name for name in instead if getattr(options, name)]
    if options.cases is None:
        if options.fold is not None:
            raise ArgumentError("--fold: expected --cases with the list that has this fold, got none")
        return None
    if given:
        raise ArgumentError(f"--cases: expected no --{given[0]} beside it, got both")
    listing = read_cases(options.cases)
    return listing, select(listing, options.fold)
