"""Tables and summary of an evaluation on disk: texts that are formulas elsewhere, and files of somebody else."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.cli import main
from grcsf_fast.errors import ArgumentError
from grcsf_fast.evaluation.summary import check_results, read_labels, read_results, write_results

NAMES = ["=1+1", "-1", "+1", "@x", "\tx", "'=x", "plain"]


def raw(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_no_cell_is_a_formula(tmp_path):
    results = {name: {"dice": 0.5, "volume_difference_ml": -2.25} for name in NAMES}
    calcium = {name: {"agatston_true": 1.0, "category_true": "-mild"} for name in NAMES}
    by_label = {"=label": results, "core": results}
    write_results(tmp_path, results, {"cases": len(NAMES), "errors": {"=1+1": "x"}}, calcium, by_label)
    for name in ("cases.csv", "calcium.csv", "labels.csv"):
        for row in raw(tmp_path / name):
            assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for cell in row if cell != "-2.25")
    assert raw(tmp_path / "cases.csv")[1] == ["'=1+1", "0.5", "-2.25"]
    assert read_results(tmp_path) == (results, calcium, {"=1+1": "x"})
    assert read_labels(tmp_path) == by_label


def test_evaluate_finds_its_cases(tmp_path):
    for folder in ("predicted", "truth"):
        (tmp_path / folder).mkdir()
        for name in ("=1+1", "-1"):
            mask = np.zeros((6, 6, 6), np.uint8)
            mask[2:4, 2:4, 2:4] = 1
            nib.save(nib.Nifti1Image(mask, np.eye(4)), tmp_path / folder / f"{name}.nii.gz")
    given = ["-p", str(tmp_path / "predicted"), "-t", str(tmp_path / "truth"), "-o", str(tmp_path / "out")]
    for _ in range(2):
        assert main(["evaluate", *given]) == 0
    assert [row[0] for row in raw(tmp_path / "out" / "cases.csv")] == ["case", "'-1", "'=1+1"]
    assert set(read_results(tmp_path / "out")[0]) == {"=1+1", "-1"}


BAD = [
    ("summary.json", b"[" * 100_000),
    ("summary.json", b"[1]"),
    ("summary.json", b'{"cases": ' + b"9" * 5000 + b"}"),
    ("summary.json", b'{"cases": 1}\xff'),
    ("cases.csv", b"case,dice,missing\na," + b"x" * 200_000),
    ("cases.csv", b"name,dice\na,1\n"),
    ("cases.csv", b"case,dice\na\n"),
    ("labels.csv", b"case,dice\na,1\n"),
]


@pytest.mark.parametrize(("name", "content"), BAD)
def test_what_cannot_be_read_is_named(tmp_path, name, content):
    results = {"a": {"dice": 0.5}}
    write_results(tmp_path, results, {"cases": 1}, by_label={"core": results})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError) as caught:
        (read_labels if name == "labels.csv" else read_results)(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: expected what an evaluation wrote")


@pytest.mark.parametrize("name", ["summary.json", "cases.csv"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'"' + b"x" * 200_000, b"\xff\xfe", b"9" * 5000])
def test_what_cannot_be_read_is_somebody_elses(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match=f"{name}: expected no file, or one of an earlier evaluation"):
        check_results(tmp_path)


def test_what_a_spreadsheet_saved_is_ours(tmp_path):
    results = {"a": {"dice": 0.5, "missing": 0.0}}
    write_results(tmp_path, results, {"cases": 1, "errors": {"b": "é"}})
    for name in ("cases.csv", "summary.json"):
        path = tmp_path / name
        text = json.dumps(json.loads(path.read_text()), ensure_ascii=False) if name == "summary.json" else None
        path.write_text(text or path.read_text(), encoding="utf-8-sig")
    check_results(tmp_path)
    assert read_results(tmp_path) == (results, {}, {"b": "é"})


def test_means_of_small_animals_are_not_printed_as_0(tmp_path, capsys):
    """Of 12 voxels of 0.05 mm: 1.5e-6 mL."""
    mask = np.zeros((24, 24, 24), np.uint8)
    mask[2:4, 2:4, 2:5] = 1
    nib.save(nib.Nifti1Image(mask, np.diag([0.05, 0.05, 0.05, 1.0])), tmp_path / "a.nii.gz")
    assert main(["evaluate", "-p", str(tmp_path / "a.nii.gz"), "-t", str(tmp_path / "a.nii.gz")]) == 0
    printed = capsys.readouterr().out
    assert "truth_ml: mean 1.5e-06, sd -, median 1.5e-06, n 1" in printed
    assert "volume_difference_ml: mean 0.0000, sd -, median 0.0000, n 1" in printed
