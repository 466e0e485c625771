"""``grcsf-fast crossval``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.files import check_writable, replace_when_done, sha256
from ..data.reports import REPORT, read_json, read_report
from ..datasets.cases_file import CaseList, images_of, read_cases, select
from ..errors import ArgumentError, GrcsfError, Interrupted
from ..pretrained.bundle import BundleError, load_bundle
from . import evaluate, predict, train, train_mae
from .labels import check_listed, labels_of
from .listed import FOLD
from .options import number, numbers
from .recipes import NOT_IN_RECIPES, Recipe, RecipeError, add_recipe, parse, read_recipe
from .shared import UNFINISHED, Parser, add_device, new_command, printable

__all__ = ["add"]

RECORD, FORMAT = "crossval.json", "grcsf-fast crossval"
EVALUATION = "evaluation.json"  # of a fold: the options by which its scores were made
DAMAGED = "bundle-damaged"  # beside the one that took its place


def add(commands: Any) -> None:
    command = new_command(
        commands, "crossval", run,
        "Train and evaluate every fold of a list of cases by a recipe, and print one table of all folds. A fold that "
        "fails does not stop the others. The same command goes on where an earlier one stopped; where nothing but the "
        "recipe's section evaluate was changed, folds are evaluated anew, and nothing is trained again.",
        "the same command goes on from there",
    )  # fmt: skip
    add_recipe(command, required=True)
    command.add_argument("--cases", required=True, metavar="FILE", help="a list that `grcsf-fast cases` wrote")
    command.add_argument("-o", "--output", required=True, metavar="FOLDER", help="for a folder per fold and the table")
    command.add_argument(
        "--fold", type=numbers(FOLD), metavar="K,K", default=argparse.SUPPRESS,
        help="only these folds, for jobs side by side; the table is of all that are there (default: all)",
    )  # fmt: skip
    command.add_argument(
        "--workers", type=number(int, least=0), metavar="N", default=argparse.SUPPRESS,
        help="of the trainings: processes that make cases ahead (default: by the cores); 0: cases are made between two "
        "steps",
    )  # fmt: skip
    command.add_argument("--tensorboard", action="store_true", help="write the trainings' logs for TensorBoard too")
    command.add_argument(
        "--memory", type=number(float, above=0), metavar="GIB", default=argparse.SUPPRESS,
        help="of predictions: memory for the volumes being processed together (default: most of what is free)",
    )  # fmt: skip
    add_device(command)


@dataclass(frozen=True)
class _Work:
    """What the folds have in common.

    Attributes:
        recipe: as given, and as read.
        cases: file of the list.
        cases_sha256: of that file.
        output: folder of all.
        machine: options that say where to compute.
        training: options of the trainings alone.
        prediction: options of the predictions alone.
        evaluation: options of the evaluations that scores depend on.
    """

    recipe: Recipe
    cases: str
    cases_sha256: str
    output: Path
    machine: tuple[str, ...]
    training: tuple[str, ...]
    prediction: tuple[str, ...]
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """See that recipe and list, which every step reads again, are still the same.

        Raises:
            ArgumentError: one was changed.
        """
        for path, known in ((self.recipe.path, self.recipe.sha256), (Path(self.cases), self.cases_sha256)):
            if sha256(path) != known:
                raise ArgumentError(
                    f"{path}: expected the file as it was read at the start, found it changed since this "
                    "cross-validation began"
                )

    def folder(self, fold: int) -> Path:
        """Of a fold."""
        return self.output / f"fold{fold}"

    def steps(self, fold: int) -> list[argparse.Namespace]:
        """The commands of a fold in their order, as a user would give them; evaluated are the labels of training.

        Raises:
            ArgumentError: labels to evaluate that are not those of training.
            RecipeError: a value that an option cannot have.
        """
        folder = self.folder(fold)
        mae, network, predicted = folder / "mae", folder / "network", folder / "predicted"
        common = ("--recipe", self.recipe.name, "--cases", self.cases, "--fold", str(fold))
        training = (*common, *self.machine, *self.training, "--resume")
        prediction = (*common, *self.machine, *self.prediction)
        steps = [
            _parsed("train-mae", *training, "-o", str(mae)),
            _parsed("train", *training, "--mae", str(mae / "bundle"), "-o", str(network)),
            _parsed("predict", *prediction, "-m", str(network / "bundle"), "-o", str(predicted)),
            _parsed("evaluate", *common, "-p", str(predicted), "-o", str(folder / "scores")),
        ]
        _with_labels(steps[-1], steps[1], self.recipe.path)
        return steps

    def evaluated(self, fold: int) -> bool | None:
        """Whether the scores of a fold are those of the recipe; None: it has none."""
        if not (self.folder(fold) / "scores" / "summary.json").is_file():
            return None
        return _evaluation_of(self.folder(fold), self.output) == self.evaluation


def run(options: argparse.Namespace) -> int:
    listing, recipe = read_cases(options.cases), read_recipe(options.recipe)
    cases_sha256 = sha256(Path(options.cases))
    known = sorted({case.fold for case in listing.cases if case.fold is not None})
    if len(known) < 2:
        raise ArgumentError(f"{options.cases}: expected a list with at least two folds, found {len(known)}")
    chosen = sorted(set(getattr(options, "fold", known)))
    machine = ("--device", options.device, *_given(options, "threads"))
    training = (*_given(options, "workers"), *(["--tensorboard"] if options.tensorboard else []))
    output, prediction = check_writable(options.output), _given(options, "memory")
    work = _Work(recipe, options.cases, cases_sha256, output, machine, training, prediction)
    first, second, *_, last = work.steps(chosen[0])  # so that a recipe with a mistake stops here
    check_listed(labels_of(second), listing, options.cases)
    work = replace(work, evaluation=_evaluation(last))
    for fold in chosen:
        for case in select(listing, fold):
            images_of(case, listing, getattr(first, "channels", ("image",)))
    _begin(work)
    failures = {}
    for fold in chosen:
        try:
            _run_fold(work, fold)
        except KeyboardInterrupt as error:
            text = f"interrupted in fold {fold}; what is written is whole, the same command goes on from there"
            raise Interrupted(text, getattr(error, "number", Interrupted().number)) from error
        # One fold must not stop the others.
        except Exception as error:
            failures[fold] = str(error) or type(error).__name__
            if not isinstance(error, GrcsfError | OSError):
                traceback.print_exception(error)
            print(printable(f"fold {fold} failed: {failures[fold]}"), file=sys.stderr)
    return _finish(work, listing, known, failures)


def _given(options: argparse.Namespace, name: str) -> tuple[str, ...]:
    """An option without default, as it was given."""
    return (f"--{name}", str(getattr(options, name))) if hasattr(options, name) else ()


def _parsed(*arguments: str) -> argparse.Namespace:
    parser = Parser(prog="grcsf-fast")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (train_mae, train, predict, evaluate):
        command.add(commands)
    return parse(parser, arguments)


def _with_labels(evaluation: argparse.Namespace, training: argparse.Namespace, recipe: Path) -> None:
    """Give an evaluation the labels of the training, where its section names none.

    Raises:
        ArgumentError: it names others.
    """
    trained, given = labels_of(training), labels_of(evaluation)
    if given is None:
        evaluation.classes, evaluation.regions = training.classes, training.regions
        return
    # Regions of classes that were trained, such as all of them together, are what masks of these classes can hold.
    joined = (
        trained is not None and trained.exclusive and not given.exclusive and set(given.every) <= set(trained.every)
    )
    if given != trained and not joined:
        held = "one kind of lesion" if trained is None else training.classes or training.regions
        raise ArgumentError(
            f"{recipe}: evaluate: expected the labels of train, {held}, or none, which means these, got "
            f"{evaluation.classes or evaluation.regions}"
        )


def _evaluation(options: argparse.Namespace) -> dict[str, Any]:
    """The options of an evaluation that its scores depend on."""
    own = ("command", "run", "interrupted", "recipe_values", "recipe_sha256", *NOT_IN_RECIPES)
    return {name: value for name, value in vars(options).items() if name not in own}


def _evaluation_of(folder: Path, output: Path) -> dict[str, Any] | None:
    """Those by which a fold's scores were made; None: not known. Earlier versions went by the copy of the recipe."""
    try:
        return read_json(folder / EVALUATION)
    except FileNotFoundError:
        pass
    except ValueError:
        return None
    try:
        return _evaluation(_parsed("evaluate", "--recipe", str(output / "recipe.json"), "-p", "predicted"))
    except (FileNotFoundError, RecipeError):
        return None


def _note_evaluation(folder: Path, evaluation: Mapping[str, Any] | None) -> None:
    with replace_when_done(folder / EVALUATION) as (part,):
        part.write_text(json.dumps(evaluation, indent=1) + "\n")


def _begin(work: _Work) -> None:
    """Note what is done in the folder, with a copy of the recipe; another list is refused, and another recipe, but for
    its section ``evaluate``.

    Raises:
        ArgumentError: another cross-validation was begun there.
    """
    record = {"format": FORMAT, "version": 1, "recipe": work.recipe.sha256, "cases": work.cases_sha256}
    path = work.output / RECORD
    if path.is_file():
        try:
            earlier = read_json(path)
        except ValueError as error:
            raise ArgumentError(f"{path}: expected the record of a cross-validation: {error}") from error
        if not isinstance(earlier, dict):
            raise ArgumentError(f"{path}: expected the record of a cross-validation, found other content")
        changed = [name for name, value in record.items() if earlier.get(name) != value]
        copy = _copy_of(work.output, earlier.get("recipe")) if "recipe" in changed else None
        if copy is not None and work.recipe.same_values(copy, without="evaluate"):
            changed.remove("recipe")
        if changed:
            raise ArgumentError(
                f"{work.output}: expected the same recipe (but for its section evaluate) and list of cases as this "
                f"cross-validation was begun with, found other {' and '.join(changed)}; choose another folder"
            )
        if copy is None or work.recipe.same_values(copy):
            return
        for folder in work.output.glob("fold*"):
            if (folder / "scores").is_dir() and not (folder / EVALUATION).is_file():
                _note_evaluation(folder, _evaluation_of(folder, work.output))
    with replace_when_done(work.output / "recipe.json", path) as (copy, part):
        work.check()
        copy.write_bytes(work.recipe.path.read_bytes())
        part.write_text(json.dumps(record, indent=1) + "\n")


def _copy_of(output: Path, recipe_sha256: str | None) -> Recipe | None:
    """The recipe of this hash, where the folder has its copy."""
    try:
        copy = read_recipe(str(output / "recipe.json"))
    except (FileNotFoundError, RecipeError):
        return None
    return copy if copy.sha256 == recipe_sha256 else None


def _run_fold(work: _Work, fold: int) -> None:
    """What is left to do of a fold.

    Raises:
        GrcsfError, OSError: a step could not be done, or recipe or list was changed; also where some cases were not
            predicted or compared.
    """
    from ..evaluation.summary import read_results

    scores = work.folder(fold) / "scores"
    done = work.evaluated(fold)
    if done and not read_results(scores)[2]:
        print(f"fold {fold}: done before")
        return
    for options in work.steps(fold):
        if options.command in ("train-mae", "train") and _is_trained(Path(options.output)):
            print(f"fold {fold}: {options.command} done before")
            continue
        work.check()
        print(f"fold {fold}: {options.command}", flush=True)
        if options.command == "evaluate" and not done:
            (scores / "summary.json").unlink(missing_ok=True)  # so that no scores stand beside what did not make them
            _note_evaluation(work.folder(fold), work.evaluation)
        options.run(options)  # cases that fail are said, and come again in the evaluation
    if errors := read_results(scores)[2]:
        name, text = next(iter(errors.items()))
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise ArgumentError(f"cases that could not be predicted or compared: {name}: {text}{more}")


def _is_trained(output: Path) -> bool:
    """Whether a training's bundle is there. One that a crash has damaged is put aside where it can be written anew.

    Raises:
        BundleError, FileNotFoundError: damaged, or a part of it is missing, and there is no checkpoint.
    """
    from ..training.checkpoint import CHECKPOINT_NAME

    if not (output / "bundle").is_dir():
        return False
    try:
        load_bundle(output / "bundle")
    except (BundleError, FileNotFoundError) as error:
        if not (output / CHECKPOINT_NAME).is_file():
            raise
        print(printable(f"{error}; the checkpoint's is written in its place, and it is kept as {DAMAGED}"))
        shutil.rmtree(output / DAMAGED, ignore_errors=True)
        (output / "bundle").rename(output / DAMAGED)
        return False
    return True


def _precisions(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Which precision each step of a fold had, where it is known: trainings say it in their checkpoints."""
    from safetensors import SafetensorError, safe_open

    from ..training.checkpoint import CHECKPOINT_NAME

    found = {}
    for command, part in (("train-mae", "mae"), ("train", "network")):
        try:
            with safe_open(folder / part / CHECKPOINT_NAME, framework="pt") as file:
                found[command] = (file.metadata() or {}).get("precision", "")
        except (OSError, SafetensorError):
            continue
    reports = (read_report(folder / "predicted" / f"{name}{REPORT}") for name in names)
    of_cases = {report.get("settings", {}).get("precision", "") for report in reports}
    found["predict"] = " and ".join(sorted(filter(None, of_cases)))
    return {command: precision for command, precision in found.items() if precision}


def _precision_lines(by_fold: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Below the table: the steps whose precision is not the same in all folds."""
    lines: list[str] = []
    for command in ("train-mae", "train", "predict"):
        folds: dict[str, list[str]] = {}
        for fold, found in by_fold.items():
            if command in found["precision"]:
                folds.setdefault(found["precision"][command], []).append(fold)
        if len(folds) > 1:
            said = "; ".join(f"{name} in fold {', '.join(of)}" for name, of in sorted(folds.items()))
            lines.append(f"FOLDS DIFFER in the precision of {command}: {said}.")
    return ["", *lines] if lines else []


def _finish(work: _Work, listing: CaseList, folds: Sequence[int], failures: dict[int, str]) -> int:
    """Write and print the table of all folds that have scores; the exit code."""
    from ..evaluation.calcium import summarize_calcium
    from ..evaluation.calcium_files import arteries_of
    from ..evaluation.summary import read_labels, read_results
    from ..evaluation.table import (
        calcium_lines,
        label_lines,
        label_tables,
        markdown,
        median_volume,
        table_rows,
        write_table,
    )

    results: dict[str, Any] = {}
    calcium: dict[str, Any] = {}
    by_label: dict[str, Any] = {}
    by_fold: dict[str, Any] = {}
    evaluated = {fold: work.evaluated(fold) for fold in folds}
    for fold in folds:
        scores = work.folder(fold) / "scores"
        if not evaluated[fold]:
            continue
        own, own_calcium, _ = read_results(scores)
        if own:
            results, calcium = results | own, calcium | own_calcium
            by_fold[str(fold)] = {"cases": len(own), "mean_dice": _mean_dice(own)}
            by_fold[str(fold)]["precision"] = _precisions(work.folder(fold), own)
            if labels := read_labels(scores):
                by_fold[str(fold)]["mean_dice_of_labels"] = {name: _mean_dice(rows) for name, rows in labels.items()}
                by_label = {name: by_label.get(name, {}) | rows for name, rows in labels.items()}
    absent = [fold for fold in folds if str(fold) not in by_fold]
    volumes = [case.lesion_ml for case in listing.cases if case.fold is not None]
    if None in volumes:  # lists of other programs may leave them out
        volumes = [row["truth_ml"] for row in results.values()]
    limit = median_volume(volumes)
    lines, more = [], {}
    tables = label_tables(by_label)
    if results:
        rows = table_rows(results, limit)
        lines += ["All labels together:", ""] if tables else []
        lines += [*markdown(rows, limit), *label_lines(tables)]
        if calcium:
            measures = summarize_calcium(list(calcium.values()), list(arteries_of(listing).values()))
            lines += ["", *calcium_lines(measures)]
            more["calcium"] = measures
    not_compared = [case.name for case in listing.cases if case.fold is not None and case.name not in results]
    if absent:
        state = {None: "not run", False: "evaluated by another recipe", True: "without a case"}
        said = ", ".join(f"{fold} ({failures.get(fold, state[evaluated[fold]])})" for fold in absent)
        lines += ["", f"NOT IN THIS TABLE: {len(not_compared)} cases; folds without scores: {said}."]
    elif not_compared:
        lines += [
            "",
            f"NOT IN THIS TABLE: {len(not_compared)} cases whose truth could not be used: {not_compared[0]}, ...",
        ]
    lines += _precision_lines(by_fold)
    print("\n".join(map(printable, lines)))
    if results:
        more |= {
            "small_up_to_ml": limit,
            "folds": by_fold,
            "failed_folds": {str(fold): text for fold, text in failures.items()},
            "not_compared": not_compared,
            "recipe_sha256": work.recipe.sha256,
        }
        written = write_table(work.output, rows, lines, more, tables)
        print(printable(f"wrote {', '.join(map(str, written))}"))
    return UNFINISHED if failures else 0


def _mean_dice(rows: Mapping[str, Mapping[str, float]]) -> float:
    return sum(row["dice"] for row in rows.values()) / len(rows)
