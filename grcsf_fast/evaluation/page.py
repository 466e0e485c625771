"""``evaluation.html``: masks against the truth on one page, the worst cases first."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.page import in_address, is_page, write_page
from ..errors import ArgumentError
from .summary import summarize

__all__ = ["PAGE_NAME", "check_page", "is_own_page", "write_evaluation_page"]

PAGE_NAME = "evaluation.html"  # no index.html, which may be that of predictions in the same folder
TITLE = "Masks against the truth, by grcsf-fast"


def is_own_page(folder: str | Path) -> bool:
    """Whether a folder has a page of an earlier evaluation."""
    return is_page(Path(folder) / PAGE_NAME, TITLE)


def check_page(folder: str | Path) -> None:
    """See that :func:`write_evaluation_page` would replace no file but its own of an earlier evaluation.

    Raises:
        ArgumentError: a file of somebody else.
    """
    path = Path(folder) / PAGE_NAME
    if os.path.lexists(path) and not is_own_page(folder):
        raise ArgumentError(
            f"{path}: expected no file, or one of an earlier evaluation, found another one, which this one's would "
            "replace; choose another folder, or --no-page, or take it away"
        )


def write_evaluation_page(
    folder: str | Path,
    results: Mapping[str, Mapping[str, float]],
    summary: Mapping[str, object],
    failures: Mapping[str, str],
    without_truth: Iterable[str] = (),
    predicted: str | Path | None = None,
    by_label: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> Path:
    """Write ``evaluation.html``: table, Dice against true volume, Bland-Altman plot of volumes, means.

    Of several labels each has columns, plots and means of its own; those of all together stand beside.

    Args:
        folder: for the page.
        results: by case, from :func:`grcsf_fast.evaluation.folders.evaluate_folders`.
        summary: of them, from :func:`grcsf_fast.evaluation.summary.summarize`.
        failures: by case, what could not be compared or used, and why.
        without_truth: names of predictions that were not compared.
        predicted: folder of the predictions; pictures that ``predict`` wrote there are linked.
        by_label: results by label; None or empty: lesion alone.

    Returns:
        The path of the page.

    Raises:
        OSError: the page cannot be written.
    """
    folder = Path(folder)
    pictures = None if predicted is None else Path(predicted)
    by_label = by_label or {}
    labels = [{"name": label, **_means(summarize(rows))} for label, rows in by_label.items()]
    blocks = {
        "cases": _cases(folder, results, failures, pictures, by_label),
        "run": {
            **_means(summary),
            **({"labels": labels} if labels else {}),
            "not_compared": [[name, failures[name]] for name in sorted(failures.keys() - results.keys())],
            "without_truth": list(without_truth),
        },
    }
    return write_page(folder / PAGE_NAME, Path(__file__).with_name("page.html"), blocks)


def _means(summary: Mapping[str, object]) -> dict[str, object]:
    figures = {name: value for name, value in summary.items() if isinstance(value, Mapping)}
    return {"summary": figures, "pooled": summary.get("pooled_lesion_f1")}


def _cases(
    folder: Path,
    results: Mapping[str, Mapping[str, float]],
    failures: Mapping[str, str],
    pictures: Path | None,
    by_label: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> Iterator[dict[str, Any]]:
    for name in sorted(results):
        row = results[name]
        own = {label: rows[name] for label, rows in by_label.items()}
        flags = [f"prediction {flag}" for flag in ("missing", "failed") if row.get(flag)] or _empty(row)
        if not flags:
            flags = [f"{label}: {flag}" for label, its in own.items() for flag in _empty(its)]
        if not flags and name in failures:
            flags = ["error"]  # of its calcium, say
        case = {"name": name, "id": in_address(name), "flags": flags, "error": failures.get(name, "")}
        if own:
            case["labels"] = [{"name": label, "figures": _figures(its)} for label, its in own.items()]
        yield case | {"figures": _figures(row), "picture": _picture(folder, pictures, name)}


def _empty(row: Mapping[str, float]) -> list[str]:
    """Which mask alone is empty, as a flag."""
    if row["truth_ml"] == 0 < row["predicted_ml"]:
        return ["truth empty"]
    return ["prediction empty"] if row["predicted_ml"] == 0 < row["truth_ml"] else []


def _figures(row: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in ("missing", "failed")}


def _picture(folder: Path, pictures: Path | None, name: str) -> str | None:
    """The address of a case's picture from the page's folder; None: there is none."""
    path = None if pictures is None else pictures / f"{name}_overlay.png"
    if path is None or not path.is_file():
        return None
    try:
        way = os.path.relpath(path.absolute(), folder.absolute())
    except ValueError:  # on another drive
        return None
    return "/".join(in_address(part) for part in Path(way).parts)
