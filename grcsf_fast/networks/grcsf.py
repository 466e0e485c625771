"""The GRCSF network: a U-shaped backbone with global and regional compensation."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..functional.internal import kernels_for_inference, require_kernels
from ..runtime.dtypes import accumulation_dtype
from . import unet, weights
from .adapted import adapted, threshold_now
from .arguments import (
    KINDS_OF_NETWORK,
    check_device,
    check_dtype,
    check_maps,
    check_tensor,
    checked_config,
    checked_levels,
)  # fmt: skip
from .fast_layers import replace_convolutions
from .gcu import GCU_FORMS, compensate
from .mae import MaskedAutoencoder
from .plain import is_plain, unwrapped
from .rcu import RegionCompensationUnit
from .residual_maps import check_mae
from .residual_maps import residual_maps as compute_residual_maps
from .slices import check_neighbours, stack_slices
from .unet import Downsample, JoinedStage, LikeWeights, conv, conv_stage, crop_to, pad_to_multiple, transposed_conv

__all__ = ["GRCSF", "CompensationMaps"]


class CompensationMaps(NamedTuple):
    """What the two units saw, for looking at and for the score loss.

    Attributes:
        gcu_residuals: by level, ``1 - cosine`` of the GCU, (B, 1, \\*S/2^level).
        patch_scores: by level, importance of each patch, (B, 1, \\*S/2^level/p), in [0, 1].
        residual_maps: (B, M, \\*S), as given, as computed by the network's own autoencoder, or blank; None without RCU.
    """

    gcu_residuals: dict[int, Tensor]
    patch_scores: dict[int, Tensor]
    residual_maps: Tensor | None


class GRCSF(nn.Module):
    """Lesion segmentation with global and regional feature compensation; a drop-in for any segmentation network.

    Without residual maps and an autoencoder the maps count as blank (0 everywhere): where the RCU brought something,
    most of it came without maps (docs/results/units.md), so a network trained that way is a sensible one. A network
    that was trained with maps must not run without them unnoticed. So training with maps sets :attr:`requires_maps`,
    and from then on a call without them is an error, also after :meth:`save_pretrained` or in a bundle. A bare state
    dict and a copy made before, such as a moving average's, do not carry it: pass ``requires_maps=True`` to those.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the logits.
        features: channels of each stage; its length less one is the number of downsamplings.
        patch_size: edge of an RCU patch in pixels of its level; None: 8 in 2-D, 4 in 3-D.
        residual_channels: R of the RCU.
        num_heads: attention heads of the RCU.
        rcu_levels: decoder levels with an RCU, 0 being full resolution; empty: no RCU, no residual maps needed; None:
            0, 1 and 2, as far as there are.
        mask_ratios: masking ratios of the residual maps; their number is M.
        mae: the network's own autoencoder, asked for residual maps that the caller does not pass. It is frozen
            (no gradients) and becomes part of the state dict.
        gcu: with the Global Compensation Unit on every skip connection, or without.
        downsample: ``"conv"``, ``"avg"`` or ``"max"``, between the stages.
        importance_threshold: in evaluation mode, RCU patches scored below it are skipped.
        requires_maps: a call without residual maps and autoencoder is an error; False: the maps count as blank.
        gcu_form: ``"difference"``, what :class:`GlobalCompensationUnit` does, or ``"scale"``, that of old bundles.
        neighbours: slices on either side of the one that is segmented, which the network sees as further channels, see
            :meth:`stack`; in 2-D.
        residual_map_settings: how its own autoencoder makes them, see :class:`ResidualMapSettings`; None: the defaults.

    Attributes:
        seen_channels: those that the first convolution takes: of the image and its neighbours.

    Raises:
        ArgumentError, ArgumentTypeError: an argument that does not fit; the message names it.

    Example:
        >>> model = GRCSF(spatial_dims=2, in_channels=1, out_channels=1)
        >>> model(torch.zeros(1, 1, 50, 61)).shape
        torch.Size([1, 1, 50, 61])

    Source: paper; the backbone's details are our decisions, see docs/explanation/paper.md.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (32, 64, 128, 256, 512),
        patch_size: int | None = None,
        residual_channels: int = 16,
        num_heads: int = 2,
        rcu_levels: Sequence[int] | None = None,
        mask_ratios: Sequence[float] = (0.5, 0.75),
        mae: MaskedAutoencoder | None = None,
        gcu: bool = True,
        downsample: str = "max",
        importance_threshold: float = 0.0,
        requires_maps: bool = False,
        gcu_form: str = "difference",
        neighbours: int = 0,
        residual_map_settings: weights.ResidualMapSettings | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        features, rcu_levels = checked_levels(features, rcu_levels)
        if patch_size is None:
            patch_size = 8 if spatial_dims == 2 else 4
        # The arguments that rebuild the network, the autoencoder apart; bundles store them.
        self.config = checked_config(
            KINDS_OF_NETWORK, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels,
            features=features, patch_size=patch_size, residual_channels=residual_channels, num_heads=num_heads,
            rcu_levels=rcu_levels, mask_ratios=mask_ratios, gcu=gcu, downsample=downsample,
            importance_threshold=importance_threshold, requires_maps=requires_maps, gcu_form=gcu_form,
            neighbours=neighbours,
        )  # fmt: skip
        (
            spatial_dims, in_channels, out_channels, features, patch_size, residual_channels, num_heads, rcu_levels,
            mask_ratios, gcu, downsample, importance_threshold, requires_maps, gcu_form, neighbours,
        ) = self.config.values()  # fmt: skip
        if gcu_form not in GCU_FORMS:
            raise ArgumentError(f"gcu_form: expected one of {tuple(GCU_FORMS)}, got {gcu_form!r}")
        check_neighbours(neighbours, spatial_dims)
        depth = len(features) - 1
        if rcu_levels and not mask_ratios:
            raise ArgumentError("mask_ratios: expected at least one, got none")
        if mae is not None:
            check_mae(mae, (spatial_dims, in_channels))
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.neighbours = neighbours
        self.seen_channels = in_channels * (2 * neighbours + 1)
        self.out_channels = out_channels
        self.mask_ratios = tuple(mask_ratios)
        self.residual_map_settings = weights.as_map_settings(residual_map_settings, self.mask_ratios)
        self.depth = depth
        # The padded size suits every downsampling and every RCU patch, and leaves 2 pixels at the bottleneck,
        # without which an instance norm has no variance to divide by.
        self.multiple = math.lcm(2**depth, *(patch_size * 2**level for level in rcu_levels))
        self.minimum = 2 ** (depth + 1)

        self.encoder = nn.ModuleList()
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        self.gcu = nn.ModuleList()
        previous = self.seen_channels
        for level, channels in enumerate(features):
            self.encoder.append(conv_stage(spatial_dims, previous, channels))
            previous = channels
            if level < depth:
                self.down.append(Downsample(spatial_dims, channels, downsample, mean=gcu and gcu_form == "difference"))
                self.up.append(transposed_conv(spatial_dims, features[level + 1], channels))
                self.decoder.append(JoinedStage(*conv_stage(spatial_dims, 2 * channels, channels)))
                if gcu:
                    self.gcu.append(GCU_FORMS[gcu_form](channels))
        self.rcu = nn.ModuleDict({
            str(level): RegionCompensationUnit(
                spatial_dims, features[level], features[-1], len(mask_ratios), level, residual_channels, num_heads,
                patch_size,
            )
            for level in rcu_levels
        })  # fmt: skip
        self.output = conv(spatial_dims, features[0], out_channels, kernel=1)
        self.mae = mae.requires_grad_(False) if mae is not None else None

    def requires_grad_(self, requires_grad: bool = True) -> GRCSF:
        """As of every module, but that its own autoencoder stays frozen."""
        super().requires_grad_(requires_grad)
        if self.mae is not None:
            self.mae.requires_grad_(False)
        return self

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, *, in_channels: int | None = None, out_channels: int | None = None
    ) -> GRCSF:
        """A trained network, with its autoencoder if it was trained with one, so that ``network(image)`` is enough.

        Args:
            name_or_folder: folder of :meth:`save_pretrained` or of a bundle, or the name of a bundle in the package.
                The bundle's preprocessing is not applied: :class:`grcsf_fast.Predictor` segments volumes.
            in_channels: to train on with another number. Of the first channels the weights are those that were
                trained, of further ones 0; its autoencoder stays with the channels that it knows, and is left out.
            out_channels: to train on with another number; the last convolution is a new one, of random weights.

        Returns:
            The network in evaluation mode, float32, on the CPU. With another number of channels or outputs its
            ``importance_threshold`` is 0: it was chosen for the weights as they were.

        Raises:
            FileNotFoundError: no such folder, or a file of it is missing.
            BundleError: files that cannot be used, or an autoencoder alone.
            ArgumentError: numbers below 1.

        Example:
            >>> model = GRCSF.from_pretrained("demo")
            >>> model(torch.zeros(1, 1, 64, 64)).shape
            torch.Size([1, 1, 64, 64])
        """
        folder = weights.find_folder(name_or_folder)
        config = weights.read_config(folder)
        loaded = weights.load_networks(folder, config, {"network": cls, "mae": MaskedAutoencoder})
        network, mae = loaded["network"], loaded["mae"]
        if network is None:
            raise weights.BundleError(f"{folder}: expected a segmentation network, found an autoencoder alone")
        network.residual_map_settings = weights.map_settings(folder, config)
        if in_channels is not None or out_channels is not None:
            sizes = (network.in_channels, in_channels), (network.out_channels, out_channels)
            network = adapted(network, *(own if given is None else given for own, given in sizes))
        if mae is not None and mae.in_channels == network.in_channels:
            network.mae = mae.requires_grad_(False)
        return network

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the network and its own autoencoder, if it has one, for :meth:`from_pretrained`.

        Args:
            folder: where to; older weights are replaced only when the new ones are complete.
            dtype: float64, float32, bfloat16 or float16, in which weights are stored; loading gives float32.

        Returns:
            The folder, with ``config.json`` and ``model.safetensors``.

        Raises:
            ArgumentError: the folder holds something else than weights, which would be lost, or the network has other
                layers than ``config`` describes, and could not be loaded.
            OSError: the folder cannot be written.
        """
        settings = {"residual_maps": asdict(self.residual_map_settings)}
        return weights.save_networks(folder, {"network": self, "mae": unwrapped(self.mae)}, settings, dtype)

    def optimized_for_inference(self, dtype: torch.dtype | None = None, fused: bool | None = None) -> GRCSF:
        """A copy for inference alone: in another dtype, on a processor with its wide convolutions transformed.

        Transformed convolutions (Winograd's F(4x4, 3x3)) take a quarter of the multiplications and run by the C++
        kernels; they no longer have weights, so the copy can neither be trained nor saved, and no other backend runs
        it. They stay in full precision whatever ``dtype``, as do the first convolution and its norm: rounding the image
        would lose what its small differences say. On a GPU the biases that the next norm takes away again are left
        out, and such a copy cannot be saved either. Convolutions with hooks or adapters stay as they are. Results
        differ from the network's own by rounding.

        Args:
            dtype: of the other weights; None: their own.
            fused: with transformed convolutions; None: where the C++ kernels serve the weights.

        Returns:
            The copy, in evaluation mode, its weights without gradients; this network stays as it is.

        Raises:
            BackendUnavailableError: ``fused``, and the kernels are not built.
            ValueError: ``fused``, and weights elsewhere than on the CPU.

        Example:
            >>> import torch
            >>> model = GRCSF(2, 1, 1, rcu_levels=()).optimized_for_inference()
            >>> model(torch.zeros(1, 1, 50, 61)).shape
            torch.Size([1, 1, 50, 61])
        """
        if fused:
            require_kernels(self.parameters())
        fused = kernels_for_inference(self._weight, dtype) if fused is None else fused
        network = copy.deepcopy(self).requires_grad_(False).eval()
        if fused and dtype is not None:
            network.to(accumulation_dtype(dtype))  # of transformed filters
        if fused:
            entrance = network.encoder[0][0]
            replace_convolutions(network)
            network.encoder[0][0] = entrance
        elif self._weight.device.type == "cuda":
            unet.drop_cancelled_biases(network)
        return network if dtype is None else network._lowered(dtype)

    def _lowered(self, dtype: torch.dtype) -> GRCSF:
        """This network with its weights in another dtype, but for the first convolution and its norm."""
        entrance = copy.deepcopy(self.encoder[0][:2])
        self.to(dtype)
        lower = dtype in (torch.float16, torch.bfloat16)
        if lower:
            self.encoder[0][0], self.encoder[0][1] = entrance
        # In the place of an identity, so that the stage stays one module.
        self.encoder[0][2] = LikeWeights(self.dtype, entrance[1].weight.device) if lower else nn.Identity()
        return self

    def forward(
        self, image: Tensor, residual_maps: Tensor | None = None, return_maps: bool = False
    ) -> Tensor | tuple[Tensor, CompensationMaps]:
        """Segment a batch of images.

        Args:
            image: (B, in_channels, \\*S), any size from 1 pixel up and any B, 0 included; of the weights' dtype, or of
                one that autocast converts. NaN in a pixel makes the logits of its image NaN. With ``neighbours``
                (B, seen_channels, \\*S) from :meth:`stack`; an image alone counts as its own neighbours.
            residual_maps: (B, M, \\*S), any floating-point dtype, from :func:`grcsf_fast.residual_maps` with the
                network's ``residual_map_settings``; None: the network's own autoencoder computes them of the image
                without its neighbours, or they are blank. Ignored by a network without RCU.
            return_maps: also return what the units saw.

        Returns:
            logits (B, out_channels, \\*S); with ``return_maps`` a pair of them and :class:`CompensationMaps`. An image
            of a subclass, as MONAI's ``MetaTensor``, gives logits of that subclass.

        Raises:
            ArgumentTypeError: no tensor (a NumPy array, say), integers, or another dtype than the weights have.
            ArgumentError: shapes or devices that do not fit, or required residual maps that are neither given nor
                computable; a ValueError.
        """
        self._check_image(image)
        shape = image.shape[2:]
        maps = self._residual_maps(image, residual_maps) if self.rcu else None

        seen = image if image.shape[1] == self.seen_channels else image.repeat(1, 2 * self.neighbours + 1, 1, 1)
        x = pad_to_multiple(seen, self.multiple, self.minimum)
        skips: list[Tensor] = []
        coarse: list[Tensor] = []
        for level in range(self.depth):
            skips.append(self.encoder[level](x))
            x, low = self.down[level](skips[level])
            coarse.append(low)
        gcu_residuals: dict[int, Tensor] = {}
        if self.gcu:
            for level, pair in enumerate(compensate(self.gcu, skips, coarse)):
                skips[level], gcu_residuals[level] = pair
        x = self.encoder[self.depth](x)

        context = x.flatten(2).mean(2)
        padded_maps = pad_to_multiple(maps, self.multiple, self.minimum) if maps is not None else None
        scores: dict[int, Tensor] = {}
        threshold = threshold_now(self, x)
        for level in reversed(range(self.depth)):
            x = self.decoder[level](self.up[level](x), skips[level])
            if str(level) in self.rcu:
                x, scores[level] = self.rcu[str(level)](x, padded_maps, context, threshold)
        logits = crop_to(self.output(x), shape)
        if not return_maps:
            return logits
        return logits, self._cropped_maps(shape, gcu_residuals, scores, maps)

    def stack(self, volume: Tensor, slices: Tensor) -> Tensor:
        """What a 2-D network sees of axial slices of a volume: them and their neighbours.

        Args:
            volume: (X, Y, Z), or (C, X, Y, Z) of several channels.
            slices: (N,) int64, their numbers.

        Returns:
            (N, seen_channels, X, Y), and errors, see :func:`grcsf_fast.networks.slices.stack_slices`.
        """
        return stack_slices(volume, slices, self.neighbours)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights behind the first convolution."""
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        """One that no kernel and no adapter replaces."""
        return next(self.decoder[0].parameters())

    @property
    def requires_maps(self) -> bool:
        """Whether a call without residual maps and autoencoder is an error; training with maps sets it."""
        return self.config["requires_maps"]

    @requires_maps.setter
    def requires_maps(self, requires_maps: bool) -> None:
        self.config |= checked_config(KINDS_OF_NETWORK, requires_maps=requires_maps)

    @property
    def importance_threshold(self) -> float:
        """In evaluation mode, RCU patches scored below it are skipped.

        Raises:
            ValueError: set to something else than a number in [0, 1].
        """
        return self.config["importance_threshold"]

    @importance_threshold.setter
    def importance_threshold(self, importance_threshold: float) -> None:
        self.config |= checked_config(KINDS_OF_NETWORK, importance_threshold=importance_threshold)

    def _check_image(self, image: object) -> None:
        expected = " or ".join(map(str, sorted({self.in_channels, self.seen_channels})))
        check_tensor("image", image, f"(B,{expected},{'H,W' if self.spatial_dims == 2 else 'X,Y,Z'})")
        if image.dim() != 2 + self.spatial_dims or image.shape[1] not in (self.in_channels, self.seen_channels):
            raise ArgumentError(
                f"image: expected (B,{expected}) and {self.spatial_dims} spatial axes, got {tuple(image.shape)}"
            )
        stage = self.encoder[0]
        first = stage[0] if isinstance(stage, nn.Sequential) else stage  # which a compiler may have wrapped
        # Hooks and adapters may move and convert weights and images.
        if is_plain(first, *unet.CONVOLUTIONS):
            check_device("image", image, "the network", first.weight)
            check_dtype("image", image, "the network", (first.weight.dtype,))

    def _residual_maps(self, image: Tensor, given: Tensor | None) -> Tensor:
        if given is None and self.mae is None:
            if self.requires_maps:
                raise ArgumentError(
                    "residual_maps: this network was trained with them and has no autoencoder of its own; pass "
                    "residual_maps=grcsf_fast.residual_maps(image, mae, **asdict(network.residual_map_settings)), or "
                    "build it with GRCSF(..., mae=mae)"
                )
            return torch.zeros(
                (image.shape[0], len(self.mask_ratios), *image.shape[2:]), dtype=image.dtype, device=image.device
            )
        if self.training and not self.requires_maps:
            self.requires_maps = True
        if given is None:
            return compute_residual_maps(image[:, : self.in_channels], self.mae, **asdict(self.residual_map_settings))
        check_maps(given, image, len(self.mask_ratios))
        return given

    def _cropped_maps(
        self, shape: torch.Size, gcu_residuals: dict[int, Tensor], scores: dict[int, Tensor], maps: Tensor | None
    ) -> CompensationMaps:
        def crop(tensor: Tensor, step: int) -> Tensor:
            return crop_to(tensor, [-(-size // step) for size in shape])

        return CompensationMaps(
            {level: crop(residual, 2**level) for level, residual in gcu_residuals.items()},
            {level: crop(score, self.rcu[str(level)].patch_size * 2**level) for level, score in scores.items()},
            maps,
        )
