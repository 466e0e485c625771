"""Figures over all cases.

No mean gets better by a prediction that is left out: where one is missing or cannot be used, and where a figure is
undefined because one of both masks is empty, the worst value stands in the means: 0 for Dice and lesion-wise F1, the
diagonal of the grid for the Hausdorff distance. Beside each mean stands how many cases that concerns.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import replace_when_done
from ..data.reports import cell_of, read_json, text_of
from ..errors import ArgumentError

__all__ = [
    "check_results",
    "finite",
    "read_labels",
    "read_results",
    "summarize",
    "write_results",
]

# Names that are no UTF-8 go through as they are.
TABLE: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
READ: dict[str, Any] = TABLE | {"encoding": "utf-8-sig"}  # spreadsheets put a mark of the byte order in front
CASES, CALCIUM, LABELS, SUMMARY = "cases.csv", "calcium.csv", "labels.csv", "summary.json"
# Columns of a case that say something about it, and are no figures to average.
NOT_AVERAGED = ("grid_diagonal_mm", "missing", "failed")
# What stands in the means for a case without prediction.
WORST: dict[str, Callable[[Mapping[str, float]], float]] = {
    "dice": lambda row: 0.0,
    "lesion_f1": lambda row: 0.0,
    "hausdorff95_mm": lambda row: row["grid_diagonal_mm"],
}


def summarize(results: Mapping[str, Mapping[str, float]]) -> dict[str, float | dict[str, float]]:
    """Each figure over all cases, and the pooled lesion-wise F1.

    An empty, missing or unusable prediction never makes the mean of ``dice``, ``lesion_f1`` or ``hausdorff95_mm``
    better than another prediction would, unless the truth is empty too. The worst value stands in them for a missing
    or failed prediction, where the prediction alone is empty, and in ``hausdorff95_mm`` where the truth alone is. Other
    undefined figures are left out.

    Args:
        results: by case, from :func:`evaluate_masks` or :func:`evaluate_folders`; other figures may stand beside.

    Returns:
        ``cases``, ``missing`` and ``failed``: numbers of cases, of those without prediction and with one that cannot
        be used. By figure ``mean``, ``sd`` and ``median`` over ``n`` cases, and of all cases how many are
        ``undefined``, ``left_out`` (those of them that do not count in ``n``), ``missing`` and ``failed``.
        ``pooled_lesion_f1`` over the lesions of all cases, those without prediction counting as missed; as false
        lesions count in it, it may be lower with a prediction that found less than it invented than with none.
    """
    summary: dict[str, float | dict[str, float]] = {"cases": len(results)}
    if not results:
        return summary
    rows = list(results.values())
    absent = {flag: sum(int(row.get(flag, 0)) for row in rows) for flag in ("missing", "failed")}
    summary |= absent
    for name in rows[0]:
        if name in NOT_AVERAGED:
            continue
        counted = np.array([_counted(name, row) for row in rows], dtype=float)
        undefined = sum(not _without_prediction(row) and not math.isfinite(row[name]) for row in rows)
        values = counted[np.isfinite(counted)]
        summary[name] = {
            "mean": float(values.mean()) if values.size else math.nan,
            "sd": float(values.std(ddof=1)) if values.size > 1 else math.nan,
            "median": float(np.median(values)) if values.size else math.nan,
            "n": int(values.size),
            "undefined": undefined,
            "left_out": len(rows) - int(values.size),
            **absent,
        }
    found, false, true = (sum(row[name] for row in rows) for name in ("lesions_found", "lesions_false", "lesions_true"))
    decisions = found + false + true
    summary["pooled_lesion_f1"] = 2 * found / decisions if decisions else math.nan
    return summary


def _without_prediction(row: Mapping[str, float]) -> bool:
    return bool(row.get("missing", 0) or row.get("failed", 0))


def _counted(name: str, row: Mapping[str, float]) -> float:
    """What a case counts as in the mean of a figure; NaN: not at all."""
    if name not in WORST or (math.isfinite(row[name]) and not _without_prediction(row)):
        return row[name]
    missed = row["predicted_ml"] == 0 < row["truth_ml"]
    invented = name == "hausdorff95_mm" and row["truth_ml"] == 0 < row["predicted_ml"]
    return WORST[name](row) if _without_prediction(row) or missed or invented else math.nan


def write_results(
    folder: str | Path,
    results: Mapping[str, Mapping[str, float]],
    summary: Mapping[str, object],
    calcium: Mapping[str, Mapping[str, object]] | None = None,
    by_label: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> list[Path]:
    """Write ``cases.csv``, for calcium ``calcium.csv``, of labels ``labels.csv``, and ``summary.json``.

    A ``calcium.csv`` or ``labels.csv`` of an earlier run is removed where this one has none. No text of a table is one
    that spreadsheets take for a formula, see :func:`~grcsf_fast.data.reports.cell_of`.

    Args:
        folder: made if need be.
        results: by case.
        summary: of them; what is undefined becomes null.
        calcium: by case; None or empty: no calcium.
        by_label: results by label; None or empty: lesion alone.

    Returns:
        The paths written.

    Raises:
        OSError: a file cannot be written.
    """
    tables: dict[str, list[dict[str, Any]]] = {CASES: _rows(results)}
    if calcium:
        tables[CALCIUM] = _rows(calcium)
    if by_label:
        tables[LABELS] = [
            {"case": row.pop("case"), "label": label} | row for label, rows in by_label.items() for row in _rows(rows)
        ]
    targets = [Path(folder) / name for name in (*tables, SUMMARY)]
    with replace_when_done(*targets) as (*parts, totals):
        for part, rows in zip(parts, tables.values(), strict=True):
            with part.open("w", **TABLE) as file:
                writer = csv.DictWriter(file, [cell_of(column) for column in rows[0]] if rows else ["case"])
                writer.writeheader()
                writer.writerows({cell_of(column): cell_of(value) for column, value in row.items()} for row in rows)
        totals.write_text(json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")
    for name in {CALCIUM, LABELS} - tables.keys():
        (Path(folder) / name).unlink(missing_ok=True)
    return targets


def check_results(folder: str | Path) -> None:
    """See that what :func:`write_results` replaces or removes in a folder is of an earlier evaluation.

    Raises:
        ArgumentError: a file of somebody else; the message names it.
    """
    for name in (CASES, CALCIUM, LABELS, SUMMARY):
        path = Path(folder) / name
        if path.is_file() and not _is_ours(path):
            raise ArgumentError(
                f"{path}: expected no file, or one of an earlier evaluation, found another one, which the results "
                "would replace; choose a folder of their own"
            )


def _is_ours(path: Path) -> bool:
    try:
        if path.name == SUMMARY:
            return "cases" in read_json(path)
        with path.open(**READ) as file:
            head = next(csv.reader(file), [])
    except (OSError, ValueError, TypeError, csv.Error):
        return False
    return head == ["case"] or (head[:1] == ["case"] and "missing" in head)


def _rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"case": name} | dict(row) for name, row in results.items()]


def read_results(folder: str | Path) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]], dict[str, str]]:
    """What :func:`write_results` wrote: results, calcium (empty where there is none) and errors, by case.

    Raises:
        OSError: it is not there.
        ArgumentError: another content; the message names the file.
    """
    folder = Path(folder)
    with _named(folder / SUMMARY):
        errors = read_json(folder / SUMMARY).get("errors", {})
    results, calcium = _read_table(folder / CASES), {}
    if (folder / CALCIUM).is_file():
        calcium = _read_table(folder / CALCIUM)
    return results, calcium, errors


def read_labels(folder: str | Path) -> dict[str, dict[str, dict[str, float]]]:
    """The results by label that :func:`write_results` wrote; empty where no labels were told apart.

    Raises:
        OSError: they cannot be read.
        ArgumentError: another content; the message names the file.
    """
    path = Path(folder) / LABELS
    by_label: dict[str, dict[str, dict[str, float]]] = {}
    if path.is_file():
        with _named(path), path.open(**READ) as file:
            for row in csv.DictReader(file):
                case, label = text_of(row.pop("case")), text_of(row.pop("label"))
                by_label.setdefault(label, {})[case] = {name: float(text) for name, text in row.items()}
    return by_label


def _read_table(path: Path) -> dict[str, dict[str, Any]]:
    with _named(path), path.open(**READ) as file:
        return {
            text_of(row.pop("case")): {name: _figure(name, text) for name, text in row.items()}
            for row in csv.DictReader(file)
        }


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What is wrong in a file is said with its name."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise ArgumentError(f"{path}: expected what an evaluation wrote, could not read it: {error}") from error


def _figure(name: str, text: str) -> Any:
    return text_of(text) if name.startswith("category_") else float(text)


def finite(value: object) -> object:
    """The same with None for numbers that are not finite, which JSON does not have; also in mappings and lists."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
