"""orCaScore, coronary calcium on CT, as it is distributed.

``Images/TRV1P1CTI.mhd`` is the CT without contrast medium of vendor 1 and patient 1 of the training set, ``TRV1P1CTAI``
the one with it, which has no reference and is left out; ``Reference standard/TRV1P1R.mhd`` holds the arteries of
calcifications, and ``TE`` begins the names of the test set. Calcifications are defined as voxels above 130 HU.
Wolterink et al., Medical Physics 43, 2361 (2016); https://orcascore.grand-challenge.org.
"""

from __future__ import annotations

import re
from pathlib import Path

from .cases_file import CaseList, ListedCase
from .folders import LayoutError, check_all_found, check_folder, files_below

__all__ = ["find_orcascore"]

FILE = re.compile(r"((T[RE])V(\d+)P\d+)(CTI|R)\.(?:mhd|mha|nii|nii\.gz)", re.IGNORECASE)
EXPECTED = "TRV*P*CTI.mhd with TRV*P*R.mhd"
ABOVE_HU = 130.0
ARTERIES = {1: "LAD", 2: "LCX", 3: "RCA"}


def find_orcascore(root: Path) -> CaseList:
    """The cases below a folder: of the whole data set, or of the training set.

    The vendor of the scanner is the site. Test cases have no masks and are in no fold.

    Raises:
        LayoutError: no such images, training images without a reference, a reference without image, or two files for
            one of them.
    """
    check_folder(root, EXPECTED)
    images: dict[str, Path] = {}
    references: dict[str, Path] = {}
    files = list(files_below(root))
    for path in files:
        if found := FILE.fullmatch(path.name):
            other = (references if found[4].upper() == "R" else images).setdefault(found[1].upper(), path)
            if other != path:
                both = f"{other.relative_to(root)} and {path.relative_to(root)}"
                raise LayoutError(f"{root}: expected one {(found[1] + found[4]).upper()}, found {both}")
    check_all_found(root, f"images named {EXPECTED}", sorted(images), [], files)
    training = [name for name in images if name.startswith("TR")]
    there = [references[name].name for name in training if name in references]
    missing = [f"one for {images[name].name}" for name in training if name not in references]
    if missing:
        check_all_found(root, "a reference standard TRV*P*R of every training image", there, missing)
    if alone := [f"one for {reference.name}" for name, reference in references.items() if name not in images]:
        check_all_found(root, "an image TRV*P*CTI of every reference standard", sorted(images), alone)
    cases = []
    for name, image in sorted(images.items()):
        masks = (references[name],) if name in references else ()
        vendor = name.removeprefix(name[:2]).partition("P")[0]
        cases.append(ListedCase(name, (image,), masks, name, vendor))
    return CaseList("orcascore", tuple(cases), ("CT",), ARTERIES, above_hu=ABOVE_HU)
