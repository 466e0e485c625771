"""A result file as a page with tables and pictures: ``python -m benchmarks.report FILE.json -o PAGE.md``.

The pictures lie beside the page and carry its name. Every contestant has its row, also where it is ahead of ours and
where it has no time.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plots
from benchmarks.records import Record, Run, load
from grcsf_fast.data.files import replace_when_done

__all__ = ["exponent", "page"]

# Why a cost does not grow in proportion; by axis of benchmarks/test_scaling.py. Exponents stand beside it.
REASONS = {
    "image side": "Proportional to the pixels would be 2. Small images pay for calls more than for pixels; large ones "
    "leave the caches.",
    "batch": "Proportional would be 1. A batch of one leaves threads idle in the deep stages, whose images are small; "
    "from there on the tensors leave the caches.",
    "channels": "Of convolutions 2, of norms, pooling and both ops 1: the more channels, the more the convolutions "
    "decide.",
    "patch size": "Op 2 multiplies each pixel with the p x p of its patch, so its own part grows by 2; the rest of the "
    "network knows no patches.",
    "threads": "Perfect would be -1. What one thread does alone (Python, dispatch) and the memory's bandwidth, which "
    "all share, keep it above.",
    "slices": "Proportional would be 1. Loading, the report and the picture cost about the same for any volume.",
}


def ahead_of(group: dict[str, Record]) -> tuple[Record | None, Record | None]:
    """Our best and the best of the others, the reference included."""
    ours = [one for one in group.values() if one.info["ours"]]
    others = [one for one in group.values() if not one.info["ours"]]
    return min(ours, key=lambda one: one.median, default=None), min(others, key=lambda one: one.median, default=None)


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Of the power law through the points, by least squares of the logarithms."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def scaling(run: Run) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By axis and contestant, (value, seconds) in ascending order."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for group in run.groups.values():
        for name, record in group.items():
            if record.info["scaling"]:
                axis, value = record.info["scaling"]
                found.setdefault(axis, {}).setdefault(name, []).append((value, record.median))
    return {axis: {name: sorted(points) for name, points in lines.items()} for axis, lines in found.items()}


def stated(run: Run) -> list[str]:
    """Machine, versions, commit, date and command."""
    machine, commit = run.machine, run.commit
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    dirty = " with uncommitted changes" if commit["dirty"] else ""
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    if machine["device"] != "cpu":
        where = f"{machine['device']}; {where}"
    return [
        f"{where}; kernels {machine['kernels']}, {machine['instruction_set']}",
        f"{versions}",
        f"commit {commit['id'][:12]}{dirty}, {run.date[:10]}, `{run.command}`",
    ]


def number(value: float | None, scale: float = 1.0, digits: int = 3) -> str:
    """Some significant digits, never in powers of ten."""
    if value is None:
        return "-"
    value *= scale
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def table(group: dict[str, Record]) -> list[str]:
    reference = next(iter(group.values())).info["reference"]
    base = group.get(reference)
    floor = next((one.info["floor_seconds"] for one in group.values() if "floor_seconds" in one.info), None)
    lines = [
        f"| | median, ms | quartiles, ms | rounds | {reference} / it | it / floor | first call, s | peak, MiB "
        "| error | note |",
        "|---" * 10 + "|",
    ]
    best = min(group.values(), key=lambda one: one.median)
    for name, one in sorted(group.items(), key=lambda item: item[1].median):
        quartiles = (
            statistics.quantiles(one.seconds, n=4, method="inclusive") if len(one.seconds) > 1 else [one.median] * 3
        )
        notes = [one.info["too_short"]] if one.info["too_short"] else []
        if one is best and not one.info["ours"]:
            notes.append("ahead of ours")
        cells = (
            f"**{name}**" if one.info["ours"] else name,
            number(one.median, 1e3),
            f"{number(quartiles[0], 1e3)} to {number(quartiles[2], 1e3)}",
            str(len(one.seconds)),
            number(base.median / one.median) if base else "-",
            number(one.median / floor) if floor else "-",
            number(one.info["first_call_seconds"]),
            number(one.info["peak_bytes"], 2**-20),
            f"{one.info['error']:.0e}",
            "; ".join(notes),
        )
        lines.append(f"| {' | '.join(cells)} |")
    absent = {name: reason for one in group.values() for name, reason in one.info["absent"].items()}
    lines += [f"| {name} | - | | | | | | | | {reason.replace('|', '/')} |" for name, reason in absent.items()]
    return lines


def summary(run: Run) -> list[str]:
    """One line a group: ours against the reference and against the best of the others."""
    lines = [
        "| group | ours, ms | reference / ours | best other / ours | best other |", "|---|---|---|---|---|"
    ]  # fmt: skip
    for title, group in run.groups.items():
        ours, best = ahead_of(group)
        if ours is None:
            lines.append(f"| {title} | no time | | | |")
            continue
        base = group.get(ours.info["reference"])
        over_base = f"{base.median / ours.median:.2f}" if base and not base.info["ours"] else "-"
        over_best = f"{best.median / ours.median:.2f}" if best else "-"
        behind = ", **ahead of ours**" if best and best.median < ours.median else ""
        lines.append(
            f"| {title} | {ours.name}: {number(ours.median, 1e3)} | {over_base} | {over_best} "
            f"| {best.name + behind if best else '-'} |"
        )
    return lines


def scaling_table(run: Run) -> list[str]:
    lines: list[str] = []
    for axis, contestants in scaling(run).items():
        values = [value for value, _ in next(iter(contestants.values()))]
        lines += [
            "", f"**{axis}**", "",
            f"| | {' | '.join(f'{value:g}' for value in values)} | exponent |", "|---" * (len(values) + 2) + "|",
        ]  # fmt: skip
        for name, points in contestants.items():
            seconds = dict(points)
            cells = [f"{number(seconds.get(value), 1e3)} ms" for value in values]
            power = f"{exponent(*zip(*points, strict=True)):.2f}" if len(points) > 1 else "-"
            lines.append(f"| {name} | {' | '.join(cells)} | {power} |")
        lines += ["", REASONS[axis]]
    return lines


def parts_table(parts: dict[str, dict[str, float]]) -> list[str]:
    kinds = sorted(
        {kind for one in parts.values() for kind in one}, key=lambda kind: -max(p.get(kind, 0) for p in parts.values())
    )
    lines = [f"| ms | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    lines += [f"| {kind} | {' | '.join(f'{one.get(kind, 0.0):.1f}' for one in parts.values())} |" for kind in kinds]
    return lines


def parts_of(run: Run) -> tuple[str, dict[str, dict[str, float]]] | None:
    """Of the first group that has them: milliseconds by kind of work, by contestant, the reference first."""
    for title, group in run.groups.items():
        found = {name: record.info["detail"]["shares_ms"] for name, record in group.items() if record.info["detail"]}
        if found and not any(record.info["scaling"] for record in group.values()):
            return title, dict(sorted(found.items(), key=lambda item: item[0] != "reference"))
    return None


def page(run: Run, pictures: dict[str, str]) -> list[str]:
    """The page; pictures by title, each a file's name."""
    machine = run.machine
    lines = [
        "# Benchmarks", "",
        *(f"- {line}" for line in stated(run)),
        f"- copy {number(machine['copy_bytes_per_second'], 1e-9)} GB/s; products "
        f"{number(machine['float32_operations_per_second'], 1e-9)} (float32) and "
        f"{number(machine['bfloat16_operations_per_second'], 1e-9)} (bfloat16) Gop/s, which the floors are made of",
        "",
        "Medians of interleaved rounds, of all processes of the run; every contestant was checked against float64 "
        "first, and a wrong one has no time. Ours are bold. The first call includes compilation; the peak is the "
        "growth of memory in a call, results included. Calls begin with cold caches, those of 1xC1x2x2 aside; freed "
        "memory stays in the process, so none pays for fresh pages.", "",
    ]  # fmt: skip
    if run.quick:
        lines += ["**A quick run: most rows are too short to be quoted.**", ""]
    for title, file in pictures.items():
        lines += [f"![{title}]({file})", ""]
    lines += ["## Summary", "", *summary(run), ""]
    if (parts := parts_of(run)) is not None:
        lines += ["## Where a forward spends its time", "", parts[0], "", *parts_table(parts[1]), ""]
    lines += ["## How costs grow", *scaling_table(run), "", "## Every group", ""]
    for title, group in run.groups.items():
        lines += [f"### {title}", "", *table(group), ""]
    return lines


def write(run: Run, output: Path) -> list[Path]:
    """The page and its pictures."""
    drawn: dict[str, Any] = plots.draw(run, stated(run), scaling(run), parts_of(run))
    files = {title: output.with_name(f"{output.stem}-{name}.png") for name, (title, _) in drawn.items()}
    with replace_when_done(*files.values(), output) as parts:
        for part, (_, figure) in zip(parts, drawn.values(), strict=False):
            figure.savefig(part, dpi=120)
        parts[-1].write_text("\n".join(page(run, {title: file.name for title, file in files.items()})))
    return [output, *files.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="page; default: the results' name with .md")
    options = parser.parse_args()
    for path in write(load(options.results), options.output or options.results.with_suffix(".md")):
        print(path)


if __name__ == "__main__":
    main()
