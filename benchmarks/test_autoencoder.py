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


def plain_maps(image: Tensor, mae: MaskedAutoencoder) -> Tensor:
    """(B,1,X,Y) -> (B,M,X,Y)."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([residual_map(image, mae, ratio, generator) for ratio in RATIOS], 1)


def maps_contest(dtype: str, batch: int, side: int, sizes: dict[str, int], plan: Plan) -> Contest:
    kind = getattr(torch, dtype)
    names = (plan.backend, PLAIN)

    def entries() -> dict[str, Contestant]:
        torch.manual_seed(0)
        mae = MaskedAutoencoder(2, 1, **sizes).eval()
        image = torch.randn(batch, 1, side, side)
        lowered = copy.deepcopy(mae).to(plan.device, kind)

        @torch.no_grad()
        def exact() -> list[Tensor]:
            return [plain_maps(image.double(), copy.deepcopy(mae).double())]

        def steps(run: Callable[..., Tensor], inputs: Tensor) -> list[Callable[[], Any]]:
            def call() -> list[Tensor]:
                with torch.no_grad():
                    return [run(inputs, lowered)]

            return [call]

        # Ours takes differences in float32, as prediction does; the plain path knows one dtype alone.
        inputs = image.to(plan.device), image.to(plan.device, kind)
        return {
            name: Contestant(functools.partial(steps, run, one), exact, TOLERANCES[dtype], ours=name == plan.backend)
            for name, run, one in zip(names, (residual_maps, plain_maps), inputs, strict=True)
        }

    return Contest(
        what="residual maps",
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
    return found + plan.choose([], [], [maps_contest("float32", 4, 224, {}, plan)])


def test_residual_maps(compete):
    compete()
