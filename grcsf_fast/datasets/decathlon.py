"""Tasks of the Medical Segmentation Decathlon.

``dataset.json`` lists ``./imagesTr/BRATS_001.nii.gz`` with ``./labelsTr/BRATS_001.nii.gz`` under ``training`` and
images alone under ``test``; several modalities are the fourth axis of one file. Antonelli et al., Nature
Communications 13, 4128 (2022); http://medicaldecathlon.com.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.images import OneChannel
from .cases_file import CaseList, ListedCase
from .dataset_json import label_names, numbered, read_json
from .folders import LayoutError, check_all_found, check_folder, shown_below, subject_of, without_ending

__all__ = ["find_decathlon"]

ABOUT = "of the Decathlon, with its lists of files under training and test"


def find_decathlon(root: Path) -> CaseList:
    """The cases of a task's folder.

    Raises:
        LayoutError: no ``dataset.json`` of the Decathlon, one that lists cases for validation too, or files that it
            lists are missing.
    """
    check_folder(root, "dataset.json, imagesTr and labelsTr")
    text = read_json(root / "dataset.json", ABOUT)
    training, test = text.get("training"), text.get("test", [])
    if not isinstance(training, list) or not isinstance(test, list):
        raise LayoutError(f"{root / 'dataset.json'}: expected JSON {ABOUT}, found {', '.join(text)}")
    if others := text.get("validation"):
        raise LayoutError(
            f'{root / "dataset.json"}: expected all cases with masks under "training", of which folds are drawn, found '
            f'{len(others)} under "validation" too'
        )
    channels = numbered(root / "dataset.json", "modality", text.get("modality", {"0": "image"}))
    pairs = [_pair(root, item) for item in training] + [(_file(root, item), None) for item in test]
    pairs = [(image, mask) for image, mask in pairs if not image.name.startswith("._")]
    files = [path for pair in pairs for path in pair if path is not None]
    there = [shown_below(path, root) for path in files if path.is_file()]
    missing = [shown_below(path, root) for path in files if not path.is_file()]
    check_all_found(root, "the files that dataset.json lists", there, missing)
    cases = []
    for image, mask in pairs:
        several = len(channels) > 1
        images = tuple(OneChannel(image, index) for index in range(len(channels))) if several else (image,)
        name = without_ending(image.name)
        cases.append(ListedCase(name, images, () if mask is None else (mask,), subject_of(name)))
    return CaseList("decathlon", tuple(cases), channels, label_names(root / "dataset.json", text.get("labels", {})))


def _pair(root: Path, item: Any) -> tuple[Path, Path]:
    if not isinstance(item, dict) or not {"image", "label"} <= item.keys():
        raise LayoutError(f'{root / "dataset.json"}: expected "image" and "label" of a training case, found {item!r}')
    return _file(root, item["image"]), _file(root, item["label"])


def _file(root: Path, name: Any) -> Path:
    if not isinstance(name, str):
        raise LayoutError(f"{root / 'dataset.json'}: expected the name of a file, found {name!r}")
    return root / name
