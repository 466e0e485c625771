"""``index.html`` of a folder: a table of all cases, and each of them with its picture, lesions and hashes."""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.page import in_address, write_page
from ..data.reports import REPORT, read_report
from .overlay import ABOVE, COLUMNS, map_title

__all__ = ["PAGE_NAME", "shown_report", "write_folder_page"]

PAGE_NAME = "index.html"
TITLE = "Lesions found by grcsf-fast"  # in pages of all versions
THUMBNAIL = (160, 192)  # most pixels of width and height; shown at half of it, sharp on fine screens
MOST_BYTES = 24 * 2**10  # of a thumbnail
MOST_BYTES_TOGETHER = 24 * 2**20  # of all; a page of more would open slowly
MOST_LESIONS = 100  # of a case in the page; its report has all
SMALL_ML = 0.1
# What is said of a case beside its figures.
NO_LESION, SMALL, DOUBTS, OTHERS, FAILED, NOT_DONE = FLAGS = (
    "no lesion found", f"all lesions below {SMALL_ML} mL", "doubts about its file", "other settings or versions",
    "failed", "not done",
)  # fmt: skip


def write_folder_page(output: str | Path, rows: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write ``index.html`` from the reports and pictures that a folder holds.

    Reports and pictures are read one after the other; of each the page keeps a thumbnail of at most 24 KiB, until
    24 MiB are spent. The larger pictures are linked. Equal reports and pictures give equal bytes.

    Args:
        output: folder of results.
        rows: by case, ``status`` ("done", "failed" or "missing"), ``input`` and ``error`` of those that are not done.

    Returns:
        The path of the page.

    Raises:
        OSError: the page cannot be written.
    """
    output = Path(output)
    settings: list[dict[str, Any]] = []
    blocks = {"cases": _cases(output, rows, settings), "run": {"settings": settings}}
    return write_page(output / PAGE_NAME, Path(__file__).with_name("page.html"), blocks)


def shown_report(path: Path) -> dict[str, Any]:
    """A case's report on disk; empty where there is none, or one that tables and pages cannot show.

    Reports of other runs may be of any version, or changed by hand.
    """
    report = read_report(path)
    try:
        _done(path.name, report, [])
        _maps_below(report)
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    return report


def _cases(
    output: Path, rows: Mapping[str, Mapping[str, Any]], settings: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What the page knows of each case; ``settings`` gets what was met, each once."""
    known: dict[str, int] = {}
    spent = 0
    for name in sorted(rows):
        row = rows[name]
        report = shown_report(output / f"{name}{REPORT}") if row["status"] == "done" else {}
        if not report:
            status, flag = ("failed", FAILED) if row["status"] == "failed" else ("missing", NOT_DONE)
            yield {
                "name": name, "id": in_address(name), "status": status, "flags": [flag], "count": None,
                "ml": None, "largest": None, "input": str(row.get("input", "")), "error": str(row.get("error", "")),
            }  # fmt: skip
            continue
        used = {"settings": report["settings"], "versions": report.get("versions", {})}
        place = known.setdefault(json.dumps(used, sort_keys=True), len(settings))
        if place == len(settings):
            settings.append(used)
        flags = [OTHERS] if place else []
        case = _done(name, report, flags) | {"settings": place}
        file = f"{name}_overlay.png"
        if file in report["outputs"]:
            below = _maps_below(report)
            found = _picture(output / file, 1 + len(below), "labels" in report)
            if found is not None:
                picture, thumbnail = found
                case["picture"] = picture | {"file": {"name": file, "address": in_address(file)}, "below": below}
                if spent + len(thumbnail) <= MOST_BYTES_TOGETHER:
                    spent += len(thumbnail)
                    case["thumbnail"] = f"data:image/jpeg;base64,{base64.b64encode(thumbnail).decode()}"
        yield case


def _maps_below(report: dict[str, Any]) -> list[str]:
    """What the rows of maps in a case's picture show, from above."""
    settings = report["settings"]
    residual = settings["residual_maps"] if "residual_maps" in settings else settings["residual"]  # of version 0.1
    names = report.get("overlay_rows")
    if names is None:  # before the maps of the units were drawn
        key = "mask_ratios" if "mask_ratios" in residual else "ratios"
        ratios = residual[key] if settings["mae"] is not None else []
        names = [f"residual{round(100 * max(ratios))}"] if ratios else []
    return [map_title(name, bool(residual.get("signed"))) for name in names]


def _done(name: str, report: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    lesions, count = report["lesions"], report["lesion_count"]
    largest = lesions[0]["volume_ml"] if lesions else 0.0
    if not count:
        flags = [NO_LESION, *flags]
    elif largest < SMALL_ML:
        flags = [SMALL, *flags]
    remarks = [*(report.get("remarks") or [])]
    if remarks:
        flags = [*flags, DOUBTS]
    return {
        "name": name, "id": in_address(name), "status": "done", "flags": flags, "count": count,
        "ml": report["total_volume_ml"], "largest": largest, **_scored(report), "input": report["input"], "error": "",
        **({"remarks": remarks} if remarks else {}), "hash": report["input_sha256"],
        **({"labels": _labels(report["labels"])} if "labels" in report else {"lesions": _lesions(lesions)}),
        "files": [
            {"name": file, "address": in_address(file), "hash": hash_, "map": file.startswith(f"{name}_residual")}
            for file, hash_ in report["outputs"].items()
        ],
    }  # fmt: skip


def _labels(labels: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the page knows of each label, in the order of the report."""
    most = max(1, MOST_LESIONS // max(1, len(labels)))
    return [
        {
            "name": name, "numbers": [*own["numbers"]], "count": own["lesion_count"], "ml": own["total_volume_ml"],
            "largest": own["lesions"][0]["volume_ml"] if own["lesions"] else 0.0, **_scored(own),
            "lesions": _lesions(own["lesions"], most),
        }
        for name, own in labels.items()
    ]  # fmt: skip


def _scored(found: Mapping[str, Any]) -> dict[str, float]:
    """The Agatston score, where a report or a label of it has one."""
    return {"agatston": found["agatston"]} if "agatston" in found else {}


def _lesions(lesions: Sequence[Mapping[str, Any]], most: int = MOST_LESIONS) -> list[list[float]]:
    """Volume and centre of the largest."""
    return [[lesion["volume_ml"], *lesion["centroid_mm"]] for lesion in lesions[:most]]


def _picture(path: Path, rows: int, several: bool) -> tuple[dict[str, Any], bytes] | None:
    """Where the tiles of an overlay lie, in pixels, and a JPEG of the image with most of the outlines.

    Args:
        path: of the PNG.
        rows: of tiles.
        several: labels, each outlined in a colour of its own rather than in red.

    Returns:
        None where the picture is gone or cannot be read.
    """
    import numpy as np
    from PIL import Image

    try:
        # An axis a thousand times as long as another makes a picture that PIL takes for an attack.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    width, height = image.size
    tile = height / (rows + 2 * ABOVE)
    top, below = round(2 * ABOVE * tile), round((1 + 2 * ABOVE) * tile)
    tiles = [
        image.crop((round(width * column / COLUMNS), top, round(width * (column + 1) / COLUMNS), below))
        for column in range(COLUMNS)
    ]

    def outlined(tile: Image.Image) -> tuple[int, float]:
        """Pixels of the outlines' colour; where there are none, the brightest tile shows most of the head."""
        red, green, blue = np.moveaxis(np.asarray(tile).astype(np.int16), 2, 0)
        others = np.maximum(green, blue)
        colored = red - others > 120
        if several:
            colored = np.maximum(red, others) - np.minimum(red, np.minimum(green, blue)) > 60
        return int(colored.sum()), float(green.mean())

    shown = max(tiles, key=outlined)
    shown.thumbnail(THUMBNAIL)
    where = {"width": width, "height": height, "columns": COLUMNS, "title": round(ABOVE * tile)}
    return where, _jpeg(shown)


def _jpeg(image: Any) -> bytes:
    for quality in (75, 40, 10):
        file = io.BytesIO()
        image.save(file, "jpeg", quality=quality)
        if file.tell() <= MOST_BYTES:
            break
    return file.getvalue()
