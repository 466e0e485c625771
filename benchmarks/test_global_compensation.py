"""Op 1: the compensation of one scale, against plain PyTorch, its cosine similarity, and both compiled."""

from benchmarks.contest import Contest
from benchmarks.ops import SHAPES, op_contest
from benchmarks.peers import OPS
from benchmarks.plan import Plan

SMALL = (2, 16, (24, 40))
ONE_CALL = (1, 1, (2, 2))  # next to nothing to do: the fixed cost of a call
VOLUME = (1, *SHAPES[4][1:])


def contests(plan: Plan) -> list[Contest]:
    forward = plan.choose([SMALL], [SHAPES[2]], [SHAPES[0], SHAPES[2], VOLUME, ONE_CALL])
    both = plan.choose([SMALL, (1, 8, (8, 12, 16))], [SHAPES[2]], [SHAPES[2], SHAPES[5]])
    lowered_forward = plan.choose([SMALL], [SHAPES[2]], [SHAPES[0]])
    lowered_both = plan.choose([SMALL], [SHAPES[2]], [SHAPES[2]])
    # Compiling takes most of the suite's minutes, so not everything is compiled.
    lowered_compiled, both_compiled = plan.mode != "check", plan.mode == "full"
    return [
        # Next to no work is dispatch, and that is warm.
        *(op_contest(OPS[0], shape, "float32", False, plan, cold=shape != ONE_CALL) for shape in forward),
        *(op_contest(OPS[0], shape, "float32", True, plan, both_compiled) for shape in both),
        *(op_contest(OPS[0], shape, "bfloat16", False, plan, lowered_compiled) for shape in lowered_forward),
        *(op_contest(OPS[0], shape, "bfloat16", True, plan, both_compiled) for shape in lowered_both),
    ]


def test_op1(compete):
    compete()
