"""``grcsf-fast evaluate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import check_writable
from ..data.labels import Labels
from ..data.reports import amount
from ..errors import ArgumentError
from ..runtime.progress import bar, busy
from .labels import add_labels, check_listed, check_meanings, labels_of
from .listed import add_listed, chosen_cases, fold_or_test
from .recipes import add_recipe
from .shared import new_command, printable, report_failures

if TYPE_CHECKING:
    from ..evaluation.chosen_labels import Reported

__all__ = ["add"]

# Printed of each label; its others are in summary.json.
LABEL_FIGURES = ("dice", "lesion_f1", "hausdorff95_mm", "volume_difference_ml")


def add(commands: Any) -> None:
    command = new_command(
        commands, "evaluate", run,
        "Compare predicted masks with the truth. A prediction that is missing or cannot be used, or is empty where the "
        "truth is not, counts as a Dice and a lesion-wise F1 of 0 and as a Hausdorff distance of the grid's "
        "diagonal; so does, in the distance, an empty truth alone. Other undefined figures are left out of the means, "
        "and each mean says how many. Voxels from half of a label's value up are lesion. Of a list made with --labels "
        "these alone count, in predictions that tell labels apart too; voxels that the list ignores count nowhere.",
    )  # fmt: skip
    command.add_argument("-p", "--predicted", required=True, metavar="FILE|FOLDER", help="predicted masks")
    command.add_argument("-t", "--truth", metavar="FILE|FOLDER", help="true masks of the same names")
    add_listed(command, "-t", fold_or_test, "the cases whose masks are the truth (default: all that have masks)")
    add_recipe(command)
    command.add_argument(
        "-o", "--output", metavar="FOLDER", help="for cases.csv, summary.json and evaluation.html; default: print only"
    )
    command.add_argument("--no-page", dest="page", action="store_false", help="without evaluation.html")
    command.add_argument("--min-lesion-ml", type=float, default=0.1, metavar="ML", help="smallest lesion that counts")
    add_labels(command, "all labels are one kind of lesion")
    command.add_argument(
        "--calcium", action="store_true", help="of coronary calcium on CT, with --cases: Agatston scores, risk "
        "categories, sensitivity and PPV of lesions and volume, ICC",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from ..evaluation.chosen_labels import named_by_list, reported
    from ..evaluation.folders import evaluate_cases, evaluate_folders, left_over, predictions_without_truth
    from ..evaluation.page import PAGE_NAME, check_page, is_own_page, write_evaluation_page
    from ..evaluation.summary import check_results, summarize, write_results
    from ..evaluation.table import calcium_lines

    if options.output is not None:
        check_results(check_writable(options.output))
        if options.page:
            check_page(options.output)
    if options.calcium and options.cases is None:
        raise ArgumentError("--calcium: expected --cases with images in Hounsfield units, got none")
    labels = labels_of(options)
    calcium: dict[str, Any] = {}
    measures: dict[str, Any] = {}
    chosen = chosen_cases(options, "truth")
    if chosen is not None:
        listing, cases = chosen
        cases = [case for case in cases if case.masks]
        if not cases:
            raise ArgumentError(
                f"{options.cases}: expected cases with masks to compare with, found none among the chosen"
            )
        check_listed(labels, listing, options.cases)
        named = named_by_list(listing) if labels is None else labels
        _check_reports(named, reported(options.predicted, [case.name for case in cases]) if named is not None else {})
        results, failures, by_label, of_list = evaluate_cases(
            options.predicted, listing, cases, options.min_lesion_ml, bar("cases"), labels
        )
        if of_list is not None:
            numbers = ", ".join(map(str, of_list.every))
            print(printable(f"of the predictions the labels {numbers} count, as {options.cases} has chosen"))
        without_truth = left_over(options.predicted, [case.name for case in cases])
        if options.calcium:
            from ..evaluation.calcium import summarize_calcium
            from ..evaluation.calcium_files import arteries_of, evaluate_calcium

            calcium, unusable = evaluate_calcium(options.predicted, listing, cases, bar("calcium"), labels)
            failures |= {name: text for name, text in unusable.items() if name not in failures}
            if calcium:
                measures = summarize_calcium(list(calcium.values()), list(arteries_of(listing).values()))
    elif options.truth is None:
        raise ArgumentError("expected --truth or --cases, got neither")
    else:
        _check_reports(labels, reported(options.predicted) if labels is not None else {})
        with busy("comparing", shown=Path(options.truth).is_file()):
            results, failures, by_label, _ = evaluate_folders(
                options.predicted, options.truth, options.min_lesion_ml, bar("cases"), labels
            )
        if failures and Path(options.truth).is_file():
            raise ArgumentError(next(iter(failures.values())))
        without_truth = predictions_without_truth(options.predicted, options.truth)
    summary = summarize(results)
    for name, row in results.items():
        state = _state(row)
        figures = [f"{key} {value:.4g}" for key, value in row.items() if key not in ("missing", "failed")]
        print(printable(f"{name}: {state}{', '.join(figures)}"))
    print(", ".join(f"{name} {value}" for name, value in summary.items() if isinstance(value, int)))
    for name, value in summary.items():
        if isinstance(value, dict):
            print(f"{name}: {_spread(value)}")
    totals = {label: summarize(rows) for label, rows in by_label.items()}
    for label, total in totals.items():
        for name in LABEL_FIGURES:
            if isinstance(value := total.get(name), dict):
                print(printable(f"{label}: {name}: {_spread(value)}"))
    if "pooled_lesion_f1" in summary:
        print(f"pooled_lesion_f1: {summary['pooled_lesion_f1']:.4f}")
    for name, row in calcium.items():
        scores = (f"{row[f'agatston_{kind}']:.1f} ({row[f'category_{kind}']}) {kind}" for kind in ("predicted", "true"))
        print(printable(f"{name}: {_state(row)}Agatston {', '.join(scores)}"))
    if measures:
        print("\n".join(map(printable, calcium_lines(measures))))
    if without_truth:
        names = printable(", ".join(without_truth))
        print(f"{len(without_truth)} predictions without a truth were not compared: {names}", file=sys.stderr)
    if options.output is not None:
        whole = {**summary, **({"calcium": measures} if measures else {}), **({"labels": totals} if totals else {})}
        whole |= {"without_truth": without_truth, "errors": failures}
        write_results(options.output, results, whole, calcium, by_label)
        if options.page and results:
            pictures = options.predicted if Path(options.predicted).is_dir() else None
            shown = {name: row | _scores(calcium.get(name, {})) for name, row in results.items()}
            page = write_evaluation_page(options.output, shown, summary, failures, without_truth, pictures, by_label)
            print(printable(f"to look at, in a browser: {page}"))
        elif is_own_page(options.output):  # of other figures
            (Path(options.output) / PAGE_NAME).unlink()
    return report_failures(failures, len(results.keys() | failures.keys()))


def _check_reports(labels: Labels | None, predictions: Mapping[str, Reported]) -> None:
    """See that the labels are called as in the reports of the predictions.

    Raises:
        ArgumentError: a report has a name for other numbers.
    """
    seen = []
    for path, report in predictions.values():
        held = report.get("labels")
        if labels is None or not isinstance(held, dict) or held in seen:
            continue
        named = {name: own.get("numbers", []) for name, own in held.items() if isinstance(own, dict)}
        check_meanings(labels, named, f"the report of {path}")
        seen.append(held)


def _state(row: dict[str, Any]) -> str:
    return "".join(f"prediction {flag}, as if empty: " for flag in ("missing", "failed") if row[flag])


def _spread(value: dict[str, Any]) -> str:
    spread = ", ".join(f"{key} {amount(value[key], 4)}" for key in ("mean", "sd", "median"))
    counts = ", ".join(f"{key.replace('_', ' ')} {value[key]}" for key in value if isinstance(value[key], int))
    return f"{spread.replace('nan', '-')}, {counts}"


def _scores(calcium: dict[str, Any]) -> dict[str, float]:
    """What the page shows of a case's calcium."""
    return {name: value for name, value in calcium.items() if name in ("agatston_true", "agatston_predicted")}
