"""The reports that ``predict`` writes beside its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["REPORT", "read_report", "run_of"]

REPORT = "_report.json"  # behind the name of the case
# Settings that may differ from node to node.
OF_A_NODE = ("precision", "batch_size", "compiled", "device", "backend", "tf32")


def read_report(path: Path) -> dict[str, Any]:
    """A case's report on disk; empty where there is none that can be read."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) and isinstance(report.get("outputs"), dict) else {}


def run_of(settings: Mapping[str, Any]) -> str:
    """By which results of one run are told from those of another one, of other weights, say; on any nodes."""
    shared = {name: value for name, value in settings.items() if name not in OF_A_NODE}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]
