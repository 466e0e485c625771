"""NIfTI volume in, lesion mask out."""

from __future__ import annotations

import json
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .bundle import Bundle, BundleError, load_bundle
from .data.files import case_name, replace_when_done
from .data.volumes import Prepared, VolumeError, like, load_volume, prepare, restore
from .networks.grcsf import GRCSF
from .ops.backends import BackendUnavailableError, select_backend, use_backend
from .progress import busy, counter
from .residuals import volume_residual_maps

__all__ = ["Prediction", "Predictor", "choose_device", "lesion_mask", "predict_cases", "segment"]


@dataclass(frozen=True)
class Prediction:
    """What was found in one volume, all images on the input's own grid and affine.

    Attributes:
        name: of the case.
        mask: uint8, 1 in lesions.
        probability: float32 in [0, 1].
        residual_maps: by masking ratio, float32, in units of the normalised intensity; empty for a network without.
        report: lesions, volumes, seconds a stage, backend, versions, hash of the weights; ready for JSON.
        image: the input as it was read, float32.
    """

    name: str
    mask: nib.Nifti1Image
    probability: nib.Nifti1Image
    residual_maps: dict[float, nib.Nifti1Image]
    report: dict[str, Any]
    image: nib.Nifti1Image

    def save(self, folder: str | Path, name: str | None = None) -> list[Path]:
        """Write mask, residual maps, report and overlay picture.

        The files are ``NAME.nii.gz`` (the mask), ``NAME_residual50.nii.gz`` and so on, ``NAME_report.json`` and
        ``NAME_overlay.png``. Each appears under its name only when all are complete, the mask last.

        Args:
            folder: made if need be.
            name: of the case; None: its own.

        Returns:
            The paths written.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
            ValueError: a result would replace the input.
        """
        from .picture import save_overlay

        folder = Path(folder)
        name = self.name if name is None else name
        images = {f"{name}_residual{round(100 * ratio)}.nii.gz": image for ratio, image in self.residual_maps.items()}
        images[f"{name}.nii.gz"] = self.mask
        targets = [folder / f"{name}_report.json", folder / f"{name}_overlay.png", *(folder / file for file in images)]
        source = Path(self.report["input"])
        if source.exists() and any(target.exists() and target.samefile(source) for target in targets):
            raise ValueError(f"{source}: expected another folder or name, the result would replace the input itself")
        try:
            with replace_when_done(*targets) as (report, overlay, *volumes):
                report.write_text(json.dumps(self.report, indent=2) + "\n")
                save_overlay(overlay, self.image, self.mask, self.residual_maps)
                for path, image in zip(volumes, images.values(), strict=True):
                    nib.save(image, path)
        except OSError as error:
            raise OSError(f"{folder / name}.nii.gz: could not be written: {error.strerror or error}") from error
        return targets


class Predictor:
    """A bundle ready to segment volumes.

    Args:
        bundle: with a network.
        device: ``"auto"`` (CUDA where there is one, else the CPU) or a torch device.
        backend: of the two ops, see :func:`grcsf_fast.use_backend`.
        batch_size: axial slices at once.
        progress: show a bar on anything longer than 2 s.

    Raises:
        BundleError: the bundle holds no network, or needs an autoencoder and has none.
        BackendUnavailableError: the backend was asked for by name and cannot run here.

    Example:
        >>> predictor = Predictor.from_pretrained("demo")  # doctest: +SKIP
        >>> predictor("scan.nii.gz").save("results")  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str | torch.device = "auto",
        backend: str = "auto",
        batch_size: int = 16,
        progress: bool = False,
    ) -> None:
        if bundle.network is None:
            raise BundleError("bundle: expected a segmentation network, found an autoencoder alone; run train first")
        if bundle.network.rcu and bundle.mae is None:
            raise BundleError("bundle: its network needs residual maps, and it holds no autoencoder")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        with _backend(backend):
            pass
        self.bundle = bundle
        self.device = choose_device(device)
        self.backend = backend
        self.batch_size = batch_size
        self.progress = progress
        self.network = bundle.network.to(self.device).eval()
        self.mae = bundle.mae.to(self.device).eval() if bundle.mae is not None else None

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path = "demo",
        device: str | torch.device = "auto",
        backend: str = "auto",
        batch_size: int = 16,
        progress: bool = False,
    ) -> Predictor:
        """Load a bundle by name or folder; arguments and errors as for the class and :func:`load_bundle`."""
        return cls(load_bundle(name_or_folder), device, backend, batch_size, progress)

    def __call__(self, source: str | Path | nib.spatialimages.SpatialImage) -> Prediction:
        """Segment one volume.

        Args:
            source: path of a NIfTI file, or a nibabel image; any orientation and spacing.

        Returns:
            The prediction, on the grid of ``source``.

        Raises:
            VolumeError: the volume cannot be used; the message names it.
            FileNotFoundError: no such file.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "read"), busy("reading", self.progress):
            volume = load_volume(source)
        with _timed(seconds, "prepare"), busy("preparing", self.progress):
            prepared = prepare(volume, self.bundle.preprocessing)
        try:
            residual, probability = self.run(prepared, seconds)
        except ValueError as error:
            raise VolumeError(f"{volume.name}: {error}") from error
        with _timed(seconds, "restore"), busy("restoring the grid", self.progress):
            on_grid = restore(probability, prepared).clip(0, 1)
            mask = lesion_mask(on_grid, self.bundle.probability_threshold, self.bundle.lesion_peak).astype(np.uint8)
            maps = {}
            if residual is not None:
                for ratio, values in zip(self.bundle.residual.ratios, residual, strict=True):
                    maps[ratio] = like(restore(values, prepared), volume)
            mask_image = like(mask, volume)
        name = case_name(volume.name) if volume.name != "<nibabel image>" else "volume"
        report = {
            "case": name,
            "input": volume.name,
            **_lesion_report(mask, volume.affine),
            "probability_threshold": self.bundle.probability_threshold,
            "lesion_peak": self.bundle.lesion_peak,
            "mirror": self.bundle.mirror,
            "zooms": list(self.bundle.zooms),
            "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
            "device": str(self.device),
            "backend": self._backend_in_use(),
            "threads": torch.get_num_threads(),
            "weights_sha256": self.bundle.weights_sha256,
            "versions": versions(),
            "notice": "Research software; not a medical device and not for clinical use.",
        }
        return Prediction(name, mask_image, like(on_grid, volume), maps, report, like(volume.data, volume))

    def run(self, prepared: Prepared, seconds: dict[str, float] | None = None) -> tuple[Tensor | None, Tensor]:
        """Networks alone: residual maps (M, X, Y, Z) or None, and probability (X, Y, Z), on the networks' grid."""
        seconds = {} if seconds is None else seconds
        data = prepared.data.to(self.device)
        settings = self.bundle.residual
        residual = None
        with _backend(self.backend):
            if self.network.rcu:
                with _timed(seconds, "residual_maps"), counter("residual maps", self.progress) as update:
                    residual = volume_residual_maps(
                        data, self.mae, settings.ratios, settings.rounds, settings.seed, self.batch_size, update
                    )
            with _timed(seconds, "segmentation"), counter("segmentation", self.progress) as update:
                probability = segment(
                    self.network,
                    data,
                    residual,
                    self.batch_size,
                    self.bundle.window,
                    self.bundle.mirror,
                    self.bundle.zooms,
                    update,
                )
        return residual, probability

    def _backend_in_use(self) -> str:
        with _backend(self.backend):
            return select_backend(next(self.network.parameters()))


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
    mask = probability >= threshold
    if peak <= threshold or not mask.any():
        return mask
    from scipy import ndimage

    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    kept = np.zeros(count + 1, bool)
    kept[labels[probability >= peak]] = True
    kept[0] = False
    return kept[labels]


@torch.no_grad()
def segment(
    network: GRCSF,
    volume: Tensor,
    residual: Tensor | None,
    batch_size: int = 16,
    window: tuple[int, ...] | None = None,
    mirror: bool = False,
    zooms: Sequence[float] = (1.0,),
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Lesion probability of one preprocessed volume.

    Args:
        network: in evaluation mode, one output channel.
        volume: (X, Y, Z) on the network's device.
        residual: (M, X, Y, Z), or None for a network without RCU.
        batch_size: slices at once, for a 2-D network.
        window: sliding window of a 3-D network; None: the whole volume at once.
        mirror: average over the volume and its mirror image along the first axis, left to right.
        zooms: average over the volume enlarged by these factors; in the slice, for a 2-D network.
        progress: called with (slices done, slices in all, over all views) by a 2-D network.

    Returns:
        (X, Y, Z) float32 in [0, 1].
    """
    total = torch.zeros_like(volume, dtype=torch.float32)
    views = [(zoom, turned) for zoom in zooms for turned in ((False, True) if mirror else (False,))]
    inputs = volume[None] if residual is None else torch.cat([volume[None], residual])  # (1+M,X,Y,Z)
    for number, (zoom, turned) in enumerate(views):

        def count(done: int, slices: int, number: int = number) -> None:
            progress(done + number * slices, len(views) * slices)

        view = inputs.flip(1) if turned else inputs
        shape = [max(1, round(size * zoom)) for size in volume.shape]
        if network.spatial_dims == 2:
            shape[2] = volume.shape[2]
        view = _resize(view, shape)
        maps = None if residual is None else view[1:]
        probability = _segment_view(network, view[0], maps, batch_size, window, None if progress is None else count)
        probability = _resize(probability[None], volume.shape)[0]
        total += probability.flip(0) if turned else probability
    return total / len(views)


def _resize(volumes: Tensor, shape: Sequence[int]) -> Tensor:
    """(K, X, Y, Z) by linear interpolation; itself where nothing changes."""
    if tuple(volumes.shape[1:]) == tuple(shape):
        return volumes
    return F.interpolate(volumes[None], size=tuple(shape), mode="trilinear", align_corners=False)[0]


def _segment_view(
    network: GRCSF,
    volume: Tensor,
    residual: Tensor | None,
    batch_size: int,
    window: tuple[int, ...] | None,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """One view of :func:`segment`."""
    if network.spatial_dims == 2:
        slices = volume.permute(2, 0, 1)[:, None]  # (Z,1,X,Y)
        maps = residual.permute(3, 0, 1, 2) if residual is not None else None  # (Z,M,X,Y)
        logits = []
        for first in range(0, len(slices), batch_size):
            part = slice(first, first + batch_size)
            logits.append(network(slices[part], None if maps is None else maps[part]))
            if progress is not None:
                progress(min(first + batch_size, len(slices)), len(slices))
        return torch.cat(logits)[:, 0].permute(1, 2, 0).float().sigmoid()
    inputs = volume[None, None] if residual is None else torch.cat([volume[None], residual])[None]

    def forward(windows: Tensor) -> Tensor:
        return network(windows[:, :1], windows[:, 1:] if residual is not None else None)

    if window is None:
        return forward(inputs)[0, 0].float().sigmoid()
    from monai.inferers import sliding_window_inference

    return sliding_window_inference(inputs, window, 1, forward, overlap=0.25, mode="gaussian")[0, 0].float().sigmoid()


def predict_cases(
    predictor: Predictor,
    cases: Mapping[str, Path],
    output: str | Path,
    done: Callable[[Prediction], None],
    progress: Callable[[list[str]], Iterable[str]] = lambda names: names,
) -> dict[str, str]:
    """Segment many files; a bad one is noted and the others are done.

    Args:
        predictor: to use.
        cases: name -> file.
        output: folder for the results.
        done: called after each case that was written.
        progress: wraps the list of names.

    Returns:
        Name -> error of the cases that failed; an error nobody foresaw comes with its traceback.
    """
    failures: dict[str, str] = {}
    for name in progress(list(cases)):
        path = cases[name]
        try:
            prediction = predictor(path)
            prediction.save(output, name)
        except (VolumeError, OSError) as error:
            failures[name] = str(error)
        except (ModuleNotFoundError, BackendUnavailableError):
            raise  # true of every case
        # One bad case must not stop the other thousands; the traceback goes into the report.
        except Exception:
            failures[name] = f"{path}: unexpected error\n{traceback.format_exc()}"
        else:
            done(prediction)
    return failures


def choose_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: CUDA was asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda[:N]', got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda[:N]', got {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count() > 0:
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} was asked for, and torch finds no CUDA device; use 'cpu' or 'auto'")
    return chosen


def versions() -> dict[str, str]:
    """Of Python and of the packages whose numbers a result may depend on."""
    found = {"python": platform.python_version()}
    for package in ("grcsf-fast", "torch", "numpy", "nibabel", "monai", "scipy", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _lesion_report(mask: np.ndarray, affine: np.ndarray) -> dict[str, Any]:
    """Count, volumes in mL and centroids in RAS mm of the connected (26 neighbours) lesions, largest first."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    centroids = ndimage.center_of_mass(mask, labels, range(1, count + 1))
    lesions = [
        {
            "volume_ml": round(int(sizes[index]) * voxel_ml, 4),
            "centroid_mm": [round(float(value), 2) for value in nib.affines.apply_affine(affine, centroids[index])],
        }
        for index in np.argsort(-sizes, kind="stable")
    ]
    return {
        "lesion_count": count,
        "total_volume_ml": round(int(sizes.sum()) * voxel_ml, 4),
        "lesions": lesions,
    }


def _backend(name: str) -> AbstractContextManager[None]:
    """``"auto"`` leaves the choice to the environment variable and to an outer :func:`use_backend`."""
    return nullcontext() if name == "auto" else use_backend(name)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began
