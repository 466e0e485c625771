"""How busy 32 volumes keep a GPU, and what a batch takes: ``python -m benchmarks.gpu_timeline -o FILE.json``.

Synthetic subjects of 197x233x189 voxels, a few of them again and again, by the packaged bundle: from files to files,
and of images that are in memory and whose predictions are dropped. A GPU is busy while any kernel or copy runs on it,
by torch's profiler, out of the time from the first volume to the last result. A trace for chrome://tracing or Perfetto
is written beside the file. Run nothing beside it.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import machine_name
from benchmarks.pipeline import links, volumes
from grcsf_fast import Predictor
from grcsf_fast.data.files import replace_when_done
from grcsf_fast.inference.graphs import WORTH, CudaCapture
from grcsf_fast.networks.whole_volume import RECONSTRUCTION, segmentation_stage
from grcsf_fast.runtime.versions import versions

__all__ = ["busy_seconds", "launches", "measure", "watched"]

VOLUMES, DISTINCT = 32, 4
AIM = 0.8
SLICE = (96, 112)  # of a head at 2 mm
REPLAYS = 50
# Of CUDA's runtime and driver, by which a kernel or a graph of them is launched.
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "hipLaunch", "hipModuleLaunch", "hipGraphLaunch")


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """The time that at least one of the spans, from and to in microseconds, covers."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total / 1e6


def launches(names: Iterable[str]) -> int:
    """How many of these calls of CUDA's launch something."""
    return sum(name.startswith(LAUNCHES) for name in names)


def watched(run: Callable[[], Any], device: torch.device, trace: Path | None = None) -> dict[str, float]:
    """A run's seconds, and for how many of them the device was busy.

    Args:
        run: ends when all its results are there.
        device: a GPU; on a processor only the time is taken.
        trace: file to write, ending in ``.json.gz``.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return {"seconds": time.perf_counter() - began}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        torch.cuda.synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    busy = busy_seconds(spans)
    return {"seconds": seconds, "busy_seconds": busy, "busy_share": busy / seconds, "on_the_gpu": len(spans)}


def measure(predictor: Predictor, images: Path, work: Path, trace: Path | None = None) -> dict[str, Any]:
    """Both runs over the volumes of a folder.

    Args:
        predictor: on the device.
        images: the folder.
        work: an empty folder for results.
        trace: of the run from files to files, see :func:`watched`.
    """
    paths = sorted(images.iterdir())

    def of_files(name: str) -> None:
        for result in predictor.predict_folder(images, work / name, page=False):
            if not hasattr(result, "report"):
                raise RuntimeError(f"expected all volumes to be segmented, got {result}")

    of_files("before")  # what is compiled, checked and captured
    found: dict[str, Any] = {"files": watched(lambda: of_files("measured"), predictor.device, trace)}
    in_memory = [nib.Nifti1Image(nib.load(path).get_fdata(dtype="float32"), nib.load(path).affine) for path in paths]

    def of_images() -> None:
        for _ in predictor.predict_many(in_memory, ordered=False):
            pass

    return found | {"volumes": len(paths), "memory": watched(of_images, predictor.device)}


def launched(predictor: Predictor) -> dict[str, dict[str, int]]:
    """Launches of a batch of either network, as it is and replayed; needs a GPU."""
    found: dict[str, dict[str, int]] = {}
    maps = len(predictor.bundle.residual_maps.mask_ratios) if predictor.mae is not None else 0
    with predictor.on_backend():
        for name, stage in predictor.stages().items():
            seen = predictor.mae.seen_channels if name == RECONSTRUCTION else predictor.network.seen_channels + maps
            images = torch.randn(stage.size, seen, *SLICE, device=predictor.device)
            counts = []
            for _ in range(WORTH + 2):
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                    stage.run(images)
                    torch.cuda.synchronize(predictor.device)
                counts.append(launches(event.name for event in profiler.events()))
            found[name] = {"as it is": counts[1], "replayed": counts[-1]}
    return found


def layouts(predictor: Predictor) -> dict[str, float]:
    """Milliseconds of a replayed batch of the network by layout of its weights, which convolutions follow; on a GPU."""
    found: dict[str, float] = {}
    last = torch.channels_last if predictor.network.spatial_dims == 2 else torch.channels_last_3d
    maps = len(predictor.bundle.residual_maps.mask_ratios) if predictor.mae is not None else 0
    for name, layout in (("contiguous", torch.contiguous_format), ("channels last", last)):
        network = copy.deepcopy(predictor.network).to(memory_format=layout)
        (stage,) = segmentation_stage(network, predictor.batch_size).values()
        images = torch.randn(stage.size, network.seen_channels + maps, *SLICE, device=predictor.device)
        with predictor.on_backend():
            stage.run(images)
            replay = CudaCapture(predictor.device)(stage.run, images)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for number in range(2 * REPLAYS):
            if number == REPLAYS:  # the first half warms up
                began.record()
            replay(images)
        ended.record()
        ended.synchronize()
        found[name] = began.elapsed_time(ended) / REPLAYS
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="result file, ending in .json")
    output = parser.parse_args().output
    if not torch.cuda.is_available():
        print("no GPU: torch finds none; nothing was measured", file=sys.stderr)
        sys.exit(2)
    predictor = Predictor("demo", "cuda")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        images = links(volumes(work / "subjects", DISTINCT), work / "images", VOLUMES)
        with replace_when_done(output, output.with_suffix(".trace.json.gz")) as (written, trace):
            found = measure(predictor, images, work, trace) | {"launches_of_a_batch": launched(predictor)}
            found["milliseconds_of_a_batch"] = layouts(predictor)
            found |= {"machine": machine_name("cuda"), "date": str(datetime.date.today()), "versions": versions()}
            written.write_text(json.dumps(found | {"precision": predictor.precision}, indent=1) + "\n")
    for name, what in (("files", "from files to files"), ("memory", "of images in memory")):
        run = found[name]
        share = f"the GPU busy for {run['busy_share']:.0%} of it (aim: {AIM:.0%})"
        print(f"{found['volumes']} volumes {what}: {run['seconds']:.1f} s, {share}")
    for name, counts in found["launches_of_a_batch"].items():
        print(f"{name}: {counts['as it is']} launches a batch, {counts['replayed']} where it is replayed")
    for layout, milliseconds in found["milliseconds_of_a_batch"].items():
        print(f"a batch of the network, {layout}: {milliseconds:.2f} ms")


if __name__ == "__main__":
    main()
