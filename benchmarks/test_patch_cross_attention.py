"""Op 2: patch cross-attention, against plain PyTorch, SDPA, both compiled, and FlexAttention (forward only on a CPU).

Patches divide the image, so 28 becomes 32. The volume's backward takes one image, and the largest volume is left out:
what eager PyTorch keeps of it does not fit into 24 GiB.
"""

import functools
from typing import Any

import torch

from benchmarks.contest import Contest, Contestant
from benchmarks.ops import (
    TOLERANCES,
    arguments_of,
    exact_results,
    make_inputs,
    on_backend,
    op_contest,
    shape_name,
    steps_of,
)
from benchmarks.peers import OPS
from benchmarks.plan import Plan
from grcsf_fast import reference, use_backend
from grcsf_fast.functional import patch_cross_attention

SMALL = (2, 32, (16, 24))
LARGE, MIDDLE = (8, 32, (224, 224)), (8, 128, (56, 56))
DEEP, VOLUME = (8, 256, (32, 32)), (2, 64, (48, 48, 48))
FEWER_LARGE, ONE_VOLUME = (2, *LARGE[1:]), (1, *VOLUME[1:])
THRESHOLD, PASSING = 0.5, 0.05


def sparse_contest(shape: Any, plan: Plan) -> Contest:
    """Scores shifted so that one patch in twenty passes the threshold, as in an image with a lesion."""
    channels, spatial = shape[1:]
    settings = {"patch_size": 8}
    kept = f"{plan.backend}, threshold"
    ours = on_backend(OPS[1], plan.backend)

    def entries() -> dict[str, Contestant]:
        inputs = {
            name: tensor.to(plan.device)
            for name, tensor in make_inputs(OPS[1], shape[0], channels, spatial, torch.float32).items()
        }
        with torch.no_grad(), use_backend(plan.backend):
            score = patch_cross_attention(*arguments_of(inputs), **settings)[1].flatten()
            # Between two scores, so that rounding moves no patch over the threshold.
            last = int((1 - PASSING) * score.numel())
            inputs["score_bias"] -= score.sort().values[last : last + 2].logit().mean()
        runs = {plan.backend: (ours, {}), kept: (ours, {"threshold": THRESHOLD}),
                "reference": (reference.patch_cross_attention, {"threshold": THRESHOLD})}  # fmt: skip
        exact = {
            bool(more): functools.partial(exact_results, OPS[1], inputs, settings | more, False)
            for _, more in runs.values()
        }
        return {
            name: Contestant(
                functools.partial(steps_of, run, inputs, settings | more, False), exact[bool(more)],
                TOLERANCES["float32"], ours=run is ours,
            )
            for name, (run, more) in runs.items()
        }  # fmt: skip

    return Contest(
        what="op 2, 5 % of patches kept",
        shape=shape_name(shape),
        dtype="float32",
        passes=("forward",),
        names=(plan.backend, kept, "reference"),
        entries=entries,
        reference="reference",
        threads=plan.threads,
        device=plan.device,
    )


def contests(plan: Plan) -> list[Contest]:
    forward = plan.choose([SMALL], [MIDDLE], [LARGE, DEEP, VOLUME])
    both = plan.choose([SMALL, (1, 8, (4, 8, 8))], [MIDDLE], [MIDDLE, ONE_VOLUME])
    lowered = plan.choose([SMALL], [], [MIDDLE])
    compiled = plan.mode == "full"  # as for op 1, beside forwards
    return [
        *(op_contest(OPS[1], shape, "float32", False, plan) for shape in forward),
        *(op_contest(OPS[1], shape, "float32", True, plan, compiled and shape == both[0]) for shape in both),
        *(op_contest(OPS[1], shape, "bfloat16", False, plan, compiled) for shape in lowered),
        *(op_contest(OPS[1], shape, "bfloat16", True, plan, False) for shape in lowered),
        *(sparse_contest(shape, plan) for shape in plan.choose([(2, 32, (64, 64))], [], [FEWER_LARGE])),
    ]


def test_op2(compete):
    compete()
