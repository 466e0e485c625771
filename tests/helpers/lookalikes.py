"""Eight cases each of ATLAS R2.0, orCaScore and the Decathlon's lung task, with anatomy, and a recipe small enough.

Brains are the T1 template with dark lesions. Chests are phantoms in Hounsfield units: a body with lungs, heart, spine
and ribs; calcifications lie along three arcs on the heart, nodules in the lungs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from layouts import MNI, write
from metaimages import write_metaimage

from grcsf_fast.cli.recipes import FOLDER
from grcsf_fast.synthesis.template import load_template

CHEST = (56, 44, 20)
CHEST_AFFINE = np.diag([6.0, 6.0, 6.0, 1.0])
# By section, in place of the packaged recipe's; the rest of it stays.
TINY = {
    "trainings": {"crop-size": [32, 32], "crop-size-jitter": 0, "warmup-steps": 1, "precision": "float32"},
    "train-mae": {
        **{"steps": 2, "batch-size": 4, "cache-size": 2, "patch-size": 8, "embed-dim": 16, "depth": 1, "num-heads": 2},
        **{"decoder-dim": 16, "decoder-depth": 1, "decoder-num-heads": 2, "neighbours": 0},
    },
    "train": {
        **{"steps": 60, "batch-size": 4, "cache-size": 4, "features": [8, 16, 16], "patch-size": 4, "rcu-levels": [1]},
        **{"learning-rate": 0.02, "validation": 1, "augment": "none"},
    },
    "predict": {"no-page": True, "no-overlay": True},
    "evaluate": {"no-page": True},
}


def tiny_recipe(name: str, folder: Path, **changes: dict) -> Path:
    """A copy of a packaged recipe with the values of :data:`TINY`, and changes to sections of it."""
    recipe = json.loads((FOLDER / f"{name}.json").read_text())
    recipe["trainings"]["spacing"] = [6, 6, 6]
    for section, values in [*TINY.items(), *((key.replace("_", "-"), value) for key, value in changes.items())]:
        recipe[section] |= values
    path = folder / f"{name}.json"
    path.write_text(json.dumps(recipe))
    return path


def spheres(shape: tuple[int, ...], places: list[tuple[float, ...]], radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return np.any([np.linalg.norm(grid - np.array(place), axis=-1) <= radius for place in places], axis=0)


def brains(root: Path) -> Path:
    """ATLAS R2.0 by its names: four subjects of each of two sites, one of them without lesion."""
    template = load_template(6.0)
    head = template.t1.numpy() * 100
    root = root / "ATLAS_2"
    for number in range(8):
        site, subject = number // 4 + 1, number % 4 + 1
        rng = np.random.default_rng(number)
        centre = np.array(head.shape) * (0.3 if number % 2 else 0.7, 0.5, 0.55)
        radius = (1.0, 1.5, 2.5, 3.0)[number % 4]
        mask = spheres(head.shape, [tuple(centre + rng.uniform(-1, 1, 3))], radius) & (head > 40)
        if number == 7:
            mask[:] = False
        image = head + (head > 1) * rng.normal(0, 3, head.shape)
        image[mask] *= 0.4
        name = f"sub-r{site:03d}s{subject:03d}"
        stem = root / "Training" / f"R{site:03d}" / name / "ses-1" / "anat" / f"{name}_ses-1_{MNI}"
        write(stem.with_name(stem.name + "_T1w.nii.gz"), image.astype(np.float32), template.affine)
        mask_name = stem.name + "_label-L_desc-T1lesion_mask.nii.gz"
        write(stem.with_name(mask_name), mask.astype(np.uint8), template.affine)
    return root


def chest(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A chest in Hounsfield units, and its lungs; (X, Y, Z), z from feet to head."""
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, size) for size in CHEST), indexing="ij")
    hu = np.full(CHEST, -1000.0)
    hu[x**2 + (y / 0.9) ** 2 < 0.9] = 40
    lungs = (((np.abs(x) - 0.5) / 0.32) ** 2 + (y / 0.6) ** 2 < 1) & ((x / 0.3) ** 2 + ((y - 0.15) / 0.4) ** 2 > 1)
    hu[lungs] = -820
    hu[(x / 0.1) ** 2 + ((y + 0.7) / 0.12) ** 2 < 1] = 450  # spine
    hu += np.random.default_rng(seed).normal(0, 12, CHEST)
    return hu, lungs


def hearts(root: Path) -> Path:
    """orCaScore by its names: two patients of each of four vendors, one of them without calcium."""
    root = root / "Challenge_data" / "Training Set"
    for number in range(8):
        name = f"TRV{number // 2 + 1}P{number % 2 + 1}"
        hu, _ = chest(number)
        reference = np.zeros(CHEST, np.uint8)
        for artery, place in enumerate(((24, 26), (30, 28), (33, 23)), start=1):
            for step in range(0 if number == 7 else 1 + number % 3):
                spot = np.s_[place[0] - step : place[0] - step + 2, place[1] : place[1] + 2, 6 + 4 * step]
                hu[spot], reference[spot] = (180, 250, 450)[step], artery
        spacing = {"ElementSpacing": "6 6 6"}
        write_metaimage(root / "Images" / f"{name}CTI.mhd", hu.astype(np.int16), **spacing)
        write_metaimage(root / "Reference standard" / f"{name}R.mhd", reference, **spacing)
    return root.parent


def nodules(root: Path) -> Path:
    """Task06_Lung by its names: eight cases with a nodule each, and one of the test set."""
    root = root / "Task06_Lung"
    names = [f"lung_{number:03d}.nii.gz" for number in range(1, 10)]
    for number, name in enumerate(names):
        hu, lungs = chest(100 + number)
        place = (14 if number % 2 else 42, 20 + number % 4, 6 + number)
        mask = spheres(CHEST, [place], (1.0, 1.5, 2.0, 2.5)[number % 4]) & lungs
        hu[mask] = 35
        part = "Tr" if number < 8 else "Ts"
        write(root / f"images{part}" / name, hu.astype(np.int16), CHEST_AFFINE)
        (root / f"images{part}" / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
        if number < 8:
            write(root / "labelsTr" / name, mask.astype(np.uint8), CHEST_AFFINE)
    text = {
        "name": "Lung",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "cancer"},
        "numTraining": 8,
        "numTest": 1,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names[:8]],
        "test": [f"./imagesTs/{names[8]}"],
    }
    (root / "dataset.json").write_text(json.dumps(text))
    return root


# Recipe, layout, and what makes the look-alike in a folder.
LAYOUTS = (("atlas-r2", "atlas-r2", brains), ("orcascore", "orcascore", hearts), ("msd-lung", "decathlon", nodules))
