"""Volumes through one stream, as lanes run them, in the thread of the test."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from awake import awake
from torch import Tensor

from grcsf_fast import GRCSF
from grcsf_fast.networks.mae import MaskedAutoencoder
from grcsf_fast.networks.stream import Images, Order, Stage, Stream
from grcsf_fast.networks.weights import ResidualMapSettings
from grcsf_fast.networks.whole_volume import reconstruct, reconstruction_stage, segment_views, segmentation_stage

RATIOS = (0.5, 0.75)


class SmallStream:
    """Small networks in evaluation mode, and volumes through them in batches that they share."""

    def __init__(self, dims: int = 2, size: int = 4, roi_size=None, rcu=(), mae: bool = False) -> None:
        torch.manual_seed(0)
        network = GRCSF(dims, 1, 1, features=(4, 8), patch_size=4, rcu_levels=rcu, residual_channels=4)
        self.network = awake(network).eval()
        self.mae = MaskedAutoencoder(dims, 1, 4, 24, 1, 2, 24, 1, 2).eval() if mae else None
        self.size, self.roi_size = size, roi_size

    def stages(self, forward=None) -> dict[str, Stage]:
        stages = segmentation_stage(self.network, self.size, self.roi_size, forward)
        if self.mae is not None:
            stages |= reconstruction_stage(self.mae, self.network.spatial_dims, self.size, ResidualMapSettings(RATIOS))
        return stages

    def run(self, volumes: Sequence[Tensor], foregrounds=None, stages=None) -> list[Any]:
        """Of each volume its maps and its probability, or the error."""
        foregrounds = foregrounds or [None] * len(volumes)
        works = [self._work(volume, one) for volume, one in zip(volumes, foregrounds, strict=True)]
        return together(Stream(stages or self.stages()), works)

    def _work(self, volume: Tensor, foreground: Tensor | None) -> Generator[Images, Order, tuple[Any, Tensor]]:
        maps = None
        if self.mae is not None:
            maps = yield from reconstruct(volume, foreground, self.mae, RATIOS)
        found = yield from segment_views(volume, foreground, maps, self.network, self.roi_size)
        return maps, found.probability


def together(stream: Stream, works: Sequence[Generator[Images, Order, Any]]) -> list[Any]:
    """What each of the works returns, or what it raised."""
    found: dict[int, Any] = {}
    waiting: dict[Order, int] = {}

    def go_on(number: int, given: Order | Exception | None) -> None:
        try:
            work = works[number]
            waiting[stream.submit(work.throw(given) if isinstance(given, Exception) else work.send(given))] = number
        except StopIteration as end:
            found[number] = end.value
        except Exception as error:
            found[number] = error

    for number in range(len(works)):
        go_on(number, None)
    while (ended := stream.step(partial=True)) is not None:
        for order in ended:
            go_on(waiting.pop(order), order.error or order)
    assert not waiting
    return [found[number] for number in range(len(works))]
