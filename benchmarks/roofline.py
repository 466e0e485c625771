"""What the default networks could take on GPUs that are not here: ``python -m benchmarks.roofline -o FILE.md``.

Bytes, operations and launches of a forward and of a training step are counted (benchmarks/roofline_counts.py), for the
Triton kernels and for the reference, and divided by documented peaks. Nothing runs and nothing is measured.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import roofline_counts as counts
from benchmarks.peaks import PEAKS, Peak
from benchmarks.plots import COLOURS, HATCHES, figure
from benchmarks.roofline_counts import KINDS, OURS, Count, Item
from grcsf_fast import GRCSF, Preprocessing
from grcsf_fast.cli.program import _parser
from grcsf_fast.data.files import replace_when_done
from grcsf_fast.inference.warm_up import HEAD
from grcsf_fast.training.settings import TrainSettings

LAUNCH = 4e-6  # seconds
PASSES = ("forward", "training step")
SIDES = ("ours", "reference")
DRAWN = "H100 SXM"
DETAILED = torch.bfloat16  # what predict and train choose on these GPUs


@dataclass(frozen=True)
class Network:
    """A network, and what it is run on: images and their size, of a forward and of a training step."""

    name: str
    build: Callable[[], GRCSF]
    forward: tuple[int, tuple[int, ...]]
    step: tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    """What one pass of a network takes."""

    network: str
    passed: str
    dtype: torch.dtype
    size: str
    count: Count

    @property
    def label(self) -> str:
        return f"{self.network}, {self.passed}, {self.size}, {str(self.dtype).removeprefix('torch.')}"

    def items(self, side: str, kind: str | None = None) -> list[Item]:
        return [one for one in getattr(self.count, side) if kind is None or one.kind == kind]


def networks() -> list[Network]:
    """The default networks at their usual sizes."""
    options, settings = _parser().parse_args(["train", "-o", "nowhere"]), TrainSettings()
    spacing = Preprocessing().spacing
    head = round(HEAD[0] / spacing[0]), round(HEAD[1] / spacing[1])

    def trained() -> GRCSF:
        return GRCSF(
            2, 1, 1, options.features, options.patch_size, rcu_levels=options.rcu_levels, gcu=options.gcu,
            downsample=options.downsample, neighbours=1,
        )  # fmt: skip

    crops = settings.batch_size, tuple(settings.crop_size)
    return [
        Network("grcsf-fast train", trained, (16, head), crops),
        Network("GRCSF(2, 1, 1)", lambda: GRCSF(2, 1, 1), *[(8, (224, 224))] * 2),
        Network("GRCSF(3, 1, 1)", lambda: GRCSF(3, 1, 1), *[(2, (96, 96, 96))] * 2),
    ]


def rows_of(network: Network, dtypes: Sequence[torch.dtype]) -> Iterator[Row]:
    for passed in PASSES:
        (batch, spatial), count = (
            (network.forward, counts.counted_forward) if passed == "forward" else (network.step, counts.counted_step)
        )
        for dtype in dtypes:
            size = "x".join(map(str, (batch, *spatial)))
            yield Row(network.name, passed, dtype, size, count(network.build, batch, spatial, dtype))


def rate(peak: Peak, unit: str) -> float:
    """Operations a second of a unit."""
    return {
        counts.HALF: peak.half, counts.TF32: peak.tf32, counts.THREE_TF32: peak.tf32 / 3, counts.VECTOR: peak.vector,
    }[unit]  # fmt: skip


def seconds(items: Sequence[Item], peak: Peak) -> float:
    """Of operations one after another, each as fast as memory or multipliers allow."""
    return sum(max(one.bytes / peak.bandwidth, one.operations / rate(peak, one.unit)) for one in items)


def launches(items: Sequence[Item]) -> int:
    return sum(one.launches for one in items)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _pair(values: Sequence[float], digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def _both(row: Row, kind: str | None, of: Callable[[list[Item]], float], digits: int = 2) -> str:
    return _pair([of(row.items(side, kind)) for side in SIDES], digits)


def _overview(rows: Sequence[Row]) -> list[str]:
    head = ["network, pass, size, dtype", "GB", "launches"]
    head += [f"{gpu}, {how}, ms" for gpu in PEAKS for how in ("in a graph", "launched one by one")]
    cells = []
    for row in rows:
        cells.append([row.label, _both(row, None, lambda items: sum(one.bytes for one in items) / 1e9)])
        cells[-1].append(_both(row, None, launches, 0))
        for peak in PEAKS.values():
            for launch in (0.0, LAUNCH):
                times = [1e3 * (seconds(row.items(side), peak) + launch * launches(row.items(side))) for side in SIDES]
                cells[-1].append(f"{_pair(times)}, {times[1] / times[0]:.1f} x")
    return _table(head, cells)


def _detail(row: Row) -> list[str]:
    head = ["operations", "MB", "GFLOP", "launches", *(f"{gpu}, ms" for gpu in PEAKS), f"share of ours, {DRAWN}"]
    whole = seconds(row.items("ours"), PEAKS[DRAWN])
    cells = []
    for kind in (*KINDS, None):
        if not row.items("reference", kind):
            continue
        cells.append([
            kind or "all",
            _both(row, kind, lambda items: sum(one.bytes for one in items) / 1e6, 1),
            _both(row, kind, lambda items: sum(one.operations for one in items) / 1e9, 1),
            _both(row, kind, launches, 0),
            *(_both(row, kind, lambda items, peak=peak: 1e3 * seconds(items, peak), 3) for peak in PEAKS.values()),
            f"{seconds(row.items('ours', kind), PEAKS[DRAWN]) / whole:.0%}",
        ])  # fmt: skip
    outside = {kind: seconds(row.items("ours", kind), PEAKS[DRAWN]) / whole for kind in KINDS if kind not in OURS}
    most = sorted(outside, key=lambda kind: -outside[kind])[:3]
    text = (
        f"Outside our kernels: {sum(outside.values()):.0%} of our time on an {DRAWN} in a graph, above all "
        f"{', '.join(f'{kind} ({outside[kind]:.0%})' for kind in most)}."
    )
    return [*_table(head, cells), "", text]


def draw(rows: Sequence[Row]) -> Figure:
    """Times by kind over ours, two bars a row."""
    stated = [f"Predicted from peaks of an {DRAWN}, bfloat16, in a graph; nothing was measured."]
    made = figure(11, 1.6 + 0.7 * len(rows), "Predicted time, relative to the Triton kernels", stated)
    axes = made.subplots()
    ends = []
    for number, row in enumerate(rows):
        whole = seconds(row.items("ours"), PEAKS[DRAWN])
        for place, side in enumerate(SIDES):
            left, y = 0.0, number + 0.4 * place - 0.2
            for index, kind in enumerate(KINDS):
                width = seconds(row.items(side, kind), PEAKS[DRAWN]) / whole
                axes.barh(
                    y, width, 0.36, left, color=COLOURS[index % len(COLOURS)], edgecolor="white", linewidth=0.4,
                    hatch=HATCHES[index // len(COLOURS) * 3], label=kind if number == place == 0 else None,
                )  # fmt: skip
                left += width
            axes.text(left, y, f" {side}, {1e3 * whole * left:.2f} ms", va="center", fontsize=8)
            ends.append(left)
    axes.set_yticks(range(len(rows)), [f"{one.network}\n{one.passed}, {one.size}" for one in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(ends))
    axes.set_xlabel("time over that of ours")
    made.legend(loc="outside right upper", fontsize=8)
    return made


ASSUMED = f"""\
Each figure is two: by the Triton kernels / by the reference in plain PyTorch. Predicted time of an operation: its bytes
at the documented bandwidth or its multiplications and additions at the documented peak, whichever takes longer; of a
pass: the sum. In a CUDA graph launches cost nothing here; launched one by one each costs {1e6 * LAUNCH:.0f} us more.

- No GPU reaches its peaks: these are times below which it cannot be. A ratio holds as far as both sides come equally
  near to theirs; convolutions of few channels stay far away.
- Every operation reads its tensors from memory and writes its results there; what a cache still holds is not counted,
  neither for ours nor for the reference. Of our kernels, tensors that are read twice count twice, and gradients of the
  two ops with what [the model of the caches](triton_traffic.md) allows at the most; PyTorch's own norm counts as if it
  read once.
- Convolutions, which are cuDNN's in both: one read of each input, one write, no conversion of layouts, in float32 by
  tf32; the bias is added by an operation of its own. Other products of the reference in float32 go without tf32, as
  PyTorch has it by default; those of our op 2 are three of tf32.
- Operations are those that PyTorch dispatches for a processor, which for a GPU differ here and there.
- A training step: forward under autocast, loss, backward, clipping, AdamW; residual maps are ready-made.
"""


def page(rows: Sequence[Row], command: str, picture: str | None) -> str:
    today = datetime.datetime.now(datetime.UTC).date()
    lines = [
        "# Predicted times on GPUs", "", f"torch {torch.__version__}, {today}; `{command}`; no GPU was there.", "",
        ASSUMED, *_overview(rows), "",
        "No time that was measured on a GPU is in this repository to hold these against.",
    ]  # fmt: skip
    if picture is not None:
        lines += ["", f"![Predicted times by kind of operation, of ours and of plain PyTorch]({picture})"]
    for row in rows:
        if row.dtype == DETAILED:
            lines += ["", f"## {row.label}", "", *_detail(row)]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="page; the picture lies beside it")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for network in networks():
        for row in rows_of(network, (torch.float32, torch.bfloat16)):
            rows.append(row)
            print(f"{row.label}: counted", flush=True)
    if options.output is None:
        print(page(rows, "python -m benchmarks.roofline", None))
        return
    command = f"python -m benchmarks.roofline -o {options.output.as_posix()}"
    picture = options.output.with_suffix(".png")
    made: Any = draw([row for row in rows if row.dtype == DETAILED])
    with replace_when_done(picture, options.output) as (drawn, written):
        made.savefig(drawn, format="png", dpi=120)
        written.write_text(page(rows, command, picture.name))


if __name__ == "__main__":
    main()
