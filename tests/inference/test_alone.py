"""A case predicted by itself into a folder of results: tables and page of the folder follow."""

import csv

import numpy as np
import pytest
from commands import predict
from heads import SPACING, noise, write
from pages import block, read_page

from grcsf_fast.data.failures import read_failures
from grcsf_fast.data.reports import read_report
from grcsf_fast.runtime.precision import Choice

GRID = np.diag([*SPACING, 1.0])


def rows(path):
    with path.open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def statuses(page):
    return {case["name"]: case["status"] for case in block(read_page(page), "cases")}


@pytest.mark.parametrize("shares", [False, True])
def test_the_folder_follows(bundle, tmp_path, shares, capsys):
    scans, output = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for name in ("a", "c"):
        write(scans / f"{name}.nii.gz", noise(24, 24, 8), GRID)
    write(scans / "b.nii.gz", np.full((9, 9, 9), 7, np.int16), GRID)
    given = ("-o", output, "-m", bundle)
    for share in (("--share", "1/2"), ("--share", "2/2")) if shares else ((),):
        predict("-i", scans, *given, *share)
    before = rows(output / "summary.csv")
    assert {name: row["status"] for name, row in before.items()} == {"a": "done", "b": "failed", "c": "done"}
    write(scans / "b.nii.gz", noise(24, 24, 9), GRID)
    assert predict("-i", scans / "b.nii.gz", *given) == 0
    found = rows(output / "summary.csv")
    assert (found["b"]["status"], found["b"]["error"]) == ("done", "")
    assert found["b"]["lesion_count"].isdigit()
    assert float(found["b"]["segmentation"]) > 0
    assert {name: found[name] for name in "ac"} == {name: before[name] for name in "ac"}
    assert list(found["b"]) == list(before["b"])
    assert statuses(output / "index.html") == {"a": "done", "b": "done", "c": "done"}
    of_shares = [row for path in output.glob("summary.*-of-2.csv") for row in rows(path).values()]
    assert sorted(row["status"] for row in of_shares) == ["done"] * (3 if shares else 0)
    assert len({row["run"] for row in of_shares}) == int(shares)
    # And back, as its file breaks.
    write(scans / "a.nii.gz", np.full((9, 9, 9), 7, np.int16), GRID)
    assert predict("-i", scans / "a.nii.gz", *given) == 2
    assert "constant volume" in rows(output / "summary.csv")["a"]["error"]
    assert rows(output / "summary.csv")["a"]["lesion_count"] == ""
    assert set(read_failures(output)) == {"a"}
    assert statuses(output / "index.html") == {"a": "failed", "b": "done", "c": "done"}


def test_a_case_that_the_folder_does_not_have(bundle, tmp_path):
    scans, output = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for folder, name in ((scans, "a"), (tmp_path, "b")):
        write(folder / f"{name}.nii.gz", noise(24, 24, 8), GRID)
    given = ("-o", output, "-m", bundle)
    assert predict("-i", scans, *given, "--no-page") == 0
    before = (output / "summary.csv").read_bytes()
    assert predict("-i", tmp_path / "b.nii.gz", *given) == 0
    assert predict("-i", scans / "a.nii.gz", *given) == 0
    assert set(rows(output / "summary.csv")) == {"a"}
    assert before.splitlines()[0] == (output / "summary.csv").read_bytes().splitlines()[0]
    (output / "index.html").write_text("mine")
    for table in ("patient,age\na,70\n", "case,age\na,70\nb,60\n"):
        (output / "summary.csv").write_text(table)
        assert predict("-i", scans / "a.nii.gz", *given) == 0
        assert (output / "summary.csv").read_text() == table
    assert (output / "index.html").read_text() == "mine"


def test_a_case_by_itself_has_the_precision_of_the_folder(bundle, tmp_path, monkeypatch, capsys):
    """As a further run of the folder would; not with --overwrite, nor if it is asked for."""
    scans, output = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for name in ("a", "b", "c"):
        write(scans / f"{name}.nii.gz", noise(24, 24, 8), GRID)
    monkeypatch.setattr("grcsf_fast.runtime.precision.multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(
        "grcsf_fast.inference.model.measured_choice", lambda subject, run: Choice("float32", "by the test")
    )

    def precision(name, *further):
        assert predict("-i", scans / f"{name}.nii.gz", "-o", output, "-m", bundle, *further) == 0
        return read_report(output / f"{name}_report.json")["settings"]["precision"]

    assert precision("a", "--precision", "bfloat16") == "bfloat16"
    capsys.readouterr()
    assert precision("b") == "bfloat16"
    assert f"precision bfloat16: as in the results in {output}" in capsys.readouterr().out
    assert precision("b", "--precision", "float32") == "float32"
    assert precision("c", "--overwrite") == "float32"
    assert "precision float32: by the test" in capsys.readouterr().out
