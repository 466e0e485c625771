"""Cases of two folders: images, and masks of the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..data.channels import Channels, find_images, parts_of
from ..data.files import list_cases
from ..data.images import OneChannel, examine
from ..data.labels import Labels
from ..data.masks import Mask, as_stored
from ..data.volumes import Preprocessing, Volume
from ..errors import ArgumentError
from .cases_file import CaseList, ListedCase
from .folders import LayoutError, check_all_found, check_folder, subject_of
from .sources import FileSource
from .survey import some

__all__ = [
    "FolderSource",
    "find_pairs",
]


class FolderSource(FileSource):
    """Cases of a folder, with the masks of the same names in another.

    Args:
        images: folder of volumes; nnU-Net's channel suffixes such as ``_0000`` are understood.
        masks: folder of masks, or None. :func:`grcsf_fast.data.masks.mark_lesion` says which values are lesion.
        preprocessing: as for prediction.
        names: the cases to take; None: all.
        channels: images of a case; several are files per channel or 4-D files.
        labels: to be told apart; None: all that a mask marks is lesion.

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
        channels: int = 1,
        labels: Labels | None = None,
    ) -> None:
        found: Mapping[str, Path | Channels] = list_cases(images) if channels == 1 else _of_channels(images, channels)
        marked = list_cases(masks) if masks is not None else None
        if marked is not None and (missing := sorted(set(found) - set(marked))):
            raise FileNotFoundError(f"{masks}: expected a mask for every image, found none for {', '.join(missing)}")
        if marked is not None and (same := _themselves(found, marked)):
            raise ArgumentError(f"{masks}: expected masks, found the images themselves as masks of {some(same)}")
        names = sorted(found) if names is None else list(names)
        if unknown := sorted(set(names) - set(found)):
            raise FileNotFoundError(f"{images}: expected images of the cases {', '.join(unknown)}, found none")
        files = {name: [path] for name, path in marked.items()} if marked is not None else None
        super().__init__(found, files, preprocessing, names, labels)

    def _mask(self, name: str, volume: Volume, counted: Any) -> Mask:
        return as_stored(super()._mask(name, volume, counted), volume.data.shape, volume.affine)


def _of_channels(images: str | Path, channels: int) -> Mapping[str, Channels]:
    cases, problems = find_images(images, channels)
    for error in problems.values():
        raise error
    return cases


def _themselves(images: Mapping[str, Path | Channels], masks: Mapping[str, Path]) -> list[str]:
    """Names of the images that are their own masks."""
    files = {
        name: [part.path if isinstance(part, OneChannel) else part for part in parts_of(image)]
        for name, image in images.items()
    }
    return [name for name, paths in files.items() if any(path.samefile(masks[name]) for path in paths)]


def find_pairs(images: Path, masks: Path) -> CaseList:
    """The cases of two folders with files of the same names; nnU-Net's suffix ``_0000`` of images is understood.

    Raises:
        LayoutError: no folders, no images, images without a mask, of several channels or that are their own masks.
    """
    for folder in (images, masks):
        check_folder(folder, "files ending in .nii or .nii.gz")
    try:
        found, marked = list_cases(images), list_cases(masks)
    except (OSError, ValueError) as error:
        raise LayoutError(str(error)) from error
    there = [marked[name].name for name in found if name in marked]
    check_all_found(masks, f"a mask of the name of every image in {images}", there, sorted(set(found) - set(marked)))
    if same := [name for name in found if found[name].samefile(marked[name])]:
        raise LayoutError(f"{masks}: expected masks, found the images themselves as masks of {some(same)}")
    _check_one_channel(images, masks, found)
    cases = [ListedCase(name, (path,), (marked[name],), subject_of(name)) for name, path in found.items()]
    return CaseList("pairs", tuple(cases))


def _check_one_channel(images: Path, masks: Path, found: Mapping[str, Path]) -> None:
    """See that no file holds several images, which a training would notice when all masks are read.

    Raises:
        LayoutError: some do.
    """
    several: dict[Path, tuple[int, ...]] = {}
    for path in found.values():
        with suppress(OSError, ValueError):  # of one image, or one that whoever reads it speaks about
            several[path] = examine(OneChannel(path, 1)).image.dataobj.shape
    if several:
        path, shape = next(iter(several.items()))
        more = f" and {len(several) - 1} more of several images" if len(several) > 1 else ""
        names = ",".join(f"NAME{number}" for number in range(shape[3]))
        raise LayoutError(
            f"{path}: expected one image of three axes, found shape {shape}{more}; channels of a case are listed by "
            "`cases decathlon` or `cases nnunet`, by a dataset.json, or taken without a list: `grcsf-fast train-mae -i "
            f"{images} --channels {names}`, then `train -i {images} -l {masks}`"
        )
