"""What a first prediction on a GPU waits for, done before: Triton's kernels compiled and kept on disk."""

from __future__ import annotations

import time
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch

from ..ops import triton
from ..ops.backends import BackendUnavailableError, select_backend
from ..ops.compilation import counted_kernels
from .predictor import Predictor
from .sources import Source

__all__ = ["WarmUp", "warm_up"]

HEAD = (197, 233, 189)  # voxels of 1 mm, as of the T1 averages that heads are registered to


class WarmUp(NamedTuple):
    """What a warm-up did.

    Attributes:
        compiled: kernels that were compiled, and are now in Triton's cache on disk.
        found: kernels that were there already.
        seconds: in all.
    """

    compiled: int
    found: int
    seconds: float


def warm_up(predictor: Predictor, source: Source | None = None) -> WarmUp:
    """Segment a volume for nothing, so that no later prediction of this machine waits for Triton's compiler.

    What is compiled depends on the GPU, on the predictor (bundle, batch size, precision) and on the size of the slices
    or windows. So give a volume as large as those to come; one of another size may have a few kernels left to compile.

    Args:
        predictor: on a GPU.
        source: as for a call of the predictor; None: noise in an ellipsoid, as large as an adult head.

    Returns:
        How many kernels, and how long it took. Kernels that the process had launched before are not among them.

    Raises:
        BackendUnavailableError: no Triton kernels would run for this predictor; the message says why.
        VolumeError: a volume that cannot be used.
        FileNotFoundError: no such file.

    Example:
        >>> predictor = Predictor("demo")  # doctest: +SKIP
        >>> warm_up(predictor, "scan.nii.gz").seconds  # doctest: +SKIP
    """
    problem = triton.problem()
    if problem is None:
        with predictor.on_backend():
            backend = select_backend(next(predictor.network.parameters()))
        problem = None if backend == "triton" else f"on {predictor.device.type!r} the backend is {backend!r}"
    if problem is not None:
        raise BackendUnavailableError(f"warm_up: expected a GPU with Triton's kernels, got none: {problem}")
    began = time.perf_counter()
    with counted_kernels() as kernels:
        predictor(_head(predictor) if source is None else source)
    return WarmUp(kernels.compiled, kernels.found, time.perf_counter() - began)


def _head(predictor: Predictor) -> nib.Nifti1Image:
    """Noise in an ellipsoid, of as many channels as the bundle wants."""
    x, y, z = (torch.linspace(-1, 1, size, dtype=torch.float32) for size in HEAD)
    inside = x[:, None, None] ** 2 + y[:, None] ** 2 + z**2 < 1
    air = -1000.0 if predictor.bundle.preprocessing.modality == "ct" else 0.0
    noise = torch.rand(HEAD, generator=torch.Generator().manual_seed(0))
    head = torch.where(inside, 20 + 40 * noise, air).numpy()
    channels = predictor.in_channels
    return nib.Nifti1Image(head if channels == 1 else np.stack([head] * channels, -1), np.eye(4))
