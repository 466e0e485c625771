"""The table of a cross-validation: figures over all cases and by size of lesion, with what was missed beside them."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.files import replace_when_done
from ..data.reports import amount, cell_of, rounded_ml
from .summary import TABLE, finite, summarize

__all__ = [
    "FIGURES",
    "LabelTable",
    "calcium_lines",
    "label_lines",
    "label_tables",
    "markdown",
    "median_volume",
    "size_of",
    "table_rows",
    "write_table",
]

# By name in the results: what people call it, and its decimals.
FIGURES = {
    "dice": ("Dice", 3),
    "lesion_f1": ("lesion-wise F1", 3),
    "hausdorff95_mm": ("HD95 (mm)", 1),
    "volume_difference_ml": ("volume difference (mL)", 2),
}
SIZES = ("none", "small", "large")
COUNTS = ("cases", "without_prediction", "missed", "invented", "lesions_true", "lesions_missed", "lesions_false")


def median_volume(volumes: Iterable[float | None]) -> float:
    """The volume up to which a case's lesion is small: the median of those above 0, in mL as they are written down; 0
    where there are none."""
    found = [rounded_ml(volume) for volume in volumes if volume]
    return float(statistics.median(found)) if found else 0.0


def size_of(volume: float, limit: float) -> str:
    """``"none"``, ``"small"`` (up to the limit, of :func:`median_volume`) or ``"large"``, of volumes in mL."""
    return "none" if volume == 0 else "small" if rounded_ml(volume) <= limit else "large"


def table_rows(results: Mapping[str, Mapping[str, float]], limit: float) -> list[dict[str, Any]]:
    """One row for all cases and one for each size.

    Args:
        results: by case, as of :func:`grcsf_fast.evaluation.folders.evaluate_cases`.
        limit: mL up to which lesion is small.

    Returns:
        Rows with ``lesion`` (``"all"``, ``"none"``, ``"small"``, ``"large"``), numbers of ``cases``, of those
        ``without_prediction``, ``missed`` (lesion, none of which was found) and ``invented`` (lesion found where there
        is none), ``lesions_true``, ``lesions_missed`` and ``lesions_false`` of those large enough to count; and by name
        of :data:`FIGURES` what :func:`grcsf_fast.evaluation.summary.summarize` says of it. Cases without prediction,
        missed and invented ones are in the means, as it describes.
    """
    groups: dict[str, dict[str, Mapping[str, float]]] = {"all": dict(results)} | {size: {} for size in SIZES}
    for name, row in results.items():
        groups[size_of(row["truth_ml"], limit)][name] = row
    return [_row(size, cases) for size, cases in groups.items()]


def _row(size: str, cases: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    rows = list(cases.values())
    summary: dict[str, Any] = dict(summarize(cases))
    nothing = {"mean": math.nan, "sd": math.nan, "median": math.nan, "n": 0, "undefined": 0, "left_out": 0}
    return {
        "lesion": size,
        "cases": len(rows),
        "without_prediction": sum(bool(row.get("missing") or row.get("failed")) for row in rows),
        "missed": sum(row["truth_ml"] > 0 and row["dice"] == 0 for row in rows),
        "invented": sum(row["truth_ml"] == 0 and row["predicted_ml"] > 0 for row in rows),
        "lesions_true": int(sum(row["lesions_true"] for row in rows)),
        "lesions_missed": int(sum(row["lesions_true"] - row["lesions_found"] for row in rows)),
        "lesions_false": int(sum(row["lesions_false"] for row in rows)),
        **{name: {key: value for key, value in summary.get(name, nothing).items() if key in nothing}
           for name in FIGURES},
    }  # fmt: skip


class LabelTable(NamedTuple):
    """The table of one label.

    Attributes:
        limit: mL up to which its lesion is small: the median of its true volumes above 0.
        rows: of :func:`table_rows`.
    """

    limit: float
    rows: list[dict[str, Any]]


def label_tables(by_label: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, LabelTable]:
    """A table for each label, of its results by case."""
    tables = {}
    for label, results in by_label.items():
        limit = median_volume(row["truth_ml"] for row in results.values())
        tables[label] = LabelTable(limit, table_rows(results, limit))
    return tables


def label_lines(tables: Mapping[str, LabelTable]) -> list[str]:
    """The tables of labels to read and to paste, each below its name; as :func:`markdown`, which explains them."""
    return [line for label, (limit, rows) in tables.items() for line in ("", f"{label}:", "", *_by_size(rows, limit))]


def markdown(rows: Sequence[Mapping[str, Any]], limit: float) -> list[str]:
    """The lines of a table to read and to paste: mean ± SD (median), and how many cases a mean has where not all."""
    without = sum(row["without_prediction"] for row in rows if row["lesion"] == "all")
    return [
        *_by_size(rows, limit),
        "",
        "Mean ± standard deviation (median); n: cases in it, where not all. Missed: cases with lesion of which none",
        "was found; invented: lesion found where there is none. Both are in the means, with a Dice of 0 and, where one",
        "mask is empty, the diagonal of the grid as HD95.",
        *([f"{without} cases without a usable prediction are in the means with the worst values."] if without else []),
    ]


def _by_size(rows: Sequence[Mapping[str, Any]], limit: float) -> list[str]:
    titles = ["lesion", "cases", "missed", "invented", "lesions missed", *(title for title, _ in FIGURES.values())]
    sizes = {"small": f"small, up to {limit:.6g} mL", "large": f"large, above {limit:.6g} mL"}
    cells = [
        [
            sizes.get(row["lesion"], row["lesion"]),
            str(row["cases"]), str(row["missed"]), str(row["invented"]),
            f"{row['lesions_missed']} of {row['lesions_true']}",
            *(_cell(row[name], row["cases"], decimals) for name, (_, decimals) in FIGURES.items()),
        ]
        for row in rows
    ]  # fmt: skip
    return _table(titles, cells)


def _cell(figure: Mapping[str, float], cases: int, decimals: int) -> str:
    if not figure["n"]:
        return "-"
    mean, sd, median = (_number(figure[key], decimals) for key in ("mean", "sd", "median"))
    return f"{mean} ± {sd} ({median})" + (f", n {figure['n']}" if figure["n"] != cases else "")


def calcium_lines(calcium: Mapping[str, Any]) -> list[str]:
    """The measures of :func:`grcsf_fast.evaluation.calcium.summarize_calcium` as tables to read and to paste."""
    cells = [
        [name, *(_number(calcium[name][key], 3) for key in ("sensitivity", "ppv", "f1"))]
        for name in ("lesions", "volume")
    ]
    lines = _table(["calcium by", "sensitivity", "PPV", "F1"], cells)
    if calcium["arteries"]:
        lines += ["", *_of_arteries(calcium["arteries"])]
    names = list(calcium["categories"])
    counted = [[one, *(str(calcium["categories"][one][other]) for other in names)] for one in names]
    lines += ["", *_table(["Agatston, true by predicted", *names], counted), ""]
    figures = (("ICC of volumes", "icc_volume"), ("of Agatston scores", "icc_agatston"), ("weighted kappa", "kappa"))
    said = ", ".join(f"{title} {_number(calcium[key], 3)}" for title, key in figures)
    lines.append(f"{calcium['patients']} patients: {said}, same risk category {calcium['same_category']:.0%}.")
    if without := calcium["without_prediction"]:
        lines.append(
            f"{without} without a usable prediction count as if nothing was predicted, and as another category than "
            "the true one."
        )
    return lines


def _of_arteries(arteries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of arteries; only predictions with their labels have a PPV and scores of each."""
    titles = {"lesions": 0, "sensitivity": 3, "ppv": 3, "volume_sensitivity": 3, "volume_ppv": 3}
    titles |= {"agatston_true": 1, "agatston_predicted": 1, "icc_agatston": 3}
    said = {
        "ppv": "PPV", "volume_sensitivity": "of volume", "volume_ppv": "PPV of volume", "icc_agatston": "ICC",
        "agatston_true": "mean Agatston, true", "agatston_predicted": "predicted",
    }  # fmt: skip
    labelled = all("ppv" in row for row in arteries.values())
    kept = [key for key in titles if labelled or key in ("lesions", "sensitivity", "volume_sensitivity")]
    title = "artery, by its label" if labelled else "true artery, by any prediction"
    cells = [[name, *(_number(row[key], titles[key]) for key in kept)] for name, row in arteries.items()]
    return _table([title, *(said.get(key, key) for key in kept)], cells)


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None or not math.isfinite(value) else amount(value, decimals)


def _table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in (titles, *cells)) for place in range(len(titles))]
    rows = [titles, ["-" * width for width in widths], *cells]
    return [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]


def write_table(
    folder: str | Path,
    rows: Sequence[Mapping[str, Any]],
    lines: Sequence[str],
    more: Mapping[str, Any],
    labels: Mapping[str, LabelTable] | None = None,
) -> list[Path]:
    """Write ``table.csv`` (a row for each size and figure), ``table.json`` and ``table.md``; returns their paths.

    Args:
        folder: for them.
        rows: of :func:`table_rows`.
        lines: of ``table.md``.
        more: what stands in ``table.json`` beside the rows.
        labels: the tables of labels; they follow the others in ``table.csv``, which then names the label of each row
            first, none for all together, and are under ``labels`` in ``table.json``.

    Raises:
        OSError: they cannot be written.
    """
    targets = [Path(folder) / f"table.{ending}" for ending in ("csv", "json", "md")]
    with replace_when_done(*targets) as (listed, whole, text):
        with listed.open("w", **TABLE) as file:
            named = ["label"] if labels else []
            columns = [*named, "lesion", *COUNTS, "figure", "mean", "sd", "median", "n", "undefined", "left_out"]
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for label, table in [("", rows), *((label, table.rows) for label, table in (labels or {}).items())]:
                for row in table:
                    common = {
                        **dict.fromkeys(named, cell_of(label)),
                        **{name: row[name] for name in ("lesion", *COUNTS)},
                    }
                    writer.writerows(common | {"figure": name} | row[name] for name in FIGURES)
        own = {label: {"small_up_to_ml": table.limit, "rows": table.rows} for label, table in (labels or {}).items()}
        text_of = {"rows": list(rows), **({"labels": own} if own else {}), **more}
        whole.write_text(json.dumps(finite(text_of), indent=2, allow_nan=False) + "\n")
        text.write_text("\n".join(lines) + "\n", encoding=TABLE["encoding"], errors=TABLE["errors"])
    return targets
