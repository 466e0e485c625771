"""NIfTI volume in, lesion mask out: one at a time, or many through shared batches."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ..data.files import case_name, header_and_voxels, replace_when_done
from ..data.volumes import (
    Prepared,
    Volume,
    VolumeError,
    blocks_on_grid,
    bounding_box,
    like,
    load_volume,
    prepare,
    restore,
    save_on_grid,
)
from ..errors import ArgumentError
from ..networks.grcsf import GRCSF
from ..networks.mae import MaskedAutoencoder
from ..networks.residual_maps import residual_maps
from ..ops.backends import select_backend, use_backend
from ..pretrained.bundle import Bundle, BundleError, check_channels, load_bundle
from ..runtime.precision import PRECISIONS, Choice, choose_device, choose_precision, measured_choice
from ..runtime.progress import busy, counter
from .compiled import CompiledNetwork
from .lanes import Failure, run_lanes
from .stream import Result, VolumeStream

__all__ = [
    "Prediction",
    "Predictor",
    "lesion_mask",
    "lesion_report",
]

CORNERS = np.ones((3, 3, 3))  # lesions are connected by faces, edges and corners

Source = str | Path | nib.spatialimages.SpatialImage


@dataclass(frozen=True)
class Prediction:
    """What was found in one volume, all images on the input's own grid and affine.

    Attributes:
        name: of the case.
        mask: uint8, 1 in lesions.
        report: lesions, volumes, settings, versions, hashes of input and weights; ready for JSON.
        seconds: that each stage took; of a batch that several volumes shared, this one's part.
        prepared: the volume on the networks' grid.
        values: on the networks' grid, float32: the probability (X, Y, Z), and the residual map by masking ratio.
    """

    name: str
    mask: nib.Nifti1Image
    report: dict[str, Any]
    seconds: dict[str, float]
    prepared: Prepared
    values: dict[float | str, Tensor] = field(repr=False)

    @cached_property
    def probability(self) -> nib.Nifti1Image:
        """float32 in [0, 1]; made when first asked for."""
        return like(restore(self.values["probability"], self.prepared).clip(0, 1), self.prepared.volume)

    @cached_property
    def residual_maps(self) -> dict[float, nib.Nifti1Image]:
        """By masking ratio, float32, in units of the normalised intensity; empty for a network without RCU."""
        return {
            ratio: like(restore(values, self.prepared), self.prepared.volume)
            for ratio, values in self.values.items()
            if ratio != "probability"
        }

    @property
    def image(self) -> nib.Nifti1Image:
        """The input as it was read, float32."""
        return like(self.prepared.volume.data, self.prepared.volume)

    def save(self, folder: str | Path, name: str | None = None, maps: bool = True, overlay: bool = True) -> list[Path]:
        """Write mask, residual maps, report and overlay picture.

        The files are ``NAME.nii.gz`` (the mask), ``NAME_residual50.nii.gz`` and so on, ``NAME_report.json`` with the
        hash of each, and ``NAME_overlay.png``. Each appears under its name only when all are complete, the mask last;
        files that an earlier save of the case left and that do not belong to this one are removed.

        Args:
            folder: made if need be.
            name: of the case; None: its own.
            maps: with the residual maps.
            overlay: with the picture.

        Returns:
            The paths written.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
            ValueError: a result would replace the input.
        """
        from .overlay import save_overlay

        folder = Path(folder)
        name = self.name if name is None else name
        grids = {key: values for key, values in self.values.items() if maps and key != "probability"}
        names = output_names(name, list(grids), overlay)
        targets = [folder / f"{name}_report.json", *(folder / file for file in names)]
        source = Path(self.report["input"])
        if source.exists() and any(target.exists() and target.samefile(source) for target in targets):
            raise ArgumentError(f"{source}: expected another folder or name, the result would replace the input itself")
        stale = {file for file in read_report(targets[0]).get("outputs", {}) if Path(file).name == file} - set(names)
        try:
            with replace_when_done(*targets) as (report, *parts):
                for path, values in zip(parts, grids.values(), strict=False):
                    save_on_grid(path, values, self.prepared)
                if overlay:
                    save_overlay(parts[-2], self.prepared, self.mask, self._shown_residual())
                nib.save(self.mask, parts[-1])
                hashes = {file: sha256(part) for file, part in zip(names, parts, strict=True)}
                report.write_text(json.dumps(self.report | {"outputs": hashes}, indent=2) + "\n")
                for file in stale:
                    (folder / file).unlink(missing_ok=True)
        except OSError as error:
            raise OSError(f"{folder / name}.nii.gz: could not be written: {error.strerror or error}") from error
        return targets

    def _shown_residual(self) -> tuple[float, Tensor] | None:
        ratios = [key for key in self.values if key != "probability"]
        return (max(ratios), self.values[max(ratios)]) if ratios else None


def output_names(name: str, ratios: Sequence[float], overlay: bool) -> list[str]:
    """The files of a case beside its report: residual maps, picture, mask."""
    maps = [f"{name}_residual{round(100 * ratio)}.nii.gz" for ratio in ratios]
    return [*maps, *([f"{name}_overlay.png"] if overlay else []), f"{name}.nii.gz"]


def read_report(path: Path) -> dict[str, Any]:
    """A case's report on disk; empty where there is none that can be read."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) and isinstance(report.get("outputs"), dict) else {}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_sha256(path: Path) -> str:
    """Hash of the bytes of a volume's file; of a pair's both."""
    hashes = [sha256(file) for file in _files(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _files(path: str | Path) -> list[Path]:
    """Of a volume: one, or the two of a pair, as far as they are there."""
    return [file for file in dict.fromkeys(header_and_voxels(path)) if file.is_file()]


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
            network = network.optimized_for_inference(dtype, fused=False if compiled else None)
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
            levels = _levels(probability, prepared, self.bundle.probability_threshold, self.bundle.hysteresis_threshold)
            mask, lesions = _lesions(
                levels, 2 if self.bundle.hysteresis_threshold > self.bundle.probability_threshold else 1
            )
            image = like(mask, volume)
        name = case_name(volume.name) if volume.name != "<nibabel image>" else "volume"
        report = {
            "case": name,
            "input": volume.name,
            "input_sha256": volume.sha256,
            **_described(lesions, volume.affine),
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
        found = [path.stat() for path in _files(source)]
        return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in found]

    before = state()
    digest = input_sha256(Path(source))
    volume = load_volume(source)
    if state() != before:
        raise VolumeError(f"{source}: expected a file at rest, it changed while it was read")
    return replace(volume, sha256=digest)


def _levels(probability: Tensor, prepared: Prepared, threshold: float, peak: float) -> np.ndarray:
    """On the file's grid, uint8: 1 where the probability reaches the threshold, 2 where it reaches the peak as well."""
    levels = np.empty(prepared.volume.data.shape, np.uint8, order="F")
    for start, block in blocks_on_grid(probability, prepared):
        found = (block >= threshold).to(torch.uint8) + (block >= max(threshold, peak)).to(torch.uint8)
        levels[:, :, start : start + len(block)] = found.numpy().transpose(2, 1, 0)
    return levels


def lesion_mask(probability: np.ndarray, threshold: float, peak: float = 0.0) -> np.ndarray:
    """Voxels of at least ``threshold`` whose connected lesion (26 neighbours) reaches ``peak`` somewhere.

    Two thresholds (hysteresis): the lower one draws the outline, the higher one decides whether there is a lesion.

    Args:
        probability: (X, Y, Z) in [0, 1].
        threshold: of the outline.
        peak: least highest probability of a lesion; not above ``threshold``: every lesion is kept.

    Returns:
        (X, Y, Z) bool.
    """
    levels = (probability >= threshold).astype(np.uint8) + (probability >= max(threshold, peak))
    return _lesions(levels, 2 if peak > threshold else 1)[0] > 0


def _lesions(levels: np.ndarray, needed: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """The connected regions above 0 that reach ``needed``.

    Returns:
        (X, Y, Z) uint8 mask, and of each lesion, largest first, its voxels and centroid in voxel coordinates.
    """
    from scipy import ndimage

    mask = np.zeros_like(levels)
    box = bounding_box(levels)
    if box is None:
        return mask, []
    inside = levels[box]
    labels, count = ndimage.label(inside, structure=CORNERS)
    kept = np.zeros(count + 1, bool)
    kept[labels[inside >= needed]] = True
    kept[0] = False
    mask[box] = kept[labels]
    # Sizes and summed places of each label, plane by plane: counting all at once would copy the labels in 64 bits.
    sizes, places = np.zeros(count + 1, np.int64), np.zeros((count + 1, 3))
    rows, columns = (np.arange(size, dtype=np.float64) for size in inside.shape[:2])
    for z in range(inside.shape[2]):
        plane = labels[:, :, z].ravel()
        here = np.bincount(plane, minlength=count + 1)
        sizes += here
        places[:, 0] += np.bincount(plane, np.repeat(rows, len(columns)), count + 1)
        places[:, 1] += np.bincount(plane, np.tile(columns, len(rows)), count + 1)
        places[:, 2] += here * z
    origin = np.array([part.start for part in box])
    order = [label for label in np.argsort(-sizes, kind="stable") if kept[label]]
    return mask, [(int(sizes[label]), places[label] / sizes[label] + origin) for label in order]


def lesion_report(mask: np.ndarray, affine: np.ndarray) -> dict[str, Any]:
    """Count, volumes in mL and centroids in RAS mm of the connected (26 neighbours) lesions, largest first.

    Args:
        mask: (X, Y, Z), above 0 in lesions.
        affine: (4, 4), voxel to mm.
    """
    return _described(_lesions((mask > 0).astype(np.uint8), 1)[1], affine)


def _described(lesions: list[tuple[int, np.ndarray]], affine: np.ndarray) -> dict[str, Any]:
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    return {
        "lesion_count": len(lesions),
        "total_volume_ml": round(sum(size for size, _ in lesions) * voxel_ml, 4),
        "lesions": [
            {
                "volume_ml": round(size * voxel_ml, 4),
                "centroid_mm": [round(float(value), 2) for value in nib.affines.apply_affine(affine, centre)],
            }
            for size, centre in lesions
        ],
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages whose numbers a result may depend on."""
    found = {"python": platform.python_version()}
    for package in ("grcsf-fast", "torch", "numpy", "nibabel", "monai", "scipy", "isal", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began
