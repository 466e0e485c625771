"""The loss of a GRCSF network: of its segmentation, and of the scores that its RCU gives to patches."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..errors import ArgumentError, ArgumentTypeError, class_of
from ..networks.arguments import COUNT, checked_config
from ..networks.grcsf import CompensationMaps
from ..runtime.processes import World, summed
from ..runtime.transforms import transformed

__all__ = ["SEGMENTATION_LOSSES", "GRCSFLoss"]

SEGMENTATION_LOSSES = ("dice-focal", "focal")
ROUNDING = 1e-3  # of masks


class GRCSFLoss(nn.Module):
    """Dice and focal loss of the logits, and binary cross-entropy of the patch scores: does this patch hold lesion?

    Args:
        score_weight: of the score loss beside the segmentation loss, which has weight 1; 0 or above.
        patch_size: of the network, ``network.config["patch_size"]``; None: found from the shapes of the scores, as the
            one edge that fits or, of several, the power of two or the one that divides the image. Pass it for a network
            whose patch size is no power of two: 9 and 8 cut an image of 48 pixels into as many patches.
        segmentation: ``"dice-focal"``, the sum of both, or ``"focal"`` alone, for lesions so small that a Dice of a
            crop says little.
        softmax: the channels are classes that exclude each other, the first of them for what is no lesion, which
            counts in Dice and focal loss as the others do; False: they are lesions or regions that may overlap.

    Raises:
        ArgumentError: a negative weight, a patch size that is no whole number from 1 up, or another segmentation loss.
        ModuleNotFoundError: MONAI is missing; the extra ``app`` brings it.

    Example:
        >>> import torch
        >>> from grcsf_fast import GRCSF, GRCSFLoss
        >>> network, criterion = GRCSF(2, 1, 1), GRCSFLoss()
        >>> image, mask = torch.zeros(2, 1, 64, 64), torch.zeros(2, 1, 64, 64)
        >>> criterion(network(image, return_maps=True), mask).backward()

    Source: paper (Dice and focal; focal alone for coronary calcium); the score loss is our decision.
    """

    def __init__(
        self,
        score_weight: float = 0.2,
        patch_size: int | None = None,
        segmentation: str = "dice-focal",
        softmax: bool = False,
    ) -> None:
        from monai.losses.focal_loss import sigmoid_focal_loss, softmax_focal_loss

        super().__init__()
        if not score_weight >= 0:
            raise ArgumentError(f"score_weight: expected 0 or more, got {score_weight}")
        if segmentation not in SEGMENTATION_LOSSES:
            raise ArgumentError(f"segmentation: expected one of {SEGMENTATION_LOSSES}, got {segmentation!r}")
        if patch_size is not None:
            patch_size = checked_config({"patch_size": COUNT}, patch_size=patch_size)["patch_size"]
        self.score_weight = score_weight
        self.patch_size = patch_size
        self.segmentation = segmentation
        self.softmax = softmax
        # Not MONAI's class, which takes float64 down to float32.
        self.focal = softmax_focal_loss if softmax else sigmoid_focal_loss
        # Processes that hold equal parts of a batch: losses are then those of the whole batch, and the sum of the
        # processes' gradients is its gradient.
        self.world = World()

    def forward(
        self, output: Tensor | tuple[Tensor, CompensationMaps], mask: Tensor, ignored: Tensor | None = None
    ) -> Tensor:
        """The weighted sum.

        Args:
            output: of the network: logits (B, C, \\*S), or a pair of them and the maps, of a call with
                ``return_maps=True``. Without maps, or without an RCU in the network, there is no score loss.
            mask: (B, C, \\*S), 1 in lesions and 0 elsewhere; any dtype. With ``softmax`` its first channel is 1 where
                there is no lesion.
            ignored: (B, 1, \\*S), not 0 in voxels that nobody annotated, of any dtype: whatever logits and mask
                hold there, they count in no part of the loss, nor do patches with some and no lesion; None: there are
                none.

        Returns:
            A scalar, float32, or float64 for logits in it; NaN for a mask on a GPU whose values are not from 0 to 1.

        Raises:
            ArgumentTypeError: an output that is neither, or a mask or ``ignored`` that is no tensor.
            ArgumentError: a mask of another shape or, on a processor, with values that are not from 0 to 1; ``ignored``
                of another shape; a single channel with ``softmax``; or scores that do not belong to the mask.
        """
        return self.parts(output, mask, ignored)["loss"]

    def parts(
        self, output: Tensor | tuple[Tensor, CompensationMaps], mask: Tensor, ignored: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``"loss"``, the sum of ``"segmentation_loss"`` and, where there are scores, the weighted ``"score_loss"``.

        Arguments and errors as of a call. Scores that are no numbers, of a network that has diverged, make a loss that
        is none.
        """
        if not isinstance(output, Tensor) and not (isinstance(output, tuple) and len(output) == 2):
            raise ArgumentTypeError(
                "output: expected logits (B,C,*S), or a pair of them and the network's maps, got "
                f"{type(output).__name__}; a list of images is stacked by torch.stack"
            )
        logits, maps = (output, None) if isinstance(output, Tensor) else output
        _check_tensor(mask)
        if mask.shape != logits.shape:
            one_hot = mask.dim() == logits.dim() and mask.shape[1] == 1 < logits.shape[1]
            raise ArgumentError(
                f"mask: expected shape {tuple(logits.shape)} of the logits, got {tuple(mask.shape)}"
                + ("; of numbers monai.networks.one_hot(mask, channels) makes a channel for each" if one_hot else "")
            )
        if self.softmax and logits.shape[1] < 2:
            raise ArgumentError("logits: expected at least two channels with softmax, got one, which would always be 1")
        logits = logits if logits.dtype == torch.float64 else logits.float()
        counted = _counted(mask, ignored, logits.dtype)
        if counted is not None:  # what is infinite where nothing counts would make the sums so
            mask, logits = (torch.where(counted > 0, values, 0) for values in (mask, logits))
        mask = _checked(mask.to(logits.dtype))
        if not self.softmax and mask.shape[1] > 1 and _one_each(mask):
            warnings.warn(
                "mask: every voxel is in one channel and no other, as of classes that exclude each other: "
                "GRCSFLoss(softmax=True) is for those, with the first channel for what is no lesion",
                stacklevel=2,
            )
        (segmentation,) = self._means([self.focal(logits, mask)], None if counted is None else [counted])
        if self.segmentation == "dice-focal":
            segmentation = self._dice(logits, mask, counted) + segmentation
        parts = {"loss": segmentation, "segmentation_loss": segmentation}
        if maps is not None and maps.patch_scores:
            parts["score_loss"] = self._score_loss(maps.patch_scores, mask, counted)
            parts["loss"] = segmentation + self.score_weight * parts["score_loss"]
        return parts

    def _dice(self, logits: Tensor, mask: Tensor, counted: Tensor | None) -> Tensor:
        """1 - Dice of each channel over the whole batch, averaged over channels; MONAI's, but over all processes."""
        probability = logits.softmax(1) if self.softmax else logits.sigmoid()
        probability = probability if counted is None else probability * counted
        axes = [0, *range(2, logits.dim())]
        sums = torch.stack([(probability * mask).sum(axes), probability.sum(axes), mask.sum(axes)])
        both, predicted, true = summed(self.world, sums)
        missed, extra = 0.5 * (true - both), 0.5 * (predicted - both)
        return (1 - (2 * both + 1) / (2 * (both + extra + missed) + 1)).mean()

    def _means(self, values: Sequence[Tensor], counted: Sequence[Tensor] | None) -> Tensor:
        """(N,): of each tensor over what counts of it in all processes, 0 where nothing does."""
        if counted is None:
            return summed(self.world, torch.stack([one.mean() for one in values]) / self.world.size)
        weighted = [(one, of.expand_as(one)) for one, of in zip(values, counted, strict=True)]
        own = torch.stack([torch.stack([(one * of).sum(), of.sum()]) for one, of in weighted])
        totals, numbers = summed(self.world, own).unbind(1)
        return totals / numbers.clamp(min=1)

    def score_loss(self, scores: Mapping[int, Tensor], mask: Tensor, ignored: Tensor | None = None) -> Tensor:
        """The score loss alone, beside a segmentation loss of your own.

        Args:
            scores: ``maps.patch_scores``, by level.
            mask: (B, 1, \\*S), 1 in lesions and 0 elsewhere, in float32 or float64; or (B, C, \\*S) as for a call: not
                the numbers of labels, and with a channel for what is no lesion only with ``softmax``.
            ignored: as for a call.

        Returns:
            A scalar, averaged over patches and levels.

        Raises:
            ArgumentError: scores that do not belong to the mask, or arguments as a call refuses them.
            ArgumentTypeError: a mask or ``ignored`` that is no tensor.
        """
        _check_tensor(mask)
        if mask.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"mask: expected float32 or float64, got {mask.dtype}; convert with .float()")
        counted = _counted(mask, ignored, mask.dtype)
        mask = mask if counted is None else torch.where(counted > 0, mask, 0)
        return self._score_loss(scores, _checked(mask), counted)

    def _score_loss(self, scores: Mapping[int, Tensor], mask: Tensor, counted: Tensor | None) -> Tensor:
        spatial = tuple(mask.shape[2:])
        grids = tuple((level, tuple(score.shape[2:])) for level, score in scores.items())
        patch_size = self.patch_size if self.patch_size is not None else _patch_size(spatial, grids)
        kinds = mask[:, int(self.softmax) :] if mask.shape[1] > 1 else mask  # one channel is lesion of any kind
        lesion = kinds.amax(1, keepdim=True) if kinds.shape[1] > 1 else kinds
        pool = F.max_pool2d if len(spatial) == 2 else F.max_pool3d
        losses, known = [], []
        for level, score in scores.items():
            edge = patch_size * 2**level
            target = pool(lesion, edge, ceil_mode=True)
            if target.shape != score.shape:
                raise ArgumentError(
                    f"patch_scores: expected shape {tuple(target.shape)} of level {level} for patches of edge "
                    f"{patch_size}, got {tuple(score.shape)}; pass GRCSFLoss(patch_size=network.config['patch_size'])"
                )
            # A patch without lesion may have some where nobody looked.
            if counted is not None:
                known.append(((target >= 0.5) | (pool(1 - counted, edge, ceil_mode=True) == 0)).to(target.dtype))
            with torch.autocast(score.device.type, enabled=False):  # which refuses this loss
                # What is no number would end a GPU's work for good, and to ask for it first would wait for the GPU.
                loss = F.binary_cross_entropy(score.to(mask.dtype).nan_to_num(), target, reduction="none")
                losses.append(torch.where(score.isnan().any(), math.nan, loss))
        return self._means(losses, None if counted is None else known).mean()


def _check_tensor(mask: object) -> None:
    if not isinstance(mask, Tensor):
        raise ArgumentTypeError(
            f"mask: expected a torch.Tensor (B,C,*S), got {class_of(mask)}; torch.as_tensor makes one of it"
        )


def _counted(mask: Tensor, ignored: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, 1, \\*S), 1 where a voxel counts and 0 elsewhere; None where all do."""
    if ignored is None:
        return None
    expected = (mask.shape[0], 1, *mask.shape[2:])
    if not isinstance(ignored, Tensor):
        raise ArgumentTypeError(f"ignored: expected a tensor {expected}, got {type(ignored).__name__}")
    if ignored.shape != expected:
        raise ArgumentError(f"ignored: expected shape {expected}, got {tuple(ignored.shape)}")
    return (ignored == 0).to(dtype)


def _checked(mask: Tensor) -> Tensor:
    """The mask; labels by number and grey values up to 255 would make a loss that looks like one.

    Resampled masks may leave 0 to 1 by rounding.
    """
    if not mask.numel() or torch.compiler.is_compiling():
        return mask
    low, high = mask.aminmax()
    # To ask would wait for the device, and what is being traced or transformed has no answer.
    if mask.device.type != "cpu" or isinstance(low, FakeTensor) or transformed() is not None:
        return torch.where((low >= -ROUNDING) & (high <= 1 + ROUNDING), mask, math.nan)
    if not -ROUNDING <= low <= high <= 1 + ROUNDING:
        raise ArgumentError(
            f"mask: expected 1 in lesions and 0 elsewhere, a channel for each label, got values from {low:g} to "
            f"{high:g}"
        )
    return mask


def _one_each(mask: Tensor) -> bool:
    """Whether the channels of a mask divide the voxels among them; not asked of a GPU, which would have to wait."""
    if mask.device.type != "cpu" or not mask.numel() or torch.compiler.is_compiling():
        return False
    if isinstance(mask, FakeTensor) or transformed() is not None:
        return False
    return bool((mask.sum(1) == 1).all() and ((mask == 0) | (mask == 1)).all())


@functools.lru_cache
def _patch_size(spatial: tuple[int, ...], grids: tuple[tuple[int, tuple[int, ...]], ...]) -> int:
    """Edge of a patch from the size of the image and, by level, the number of patches along each axis."""
    # Those that cut the image at the same places are one, however far the last patch reaches over the edge.
    fitting: dict[tuple[int, ...], int] = {}
    for edge in range(1, max(spatial) + 1):
        steps = [edge * 2**level for level, _ in grids]
        found = [tuple(math.ceil(size / step) for size in spatial) for step in steps]
        if found == [grid for _, grid in grids]:
            fitting.setdefault(tuple(min(size, step) for size in spatial for step in steps), edge)
    edges = list(fitting.values())
    # Nobody asks for patches of 9 pixels in an image of 48, where 8 fits; in one of 28 they may be of 7 or 8.
    usual = [edge for edge in edges if edge.bit_count() == 1 or not any(size % edge for size in spatial)]
    likely = edges if len(edges) == 1 else usual
    if len(likely) != 1:
        raise ArgumentError(
            f"patch_scores: expected shapes that tell the edge of a patch, {dict(grids)} of an image {spatial} fit "
            f"{edges or 'none'}; pass GRCSFLoss(patch_size=network.config['patch_size'])"
        )
    return likely[0]
