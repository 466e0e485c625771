"""BIDS data sets with lesion masks beside the images or among their derivatives.

A lesion mask is a ``mask``, ``roi``, ``dseg``, ``seg`` or ``msk`` whose name speaks of a lesion
(``sub-01_ses-1_space-orig_label-lesion_mask.nii.gz``, ``sub-01_desc-lesion_dseg.nii.gz``), and what others write:
``sub-01_T1w_label-lesion_roi.nii.gz`` (fMRIPrep), ``sub-01_FLAIR_lesion-manual.nii.gz`` (spine data sets),
``sub-strokecase0001_ses-0001_msk.nii.gz`` (ISLES 2022). Images are those of the same subject, session and space.
https://bids-specification.readthedocs.io/en/stable/derivatives/imaging.html
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..data.images import examine
from ..data.masks import same_grid
from ..data.volumes import VolumeError
from .cases_file import CaseList, ListedCase
from .folders import LayoutError, check_all_found, check_folder, files_below, without_ending

__all__ = ["find_bids"]

IMAGES = ("T1w", "T2w", "FLAIR", "PDw", "T2starw", "UNIT1", "PSIR", "STIR", "dwi", "trace", "adc", "ct")
MASKS = ("mask", "roi", "dseg", "seg", "msk")
DISTINGUISH = ("acq", "ce", "rec", "run", "dir", "part")  # two images of one kind
SITES = ("site", "site_id", "center", "centre")  # columns of participants.tsv
EXPECTED = "sub-*/[ses-*/]anat/sub-*_T1w.nii.gz, or another image, and masks such as sub-*_label-lesion_mask.nii.gz"


@dataclass(frozen=True)
class Named:
    """A file with what BIDS says in its name.

    Attributes:
        path: of the file.
        entities: by key, without those that name no value.
        kinds: kinds of images that the name holds; of an image one.
        derived: whether it lies below a folder ``derivatives``.
    """

    path: Path
    entities: dict[str, str]
    kinds: tuple[str, ...]
    derived: bool

    @property
    def place(self) -> tuple[str, str, str]:
        """Subject, session and space; the space that an image itself spans has no name."""
        space = self.entities.get("space", "")
        own = space == "orig" or space.lower() in (kind.lower() for kind in IMAGES)
        return self.entities["sub"], self.entities.get("ses", ""), "" if own else space

    @property
    def image(self) -> tuple[dict[str, str], set[str]]:
        """What a mask's name says of its image: what tells it from others of its kind, and its kinds."""
        space = self.entities.get("space", "").lower()
        spanned = {kind for kind in IMAGES if kind.lower() == space}
        return {key: self.entities[key] for key in DISTINGUISH if key in self.entities}, {*self.kinds, *spanned}


def find_bids(root: Path) -> CaseList:
    """The cases of a data set's folder, one per subject, session and space that has a lesion mask.

    All lesion masks there are joined. The images are the kinds that every case has on the grid of its masks, in the
    mask's folder or in the raw data; where the mask's name holds a kind (``sub-01_T2w_lesion-manual``), that one.
    Sessions without mask are in no fold, if they have all of these kinds. Sites come from ``participants.tsv``.

    Raises:
        LayoutError: no images or no lesion masks, a mask without image on its grid, masks of several images in a
            session, several images of one kind, or no kind that all cases have.
    """
    check_folder(root, EXPECTED)
    images: dict[tuple, list[Named]] = {}
    masks: dict[tuple, list[Named]] = {}
    files = list(files_below(root))
    for path in files:
        named = _named(path, root)
        if named is not None:
            (masks if _is_mask(path) else images).setdefault(named.place, []).append(named)
    found = [named.path.relative_to(root) for group in images.values() for named in group]
    check_all_found(root, f"images {EXPECTED}", found, [], files)
    check_all_found(root, "lesion masks such as sub-*_label-lesion_mask.nii.gz", list(masks), [], files)
    without = [own[0].path.relative_to(root) for place, own in masks.items() if place not in images]
    with_image = [own[0].path.relative_to(root) for place, own in masks.items() if place in images]
    if without:
        missing = [f"one for {path}" for path in without]
        check_all_found(root, "an image for every lesion mask", with_image, missing)
    chosen = {place: _of_mask(images[place], own, root) for place, own in masks.items()}
    kinds = [kind for kind in IMAGES if all(kind in by_kind for by_kind in chosen.values())]
    if not kinds:
        shown = [f"{_name(place, False)} with {', '.join(by_kind)}" for place, by_kind in chosen.items()]
        raise LayoutError(f"{root}: expected a kind of image that all cases have, found {'; '.join(shown[:3])}, ...")
    for place, group in images.items():
        raw = [named for named in group if not named.derived and named.kinds[0] in kinds]
        if place not in masks and {named.kinds[0] for named in raw} == set(kinds):
            chosen[place] = _one_of_each(raw, root)
    sites, spaces = _sites(root), [place[:2] for place in chosen]
    cases = [
        ListedCase(
            _name(place, spaces.count(place[:2]) > 1),
            tuple(by_kind[kind] for kind in kinds),
            tuple(named.path for named in masks.get(place, ())),
            f"sub-{place[0]}",
            sites.get(f"sub-{place[0]}"),
        )
        for place, by_kind in chosen.items()
    ]
    return CaseList("bids", tuple(cases), tuple(kinds))


def _named(path: Path, root: Path) -> Named | None:
    """What a file's name says; None of files that are neither an image nor a lesion mask."""
    stem = without_ending(path.name)
    parts = stem.split("_")
    if stem == path.name or not parts[0].startswith("sub-"):
        return None
    kinds = tuple(kind for kind in IMAGES if any(part.lower() == kind.lower() for part in parts))
    if not _is_mask(path) and not (kinds and parts[-1].lower() == kinds[-1].lower() and len(kinds) == 1):
        return None
    pairs = (part.partition("-") for part in parts)
    entities = {key: value for key, dash, value in pairs if dash}
    return Named(path, entities, kinds, "derivatives" in path.relative_to(root).parts)


def _is_mask(path: Path) -> bool:
    *parts, last = without_ending(path.name).split("_")
    if last.startswith("lesion"):
        return True
    return last == "msk" or (last in MASKS and any("lesion" in part.lower() for part in parts))


def _one_of_each(images: Iterable[Named], root: Path) -> dict[str, Path]:
    """By kind the images of a session without masks."""
    chosen: dict[str, Named] = {}
    for named in images:
        (kind,) = named.kinds
        earlier = chosen.setdefault(kind, named)
        if earlier is not named:
            raise LayoutError(
                f"{root}: expected one {kind} of a session without lesion masks, found {earlier.path.name} and "
                f"{named.path.name}"
            )
    return {kind: named.path for kind, named in chosen.items()}


def _of_mask(images: Iterable[Named], masks: list[Named], root: Path) -> dict[str, Path]:
    """By kind the images on the grid of a mask."""
    mask, chosen = masks[0], dict[str, Named]()
    if other := next((one for one in masks if one.image != mask.image), None):
        raise LayoutError(
            f"{root}: expected the lesion masks of a session on one image, found {mask.path.name} and "
            f"{other.path.name}, whose names speak of two"
        )
    wanted, _ = mask.image
    beside = [named for named in images if named.path.parent == mask.path.parent]
    raw = [named for named in images if not named.derived and named not in beside]
    for near in (beside, raw):
        for named in near:
            (kind,) = named.kinds
            fits = all(named.entities.get(key) == value for key, value in wanted.items())
            if not fits or (mask.kinds and kind not in mask.kinds) or not _on_grid(named.path, mask.path):
                continue
            earlier = chosen.setdefault(kind, named)
            if earlier is not named and earlier in near:
                raise LayoutError(
                    f"{root}: expected one {kind} on the grid of {mask.path.name}, found {earlier.path.name} and "
                    f"{named.path.name}"
                )
    if not chosen:
        raise LayoutError(f"{mask.path}: expected an image on the grid of this lesion mask, found none")
    return {kind: named.path for kind, named in chosen.items()}


def _on_grid(image: Path, mask: Path) -> bool:
    try:
        return same_grid(examine(image), examine(mask))
    except (VolumeError, OSError):
        return False  # several volumes, for instance; what is in the list is read again, and named then


def _name(place: tuple[str, str, str], with_space: bool) -> str:
    subject, session, space = place
    return (
        f"sub-{subject}" + (f"_ses-{session}" if session else "") + (f"_space-{space}" if with_space and space else "")
    )


def _sites(root: Path) -> dict[str, str]:
    """By subject, from ``participants.tsv``."""
    path = root / "participants.tsv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    column = next((name for name in SITES if rows and name in rows[0]), None)
    if column is None:
        return {}
    return {row["participant_id"]: row[column] for row in rows if row.get("participant_id") and row.get(column)}
