"""Cases of two folders: images, and masks of the same names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.channels import Channels, find_images, parts_of
from ..data.files import SUFFIXES, list_cases
from ..data.images import OneChannel
from ..data.labels import Labels
from ..data.masks import Mask, as_stored
from ..data.names import is_map
from ..data.volumes import Preprocessing, Volume
from ..errors import ArgumentError
from .cases_file import UNNAMED, CaseList, ListedCase
from .folders import LayoutError, check_all_found, check_folder, files_below
from .patterns import (
    Place,
    called,
    find_channels,
    lacking,
    left_open,
    own_name,
    path_name,
    subjects_of,
)
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


def find_pairs(images: Path, masks: Path, *patterns: Path, mask: str | None = None) -> CaseList:
    """The cases of a folder of images and one of masks. A warning counts masks without an image, which are left out.

    Args:
        images: folder with an image of each case directly in it; nnU-Net's suffix ``_0000`` is understood. With
            patterns they are searched in it and below.
        masks: folder with files of the cases' names directly in it.
        patterns: for each channel NAME=PATTERN, as of :func:`grcsf_fast.datasets.patterns.find_channels`.
        mask: how the paths of masks in ``masks`` and below end, ``*_seg.nii.gz``; what stands for ``*``, or the folder
            where nothing does, is the case's name. Where one of both folders holds the other, a mask is of a case only
            if the folders that its pattern leaves open are those of the case's images too.

    Raises:
        ArgumentError: patterns without names.
        LayoutError: no folders, no images, cases without a mask or a channel, images of other channels, several masks
            of a case, or images that are their own masks.
    """
    for folder in (images, masks):
        check_folder(folder, "files ending in .nii or .nii.gz")
    if patterns:
        channels, found, places = _of_patterns(images, patterns)
    else:
        channels, found = UNNAMED, {name: (path,) for name, path in _of_names(images).items()}
        places: dict[str, Place] = {name: ((), name) for name in found}
    if mask is None:
        marked, near = _of_names(masks), {}
        alone = [path for name, path in marked.items() if name not in found and not is_map(name, marked)]
    else:
        marked, near, alone = _masks_of_pattern(images, masks, mask, places)
    there = [marked[name].name for name in found if name in marked]
    expected = (
        f"a mask of the name of every image in {images}" if mask is None else f"a mask called {mask} of every case"
    )
    missing = sorted(set(found) - set(marked), key=lambda name: (name not in near, name))
    shown = [f"{name} ({near[name]})" if name in near else name for name in missing]
    check_all_found(masks, expected, there, shown)
    if same := _themselves({name: Channels(name, own) for name, own in found.items()}, marked):
        raise LayoutError(f"{masks}: expected masks, found the images themselves as masks of {some(same)}")
    listed = {getattr(image, "path", image) for own in found.values() for image in own}
    if alone := [path.relative_to(masks) for path in alone if path not in listed]:
        warnings.warn(
            f"{masks}: left out are masks without an image, {len(alone)} of them, the first {alone[0]}",
            stacklevel=2,
        )
    subjects = subjects_of(list(found), [places[name] for name in found])
    cases = [
        ListedCase(name, own, (marked[name],), subject)
        for (name, own), subject in zip(found.items(), subjects, strict=True)
    ]
    return CaseList("pairs", tuple(cases), channels)


def _of_names(folder: Path) -> dict[str, Path]:
    """A file of each case."""
    try:
        return list_cases(folder)
    except (OSError, ValueError) as error:
        raise LayoutError(str(error)) from error


def _of_patterns(
    images: Path, patterns: Sequence[Path]
) -> tuple[tuple[str, ...], dict[str, tuple[Path | OneChannel, ...]], dict[str, Place]]:
    """Names of the channels, the images of each case, and what the patterns leave open of their paths."""
    names, cases = find_channels(images, patterns, "pairs: expected after IMAGES MASKS a pattern for each channel")
    if without := sum(len(own) < len(names) for own in cases.values()):
        raise LayoutError(
            f"{images}: expected {' and '.join(names)} of every case, found {without} of {len(cases)} without: "
            f"{lacking(images, names, cases)}; move these cases elsewhere, or list without the channel that they lack"
        )
    places = dict(zip(called(images, list(cases)), cases, strict=True))
    return names, {case: tuple(cases[place][name] for name in names) for case, place in places.items()}, places


def _masks_of_pattern(
    images: Path, masks: Path, pattern: str, places: Mapping[str, Place]
) -> tuple[dict[str, Path], dict[str, str], list[Path]]:
    """Masks of the cases by what their paths leave open, also of those that a prediction wrote.

    Returns:
        The mask of each case that has one; of others what is there in its place, in words; and files of no case, but
        for residual maps.
    """
    found, near, of_none = dict[str, Path](), dict[str, str](), dict[Path, Place]()
    for path in files_below(masks):
        below = path.relative_to(masks)
        if not path.name.lower().endswith(SUFFIXES) or not below.match(pattern):
            continue
        place = left_open(below, pattern)
        called_so = {own_name(masks, place), path_name(masks, place)} & places.keys()
        if not called_so:
            of_none[below] = place
        for name in called_so:
            if not _lies_with(masks, place, images, places[name]):
                of_images = "/".join(places[name][0]) or images
                near.setdefault(name, f"{below} lies in another folder than its images, {of_images}")
            elif found.setdefault(name, path) != path:
                raise LayoutError(f"{masks}: expected one mask of {name}, found {found[name]} and {path}")
    for name in places.keys() - found.keys() - near.keys():
        folders, own = places[name]
        alike = [
            path
            for path, (other_folders, other) in of_none.items()
            if (own and own == other) or (folders and folders[:1] == other_folders[:1])
        ]
        if alike or (of_none and not found):
            other = next(iter(alike or of_none))
            call = own_name if name == own_name(images, places[name]) else path_name
            near[name] = f"{other} is of {call(masks, of_none[other])}"
    alone = {path: own_name(masks, place) for path, place in of_none.items()}
    cases = {*places, *alone.values()}
    return found, near, [masks / path for path, name in alone.items() if not is_map(name, cases)]


def _lies_with(masks: Path, place: Place, images: Path, of_case: Place) -> bool:
    """Whether a mask of a case's name can be its own: where masks and images are searched in the same folders, only
    if it lies where the images do, as another session's and a prediction have that name too."""
    of_images, of_masks = images.resolve(), masks.resolve()
    return (
        not (of_images.is_relative_to(of_masks) or of_masks.is_relative_to(of_images))
        or place[0] == of_case[0]
        or of_masks.joinpath(*place[0]) == of_images.joinpath(*of_case[0])
        or path_name(masks, place) == path_name(images, of_case)
    )
