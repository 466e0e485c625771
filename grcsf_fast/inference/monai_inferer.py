"""What a bundle of MONAI names in its configuration: an inferer that takes whole volumes as they were read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.folder_layout import default_name_formatter
from monai.data.meta_tensor import MetaTensor
from monai.inferers.inferer import Inferer
from torch import Tensor

from ..data.channels import find_images, parts_of
from ..data.files import case_name, named_files
from ..data.images import OneChannel
from ..data.labels import Labels
from ..data.volumes import Preprocessing
from ..errors import ArgumentError
from ..networks.grcsf import GRCSF
from ..networks.weights import ResidualMapSettings, tuples
from ..pretrained.bundle import Bundle
from .predictor import Predictor
from .sources import check_space

__all__ = ["VolumeInferer", "list_images", "name_of_case"]

NIFTI = (".nii", ".nii.gz")


def list_images(folder: str | Path, channels: int) -> list[str | list[str]]:
    """The images of a folder's cases as MONAI's ``LoadImaged`` takes them.

    Args:
        folder: of one channel each ``NAME.nii.gz`` or ``NAME.nii`` in it counts, and nothing else; of several
            ``NAME_0000.nii.gz`` beside ``NAME_0001.nii.gz`` and so on, or a ``NAME.nii.gz`` of four axes.
        channels: of a case.

    Returns:
        For each case its one file, or its files in the order of the channels.

    Raises:
        FileNotFoundError: no images, or a channel is missing; the message names the case.
        ValueError: cases of other channels, or two files of one case, whose masks would have one name.
    """
    if channels == 1:
        return [*map(str, _nifti_files(Path(folder)))]
    cases, problems = find_images(folder, channels)
    for error in problems.values():
        raise error
    parts = [parts_of(case) for case in cases.values()]
    files = [[str(part.path if isinstance(part, OneChannel) else part) for part in one] for one in parts]
    return [one if len(set(one)) > 1 else one[0] for one in files]


def _nifti_files(folder: Path) -> list[Path]:
    """By their whole names: one that ends in a number is no channel. Of other formats MONAI's reader takes none."""
    named, problems, *_ = named_files(folder)
    for name, error in problems.items():
        if name.lower().endswith(NIFTI):
            raise error
    files = sorted(path for paths in named.values() for path in paths if path.name.lower().endswith(NIFTI))
    if not files:
        raise FileNotFoundError(f"{folder}: expected files ending in .nii or .nii.gz, found none")
    held = set(files)
    for path in files:
        if (packed := path.with_name(f"{path.name}.gz")) in held:
            raise ArgumentError(f"{folder}: {path.name} and {packed.name} are the same case; keep one of them")
    return files


def name_of_case(meta: Mapping[str, Any] | None, saver: Any) -> dict[str, Any]:
    """What MONAI's ``SaveImaged`` calls the result of several channels: ``NAME`` of the first, ``NAME_0000.nii.gz``."""
    named = default_name_formatter(dict(meta or {}), saver)
    path = Path(named["subject"])
    ending = path.name.removeprefix(case_name(path)).removeprefix("_0000")
    return named | {"subject": str(path.with_name(case_name(path) + ending))}


class VolumeInferer(Inferer):
    """Masks of volumes on their own grid, by the steps of :class:`grcsf_fast.Predictor`.

    Preprocessing, residual maps by the network's own autoencoder, the ways of seeing a volume, and the thresholds are
    those of ``predict``; so MONAI's transforms read and write, and change nothing between.

    Args:
        preprocessing: arguments of :class:`grcsf_fast.data.intensities.Preprocessing`.
        residual_maps: arguments of :class:`ResidualMapSettings`.
        probability_threshold: see :class:`grcsf_fast.Bundle`, as for those that follow.
        hysteresis_threshold: as there.
        tta_flip: as there.
        tta_scales: as there.
        roi_size: as there.
        batch_size: axial slices at once.
        precision: as for :class:`grcsf_fast.Predictor`.
        above_hu: as for :class:`grcsf_fast.Bundle`.
        channels: as there.
        labels: arguments of :class:`grcsf_fast.Labels`; None: lesion alone.

    Raises:
        TypeError: an argument that there is not.
        ValueError: settings that cannot be used.
    """

    def __init__(
        self,
        preprocessing: Mapping[str, Any],
        residual_maps: Mapping[str, Any],
        probability_threshold: float = 0.5,
        hysteresis_threshold: float = 0.0,
        tta_flip: bool = False,
        tta_scales: Sequence[float] = (1.0,),
        roi_size: Sequence[int] | None = None,
        batch_size: int = 16,
        precision: str = "float32",
        above_hu: float | None = None,
        channels: Sequence[str] = ("image",),
        labels: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.precision = batch_size, precision
        self.settings: dict[str, Any] = {
            "preprocessing": Preprocessing.from_json(preprocessing),
            "residual_maps": ResidualMapSettings(**tuples(residual_maps)),
            "probability_threshold": probability_threshold,
            "hysteresis_threshold": hysteresis_threshold,
            "tta_flip": tta_flip,
            "tta_scales": tuple(tta_scales),
            "roi_size": tuple(roi_size) if roi_size is not None else None,
            "above_hu": above_hu,
            "channels": tuple(channels),
            "labels": Labels.from_json(labels) if labels is not None else None,
        }
        Bundle(None, None, **self.settings)  # so that settings that cannot be used say so here

    def __call__(self, inputs: Tensor, network: GRCSF, *args: Any, **kwargs: Any) -> Tensor:
        """Segment volumes.

        Args:
            inputs: MONAI's ``MetaTensor`` (B, C, X, Y, Z), C channels as read: any orientation and spacing, of which
                its affine tells.
            network: in evaluation mode, with its autoencoder; where it is, it runs.
            args: not used; MONAI's callers may pass some.
            kwargs: as ``args``.

        Returns:
            ``MetaTensor`` (B, 1, X, Y, Z) uint8, 1 in lesions, of classes their numbers; of regions (B, K, X, Y, Z), 1
            in each of the K. With the affine and the rest of the inputs' meta data.

        Raises:
            ArgumentError: no ``MetaTensor`` of that shape, or one whose affine is of another space than RAS.
            VolumeError: a volume that cannot be used.
        """
        channels, labels = len(self.settings["channels"]), self.settings["labels"]
        if not isinstance(inputs, MetaTensor) or inputs.dim() != 5 or inputs.shape[1] != channels:
            shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else ""
            raise ArgumentError(
                f"inputs: expected a MetaTensor (B,{channels},X,Y,Z), got {type(inputs).__name__} {shape}".strip()
            )
        check_space(inputs)
        bundle = Bundle(network, None, **self.settings)
        device = next(network.parameters()).device
        # Built anew for each batch: the weights may have changed.
        predictor = Predictor(bundle, device, batch_size=self.batch_size, precision=self.precision)
        affines = torch.as_tensor(inputs.affine).expand(len(inputs), 4, 4)
        masks = [
            np.asarray(predictor(volume, affine).mask.dataobj)
            for volume, affine in zip(inputs.as_tensor(), affines, strict=True)
        ]
        if labels is None or labels.exclusive:
            maps = np.stack(masks)[:, None]
        else:
            maps = np.stack([[labels.marked(mask, name) for name in labels.names] for mask in masks]).astype(np.uint8)
        found = MetaTensor(torch.from_numpy(maps))
        return found.copy_meta_from(inputs)
