"""The reports that ``predict`` writes beside its results, how files of JSON are read, cells of tables and volumes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["REPORT", "amount", "cell_of", "is_report", "read_json", "read_report", "rounded_ml", "run_of", "text_of"]

REPORT = "_report.json"  # behind the name of the case
# A text that spreadsheets take for a formula, or one that was kept from it already.
FORMULA = re.compile(r"'*[=+\-@\t\r]")
# Settings that may differ from node to node.
OF_A_NODE = ("precision", "batch_size", "compiled", "device", "backend", "tf32")


def read_json(path: Path) -> Any:
    """What a file of JSON holds, which is UTF-8 whatever the locale says, with or without a mark of the byte order.

    Raises:
        OSError: it cannot be read.
        ValueError: no JSON, or such as cannot be taken in; the message says what is wrong, and leaves the file to the
            caller.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"expected UTF-8, found the byte 0x{byte:02x} at {error.start}") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError("expected whole numbers of at most some thousand digits, found a longer one") from error
    except RecursionError as error:
        raise ValueError("expected lists and objects of some levels, found them nested too deeply") from error


def read_report(path: Path) -> dict[str, Any]:
    """A case's report on disk; empty where there is none that can be read."""
    try:
        report = read_json(path)
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) and isinstance(report.get("outputs"), dict) else {}


def is_report(found: Any) -> bool:
    """Whether what a file of JSON holds is a case's report, as this or an earlier version wrote it."""
    known = {"case": str, "input": str, "lesion_count": int}
    return isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in known.items())


def run_of(settings: Mapping[str, Any]) -> str:
    """By which results of one run are told from those of another one, of other weights, say; on any nodes."""
    shared = {name: value for name, value in settings.items() if name not in OF_A_NODE}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]


def rounded_ml(ml: float) -> float:
    """Millilitres as they are written down: six digits, whatever their size, as a voxel of 0.05 mm has 1.25e-7."""
    return float(f"{ml:.6g}")


def amount(value: float, decimals: int) -> str:
    """A number as text; what is not 0, such as mL of a mouse, is not shown as 0, but for what rounding alone left."""
    text = f"{value:z.{decimals}f}"  # no -0.00
    return text if float(text) or abs(value) < 1e-9 else f"{value:.2g}"


def cell_of(value: Any) -> Any:
    """What stands for a value in a table of CSV: a text that spreadsheets would take for a formula has ' in front."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def text_of(cell: str) -> str:
    """The text that :func:`cell_of` made a cell of."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
