"""Every variant: how it is built, what it gets to see, and which other one says whether its part is worth anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from monai.networks import nets
from torch import nn

from benchmarks import peers
from benchmarks.accuracy import forms
from benchmarks.accuracy.cases import BESIDE

__all__ = ["PEERS", "SETTINGS", "VARIANTS", "Variant"]

# Training subjects of a setting.
SETTINGS = {"many labels": 32, "few labels": 8}
UNITS, FORMS, PEERS = "units", "forms of the units", "networks of others"


@dataclass(frozen=True)
class Variant:
    """One row of the tables.

    Attributes:
        build: with random weights; called as a GRCSF is.
        group: ``UNITS`` and ``PEERS`` are measured in every setting, ``FORMS`` with many labels alone.
        about: what it is, for the table.
        controls: variants that it has to be ahead of; without them its part would be worth nothing.
        shown: what it is given beside the image, see :func:`benchmarks.accuracy.cases.shown`; a network with RCU that
            is given no maps has blank ones.
        score_weight: of the score loss; 0: the scores are not supervised.
        learning_rate: peak of the schedule.
        more: trained on the labels of as many further subjects as the autoencoder saw.
    """

    build: Callable[[], nn.Module]
    group: str
    about: str
    controls: tuple[str, ...] = ()
    shown: str = "none"
    score_weight: float = 0.2
    learning_rate: float = 3e-3
    more: bool = False

    @property
    def residual(self) -> bool:
        """Whether an autoencoder's maps are part of it."""
        return "residual" in self.shown

    def settings(self) -> tuple[str, ...]:
        return tuple(SETTINGS)[:1] if self.group == FORMS else tuple(SETTINGS)

    def seeds(self) -> int:
        return 3 if self.group == PEERS else 5


def _gcu(build: Callable[[], nn.Module], about: str, *controls: str) -> Variant:
    return Variant(build, FORMS, about, controls)


def _rcu(
    unit: Callable[..., nn.Module], about: str, *controls: str, shown: str = "residual", score_weight: float = 0.2
) -> Variant:
    return Variant(functools.partial(forms.with_rcu, unit), FORMS, about, controls, shown, score_weight)


def _peer(build: Callable[[], nn.Module], about: str, learning_rate: float = 3e-3) -> Variant:
    # Ours has to be ahead of them, so the difference to it should be below 0.
    return Variant(
        lambda: forms.Peer(build()), PEERS, about, ("GCU + RCU", "backbone"), learning_rate=learning_rate
    )  # fmt: skip


def _dynunet() -> nn.Module:
    stages = len(forms.FEATURES)
    return nets.DynUNet(
        2, 1, 1, kernel_size=[3] * stages, strides=[1] + [2] * (stages - 1), upsample_kernel_size=[2] * (stages - 1),
        filters=forms.FEATURES, norm_name=("INSTANCE", {"affine": True}),
    )  # fmt: skip


def _unet() -> nn.Module:
    strides = (2,) * (len(forms.FEATURES) - 1)
    return nets.UNet(2, 1, 1, channels=forms.FEATURES, strides=strides, num_res_units=2)


grcsf, partial = forms.grcsf, functools.partial
VARIANTS: dict[str, Variant] = {
    "backbone": Variant(grcsf, UNITS, "the U-shaped network without units"),
    "GCU": Variant(partial(grcsf, gcu=True), UNITS, "F + g RM (F - E)", ("backbone",)),
    "RCU": Variant(
        partial(grcsf, rcu=True), UNITS, "attention to residual maps",
        ("backbone", "RCU, blank maps", "maps as channels"), "residual",
    ),
    "GCU + RCU": Variant(
        partial(grcsf, gcu=True, rcu=True), UNITS, "the whole network",
        ("backbone", "GCU", "RCU", "GCU + RCU, blank maps"), "residual",
    ),
    "RCU, blank maps": Variant(partial(grcsf, rcu=True), UNITS, "all residual maps are 0", ("backbone",)),
    "GCU + RCU, blank maps": Variant(
        partial(grcsf, gcu=True, rcu=True), UNITS, "all residual maps are 0", ("backbone", "GCU", "RCU, blank maps")
    ),
    "maps as channels": Variant(
        forms.as_channels, UNITS, "residual maps beside the image, no unit", ("backbone",), "residual"
    ),
    "backbone, five slices": Variant(
        partial(forms.as_channels, BESIDE), UNITS, "sees the slices that the autoencoder sees", ("backbone", "RCU"),
        "beside",
    ),
    "RCU, five slices": Variant(
        partial(forms.as_channels, BESIDE, True), UNITS, "sees them too",
        ("backbone, five slices", "RCU, five slices, blank maps", "RCU"), "beside, residual",
    ),
    "RCU, five slices, blank maps": Variant(
        partial(forms.as_channels, BESIDE, True), UNITS, "all residual maps are 0", ("backbone, five slices",), "beside"
    ),
    "backbone, the autoencoder's subjects": Variant(
        grcsf, FORMS, "trained on the labels of as many subjects as the autoencoder saw", ("backbone", "RCU"), more=True
    ),
    "GCU, scale": _gcu(
        partial(grcsf, gcu=True, gcu_form="scale"), "F (1 + RM) against max-pooled features", "backbone", "GCU"
    ),
    "GCU, no RM": _gcu(partial(forms.with_gcu, forms.WithoutResidual), "F + g (F - E)", "backbone", "GCU"),
    "GCU, max-pooled": _gcu(forms.max_pooled, "F + g RM (F - E) against max-pooled features", "backbone", "GCU"),
    "RCU, score alone": _rcu(
        forms.ScoreAlone, "x + s b with a learned vector b",
        "backbone", "RCU", "RCU, blank maps", "RCU, score loss alone", shown="none",
    ),
    "RCU, score loss alone": _rcu(
        forms.ScoreLossAlone, "scores that are learned and change nothing", "backbone", "RCU, blank maps", shown="none"
    ),
    "RCU, attention alone": _rcu(
        forms.AttentionAlone, "x + y, the score being 1", "backbone", "RCU", score_weight=0.0
    ),
    "RCU, score without loss": _rcu(
        forms.RegionCompensationUnit, "scores that nobody supervises", "backbone", "RCU", score_weight=0.0
    ),
    "RCU, no context": _rcu(forms.WithoutContext, "a score knows its patch alone", "backbone", "RCU"),
    "RCU, context before norm": _rcu(
        forms.ContextBeforeNorm, "context: the bottleneck's mean before its norm", "RCU", "RCU, no context"
    ),
    "RCU, context at the patch": _rcu(
        forms.ContextAtPatch, "context: the bottleneck's features at the patch", "RCU", "RCU, no context"
    ),
    "RCU, oracle maps": Variant(
        partial(grcsf, rcu=True), FORMS, "the lesion blurred over 9x9 pixels, and noise of 0.3",
        ("backbone", "RCU, blank maps", "RCU"), "oracle",
    ),
    "MONAI UNet": _peer(_unet, "of our widths"),
    "DynUNet": _peer(_dynunet, "nnU-Net's network, of our widths"),
    "SwinUNETR 12": _peer(partial(peers.swin_unetr, 12), "the narrowest there is"),
    "SwinUNETR 12, rate 1e-3": _peer(partial(peers.swin_unetr, 12), "at a third of the learning rate", 1e-3),
    "MONAI UNet, published": _peer(peers.unet, "as MONAI's tutorials build it"),
    "DynUNet, published": _peer(peers.dynunet, "six stages, at most 512 channels"),
    "SwinUNETR 48, published": _peer(partial(peers.swin_unetr, 48), "its published width"),
    "SwinUNETR 48, rate 1e-3": _peer(partial(peers.swin_unetr, 48), "at a third of the learning rate", 1e-3),
}  # fmt: skip
