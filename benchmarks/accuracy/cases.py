"""The subjects: drawn once and kept in files that every run reads, and their residual maps in others.

A subject is a volume of the autoencoder's grid (2 mm), of which 24 axial slices are kept, half of them with lesion
where it has as many, with the slices that the autoencoder sees beside each.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from grcsf_fast.data.files import replace_when_done
from grcsf_fast.data.volumes import Preprocessing, Volume, prepare, prepare_mask
from grcsf_fast.datasets.cases import Case
from grcsf_fast.networks.residual_maps import volume_residual_maps
from grcsf_fast.networks.slices import stack_slices
from grcsf_fast.pretrained.bundle import Bundle
from grcsf_fast.synthesis.template import load_template
from grcsf_fast.training.synthetic import ACCURACY_SEEDS, ACCURACY_TEST_SEEDS, SyntheticSource

__all__ = [
    "BESIDE", "MORE", "SUBJECTS", "TESTS", "Size", "case_path", "draw_case", "evenly", "load_cases", "maps_of",
    "maps_path", "oracle_maps", "shown",
]  # fmt: skip

SLICES = 24
NEIGHBOURS = 2  # on either side, as many as the autoencoder sees
BESIDE = 2 * NEIGHBOURS
ORACLES, NOISE = 2, 0.3  # maps of the oracle, and the noise in them
# Of the set of as many subjects as the autoencoder was trained on, for a network that learns from them too.
MORE = "more"


@dataclass(frozen=True)
class Size:
    """How much is drawn and trained.

    Attributes:
        steps: of each training.
        train: subjects drawn to train on; settings with fewer labels take some of them.
        test: subjects of each test set.
        more: subjects beyond ``train``, for the variant that is given as many labels as the autoencoder had subjects.
        batch_size: crops of a step.
        crop: edge lengths.
    """

    steps: int = 400
    train: int = 32
    test: int = 48
    more: int = 500  # `train-mae --steps 6000` shows its autoencoder 32 + 6000 / 12 subjects
    batch_size: int = 8
    crop: tuple[int, int] = (96, 96)

    def subjects(self) -> dict[str, int]:
        """Number of subjects by set."""
        return {"train": self.train, MORE: self.more} | dict.fromkeys(TESTS, self.test)


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
    MORE: _ours(ACCURACY_SEEDS + 1000),
    "synthetic": _ours(ACCURACY_TEST_SEEDS),
}
if importlib.util.find_spec("benchmarks.validation_generator") is not None:
    SUBJECTS["validation"] = _validation
TESTS = tuple(name for name in SUBJECTS if name not in ("train", MORE))


def case_path(folder: Path, name: str, index: int) -> Path:
    return folder / "cases" / f"{name}_{index:03d}.safetensors"


def maps_path(folder: Path, name: str, index: int, mae: str) -> Path:
    """``mae`` being the start of the bundle's hash: another autoencoder's maps are others."""
    return folder / f"maps_{mae}" / f"{name}_{index:03d}.safetensors"


def draw_case(folder: Path, name: str, index: int, count: int, bundle: Bundle) -> None:
    """Draw one subject of a set and write its slices and, in a file of their own, its maps, where they are missing."""
    path, maps_at = case_path(folder, name, index), maps_path(folder, name, index, bundle.weights_sha256[:8])
    if path.is_file() and (maps_at.is_file() or name == MORE):
        return
    case = SUBJECTS[name](bundle.preprocessing, index, count)
    kept = _kept_slices(case.lesion, np.random.default_rng([index, *name.encode()]))
    if not path.is_file():
        beside = stack_slices(case.image, torch.tensor(kept), NEIGHBOURS)[:, 1:].permute(1, 2, 3, 0)  # (4,X,Y,24)
        tensors = {"image": case.image[..., kept], "lesion": case.lesion[..., kept], "beside": beside.half()}
        with replace_when_done(path) as (part,):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part)
    if name == MORE:  # who learns from these is given no maps
        return
    with replace_when_done(maps_at) as (part,):
        save_file({"residual_maps": maps_of(case.image, kept, bundle).half().contiguous()}, part)


def maps_of(image: Tensor, kept: Sequence[int], bundle: Bundle) -> Tensor:
    """The signed residual maps (M, X, Y, K) of K slices of an image (X, Y, Z)."""
    settings = asdict(replace(bundle.residual_maps, signed=True))
    return volume_residual_maps(image, bundle.mae, **settings, slices=kept)[..., kept]


def _kept_slices(lesion: Tensor, rng: np.random.Generator) -> list[int]:
    held = lesion.any(0).any(0)
    marked, others = (rng.permutation(flags.nonzero().flatten().numpy()) for flags in (held, ~held))
    marked = marked[: max(SLICES // 2, SLICES - len(others))]
    return sorted([*marked.tolist(), *others[: SLICES - len(marked)].tolist()])


def load_cases(folder: Path, name: str, count: int, kind: str, mae: str) -> list[Case]:
    """A set's cases as a variant is shown them.

    Args:
        folder: that has the subjects.
        name: of the set.
        count: of cases, from the first on.
        kind: see :func:`shown`.
        mae: the start of the hash of the bundle that made the residual maps.

    Raises:
        FileNotFoundError: a subject or maps that were not drawn.
    """
    cases = []
    for index in range(count):
        found = _read(case_path(folder, name, index))
        maps = _read(maps_path(folder, name, index, mae))["residual_maps"] if "residual" in kind else None
        case = Case(f"{name}_{index:03d}", found["image"], found["lesion"], maps)
        cases.append(shown(case, found["beside"], kind, index))
    return cases


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a subject; draw them with `python -m benchmarks.accuracy`")
    return load_file(path)


def evenly(cases: Sequence[Case], count: int) -> list[Case]:
    """So many of them, spread over all: their order is that of the volume of lesion."""
    step = max(1, len(cases) // count)
    return list(cases[step // 2 :: step])[:count]


def shown(case: Case, beside: Tensor, kind: str, number: int) -> Case:
    """The case with what a variant sees beside the image in the place of its residual maps.

    Args:
        case: with its residual maps, if ``kind`` asks for them.
        beside: (4, X, Y, Z), the slices below and above each.
        kind: ``"none"``, ``"residual"``, ``"oracle"``, ``"beside"``, or ``"beside, residual"`` for both, in that order.
        number: of the case, for the oracle's noise.
    """
    if kind == "none":
        return replace(case, residual_maps=None)
    if kind == "oracle":
        return replace(case, residual_maps=oracle_maps(case, number))
    parts = [beside] if "beside" in kind else []
    parts += [case.residual_maps] if "residual" in kind else []
    return replace(case, residual_maps=torch.cat([part.half() for part in parts]))


def oracle_maps(case: Case, seed: int) -> Tensor:
    """The lesion blurred over 9x9 pixels of a slice, with noise: the same map for each of those that it replaces."""
    slices = case.lesion.permute(2, 0, 1)[:, None].float()  # (Z,1,X,Y)
    blurred = F.avg_pool2d(slices, 9, stride=1, padding=4)[:, 0].permute(1, 2, 0)  # (X,Y,Z)
    noise = torch.randn(blurred.shape, generator=torch.Generator().manual_seed(seed))
    return (blurred + NOISE * noise).half().expand(ORACLES, *blurred.shape).contiguous()
