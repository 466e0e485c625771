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
from pathlib import Path

import torch

from benchmarks.accuracy.cases import MORE, Size, case_path, draw_case, maps_path
from benchmarks.accuracy.picture import draw
from benchmarks.accuracy.runs import Run, in_processes, is_done, load_runs, store, wanted
from benchmarks.accuracy.tables import Results, page
from benchmarks.accuracy.train import run
from benchmarks.accuracy.variants import SETTINGS, VARIANTS
from benchmarks.machine import processor
from grcsf_fast.data.files import replace_when_done
from grcsf_fast.pretrained.bundle import load_bundle
from grcsf_fast.runtime.versions import versions

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
    # What the processes are called with.
    parser.add_argument("--draw", nargs=2, type=int, metavar=("FIRST", "EVERY"), help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=3, metavar=("SETTING", "VARIANT", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def report(folder: Path, mae: str, target: Path | None, about: str) -> None:
    """Print the tables; with a target write them, the runs as JSON and the picture."""
    runs = load_runs(folder, mae)
    if not runs:
        return
    results = Results(runs)
    text = f"{about}\n\n{page(results)}\n"
    print(text)
    if target is None:
        return
    picture, data = target.with_suffix(".png"), target.with_suffix(".json")
    with replace_when_done(target, picture, data) as (part, drawn, written):
        part.write_text(text + f"\n![Dice against seconds a volume]({picture.name})\n")
        draw(results, drawn)
        written.write_text(json.dumps(runs, indent=1) + "\n")


def main() -> int:
    options = _options()
    bundle = load_bundle(options.mae)
    size = QUICK if options.quick else Size()
    size = replace(size, steps=options.steps or size.steps)
    mae = bundle.weights_sha256[:8]
    # Runs of another size are not mixed in; those with another autoencoder's maps are files of other names.
    folder = options.output / f"{size.steps}_steps_{size.train}_{size.test}_subjects"
    subjects = [(name, index) for name, count in size.subjects().items() for index in range(count)]
    if options.draw or options.run:
        torch.set_num_threads(1)
    if options.draw:
        first, every = options.draw
        for name, index in subjects[first::every]:
            draw_case(folder, name, index, size.subjects()[name], bundle)
        return 0
    if options.run:
        one = Run(options.run[0], options.run[1], int(options.run[2]))
        result = run(*one, folder, size, mae)
        store(folder, one, mae, result | {"versions": versions()})
        means = ", ".join(f"{test} {sum(values) / len(values):.3f}" for test, values in result["dice"].items())
        print(f"{one.setting}, {one.variant}, seed {one.seed}: mean Dice {means}", flush=True)
        return 0

    variants = options.variants or (QUICK_VARIANTS if options.quick else tuple(VARIANTS))
    settings = options.settings or tuple(SETTINGS)[: 1 if options.quick else None]
    runs = wanted(variants, settings, options.seeds or (1 if options.quick else None))
    missing = [one for one in runs if not is_done(folder, one, mae)]
    undrawn = [
        one for one in subjects
        if not case_path(folder, *one).is_file() or (one[0] != MORE and not maps_path(folder, *one, mae).is_file())
    ]  # fmt: skip
    print(f"{folder}: {len(undrawn)} of {len(subjects)} subjects and {len(missing)} of {len(runs)} runs are missing")
    if options.list:
        for one in missing:
            print(f"{one.setting}, {one.variant}, seed {one.seed}")
        return 0
    same = ["--mae", options.mae, "--output", str(options.output.absolute()), "--steps", str(size.steps)]
    same += ["--quick"] if options.quick else []
    if undrawn and in_processes(
        [[*same, "--draw", str(k), str(options.jobs)] for k in range(options.jobs)], options.jobs
    ):
        print("some subjects could not be drawn; the same command goes on", file=sys.stderr)
        return 1
    failed = in_processes([[*same, "--run", *map(str, one)] for one in missing], options.jobs)
    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    report(
        folder, mae, options.report, f"{datetime.date.today()}, {processor()}, one thread a run; maps of the bundle "
        f"{mae}; {about}. Synthetic subjects: the figures say nothing of patients.",
    )  # fmt: skip
    for number in failed:
        print(f"failed: {', '.join(map(str, missing[number]))}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
