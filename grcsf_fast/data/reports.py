"""The reports that ``predict`` writes beside its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["REPORT", "read_report"]

REPORT = "_report.json"  # behind the name of the case


def read_report(path: Path) -> dict[str, Any]:
    """A case's report on disk; empty where there is none that can be read."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) and isinstance(report.get("outputs"), dict) else {}
