"""What commands take of a list of cases: ``--cases`` and ``--fold``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..datasets.cases_file import TEST, CaseList, ListedCase, read_cases, select
from ..errors import ArgumentError
from .options import number

if TYPE_CHECKING:
    from ..pretrained.bundle import Bundle

__all__ = [
    "FOLD",
    "ChosenCases",
    "add_listed",
    "check_fold",
    "chosen_cases",
    "fold_of_card",
    "fold_or_test",
    "trained_on_fold",
]

FOLD = number(int, least=0)


class ChosenCases(NamedTuple):
    """Of a list of cases those that a command is about.

    Attributes:
        listing: the list.
        cases: those of the fold, or all.
    """

    listing: CaseList
    cases: list[ListedCase]


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
    command.add_argument("--fold", type=fold, metavar="K", help=f"number of a fold of the list, from 0: {fold_help}")


def chosen_cases(options: argparse.Namespace, *instead: str) -> ChosenCases | None:
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
    return ChosenCases(listing, select(listing, options.fold))


def fold_of_card(options: argparse.Namespace, listing: CaseList) -> dict[str, Any]:
    """For the card of a bundle: the list that a training took its cases from, and the fold that it held out."""
    return {"cases": {"folds_sha256": listing.folds_sha256, "held_out": options.fold}}


def trained_on_fold(card: Mapping[str, Any], listing: CaseList, fold: int | str | None) -> str | None:
    """What a bundle's training held out of this list instead of a fold, whose cases it has seen then; None: it has not,
    as far as its card says."""
    said = card.get("cases")
    if not isinstance(said, Mapping) or said.get("folds_sha256") != listing.folds_sha256 or not isinstance(fold, int):
        return None
    held_out = said.get("held_out")
    return None if held_out == fold else "none" if held_out is None else f"fold {held_out}"


def check_fold(options: argparse.Namespace, chosen: ChosenCases | None, bundle: Bundle | None, option: str) -> None:
    """See that a bundle to train with has not seen the fold that is held out.

    Raises:
        ArgumentError: it has, by its card.
    """
    if bundle is None or chosen is None:
        return
    held_out = trained_on_fold(bundle.card, chosen.listing, options.fold)
    if held_out is not None:
        raise ArgumentError(
            f"--{option}: expected a bundle whose training held out fold {options.fold} of {options.cases} as well, "
            f"got one that held out {held_out} of it: it has seen the cases that are to be kept from this training"
        )
