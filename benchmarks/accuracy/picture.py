"""Dice against seconds a volume, everyone on one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.accuracy.tables import Results, tests_of
from benchmarks.accuracy.variants import FORMS, PEERS, SETTINGS, UNITS, VARIANTS
from benchmarks.plots import COLOURS, MARKERS, plain

__all__ = ["draw"]

STYLES = {UNITS: 0, PEERS: 5, FORMS: 4}


def draw(results: Results, target: Path) -> None:
    """A panel for each test set, of the setting with many labels; bars are the standard deviation of the seeds."""
    setting, tests = next(iter(SETTINGS)), tests_of(results)
    figure = Figure(figsize=(1 + 7 * len(tests), 6.5), layout="constrained")
    for axes, test in zip(np.atleast_1d(figure.subplots(1, len(tests), squeeze=True)), tests, strict=True):
        named: set[str] = set()
        for name, variant in VARIANTS.items():
            seeds = results.seeds(setting, name, test)
            if not seeds:
                continue
            means = results.dice(setting, name, test, seeds).mean(1)
            seconds, style = results.seconds_a_volume(setting, name), STYLES[variant.group]
            axes.errorbar(
                seconds, means.mean(), means.std(ddof=1) if len(seeds) > 1 else None, color=COLOURS[style],
                marker=MARKERS[style], markersize=5 if variant.group == FORMS else 8, elinewidth=0.8,
                label=None if variant.group in named else variant.group, linestyle="none",
            )  # fmt: skip
            named.add(variant.group)
            size = 6 if variant.group == FORMS else 8
            axes.annotate(name, (seconds, means.mean()), (6, 3), textcoords="offset points", fontsize=size)
        axes.set(xscale="log", title=f"test subjects: {test}", ylabel="mean Dice")
        axes.set_xlabel("seconds a volume of 24 slices, one thread, with residual maps where needed; logarithmic")
        axes.margins(x=0.2)
        plain(axes.xaxis)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.savefig(target, dpi=110, metadata={"Software": None})
