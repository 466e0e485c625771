"""What a bundle of MONAI names in its configuration: an inferer that takes whole volumes as they were read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.inferers.inferer import Inferer
from torch import Tensor

from ..data.volumes import Preprocessing
from ..errors import ArgumentError
from ..networks.grcsf import GRCSF
from ..networks.weights import ResidualMapSettings, tuples
from ..pretrained.bundle import Bundle
from .predictor import Predictor
from .sources import check_space

__all__ = ["VolumeInferer"]


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
        }
        Bundle(None, None, **self.settings)  # so that settings that cannot be used say so here

    def __call__(self, inputs: Tensor, network: GRCSF, *args: Any, **kwargs: Any) -> Tensor:
        """Segment volumes.

        Args:
            inputs: MONAI's ``MetaTensor`` (B, 1, X, Y, Z), as read: any orientation and spacing, of which its affine
                tells.
            network: in evaluation mode, with its autoencoder; where it is, it runs.
            args: not used; MONAI's callers may pass some.
            kwargs: as ``args``.

        Returns:
            ``MetaTensor`` (B, 1, X, Y, Z) uint8, 1 in lesions, with the affine and the rest of the inputs' meta data.

        Raises:
            ArgumentError: no ``MetaTensor`` of that shape, or one whose affine is of another space than RAS.
            VolumeError: a volume that cannot be used.
        """
        if not isinstance(inputs, MetaTensor) or inputs.dim() != 5 or inputs.shape[1] != 1:
            shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else ""
            raise ArgumentError(
                f"inputs: expected a MetaTensor (B,1,X,Y,Z), got {type(inputs).__name__} {shape}".strip()
            )
        check_space(inputs)
        bundle = Bundle(network, network.mae, **self.settings)
        device = next(network.parameters()).device
        # Built anew for each batch: the weights may have changed.
        predictor = Predictor(bundle, device, batch_size=self.batch_size, precision=self.precision)
        affines = torch.as_tensor(inputs.affine).expand(len(inputs), 4, 4)
        masks = [
            np.asarray(predictor(volume, affine).mask.dataobj)
            for volume, affine in zip(inputs.as_tensor(), affines, strict=True)
        ]
        found = MetaTensor(torch.from_numpy(np.stack(masks)[:, None]))
        return found.copy_meta_from(inputs)
