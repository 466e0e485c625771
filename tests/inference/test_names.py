"""Results of inputs with equal names in one folder: none takes another's place unasked."""

import shutil

import nibabel as nib
import numpy as np
import pytest
from commands import predict
from heads import SPACING, noise, write

from grcsf_fast import Predictor
from grcsf_fast.cli import main
from grcsf_fast.data import files
from grcsf_fast.data.files import this_machine
from grcsf_fast.data.mask_files import SAME
from grcsf_fast.data.names import MAX_NAME, short_name
from grcsf_fast.data.reports import REPORT, read_report
from grcsf_fast.errors import ArgumentError
from grcsf_fast.inference.plan import check_names
from grcsf_fast.inference.prediction import output_names
from grcsf_fast.inference.record import Done, Failed

GRID = np.diag([*SPACING, 1.0])
REFUSED = "expected no result of another input under its name, found one of"


@pytest.fixture
def sites(tmp_path):
    """Two folders with a case of the same name, and one more in the second."""
    for number, site in enumerate(("first", "second")):
        (tmp_path / site).mkdir()
        write(tmp_path / site / "case.nii.gz", noise(24, 24, 8) + number, GRID)
    write(tmp_path / "second" / "other.nii.gz", noise(24, 24, 9), GRID)
    return tmp_path / "first", tmp_path / "second"


def test_two_folders_into_one(bundle, sites, tmp_path):
    first, second = sites
    predictor, output = Predictor(bundle), tmp_path / "out"
    assert [type(one) for one in predictor.predict_folder(first, output)] == [Done]
    before = (output / "case.nii.gz").read_bytes(), (output / "case_report.json").read_bytes()
    found = {one.name: one for one in predictor.predict_folder(second, output)}
    assert isinstance(found["case"], Failed)
    assert f"{second / 'case.nii.gz'}: {REFUSED} {first / 'case.nii.gz'}" in found["case"].error
    assert "unexpected" not in found["case"].error
    assert isinstance(found["other"], Done)
    assert before == ((output / "case.nii.gz").read_bytes(), (output / "case_report.json").read_bytes())
    found = {one.name: one for one in predictor.predict_folder(second, output, overwrite=True)}
    assert {type(one) for one in found.values()} == {Done}
    assert read_report(output / "case_report.json")["input"] == str(second / "case.nii.gz")


def test_the_same_file_elsewhere_is_the_same_input(bundle, sites, tmp_path):
    predictor, output = Predictor(bundle), tmp_path / "out"
    assert len(list(predictor.predict_folder(sites[0], output))) == 1
    moved = shutil.copytree(sites[0], tmp_path / "moved")
    others = Predictor(bundle, importance_threshold=0.5)
    assert [type(one) for one in others.predict_folder(moved, output)] == [Done]


def test_one_file_after_another(bundle, sites, tmp_path, capsys):
    arguments = ("-o", str(tmp_path / "out"), "-m", str(bundle))
    paths = [str(site / "case.nii.gz") for site in sites]
    assert main(["predict", "-i", paths[0], *arguments]) == 0
    assert main(["predict", "-i", paths[0], *arguments]) == 0
    assert main(["predict", "-i", paths[1], *arguments]) != 0
    assert f"{paths[1]}: {REFUSED} {paths[0]}" in capsys.readouterr().err
    assert read_report(tmp_path / "out" / "case_report.json")["input"] == paths[0]
    assert main(["predict", "-i", paths[1], *arguments, "--overwrite"]) == 0
    assert read_report(tmp_path / "out" / "case_report.json")["input"] == paths[1]


def test_many_saved_into_one_folder(bundle, sites, tmp_path):
    paths = [site / "case.nii.gz" for site in sites]
    first, second = Predictor(bundle).predict_many(paths)
    first.save(tmp_path / "out")
    with pytest.raises(ArgumentError, match=REFUSED):
        second.save(tmp_path / "out")
    second.save(tmp_path / "out", "second")
    assert (tmp_path / "out" / "second.nii.gz").exists()


def test_images_in_memory_have_names_of_their_own(bundle, sites):
    read = nib.load(sites[1] / "other.nii.gz")
    images = [nib.Nifti1Image(noise(24, 24, 8), GRID), read, nib.Nifti1Image(noise(24, 24, 9), GRID)]
    predictor = Predictor(bundle)
    assert [one.name for one in predictor.predict_many(images)] == ["volume_0", "other", "volume_2"]
    assert predictor(images[0]).name == "volume"


def test_images_in_memory_take_no_other_ones_place(bundle, tmp_path):
    """All of them are called "volume", and patients are told apart by their voxels and where these lie."""
    predictor, voxels, moved = Predictor(bundle), noise(24, 24, 8).astype(np.float32), GRID.copy()
    moved[0, 3] = 5
    first = predictor(voxels, affine=GRID)
    first.save(tmp_path)
    predictor(voxels.copy(), affine=GRID).save(tmp_path)
    before = (tmp_path / "volume.nii.gz").read_bytes()
    for other in (predictor(voxels + np.eye(24, dtype=np.float32)[..., None], affine=GRID), predictor(voxels, moved)):
        assert other.report["input_sha256"] != first.report["input_sha256"]
        with pytest.raises(ArgumentError, match=REFUSED):
            other.save(tmp_path)
    assert (tmp_path / "volume.nii.gz").read_bytes() == before
    other.save(tmp_path, "p7")
    assert [read_report(tmp_path / f"{name}_report.json")["case"] for name in ("volume", "p7")] == ["volume", "p7"]


@pytest.mark.parametrize("names", [("Sub1", "sub1"), ("caf\u00e9", "cafe\u0301")])
def test_names_that_the_file_system_takes_for_one(bundle, tmp_path, monkeypatch, names):
    (tmp_path / "scans").mkdir()
    for number, name in enumerate(names):
        write(tmp_path / "scans" / f"{name}.nii.gz", noise(24, 24, 8) + number, GRID)
    if len(list((tmp_path / "scans").iterdir())) == 1:
        pytest.skip("needs a file system that tells both names apart")
    check_names(tmp_path / "scans", tmp_path / "out", names)
    monkeypatch.setattr(files.Path, "exists", lambda self: True)  # of an SMB share, say
    with pytest.raises(ArgumentError, match=f"expected names that .* takes {min(names)} and {max(names)} for one"):
        check_names(tmp_path / "scans", tmp_path, names[::-1])


@pytest.mark.parametrize("source", ["", "case.nii.gz"])
def test_what_a_killed_run_left_goes(bundle, sites, tmp_path, source):
    """With other options or of other cases; also before a single file."""
    output = tmp_path / "out"
    output.mkdir()
    # No process has such a number.
    names = ("case_residual50.nii.gz", "case_overlay.png", "case.nii.gz", "index.html", "other.nii.gz")
    for name in names:
        (output / f".partial-{this_machine()}-999999999-abcdef-{short_name(name)}").write_text("")
    (output / "mine.nii.gz").write_text("")
    given = ("--no-maps", "--no-overlay", "--no-page")
    assert predict("-i", sites[0] / source, "-o", output, "-m", bundle, *given) == 0
    left = {path.name for path in output.iterdir()} - {"summary.csv"}
    assert left == {"case.nii.gz", "case_report.json", "mine.nii.gz"}


def test_the_longest_name_of_a_case_leaves_room_for_all_of_its_files(bundle, sites, tmp_path):
    endings = [ending for own in SAME.values() for ending in own]
    names = [REPORT, *output_names("", (1.0,), True, [".nii.gz", *endings])]
    assert 255 - max(map(len, names)) == MAX_NAME
    prediction = Predictor(bundle)(sites[0] / "case.nii.gz")
    with pytest.raises(ArgumentError, match=f"^{tmp_path}/out: expected a name of at most {MAX_NAME} bytes"):
        prediction.save(tmp_path / "out", "x" * (MAX_NAME + 10))
    written = prediction.save(tmp_path / "out", "x" * MAX_NAME)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in written)


@pytest.mark.parametrize("fault", ["long", "foreign", "another input"])
def test_a_single_file_whose_results_have_no_place_is_not_computed(bundle, sites, tmp_path, monkeypatch, capsys, fault):
    source, output = sites[0] / "case.nii.gz", tmp_path / "out"
    if fault == "another input":
        assert predict("-i", sites[1] / "case.nii.gz", "-o", output, "-m", bundle) == 0
    output.mkdir(exist_ok=True)
    if fault == "foreign":
        (output / "case_overlay.png").write_text("mine")
    if fault == "long":
        source = source.rename(source.with_name("x" * (MAX_NAME + 5) + ".nii.gz"))
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    monkeypatch.setattr(Predictor, "__call__", lambda *arguments: pytest.fail("it was computed"))
    assert predict("-i", source, "-o", output, "-m", bundle) == 2
    said = {
        "long": f"error: {output}: expected a name of at most {MAX_NAME} bytes",
        "foreign": f"error: {output / 'case_overlay.png'}: expected no file",
        "another input": f"error: {source}: {REFUSED} {sites[1] / 'case.nii.gz'}",
    }
    assert said[fault] in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
