"""The list of a data set's cases, ``cases.json``: images, masks and fold of each, and which values are lesion."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.channels import Channels
from ..data.files import replace_when_done
from ..data.images import OneChannel
from ..data.names import MAX_LISTED, bytes_of, too_long
from ..data.reports import read_json
from ..errors import ArgumentError, GrcsfError

__all__ = [
    "TEST",
    "CaseList",
    "CasesError",
    "ListedCase",
    "images_of",
    "only_image",
    "read_cases",
    "select",
    "write_cases",
]

FORMAT, VERSION = "grcsf-fast cases", 1
TEST = "test"  # in place of a fold's number: the cases without a fold
MOST_NAMED = 3  # cases in a message
KEYS = {
    "format", "version", "layout", "channels", "label_names", "labels", "ignored", "above_hu", "folds", "seed", "cases",
}  # fmt: skip
UNNAMED = ("image",)  # channels where none were named


class CasesError(GrcsfError, ValueError):
    """A list of cases that cannot be used; the message names the file and the case."""


@dataclass(frozen=True)
class ListedCase:
    """A case of a list.

    Attributes:
        name: of the case and of its results; a file's name without ending.
        images: one per channel, each a file or one channel of a 4-D file.
        masks: files whose lesions together are the truth; none where it is not known.
        subject: cases of one subject are in one fold.
        site: where it was acquired, if that is known.
        lesion_ml: mL of lesion in the masks; None where there are none.
        fold: from 0; None of cases that no fold holds, such as a test set without masks.
        test: of a test set with masks, which are for its evaluation alone: in no fold and never trained on.
    """

    name: str
    images: tuple[Path | OneChannel, ...]
    masks: tuple[Path, ...]
    subject: str
    site: str | None = None
    lesion_ml: float | None = None
    fold: int | None = None
    test: bool = False


@dataclass(frozen=True)
class CaseList:
    """A data set as a list of cases.

    Attributes:
        layout: it was found in.
        cases: in order of their names.
        channels: names of the images of a case.
        label_names: what the values of masks mean, as far as the data set says.
        labels: values of masks that are lesion; None: all but 0.
        above_hu: lesion are only voxels of the image above this, where the data set defines it so; None: all that the
            masks mark.
        folds: their number.
        seed: they were drawn with; None where others drew them.
        ignored: values of masks whose voxels nobody annotated: they count in no training and no evaluation, neither as
            lesion nor as none; none of ``labels``, which are then given.
    """

    layout: str
    cases: tuple[ListedCase, ...]
    channels: tuple[str, ...] = UNNAMED
    label_names: Mapping[int, str] = field(default_factory=dict)
    labels: tuple[int, ...] | None = None
    above_hu: float | None = None
    folds: int = 0
    seed: int | None = 0
    ignored: tuple[int, ...] = ()

    @property
    def folds_sha256(self) -> str:
        """Of which case is in which fold, wherever the files lie."""
        folds = sorted((case.name, case.fold) for case in self.cases)
        return hashlib.sha256(json.dumps(folds).encode()).hexdigest()


def write_cases(path: str | Path, listing: CaseList) -> None:
    """Write a list; files below its folder are named relative to it, others by their absolute path.

    Raises:
        OSError: the file cannot be written.
    """
    folder = Path(os.path.abspath(Path(path).parent))
    text = {
        "format": FORMAT,
        "version": VERSION,
        "layout": listing.layout,
        "channels": listing.channels,
        "label_names": {str(value): name for value, name in listing.label_names.items()},
        "labels": listing.labels,
        **({"ignored": listing.ignored} if listing.ignored else {}),
        "above_hu": listing.above_hu,
        "folds": listing.folds,
        "seed": listing.seed,
        "cases": [
            {
                "name": case.name,
                "images": [_image_to_json(image, folder) for image in case.images],
                "masks": [_place(mask, folder) for mask in case.masks],
                "fold": case.fold,
                "subject": case.subject,
                "site": case.site,
                "lesion_ml": case.lesion_ml,
                **({"test": True} if case.test else {}),
            }
            for case in listing.cases
        ],
    }
    with replace_when_done(path) as (part,):
        part.write_text(json.dumps(text, indent=1) + "\n")


def read_cases(path: str | Path) -> CaseList:
    """Read a list that :func:`write_cases` or a person wrote. The files that it names are not looked for.

    Raises:
        CasesError: no such list; the message names the case and what was expected of it.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a list that `grcsf-fast cases` wrote, found none")
    try:
        text = read_json(path)
    except ValueError as error:
        raise CasesError(f"{path}: expected JSON, could not read it: {error}") from error
    if not isinstance(text, dict) or text.get("format") != FORMAT:
        raise CasesError(f'{path}: expected a list of cases with "format": "{FORMAT}", found other JSON')
    if text.get("version") != VERSION:
        raise CasesError(f"{path}: expected version {VERSION} of the list of cases, found {text.get('version')!r}")
    if unknown := sorted(set(text) - KEYS):
        raise CasesError(f"{path}: expected the keys {', '.join(sorted(KEYS))}, found {_short(unknown[0])} too")
    folder = Path(os.path.abspath(path.parent))
    items = text.get("cases")
    if not isinstance(items, list) or not items:
        raise CasesError(f'{path}: expected a list of at least one case under "cases", found {_short(items)}')
    try:
        cases = tuple(_case_from_json(item, folder, f"case {number}") for number, item in enumerate(items))
        listing = CaseList(
            layout=_checked(text, "layout", str, "the list"),
            cases=cases,
            channels=tuple(_names(text, "channels", "the list")),
            label_names=_label_names(text.get("label_names", {})),
            labels=_labels(text.get("labels"), "labels"),
            above_hu=_checked(text, "above_hu", (int, float, type(None)), "the list"),
            folds=_checked(text, "folds", int, "the list"),
            seed=_checked(text, "seed", (int, type(None)), "the list"),
            ignored=_labels(text.get("ignored") or None, "ignored") or (),
        )
    except ValueError as error:
        raise CasesError(f"{path}: {error}") from error
    if listing.ignored and (listing.labels is None or set(listing.ignored) & set(listing.labels)):
        raise CasesError(
            f'{path}: expected under "labels" the values that are lesion, none of those under "ignored", found '
            f"{_short(listing.labels)} and {_short(listing.ignored)}"
        )
    counts = Counter(case.name for case in cases)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise CasesError(f"{path}: expected every case once, found {', '.join(twice[:MOST_NAMED])} several times")
    check_subjects(path, cases)
    return listing


def check_subjects(path: Path, cases: Sequence[ListedCase]) -> None:
    """
    Raises:
        CasesError: the cases of a subject are in several folds; the message names the file, the subject and the folds.
    """
    for subject, folds in _folds_of_subjects(cases).items():
        if len(folds) > 1:
            found = ", ".join(map(str, sorted(folds)))
            raise CasesError(f"{path}: expected the cases of subject {subject} in one fold, found them in {found}")


def _folds_of_subjects(cases: Sequence[ListedCase]) -> dict[str, set[int]]:
    """By subject, of the cases that have one."""
    folds: dict[str, set[int]] = {}
    for case in cases:
        if case.fold is not None:
            folds.setdefault(case.subject, set()).add(case.fold)
    return folds


def select(listing: CaseList, fold: int | str | None) -> list[ListedCase]:
    """The cases of a fold, of those without fold (``"test"``), or all (None).

    Raises:
        ArgumentError: there are none; the message says which folds there are.
    """
    chosen = [case for case in listing.cases if fold is None or case.fold == (None if fold == TEST else fold)]
    if not chosen:
        if not listing.folds and fold != TEST:
            raise ArgumentError(f"--fold: expected no number, as the list has no folds, got {fold}")
        known = [str(number) for number in sorted({case.fold for case in listing.cases if case.fold is not None})]
        known += [TEST] if any(case.fold is None for case in listing.cases) else []
        raise ArgumentError(f"--fold: expected a fold of the list, {', '.join(known)}, got {fold}")
    return chosen


def only_image(case: ListedCase, listing: CaseList) -> Path | OneChannel:
    """The image of a case.

    Raises:
        ArgumentError: there are several.
    """
    if len(case.images) != 1:
        raise ArgumentError(
            f"{case.name}: expected one image, as the networks take one channel, found {len(case.images)} in the list "
            f"({', '.join(listing.channels)}); make the list again with `cases --channel` to choose one, or name all "
            "in --channels of `grcsf-fast train-mae` and `train`"
        )
    return case.images[0]


def images_of(case: ListedCase, listing: CaseList, channels: Sequence[str]) -> Path | OneChannel | Channels:
    """The images of a case for networks of these channels, by name.

    A single channel without a name, ``("image",)`` of either side, is the only one of the other side.

    Raises:
        ArgumentError: the list has other channels; the message names the case.
    """
    if not set(channels) <= set(listing.channels):
        if tuple(channels) == UNNAMED or (listing.channels == UNNAMED and len(channels) == 1):
            return only_image(case, listing)
        raise ArgumentError(
            f"{case.name}: expected the channels {', '.join(channels)}, found {', '.join(listing.channels)} in the list"
        )
    if len(case.images) != len(listing.channels):
        raise ArgumentError(
            f"{case.name}: expected an image for each channel of the list ({', '.join(listing.channels)}), "
            f"found {len(case.images)}"
        )
    images = tuple(case.images[listing.channels.index(name)] for name in channels)
    return images[0] if len(images) == 1 else Channels(case.name, images, tuple(channels))


def _place(path: Path, folder: Path) -> str:
    absolute = Path(os.path.abspath(path))
    return absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else str(absolute)


def _image_to_json(image: Path | OneChannel, folder: Path) -> dict[str, Any]:
    if isinstance(image, OneChannel):
        return {"file": _place(image.path, folder), "channel": image.channel}
    return {"file": _place(image, folder)}


def _case_from_json(item: Any, folder: Path, where: str) -> ListedCase:
    name = _checked(item, "name", str, where)
    if not name or name.startswith(".") or Path(name).name != name or "\\" in name or bytes_of(name) is None:
        raise ValueError(f"{where}: expected a name that a file can have, found {name!r}")
    if said := too_long(name, MAX_LISTED):
        raise ValueError(f"{where}: {said}")
    where = f"{where} ({name})"
    images = tuple(_image_from_json(image, folder, where) for image in _checked(item, "images", list, where))
    if not images:
        raise ValueError(f"{where}: expected at least one image, found none")
    masks = _names(item, "masks", where)
    for mask in masks:
        _check_file(mask, "masks", where)
    fold = _checked(item, "fold", (int, type(None)), where)
    if fold is not None and fold < 0:
        raise ValueError(f'{where}: expected a number from 0 or null under "fold", found {fold}')
    if fold is not None and not masks:
        raise ValueError(f"{where}: expected a mask, as it is in fold {fold}, found none")
    test = item.get("test", False)
    if not isinstance(test, bool):
        raise ValueError(f'{where}: expected true or false under "test", found {_short(test)}')
    if test and fold is not None:
        raise ValueError(f"{where}: expected no fold, as it is of a test set, found {fold}")
    return ListedCase(
        name, images, tuple(folder / mask for mask in masks),
        subject=_checked(item, "subject", str, where),
        site=_checked(item, "site", (str, type(None)), where),
        lesion_ml=_checked(item, "lesion_ml", (int, float, type(None)), where),
        fold=fold,
        test=test,
    )  # fmt: skip


def _image_from_json(image: Any, folder: Path, where: str) -> Path | OneChannel:
    path = folder / _checked(image, "file", str, where)
    _check_file(image["file"], "file", where)
    if "channel" not in image:
        return path
    return OneChannel(path, _checked(image, "channel", int, where))


def _check_file(file: str, key: str, where: str) -> None:
    if bytes_of(file) is None:
        raise ValueError(f'{where}: expected under "{key}" a name that a file can have, found {file!r}')


def _names(item: Any, key: str, where: str) -> list[str]:
    names = _checked(item, key, list, where)
    if not all(isinstance(name, str) for name in names):
        kind = "file names" if key == "masks" else "names"
        raise ValueError(f'{where}: expected {kind} under "{key}", found {_short(names)}')
    return names


def _label_names(names: Any) -> dict[int, str]:
    try:
        return {int(value): str(name) for value, name in names.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'expected {{"1": "name", ...}} under "label_names", found {_short(names)}') from error


def _labels(labels: Any, key: str) -> tuple[int, ...] | None:
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(type(label) is int and label > 0 for label in labels) or not labels:
        raise ValueError(f'expected whole numbers above 0 or null under "{key}", found {_short(labels)}')
    return tuple(labels)


def _checked(item: Any, key: str, kinds: Any, where: str) -> Any:
    if not isinstance(item, dict) or key not in item:
        raise ValueError(f'{where}: expected an object with "{key}", found {_short(item)}')
    value = item[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f'{where}: expected {expected} under "{key}", found {_short(value)}')
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
