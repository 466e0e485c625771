"""What the units add: ``make accuracy``, or ``python -m benchmarks.accuracy``.

Draws the subjects, makes the runs that are missing, prints the tables. Whatever is stopped goes on where it was: a
subject and a run are a file each, which appears when it is whole. ``--list`` says what is missing and makes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cases import MORE, Size, case_path, maps_path
from benchmarks.accuracy.picture import draw
from benchmarks.accuracy.runs import in_processes, is_done, load_runs, wanted
from benchmarks.accuracy.tables import Results, page
from benchmarks.accuracy.times import measure
from benchmarks.accuracy.variants import SETTINGS, VARIANTS
from benchmarks.accuracy.work import draw_one, make_one
from benchmarks.machine import processor
from grcsf_fast.data.files import replace_when_done
from grcsf_fast.pretrained.bundle import Bundle, load_bundle

QUICK = Size(steps=60, train=4, test=4, more=0)
QUICK_VARIANTS = ("backbone", "GCU + RCU", "GCU + RCU, blank maps", "DynUNet")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mae", default="demo", help="bundle with the autoencoder (default: demo)")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, one thread each (default: 1)")
    parser.add_argument("--list", action="store_true", help="say what is missing")
    parser.add_argument("--quick", action="store_true", help="one seed of few variants, few steps and subjects")
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), help="these alone")
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), help="these alone")
    parser.add_argument("--seeds", type=int, help="for each variant (default: 5 for ours, 3 for the others)")
    parser.add_argument("--steps", type=int, help=f"of each run (default: {Size().steps})")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/accuracy"), help="default: runs/accuracy")
    parser.add_argument("--report", type=Path, help="Markdown file for the tables; JSON and picture lie beside it")
    parser.add_argument("--device", default="cpu", help="to train and test on (default: cpu); times are the CPU's")
    return parser.parse_args()


def report(folder: Path, size: Size, bundle: Bundle, target: Path | None) -> None:
    """Print the tables; with a target measure times, and write tables, runs as JSON and the picture."""
    mae = bundle.weights_sha256[:8]
    runs = load_runs(folder, mae)
    if not runs:
        return
    names = {one["variant"] for one in runs}
    times = measure([name for name in VARIANTS if name in names], folder, size, bundle) if target else {}
    results = Results(runs, times)
    text = f"{_about(runs, mae, bool(times))}\n\n{page(results)}\n"
    print(text)
    if target is None:
        return
    picture, data = target.with_suffix(".png"), target.with_suffix(".json")
    with replace_when_done(target, picture, data) as (part, drawn, written):
        part.write_text(text + f"\n![Dice against seconds a volume]({picture.name})\n")
        draw(results, drawn)
        lines = ",\n".join(map(json.dumps, runs))  # a run a line
        written.write_text(f'{{"times": {json.dumps(times)},\n"runs": [\n{lines}\n]}}\n')


def _about(runs: list[dict[str, Any]], mae: str, timed: bool) -> str:
    made: dict[str, int] = {}
    for one in runs:
        by = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        made[f"{one['machine']} ({by})"] = made.get(f"{one['machine']} ({by})", 0) + 1
    on = "; ".join(f"{count} runs on {where}" for where, count in made.items())
    times = f"; times: {processor()}, one thread" if timed else ""
    return (
        f"{datetime.date.today()}; maps of the bundle {mae}; {on}{times}. Synthetic subjects: the figures say nothing "
        "of patients."
    )


def main() -> int:
    options = _options()
    bundle = load_bundle(options.mae)
    size = QUICK if options.quick else Size()
    size = replace(size, steps=options.steps or size.steps)
    mae = bundle.weights_sha256[:8]
    # Runs of another size are not mixed in; those with another autoencoder's maps are files of other names.
    folder = options.output / f"{size.steps}_steps_{size.train}_{size.test}_subjects"
    variants = options.variants or (QUICK_VARIANTS if options.quick else tuple(VARIANTS))
    settings = options.settings or tuple(SETTINGS)[: 1 if options.quick else None]
    runs = wanted(variants, settings, options.seeds or (1 if options.quick else None))
    missing = [one for one in runs if not is_done(folder, one, mae)]
    subjects = [(name, index) for name, count in size.subjects().items() for index in range(count)]
    undrawn = [
        one for one in subjects
        if not case_path(folder, *one).is_file() or (one[0] != MORE and not maps_path(folder, *one, mae).is_file())
    ]  # fmt: skip
    print(f"{folder}: {len(undrawn)} of {len(subjects)} subjects and {len(missing)} of {len(runs)} runs are missing")
    if options.list:
        for one in missing:
            print(", ".join(map(str, one)))
        return 0
    if not missing:
        report(folder, size, bundle, options.report)
        return 0
    draw_it = partial(draw_one, size=size, mae=options.mae)
    if failed := in_processes(draw_it, [(folder, *one) for one in undrawn], options.jobs):
        for number, error in failed.items():
            print(f"subject {undrawn[number]}: {error}", file=sys.stderr)
        return 1
    make_it = partial(make_one, size=size, mae=mae, device=options.device)
    failed = in_processes(make_it, [(folder, one) for one in missing], options.jobs)
    report(folder, size, bundle, options.report)
    for number, error in failed.items():
        print(f"failed: {', '.join(map(str, missing[number]))}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
