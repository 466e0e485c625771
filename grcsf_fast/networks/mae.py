"""Masked autoencoder: reconstructs an image from a part of its patches."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ArgumentTypeError
from ..runtime.patches import from_patches, to_patches
from . import weights
from .arguments import KINDS_OF_MAE, check_device, check_dtype, check_tensor, checked_config, checked_edges
from .slices import check_neighbours, stack_slices
from .transformer import CrossBlock, TransformerBlock, pick_tokens, sincos_positions

__all__ = ["MaskedAutoencoder"]

# The unit of the distance from the top of the head: about half a head at 2 mm.
TOP_SLICES = 40
# Lesions are few: without a weight their part in the loss would hardly count. Our choice.
RESTORE_WEIGHT = 40


def _check_indices(name: str, index: Tensor, batch: int | None = None) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise ArgumentTypeError(f"{name}: expected an int64 torch.Tensor, indices of patches, got {kind}")
    if index.dim() != 2 or (batch is not None and index.shape[0] != batch):
        of = "masking" if batch is None else f"image, {batch} of them"
        raise ArgumentError(f"{name}: expected a row of indices per {of}, got {tuple(index.shape)}")


class MaskedAutoencoder(nn.Module):
    """A vision transformer on the visible patches and a light decoder that draws the hidden ones.

    With ``neighbours`` it sees more than the slice that it draws: the slices below and above it, of which the same
    patches are hidden, and how far it is from the top of the head. See :meth:`stack`.

    Args:
        spatial_dims: 2 (slices) or 3 (volumes).
        in_channels: C of the image.
        patch_size: edge of a patch in pixels.
        embed_dim: width of the encoder.
        depth: blocks of the encoder.
        num_heads: attention heads of the encoder; divides ``embed_dim``.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder; divides ``decoder_dim``.
        mlp_ratio: hidden width of the MLPs over the block's width.
        norm_target: predict each patch normalised by its own mean and standard deviation. What is drawn has those of
            the image then, so that a residual map shows no patch as darker or brighter than expected: for pretraining,
            and not among the options of ``train-mae``, which trains for residual maps.
        neighbours: slices on either side that it sees; in 2-D.
        decoder: ``"cross"``: hidden patches look at the visible ones alone; ``"self"``: at all, that of old bundles.
        restore: it also says how the visible patches would look in a healthy head, from which residual maps are then
            made: for a training with healthy twins.
        image_size: edges in pixels of the largest images that it was trained on. Places of patches are counted from
            the middle, so those of larger images are strange to it: :func:`grcsf_fast.residual_maps` makes the maps
            of these in overlapping windows. None, as of old bundles: of any image at once.

    Raises:
        ArgumentError: an argument that does not fit; the message names it.

    Source: paper (a masked autoencoder with ratios 50 % and 75 %); sizes and centred positions are our decisions.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        patch_size: int = 8,
        embed_dim: int = 192,
        depth: int = 6,
        num_heads: int = 6,
        decoder_dim: int = 128,
        decoder_depth: int = 2,
        decoder_num_heads: int = 4,
        mlp_ratio: float = 4.0,
        norm_target: bool = False,
        neighbours: int = 0,
        decoder: str = "cross",
        restore: bool = False,
        image_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        # The arguments that rebuild the network; bundles store them.
        self.config = checked_config(
            KINDS_OF_MAE, spatial_dims=spatial_dims, in_channels=in_channels, patch_size=patch_size,
            embed_dim=embed_dim, depth=depth, num_heads=num_heads, decoder_dim=decoder_dim,
            decoder_depth=decoder_depth, decoder_num_heads=decoder_num_heads, mlp_ratio=mlp_ratio,
            norm_target=norm_target, neighbours=neighbours, decoder=decoder, restore=restore,
        )  # fmt: skip
        (
            spatial_dims, in_channels, patch_size, embed_dim, depth, num_heads, decoder_dim, decoder_depth,
            decoder_num_heads, mlp_ratio, norm_target, neighbours, decoder, restore,
        ) = self.config.values()  # fmt: skip
        for name, dim, heads in (
            ("embed_dim", embed_dim, num_heads),
            ("decoder_dim", decoder_dim, decoder_num_heads),
        ):
            if dim % heads or dim < 2 * spatial_dims:
                raise ArgumentError(
                    f"{name}: expected a multiple of its {heads} heads and >= {2 * spatial_dims}, got {dim}"
                )
        check_neighbours(neighbours, spatial_dims)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.norm_target = norm_target
        self.neighbours = neighbours
        self.image_size = image_size
        # The image, its neighbours, and a plane that says how far from the top it is.
        self.seen_channels = in_channels * (2 * neighbours + 1) + int(neighbours > 0)
        tokens = patch_size**spatial_dims
        self.values = in_channels * tokens  # of a patch that is drawn
        self.embed = nn.Linear(self.seen_channels * tokens, embed_dim)
        self.blocks = nn.ModuleList(TransformerBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.to_decoder = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(decoder_dim) * 0.02)
        block = CrossBlock if decoder == "cross" else TransformerBlock
        self.decoder_blocks = nn.ModuleList(
            block(decoder_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.predict = nn.Linear(decoder_dim, self.values)
        self.change = nn.Linear(embed_dim, self.values) if restore else None
        if self.change is not None:
            nn.init.zeros_(self.change.weight)
            nn.init.zeros_(self.change.bias)

    @property
    def image_size(self) -> tuple[int, ...] | None:
        edges = self.config.get("image_size")
        return None if edges is None else tuple(edges)

    @image_size.setter
    def image_size(self, edges: Sequence[int] | None) -> None:
        self.config.pop("image_size", None)  # which the autoencoders of before do not have
        if edges is not None:
            self.config["image_size"] = checked_edges("image_size", edges, self.spatial_dims, self.patch_size)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> MaskedAutoencoder:
        """The autoencoder of a folder of weights, a bundle's or one of :meth:`save_pretrained`.

        Args:
            name_or_folder: a folder, or the name of a bundle in the package (``"demo"``).

        Returns:
            The autoencoder in evaluation mode, float32, on the CPU.

        Raises:
            FileNotFoundError: no such folder, or a file of it is missing.
            BundleError: files that cannot be used, or no autoencoder in them.
        """
        folder = weights.find_folder(name_or_folder)
        mae = weights.load_networks(folder, weights.read_config(folder), {"mae": cls})["mae"]
        if mae is None:
            raise weights.BundleError(f"{folder}: expected an autoencoder, found a network without one")
        return mae

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the autoencoder for :meth:`from_pretrained`; arguments and errors as of the network's method."""
        settings = {"residual_maps": asdict(weights.ResidualMapSettings())}
        return weights.save_networks(folder, {"network": None, "mae": self}, settings, dtype)

    def grid(self, spatial_shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
        """Patches along each axis.

        Raises:
            ArgumentError: another number of axes than ``spatial_dims``, or an axis that is no multiple of the patch.
        """
        if len(spatial_shape) != self.spatial_dims or any(size % self.patch_size for size in spatial_shape):
            raise ArgumentError(
                f"image: expected {self.spatial_dims} spatial axes, each a multiple of the patch size "
                f"{self.patch_size}, got {tuple(spatial_shape)}"
            )
        # Numbers even where a compiler's or exporter's sizes are symbols: positions and masks are for one size.
        return tuple(operator.index(size) // self.patch_size for size in spatial_shape)

    @property
    def restores(self) -> bool:
        """Whether residual maps are image minus healthy head, see ``restore``."""
        return self.change is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.mask_token.dtype

    def check_image(self, image: object) -> None:
        """Refuse what is no tensor, is on another device or of another dtype than float32 and that of the weights.

        Raises:
            ArgumentTypeError: no tensor, or of another dtype.
            ArgumentError: on another device.
        """
        letters = "(B,C,H,W)" if self.spatial_dims == 2 else "(B,C,X,Y,Z)"
        check_tensor("image", image, letters)
        check_device("image", image, "the autoencoder", self.mask_token)
        check_dtype("image", image, "the autoencoder", (self.dtype, torch.float32))

    def _checked_image(self, image: Tensor) -> tuple[int, ...]:
        self.check_image(image)
        grid = self.grid(image.shape[2:])
        if image.shape[1] != self.seen_channels:
            raise ArgumentError(f"image: expected {self.seen_channels} channels, got {image.shape[1]}")
        return grid

    def _checked_grid(self, image: Tensor, visible: Tensor) -> tuple[int, ...]:
        grid = self._checked_image(image)
        _check_indices("visible", visible, image.shape[0])
        return grid

    def stack(self, volume: Tensor, slices: Tensor) -> Tensor:
        """What the autoencoder sees of axial slices of a volume.

        Args:
            volume: (X, Y, Z), its last slice the top of the head; (C, X, Y, Z) of several channels.
            slices: (N,) int64, their numbers.

        Returns:
            (N, seen_channels, X, Y): the slice, its neighbours (:func:`grcsf_fast.networks.slices.stack_slices`)
            and a plane of its distance from the top in units of ``TOP_SLICES``; without ``neighbours`` the slice.
        """
        seen = stack_slices(volume, slices, self.neighbours)
        if not self.neighbours:
            return seen
        below_top = (volume.shape[-1] - 1 - slices).to(volume.dtype) / TOP_SLICES
        return torch.cat([seen, below_top[:, None, None, None].expand(-1, 1, *seen.shape[2:])], 1)

    def alone(self, image: Tensor) -> Tensor:
        """An image without its neighbours as the autoencoder sees it: they count as equal, the distance as 1.

        (B, in_channels, \\*S) -> (B, seen_channels, \\*S).
        """
        if not self.neighbours:
            return image
        return torch.cat([image.repeat(1, 2 * self.neighbours + 1, 1, 1), torch.ones_like(image[:, :1])], 1)

    def patchify(self, image: Tensor) -> Tensor:
        """(B, C, \\*S) -> (B, P, C * p^dims), for any C; those of the image itself come first."""
        patches = to_patches(image, self.patch_size, self.spatial_dims)  # (B,C,P,T)
        return patches.transpose(1, 2).flatten(2)

    def unpatchify(self, patches: Tensor, spatial_shape: tuple[int, ...] | torch.Size) -> Tensor:
        """(B, P, C * p^dims) -> (B, C, \\*S)."""
        split = patches.unflatten(2, (self.in_channels, -1)).transpose(1, 2)
        return from_patches(split, self.patch_size, tuple(spatial_shape))

    def predict_patches(
        self, patches: Tensor, visible: Tensor, grid: tuple[int, ...], wanted: Tensor | None = None
    ) -> Tensor:
        """Predictions from the visible patches alone, normalised ones with ``norm_target``.

        Args:
            patches: (B, P, values).
            visible: (B, V) int64, indices of the visible patches.
            grid: patches along each axis.
            wanted: (B, W) int64, indices of the patches to predict; None: all.

        Returns:
            (B, P, values), or (B, W, values).
        """
        return self._draw(self._encode(patches, visible, grid), visible, grid, wanted)

    def _encode(self, patches: Tensor, visible: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, P, values) -> (B, V, embed_dim): what is known of the visible patches."""
        positions = sincos_positions(grid, self.embed_dim, patches.device)
        tokens = self.embed(pick_tokens(patches, visible))
        return self._related(tokens + positions[visible].to(tokens.dtype))

    def _related(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def _of_maskings(
        self, image: Tensor, visible: Sequence[Tensor], wanted: Sequence[Tensor] | None, grid: tuple[int, ...]
    ) -> list[Tensor]:
        """What :meth:`forward` makes of maskings: what is done to a patch alone is done once for all of them."""
        patches = self.patchify(image)
        tokens = self.embed(patches.to(self.dtype))
        tokens = tokens + sincos_positions(grid, self.embed_dim, patches.device).to(tokens.dtype)
        patches = patches[..., : self.values]
        found = []
        for number, shown in enumerate(visible):
            shape = (patches.shape[0], shown.shape[0])
            encoded = self._related(tokens[:, shown].flatten(0, 1))
            if wanted is None:
                healthy = patches[:, shown] + self._changes(encoded).unflatten(0, shape).to(patches.dtype)
                found.append(healthy)
                continue
            rows, drawn_rows = (one.repeat(patches.shape[0], 1) for one in (shown, wanted[number]))
            drawn = self._draw(encoded, rows, grid, drawn_rows).unflatten(0, shape).to(patches.dtype)
            if self.norm_target:
                mean, deviation = self._patch_statistics(patches)
                drawn = drawn * deviation[:, wanted[number]] + mean[:, wanted[number]]
            found.append(drawn)
        return found

    def _changes(self, tokens: Tensor) -> Tensor:
        if self.change is None:
            raise ArgumentError("restored: expected an autoencoder that restores (restore=True), got one that does not")
        return self.change(tokens)

    def _draw(self, tokens: Tensor, visible: Tensor, grid: tuple[int, ...], wanted: Tensor | None) -> Tensor:
        batch, count, device = tokens.shape[0], math.prod(grid), tokens.device
        tokens = self.to_decoder(tokens)
        decoder_width = tokens.shape[2]
        positions = sincos_positions(grid, decoder_width, device).to(tokens.dtype)
        mask_token = self.mask_token.to(tokens.dtype)
        if self.config["decoder"] == "cross":
            drawn = mask_token + (positions.expand(batch, -1, -1) if wanted is None else positions[wanted])
            for block in self.decoder_blocks:
                drawn = block(drawn, tokens)
            return self.predict(self.decoder_norm(drawn))
        full = mask_token.expand(batch, count, decoder_width)
        full = full.scatter(1, visible[..., None].expand(-1, -1, decoder_width), tokens) + positions
        *earlier, last = self.decoder_blocks
        for block in earlier:
            full = block(full)
        return self.predict(self.decoder_norm(last(full, wanted)))

    def _restored(self, patches: Tensor, visible: Tensor, grid: tuple[int, ...]) -> Tensor:
        change = self._changes(self._encode(patches.to(self.dtype), visible, grid))
        return pick_tokens(patches[..., : self.values], visible) + change.to(patches.dtype)

    def reconstruct_patches(
        self, patches: Tensor, visible: Tensor, wanted: Tensor | None, grid: tuple[int, ...]
    ) -> Tensor:
        """Patches in the image's own intensities; arguments as for :meth:`predict_patches`.

        Networks in half precision work on patches in float32 too: the prediction comes back in the patches' dtype.
        """
        predicted = self.predict_patches(patches.to(self.dtype), visible, grid, wanted).to(patches.dtype)
        if self.norm_target:
            known = patches[..., : self.values]
            mean, deviation = self._patch_statistics(known if wanted is None else pick_tokens(known, wanted))
            predicted = predicted * deviation + mean
        return predicted

    def forward(
        self,
        image: Tensor,
        visible: Tensor | Sequence[Tensor],
        wanted: Tensor | Sequence[Tensor] | None = None,
        restored: bool = False,
    ) -> Tensor | list[Tensor]:
        """Reconstruct an image from its visible patches.

        Args:
            image: (B, seen_channels, \\*S), from :meth:`stack` with ``neighbours``, each axis a multiple of the patch
                size; float32 or the weights' dtype.
            visible: (B, V) int64, indices of the visible patches in row-major order; or several sets of maskings, each
                (N, V), that all images go through.
            wanted: (B, W) int64, indices of the patches to draw; None: all, put together. Of sets of maskings as many,
                each (N, W), or None with ``restored``.
            restored: the visible patches instead, as they would look in a healthy head.

        Returns:
            (B, C, \\*S), or (B, W, C * p^dims) with ``wanted``, or (B, V, C * p^dims) with ``restored``, C the
            ``in_channels``, in the image's own intensities and dtype. Of sets of maskings a list of the last two, each
            (B, N, ...).

        Raises:
            ArgumentTypeError: an image that is no tensor or of another dtype.
            ArgumentError: sizes or devices that do not fit, or ``restored`` of an autoencoder that does not restore.
        """
        if isinstance(visible, list | tuple):
            for name, sets in (("visible", visible), ("wanted", () if wanted is None else wanted)):
                for one in sets:
                    _check_indices(name, one)
            if restored == (wanted is not None):
                raise ArgumentError("wanted: expected patches to draw of each masking or restored, got both or neither")
            return self._of_maskings(image, visible, wanted, self._checked_image(image))
        grid = self._checked_grid(image, visible)
        if restored:
            return self._restored(self.patchify(image), visible, grid)
        if wanted is not None:
            _check_indices("wanted", wanted, image.shape[0])
        patches = self.reconstruct_patches(self.patchify(image), visible, wanted, grid)
        return self.unpatchify(patches, image.shape[2:]) if wanted is None else patches

    def loss(self, image: Tensor, visible: Tensor, target: Tensor | None = None) -> Tensor:
        """Mean squared error over the hidden patches (of the normalised patches with ``norm_target``), a scalar.

        Where it restores, that over the visible ones counts ``RESTORE_WEIGHT`` times beside it.

        Args:
            image: (B, seen_channels, \\*S).
            visible: (B, V) int64, as for a call.
            target: (B, in_channels, \\*S), what is to be drawn; None: the image itself.
        """
        grid = self._checked_grid(image, visible)
        patches = self.patchify(image)
        hidden = torch.ones(patches.shape[:2], dtype=torch.uint8, device=image.device).scatter(1, visible, 0)
        # Their numbers in order; by a sort, as to count them a processor would wait for a GPU.
        wanted = hidden.argsort(dim=1, descending=True, stable=True)[:, : patches.shape[1] - visible.shape[1]]
        tokens = self._encode(patches.to(self.dtype), visible, grid)
        predicted = self._draw(tokens, visible, grid, wanted).float()
        own = patches[..., : self.values].float()
        expected = own if target is None else self.patchify(target).float()
        drawn = pick_tokens(expected, wanted)
        if self.norm_target:
            mean, deviation = self._patch_statistics(drawn)
            drawn = (drawn - mean) / deviation
        loss = (predicted - drawn).square().mean()
        if self.change is None:
            return loss
        off = self.change(tokens).float() - pick_tokens(expected - own, visible)
        return loss + RESTORE_WEIGHT * off.square().mean()

    @staticmethod
    def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True, correction=int(patches.shape[2] > 1))
        return mean, (variance + 1e-6).sqrt()
