"""Every format goes in, and masks come out in NIfTI or in the same one, on the same grid."""

import csv
import sys
from pathlib import Path
from shutil import copy, copytree

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the name its users know
from heads import SPACING
from itk_volumes import itk_image, write_series

from grcsf_fast import Predictor
from grcsf_fast.cli import main
from grcsf_fast.data.masks import load_mask
from grcsf_fast.data.reports import read_report
from grcsf_fast.data.volumes import FORMS, Preprocessing, load_volume
from grcsf_fast.datasets.cases_file import read_cases
from grcsf_fast.datasets.pairs import FolderSource

FILES = {  # by the input's: what is written with --format same
    "nii.gz": ("nii.gz",),
    "nii": ("nii",),
    "img": ("hdr", "img"),
    "mha": ("mha",),
    "mhd": ("mha",),
    "nrrd": ("nrrd",),
    "dicom": ("nii.gz",),
}


@pytest.fixture(scope="module")
def scans(tmp_path_factory, scan) -> Path:
    """The scan in whole numbers, in every format; series in a folder of their own."""
    folder = tmp_path_factory.mktemp("formats")
    opened = nib.load(scan)
    data = np.asarray(opened.dataobj)
    data = np.rint(data * (30000 / np.abs(data).max())).astype(np.int16)
    image = nib.Nifti1Image(data, opened.affine)
    for ending in ("nii", "nii.gz"):
        nib.save(image, folder / f"case-{ending}.{ending}")
    nib.save(nib.Nifti1Pair(data, opened.affine), folder / "case-img.img")
    lps = np.diag([-1, -1, 1, 1]) @ opened.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    written = itk_image(data, spacing, lps[:3, 3], lps[:3, :3] / spacing)
    for ending in ("mha", "mhd", "nrrd"):
        sitk.WriteImage(written, str(folder / f"case-{ending}.{ending}"), useCompression=True)
    return folder


@pytest.fixture(scope="module")
def series(tmp_path_factory, scans) -> Path:
    """The same as a DICOM series, in a folder of its own."""
    written = sitk.ReadImage(str(scans / "case-mha.mha"))
    return write_series(tmp_path_factory.mktemp("series") / "case-dicom", written)


def predict(source, output, bundle_folder, *arguments):
    return main(["predict", "-i", str(source), "-o", str(output), "-m", str(bundle_folder), "--no-page", *arguments])


@pytest.fixture(scope="module")
def results(tmp_path_factory, scans, series, bundle_folder) -> Path:
    """Of all, with ``--format same``; of the pair with maps and picture too."""
    output = tmp_path_factory.mktemp("results")
    alone = ("--format", "same", "--no-maps", "--no-overlay")
    for source in (scans, series):
        assert predict(source, output, bundle_folder, *alone) == 0
    assert predict(scans / "case-img.img", output, bundle_folder, *alone[:2]) == 0
    return output


@pytest.mark.parametrize("kind", FILES)
def test_masks_in_the_format_of_the_input(scans, series, results, kind):
    name = f"case-{kind}"
    source = series if kind == "dicom" else scans / f"{name}.{kind}"
    files = [f"{name}.{ending}" for ending in FILES[kind]]
    outputs = list(read_report(results / f"{name}_report.json")["outputs"])
    others = [f"{name}_residual50.nii.gz", f"{name}_residual75.nii.gz", f"{name}_overlay.png"]
    assert outputs == (others if kind == "img" else []) + files
    assert all((results / file).is_file() for file in outputs)
    mask, volume = load_mask(results / files[-1]), load_volume(source)
    assert np.allclose(mask.affine, volume.affine, atol=1e-4)
    expected = load_mask(results / "case-nii.nii").voxels
    # DICOM's slices follow each other by the right-hand rule.
    expected = expected[:, :, ::-1] if kind == "dicom" else expected
    assert mask.voxels.any()
    assert np.mean(mask.voxels != expected) < 1e-4  # headers round their numbers


def test_a_pair_keeps_the_forms_of_its_input(scans, results):
    found, given = nib.load(results / "case-img.hdr").header, nib.load(scans / "case-img.hdr").header
    for field in FORMS:
        assert np.array_equal(found[field], given[field]), field
    assert found.get_data_dtype() == np.uint8


def test_a_run_goes_on_and_another_format_takes_its_place(scans, results, bundle_folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    copy(scans / "case-nrrd.nrrd", tmp_path / "in")
    (tmp_path / "in" / "case-nrrd.nrrd").rename(tmp_path / "in" / "a.nrrd")
    output = tmp_path / "out"
    same = ("--format", "same", "--no-maps", "--no-overlay")
    assert predict(tmp_path / "in", output, bundle_folder, *same) == 0
    assert predict(tmp_path / "in", output, bundle_folder, *same) == 0
    assert "1 cases were finished before" in capsys.readouterr().out
    assert (output / "a.nrrd").is_file()
    assert predict(tmp_path / "in", output, bundle_folder, *same[2:]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["a.nii.gz", "a_report.json", "summary.csv"]


def test_a_series_is_resumed_by_its_content(series, bundle_folder, tmp_path, capsys):
    """A folder of folders with a series each."""
    series = Path(copytree(series, tmp_path / "in" / "case"))
    for expected in (False, True):
        assert predict(tmp_path / "in", tmp_path / "out", bundle_folder, "--no-maps", "--no-overlay") == 0
        assert ("1 cases were finished before" in capsys.readouterr().out) == expected
    (series / "more.txt").write_text("another file")
    assert predict(tmp_path / "in", tmp_path / "out", bundle_folder, "--no-maps", "--no-overlay") == 0
    assert "finished before" not in capsys.readouterr().out


def test_results_may_not_lie_among_the_slices(series, bundle_folder, capsys):
    assert predict(series, series, bundle_folder) == 2
    assert "expected another folder than the input's" in capsys.readouterr().err


def test_evaluate_reads_all_of_them(results, tmp_path):
    """Masks in every format against the one in NIfTI, on either side."""
    kinds, masks, others = ("img", "mha", "mhd", "nrrd"), tmp_path / "nifti", tmp_path / "others"
    masks.mkdir(), others.mkdir()
    for kind in kinds:
        copy(results / "case-nii.nii", masks / f"case-{kind}.nii")
        for ending in FILES[kind]:
            copy(results / f"case-{kind}.{ending}", others)
    for predicted, truth in ((others, masks), (masks, others)):
        scores = tmp_path / f"scores-{truth.name}"
        assert main(["evaluate", "-p", str(predicted), "-t", str(truth), "-o", str(scores)]) == 0
        with (scores / "cases.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert sorted(row["case"] for row in rows) == [f"case-{kind}" for kind in kinds]
        for row in rows:
            assert float(row["truth_ml"]) > 0
            assert float(row["dice"]) > 0.99  # headers round their numbers


def test_cases_and_training_read_all_of_them(scans, results, tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    masks.mkdir()
    copytree(scans, images)
    for path in results.iterdir():
        if "_residual" not in path.name and "dicom" not in path.name and not path.name.endswith(("json", "png", "csv")):
            copy(path, masks)
    assert main(["cases", "pairs", str(images), str(masks), "-o", str(tmp_path / "cases.json"), "--folds", "2"]) == 0
    listing = read_cases(tmp_path / "cases.json")
    assert {case.name for case in listing.cases} == {f"case-{kind}" for kind in FILES if kind != "dicom"}
    assert all(case.lesion_ml for case in listing.cases)
    source = FolderSource(images, masks, Preprocessing(SPACING))
    assert all(source[number].lesion.any() for number in range(len(source)))


def test_training_reads_series(series, results, tmp_path):
    (tmp_path / "masks").mkdir()
    copy(results / "case-dicom.nii.gz", tmp_path / "masks")
    source = FolderSource(series, tmp_path / "masks", Preprocessing(SPACING))
    assert source[0].lesion.any()


def test_without_simpleitk_the_extra_is_named(scans, bundle_folder, tmp_path, monkeypatch, capsys):
    """MetaImages are read without it; only the mask asks for it."""
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with monkeypatch.context() as patched:
        patched.setattr(Predictor, "__call__", lambda *arguments: pytest.fail("it was computed"))
        assert predict(scans / "case-mha.mha", tmp_path / "out", bundle_folder, "--format", "same") == 2
    named = 'found none; in a checkout of grcsf-fast: pip install ".[io]"'
    assert f"to write a file ending in .mha, {named}" in capsys.readouterr().err
    assert predict(scans / "case-nrrd.nrrd", tmp_path / "out", bundle_folder) == 2
    assert f"to read an NRRD file, {named}" in capsys.readouterr().err
    # Of a folder before any case is computed.
    monkeypatch.setattr("grcsf_fast.inference.folder.predict_case", lambda *arguments: pytest.fail("a case was begun"))
    only = tmp_path / "only"
    only.mkdir()
    copy(scans / "case-mha.mha", only)
    assert predict(only, tmp_path / "results", bundle_folder, "--format", "same") == 2
    assert f"to write a file ending in .mha, {named}" in capsys.readouterr().err


def test_formats_there_are_not(scan, bundle_folder, tmp_path):
    predictor = Predictor(bundle_folder)
    with pytest.raises(ValueError, match=r"mask_format: expected one of .*, got 'dicom'"):
        predictor.predict_folder(scan, tmp_path / "out", mask_format="dicom")
    with pytest.raises(ValueError, match=r"mask_format: expected one of .*, got 'dicom'"):
        predictor(scan).save(tmp_path / "out", mask_format="dicom")
