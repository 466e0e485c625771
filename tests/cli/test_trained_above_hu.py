"""A training on a list that counts lesion above some Hounsfield units: its bundles cut there by themselves."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import run
from layouts import orcascore

from grcsf_fast.data.volumes import Preprocessing, load_volume
from grcsf_fast.datasets.cases_file import CaseList, ListedCase, read_cases, write_cases
from grcsf_fast.datasets.sources import ListedSource
from grcsf_fast.pretrained.bundle import load_bundle, save_bundle

TRAIN = [
    *("--steps", "2", "--batch-size", "2", "--crop-size", "16,16", "--crop-size-jitter", "0", "--warmup-steps", "1"),
    *("--cache-size", "2", "--log-every", "1", "--validate-every", "1", "--precision", "float32", "--augment", "none"),
    *("--features", "4,8,8,8", "--rcu-levels", "", "--workers", "0", "--spacing", "2,2,3"),
]


@pytest.fixture(scope="module")
def listing(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("orcascore")
    assert run("cases", "orcascore", orcascore(folder), "-o", folder / "cases.json", "--folds", 2) == 0
    return folder / "cases.json"


def test_a_new_scan_is_cut_as_the_list_says(listing, tmp_path, capsys):
    command = ["train", "--cases", listing, "--fold", 0, "-o", tmp_path / "net", "--modality", "ct", *TRAIN]
    assert run(*command) == 0
    bundles = [tmp_path / "net" / name for name in ("bundle", "best") if (tmp_path / "net" / name).exists()]
    assert [load_bundle(folder).above_hu for folder in bundles] == [130.0] * len(bundles)
    # A threshold that all voxels reach: what is left is what counts.
    bundle = save_bundle(replace(load_bundle(bundles[0]), probability_threshold=0.0), tmp_path / "every")
    image = next(case.images[0] for case in read_cases(listing).cases if not case.masks)
    assert run("predict", "-i", image, "-o", tmp_path / "found", "-m", bundle, "--precision", "float32") == 0
    mask = np.asarray(nib.load(tmp_path / "found" / f"{image.stem}.nii.gz").dataobj)
    np.testing.assert_array_equal(mask > 0, load_volume(image).data > 130)
    report = json.loads((tmp_path / "found" / f"{image.stem}_report.json").read_text())
    assert report["settings"]["above_hu"] == 130.0
    assert f"Agatston {report['agatston']:.1f}" in capsys.readouterr().out


def test_validations_are_cut_as_predictions(listing):
    """Where the voxels that a case's file has above the limit cover half of a voxel of the networks."""
    found = read_cases(listing)
    case = next(case for case in found.cases if case.masks)
    volume = load_volume(case.images[0])
    spacing = tuple(nib.affines.voxel_sizes(volume.affine).tolist())
    source = ListedSource(found, [case], Preprocessing(spacing, "ct", hu_window=(-200.0, 800.0)))
    made = source[0]
    assert made.dense is not None
    assert made.dense.any()
    assert torch.equal(made.dense, (500 * (made.image + 1) - 200).round() > 130)
    assert not (made.lesion & ~made.dense).any()
    other = replace(case, images=(case.masks[0], case.images[0]))  # whose limit is of another image
    two = replace(found, cases=(other,), channels=("CT", "CTA"))
    assert ListedSource(two, [other], source.preprocessing, channels=("CTA",))[0].dense is None


@pytest.mark.parametrize(
    ("channels", "limit"), [("CT,CTA", 130.0), ("CTA,CT", None), ("CTA", None)], ids=["first", "second", "absent"]
)
def test_of_several_channels_the_lists_first_has_to_be_the_networks(listing, tmp_path, capsys, channels, limit):
    every = [case for case in read_cases(listing).cases if case.masks][:2]
    cases = [
        ListedCase(case.name, (case.images[0], Path(str(case.images[0]).replace("CTI", "CTAI"))), case.masks, case.name)
        for case in every
    ]
    write_cases(tmp_path / "two.json", CaseList("pairs", tuple(cases), ("CT", "CTA"), above_hu=130))
    command = ["train", "--cases", tmp_path / "two.json", "-o", tmp_path / "net", "--modality", "ct", *TRAIN]
    with pytest.warns(UserWarning, match="channels: expected CT first") if limit is None else nullcontext():
        assert run(*command, "--channels", channels) == 0
    assert load_bundle(tmp_path / "net" / "bundle").above_hu == limit
    capsys.readouterr()
