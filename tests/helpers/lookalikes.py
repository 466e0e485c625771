"""Eight cases each of ATLAS R2.0, orCaScore and the Decathlon's lung task, with anatomy, and a recipe small enough.

Brains are the T1 template with dark lesions. Chests are parts of one real CT, with calcifications along the course of
the coronary arteries, or a nodule in a lung. Eight cases of one person say nothing of accuracy.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from chest import COURSES, NEEDS_CHEST, add_nodule, calcify, individual, on_artery
from layouts import MNI, write
from metaimages import write_metaimage

from grcsf_fast.cli.recipes import FOLDER
from grcsf_fast.synthesis.template import load_template

# Spacing in mm, and the steps after which a part of the lesions is found.
SIZES = {"atlas-r2": ([6, 6, 6], 240), "orcascore": ([3.05, 3.05, 5], 120), "msd-lung": ([3.05, 3.05, 5], 120)}
# By section, in place of the packaged recipe's; the rest of it stays.
TINY = {
    "trainings": {"crop-size": [32, 32], "crop-size-jitter": 0, "warmup-steps": 1, "precision": "float32"},
    "train-mae": {
        **{"steps": 2, "batch-size": 4, "cache-size": 2, "patch-size": 8, "embed-dim": 16, "depth": 1, "num-heads": 2},
        **{"decoder-dim": 16, "decoder-depth": 1, "decoder-num-heads": 2, "neighbours": 0},
    },
    "train": {
        **{"batch-size": 4, "cache-size": 4, "features": [8, 16, 16], "patch-size": 4, "rcu-levels": [1]},
        **{"learning-rate": 0.005, "validation": 1, "augment": "none"},
    },
    # A precision that is measured could differ between two predictions that are compared.
    "predict": {"no-page": True, "no-overlay": True, "precision": "float32"},
    "evaluate": {"no-page": True},
}


def tiny_recipe(name: str, folder: Path, **changes: dict) -> Path:
    """A copy of a packaged recipe with the values of :data:`TINY`, and changes to sections of it."""
    recipe = json.loads((FOLDER / f"{name}.json").read_text())
    recipe["trainings"]["spacing"], recipe["train"]["steps"] = SIZES[name]
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


def hearts(root: Path) -> Path:
    """orCaScore by its names: two patients of each of four vendors, one of them without calcium.

    Each has up to three calcifications per artery, of 2 to 30 voxels; the first patient's are of 4, in a slice each.
    """
    root = root / "Challenge_data" / "Training Set"
    for number in range(8):
        name = f"TRV{number // 2 + 1}P{number % 2 + 1}"
        rng = np.random.default_rng(number)
        one = individual(rng, (28, 42, 23), (64, 60, 18))
        reference = np.zeros(one.hu.shape, np.uint8)
        spots = 0 if number == 7 else 1 + number % 3
        for artery, spot in product(COURSES, range(spots)):
            place = on_artery(one, artery, (spot + 0.5) / spots)
            count, peak = (int(rng.integers(2, 31)), rng.uniform(200, 900)) if number else (4, 250)
            calcify(one, reference, artery, place, count, peak, slices=2 if number else 1)
        lps = np.diag([-1, -1, 1, 1]) @ one.affine
        grid = {
            "ElementSpacing": " ".join(f"{size:.6f}" for size in one.spacing),
            "TransformMatrix": "-1 0 0 0 -1 0 0 0 1",
            "Offset": " ".join(f"{place:.6f}" for place in lps[:3, 3]),
        }
        write_metaimage(root / "Images" / f"{name}CTI.mhd", one.hu.astype(np.int16), **grid)
        write_metaimage(root / "Reference standard" / f"{name}R.mhd", reference, **grid)
    return root.parent


def nodules(root: Path) -> Path:
    """Task06_Lung by its names: eight cases with a nodule of 2 to 15 mm each, and one of the test set."""
    root = root / "Task06_Lung"
    names = [f"lung_{number:03d}.nii.gz" for number in range(1, 10)]
    for number, (name, diameter) in enumerate(zip(names, (6, 12, 2, 15, 4, 10, 8, 13, 9), strict=True)):
        rng = np.random.default_rng(100 + number)
        one = individual(rng, (8, 28, 24 + 2 * number), (108, 76, 12))
        mask = add_nodule(one, rng, diameter, left=number % 2 == 0)
        part = "Tr" if number < 8 else "Ts"
        write(root / f"images{part}" / name, one.hu.astype(np.int16), one.affine)
        (root / f"images{part}" / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
        if number < 8:
            write(root / "labelsTr" / name, mask, one.affine)
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
LAYOUTS = (
    pytest.param("atlas-r2", "atlas-r2", brains, id="atlas-r2"),
    pytest.param("orcascore", "orcascore", hearts, id="orcascore", marks=NEEDS_CHEST),
    pytest.param("msd-lung", "decathlon", nodules, id="msd-lung", marks=NEEDS_CHEST),
)
