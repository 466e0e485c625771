"""The pictures of a report, in the colours of Okabe and Ito for the colour-blind; markers and hatches say the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.records import Record, Run

__all__ = ["draw"]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
Points = dict[str, list[tuple[float, float]]]


def plain(axis: Any) -> None:
    """A logarithmic axis labelled with plain numbers, more of them where it spans less than a decade."""
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def figure(width: float, height: float, title: str, stated: Sequence[str]) -> Figure:
    """With its title above, and what the run was below."""
    made = Figure(figsize=(width, height), layout="constrained")
    made.suptitle(title, fontsize=12)
    made.supxlabel(
        "\n".join(line.replace("`", "") for line in _wrapped(stated, int(width * 15))), fontsize=7, color="#444444"
    )
    return made


def _wrapped(lines: Sequence[str], width: int) -> list[str]:
    found: list[str] = []
    for line in lines:
        current = ""
        for word in line.split(" "):
            if current and len(current) + len(word) >= width:
                found.append(current)
                current = ""
            current = f"{current} {word}".strip()
        found.append(current)
    return found


def _ours(group: dict[str, Record]) -> Record | None:
    return min((one for one in group.values() if one.info["ours"]), key=lambda one: one.median, default=None)


def speedups(run: Run, stated: Sequence[str]) -> Figure | None:
    """Of whole calls: how many times as long the reference and the best other take."""
    rows = []
    for group in run.groups.values():
        ours = _ours(group)
        if ours is None or ours.info["what"].startswith("scaling") or ours.info["passed"] == "backward":
            continue
        base = group.get(ours.info["reference"])
        others = [one for one in group.values() if not one.info["ours"] and one is not base]
        best = min(others, key=lambda one: one.median, default=None)
        if base is None:
            continue
        info = ours.info
        name = f"{info['what']}, {info['shape']}, {info['dtype']}, {info['passed']}"
        rows.append(
            (name, base.median / ours.median, best.median / ours.median if best else None, best.name if best else "")
        )
    if not rows:
        return None
    made = figure(11, 1.8 + 0.42 * len(rows), "Time of the others over our best", stated)
    axes = made.subplots()
    places = range(len(rows))
    known = [(y, row) for y, row in zip(places, rows, strict=True) if row[2] is not None]
    # Bars begin at 1, where a contestant takes as long as ours.
    axes.barh([y - 0.2 for y in places], [row[1] - 1 for row in rows], 0.38, 1, color=COLOURS[0], label="reference")
    axes.barh(
        [y + 0.2 for y, _ in known], [row[2] - 1 for _, row in known], 0.38, 1, color=COLOURS[1], hatch="//",
        edgecolor="white", label="best of the other contestants, named",
    )  # fmt: skip
    for y, row in zip(places, rows, strict=True):
        axes.text(max(row[1], 1), y - 0.2, f" {row[1]:.2f}", va="center", fontsize=7)
        if row[2] is not None:
            axes.text(max(row[2], 1), y + 0.2, f" {row[2]:.2f} {row[3]}", va="center", fontsize=7)
    axes.set_yticks(list(places), [row[0] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    values = [value for row in rows for value in row[1:3] if value]
    axes.set_xlim(min(0.5, 0.9 * min(values)), 2.5 * max(values))
    plain(axes.xaxis)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as long as ours (logarithmic); left of 1: faster than ours")
    made.legend(loc="outside upper right", fontsize=8)
    return made


def roofline(run: Run, stated: Sequence[str]) -> Figure | None:
    """Rate against operations a byte of the forwards whose least work is known, below what the machine can do."""
    points = [
        (record, group.get("reference"))
        for group in run.groups.values()
        for record in [_ours(group)]
        if record is not None and record.info.get("bytes") and record.info["operations"] > 1e6
    ]
    if not points:
        return None
    made = figure(9, 6.5, "Both ops, forward: rates below the roof", stated)
    axes = made.subplots()
    bandwidth = run.machine["copy_bytes_per_second"]
    intensities = [one.info["operations"] / one.info["bytes"] for one, _ in points]
    low, high = min(intensities) / 2, max(intensities) * 2
    for number, dtype in enumerate(dict.fromkeys(one.info["dtype"] for one, _ in points)):
        peak = run.machine[f"{dtype}_operations_per_second"]
        knee = peak / bandwidth
        edge = sorted({low, min(max(knee, low), high), high})
        axes.plot(
            edge, [min(peak, x * bandwidth) / 1e9 for x in edge], color=COLOURS[7], linestyle=("-", "--")[number],
            label=f"roof, {dtype}",
        )  # fmt: skip
    kinds = dict.fromkeys((one.info["what"], one.info["dtype"]) for one, _ in points)
    for number, kind in enumerate(kinds):
        mine = [pair for pair in points if (pair[0].info["what"], pair[0].info["dtype"]) == kind]
        for filled, which in ((True, "ours"), (False, "reference")):
            chosen = [(pair[0].info, (pair[0] if filled else pair[1]).median) for pair in mine if filled or pair[1]]
            axes.scatter(
                [info["operations"] / info["bytes"] for info, _ in chosen],
                [info["operations"] / seconds / 1e9 for info, seconds in chosen],
                marker=MARKERS[number], s=50, edgecolor=COLOURS[number],
                facecolor=COLOURS[number] if filled else "white", label=f"{kind[0]}, {kind[1]}, {which}",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain(axes.xaxis)
    plain(axes.yaxis)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("operations a byte of least traffic")
    axes.set_ylabel("Gop/s, of the operations that are needed")
    made.legend(loc="outside right upper", fontsize=8)
    return made


def costs(points: Points, axis: str, unit: str, stated: Sequence[str]) -> Figure:
    """Seconds against one axis."""
    made = figure(7, 5.2, f"Cost of a {'volume' if axis == 'slices' else 'forward'} against {axis}", stated)
    axes = made.subplots()
    for number, (name, line) in enumerate(points.items()):
        values, seconds = zip(*line, strict=True)
        axes.plot(
            values, [1000 * one for one in seconds], color=COLOURS[number], marker=MARKERS[number], label=name,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({value for line in points.values() for value, _ in line})
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    plain(axes.yaxis)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_xlabel(f"{axis}, {unit}" if unit else axis)
    axes.set_ylabel("ms")
    axes.legend(fontsize=8)
    return made


def shares(title: str, parts: dict[str, dict[str, float]], stated: Sequence[str]) -> Figure:
    """Stacked bars: where a forward's time goes before (reference) and after."""
    kinds = sorted(
        {kind for one in parts.values() for kind in one},
        key=lambda kind: -max(one.get(kind, 0.0) for one in parts.values()),
    )
    shown, rest = kinds[: len(COLOURS) - 1], kinds[len(COLOURS) - 1 :]
    made = figure(10, 2.8 + 0.6 * len(parts), f"Where the time of a forward goes\n{title}", stated)
    axes = made.subplots()
    names = list(parts)
    left = [0.0] * len(names)
    rows = [(kind, [parts[name].get(kind, 0.0) for name in names]) for kind in shown]
    if rest:
        rows.append(("smaller parts", [sum(parts[name].get(kind, 0.0) for kind in rest) for name in names]))
    for number, (kind, widths) in enumerate(rows):
        bars = axes.barh(
            names, widths, 0.6, left=left, color=COLOURS[number], hatch=HATCHES[number], edgecolor="white", label=kind
        )
        labels = [
            f"{width:.0f}" if width > 0.05 * max(sum(one.values()) for one in parts.values()) else ""
            for width in widths
        ]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        for bar, label in zip(bars, labels, strict=True):
            if label:
                axes.text(
                    bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2, label, ha="center",
                    va="center", fontsize=8, bbox=box,
                )  # fmt: skip
        left = [one + width for one, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms by the profiler")
    made.legend(loc="outside right center", fontsize=8)
    return made


UNITS = {"image side": "pixels", "batch": "images", "channels": "of the first stage", "patch size": "pixels"}


def draw(
    run: Run, stated: Sequence[str], scaling: dict[str, Points], parts: tuple[str, dict[str, dict[str, float]]] | None
) -> dict[str, tuple[str, Figure]]:
    """By the end of its file's name: title and figure; what the run has nothing for is left out."""
    found: dict[str, tuple[str, Figure | None]] = {
        "speedups": ("speed-ups", speedups(run, stated)),
        "roofline": ("roofline", roofline(run, stated)),
    }
    for axis, points in scaling.items():
        if max(len(line) for line in points.values()) > 1:
            found[f"cost-{axis.replace(' ', '-')}"] = (
                f"cost against {axis}",
                costs(points, axis, UNITS.get(axis, ""), stated),
            )
    if parts is not None:
        found["shares"] = "shares of a forward", shares(*parts, stated)
    return {name: (title, made) for name, (title, made) in found.items() if made is not None}
