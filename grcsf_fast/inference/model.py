"""A bundle's networks as they run here: on a device, in a precision, by a backend."""

from __future__ import annotations

import copy
import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..data.channels import image_bytes
from ..errors import ArgumentError
from ..networks.grcsf import GRCSF
from ..networks.mae import MaskedAutoencoder
from ..networks.plain import has_hooks
from ..networks.residual_maps import residual_maps
from ..networks.stream import Stage, Stream
from ..networks.unit_maps import unit_maps
from ..networks.whole_volume import reconstruction_stage, segmentation_stage
from ..networks.windows import OVERLAP
from ..ops.backends import select_backend, use_backend
from ..pretrained.bundle import Bundle, BundleError, check_channels, check_is_bundle, load_bundle
from ..runtime.precision import PRECISIONS, Choice, choose_device, choose_precision, measured_choice
from ..runtime.versions import versions
from .compiled import CompiledNetwork
from .graphs import CudaCapture, Graphs

__all__ = ["Model"]


class Model:
    """What cases are computed with; arguments and errors as for :class:`grcsf_fast.Predictor`."""

    def __init__(
        self,
        bundle: Bundle | str | Path,
        device: str | torch.device = "auto",
        backend: str = "auto",
        batch_size: int = 16,
        progress: bool = False,
        precision: str = "auto",
        importance_threshold: float | None = None,
        compiled: bool = False,
    ) -> None:
        bundle = load_bundle(bundle) if isinstance(bundle, str | Path) else bundle
        check_is_bundle(bundle, ", or its folder or name")
        if bundle.network is None:
            raise BundleError("bundle: expected a segmentation network, found an autoencoder alone; run train first")
        if bundle.network.rcu and bundle.network.requires_maps and bundle.mae is None:
            raise BundleError("bundle: its network was trained with residual maps, and it holds no autoencoder")
        check_channels(bundle)
        if batch_size < 1:
            raise ArgumentError(f"batch_size: expected 1 or more, got {batch_size}")
        if importance_threshold is not None and not 0 <= importance_threshold <= 1:
            raise ArgumentError(f"importance_threshold: expected a number in [0, 1], got {importance_threshold}")
        self.bundle = bundle
        self.in_channels = len(bundle.channels)
        self.device = choose_device(device)
        self.backend = backend
        self.batch_size = batch_size
        self.progress = progress
        choice = choose_precision(precision, self.device, lambda: self._measured(compiled))
        self.precision, self.precision_reason = choice.precision, choice.reason
        self._hashes = bundle.hashes()  # networks may have been trained on since they were read
        self.network, self.mae = self._networks(self.precision, compiled)
        if importance_threshold is not None:
            self.network.importance_threshold = importance_threshold
        self.compiled = CompiledNetwork(self.network) if compiled else None
        self._graphs = Graphs(CudaCapture(self.device)) if self.device.type == "cuda" else None

    def settings(self) -> dict[str, Any]:
        """What decides a result beside the input: two runs with equal settings on one machine give the same files."""
        with self.on_backend():
            backend = select_backend(self.network.output.weight)
        bundle = self.bundle
        settings = {
            "version": versions()["grcsf-fast"],
            **self._hashes,
            "preprocessing": bundle.preprocessing.as_json(),
            "residual_maps": asdict(bundle.residual_maps),
            "network": self.network.config,
            "mae": None if self.mae is None else self.mae.config,
            "roi_size": bundle.roi_size,
            "probability_threshold": bundle.probability_threshold,
            "hysteresis_threshold": bundle.hysteresis_threshold,
            **({"above_hu": bundle.above_hu} if bundle.above_hu is not None else {}),
            "importance_threshold": self.network.importance_threshold,
            "tta_flip": bundle.tta_flip,
            "tta_scales": bundle.tta_scales,
            **({"channels": bundle.channels} if len(bundle.channels) > 1 else {}),
            **({"labels": asdict(bundle.labels)} if bundle.labels is not None else {}),
            "precision": self.precision,
            "batch_size": self.batch_size,
            "compiled": self.compiled is not None,
            "device": self.device.type,
            "backend": backend,
            # Which PyTorch computes float32's convolutions in, unless it is told otherwise.
            **({"tf32": _tf32()} if self.device.type == "cuda" else {}),
        }
        return json.loads(json.dumps(settings))  # as a report on disk has it

    def bytes_needed(self, source: Any) -> int:
        """About how much memory a case takes at its peak, see :func:`grcsf_fast.data.volumes.bytes_needed`.

        Of all ways of seeing a volume those of one scale are there at once: of a 2-D network what was found in its
        slices, which are made batch by batch; of a 3-D one the images too, with one more copy while they are made.
        """
        network, bundle = self.network, self.bundle
        maps = len(network.mask_ratios) if network.rcu else 0
        found, views = network.out_channels + len(unit_maps(network)), 1 + bundle.tta_flip
        if network.spatial_dims == 2:
            ways = maps + (1 + views) * found
        else:
            windows = 1.0 if bundle.roi_size is None else (1 - OVERLAP) ** -3
            ways = (network.seen_channels + maps + found) * (1 + views) * max(bundle.tta_scales) ** 3 * windows
        return image_bytes(source, bundle.preprocessing, 4 * (ways + 2 * self.in_channels + 8))

    def on_backend(self) -> AbstractContextManager[None]:
        """``"auto"`` leaves the choice to the environment variable and to an outer :func:`use_backend`."""
        return nullcontext() if self.backend == "auto" else use_backend(self.backend)

    def stream(self) -> Stream:
        """A new stream of batches through the networks; for one thread, that is :meth:`on_backend`."""
        return Stream(self.stages())

    def stages(self) -> dict[str, Stage]:
        """The stages of a stream, as they are when they are asked for; within :meth:`on_backend`.

        On a GPU batches are replayed, unless somebody has hooked into the networks: a replay runs nothing of Python's.
        """
        stages = segmentation_stage(
            self.network, self.batch_size, self.bundle.roi_size, self.compiled, self.in_channels, self.bundle.labels
        )
        if self.mae is not None:
            stages |= reconstruction_stage(
                self.mae, self.network.spatial_dims, self.batch_size, self.bundle.residual_maps, self.in_channels
            )
        networks = [self.network] if self.mae is None else [self.network, self.mae]
        modules = [module for network in networks for module in network.modules()]
        if self._graphs is not None and not any(map(has_hooks, modules)):
            weights = tuple(one.data_ptr() for part in networks for one in (*part.parameters(), *part.buffers()))
            threshold, backend = self.network.importance_threshold, select_backend(self.network.output.weight)
            for name, stage in stages.items():
                run = self._graphs.replayed(stage.run, (name, threshold, backend, weights))
                stages[name] = stage._replace(run=run)
        return stages

    def _networks(self, precision: str, compiled: bool) -> tuple[GRCSF, MaskedAutoencoder | None]:
        """Copies of the bundle's networks as they run in a precision."""
        dtype = PRECISIONS[precision]
        network = self.bundle.network
        if self.device.type != "cpu":
            network = copy.deepcopy(network).to(self.device)
        with self.on_backend():
            # A compiler knows more about convolutions that it can see.
            network = network.optimized_for_inference(dtype, fused=False if compiled else None)
        mae = self.bundle.mae if network.rcu else None
        return network, None if mae is None else copy.deepcopy(mae).to(self.device, dtype).eval()

    def _measured(self, compiled: bool) -> Choice:
        """The faster precision for these networks; of compiled ones that of the plain ones counts.

        On as many pixels as a batch of a head has: on few of them bfloat16 gains less.
        """
        residual, mae = self.bundle.residual_maps, self.bundle.mae
        flat = self.bundle.network.spatial_dims == 2
        edge = 96 if flat else 48
        if mae is not None:
            # Enough patches for every ratio.
            edge = max(edge, mae.patch_size * math.ceil(1 / (1 - max(residual.mask_ratios))))
        batch = min(self.batch_size, 8 if flat else 1)
        shape = (batch, self.in_channels, *[edge] * self.bundle.network.spatial_dims)
        image = torch.linspace(-2, 2, math.prod(shape), device=self.device).reshape(shape)
        networks: dict[torch.dtype, Any] = {}

        @torch.no_grad()
        def run(dtype: torch.dtype) -> None:
            if dtype not in networks:
                networks[dtype] = self._networks(str(dtype).removeprefix("torch."), compiled)
            network, mae = networks[dtype]
            maps = None
            if mae is not None:
                maps = residual_maps(image, mae, **asdict(residual)).to(network.dtype)
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
                "image": shape,
            }
            return measured_choice(subject, run)


def _tf32() -> bool:
    """PyTorch's older setting raises where somebody has used the newer ones, which came with 2.9."""
    convolutions = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if convolutions is None else convolutions.fp32_precision == "tf32"
