"""One volume from its file to the written files: `predict`, the plain path, and the networks taken instead.

The others, SwinUNETR in its smaller size, get the same slices of the same prepared volume, in batches of 16, without
residual maps, views, pictures and reports: what a user would write around them at the least. Their weights are random,
so times are all that compares. Against them ours runs as it is shipped, with four views, and with one as they have.
Whole folders, each run a process of its own: ``python -m benchmarks.pipeline``.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.contest import Contest, Contestant
from benchmarks.peers import NETWORKS, predict_slices
from benchmarks.pipeline import volumes
from benchmarks.plan import Plan
from grcsf_fast import Predictor, use_backend
from grcsf_fast.pretrained.bundle import Bundle, load_bundle

PLAIN = "plain path"
# One less the Dice to float64. bfloat16 moves outlines (results/pipeline.md has how far over eight volumes).
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}
LESION_SLICE = 41  # in the middle of the largest lesion of the first subject
IMAGES = Path(__file__).parents[1] / "runs" / "pipeline"


def missed_dice(masks: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """One less the Dice, where the exact mask is known (not 2)."""
    (one,), (other,) = masks, exact
    one, other = one[other < 2] > 0, other[other < 2] > 0
    if not other.any():
        raise ValueError("exact mask: expected a lesion to compare with, found none")
    return 1 - 2 * int((one & other).sum()) / int(one.sum() + other.sum())


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    """Of the session, for what the contestants write and for cut volumes; removed when the program ends."""
    return tempfile.TemporaryDirectory(prefix="grcsf-benchmark-")


def volume(slices: int | None) -> Path:
    """A synthetic subject of 197x233x189 voxels, or ``slices`` of it in which lesions are found, as a file."""
    whole = sorted(volumes(IMAGES, 1).iterdir())[0]
    if slices is None:
        return whole
    path = Path(folder().name) / f"subject_{slices}.nii.gz"
    if not path.exists():
        image = nib.load(whole)
        first = LESION_SLICE - slices // 2
        nib.save(image.slicer[:, :, first : first + slices], path)
    return path


def read_mask(path: Path) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(nib.load(path).dataobj))]


def plain_run(bundle: Bundle, path: Path, output: Path) -> Path:
    with use_backend("reference"):
        plain.predict(bundle, path, output, "case")
    return output / "case.nii.gz"


def predict_steps(bundle: Bundle, plan: Plan, precision: str, path: Path, output: Path) -> list[Callable[[], Any]]:
    predictor = Predictor(bundle, precision=precision, device=plan.device)

    def call() -> Path:
        predictor(path).save(output, "case")
        return output / "case.nii.gz"

    return [call]


def network_steps(network: torch.nn.Module, bundle: Bundle, path: Path, output: Path) -> list[Callable[[], Any]]:
    def call() -> Path:
        predict_slices(network, bundle.preprocessing, path, output)
        return output

    return [call]


def pipeline_contest(
    plan: Plan,
    peers: Sequence[str],
    slices: int | None = None,
    coarse: bool = False,
    one_view: bool = False,
    **more: Any,
) -> Contest:
    auto = Predictor.from_pretrained("demo", plan.device).precision
    precisions = dict.fromkeys(["float32", auto])
    names = (*(f"predict, {precision}" for precision in precisions), PLAIN, *peers)

    def entries() -> dict[str, Contestant]:
        path, bundle = volume(slices), load_bundle("demo")
        if coarse:
            # A grid of 3 mm; at 4 mm the network is out of its depth, and bfloat16 moves outlines further than that.
            preprocessing = replace(bundle.preprocessing, spacing=(3.0, 3.0, 3.0))
            bundle = replace(bundle, preprocessing=preprocessing, hysteresis_threshold=0.0)
        if one_view:
            bundle = replace(bundle, tta_flip=False, tta_scales=(1.0,))
        # Results of one name and another input are refused.
        place = Path(folder().name) / f"{'one_view' if one_view else 'shipped'}_{path.name.split('.')[0]}"
        double = replace(bundle, network=copy.deepcopy(bundle.network).double(), mae=copy.deepcopy(bundle.mae).double())

        def exact() -> list[Tensor]:
            return read_mask(plain_run(double, path, place / "exact"))

        found = {
            f"predict, {precision}": Contestant(
                functools.partial(predict_steps, bundle, plan, precision, path, place / precision),
                exact, TOLERANCES[precision], ours=True, results=read_mask,
            )
            for precision in precisions
        }  # fmt: skip
        found[PLAIN] = Contestant(
            lambda: [functools.partial(plain_run, bundle, path, place / "plain")],
            exact, TOLERANCES["float32"], results=read_mask,
        )  # fmt: skip
        for name in peers:
            torch.manual_seed(0)
            network = NETWORKS[name]().eval()

            def exact_peer(network: torch.nn.Module = network) -> list[Tensor]:
                # A few slices: in float64 the whole volume takes longer than all that is measured.
                output = place / "exact.nii.gz"
                predict_slices(copy.deepcopy(network).double(), bundle.preprocessing, path, output, slice(8, 12))
                return read_mask(output)

            found[name] = Contestant(
                functools.partial(network_steps, network, bundle, path, place / "peer.nii.gz"),
                exact_peer, TOLERANCES["float32"], results=read_mask,
            )  # fmt: skip
        return found

    shape = f"197x233x{slices or 189}{' at 3 mm' if coarse else ''}{', one view' if one_view else ''}"
    return Contest(
        shape=shape,
        dtype="float32 or named",
        passes=("file to files",),
        names=names,
        entries=entries,
        reference=PLAIN,
        threads=plan.threads,
        device=plan.device,
        error=missed_dice,
        long=True,
        **{"what": "volume"} | more,
    )


def contests(plan: Plan) -> list[Contest]:
    small = ["MONAI UNet"]
    full = {"peers": [name for name in NETWORKS if name != "SwinUNETR 48"]}
    settings = plan.choose({"peers": small, "coarse": True}, {"peers": small, "slices": 24}, full)
    scaling = plan.choose({}, {}, {"scaling": ("slices", 189)})
    return [pipeline_contest(plan, **settings, **scaling), pipeline_contest(plan, **settings, one_view=True)]


@pytest.mark.slow
def test_pipeline(compete):
    compete()


@pytest.mark.slow
def test_cut_volumes_have_a_lesion_to_compare():
    """With the shipped weights and thresholds; the whole run would find out after ten minutes."""
    assert Predictor.from_pretrained("demo")(volume(24)).mask.get_fdata().any()
