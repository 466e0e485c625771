"""Crops a second of a training's data, and the share of its steps in time: ``python -m benchmarks.training -o REPORT``.

The cases are synthetic subjects with the residual maps of the packaged autoencoder, as ``grcsf-fast train`` makes them;
pool, crops and changes are the training's own. Measured once the pool is full, in turns, each over as many replaced
cases: as it was before there were workers (cases made between two steps, by all threads), then with 0, 1 and 2 workers.
Without a network all is data; with it, the loop waits for a case only where the workers are slower than the steps. Run
nothing beside it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from unittest import mock

import numpy as np
import torch
from torch import nn

from benchmarks.machine import processor
from grcsf_fast.cli.train import NETWORK_DEFAULTS
from grcsf_fast.data.files import replace_when_done
from grcsf_fast.networks.grcsf import GRCSF
from grcsf_fast.pretrained.bundle import load_bundle
from grcsf_fast.runtime.versions import versions
from grcsf_fast.training import workers as case_workers
from grcsf_fast.training.augmentation import augmentation
from grcsf_fast.training.cases import WithMaps, case_cache
from grcsf_fast.training.losses import GRCSFLoss
from grcsf_fast.training.sampling import sample_crops
from grcsf_fast.training.settings import TrainingRun, TrainSettings
from grcsf_fast.training.synthetic import ACCURACY_TEST_SEEDS, SyntheticSource, drawing_spacings

__all__ = ["Times", "measure"]

POOL = 4  # cases; that it is small changes no time
SLICES, CROWDED = 32, 0.5  # as of the command train


@dataclass
class Times:
    """Seconds of all measured steps.

    Attributes:
        cases: waiting for cases to be in memory.
        crops: cutting and changing crops.
        steps: forward, backward and the optimiser.
        count: of crops.
    """

    cases: float = 0.0
    crops: float = 0.0
    steps: float = 0.0
    count: int = 0

    @property
    def crops_per_second(self) -> float:
        return self.count / (self.cases + self.crops)

    @property
    def share(self) -> float:
        """Of the steps in all."""
        return self.steps / (self.cases + self.crops + self.steps)


def measure(replaced: int, replace_every: int, workers: int, step: Callable[..., None] | None) -> Times:
    """Times of the steps during which so many cases are replaced, one every ``replace_every`` steps."""
    bundle = load_bundle("demo")
    total = (replaced + 2) * replace_every
    settings = TrainSettings(steps=total, cache_size=POOL, replace_every=replace_every, augment="flips")
    run = TrainingRun(
        Path(), settings, bundle.preprocessing, bundle.residual_maps, torch.device("cpu"), workers=workers
    )
    source = SyntheticSource(
        bundle.preprocessing, ACCURACY_TEST_SEEDS, slices=SLICES, crowded=CROWDED,
        drawn_at=drawing_spacings(bundle.preprocessing.spacing[0]),
    )  # fmt: skip
    finish = WithMaps(bundle.mae, asdict(bundle.residual_maps), run.device)
    augment = augmentation(2, settings.augment)
    times = Times()
    with closing(case_cache(source, run, finish)) as pool:
        for number in range(total - replace_every):
            # The first cases are made by workers beside the filling of the pool.
            counts = number > replace_every
            rng = np.random.default_rng([0, number])
            began = perf_counter()
            cases = pool.at(number)
            held = perf_counter()
            batch = sample_crops(cases, settings.batch_size, settings.crop_size, settings.lesion_fraction, rng)
            batch = augment(batch, int(rng.integers(2**31)))
            cut = perf_counter()
            if step is not None:
                step(batch)
            if counts:
                times.cases += held - began
                times.crops += cut - held
                times.steps += perf_counter() - cut
                times.count += settings.batch_size
    return times


def stepper() -> Callable[..., None]:
    """A step of the network that ``grcsf-fast train`` begins with."""
    torch.manual_seed(0)
    network = GRCSF(2, 1, 1, **{**NETWORK_DEFAULTS, "neighbours": 0})  # of slices without their neighbours
    optimizer = torch.optim.AdamW(network.parameters())
    criterion = GRCSFLoss(patch_size=network.config["patch_size"])

    def step(batch: dict[str, torch.Tensor]) -> None:
        loss = criterion(network(batch["image"], batch["residual_maps"], return_maps=True), batch["lesion"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()

    return step


def rows(replaced: int, replace_every: int, counts: list[int]) -> Iterator[str]:
    yield (
        "| cases made by | data alone, crops/s | times as many | beside steps: waiting for cases, per step "
        "| crops, per step | share of the steps |"
    )
    yield "|---|---:|---:|---:|---:|---:|"
    first = None
    for workers in (None, *counts):
        name = f"{workers} workers" if workers is not None else "the training, as before"
        threads = mock.patch.object(case_workers, "one_thread", nullcontext) if workers is None else nullcontext()
        with threads:
            data = measure(replaced, replace_every, workers or 0, None)
            beside = measure(replaced, replace_every, workers or 0, stepper())
        first = first or data.crops_per_second
        steps = beside.count / TrainSettings().batch_size
        yield (
            f"| {name} | {data.crops_per_second:.0f} | {data.crops_per_second / first:.1f} | "
            f"{1000 * beside.cases / steps:.0f} ms | {1000 * beside.crops / steps:.0f} ms | {beside.share:.0%} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="report in Markdown")
    parser.add_argument("--cases", type=int, default=12, help="cases replaced in each measurement")
    parser.add_argument("--every", type=int, default=20, help="steps between two replacements")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    load, cores = os.getloadavg()[0], os.cpu_count()
    lines = []
    for line in rows(options.cases, options.every, options.workers):
        print(line, flush=True)
        lines.append(line)
    about = (
        f"{processor()}, {cores} cores, {torch.get_num_threads()} threads of the steps; load {load:.1f} before it; "
        f"{', '.join(f'{name} {version}' for name, version in versions().items())}; {datetime.date.today()}. "
        f"Batches of 8 crops, a case replaced every {options.every} steps, {options.cases} of them measured."
    )
    print(about)
    if options.output:
        command = f"`python -m benchmarks.training {' '.join(sys.argv[1:])}`"
        with replace_when_done(options.output) as (part,):
            part.write_text("\n".join(["# Data of a training", "", *lines, "", about, "", command, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
