"""Dice against seconds a volume, everyone on one picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.accuracy.tables import Results, tests_of
from benchmarks.accuracy.variants import FORMS, PEERS, SETTINGS, UNITS, VARIANTS
from benchmarks.plots import COLOURS, MARKERS, plain

__all__ = ["draw"]

STYLES = {UNITS: 0, PEERS: 5, FORMS: 2}


def draw(results: Results, target: Path) -> None:
    """A panel for each test set, of the setting with many labels; bars are the standard deviation of the seeds."""
    setting, tests = next(iter(SETTINGS)), tests_of(results)
    figure = Figure(figsize=(3 + 6 * len(tests), 6.5), layout="constrained")
    handles = {}
    for axes, test in zip(figure.subplots(1, len(tests), squeeze=False)[0], tests, strict=True):
        for number, (name, variant) in enumerate(VARIANTS.items(), 1):
            seeds = results.seeds(setting, name, test)
            if not seeds:
                continue
            means = results.dice(setting, name, test, seeds).mean(1)
            place, style = (results.seconds(name, "a volume"), means.mean()), STYLES[variant.group]
            spread = means.std(ddof=1) if len(seeds) > 1 else None
            handles[f"{number}  {name}"] = axes.errorbar(
                *place, spread, color=COLOURS[style], marker=MARKERS[style], markersize=6, elinewidth=0.7,
                linestyle="none",
            )  # fmt: skip
            axes.annotate(str(number), place, (5, 3), textcoords="offset points", fontsize=9)
        axes.set(xscale="log", title=f"{setting}, test subjects: {test}", ylabel="mean Dice")
        axes.set_xlabel("seconds a volume of 24 slices, one thread, residual maps included; logarithmic", fontsize=9)
        plain(axes.xaxis)
        axes.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(target, dpi=110, metadata={"Software": None})
