"""Texts of summary.csv that spreadsheets would take for formulas: they are texts there, and read as they were."""

import csv

import numpy as np
import pytest
from commands import predict
from heads import SPACING, noise, tiny_bundle, write

from grcsf_fast.data.reports import cell_of, text_of
from grcsf_fast.inference.share import read_rows, write_rows
from grcsf_fast.pretrained.bundle import save_bundle

GRID = np.diag([*SPACING, 1.0])
NAMES = ["=cmd|' !A0", "+1", "-1", "@SUM(A1)", "\ttab", "\rcr", "'=quoted", "''-twice", "'quoted", "plain"]
STARTS = ("=", "+", "-", "@", "\t", "\r")


def raw(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("text", [*NAMES, "", "'", "a=b", "=", "'-"])
def test_texts_come_back(text):
    cell = cell_of(text)
    assert text_of(cell) == text
    assert not cell.startswith(STARTS)
    assert (cell == text) == (text in ("", "'", "a=b", "plain", "'quoted"))


@pytest.mark.parametrize("value", [-3, -0.5, 1e-9, None, True])
def test_numbers_stay_numbers(value):
    assert cell_of(value) is value


def test_a_table_comes_back(tmp_path):
    path, columns = tmp_path / "t.csv", ("case", "input", "status", "=label_ml", "seconds", "remarks", "error", "run")
    rows = {
        name: {"input": name, "status": "done", "=label_ml": -1.5, "seconds": -2, "remarks": name, "error": "-3"}
        for name in NAMES
    }
    write_rows(path, columns, rows)
    assert not any(cell.startswith(STARTS) for row in raw(path) for cell in row if cell not in ("-1.5", "-2"))
    found = read_rows(path)
    expected = {
        name: {"case": name, **{key: str(value) for key, value in row.items()}, "run": ""} for name, row in rows.items()
    }
    assert found == expected
    # What was read is written as it was, numbers too.
    before = path.read_bytes()
    write_rows(path, columns, found)
    assert path.read_bytes() == before
    # A formula in the place of a figure, which another program wrote.
    found["+1"]["seconds"] = "=1+1"
    write_rows(path, columns, found)
    assert b",'=1+1," in path.read_bytes()


@pytest.mark.parametrize("shares", [False, True])
def test_cases_are_found_again(tmp_path, shares):
    scans, output = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    names = ["=1+1", "-1", "'=x", "plain"]
    for name in names:
        write(scans / f"{name}.nii.gz", noise(24, 24, 8), GRID)
    bundle = save_bundle(tiny_bundle(), tmp_path / "bundle")
    given = ("-o", output, "-m", bundle, "--no-overlay", "--no-maps")
    ways = (("--share", "1/2"), ("--share", "2/2")) if shares else ((),)
    for way in ways:
        assert predict("-i", scans, *given, *way) == 0
    assert {row[0] for row in raw(output / "summary.csv")[1:]} == {"'=1+1", "'-1", "''=x", "plain"}
    before = read_rows(output / "summary.csv")
    assert set(before) == set(names)
    assert {row["status"] for row in before.values()} == {"done"}
    # By itself, and once more.
    written = (output / "summary.csv").stat().st_mtime_ns
    assert predict(f"-i={scans / '=1+1.nii.gz'}", *given) == 0
    assert (output / "summary.csv").stat().st_mtime_ns > written
    assert set(read_rows(output / "summary.csv")) == set(names)
    for way in ways:
        assert predict("-i", scans, *given, *way) == 0
    after = read_rows(output / "summary.csv")
    assert {name: row["lesion_count"] for name, row in after.items()} == {
        name: row["lesion_count"] for name, row in before.items()
    }
