"""The whole network, forward and training step, and the networks that a user would take instead at published sizes.

Ours takes residual maps that are there already; what they cost is in the autoencoder's and the pipeline's groups.
"""

import torch

from benchmarks.contest import Contest
from benchmarks.nets import Variant, grcsf, network_contest
from benchmarks.peers import NETWORKS
from benchmarks.plan import Plan
from grcsf_fast import GRCSF


def variants(plan: Plan) -> dict[str, Variant]:
    """Every contestant of the whole network; another one is another line."""

    def optimized(network: GRCSF) -> GRCSF:
        return network.optimized_for_inference(network.dtype, fused=True)

    frozen = Variant(grcsf, plan.backend, optimized, passes=("forward",), ours=True)
    return {
        plan.backend: Variant(grcsf, plan.backend, ours=True),
        **({"cpp, frozen": frozen} if plan.backend == "cpp" else {}),
        "reference": Variant(grcsf, "reference"),
        "compiled reference": Variant(
            grcsf, "reference", lambda network: torch.compile(network, dynamic=False), passes=("forward",)
        ),
        **{name: Variant(build) for name, build in NETWORKS.items()},
    }


def contests(plan: Plan) -> list[Contest]:
    every = variants(plan)
    eager = {name: variant for name, variant in every.items() if "compiled" not in name}
    # The peers are the same in every check; one of them is enough beside the forward.
    rest = plan.choose({name: one for name, one in eager.items() if name not in [*NETWORKS][1:]}, eager, eager)
    batch, side = plan.choose((1, 128), (1, 128), (2, 160))
    steps = ["float32", *plan.choose([], [], ["bfloat16"])]
    # Its gradients take longer than all else; the smaller one stands for it.
    trained = {name: variant for name, variant in rest.items() if name != "SwinUNETR 48"}
    return [
        network_contest(plan.choose(eager, eager, every), "forward", "float32", batch, side, plan),
        network_contest(rest, "forward", "bfloat16", batch, side, plan),
        *(network_contest(trained, "training step", dtype, batch, 128, plan) for dtype in steps),
    ]


def test_network(compete):
    compete()
