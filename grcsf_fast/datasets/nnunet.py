"""Raw data sets of nnU-Net, of version 1 and 2.

``imagesTr/NAME_0000.nii.gz``, a file per channel, with ``labelsTr/NAME.nii.gz``; ``imagesTs`` has images alone, unless
there is ``labelsTs``; with it they are a test set. ``dataset.json`` names channels (``channel_names``, formerly
``modality``) and labels, may give the ending of files (``file_ending``), and may list them under ``dataset``.
https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cases_file import CaseList, ListedCase
from .dataset_json import label_names, numbered, read_json
from .folders import ENDINGS, LayoutError, check_all_found, check_folder, files_below, shown_below, subject_of

__all__ = ["find_nnunet"]

ABOUT = "of nnU-Net, with channel_names (or modality) and labels"
IGNORED = "ignore"  # nnU-Net's name of the label of voxels without annotation


def find_nnunet(root: Path) -> CaseList:
    """The cases of a data set's folder.

    Voxels of a label named ``ignore`` are those that nobody annotated.

    Raises:
        LayoutError: no ``dataset.json`` of nnU-Net, files of another format, channels or masks that are missing, or
            ``ignore`` beside another name of its number or no other label.
    """
    check_folder(root, "dataset.json, imagesTr and labelsTr")
    path = root / "dataset.json"
    text = read_json(path, ABOUT)
    key = "channel_names" if "channel_names" in text else "modality"
    channels = numbered(path, key, text.get(key))
    ending = text.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        raise LayoutError(f"{path}: expected one of {', '.join(ENDINGS)} under file_ending, found {ending!r}")
    if isinstance(text.get("dataset"), dict):
        cases = _listed(path, text["dataset"])
    else:
        cases = _of_folder(root, "Tr", len(channels), ending) + _of_folder(root, "Ts", len(channels), ending)
    expected = [*(file for case in cases for file in case.images), *(mask for case in cases for mask in case.masks)]
    files = [file for file in expected if isinstance(file, Path)]
    others = [] if files else list(files_below(root))
    shown = [shown_below(file, root) for file in files]
    there = [name for name, file in zip(shown, files, strict=True) if file.is_file()]
    missing = [name for name, file in zip(shown, files, strict=True) if not file.is_file()]
    check_all_found(root, f"imagesTr/NAME_0000{ending} with labelsTr/NAME{ending}", there, missing, others)
    names = label_names(path, text.get("labels", {}))
    ignored = tuple(value for value, name in names.items() if name == IGNORED)
    for value, name in names.items():
        if IGNORED in name.split(" and ") and value not in ignored:
            raise LayoutError(f"{path}: expected a number of its own for {IGNORED}, found {value} for {name}")
    kept = tuple(value for value in names if value not in ignored)
    if ignored and not kept:
        raise LayoutError(f"{path}: expected a label of lesion beside {IGNORED}, found none")
    return CaseList("nnunet", tuple(cases), channels, names, kept if ignored else None, ignored=ignored)


def _of_folder(root: Path, part: str, channels: int, ending: str) -> list[ListedCase]:
    """Cases by the files of any channel, or by their mask, so that what is missing of one is said."""
    images = root / f"images{part}"
    names = set()
    for path in sorted(images.iterdir()) if images.is_dir() else []:
        name, _, number = path.name.removesuffix(ending).rpartition("_")
        if path.name.endswith(ending) and not path.name.startswith(".") and len(number) == 4 and number.isdigit():
            names.add(name)
    labels = root / f"labels{part}"
    for path in labels.iterdir() if names and labels.is_dir() else []:
        if path.name.endswith(ending) and not path.name.startswith("."):
            names.add(path.name.removesuffix(ending))
    cases = []
    for name in sorted(names):
        files = tuple(images / f"{name}_{channel:04d}{ending}" for channel in range(channels))
        masks = (labels / f"{name}{ending}",) if part == "Tr" or labels.is_dir() else ()
        cases.append(ListedCase(name, files, masks, subject_of(name), test=part == "Ts" and bool(masks)))
    return cases


def _listed(path: Path, entries: Mapping[str, Any]) -> list[ListedCase]:
    cases = []
    for name, entry in sorted(entries.items()):
        try:
            images = tuple(path.parent / image for image in entry["images"])
            cases.append(ListedCase(name, images, (path.parent / entry["label"],), subject_of(name)))
        except (KeyError, TypeError) as error:
            raise LayoutError(f'{path}: expected "images" and "label" of {name}, found {entry!r}') from error
    return cases
