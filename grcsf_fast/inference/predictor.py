"""NIfTI volume in, lesion mask out: one at a time, or many through shared batches."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from torch import Tensor

from ..data.files import case_name, volume_files, volume_sha256
from ..data.volumes import (
    Prepared,
    Volume,
    VolumeError,
    like,
    load_volume,
    prepare,
)
from ..errors import ArgumentError
from ..networks.grcsf import GRCSF
from ..networks.mae import MaskedAutoencoder
from ..networks.residual_maps import residual_maps
from ..networks.stream import Result, VolumeStream
from ..ops.backends import select_backend, use_backend
from ..pretrained.bundle import Bundle, BundleError, check_channels, load_bundle
from ..runtime.precision import PRECISIONS, Choice, choose_device, choose_precision, measured_choice
from ..runtime.progress import busy, counter
from ..runtime.versions import versions
from .compiled import CompiledNetwork
from .lanes import Failure, run_lanes
from .prediction import Prediction
from .report import described, lesions_on_grid

__all__ = ["Predictor"]

Source = str | Path | nib.spatialimages.SpatialImage


class Predictor:
    """A bundle ready to segment volumes.

    Args:
        bundle: with a network; it is copied, not changed.
        device: ``"auto"`` (CUDA where there is one, else the CPU) or a torch device.
        backend: of the two ops, see :func:`grcsf_fast.use_backend`.
        batch_size: axial slices at once, of several volumes in :meth:`predict_many`; for 3-D networks an eighth of it
            windows.
        progress: show a bar on anything longer than 2 s.
        precision: ``"float32"``, ``"bfloat16"``, ``"float16"`` (CUDA alone) or ``"auto"``: bfloat16 where it is faster,
            see :mod:`grcsf_fast.runtime.precision`, else float32. Differences to the image, probabilities and all
            after are float32.
        importance_threshold: patches that the RCU scores below it are skipped; None: the bundle's.
        compiled: convolutions, norms and activations fused by torch's compiler, a minute for each size of slices when
            first met; kept on disk for later runs.

    Raises:
        BundleError: the bundle holds no network, needs an autoencoder and has none, or is for several channels.
        BackendUnavailableError: the backend was asked for by name and cannot run here.
        ValueError: an argument that does not fit.

    Example:
        >>> predictor = Predictor.from_pretrained("demo")  # doctest: +SKIP
        >>> predictor("scan.nii.gz").save("results")  # doctest: +SKIP
        >>> for prediction in predictor.predict_many(paths):  # doctest: +SKIP
        ...     prediction.save("results")
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str | torch.device = "auto",
        backend: str = "auto",
        batch_size: int = 16,
        progress: bool = False,
        precision: str = "auto",
        importance_threshold: float | None = None,
        compiled: bool = False,
    ) -> None:
        if bundle.network is None:
            raise BundleError("bundle: expected a segmentation network, found an autoencoder alone; run train first")
        if bundle.network.rcu and bundle.mae is None:
            raise BundleError("bundle: its network needs residual maps, and it holds no autoencoder")
        check_channels(bundle)
        if batch_size < 1:
            raise ArgumentError(f"batch_size: expected 1 or more, got {batch_size}")
        if importance_threshold is not None and not 0 <= importance_threshold <= 1:
            raise ArgumentError(f"importance_threshold: expected a number in [0, 1], got {importance_threshold}")
        self.bundle = bundle
        self.device = choose_device(device)
        self.backend = backend
        self.batch_size = batch_size
        self.progress = progress
        choice = choose_precision(precision, self.device, lambda: self._measured(compiled))
        self.precision, self.precision_reason = choice.precision, choice.reason
        self.network, self.mae = self._networks(self.precision, compiled)
        if importance_threshold is not None:
            self.network.importance_threshold = importance_threshold
        self.compiled = CompiledNetwork(self.network) if compiled else None

    def _networks(self, precision: str, compiled: bool) -> tuple[GRCSF, MaskedAutoencoder | None]:
        """Copies of the bundle's networks as they run in a precision."""
        dtype = PRECISIONS[precision]
        network = copy.deepcopy(self.bundle.network).to(self.device).eval()
        with self.on_backend():
            # A compiler knows more about convolutions that it can see.
            if not compiled and select_backend(network.output.weight) == "cpp":
                network.freeze()
        network = network.lowered(dtype)
        mae = copy.deepcopy(self.bundle.mae).to(self.device, dtype).eval() if network.rcu else None
        return network, mae

    def _measured(self, compiled: bool) -> Choice:
        """The faster precision for these networks on a small image; of compiled ones that of the plain ones counts."""
        residual, mae = self.bundle.residual_maps, self.bundle.mae
        edge = 64 if self.bundle.network.spatial_dims == 2 else 32
        if mae is not None:
            # Enough patches for every ratio.
            edge = max(edge, mae.patch_size * math.ceil(1 / (1 - max(residual.mask_ratios))))
        shape = (2, 1, *[edge] * self.bundle.network.spatial_dims)
        image = torch.linspace(-2, 2, math.prod(shape), device=self.device).reshape(shape)
        networks: dict[torch.dtype, Any] = {}

        @torch.no_grad()
        def run(dtype: torch.dtype) -> None:
            if dtype not in networks:
                networks[dtype] = self._networks(str(dtype).removeprefix("torch."), compiled)
            network, mae = networks[dtype]
            maps = None
            if mae is not None:
                maps = residual_maps(image, mae, residual.mask_ratios, residual.rounds, residual.seed).to(network.dtype)
            network(image, maps)

        with self.on_backend():
            backend = select_backend(self.bundle.network.output.weight)
            subject = {
                "kind": "prediction",
                "network": self.bundle.network.config,
                "mae": mae.config if mae is not None and self.bundle.network.rcu else None,
                "residual": asdict(residual),
                "backend": backend,
                "compiled": compiled,
            }
            return measured_choice(subject, run)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path = "demo", *arguments: Any, **named: Any) -> Predictor:
        """Load a bundle by name or folder; arguments and errors as for the class and :func:`load_bundle`."""
        return cls(load_bundle(name_or_folder), *arguments, **named)

    def settings(self) -> dict[str, Any]:
        """What decides a result beside the input: two runs with equal settings on one machine give the same files."""
        with self.on_backend():
            backend = select_backend(self.network.output.weight)
        bundle = self.bundle
        settings = {
            "version": versions()["grcsf-fast"],
            "weights_sha256": bundle.weights_sha256,
            "preprocessing": asdict(bundle.preprocessing),
            "residual_maps": asdict(bundle.residual_maps),
            "network": self.network.config,
            "mae": None if self.mae is None else self.mae.config,
            "roi_size": bundle.roi_size,
            "probability_threshold": bundle.probability_threshold,
            "hysteresis_threshold": bundle.hysteresis_threshold,
            "importance_threshold": self.network.importance_threshold,
            "tta_flip": bundle.tta_flip,
            "tta_scales": bundle.tta_scales,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "compiled": self.compiled is not None,
            "device": self.device.type,
            "backend": backend,
        }
        return json.loads(json.dumps(settings))  # as a report on disk has it

    def __call__(self, source: Source) -> Prediction:
        """Segment one volume, with all threads.

        Args:
            source: path of a NIfTI file, or a nibabel image; any orientation and spacing.

        Returns:
            The prediction, on the grid of ``source``.

        Raises:
            VolumeError: the volume cannot be used; the message names it.
            FileNotFoundError: no such file.
        """
        seconds: dict[str, float] = {}
        with busy("reading", self.progress):
            prepared = self.prepared(source, seconds)
        result = Result()
        with self.on_backend(), counter("batches", self.progress) as update:
            stream = self.stream()
            stream.add(prepared.data, prepared.foreground, None, result)
            done = 0
            while stream.step(partial=True):
                done += 1
                update(done, done + stream.batches_left())
        try:
            residual, probability = result.get()
        except ValueError as error:
            raise VolumeError(f"{prepared.volume.name}: {error}") from error
        with busy("restoring the grid", self.progress):
            return self.prediction(prepared, residual, probability, seconds | result.seconds)

    def predict_many(
        self,
        sources: Iterable[Source],
        *,
        ordered: bool = True,
        failures: str = "raise",
        lanes: int | None = None,
        memory: int | None = None,
        finish: Callable[[Prediction], Any] | None = None,
        skip: Callable[[Source], Any] | None = None,
    ) -> Iterator[Any]:
        """Segment many volumes through shared batches; lazy, a few volumes ahead of what is asked for.

        Lanes work side by side: each reads, computes and finishes volumes of its own, while the networks' weights are
        shared. On the CPU a lane computes with one thread, so that no thread waits for another; until the iterator ends
        or is closed, torch is set to one thread in the whole process.

        Args:
            sources: paths or nibabel images; taken one by one when there is room, in a thread of their own.
            ordered: yield in the order of ``sources``; False: as completed.
            failures: ``"raise"`` the error of a volume that cannot be used when its turn comes, or ``"return"`` a
                :class:`Failure` in its place.
            lanes: None: one a thread on the CPU, two on a GPU.
            memory: bytes that the volumes at work may take together; a volume that needs more alone fails. None: most
                of what the machine has free. Predictions that wait for their turn come on top.
            finish: called in the lane with each prediction; what it returns is yielded instead.
            skip: called in the lane with each source before it is read; unless None, its result is yielded instead.

        Yields:
            Predictions, or failures.

        Raises:
            VolumeError: see ``failures``.
            ValueError: arguments that do not fit.
        """
        if failures not in ("raise", "return"):
            raise ArgumentError(f"failures: expected 'raise' or 'return', got {failures!r}")
        results = run_lanes(self, sources, ordered, lanes, memory, finish or (lambda prediction: prediction), skip)
        with closing(results):
            for result in results:
                if isinstance(result, Failure) and failures == "raise":
                    raise result.error
                yield result

    def on_backend(self) -> AbstractContextManager[None]:
        """``"auto"`` leaves the choice to the environment variable and to an outer :func:`use_backend`."""
        return nullcontext() if self.backend == "auto" else use_backend(self.backend)

    def stream(self) -> VolumeStream:
        """A new stream of batches through the networks; for one thread."""
        bundle = self.bundle
        return VolumeStream(
            self.network, self.mae, bundle.residual_maps, self.batch_size, bundle.roi_size, bundle.tta_flip,
            bundle.tta_scales,
            self.compiled,
        )  # fmt: skip

    def prepared(self, source: Source, seconds: dict[str, float]) -> Prepared:
        """A volume on the networks' grid; ``seconds`` gets what it took. Errors as for a call."""
        with _timed(seconds, "read"):
            volume = _hashed_volume(source)
        with _timed(seconds, "prepare"):
            return prepare(volume, self.bundle.preprocessing)

    def prediction(
        self, prepared: Prepared, residual: Tensor | None, probability: Tensor, seconds: dict[str, float]
    ) -> Prediction:
        """What the networks found, brought back to the file's grid."""
        volume = prepared.volume
        with _timed(seconds, "restore"):
            mask, lesions = lesions_on_grid(
                probability, prepared, self.bundle.probability_threshold, self.bundle.hysteresis_threshold
            )
            image = like(mask, volume)
        name = case_name(volume.name) if volume.name != "<nibabel image>" else "volume"
        report = {
            "case": name,
            "input": volume.name,
            "input_sha256": volume.sha256,
            **described(lesions, volume.affine),
            "settings": self.settings(),
            "versions": versions(),
            "notice": "Research software; not a medical device and not for clinical use.",
        }
        values: dict[float | str, Tensor] = {"probability": probability}
        if residual is not None:
            values.update(zip(self.bundle.residual_maps.mask_ratios, residual, strict=True))
        return Prediction(name, image, report, seconds, prepared, values)


def _hashed_volume(source: Source) -> Volume:
    """The volume with the hash of the bytes it was read from; errors as for :func:`load_volume`."""
    if not isinstance(source, str | Path) or not Path(source).is_file():
        return load_volume(source)

    def state() -> list[tuple[int, int, int]]:
        found = [path.stat() for path in volume_files(source)]
        return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in found]

    before = state()
    digest = volume_sha256(source)
    volume = load_volume(source)
    if state() != before:
        raise VolumeError(f"{source}: expected a file at rest, it changed while it was read")
    return replace(volume, sha256=digest)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began
