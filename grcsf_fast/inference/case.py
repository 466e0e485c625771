"""The way of one volume, from reading it to what was found in it; and of many, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from ..data.channels import as_channels
from ..data.volumes import VolumeError, like, prepare
from ..networks.stream import Images, Order
from ..networks.whole_volume import reconstruct, segment_views
from ..ops.backends import fallbacks
from ..runtime.control_groups import usable_cores
from ..runtime.memory import give_memory_back, memory_budget
from ..runtime.threads import threads_outside
from ..runtime.transfers import fetch, volumes_on
from ..runtime.versions import versions
from .driver import driving
from .lanes import Batches, Failure, Job, Room, RoomError, Work, run_lanes
from .model import Model
from .prediction import Prediction
from .report import Levels, counting, described, described_labels, lesions_on_grid, levels_on_grid, scored
from .sources import Source, as_source, file_of, name_of, origin_of, read_volume

__all__ = ["in_lanes", "predict_case"]

Result = TypeVar("Result")
Found = TypeVar("Found")


def predict_case(model: Model, source: Source, name: str | None = None, unnamed: str = "volume") -> Work[Prediction]:
    """Segment one volume: a generator that asks for room in memory and for batches of images.

    Args:
        model: to segment with.
        source: of the volume.
        name: of the case; None: the file's.
        unnamed: its name where there is no file either.

    Raises:
        VolumeError: the volume cannot be used, or needs more memory than there is; the message names it.
        FileNotFoundError: no such file.
    """
    bundle, seconds = model.bundle, dict[str, float]()
    source = as_channels(as_source(source, channels=model.in_channels), model.in_channels)
    try:
        yield Room(model.bytes_needed(source))
    except RoomError as error:
        where = "<nibabel image>" if file_of(source) is None else source
        raise VolumeError(f"{where}: {error}") from error
    # What batches and cases before this one left lies between what others hold, and would not do for whole volumes.
    give_memory_back()
    with _timed(seconds, "read"):
        volume = read_volume(source)
    with _timed(seconds, "prepare"):
        prepared = prepare(volume, bundle.preprocessing, volumes_on(model.device))
    maps = None
    try:
        if model.mae is not None:
            work = reconstruct(prepared.data, prepared.foreground, model.mae, bundle.residual_maps.mask_ratios)
            maps = yield from _counted(seconds, "residual_maps", work)
        work = segment_views(
            prepared.data, prepared.foreground, maps, model.network, bundle.roi_size, bundle.tta_flip,
            bundle.tta_scales, bundle.labels,
        )  # fmt: skip
        probability, unit_maps = yield from _counted(seconds, "segmentation", work)
    # Such as of a volume too small for the networks, which do not know its name.
    except ValueError as error:
        raise VolumeError(f"{volume.name}: {error}") from error
    thresholds = bundle.probability_threshold, bundle.hysteresis_threshold
    with _timed(seconds, "restore"):
        levels = levels_on_grid(probability, prepared, *thresholds, bundle.labels)
        # All at once: on a GPU nobody waits for the networks before.
        found = {"data": prepared.data, "probability": probability}
        found |= {name: one for name, one in (("maps", maps), *levels._asdict().items()) if one is not None}
        found |= unit_maps
        found = fetch(found)
        for what in ("probability", "maps"):
            if what in found and not found[what].isfinite().all():
                raise VolumeError(
                    f"{volume.name}: expected finite numbers of the networks, got a {what} that holds NaN"
                )
        prepared, probability, maps = replace(prepared, data=found["data"]), found["probability"], found.get("maps")
        unit_maps = {name: found[name] for name in unit_maps}
        levels = counting(Levels(found["reached"], found.get("numbers")), volume.data, bundle.above_hu)
        mask, lesions = lesions_on_grid(levels, *thresholds)
        image = like(mask, volume)
    hu = volume.data if bundle.above_hu is not None else None
    name = name_of(source, unnamed) if name is None else name
    settings = model.settings()
    fell_back = fallbacks() if settings["backend"] == "triton" else {}
    report = {
        "case": name,
        **origin_of(source, bundle.channels, volume.name),
        "input_sha256": volume.sha256,
        **scored(mask, volume.affine, hu),
        **described(lesions, volume.affine),
        **({"labels": described_labels(mask, volume.affine, bundle.labels, hu)} if bundle.labels is not None else {}),
        "settings": settings,
        **({"fallbacks": fell_back} if fell_back else {}),
        "remarks": list(prepared.remarks),
        "versions": versions(),
        "notice": "Research software; not a medical device and not for clinical use.",
    }
    values: dict[float | str, Tensor] = {"probability": probability, **unit_maps}
    if maps is not None:
        values.update(zip(bundle.residual_maps.mask_ratios, maps, strict=True))
    return Prediction(name, image, report, seconds, prepared, values)


def in_lanes(
    model: Model, cases: Iterable[Job[Result]], ordered: bool, lanes: int | None, memory: int | None
) -> Iterator[Result | Failure]:
    """Cases side by side through the networks; arguments and errors as for :meth:`Predictor.predict_many`.

    On the CPU each lane computes its own batches; those of another device are computed by a thread for all of them.
    """
    lanes = min(threads_outside(), usable_cores()) if lanes is None else lanes
    memory = memory_budget(volumes_on(model.device)) if memory is None else memory

    def run(stream: Callable[[], Batches]) -> Iterator[Result | Failure]:
        return run_lanes(
            cases, stream, ordered=ordered, lanes=lanes, memory=memory, one_thread_each=True, context=model.on_backend
        )

    if model.device.type == "cpu":
        yield from run(model.stream)
    else:
        with driving(model.stream, model.on_backend) as seat:
            yield from run(seat)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began


def _counted(
    seconds: dict[str, float], stage: str, work: Generator[Images, Order, Found]
) -> Generator[Images, Order, Found]:
    """The work, with the time that it takes itself and its part of that of its batches."""
    order = None
    while True:
        try:
            with _timed(seconds, stage):
                asked = [work.send(order)]
        except StopIteration as end:
            return end.value
        order = yield asked.pop()  # kept by nobody here, so that memory is free as soon as they are computed
        give_memory_back()  # of its batches and images
        seconds[stage] += order.seconds
