"""BIDS data sets with lesion masks beside the images or among their derivatives.

A lesion mask is a ``mask``, ``roi``, ``dseg``, ``seg`` or ``msk`` whose name speaks of a lesion, but not as its
subject, session, space or another such entity (``sub-01_ses-1_space-orig_label-lesion_mask.nii.gz``,
``sub-01_desc-lesion_dseg.nii.gz``, ``sub-01_lesion_mask.nii.gz``), or has the label ``L``, as BIDS writes it
(``sub-01_label-L_mask.nii.gz``), and what others write:
``sub-01_T1w_label-lesion_roi.nii.gz`` (fMRIPrep), ``sub-01_FLAIR_lesion-manual.nii.gz`` (spine data sets),
``sub-strokecase0001_ses-0001_msk.nii.gz`` (ISLES 2022). Images are those of the same subject, session and space.
https://bids-specification.readthedocs.io/en/stable/derivatives/imaging.html
"""

from __future__ import annotations

import csv
import re
import shlex
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.files import scans_command
from ..data.images import OneChannel, OpenImage, examine
from ..data.masks import same_grid
from ..data.volumes import VolumeError
from .cases_file import CaseList, ListedCase
from .folders import (
    LayoutError,
    check_all_found,
    check_folder,
    check_packed_once,
    files_below,
    leads_nowhere,
    to_nothing,
    without_ending,
)

__all__ = ["find_bids"]

IMAGES = ("T1w", "T2w", "FLAIR", "PDw", "T2starw", "UNIT1", "PSIR", "STIR", "dwi", "trace", "adc", "ct")
MASKS = ("mask", "roi", "dseg", "seg", "msk")
# Keys of BIDS whose values say something else than what a mask marks.
OTHER = "sub|ses|sample|task|tpl|acq|ce|trc|stain|dir|rec|run|echo|part|chunk|mod|recording|proc|space|res|den"
OF_LESION = re.compile(rf"label-L|(?!(?:{OTHER})-)(?i:.*lesion.*)")  # a part of a mask's name
DISTINGUISH = ("acq", "ce", "rec", "run", "dir", "part")  # two images of one kind
SITES = ("site", "site_id", "center", "centre")  # columns of participants.tsv
EXPECTED = "sub-*/[ses-*/]anat/sub-*_T1w.nii.gz, or another image, and masks such as sub-*_label-lesion_mask.nii.gz"
ACCEPTED = (
    "lesion masks named lesion, label-lesion, label-L, desc-lesion, lesion-manual or ending in _msk, such as "
    "sub-*_label-lesion_mask.nii.gz"
)
# Why a session has no image of a kind; of several files what is further down is said.
MISSING, UNFETCHED, OTHER_SPACE, OTHER_NAME, SEVERAL, OTHER_GRID, UNREADABLE = WHY = (
    "missing", "a link to nothing", "not in the mask's space", "the mask's name speaks of another image",
    "several volumes in a file", "not on the mask's grid", "cannot be read",
)  # fmt: skip
MOST_NAMED = 3  # sessions in a message


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


@dataclass(frozen=True)
class Found:
    """What a session with masks has.

    Attributes:
        images: by kind those on the grid of its masks.
        why: by kind why it has none, one of :data:`WHY`.
        damaged: by kind what is wrong with a file that cannot be read.
    """

    images: dict[str, Path]
    why: dict[str, str]
    damaged: dict[str, str]


def find_bids(root: Path, mask: str | None = None) -> CaseList:
    """The cases of a data set's folder, one per subject, session and space that has a lesion mask.

    All lesion masks there are joined. The images are the kinds that every case has on the grid of its masks, in the
    mask's folder or in the raw data; where the mask's name holds a kind (``sub-01_T2w_lesion-manual``), that one.
    A warning names each kind that only some cases have, why and where. Sessions without mask are in no fold, if they
    have all of these kinds; a warning counts the others. Sites come from ``participants.tsv``.

    Args:
        root: the folder.
        mask: how the paths of the lesion masks end, ``*_label-WMH_mask.nii.gz``; None: see above.

    Raises:
        LayoutError: no images or no lesion masks, a mask without image on its grid, a mask beside its unpacked copy,
            masks of several images in a session, or in folders of several sessions that their names do not tell,
            several images of one kind, no kind that all cases have, or a file that cannot be read: a mask, or an image
            of a kind that all cases would have.
    """
    check_folder(root, EXPECTED)
    images: dict[tuple, list[Named]] = {}
    masks: dict[tuple, list[Named]] = {}
    files = list(files_below(root))
    for path in files:
        named = _named(path, root, mask)
        if named is not None:
            (masks if _is_mask(path, mask) else images).setdefault(named.place, []).append(named)
    raw = {place: [named for named in group if not named.derived] for place, group in images.items()}
    found = [named.path.relative_to(root) for group in images.values() for named in group]
    check_all_found(root, f"images {EXPECTED}", found, [], files)
    if not masks:
        _say_no_masks(root, files, mask, next(iter(images.values()))[0].path)
    if links := [one.path.relative_to(root) for own in masks.values() for one in own if leads_nowhere(one.path)]:
        raise LayoutError(f"{root}: expected lesion masks, found {to_nothing(links)}")
    for own in masks.values():
        check_packed_once(one.path for one in own)
        _check_session(own, root)
    without = [own[0].path.relative_to(root) for place, own in masks.items() if place not in images]
    with_image = [own[0].path.relative_to(root) for place, own in masks.items() if place in images]
    if without:
        missing = [f"one for {path}" for path in without]
        check_all_found(root, "an image for every lesion mask", with_image, missing)
    of_masks = {place: _of_mask(images[place], own, root) for place, own in masks.items()}
    kinds = _kinds_of_all(root, of_masks, raw)
    chosen = {place: found.images for place, found in of_masks.items()}
    masked, incomplete = {place[:2] for place in masks}, list[str]()
    for place, group in raw.items():
        own = [named for named in group if named.kinds[0] in kinds]
        if place in masks or not group:
            continue
        if lacking := sorted(set(kinds) - {named.kinds[0] for named in own}):
            incomplete += [f"{_name(place, True)} lacks {', '.join(lacking)}"] if place[:2] not in masked else []
        else:
            chosen[place] = _one_of_each(own, root)
    if incomplete:
        warnings.warn(
            f"{root}: left out are sessions without a mask, {len(incomplete)} of them: {_some(incomplete, '; ')}",
            stacklevel=2,
        )
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


def _check_session(masks: Sequence[Named], root: Path) -> None:
    """See that masks that are of one session by their names do not lie in folders of several."""
    first: dict[str, Path] = {}
    for path in (one.path.relative_to(root) for one in masks):
        for folder in (part for part in path.parts[:-1] if part.startswith("ses-")):
            first.setdefault(folder, path)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise LayoutError(
            f"{root}: expected the session in the names of files, as in sub-1_ses-1_T1w.nii.gz, found {one} and "
            f"{other}, which are of one session by their names; rename them, or make a list of two folders by "
            "`grcsf-fast cases pairs`"
        )


def _say_no_masks(root: Path, files: Sequence[Path], mask: str | None, image: Path) -> None:
    """
    Raises:
        LayoutError: in any case; the message names the way on where there are masks of other names.
    """
    others = [path for path in files if without_ending(path.name).split("_")[-1] in MASKS and path.name[:4] == "sub-"]
    expected = ACCEPTED if mask is None else f"lesion masks called {mask}"
    try:
        check_all_found(root, expected, [], [], files)
    except LayoutError as error:
        if not others:
            alone = scans_command(root, image)
            raise LayoutError(f"{error}; without masks, `{alone}` lists the scans alone") from None
        parts = others[0].name.split("_")
        own = shlex.quote("_".join(["*", *(part for part in parts if not part.startswith(("sub-", "ses-")))]))
        raise LayoutError(
            f"{error}; for masks of other names, such as {others[0].relative_to(root)}, give --mask {own}, or make a "
            "list of two folders by `grcsf-fast cases pairs`"
        ) from None


def _kinds_of_all(root: Path, of_masks: Mapping[tuple, Found], raw: Mapping[tuple, Sequence[Named]]) -> list[str]:
    """The kinds that every session with masks has; a warning for each of the others says why and where.

    Raises:
        LayoutError: there is none, or a file that cannot be read is all that is in the way of one.
    """
    sessions = [place[:2] for place in of_masks]
    names = {place: _name(place, sessions.count(place[:2]) > 1) for place in of_masks}
    anywhere = {(place[:2], named.kinds[0]) for place, group in raw.items() if place[:2] in sessions for named in group}
    known = {kind for found in of_masks.values() for kind in (*found.images, *found.why)}
    known |= {kind for _, kind in anywhere}
    kinds, left_out = list[str](), list[str]()
    for kind in filter(known.__contains__, IMAGES):
        lacking: dict[str, list[str]] = {}
        for place, found in of_masks.items():
            if kind not in found.images:
                why = OTHER_SPACE if (place[:2], kind) in anywhere else MISSING
                lacking.setdefault(found.why.get(kind, why), []).append(names[place])
        damaged = [found.damaged[kind] for found in of_masks.values() if kind in found.damaged]
        if damaged and lacking.keys() <= {UNREADABLE}:
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            raise LayoutError(
                f"{damaged[0]}{more}; else all cases had their {kind}: mend it, or remove it to do without {kind}"
            )
        if not lacking:
            kinds.append(kind)
            continue
        said = (
            f"{why} in {len(lacking[why])} of {len(of_masks)} sessions ({_some(lacking[why])})"
            for why in WHY
            if why in lacking
        )
        left_out.append(f"{kind} left out: {'; '.join(said)}")
    if not kinds:
        having = [f"{names[place]} with {', '.join(found.images)}" for place, found in of_masks.items()]
        raise LayoutError(f"{root}: expected a kind of image that all cases have, found {'; '.join(having[:3])}, ...")
    for text in left_out:
        warnings.warn(f"{root}: {text}", stacklevel=3)
    return kinds


def _named(path: Path, root: Path, mask: str | None) -> Named | None:
    """What a file's name says; None of files that are neither an image nor a lesion mask."""
    stem = without_ending(path.name)
    parts = stem.split("_")
    if stem == path.name or not parts[0].startswith("sub-"):
        return None
    kinds = tuple(kind for kind in IMAGES if any(part.lower() == kind.lower() for part in parts))
    if not _is_mask(path, mask) and not (kinds and parts[-1].lower() == kinds[-1].lower() and len(kinds) == 1):
        return None
    pairs = (part.partition("-") for part in parts)
    entities = {key: value for key, dash, value in pairs if dash}
    return Named(path, entities, kinds, "derivatives" in path.relative_to(root).parts)


def _is_mask(path: Path, mask: str | None) -> bool:
    if mask is not None:
        return path.match(mask)
    *parts, last = without_ending(path.name).split("_")
    if last.startswith("lesion"):
        return True
    return last == "msk" or (last in MASKS and any(map(OF_LESION.fullmatch, parts)))


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


def _of_mask(images: Iterable[Named], masks: list[Named], root: Path) -> Found:
    """The images on the grid of a mask, and why there are no others."""
    mask, chosen = masks[0], dict[str, Named]()
    if other := next((one for one in masks if one.image != mask.image), None):
        raise LayoutError(
            f"{root}: expected the lesion masks of a session on one image, found {mask.path.name} and "
            f"{other.path.name}, whose names speak of two"
        )
    try:
        opened = examine(mask.path)
    except (VolumeError, OSError) as error:
        raise LayoutError(str(error)) from error
    why, damaged, links = dict[str, str](), dict[str, str](), list[Path]()
    wanted, _ = mask.image
    beside = [named for named in images if named.path.parent == mask.path.parent]
    raw = [named for named in images if not named.derived and named not in beside]
    for near in (beside, raw):
        for named in near:
            (kind,) = named.kinds
            if kind in chosen and chosen[kind] not in near:
                continue
            fits = all(named.entities.get(key) == value for key, value in wanted.items())
            meant = fits and kind in (mask.kinds or IMAGES)
            reason, error = _why_not(named.path, opened) if meant else (OTHER_NAME, "")
            if reason is not None:
                why[kind] = max(why.get(kind, MISSING), reason, key=WHY.index)
                damaged |= {kind: error} if error else {}
                links += [named.path.relative_to(root)] if reason == UNFETCHED else []
                continue
            earlier = chosen.setdefault(kind, named)
            if earlier is not named:
                raise LayoutError(
                    f"{root}: expected one {kind} on the grid of {mask.path.name}, found {earlier.path.name} and "
                    f"{named.path.name}"
                )
    if not chosen:
        said = next(iter(damaged.values()), f"found none; {to_nothing(links)}" if links else "found none")
        raise LayoutError(f"{mask.path}: expected an image on the grid of this lesion mask, {said}")
    return Found({kind: named.path for kind, named in chosen.items()}, why, damaged)


def _why_not(image: Path, mask: OpenImage) -> tuple[str | None, str]:
    """Why an image is not one of the mask, None if it is; and what is wrong with a file that cannot be read."""
    if not image.exists():  # a link to what was not fetched
        return UNFETCHED, ""
    try:
        return None if same_grid(examine(image), mask) else OTHER_GRID, ""
    except (VolumeError, OSError) as error:
        try:
            examine(OneChannel(image, 0))
        except (VolumeError, OSError):
            return UNREADABLE, str(error)
        return SEVERAL, ""


def _some(names: Collection[str], between: str = ", ") -> str:
    return between.join(list(names)[:MOST_NAMED]) + (f"{between}..." if len(names) > MOST_NAMED else "")


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
