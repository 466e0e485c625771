"""Synthetic subjects with stroke lesions on real anatomy, everything drawn from one seed.

Lesions are synthetic: figures measured on them say nothing of patients. Contrasts are randomised tissue by tissue as
in SynthSeg (Billot et al., 2023) and SynthStroke (Chalcroft et al., 2025); the code and the choices are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .acquisition import Acquisition, draw_skull
from .anatomy import box, draw_anatomy
from .contrast import CONTRASTS, draw_head
from .distractors import add_artefacts, add_tissue_distractors, draw_bad_stripping
from .lesions import insert_lesions
from .shapes import MAX_VOLUME_ML, MIN_VOLUME_ML, lesion_volume_quantile, lesion_volumes
from .streams import Streams
from .template import Template

__all__ = ["Subject", "lesion_volume_quantile", "synthesize_subject"]

SKULL_MM = 14
# Room around a stripped brain for what a bad stripping leaves.
STRIPPED_MM = 8


@dataclass(frozen=True)
class Subject:
    """One synthetic scan.

    Attributes:
        image: (X, Y, Z) float32, arbitrary units, 0 or above.
        lesion: (X, Y, Z) bool, the exact truth.
        brain: (X, Y, Z) bool, inside of the head without skull: tissue and cerebrospinal fluid.
        healthy: (X, Y, Z) float32, the same head in the same contrast and acquisition (bias, blur, slices, noise)
            without lesions, their effect on the tissue around, and distractors. It does not depend on whether lesions
            are drawn.
        affine: (4, 4) float64, voxel to RAS millimetres.
        record: what was drawn, ready for JSON.
    """

    image: Tensor
    lesion: Tensor
    brain: Tensor
    healthy: Tensor
    affine: np.ndarray
    record: dict[str, Any] = field(default_factory=dict)


def synthesize_subject(
    template: Template,
    seed: int,
    lesions: bool = True,
    skull: bool | None = None,
    contrast: str = "random",
    total_ml: float | None = None,
    count: int | None = None,
) -> Subject:
    """Draw an individual from the template: warp, contrast, lesions, distractors, skull, bias field, blur, noise.

    Args:
        template: the anatomy and the grid.
        seed: everything follows from it and the template's spacing.
        lesions: put 1 to 6 stroke lesions in. Distractors, which are no lesions, come by chance in any case.
        skull: with a skull-like rim around the brain; None: by chance.
        contrast: ``"random"``: tissue intensities drawn anew, in a quarter of the subjects in the order of T2, FLAIR
            or PD, in the others in T1's, blended with the template's own by chance; ``"t1"``, ``"t2"``, ``"flair"`` or
            ``"pd"``: in the order of this one; ``"template"``: the real average's own intensities.
        total_ml: volume of all lesions together; None: drawn.
        count: of lesions; None: 1 to 6, drawn. Fewer come out where a share falls below 0.01 mL or no tissue is left.

    Returns:
        The subject on the template's grid, widened by 14 mm on every side where there is a skull.

    Raises:
        ValueError: another contrast, a volume outside 0.01 to 500 mL, or a count below 1.
    """
    if contrast not in CONTRASTS:
        raise ValueError(f"contrast: expected one of {CONTRASTS}, got {contrast!r}")
    if total_ml is not None and not MIN_VOLUME_ML <= total_ml <= MAX_VOLUME_ML:
        raise ValueError(f"total_ml: expected {MIN_VOLUME_ML} to {MAX_VOLUME_ML} mL, got {total_ml}")
    if count is not None and count < 1:
        raise ValueError(f"count: expected 1 or more, got {count}")
    streams = Streams.of(seed)
    by_chance = streams.skull.chance(0.5)
    skull = by_chance if skull is None else skull
    spacing = template.spacing
    anatomy = draw_anatomy(template, streams.anatomy)
    affine = template.affine.copy()
    if skull:
        margin = [round(SKULL_MM / step) for step in spacing]
        affine[:3, 3] -= affine[:3, :3] @ np.array(margin)
        anatomy = anatomy.padded(margin)
    grid = tuple(anatomy.inside.shape)
    # A stripped head is empty outside of this box, so only the box is drawn.
    window = (slice(None),) * 3 if skull else box(anatomy.inside, [int(np.ceil(STRIPPED_MM / s)) for s in spacing])
    anatomy = anatomy.cropped(window)
    inside = anatomy.inside
    middle = np.array([(part.start + part.stop - 1) / 2 for part in box(inside, [0, 0, 0])])

    healthy = draw_head(anatomy, contrast, spacing, streams.contrast)
    head, lesion, drawn, effect = healthy, torch.zeros_like(inside), [], None
    if lesions:
        volumes = lesion_volumes(streams.lesions, total_ml, count)
        head, lesion, drawn, effect = insert_lesions(healthy, volumes, middle, streams.lesions)
    image, distractors = add_tissue_distractors(head, lesion, middle, streams.distractors)
    plain, kept = healthy.image, inside
    if skull:
        rim = draw_skull(inside, healthy.intensities, spacing, streams.skull)
        image, plain, kept = image + rim, plain + rim, None
    else:
        image, kept, stripping = draw_bad_stripping(image, replace(head, image=image), lesion, streams.distractors)
        distractors |= stripping
    image, artefacts = add_artefacts(image, streams.distractors)
    acquisition = Acquisition(tuple(inside.shape), spacing, streams.acquisition)
    image, plain = acquisition(image, kept), acquisition(plain, None if skull else inside)
    if effect is not None:
        effect["centre"] = [c + (part.start or 0) for c, part in zip(effect["centre"], window, strict=True)]
    record = {
        "seed": seed,
        "skull": skull,
        "contrast": contrast,
        "sequence": healthy.intensities.sequence,
        "spacing_mm": list(spacing),
        "acquisition": acquisition.record,
        "distractors": distractors | artefacts,
        "effect": effect,
        "lesions": drawn,
        "lesion_volume_ml": float(lesion.sum()) * float(np.prod(spacing)) / 1000,
    }
    image, lesion, inside, plain = (_placed(part, window, grid) for part in (image, lesion, inside, plain))
    return Subject(image, lesion, inside, plain, affine, record)


def _placed(part: Tensor, window: tuple[slice, ...], grid: tuple[int, ...]) -> Tensor:
    """``part`` in an empty grid."""
    if tuple(part.shape) == grid:
        return part
    whole = torch.zeros(grid, dtype=part.dtype)
    whole[window] = part
    return whole
