"""GRCSF as the network of nnU-Net v2: its planning, augmentation, schedule and inference; our network and score loss.

With nnunetv2 2.8 or later beside grcsf-fast, and a data set that was planned and preprocessed:

    nnUNet_extTrainer=examples nnUNetv2_train 4 2d 0 -tr nnUNetTrainerGRCSF
    nnUNet_extTrainer=examples nnUNetv2_predict -i in -o out -d 4 -c 2d -f 0 -tr nnUNetTrainerGRCSF

``make examples`` does two steps of it on a tiny data set.
"""

from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from grcsf_fast import GRCSF, CompensationMaps, GRCSFLoss

PATCH_SIZE = {2: 8, 3: 4}  # of the RCU, by the number of spatial axes


class ScoredGRCSF(GRCSF):
    """Gives its patch scores to the loss in training, and logits alone at any other time."""

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, CompensationMaps]:
        return super().forward(image, return_maps=self.training)


class WithScoreLoss(nn.Module):
    """nnU-Net's loss of the logits, and beside it: does this patch hold lesion?"""

    def __init__(self, segmentation: nn.Module, patch_size: int, ignored: int | None = None) -> None:
        super().__init__()
        self.segmentation = segmentation
        self.scores = GRCSFLoss(score_weight=0.2, patch_size=patch_size)
        self.ignored = ignored  # nnU-Net's label of voxels without annotation; of regions their last channel

    def forward(self, output: Tensor | tuple[Tensor, CompensationMaps], target: Tensor) -> Tensor:
        if isinstance(output, Tensor):
            return self.segmentation(output, target)
        logits, maps = output
        lesion, unknown = target > 0, None  # of label maps and of regions
        if self.ignored is not None:
            unknown = lesion[:, -1:] if target.shape[1] > 1 else target == self.ignored
            lesion = lesion[:, :-1] if target.shape[1] > 1 else lesion
        foreground = lesion.float().amax(1, keepdim=True)
        scores = self.scores.score_loss(maps.patch_scores, foreground, unknown)
        return self.segmentation(logits, target) + self.scores.score_weight * scores


class nnUNetTrainerGRCSF(nnUNetTrainer):  # noqa: N801 nnU-Net finds trainers by such names
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 as nnU-Net has it
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        spatial_dims = len(configuration_manager.patch_size)
        # Blank residual maps: nnU-Net has no autoencoder to make any.
        return ScoredGRCSF(spatial_dims, num_input_channels, num_output_channels, patch_size=PATCH_SIZE[spatial_dims])

    def _build_loss(self) -> nn.Module:
        patch_size = PATCH_SIZE[len(self.configuration_manager.patch_size)]
        return WithScoreLoss(super()._build_loss(), patch_size, self.label_manager.ignore_label)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none."""
