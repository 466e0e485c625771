"""The anatomy that synthetic subjects are made of: the ICBM 2009a T1 average with its tissue probability maps."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ..data.volumes import resize, scaled_affine

__all__ = ["Template", "load_template"]

_FILES = {kind: f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm")}


@dataclass(frozen=True)
class Template:
    """A skull-stripped head average.

    Attributes:
        t1: (X, Y, Z) float32, white matter near 1, background 0.
        gm: (X, Y, Z) float32, grey-matter probability in [0, 1].
        wm: (X, Y, Z) float32, white-matter probability in [0, 1].
        affine: (4, 4) float64, voxel to RAS millimetres.
    """

    t1: Tensor
    gm: Tensor
    wm: Tensor
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel in mm."""
        return tuple(float(size) for size in nib.affines.voxel_sizes(self.affine))


@lru_cache(maxsize=4)
def load_template(spacing: float = 1.0, folder: str | Path | None = None) -> Template:
    """Read the template, 197x233x189 voxels at 1 mm, and resample it to an isotropic spacing.

    Args:
        spacing: in mm.
        folder: where the three ``mni_icbm152_*`` files lie; None: inside the installed package nilearn, whose code is
            not imported.

    Raises:
        FileNotFoundError: the files are not there; the message says how to get them.
    """
    if folder is None:
        found = importlib.util.find_spec("nilearn")
        if found is None or not found.submodule_search_locations:
            raise FileNotFoundError(
                "the ICBM 2009a template was not found: it comes with nilearn; in a checkout of grcsf-fast: "
                'pip install ".[synthesize]", or give load_template(folder=...) that of its files'
            )
        folder = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    maps = {}
    for kind, name in _FILES.items():
        path = Path(folder) / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected the ICBM 2009a {kind} map, found no file")
        image = nib.as_closest_canonical(nib.load(path))
        maps[kind] = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))
        affine = image.affine
    for kind in ("gm", "wm"):
        maps[kind] = maps[kind] / maps[kind].max()
    white = maps["t1"][maps["wm"] > 0.9].median()
    maps["t1"] = maps["t1"] / white
    shape = tuple(maps["t1"].shape)
    target = tuple(
        max(1, round(n * size / spacing)) for n, size in zip(shape, nib.affines.voxel_sizes(affine), strict=True)
    )
    resized = {kind: resize(volume, target).clamp_min(0) for kind, volume in maps.items()}
    return Template(resized["t1"], resized["gm"], resized["wm"], scaled_affine(affine, shape, target))
