"""What a case is called: by its file, wherever its voxels came from, or by whoever asks for it."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from heads import SPACING, noise, tiny_bundle, write
from monai.data import MetaTensor
from monai.transforms import LoadImage

from grcsf_fast import Failure, Predictor
from grcsf_fast.errors import ArgumentError

GRID = np.diag([*SPACING, 1.0])


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny_bundle())


@pytest.fixture
def scan(tmp_path):
    (tmp_path / "scans").mkdir()
    return write(tmp_path / "scans" / "sub-01_T1w.nii.gz", noise(24, 24, 8), GRID)


def test_a_tensor_of_monai_is_called_like_its_file(predictor, scan, tmp_path):
    tensor = LoadImage(ensure_channel_first=True)(scan)
    (of_many,) = predictor.predict_many([tensor])
    for found in (predictor(tensor), of_many):
        assert found.name == "sub-01_T1w"
        assert found.report["case"] == "sub-01_T1w"
        assert found.report["input"] == str(scan)
    assert found.save(tmp_path / "out")[0].name == "sub-01_T1w_report.json"
    with pytest.raises(ArgumentError, match="would replace the input itself"):
        found.save(scan.parent)
    plain = MetaTensor(torch.from_numpy(noise(24, 24, 8)), torch.from_numpy(GRID))
    assert predictor(plain).name == "volume"
    for meta, name in (({"filename_or_obj": ["a/b.nrrd"]}, "b"), ({"filename_or_obj": ""}, "volume")):
        assert predictor(MetaTensor(plain.as_tensor(), plain.affine, meta=meta)).name == name


def test_arrays_in_a_loop_have_the_names_that_they_get(predictor, tmp_path):
    for number in range(2):
        found = predictor(noise(24, 24, 8) + number, affine=GRID, name=f"patient{number}")
        assert found.report["case"] == f"patient{number}"
        found.save(tmp_path, maps=False, overlay=False)
    assert (tmp_path / "patient1.nii.gz").exists()


NAMES = [
    ("x.nii.gz", r"^name: expected that of a case, to which \.nii\.gz is added, got 'x\.nii\.gz'; leave it out"),
    ("sub-01/anat/x", r"^name: expected that of a case, which its files begin with, without folders, got 'sub-01/anat"),
    ("", r"^name: expected .*, got ''"),
    ("..", r"^name: expected .*, got '\.\.'"),
    (7, r"^name: expected .*, got 7"),
]


@pytest.mark.parametrize(("name", "message"), NAMES)
def test_names_that_no_case_can_have(predictor, tmp_path, name, message):
    with pytest.raises(ArgumentError, match=message):
        predictor(noise(24, 24, 8), affine=GRID, name=name)
    prediction = predictor(noise(24, 24, 8), affine=GRID)
    with pytest.raises(ArgumentError, match=message):
        prediction.save(tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_for_results(predictor, tmp_path):
    prediction = predictor(noise(24, 24, 8), affine=GRID)
    with pytest.raises(OSError, match=r"mask\.nii\.gz: expected a folder for several files, found the name of one"):
        prediction.save(tmp_path / "out" / "mask.nii.gz")
    assert not (tmp_path / "out").exists()


def test_a_file_with_two_endings_keeps_its_name(predictor, tmp_path):
    path = write(tmp_path / "x.nii.nii.gz", noise(24, 24, 8), GRID)
    assert predictor(path).save(tmp_path / "out")[-1].name == "x.nii.nii.gz"


def test_a_failure_has_the_name_of_its_case(predictor, tmp_path):
    flat = nib.Nifti1Image(np.ones((24, 24, 8), np.float32), GRID)
    sources = [flat, tmp_path / "missing.nii.gz", str(tmp_path / "other.nrrd"), 3]
    found = list(predictor.predict_many(sources, failures="return"))
    assert all(isinstance(one, Failure) for one in found)
    assert [one.name for one in found] == ["volume_0", "missing", "other", "volume_3"]
    assert Path(found[1].source).name == "missing.nii.gz"
