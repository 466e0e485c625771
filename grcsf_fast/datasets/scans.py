"""Scans in folders of their own, without masks: to be segmented, or for the training of an autoencoder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..data.files import case_name, holds_dicom
from .cases_file import CaseList, ListedCase
from .folders import ENDINGS, check_all_found, check_folder, files_below, subject_of

__all__ = ["find_scans"]


def find_scans(root: Path, pattern: str | Path) -> CaseList:
    """The scans anywhere below a folder whose path ends as a pattern says; hidden files and folders are left out.

    A case has the name of its file. Where two would have the same name, all are called by their path below the folder,
    its parts joined by ``_``.

    Args:
        root: the folder.
        pattern: such as ``*_T1w.nii.gz``, or ``anat/*_T1w.nii.gz`` with the folder; of a folder with DICOM files the
            folder's, such as ``T1_MPRAGE``. Case matters.

    Raises:
        LayoutError: no folder, or no such scan.
    """
    expected = f"scans called {pattern} in it or below it"
    check_folder(root, expected)
    files = list(files_below(root))
    volumes = {file.relative_to(root) for file in files if file.name.lower().endswith(ENDINGS)}
    folders = {file.parent.relative_to(root) for file in files} - {Path()}
    scans = sorted(
        [one for one in volumes if one.match(str(pattern))]
        + [one for one in folders if one.match(str(pattern)) and holds_dicom(root / one)]
    )
    check_all_found(root, expected, scans, [], files)
    names = [case_name(one) for one in scans]
    if len(Counter(names)) < len(names):
        names = [case_name("_".join(one.parts)) for one in scans]
    return CaseList(
        "scans",
        tuple(ListedCase(name, (root / one,), (), subject_of(name)) for name, one in zip(names, scans, strict=True)),
    )
