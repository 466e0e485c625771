"""What ``predict`` left beside the masks that are compared, and what it says against them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path

from ..data.failures import read_failures
from ..data.files import case_name, sha256
from ..data.reports import REPORT, read_report, run_of

__all__ = ["doubts", "failed_before"]


def failed_before(predicted: Path, known: Container[str] = ()) -> dict[str, str]:
    """What ``predict`` noted of the cases that its last run could not do; results of an earlier one may lie there.

    Args:
        predicted: folder of masks, or one of them.
        known: names of cases, see :func:`case_name`.
    """
    noted = read_failures(predicted.parent if predicted.is_file() else predicted)
    # What could not be a case, such as a broken link, was noted by the name of its file.
    entries = {case_name(name, known): one for name, one in noted.items() if Path(one["input"]).name == name}
    return {name: failure["error"] for name, failure in (entries | noted).items()}


def doubts(predictions: Mapping[str, Path]) -> list[str]:
    """Sentences on masks that are not those of their reports, and on results of different settings.

    Args:
        predictions: masks by name; those without a report beside them are nobody's matter here.
    """
    kinds: dict[str, Path] = {}
    changed = []
    for path in predictions.values():
        report = read_report(path.with_name(case_name(path, predictions) + REPORT))
        if path.name not in report.get("outputs", {}):
            continue
        kinds.setdefault(run_of(report.get("settings") or {}), path)
        with suppress(OSError):  # of a mask that cannot be read the comparison says so
            if sha256(path) != report["outputs"][path.name]:
                changed.append(path)
    found = []
    if len(kinds) > 1:
        first, second, *_ = kinds.values()
        found.append(
            f"{first.parent}: expected results of the same weights and settings, found {len(kinds)} kinds by their "
            f"reports, as of {first.name} and {second.name}: a run ended on its way; run predict again"
        )
    if changed:
        found.append(
            f"{changed[0].parent}: expected the masks that their reports name by their hashes, found {len(changed)} "
            f"others, the first of them {changed[0].name}: changed by hand, or left by a run that was killed"
        )
    return found
