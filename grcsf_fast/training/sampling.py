"""Training data: cases from folders or from the synthesizer, a rolling pool of them, and crops from the pool.

Everything drawn is a function of a seed and the step alone, so that a training resumed at a step goes on as if it had
never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.files import list_cases
from ..data.masks import MOST_OF_A_VOLUME, check_grid, load_mask
from ..data.volumes import Preprocessing, Volume, VolumeError, load_volume, prepare, prepare_mask
from ..errors import ArgumentError

__all__ = [
    "Case",
    "CasePool",
    "FolderSource",
    "Source",
    "Survey",
    "SyntheticSource",
    "augmentation",
    "drawing_spacings",
    "sample_crops",
]

# Seeds of the synthesizer are apart by purpose, so that no case serves two; `make demo` has 3,000,000 and `synthesize`
# begins at 4,000,000.
TRAINING_SEEDS, VALIDATION_SEEDS, CALIBRATION_SEEDS, HELD_OUT_SEEDS = 0, 1_000_000, 1_002_000, 2_200_000
# Trainings of other seeds draw other subjects.
SEEDS_A_RUN = 10_000
MAX_TRAINING_SEED = 49
# Of benchmarks/ablation.py, beyond the last training seed.
ABLATION_SEEDS, ABLATION_TEST_SEEDS = 500_000, 600_000
MOST_NAMED = 10  # cases in a message


@dataclass(frozen=True)
class Case:
    """A preprocessed volume for training.

    Attributes:
        name: of the case.
        image: (X, Y, Z) float32.
        lesion: (X, Y, Z) bool, or None where no truth is known.
        residual: (M, X, Y, Z) float16 residual maps, once computed.
    """

    name: str
    image: Tensor
    lesion: Tensor | None
    residual: Tensor | None = None


@contextmanager
def _fresh_defaults() -> Iterator[None]:
    """Torch's defaults of dtype and device as a process begins with, for code that makes tensors by them."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        # The context slows every operation, and is of no use where the default is the same.
        with torch.device("cpu") if device.type != "cpu" else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)


class Source(Protocol):
    """Cases by number; a source that ends starts again, or is asked for no more than it has."""

    def __getitem__(self, index: int) -> Case: ...


class SyntheticSource:
    """Synthetic subjects without end: number k is drawn from ``first_seed + k``.

    Args:
        preprocessing: as for prediction; its spacing must be isotropic.
        first_seed: seed of number 0.
        lesions: with lesions, or healthy.
        skull: with a rim around the brain; None: by chance.
        contrast: see :func:`grcsf_fast.synthesis.lesions.synthesize_subject`.
        spread: where given, case k of this many has the k-th of their evenly spaced quantiles of lesion volume, so
            that few cases stand for the whole distribution.
        slices: where given, only so many axial slices of a subject are kept, half of them with lesion if it has them:
            a training of 2-D networks then sees more subjects in the same time.
        drawn_at: spacings in mm, one of which is taken by chance for each subject and resampled to the
            preprocessing's; None: the preprocessing's itself. Scans come finer than a network's grid, and networks
            trained on subjects drawn at 2 mm did worse on such drawn at 1 mm.
        crowded: share of the subjects with 6 to 16 lesions, most of them small, where the others have 1 to 6. A
            training sees more small lesions so, and keeps more slices from the ends of the head, which are the ones
            without lesion.
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

    def __getitem__(self, index: int) -> Case:
        with _fresh_defaults():
            return self._drawn(index)

    def _drawn(self, index: int) -> Case:
        # Here, so that training on a folder needs no scipy.
        from ..synthesis.lesions import lesion_volume_quantile, synthesize_subject
        from ..synthesis.template import load_template

        seed = self.first_seed + index
        rng = np.random.default_rng(seed)
        template = load_template(self.drawn_at[int(rng.integers(len(self.drawn_at)))])
        total_ml = lesion_volume_quantile((index % self.spread + 0.5) / self.spread) if self.spread else None
        count = int(rng.integers(6, 17)) if self.crowded and rng.random() < self.crowded else None
        subject = synthesize_subject(template, seed, self.lesions, self.skull, self.contrast, total_ml, count)
        volume = Volume(subject.image.numpy(), subject.affine, nib.Nifti1Header(), f"synthetic subject {seed}")
        prepared = prepare(volume, self.preprocessing)
        lesion = prepare_mask(subject.lesion.numpy(), prepared)
        image = prepared.data
        if self.slices is not None:
            kept = self._kept_slices(lesion, rng)
            image, lesion = image[:, :, kept].contiguous(), lesion[:, :, kept].contiguous()
        return Case(f"synthetic_{seed}", image, lesion)

    def _kept_slices(self, lesion: Tensor, rng: np.random.Generator) -> list[int]:
        held = lesion.any(0).any(0)
        marked, others = (rng.permutation(flags.nonzero().flatten().numpy()) for flags in (held, ~held))
        marked = marked[: max(self.slices // 2, self.slices - len(others))]
        return sorted([*marked.tolist(), *others[: self.slices - len(marked)].tolist()])


def drawing_spacings(spacing: float) -> tuple[float, ...]:
    """Spacings in mm to draw subjects at for networks of a spacing: from half of it, but no finer than the template."""
    return (*(share * spacing for share in (0.5, 0.75) if share * spacing >= 1), spacing)


@dataclass(frozen=True)
class Survey:
    """What a source holds.

    Attributes:
        cases: their number.
        with_lesion: cases whose mask holds lesion.
        kept_lesion: cases of these that still hold some on the networks' grid.
        vanished: names of the others of these.
    """

    cases: int
    with_lesion: int
    kept_lesion: int
    vanished: list[str]

    def text(self) -> str:
        """One line for people."""
        line = f"{self.cases} cases, {self.with_lesion} with lesion, {self.kept_lesion} on the networks' grid"
        return line + (f"; too small for it or outside the head: {_some(self.vanished)}" if self.vanished else "")


class FolderSource:
    """Cases of a folder, with the masks of the same names in another.

    Args:
        images: folder of NIfTI volumes; nnU-Net's channel suffix ``_0000`` is understood.
        masks: folder of masks, or None. :func:`grcsf_fast.data.masks.mark_lesion` says which values are lesion.
        preprocessing: as for prediction.
        names: the cases to take; None: all.

    Raises:
        FileNotFoundError: no images, images without a mask or names without an image; the message names them.
        ValueError: two images of one case, or images that are their own masks.
    """

    def __init__(
        self,
        images: str | Path,
        masks: str | Path | None,
        preprocessing: Preprocessing,
        names: Sequence[str] | None = None,
    ) -> None:
        found = list_cases(images)
        self.masks = list_cases(masks) if masks is not None else None
        if self.masks is not None and (missing := sorted(set(found) - set(self.masks))):
            raise FileNotFoundError(f"{masks}: expected a mask for every image, found none for {', '.join(missing)}")
        if self.masks is not None and (same := [name for name in found if found[name].samefile(self.masks[name])]):
            raise ArgumentError(f"{masks}: expected masks, found the images themselves as masks of {_some(same)}")
        self.names = sorted(found) if names is None else list(names)
        if unknown := sorted(set(self.names) - set(found)):
            raise FileNotFoundError(f"{images}: expected images of the cases {', '.join(unknown)}, found none")
        self.images = found
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Case:
        return self._read(self.names[index % len(self.names)])[0]

    def _read(self, name: str) -> tuple[Case, bool]:
        """The case, and whether its mask holds lesion on the file's grid."""
        volume = load_volume(self.images[name])
        mask = None
        if self.masks is not None:
            mask = load_mask(self.masks[name], volume.data, volume.name)
            check_grid(mask, volume.name, volume.data.shape, volume.affine)
            if mask.share > MOST_OF_A_VOLUME:
                raise VolumeError(f"{mask.name}: expected a lesion mask, found {mask.share:.0%} of the volume marked")
        prepared = prepare(volume, self.preprocessing)
        lesion = prepare_mask(mask.voxels, prepared) if mask is not None else None
        return Case(name, prepared.data, lesion), bool(mask is not None and mask.voxels.any())

    def survey(self, progress: Callable[[list[str]], Iterable[str]] = lambda names: names) -> Survey:
        """Read every case once, so that none stops a training later.

        Args:
            progress: wraps the list of names.

        Raises:
            VolumeError: some cases cannot be used, all of which the message counts and the first ten it names; or
                there are masks, and no case holds lesion on its file's grid or none on the networks'.
        """
        problems, kept, vanished = [], 0, []
        for name in progress(list(self.names)):
            try:
                case, with_lesion = self._read(name)
            except (OSError, ValueError, Warning) as error:  # warnings are errors under -W error
                problems.append(str(error))
                continue
            if with_lesion:
                if case.lesion.any():
                    kept += 1
                else:
                    vanished.append(name)
        if problems:
            more = f"\n  and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
            listed = "".join(f"\n  {text}" for text in problems[:MOST_NAMED])
            raise VolumeError(f"{len(problems)} of {len(self.names)} cases cannot be used:{listed}{more}")
        survey = Survey(len(self.names), kept + len(vanished), kept, vanished)
        if self.masks is not None and not kept:
            spacing = " x ".join(f"{step:g}" for step in self.preprocessing.spacing)
            raise VolumeError(
                f"expected lesion in some mask on the grid of {spacing} mm, no case holds lesion: {survey.text()}"
            )
        return survey


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


class CasePool:
    """The cases in memory at a step: ``size`` of them, one replaced by the source's next every ``replace_every`` steps.

    Args:
        source: of the cases.
        size: cases held.
        replace_every: steps between replacements; 0: never.
        finish: applied to a new case once, for instance to compute its residual maps.
    """

    def __init__(
        self, source: Source, size: int, replace_every: int, finish: Callable[[Case], Case] = lambda case: case
    ) -> None:
        self.source = source
        self.size = size
        self.replace_every = replace_every
        self.finish = finish
        self._held: dict[int, Case] = {}

    def indices(self, step: int) -> range:
        first = step // self.replace_every if self.replace_every else 0
        return range(first, first + self.size)

    def at(self, step: int, progress: Callable[[Sequence[int]], Sequence[int]] = lambda missing: missing) -> list[Case]:
        """The cases of a step; ``progress`` wraps the list of those that have to be made."""
        wanted = self.indices(step)
        for index in [held for held in self._held if held not in wanted]:
            del self._held[index]
        for index in progress([index for index in wanted if index not in self._held]):
            case = self.finish(self.source[index])
            residual = None if case.residual is None else case.residual.half()
            self._held[index] = replace(case, residual=residual)
        return [self._held[index] for index in wanted]


def sample_crops(
    cases: Sequence[Case], count: int, crop: Sequence[int], lesion_fraction: float, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Crops for a training step.

    With two sizes in ``crop`` they are axial slices, with three they are boxes. A share of them is centred near a
    lesion voxel of a slice that holds lesion; the others lie anywhere. Smaller volumes are padded with edge values.

    Returns:
        ``image`` (count, 1, \\*crop) float32, and where the cases have them ``lesion`` (count, 1, \\*crop) float32 and
        ``residual`` (count, M, \\*crop) float32.
    """
    collected: dict[str, list[Tensor]] = {}
    for _ in range(count):
        case = cases[int(rng.integers(len(cases)))]
        shape = case.image.shape
        centre = [int(rng.integers(size)) for size in shape]
        if case.lesion is not None and rng.random() < lesion_fraction:
            slices = case.lesion.any(0).any(0).nonzero().flatten()
            if len(slices):
                z = int(slices[int(rng.integers(len(slices)))])
                inside = case.lesion[:, :, z].nonzero()
                x, y = inside[int(rng.integers(len(inside)))].tolist()
                reach = min(crop) // 4
                jitter = rng.integers(-reach, reach + 1, 3)
                centre = [x + int(jitter[0]), y + int(jitter[1]), z + (int(jitter[2]) if len(crop) == 3 else 0)]
        window = []
        for axis, size in enumerate(shape):
            if axis < len(crop):
                first = min(max(centre[axis] - crop[axis] // 2, 0), max(size - crop[axis], 0))
                window.append(slice(first, min(first + crop[axis], size)))
            else:
                window.append(centre[axis])
        padding = [
            side
            for size, goal in zip(reversed(shape[: len(crop)]), reversed(crop), strict=True)
            for side in _both_sides(goal - size)
        ]
        for name in ("image", "lesion", "residual"):
            values = getattr(case, name)
            if values is None:
                continue
            values = (values if name == "residual" else values[None])[(slice(None), *window)].float()
            if any(padding):
                values = F.pad(values[None], padding, mode="replicate")[0]
            collected.setdefault(name, []).append(values)
    return {name: torch.stack(values) for name, values in collected.items()}


def _both_sides(missing: int) -> tuple[int, int]:
    missing = max(missing, 0)
    return missing // 2, missing - missing // 2


# What training may change in its crops; see augmentation().
AUGMENTATIONS = ("all", "flips", "none")


def augmentation(
    spatial_dims: int, keys: Sequence[str], kind: str = "all"
) -> Callable[[dict[str, Tensor], int], dict[str, Tensor]]:
    """Random changes of a batch from :func:`sample_crops`, by MONAI.

    Args:
        spatial_dims: 2 or 3.
        keys: entries of the batch; intensities change in ``image`` alone.
        kind: ``"all"``: left-right flips, rotation, scaling, gamma, shift and noise; ``"flips"`` or ``"none"``.

    Returns:
        A function of a batch and a seed; the same seed gives the same batch.
    """
    if kind not in AUGMENTATIONS:
        raise ArgumentError(f"kind: expected one of {AUGMENTATIONS}, got {kind!r}")
    if kind == "none":
        return lambda batch, seed: batch
    from monai.transforms import (
        Compose,
        RandAdjustContrastd,
        RandAffined,
        RandFlipd,
        RandGaussianNoised,
        RandScaleIntensityd,
        RandShiftIntensityd,
    )

    modes = ["nearest" if key == "lesion" else "bilinear" for key in keys]
    changes = [
        RandFlipd(keys, prob=0.5, spatial_axis=0),
        RandAffined(
            keys,
            prob=0.5,
            rotate_range=[0.25] * (1 if spatial_dims == 2 else 3),
            scale_range=[0.15] * spatial_dims,
            mode=modes,
            padding_mode="border",
        ),
        RandAdjustContrastd(["image"], prob=0.3, gamma=(0.7, 1.4)),
        RandScaleIntensityd(["image"], prob=0.3, factors=0.15),
        RandShiftIntensityd(["image"], prob=0.3, offsets=0.15),
        RandGaussianNoised(["image"], prob=0.2, std=0.1),
    ]
    transform = Compose(changes if kind == "all" else changes[:1])

    def augment(batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        transform.set_random_state(seed)
        count = len(batch["image"])
        with _fresh_defaults():
            samples = [transform({key: batch[key][index] for key in keys}) for index in range(count)]
        # MONAI hands back MetaTensors, whose bookkeeping would go along through the whole network.
        return {key: torch.stack([sample[key].as_tensor() for sample in samples]) for key in keys}

    return augment
