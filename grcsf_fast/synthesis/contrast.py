"""Tissue intensities of a scan: T1, blended with the real average by chance, or the order of another sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .anatomy import Anatomy
from .streams import Random

__all__ = ["CONTRASTS", "OTHER_CONTRASTS", "SEQUENCES", "Head", "TissueIntensities", "draw_head"]

SEQUENCES = ("t1", "t2", "flair", "pd")
CONTRASTS = ("random", "template", *SEQUENCES)
# Share of the subjects with ``"random"`` contrast that are no T1.
OTHER_CONTRASTS = 0.25


@dataclass(frozen=True)
class TissueIntensities:
    """Intensities before the acquisition, white matter of T1 near 1.

    Attributes:
        sequence: ``"t1"``, ``"t2"``, ``"flair"`` or ``"pd"``: the order of the tissues is like theirs.
        wm, gm, csf: of the tissues.
        gliosis: of a scar that has lost its tissue but no cavity: between grey matter and fluid on T1, brighter than
            either on FLAIR.
        blood: of old blood's bright part (methaemoglobin).
        iron: of old blood's dark part (haemosiderin).
    """

    sequence: str
    wm: float
    gm: float
    csf: float
    gliosis: float
    blood: float
    iron: float


@dataclass(frozen=True)
class Head:
    """A head with intensities but without skull, noise or blur; all (X, Y, Z)."""

    image: Tensor
    gm: Tensor
    wm: Tensor
    csf: Tensor
    inside: Tensor
    intensities: TissueIntensities
    spacing: tuple[float, float, float]

    @property
    def tissue(self) -> Tensor:
        """Where grey and white matter fill more than half of a voxel."""
        return (self.csf < 0.5) & self.inside


def draw_head(anatomy: Anatomy, contrast: str, spacing: tuple[float, float, float], random: Random) -> Head:
    """Tissue intensities times slow and fast texture, blended with the real average by a share that is drawn for T1.

    Args:
        contrast: ``"random"``, ``"template"`` for the real average alone, or one of the sequences.
    """
    sequence = str(random.numpy.choice(SEQUENCES[1:])) if random.chance(OTHER_CONTRASTS) else "t1"
    share = 0.0 if random.chance(0.4) else random.uniform(0.2, 1.0)
    if contrast == "template":
        sequence, share = "t1", 1.0
    elif contrast != "random":
        sequence = contrast
    if sequence != "t1":
        share = 0.0
    wm, gm, csf = _tissue_levels(sequence, random)
    shape = tuple(anatomy.gm.shape)
    image = torch.zeros(shape)
    for tissue, level in ((anatomy.gm, gm), (anatomy.wm, wm), (anatomy.csf, csf)):
        slow = random.smooth(shape, 25 / spacing[0])[0].mul_(random.uniform(0, 0.06))
        fast = random.smooth(shape, 4 / spacing[0])[0].mul_(random.uniform(0, 0.04))
        image += slow.add_(fast).add_(1).mul_(level).mul_(tissue)
    if share:
        image = torch.lerp(image, anatomy.t1, share)
    image *= anatomy.inside
    wm, gm, csf = (
        _level(image, tissue, least, (1 - share) * drawn + share * usual)
        for tissue, least, drawn, usual in (
            (anatomy.wm, 0.8, wm, 1.0), (anatomy.gm, 0.8, gm, 0.8), (anatomy.csf, 0.9, csf, 0.35),
        )
    )  # fmt: skip
    amount = random.uniform(0.4, 0.9)
    gliosis = {
        "t1": gm + amount * 0.75 * (csf - gm),
        "t2": max(gm, wm) + amount * (csf - max(gm, wm)),
        "flair": max(gm, wm) * (1.05 + 0.7 * amount),
        "pd": max(gm, wm) * (1.0 + 0.35 * amount),
    }[sequence]
    blood = max(gm, wm) * random.uniform(1.05, 1.5)
    return Head(
        image, anatomy.gm, anatomy.wm, anatomy.csf, anatomy.inside,
        TissueIntensities(sequence, wm, gm, csf, gliosis, blood, min(gm, wm) * random.uniform(0.05, 0.5)), spacing,
    )  # fmt: skip


def _tissue_levels(sequence: str, random: Random) -> tuple[float, float, float]:
    """White matter, grey matter, fluid."""
    between = random.uniform
    if sequence == "t1":
        white = between(0.8, 1.1)
        grey = white * between(0.6, 0.92)
        return white, grey, grey * between(0.1, 0.5)
    if sequence == "t2":
        white = between(0.3, 0.5)
        grey = white * between(1.15, 1.6)
        return white, grey, grey * between(1.4, 2.4)
    white = between(0.55, 0.85)
    grey = white * between(1.05, 1.3)
    if sequence == "flair":
        return white, grey, white * between(0.1, 0.45)
    # Never grey matter's own level: cavities would be drawn and not be seen.
    return white, grey, grey * (between(0.55, 0.8) if random.chance(0.5) else between(1.15, 1.4))


def _level(image: Tensor, tissue: Tensor, least: float, otherwise: float) -> float:
    """Median intensity of a tissue, of every second voxel along each axis for speed."""
    thinned = (slice(None, None, 2),) * 3
    values = image[thinned][tissue[thinned] > least]
    return float(values.median()) if values.numel() else otherwise
