"""The subjects: drawn once, with their residual maps, and kept in files that every run reads.

A subject is a volume of the autoencoder's grid (2 mm), of which 24 axial slices are kept, half of them with lesion
where it has as many. The autoencoder may look at the slices beside them too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import process_time

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grcsf_fast.data.files import replace_when_done
from grcsf_fast.data.volumes import Preprocessing, Volume, prepare, prepare_mask
from grcsf_fast.datasets.cases import Case
from grcsf_fast.networks.residual_maps import volume_residual_maps
from grcsf_fast.pretrained.bundle import Bundle
from grcsf_fast.synthesis.template import load_template
from grcsf_fast.training.synthetic import ACCURACY_SEEDS, ACCURACY_TEST_SEEDS, SyntheticSource

__all__ = ["SUBJECTS", "TESTS", "Size", "case_path", "draw_case", "evenly", "load_cases", "oracle_maps", "with_maps"]

SLICES = 24
NOISE = 0.3  # of the oracle's maps


@dataclass(frozen=True)
class Size:
    """How much is drawn and trained.

    Attributes:
        steps: of each training.
        train: subjects drawn to train on; settings with fewer labels take some of them.
        test: subjects of each test set.
        batch_size: crops of a step.
        crop: edge lengths.
    """

    steps: int = 400
    train: int = 32
    test: int = 48
    batch_size: int = 8
    crop: tuple[int, int] = (96, 96)

    def subjects(self) -> dict[str, int]:
        """Number of subjects by set."""
        return {"train": self.train} | dict.fromkeys(TESTS, self.test)


def _ours(first_seed: int) -> Callable[[Preprocessing, int, int], Case]:
    """Of the synthesizer that draws the shipped model's training; volumes of lesion spread evenly."""

    def draw(preprocessing: Preprocessing, index: int, count: int) -> Case:
        return SyntheticSource(preprocessing, first_seed, skull=False, spread=count)[index]

    return draw


def _validation(preprocessing: Preprocessing, index: int, count: int) -> Case:
    """Of the generator that no training uses, without the skull that it draws around some heads."""
    from benchmarks.validation_generator import draw_subject

    subject = draw_subject(load_template(preprocessing.spacing[0]), ACCURACY_TEST_SEEDS + index)
    name = f"validation_{index}"
    prepared = prepare(Volume(subject.image * subject.brain, subject.affine, nib.Nifti1Header(), name), preprocessing)
    return Case(name, prepared.data, prepare_mask(subject.lesion, prepared))


# By set, a function of preprocessing, index and number of subjects.
SUBJECTS: dict[str, Callable[[Preprocessing, int, int], Case]] = {
    "train": _ours(ACCURACY_SEEDS),
    "synthetic": _ours(ACCURACY_TEST_SEEDS),
}
if importlib.util.find_spec("benchmarks.validation_generator") is not None:
    SUBJECTS["validation"] = _validation
TESTS = tuple(name for name in SUBJECTS if name != "train")


def case_path(folder: Path, name: str, index: int) -> Path:
    return folder / "cases" / f"{name}_{index:03d}.safetensors"


def draw_case(folder: Path, name: str, index: int, count: int, bundle: Bundle) -> None:
    """Draw one subject of a set and write its slices and maps, unless its file is there."""
    path = case_path(folder, name, index)
    if path.is_file():
        return
    case = SUBJECTS[name](bundle.preprocessing, index, count)
    kept = _kept_slices(case.lesion, np.random.default_rng([index, *name.encode()]))
    settings = asdict(replace(bundle.residual_maps, signed=True))
    began = process_time()
    maps = volume_residual_maps(case.image, bundle.mae, **settings, slices=kept)
    seconds = process_time() - began
    tensors = {"image": case.image, "lesion": case.lesion, "residual_maps": maps.half()}
    with replace_when_done(path) as (part,):
        save_file(
            {key: tensor[..., kept].contiguous() for key, tensor in tensors.items()},
            part,
            {"seconds_of_maps": str(seconds)},
        )


def _kept_slices(lesion: Tensor, rng: np.random.Generator) -> list[int]:
    held = lesion.any(0).any(0)
    marked, others = (rng.permutation(flags.nonzero().flatten().numpy()) for flags in (held, ~held))
    marked = marked[: max(SLICES // 2, SLICES - len(others))]
    return sorted([*marked.tolist(), *others[: SLICES - len(marked)].tolist()])


def load_cases(folder: Path, name: str, count: int) -> tuple[list[Case], float]:
    """A set's cases with their residual maps, and the median of the processor's seconds that the maps of one took.

    Raises:
        FileNotFoundError: a subject that was not drawn.
    """
    cases, seconds = [], []
    for index in range(count):
        path = case_path(folder, name, index)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a subject; draw them with `python -m benchmarks.accuracy`")
        with safe_open(path, framework="pt") as file:
            parts = [file.get_tensor(key) for key in ("image", "lesion", "residual_maps")]
            seconds.append(float(file.metadata()["seconds_of_maps"]))
        cases.append(Case(path.stem, *parts))
    return cases, float(np.median(seconds))


def evenly(cases: Sequence[Case], count: int) -> list[Case]:
    """So many of them, spread over all: their order is that of the volume of lesion."""
    step = max(1, len(cases) // count)
    return list(cases[step // 2 :: step])[:count]


def with_maps(cases: Sequence[Case], kind: str) -> list[Case]:
    """The cases with the maps that a variant is given: ``"none"``, ``"residual"`` or ``"oracle"``."""
    if kind == "residual":
        return list(cases)
    return [
        replace(case, residual_maps=oracle_maps(case, number) if kind == "oracle" else None)
        for number, case in enumerate(cases)
    ]


def oracle_maps(case: Case, seed: int) -> Tensor:
    """The lesion blurred over 9x9 pixels of a slice, with noise: the same map for each of those that it replaces."""
    slices = case.lesion.permute(2, 0, 1)[:, None].float()  # (Z,1,X,Y)
    blurred = F.avg_pool2d(slices, 9, stride=1, padding=4)[:, 0].permute(1, 2, 0)  # (X,Y,Z)
    noise = torch.randn(blurred.shape, generator=torch.Generator().manual_seed(seed))
    return (blurred + NOISE * noise).half().expand(case.residual_maps.shape).contiguous()
