"""The two pictures of the README: the demo's overlay, and a few times of a benchmark run (``make pictures``)."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.plots import COLOURS, HATCHES, plain
from benchmarks.records import Run, load

__all__ = ["demo", "speed"]

FOLDER = Path("docs/images")
WIDTH = 1000  # pixels
# Group of the run -> what a reader calls it; whole calls with two threads.
SHOWN = {
    "op 1, 8xC32x224x224, float32, forward, 2 threads": "GCU op, forward",
    "op 1, 2xC64x48x48x48, float32, both, 2 threads": "GCU op in 3-D, with gradients",
    "op 2, 8xC32x224x224, float32, forward, 2 threads": "RCU op, forward",
    "op 2, 8xC128x56x56, float32, both, 2 threads": "RCU op, with gradients",
    "network, 2x1x160x160, float32, forward, 2 threads": "network, forward",
    "network, 2x1x128x128, float32, training step, 2 threads": "network, training step",
    "volume, 197x233x189, float32 or named, file to files, 2 threads": "T1 volume, ours in four views",
    "volume, 197x233x189, one view, float32 or named, file to files, 2 threads": "T1 volume, all in one view",
}
NAMED = "DynUNet (nnU-Net)"  # what many would take instead, beside the fastest
PLAIN = ("reference", "plain path")  # the same mathematics in plain PyTorch


def demo(overlay: Path, target: Path) -> None:
    """The overlay of ``make demo``, smaller and with few colours."""
    with Image.open(overlay) as image:
        size = WIDTH, round(image.height * WIDTH / image.width)
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    small.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def speed(run: Run, target: Path) -> None:
    """Bars of a row: the time of plain PyTorch, of nnU-Net's network where it takes part, and of the fastest other
    contestant, over that of ours."""
    rows = []
    for group, label in SHOWN.items():
        records = run.groups[group]
        ours = min(one.median for one in records.values() if one.info["ours"])
        times = {name: one.median / ours for name, one in records.items() if not one.info["ours"]}
        reference = next(name for name in PLAIN if name in times)
        best = min((name for name in times if name != reference), key=times.get)
        bars = [("plain PyTorch", times[reference], ""), ("fastest other, named", times[best], best)]
        rows.append((label, bars[:1] + [(NAMED, times[name], "") for name in times if name == NAMED] + bars[1:]))
    figure = Figure(figsize=(WIDTH / 100, 0.6 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    styles = {"plain PyTorch": 0, "fastest other, named": 1, NAMED: 2}
    said = set()
    for place, (_, bars) in enumerate(rows):
        height = 0.8 / len(bars)
        for number, (kind, value, name) in enumerate(bars):
            y, style = place + height * (number - (len(bars) - 1) / 2), styles[kind]
            axes.barh(
                y, value - 1, 0.9 * height, left=1, color=COLOURS[style], hatch=HATCHES[style], edgecolor="white",
                label=None if kind in said else kind,
            )  # fmt: skip
            said.add(kind)
            axes.annotate(
                f"{value:.2g} {name}", (max(value, 1), y), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.set(xscale="log", xlim=(0.1, 40), yticks=range(len(rows)), yticklabels=[row[0] for row in rows])
    axes.set_xlabel("time over ours, logarithmic; left of 1: faster than ours")
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    plain(axes.xaxis)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=100, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overlay", type=Path, required=True, metavar="PNG", help="that of `make demo`")
    parser.add_argument("--run", type=Path, required=True, metavar="JSON", help="a result file of `make bench`")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    demo(options.overlay, FOLDER / "demo.png")
    speed(load(options.run), FOLDER / "speed.png")


if __name__ == "__main__":
    main()
