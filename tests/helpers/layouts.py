"""Small look-alikes of data sets, with the names of their files."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
from metaimages import write_metaimage
from pairs import AFFINE, SHAPE

MNI = "space-MNI152NLin2009aSym"


def write(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def files(root: Path, *names: str) -> Path:
    """Empty ones, where names are all that counts; returns the folder."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def head(seed: int, corner: tuple[int, int, int] | None = None, size: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """An image of a head with a dark cube, and its mask."""
    rng = np.random.default_rng(seed)
    image = np.zeros(SHAPE, np.float32)
    image[3:21, 3:23, 3:19] = rng.uniform(90, 110, (18, 20, 16))
    mask = np.zeros(SHAPE, np.uint8)
    if corner is not None:
        mask[tuple(slice(first, first + size) for first in corner)] = 1
    image[mask > 0] = 50
    return image, mask


def atlas_session(root: Path, site: int, subject: int, session: int = 1, part: str = "Training", size: int = 4) -> Path:
    """One session of ATLAS R2.0, its folder; of ``Testing`` without mask, of size 0 with an empty one."""
    name = f"sub-r{site:03d}s{subject:03d}"
    folder = root / part / f"R{site:03d}" / name / f"ses-{session}" / "anat"
    image, mask = head(100 * site + 10 * subject + session, (8, 9, 7) if size else None, size)
    write(folder / f"{name}_ses-{session}_{MNI}_T1w.nii.gz", image)
    if part == "Training":
        write(folder / f"{name}_ses-{session}_{MNI}_label-L_desc-T1lesion_mask.nii.gz", mask)
    return folder


def atlas(root: Path) -> Path:
    """12 subjects of 2 sites, one of them with two sessions; beside them two of the hidden test set."""
    root = root / "ATLAS_2"
    for site in (1, 2):
        for subject in range(1, 7):
            atlas_session(root, site, subject, size=(0, 1, 2, 3, 4, 5)[subject - 1])
        (root / "Training" / f"R{site:03d}" / "dataset_description.json").write_text("{}")
    atlas_session(root, 2, 3, session=2)
    for subject in (7, 8):
        atlas_session(root, 2, subject, part="Testing")
    write(root / "MNI152NLin2009aSym.nii.gz", head(0)[0])
    (root / "20211112_ATLAS_2.0_SupplementaryInfo.csv").write_text("")
    return root


def decathlon(root: Path, cases: int = 6, channels: int = 4) -> Path:
    """Task01_BrainTumour in small, with what macOS leaves beside files."""
    root = root / "Task01_BrainTumour"
    for number in range(1, cases + 3):
        image, mask = head(number, (8, 9, 7))
        mask[8, 9, 7], mask[9, 9, 7] = 2, 3
        part = "Tr" if number <= cases else "Ts"
        name = f"BRATS_{number:03d}.nii.gz"
        stack = np.stack([image * (1 + channel) for channel in range(channels)], 3) if channels > 1 else image
        write(root / f"images{part}" / name, stack)
        (root / f"images{part}" / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
        if part == "Tr":
            write(root / "labelsTr" / name, mask)
    names = ["FLAIR", "T1w", "t1gd", "T2w"][:channels]
    labels = ("background", "edema", "non-enhancing tumor", "enhancing tumour")
    listed = [f"BRATS_{number:03d}.nii.gz" for number in range(1, cases + 1)]
    text = {
        "name": "BRATS",
        "tensorImageSize": "4D",
        "modality": {str(place): name for place, name in enumerate(names)},
        "labels": {str(value): name for value, name in enumerate(labels)},
        "numTraining": cases,
        "numTest": 2,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in listed],
        "test": [f"./imagesTs/BRATS_{number:03d}.nii.gz" for number in (cases + 1, cases + 2)],
    }
    (root / "dataset.json").write_text(json.dumps(text))
    return root


def nnunet(root: Path, cases: int = 5, **changes: object) -> Path:
    """A raw data set of nnU-Net 2 with two channels and one test case."""
    root = root / "Dataset005_Prostate"
    for number in range(cases + 1):
        image, mask = head(number, (8, 9, 7))
        mask[8, 9, 7] = 2
        part, name = ("Tr" if number < cases else "Ts"), f"prostate_{number:02d}"
        for channel in range(2):
            write(root / f"images{part}" / f"{name}_{channel:04d}.nii.gz", image * (1 + channel))
        if part == "Tr":
            write(root / "labelsTr" / f"{name}.nii.gz", mask)
    text = {
        "channel_names": {"0": "T2", "1": "ADC"},
        "labels": {"background": 0, "PZ": 1, "TZ": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    text = {key: value for key, value in (text | changes).items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(text))
    return root


def orcascore(root: Path) -> Path:
    """Three patients of each of two vendors, and one of the test set; 12 mm3 a voxel, as MetaImages are written."""
    root = root / "Challenge_data"
    for name in ("TRV1P1", "TRV1P2", "TRV1P3", "TRV2P1", "TRV2P2", "TRV2P3", "TEV1P1"):
        part = root / ("Training Set" if name.startswith("TR") else "Test Set")
        rng = np.random.default_rng(sum(name.encode()))
        image = rng.integers(-20, 60, SHAPE).astype(np.int16)
        image[:3], image[-3:] = -1000, -1000
        reference = np.zeros(SHAPE, np.uint8)
        for artery in (1, 2, 3):
            place = np.s_[6:9, 5 * artery, 8]
            image[place], reference[place] = 400, artery
            image[9, 5 * artery, 8], reference[9, 5 * artery, 8] = 130, artery
        image[12, 12, 12] = 900  # bone: above the limit, and no calcification
        write_metaimage(part / "Images" / f"{name}CTI.mhd", image)
        write_metaimage(part / "Images" / f"{name}CTAI.mhd", image)
        if name.startswith("TR"):
            write_metaimage(part / "Reference standard" / f"{name}R.mhd", reference)
    return root


def bids(root: Path) -> Path:
    """Seven subjects of two sites with T1w and FLAIR, six of them with a manual lesion mask of the T1w."""
    root = root / "dataset"
    rows = ["participant_id\tage\tsite"]
    for number in range(1, 8):
        name = f"sub-{number:02d}"
        image, mask = head(number, (8, 9, 7))
        write(root / name / "ses-1" / "anat" / f"{name}_ses-1_T1w.nii.gz", image)
        write(root / name / "ses-1" / "anat" / f"{name}_ses-1_FLAIR.nii.gz", image[:, :, ::2])
        write(root / name / "ses-1" / "dwi" / f"{name}_ses-1_dwi.nii.gz", np.stack([image, image], 3))
        if number < 7:
            folder = root / "derivatives" / "manual" / name / "ses-1" / "anat"
            write(folder / f"{name}_ses-1_space-orig_label-lesion_mask.nii.gz", mask)
        rows.append(f"{name}\t60\t{'AB'[(number - 1) % 2]}")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    (root / "dataset_description.json").write_text("{}")
    return root
