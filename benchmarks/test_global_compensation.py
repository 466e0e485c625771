"""Op 1: the compensation of one scale, against plain PyTorch, its cosine similarity, and both compiled."""

from benchmarks.contest import Contest
from benchmarks.ops import SHAPES, op_contest
from benchmarks.peers import OPS
from benchmarks.plan import Plan

SMALL = (2, 16, (24, 40))
ONE_CALL = (1, 1, (2, 2))  # next to nothing to do: the fixed cost of a call
VOLUME = (1, *SHAPES[4][1:])


def contests(plan: Plan) -> list[Contest]:
    forward = plan.choose([SMALL], [SHAPES[2]], [*SHAPES[:4], VOLUME, SHAPES[5], ONE_CALL])
    both = plan.choose([SMALL, (1, 8, (8, 12, 16))], [SHAPES[2]], [SHAPES[0], SHAPES[2], SHAPES[5]])
    lowered = plan.choose([SMALL], [SHAPES[2]], [SHAPES[0], SHAPES[5]])
    # Compiling a backward takes seconds and says nothing about the results that the forward does not.
    compiled = plan.mode != "check"
    return [
        *(op_contest(OPS[0], shape, "float32", False, plan) for shape in forward),
        *(op_contest(OPS[0], shape, "float32", True, plan, compiled) for shape in both),
        *(op_contest(OPS[0], shape, "bfloat16", False, plan, compiled) for shape in lowered),
        *(op_contest(OPS[0], shape, "bfloat16", True, plan, compiled) for shape in lowered),
    ]


def test_op1(compete):
    compete()
