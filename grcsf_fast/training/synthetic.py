"""Synthetic subjects as cases, without end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from torch import Tensor

from ..data.volumes import Prepared, Preprocessing, Volume, prepare, prepare_mask, resize
from ..datasets.cases import Case
from ..errors import ArgumentError
from ..runtime.defaults import fresh_defaults

if TYPE_CHECKING:
    from ..synthesis.subjects import Subject
    from ..synthesis.template import Template

__all__ = [
    "SyntheticSource",
    "drawing_spacings",
]

# Seeds of the synthesizer are apart by purpose, so that no case serves two; `make demo` has 3,000,008 and `synthesize`
# begins at 4,000,000.
TRAINING_SEEDS, VALIDATION_SEEDS, CALIBRATION_SEEDS, HELD_OUT_SEEDS = 0, 1_000_000, 1_002_000, 2_200_000
# Trainings of other seeds draw other subjects.
SEEDS_A_RUN = 10_000
MAX_TRAINING_SEED = 49
# Of benchmarks/accuracy, beyond the last training seed.
ACCURACY_SEEDS, ACCURACY_TEST_SEEDS = 500_000, 600_000


class SyntheticSource:
    """Synthetic subjects without end: number k is drawn from ``first_seed + k``.

    Args:
        preprocessing: as for prediction; its spacing must be isotropic.
        first_seed: seed of number 0.
        lesions: with lesions, or healthy.
        skull: with a rim around the brain; None: by chance.
        contrast: see :func:`grcsf_fast.synthesis.subjects.synthesize_subject`.
        spread: where given, case k of this many has the k-th of their evenly spaced quantiles of lesion volume, so
            that few cases stand for the whole distribution.
        slices: where given, crops come from only so many axial slices of a subject, half of them with lesion if it has
            them: a training of 2-D networks then sees more subjects in the same time.
        drawn_at: spacings in mm, one of which is taken by chance for each subject and resampled to the
            preprocessing's; None: the preprocessing's itself. Scans come finer than a network's grid, and networks
            trained on subjects drawn at 2 mm did worse on such drawn at 1 mm.
        crowded: share of the subjects with 6 to 16 lesions, most of them small, where the others have 1 to 6. A
            training sees more small lesions so, and keeps more slices from the ends of the head, which are the ones
            without lesion.
        healthy: fill each case's ``healthy``, the target of an autoencoder that restores the head.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        first_seed: int,
        lesions: bool = True,
        skull: bool | None = None,
        contrast: str = "random",
        spread: int | None = None,
        slices: int | None = None,
        drawn_at: Sequence[float] | None = None,
        crowded: float = 0.0,
        healthy: bool = False,
    ) -> None:
        if len(set(preprocessing.spacing)) != 1:
            raise ArgumentError(f"spacing: synthetic subjects are isotropic, got {preprocessing.spacing}")
        self.preprocessing = preprocessing
        self.first_seed = first_seed
        self.lesions = lesions
        self.skull = skull
        self.contrast = contrast
        self.spread = spread
        self.slices = slices
        self.drawn_at = tuple(drawn_at) if drawn_at else preprocessing.spacing[:1]
        self.crowded = crowded
        self.healthy = healthy

    def __getitem__(self, index: int) -> Case:
        with fresh_defaults():
            return self._drawn(index)

    def _drawn(self, index: int) -> Case:
        # Here, so that training on a folder needs no scipy.
        from ..synthesis.subjects import lesion_volume_quantile
        from ..synthesis.template import load_template

        seed = self.first_seed + index
        rng = np.random.default_rng(seed)
        template = load_template(self.drawn_at[int(rng.integers(len(self.drawn_at)))])
        total_ml = lesion_volume_quantile((index % self.spread + 0.5) / self.spread) if self.spread else None
        count = int(rng.integers(6, 17)) if self.crowded and rng.random() < self.crowded else None
        subject = self.draw(template, seed, total_ml, count)
        volume = Volume(subject.image.numpy(), subject.affine, nib.Nifti1Header(), f"synthetic subject {seed}")
        prepared = prepare(volume, self.preprocessing)
        lesion = prepare_mask(subject.lesion.numpy(), prepared)
        image = prepared.data
        healthy = _prepared_alike(subject.healthy, subject.image, prepared) if self.healthy else None
        kept = tuple(_kept_slices(lesion, self.slices, rng)) if self.slices is not None else None
        return Case(f"synthetic_{seed}", image, lesion, healthy=healthy, slices=kept)

    def draw(self, template: Template, seed: int, total_ml: float | None, count: int | None) -> Subject:
        """One subject; a source of another generator's subjects has its own."""
        from ..synthesis.subjects import synthesize_subject

        return synthesize_subject(template, seed, self.lesions, self.skull, self.contrast, total_ml, count)


def _kept_slices(lesion: Tensor, count: int, rng: np.random.Generator) -> list[int]:
    """Of a subject so many, half of them with lesion, where there are as many."""
    held = lesion.any(0).any(0)
    marked, others = (rng.permutation(flags.nonzero().flatten().numpy()) for flags in (held, ~held))
    marked = marked[: max(count // 2, count - len(others))]
    return sorted([*marked.tolist(), *others[: count - len(marked)].tolist()])


def _prepared_alike(healthy: Tensor, image: Tensor, prepared: Prepared) -> Tensor:
    """``healthy`` on the grid of ``prepared`` and in its intensities, which are those of ``image``.

    Normalised by itself it would differ from the image everywhere, and not where the lesion is alone.
    """
    twin, own = (resize(part, prepared.resampled_shape)[prepared.box] for part in (healthy, image))
    # The normalisation is a line with a ceiling; the voxels below the ceiling give the line back.
    ceiling = prepared.data.max()
    below = prepared.data < ceiling
    x, y = own[below].double(), prepared.data[below].double()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return ((twin - x.mean()) * slope + y.mean()).float().clamp(max=float(ceiling))


def drawing_spacings(spacing: float) -> tuple[float, ...]:
    """Spacings in mm to draw subjects at for networks of a spacing: from half of it, but no finer than the template."""
    return (*(share * spacing for share in (0.5, 0.75) if share * spacing >= 1), spacing)
