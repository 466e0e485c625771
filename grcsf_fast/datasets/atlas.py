"""ATLAS R2.0, stroke lesions on T1-weighted MRI, as it is distributed.

``Training/R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz`` with
``..._space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask.nii.gz`` beside it; ``Testing`` has images alone. Later
releases write ``space-orig_desc-brain_T1w`` and ``label-lesion``. Liew et al., Scientific Data 9, 320 (2022).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .cases_file import CaseList, ListedCase
from .folders import check_all_found, check_folder, check_packed_once, files_below

__all__ = ["find_atlas"]

IMAGE = re.compile(r"(sub-[A-Za-z0-9]+)_(ses-[A-Za-z0-9]+)_(?:.+_)?T1w\.nii(?:\.gz)?")
MASK = re.compile(r"(sub-[A-Za-z0-9]+)_(ses-[A-Za-z0-9]+)_(?:.+_)?label-\w+_desc-T1lesion\w*_mask\.nii(?:\.gz)?")
SPACE = re.compile(r"_space-([A-Za-z0-9]+)_")
SITE = re.compile(r"sub-(r\d+)s\d+")
SITE_FOLDER = re.compile(r"R\d+", re.IGNORECASE)
EXPECTED = "sub-*/ses-*/anat/*_T1w.nii.gz"
TESTING = "testing"


def find_atlas(root: Path) -> CaseList:
    """The cases below a folder: of the whole data set, of ``Training`` or ``Testing``, or of a site.

    A case is a T1w image; its masks are all lesion masks of its session in the same space. Sessions below a folder
    ``Testing`` may be without; they are in no fold.

    Raises:
        LayoutError: no such image, an image without mask elsewhere, masks of a session without image, or a mask beside
            its unpacked copy.
    """
    check_folder(root, EXPECTED)
    images, masks = [], {}
    files = list(files_below(root))
    for path in files:
        if found := MASK.fullmatch(path.name):
            masks.setdefault((*found.groups(), _space(path)), []).append(path)
        elif found := IMAGE.fullmatch(path.name):
            images.append((path, *found.groups()))
    check_all_found(root, f"images {EXPECTED}", images, [], files)
    check_packed_once(path for own in masks.values() for path in own)
    sessions = [(subject, session) for _, subject, session in images]
    if alone := [f"one for {own[0].name}" for place, own in masks.items() if place[:2] not in sessions]:
        check_all_found(root, "a *_T1w image of every lesion mask", [images[0][0].name], alone)
    # The folders of the data set itself, whatever those above it are called.
    top = Path(os.path.abspath(root))
    above = top.parent.parent if SITE_FOLDER.fullmatch(top.name) else top.parent
    cases, with_mask, without = [], [], []
    for path, subject, session in images:
        own = tuple(masks.get((subject, session, _space(path)), ()))
        name = f"{subject}_{session}"
        if sessions.count((subject, session)) > 1:
            name += f"_space-{_space(path)}"
        site = SITE.fullmatch(subject)
        cases.append(ListedCase(name, (path,), own, subject, site[1].upper() if site else None))
        if own:
            with_mask.append(own[0].name)
        elif TESTING not in Path(os.path.abspath(path)).relative_to(above).as_posix().lower().split("/"):
            without.append(f"one for {path.name}")
    if without:
        check_all_found(root, "a *_label-L_desc-T1lesion_mask.nii.gz beside every T1w image", with_mask, without)
    return CaseList("atlas-r2", tuple(cases), ("T1w",))


def _space(path: Path) -> str:
    found = SPACE.search(path.name)
    return found[1] if found else ""
