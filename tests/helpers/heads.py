"""Scans of heads and bundles with random weights, small enough for any test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from awake import awake

from grcsf_fast import GRCSF, MaskedAutoencoder, Predictor
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.pretrained.bundle import Bundle, save_bundle
from grcsf_fast.synthesis.subjects import synthesize_subject
from grcsf_fast.synthesis.template import load_template

SPACING = (6.0, 6.0, 6.0)


def tiny_bundle(**network) -> Bundle:
    torch.manual_seed(0)
    mae = MaskedAutoencoder(2, 1, 8, embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1)
    arguments = {"features": (4, 8, 8), "patch_size": 4, "rcu_levels": (0, 1), "residual_channels": 4} | network
    return Bundle(awake(GRCSF(2, 1, 1, **arguments)), mae, Preprocessing(SPACING))


def save_tiny_bundle(scan: Path, folder: Path) -> Path:
    """Random weights, with the threshold that makes 2 % of the scan lesion."""
    bundle = tiny_bundle()
    probability = np.asarray(Predictor(bundle)(scan).probability.dataobj)
    return save_bundle(replace(bundle, probability_threshold=float(np.quantile(probability, 0.98))), folder)


def save_scan(path: Path) -> Path:
    """A real head at 4 mm on an oblique LAS grid with qform and sform."""
    subject = synthesize_subject(load_template(4.0), 3, skull=False)
    angle = np.deg2rad(12)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-4.0, 4.0, 4.0])
    affine[:3, 3] = [90, -120, -70]
    image = nib.Nifti1Image(subject.image.numpy()[::-1].copy(), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 2)
    nib.save(image, path)
    return path


def write(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)
