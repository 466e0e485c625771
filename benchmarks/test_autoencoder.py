"""Residual maps of the masked autoencoder: all passes in one batch, against one pass after another."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Contest, Contestant
from benchmarks.plain import residual_map
from benchmarks.plan import Plan
from grcsf_fast import MaskedAutoencoder, residual_maps

RATIOS = (0.5, 0.75)
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
PLAIN = "plain path"
SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1}
# Of `train-mae`, and of the bundle that the first version shipped.
TRAINED = {
    "embed_dim": 128, "depth": 5, "num_heads": 4, "decoder_dim": 128, "decoder_depth": 2, "neighbours": 2,
    "restore": True,
}  # fmt: skip
FIRST = {"embed_dim": 192, "depth": 4, "num_heads": 6, "decoder_dim": 96, "decoder_depth": 1, "decoder": "self"}
OF_THE_FIRST = "those of version 0.1"


def plain_maps(image: Tensor, mae: MaskedAutoencoder) -> Tensor:
    """(B,1,X,Y) -> (B,M,X,Y)."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([residual_map(image, mae, ratio, generator) for ratio in RATIOS], 1)


@torch.no_grad()
def exact(image: Tensor, mae: MaskedAutoencoder) -> list[Tensor]:
    return [plain_maps(image.double(), copy.deepcopy(mae).double())]


def steps(run: Callable[..., Tensor], image: Tensor, mae: MaskedAutoencoder) -> list[Callable[[], Any]]:
    def call() -> list[Tensor]:
        with torch.no_grad():
            return [run(image, mae)]

    return [call]


def maps_contest(dtype: str, batch: int, side: int, sizes: dict[str, Any], plan: Plan) -> Contest:
    kind = getattr(torch, dtype)
    names = (plan.backend, PLAIN, *([OF_THE_FIRST] if sizes is TRAINED else []))

    def entries() -> dict[str, Contestant]:
        found = {}
        for name in names:
            torch.manual_seed(0)
            mae = MaskedAutoencoder(2, 1, **(FIRST if name == OF_THE_FIRST else sizes)).eval()
            if mae.config["restore"]:
                torch.nn.init.normal_(mae.change.weight, std=0.02)  # which starts at 0, where all maps are 0
            image = mae.alone(torch.randn(batch, 1, side, side))
            # Ours takes differences in float32, as prediction does; the plain path knows one dtype alone.
            inputs = image.to(plan.device, kind if name == PLAIN else torch.float32)
            run = plain_maps if name == PLAIN else residual_maps
            lowered = copy.deepcopy(mae).to(plan.device, kind)
            found[name] = Contestant(
                functools.partial(steps, run, inputs, lowered), functools.partial(exact, image, mae),
                TOLERANCES[dtype], ours=name == plan.backend,
            )  # fmt: skip
        return found

    return Contest(
        what="residual maps of five slices" if sizes is TRAINED else "residual maps",
        shape=f"{batch}x1x{side}x{side}",
        dtype=dtype,
        passes=("forward",),
        names=names,
        entries=entries,
        reference=PLAIN,
        threads=plan.threads,
        device=plan.device,
    )


def contests(plan: Plan) -> list[Contest]:
    batch, side, sizes = plan.choose((2, 32, SMALL), (4, 96, {}), (16, 96, {}))
    found = [maps_contest(dtype, batch, side, sizes, plan) for dtype in ("float32", "bfloat16")]
    found += plan.choose(
        [], [maps_contest("float32", 4, 96, TRAINED, plan)], [maps_contest("float32", 16, 96, TRAINED, plan)]
    )
    return found + plan.choose([], [], [maps_contest("float32", 4, 224, {}, plan)])


def test_residual_maps(compete):
    compete()
