"""Recipes: values of options for a data set, in a JSON file that a user may copy and change.

A recipe has sections of options by their names without dashes: ``trainings`` of ``train-mae`` and ``train`` together,
and one of each of ``train-mae``, ``train``, ``predict`` and ``evaluate``. Its values stand in for the defaults, so
that options given by hand win.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.reports import read_json
from ..errors import GrcsfError

__all__ = ["Recipe", "RecipeError", "add_recipe", "by_hand", "parse", "read_recipe"]

FOLDER = Path(__file__).parents[1] / "recipes"
FORMAT, VERSION = "grcsf-fast recipe", 1
SECTIONS = {
    "train-mae": ("trainings", "train-mae"),
    "train": ("trainings", "train"),
    "predict": ("predict",),
    "evaluate": ("evaluate",),
}
# What a run is about, and where and how it runs: no matter of a recipe, whose hash stands for its results.
NOT_IN_RECIPES = (
    *("help", "recipe", "cases", "fold", "images", "labels", "input", "output", "predicted", "truth", "model", "mae"),
    *("initial", "resume", "overwrite", "share", "device", "threads", "memory", "workers", "tensorboard"),
)

# Of the first, given by hand, and the second of a recipe the first counts: they say the same in two ways.
EITHER = (("classes", "regions"), ("regions", "classes"))


class RecipeError(GrcsfError, ValueError):
    """A recipe that cannot be used; the message names file, section and option."""


@dataclass(frozen=True)
class Recipe:
    """A recipe as read.

    Attributes:
        name: as given: of a packaged one, or a path.
        path: of its file.
        sections: by name, values by option.
        sha256: of the file.
    """

    name: str
    path: Path
    sections: Mapping[str, Mapping[str, Any]]
    sha256: str

    def same_values(self, other: Recipe, without: str | None = None) -> bool:
        """Whether both have the same values, but for a section; options of a run, which recipes of earlier versions
        held, do not count."""
        mine, others = (
            {
                section: kept
                for section, values in one.sections.items()
                if section != without
                and (kept := {flag: value for flag, value in values.items() if flag not in NOT_IN_RECIPES})
            }
            for one in (self, other)
        )
        return mine == others

    def values(self, name: str, command: argparse.ArgumentParser) -> dict[str, Any]:
        """The values for a command, checked as its options are.

        Args:
            name: of the command.
            command: its parser.

        Raises:
            RecipeError: an option that the command does not have or a recipe may not set, or a value it cannot have.
        """
        flags = {
            flag.removeprefix("--"): action
            for action in command._actions
            for flag in action.option_strings
            if flag.startswith("--")
        }
        of_runs = {flag for flag, action in flags.items() if action.dest in NOT_IN_RECIPES}
        # ``--no-gcu`` is ``"gcu": false``.
        flags = {
            flag: action for flag, action in flags.items()
            if flag not in of_runs
            and not (isinstance(action, argparse.BooleanOptionalAction) and flag.startswith("no-"))
        }  # fmt: skip
        values = {}
        for section in SECTIONS.get(name, ()):
            for flag, value in self.sections.get(section, {}).items():
                where = f"{self.path}: {section}: {flag}"
                if flag in of_runs:
                    raise RecipeError(
                        f"{where}: expected an option that a result depends on, found one of a run, which no recipe "
                        f"holds: leave it out, and give --{flag} to the command"
                    )
                if flag not in flags:
                    raise RecipeError(f"{where}: expected an option of {name}: {', '.join(sorted(flags))}")
                values[flags[flag].dest] = _checked(flags[flag], value, where)
        return values


def add_recipe(command: argparse.ArgumentParser, required: bool = False) -> None:
    """Add the option to a command."""
    command.add_argument(
        "--recipe", metavar="NAME|FILE", required=required,
        help=f"values of options for a data set: {', '.join(_packaged())}, or your own file; "
        "an option that is given counts, not the recipe's value; flags that the recipe sets stay set",
    )  # fmt: skip


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, with the values of its recipe where an option is not given.

    Args:
        parser: of all commands; the recipe's values become defaults in it.
        arguments: without the program's name.

    Returns:
        The options; with a recipe also ``recipe_values``, those it has for the command, and ``recipe_sha256``.

    Raises:
        SystemExit: help was asked for, or usage is wrong and was said.
        RecipeError: a recipe that cannot be used.
        FileNotFoundError: no such recipe.
    """
    options = parser.parse_args(arguments)
    if getattr(options, "recipe", None) is None:
        return options
    recipe = read_recipe(options.recipe)
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    command = commands.choices[options.command]
    values = recipe.values(options.command, command)
    command.set_defaults(**values, recipe_values=values, recipe_sha256=recipe.sha256)
    options = parser.parse_args(arguments)
    for name, other in EITHER:
        if by_hand(options, name) and other in values and not by_hand(options, other):
            setattr(options, other, None)
    return options


def by_hand(options: argparse.Namespace, name: str) -> bool:
    """Whether an option without default has a value that is not the recipe's."""
    return getattr(options, "recipe_values", {}).get(name) != getattr(options, name, None)


def read_recipe(name: str) -> Recipe:
    """Read a recipe by the name of a packaged one or by the path of a file.

    Raises:
        FileNotFoundError: neither.
        RecipeError: no recipe.
    """
    path = FOLDER / f"{name}.json" if name in _packaged() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"--recipe: expected {', '.join(_packaged())} or a recipe's file, found no file {name}")
    try:
        text = read_json(path)
    except ValueError as error:
        raise RecipeError(f"{path}: expected JSON, could not read it: {error}") from error
    if not isinstance(text, dict) or (text.get("format"), text.get("version")) != (FORMAT, VERSION):
        raise RecipeError(f'{path}: expected a recipe with "format": "{FORMAT}" and "version": {VERSION}')
    known = list(dict.fromkeys(section for sections in SECTIONS.values() for section in sections))
    sections = {}
    for section, values in text.items():
        if section in ("format", "version", "about"):
            continue
        if section not in known or not isinstance(values, dict):
            raise RecipeError(f"{path}: expected objects named {', '.join(known)}, found {section}")
        sections[section] = {flag: _value(item, f"{path}: {section}: {flag}") for flag, item in values.items()}
    return Recipe(name, path, sections, hashlib.sha256(path.read_bytes()).hexdigest())


def _packaged() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def _value(item: Any, where: str) -> Any:
    """A value, which may stand in an object beside where it comes from and why."""
    if not isinstance(item, dict):
        return item
    if "value" not in item or not item.keys() <= {"value", "from", "why"}:
        raise RecipeError(f'{where}: expected "value", "from" and "why", found {", ".join(item) or "nothing"}')
    return item["value"]


def _checked(action: argparse.Action, value: Any, where: str) -> Any:
    """What the option would be if the value were given on the command line."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise RecipeError(f"{where}: expected true or false, found {json.dumps(value)}")
        return not value if action.const is False else value
    if isinstance(value, bool) or not isinstance(value, str | int | float | list):
        raise RecipeError(f"{where}: expected a number, a text or a list of numbers, found {json.dumps(value)}")
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        read = action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from error
    if action.choices is not None and read not in action.choices:
        raise RecipeError(f"{where}: expected one of {', '.join(map(str, action.choices))}, found {text}")
    return read
