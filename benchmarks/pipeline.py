"""Whole runs over a folder of volumes, from files to written files: ``python -m benchmarks.pipeline -o REPORT``.

The plain path (benchmarks/plain.py) and `grcsf-fast predict` in float32, in bfloat16 where the processor multiplies
it, and by `--precision auto`, each a process of its own with the same number of threads, in turns; all write masks,
residual maps, pictures and reports. The volumes are synthetic subjects of 197x233x189 voxels or more. Then peak
memory of 4, 8 and 40 of the largest of them, and of one volume of 1024x1024x600 voxels of 0.25 mm; and what a process
that keeps one core busy costs a folder, a single volume and a training. Run nothing beside it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import processor
from grcsf_fast import Predictor, residual_maps, use_backend
from grcsf_fast.data.files import replace_when_done
from grcsf_fast.inference.record import STAGES
from grcsf_fast.networks.fast_layers import FastConvolution
from grcsf_fast.pretrained.bundle import load_bundle
from grcsf_fast.runtime.control_groups import usable_cores
from grcsf_fast.runtime.precision import multiplies_bfloat16
from grcsf_fast.runtime.versions import versions
from grcsf_fast.synthesis.subjects import synthesize_subject
from grcsf_fast.synthesis.template import load_template

DEMO_SEED, FIRST_SEED = 3_000_008, 4_100_000
PLAIN = "plain path"
PARTS = ("floor", "speed", "flat", "large", "neighbour")


@dataclass
class Run:
    """One process: seconds from its start to its end and of processors, peak memory in bytes, seconds a stage over all
    volumes."""

    seconds: float
    processor: float
    peak: int
    stages: dict[str, float]


def volumes(folder: Path, number: int) -> Path:
    """Synthetic subjects, drawn once; the first is that of `make demo`, in which lesions are found."""
    folder.mkdir(parents=True, exist_ok=True)
    template = None
    for seed in (DEMO_SEED, *range(FIRST_SEED, FIRST_SEED + number - 1)):
        path = folder / f"subject_{seed}.nii.gz"
        if path.exists():
            continue
        template = template or load_template(1.0)
        likely = {"skull": False, "contrast": "template"} if seed == DEMO_SEED else {}
        subject = synthesize_subject(template, seed, **likely)
        with replace_when_done(path) as (part,):
            nib.save(nib.Nifti1Image(subject.image.numpy(), subject.affine), part)
    return folder


def links(images: Path, folder: Path, number: int) -> Path:
    """A folder of ``number`` links to the volumes, each its own case."""
    folder.mkdir()
    files = sorted(images.iterdir())
    for index in range(number):
        (folder / f"case_{index:03d}.nii.gz").symlink_to(files[index % len(files)].resolve())
    return folder


def run(command: list[str], threads: int, **environment: str) -> Run:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | environment
    before = _ended_processor_seconds()
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, env=environment, text=True
        )
        # Asked for while it runs: what the system reports at the end includes the parent from before it became this.
        peak, state = 0, Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            with suppress(OSError, StopIteration):
                lines = state.read_text().splitlines()
                peak = max(peak, 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))))
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text[-4000:]}")
    stages = json.loads(text.splitlines()[-1]) if "benchmarks.plain" in command else {}
    return Run(seconds, _ended_processor_seconds() - before, peak, stages)


def _ended_processor_seconds() -> float:
    """Of all processes that this one has started and seen end."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def predict(images: Path, output: Path, threads: int, *options: str, **environment: str) -> Run:
    command = ["-m", "grcsf_fast", "predict", "-i", str(images), "-o", str(output), *options]
    found = run(command, threads, **environment)
    if (output / "summary.csv").exists():
        with (output / "summary.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        found.stages = {stage: sum(float(row[stage]) for row in rows) for stage in STAGES}
    return found


def train(output: Path, threads: int, **environment: str) -> Run:
    """A short training on one synthetic subject."""
    command = ["-m", "grcsf_fast", "train", "-o", str(output), "--mae", "demo", "--steps", "40", "--warmup-steps", "10"]
    few = ["--validation", "0", "--cache-size", "1", "--replace-every", "0", "--workers", "0"]
    return run([*command, *few], threads, **environment)


def dice(folder: Path, other: Path) -> list[float]:
    """Of the masks of two runs, case by case; 1 where both are empty."""
    found = []
    for report in sorted(folder.glob("*_report.json")):
        name = report.name.replace("_report.json", ".nii.gz")
        one, two = (np.asarray(nib.load(place / name).dataobj) > 0 for place in (folder, other))
        total = int(one.sum()) + int(two.sum())
        found.append(2 * int((one & two).sum()) / total if total else 1.0)
    return found


def total_ml(folder: Path) -> list[float]:
    return [json.loads(path.read_text())["total_volume_ml"] for path in sorted(folder.glob("*_report.json"))]


def speed(images: Path, work: Path, number: int, rounds: int, threads: int) -> list[str]:
    auto = Predictor.from_pretrained("demo", "cpu").precision
    by_auto = f"predict, auto ({auto})"
    sample = links(images, work / "sample", number)
    contestants = {PLAIN: None, "predict, float32": "float32"}
    if multiplies_bfloat16(torch.device("cpu")):
        contestants["predict, bfloat16"] = "bfloat16"
    contestants[by_auto] = "auto"
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, precision in contestants.items():
            output = work / name.replace(" ", "_")
            shutil.rmtree(output, ignore_errors=True)
            if precision is None:
                found = run(["-m", "benchmarks.plain", str(sample), str(output)], threads)
            else:
                found = predict(sample, output, threads, "--precision", precision)
            runs[name].append(found)
            print(f"{name}: {found.seconds:.1f} s", flush=True)
    plain = work / PLAIN.replace(" ", "_")
    median = {name: statistics.median(one.seconds for one in found) for name, found in runs.items()}
    lines = [
        f"## {number} volumes, whole processes, {threads} threads, {rounds} rounds in turns", "",
        "| run | s (median; all rounds) | volumes a minute | ratio | peak GiB | Dice to the plain path, least (mean) "
        "| total volume, largest difference |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, found in runs.items():
        folder = work / name.replace(" ", "_")
        agreement = dice(plain, folder)
        apart = max(abs(a - b) for a, b in zip(total_ml(plain), total_ml(folder), strict=True))
        cells = (
            name, f"{median[name]:.1f} ({', '.join(f'{one.seconds:.1f}' for one in found)})",
            f"{60 * number / median[name]:.1f}", f"{median[PLAIN] / median[name]:.2f}",
            f"{max(one.peak for one in found) / 2**30:.2f}",
            f"{min(agreement):.5f} ({statistics.mean(agreement):.5f})", f"{apart:.3f} mL",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    better = min(seconds for name, seconds in median.items() if name not in (PLAIN, by_auto))
    lines += [
        "", f"`--precision auto` took {median[by_auto] / better:.3f} times what the better precision took, by name.",
        "", "Where the time went: seconds a volume, median over the rounds. In `predict` two lanes work side by side, "
        "so a volume takes half of their sum.", "",
        f"| run | {' | '.join(STAGES)} | sum |", "|---" * (len(STAGES) + 2) + "|",
    ]  # fmt: skip
    for name, found in runs.items():
        parts = [statistics.median(one.stages[stage] for one in found) / number for stage in STAGES]
        lines.append(f"| {name} | {' | '.join(f'{part:.2f}' for part in parts)} | {sum(parts):.2f} |")
    return lines


def flat_memory(images: Path, work: Path, threads: int) -> list[str]:
    # Of one size: a run takes the largest of a folder first, so few volumes of several sizes are fewer large ones.
    peaks, one = {}, work / "largest"
    one.mkdir()
    largest = max(images.iterdir(), key=lambda path: path.stat().st_size)
    (one / largest.name).symlink_to(largest.resolve())
    # Four volumes do not fill two lanes of two.
    for number in (4, 8, 40):
        sample = links(one, work / f"sample{number}", number)
        peaks[number] = predict(sample, work / f"memory{number}", threads).peak
        print(f"{number} volumes: {peaks[number] / 2**30:.2f} GiB", flush=True)
    return [
        "", "## Memory", "",
        f"Peak of 4 volumes {peaks[4] / 2**30:.2f} GiB, of 8 volumes {peaks[8] / 2**30:.2f} GiB, of 40 volumes "
        f"{peaks[40] / 2**30:.2f} GiB: {peaks[40] / peaks[4]:.3f} and {peaks[40] / peaks[8]:.3f} times.",
    ]  # fmt: skip


def large_volume(work: Path, threads: int) -> list[str]:
    """A head of 256 x 256 x 150 mm in voxels of 0.25 mm, int16."""
    template = load_template(1.0)
    subject = synthesize_subject(template, FIRST_SEED + 99, skull=False).image.numpy()
    subject = np.clip(subject / subject.max() * 1000, 0, 1000).astype(np.int16)
    head = np.zeros((256, 256, 150), np.int16)
    inner = subject[:, :233, 20:170]
    head[29 : 29 + inner.shape[0], 11 : 11 + inner.shape[1]] = inner
    folder = work / "large"
    folder.mkdir()
    path = folder / "large.nii"
    fine = np.repeat(np.repeat(np.repeat(head, 4, 0), 4, 1), 4, 2)
    nib.save(nib.Nifti1Image(fine, np.diag([0.25, 0.25, 0.25, 1.0])), path)
    own = fine.nbytes
    del fine, head
    small = volumes(work / "one", 1)
    base = predict(links(small, work / "base_in", 1), work / "base", threads).peak
    found = predict(folder, work / "large_out", threads)
    shutil.rmtree(folder)
    print(f"large volume: {found.peak / 2**30:.2f} GiB, {found.seconds:.0f} s", flush=True)
    return [
        "", f"One volume of 1024x1024x600 voxels of 0.25 mm (int16, {own / 2**30:.2f} GiB): peak "
        f"{found.peak / 2**30:.2f} GiB, {(found.peak - own) / 2**30:.2f} GiB above the volume's own size, "
        f"{found.seconds:.0f} s. The program with one volume of 197x233x189 takes {base / 2**30:.2f} GiB.",
    ]  # fmt: skip


@contextmanager
def busy_neighbour() -> Iterator[list[float]]:
    """A process that never waits, kept on one core; at the end the list has its seconds of that core."""
    core = max(os.sched_getaffinity(0))
    # It ends by itself when this one was killed.
    code = f"import os; os.sched_setaffinity(0, [{core}])\nwhile os.getppid() == {os.getpid()}: sum(range(100_000))"
    process = subprocess.Popen([sys.executable, "-c", code])
    seconds: list[float] = []
    before = _ended_processor_seconds()
    try:
        yield seconds
    finally:
        process.kill()
        own = _ended_processor_seconds() - before
        process.wait()
        seconds.append(_ended_processor_seconds() - before - own)


def beside_a_neighbour(images: Path, work: Path, number: int, rounds: int, threads: int) -> list[str]:
    """A folder, in lanes, and one volume and a training, with all threads in every operation; alone and beside a busy
    process.

    Given the neighbour's share of the cores, no program can lose less than that; what it loses more, it waits.
    """
    sample = links(images, work / "sample_neighbour", number)
    one = links(images, work / "one_neighbour", 1) / "case_000.nii.gz"
    # How long a thread spins at a barrier before it sleeps: not at all; and for some microseconds.
    ways = {"": {}, ", OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
            ", GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"}}  # fmt: skip
    contestants: dict[str, tuple[Callable[..., Run], int, dict[str, str]]] = {}
    for name, program, several in (
        (f"folder of {number}", partial(predict, sample), {"": {}}),
        ("one volume", partial(predict, one), ways),
        ("training of 40 steps", train, ways),
    ):
        contestants |= {name + way: (program, threads, environment) for way, environment in several.items()}
        contestants[f"{name}, one thread"] = (program, 1, {})
    found: dict[tuple[str, bool], list[Run]] = {(name, beside): [] for name in contestants for beside in (False, True)}
    shares: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for (name, beside), runs in found.items():
            program, own, environment = contestants[name]
            output = work / "neighbour"
            shutil.rmtree(output, ignore_errors=True)
            with busy_neighbour() if beside else nullcontext([]) as taken:
                runs.append(program(output, own, **environment))
            if beside:
                shares[name].append(taken[0] / runs[-1].seconds)
            print(f"{name}{', beside' if beside else ''}: {runs[-1].seconds:.1f} s", flush=True)
    lines = [
        "", f"## Beside a process that keeps one core busy, {threads} threads, {rounds} rounds in turns", "",
        "Seconds from start to end and, in brackets, of processors; medians. Its share is what the neighbour had of "
        "its core; the last column what a program would take that lost this share of all cores and nothing else.", "",
        "| run | alone | beside | times | its share | times by its share |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, (_, own, _) in contestants.items():
        alone, beside = (statistics.median(run.seconds for run in found[name, one]) for one in (False, True))
        cost = [statistics.median(run.processor for run in found[name, one]) for one in (False, True)]
        share, cores = statistics.median(shares[name]), usable_cores()
        least = max(1.0, min(own, cores) / (cores - share))
        lines.append(
            f"| {name} | {alone:.1f} ({cost[0]:.1f}) | {beside:.1f} ({cost[1]:.1f}) | {beside / alone:.2f} "
            f"| {share:.2f} | {least:.2f} |"
        )
    return lines


def floors(threads: int) -> list[str]:
    """Least seconds a volume: multiplications of the demo bundle's networks at the rate of a large product."""
    torch.set_num_threads(threads)
    bundle = load_bundle("demo")
    slices, views = 80, len(bundle.tta_scales) * (1 + bundle.tta_flip)
    image, maps = torch.randn(1, 1, 96, 96), torch.rand(1, 2, 96, 96)
    work = []
    # The kernels are none of the operations that are counted.
    with torch.no_grad(), use_backend("reference"):
        for run in (lambda: bundle.network(image, maps), lambda: residual_maps(image, bundle.mae)):
            with FlopCounterMode(display=False) as counter:
                run()
            work.append(counter.get_total_flops() / 2e9)
    frozen = bundle.network.optimized_for_inference(fused=True)
    transformed = []
    for module in frozen.modules():
        if isinstance(module, FastConvolution):
            module.register_forward_hook(
                lambda layer, _, out: transformed.append(9 * layer.in_channels * out.numel() / 1e9)
            )
    with torch.no_grad(), use_backend("cpp"):
        frozen(image, maps)
    wide, rest = views * slices * sum(transformed), slices * (views * (work[0] - sum(transformed)) + work[1])
    lines = [
        "## Floor", "",
        f"A slice of 96x96 takes {work[0]:.2f} GMAC in the network, {sum(transformed):.2f} of them in convolutions "
        f"that transformed weights bring down to a quarter, always in float32, and {work[1]:.2f} GMAC in the "
        f"autoencoder's passes; {views} views of {slices} slices: {wide:.0f} / 4 + {rest:.0f} GMAC.", "",
    ]  # fmt: skip
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        times = []
        for _ in range(60):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        rates[dtype] = 2048**3 / min(times) / 1e9
        seconds = wide / 4 / rates[torch.float32] + rest / rates[dtype]
        name = str(dtype).removeprefix("torch.")
        lines.append(
            f"- {name}: a product of 2048 runs at up to {rates[dtype]:.0f} GMAC a second, so at least {seconds:.2f} s."
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="Markdown report")
    parser.add_argument("-n", "--number", type=int, default=8, help="volumes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--images", type=Path, default=Path("runs/pipeline"), help="kept from run to run")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    images = volumes(options.images, options.number)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    what = " ".join(options.only) + (f" -n {options.number}" if options.number != parser.get_default("number") else "")
    lines = [
        "# Whole runs over folders", "",
        f"`python -m benchmarks.pipeline --only {what}`, {datetime.date.today()}; {processor()}, "
        f"{os.cpu_count()} cores; {packages}.", "",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if "floor" in options.only:
            lines += floors(options.threads)
        if "speed" in options.only:
            lines += speed(images, work, options.number, options.rounds, options.threads)
        if "flat" in options.only:
            lines += flat_memory(images, work, options.threads)
        if "large" in options.only:
            lines += large_volume(work, options.threads)
        if "neighbour" in options.only:
            lines += beside_a_neighbour(images, work, options.number, options.rounds, options.threads)
    print("\n".join(lines))
    if options.output is not None:
        with replace_when_done(options.output) as (part,):
            part.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
