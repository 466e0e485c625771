"""What predict finds in a folder of results and did not write: it stays as it is, and is named."""

import json

import numpy as np
import pytest
from commands import predict
from heads import SPACING, noise, write

from grcsf_fast import Predictor
from grcsf_fast.data.reports import read_report
from grcsf_fast.errors import ArgumentError
from grcsf_fast.inference.record import Done, Failed
from grcsf_fast.inference.share import read_rows

GRID = np.diag([*SPACING, 1.0])
MINE = b"of somebody else"
# The heads of tables and pages of the first versions.
OLD_TABLE = "case,input,status,lesion_count,total_volume_ml,seconds,error\np1,/a,done,1,2,3,\n"
OLD_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="grcsf-fast">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'">
<title>Lesions found by grcsf-fast</title>
"""


@pytest.fixture
def scans(tmp_path):
    (tmp_path / "scans").mkdir()
    for number, name in enumerate(("p1", "p2")):
        write(tmp_path / "scans" / f"{name}.nii.gz", noise(24, 24, 8) + number, GRID)
    return tmp_path / "scans"


@pytest.fixture
def output(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    "name", ["p1.nii.gz", "p1_overlay.png", "p1_residual50.nii.gz", "p1_residual75.nii.gz", "p1_report.json"]
)
def test_a_file_of_a_case(bundle, scans, output, capsys, name, more):
    (output / name).write_bytes(MINE)
    assert predict("-i", scans, "-o", output, "-m", bundle, *more) == 1
    said = capsys.readouterr().err
    assert "1 of 2 cases failed" in said
    assert f"{output / name}: expected no file, or " in said
    assert (output / name).read_bytes() == MINE
    assert [path.name for path in output.glob("p1*")] == [name]
    assert (output / "p2.nii.gz").exists()
    assert predict("-i", scans / "p1.nii.gz", "-o", output, "-m", bundle, *more) == 2
    assert (output / name).read_bytes() == MINE
    # Once it is taken away.
    (output / name).unlink()
    assert predict("-i", scans, "-o", output, "-m", bundle) == 0


@pytest.mark.parametrize("report", [b"{}", b'{"outputs": {"p1.nii.gz": ""}}', b"[" * 100_000, b"\xff\xfe", b"[1]"])
def test_a_mask_beside_a_report_of_somebody_else(bundle, scans, output, report):
    (output / "p1.nii.gz").write_bytes(MINE)
    (output / "p1_report.json").write_bytes(report)
    found = {one.name: one for one in Predictor(bundle).predict_folder(scans, output)}
    assert isinstance(found["p2"], Done)
    assert isinstance(found["p1"], Failed)
    assert f"{output / 'p1_report.json'}: expected no file, or the report of a result, found" in found["p1"].error
    assert "unexpected" not in found["p1"].error
    assert (output / "p1.nii.gz").read_bytes() == MINE
    assert (output / "p1_report.json").read_bytes() == report


def test_a_file_that_the_report_does_not_name(bundle, scans, output):
    """Of a run without maps, into whose place somebody put one."""
    assert predict("-i", scans, "-o", output, "-m", bundle, "--no-maps") == 0
    (output / "p1_residual50.nii.gz").write_bytes(MINE)
    assert predict("-i", scans, "-o", output, "-m", bundle) == 1
    assert (output / "p1_residual50.nii.gz").read_bytes() == MINE
    assert (output / "p2_residual50.nii.gz").exists()


def test_a_damaged_report_of_ours(bundle, scans, output):
    """The table beside it says that the case was done, though of no report that is whole and somebody's."""
    assert predict("-i", scans, "-o", output, "-m", bundle) == 0
    report, mask = output / "p1_report.json", output / "p1.nii.gz"
    before = report.read_bytes(), mask.read_bytes()
    for content in (b"", before[0][:100], b"[" * 100_000):
        report.write_bytes(content)
        assert predict("-i", scans, "-o", output, "-m", bundle) == 0
        assert (report.read_bytes(), mask.read_bytes()) == before
    report.write_bytes(b"{}")
    assert predict("-i", scans, "-o", output, "-m", bundle) == 1
    assert (report.read_bytes(), mask.read_bytes()) == (b"{}", before[1])
    # As the case has failed, the table says nothing of what is in its place any more.
    report.write_bytes(b"{")
    assert predict("-i", scans, "-o", output, "-m", bundle) == 1
    assert mask.read_bytes() == before[1]


def test_a_link_to_nothing_is_somebodys(bundle, scans, output):
    (output / "p1_overlay.png").symlink_to("nothing.png")
    assert predict("-i", scans, "-o", output, "-m", bundle) == 1
    assert (output / "p1_overlay.png").is_symlink()


def test_a_report_of_the_first_version(bundle, scans, output):
    """It names no files, so those of the case are taken for its own."""
    old = {"case": "p1", "input": str(scans / "p1.nii.gz"), "lesion_count": 0, "lesions": []}
    (output / "p1_report.json").write_text(json.dumps(old))
    for name in ("p1.nii.gz", "p1_overlay.png"):
        (output / name).write_bytes(b"")
    assert predict("-i", scans, "-o", output, "-m", bundle) == 0
    assert "outputs" in read_report(output / "p1_report.json")


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--share", "1/1"]])
@pytest.mark.parametrize("name", ["summary.csv", "index.html"])
@pytest.mark.parametrize(
    "content",
    [MINE, b"", b"case,age\np1,70\n", b"case,input," + b"x" * 200_000, b"<title>Lesions found by grcsf-fast</title>"],
)
def test_a_table_or_a_page(bundle, scans, output, capsys, name, content, more):
    (output / name).write_bytes(content)
    assert predict("-i", scans, "-o", output, "-m", bundle, *more) == 2
    assert (
        f"error: {output / name}: expected no file, or one of an earlier prediction, found" in capsys.readouterr().err
    )
    assert [(path.name, path.read_bytes()) for path in output.iterdir()] == [(name, content)]


def test_a_page_that_no_run_writes_stays(bundle, scans, output):
    (output / "index.html").write_bytes(MINE)
    assert predict("-i", scans, "-o", output, "-m", bundle, "--no-page") == 0
    assert (output / "index.html").read_bytes() == MINE
    # Nor does one of a single file write it.
    assert predict("-i", scans / "p1.nii.gz", "-o", output, "-m", bundle) == 0
    assert (output / "index.html").read_bytes() == MINE


def test_tables_and_pages_of_earlier_versions(bundle, scans, output):
    (output / "summary.csv").write_text(OLD_TABLE)
    (output / "index.html").write_text(OLD_PAGE)
    assert predict("-i", scans, "-o", output, "-m", bundle) == 0
    assert set(read_rows(output / "summary.csv")) == {"p1", "p2"}
    assert "<h1>Lesions found</h1>" in (output / "index.html").read_text()
    # As a spreadsheet saved it.
    text = (output / "summary.csv").read_text()
    (output / "summary.csv").write_text(text, encoding="utf-8-sig")
    assert predict("-i", scans, "-o", output, "-m", bundle) == 0
    assert (output / "summary.csv").read_text().startswith("case,")


def test_tables_of_shares(bundle, scans, output, capsys):
    """One that is to be replaced is refused; others are neither removed nor put together with ours."""
    others = [output / "summary.2-of-2.csv", output / "summary.1-of-7.csv"]
    for path in others:
        path.write_bytes(b'"' + b"x" * 200_000)
    assert predict("-i", scans, "-o", output, "-m", bundle, "--share", "2/2") == 2
    assert f"{others[0]}: expected no file, or one of an earlier prediction" in capsys.readouterr().err
    assert predict("-i", scans, "-o", output, "-m", bundle, "--share", "1/2") == 0
    assert all(path.stat().st_size > 200_000 for path in others)
    assert not (output / "summary.csv").exists()


def test_a_table_with_a_field_that_is_too_long(bundle, scans, output):
    """It is ours by its head, and replaced whatever follows."""
    (output / "summary.csv").write_text(OLD_TABLE + 'p2,/b,failed,,,,"' + "x" * 200_000 + '"\n')
    with pytest.raises(ValueError, match=r"summary\.csv: expected a table of cases, could not read it: field larger"):
        read_rows(output / "summary.csv")
    assert predict("-i", scans / "p1.nii.gz", "-o", output, "-m", bundle) == 0
    assert predict("-i", scans, "-o", output, "-m", bundle) == 0
    assert set(read_rows(output / "summary.csv")) == {"p1", "p2"}


def test_only_files_of_the_case_are_stale(bundle, scans, output):
    """Whatever names a report lists."""
    assert predict("-i", scans, "-o", output, "-m", bundle) == 0
    report = output / "p1_report.json"
    kept = ["thesis.docx", "p2.nii.gz", "p1.docx", "p1_notes.nii.gz", "p1", "p2_overlay.png", "p1_residual5000.nii.gz"]
    gone = ["p1_residual10.nii.gz", "p1.nii", "p1.mha", "p1.hdr", "p1.img", "p1.nrrd"]
    for name in [*kept, *gone]:
        (output / name).write_bytes(MINE)
    (output / "sub").mkdir()
    text = json.loads(report.read_text())
    text["outputs"] |= dict.fromkeys([*kept, *gone, "sub", "../scans/p1.nii.gz", "..", ""], "0" * 64)
    report.write_text(json.dumps(text))
    Predictor(bundle)(scans / "p1.nii.gz").save(output, maps=False)
    assert all((output / name).read_bytes() == MINE for name in kept)
    assert not any((output / name).exists() for name in [*gone, "p1_residual50.nii.gz"])
    assert (output / "sub").is_dir()
    assert (scans / "p1.nii.gz").exists()


def test_the_input_is_never_stale(bundle, output):
    """A report beside it may list it as the mask of an earlier save."""
    path = write(output / "p1.nii", noise(24, 24, 8), GRID)
    before = path.read_bytes()
    old = {"case": "p1", "input": str(path), "lesion_count": 0, "outputs": {"p1.nii": ""}}
    (output / "p1_report.json").write_text(json.dumps(old))
    prediction = Predictor(bundle)(path)
    prediction.save(output)
    assert path.read_bytes() == before
    with pytest.raises(ArgumentError, match="replace the input"):
        prediction.save(output, mask_format="same")
