"""How the cost of a forward and of a volume grows with image side, batch, channels, patch size, threads and slices.

Each point is a group of its own with our kernels and the reference; ``benchmarks.report`` fits the exponents.
"""

import functools
from typing import Any

import torch

from benchmarks.contest import Contest
from benchmarks.nets import Variant, grcsf, network_contest
from benchmarks.plan import Plan
from benchmarks.test_pipeline import pipeline_contest

FEATURES = torch.tensor((32, 64, 128, 256, 512))
SIDES = (64, 128, 256, 512)
BATCHES = (1, 2, 8)
FIRST_CHANNELS = (8, 16, 32, 64)
PATCHES = (4, 8, 16)
SLICES = (24,)  # of 189, whose point is the pipeline's group


def point(
    axis: str, value: int, plan: Plan, batch: int = 1, side: int = 96, threads: int | None = None, **more: Any
) -> Contest:
    build = functools.partial(grcsf, **more)
    variants = {plan.backend: Variant(build, plan.backend, ours=True), "reference": Variant(build, "reference")}
    return network_contest(
        variants, "forward", "float32", batch, side, plan,
        what=f"scaling with {axis} {value}", scaling=(axis, value), threads=threads or plan.threads, work=None,
    )  # fmt: skip


def contests(plan: Plan) -> list[Contest]:
    if plan.mode == "check":
        return [point("channels", 8, plan, side=32, features=(8, 16, 32, 64, 128))]

    def some(values: tuple[int, ...]) -> tuple[int, ...]:
        return plan.choose((), values[:2], values)

    counts = [2**power for power in range(plan.threads.bit_length())] if plan.device == "cpu" else []
    return [
        *(point("image side", side, plan, side=side) for side in some(SIDES)),
        *(point("batch", batch, plan, batch=batch) for batch in some(BATCHES)),
        *(
            point("channels", first, plan, side=128, features=(FEATURES * first // 32).tolist())
            for first in some(FIRST_CHANNELS)
        ),
        *(point("patch size", patch, plan, side=128, patch_size=patch) for patch in some(PATCHES)),
        *(point("threads", threads, plan, side=224, threads=threads) for threads in counts),
        *(
            pipeline_contest(plan, (), slices, what=f"scaling with slices {slices}", scaling=("slices", slices))
            for slices in plan.choose((), (), SLICES)
        ),
    ]


def test_scaling(compete):
    compete()
