"""Cases of two folders: images, and masks of the same names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.files import list_cases
from ..data.masks import MOST_OF_A_VOLUME, check_grid, load_mask
from ..data.volumes import Preprocessing, VolumeError, load_volume, prepare, prepare_mask
from ..errors import ArgumentError
from .cases import Case

__all__ = [
    "FolderSource",
    "Survey",
]

MOST_NAMED = 10  # cases in a message


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
