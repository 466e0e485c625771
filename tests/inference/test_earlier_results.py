"""Folders of results that more than one run has written to: what earlier runs did stays in table and page."""

import json
import os
import shutil

import numpy as np
import pytest
from commands import predict
from heads import SPACING, noise, write
from pages import block, read_page

from grcsf_fast.data.failures import read_failures
from grcsf_fast.inference import record
from grcsf_fast.inference.share import read_rows

GRID = np.diag([*SPACING, 1.0])


@pytest.fixture
def sites(tmp_path):
    """Two folders of two scans each."""
    for site in ("first", "second"):
        (tmp_path / site).mkdir()
        for number in (1, 2):
            write(tmp_path / site / f"{site}{number}.nii.gz", noise(24, 24, 7 + number), GRID)
    return tmp_path / "first", tmp_path / "second"


def on_page(output):
    return {case["name"]: case["status"] for case in block(read_page(output / "index.html"), "cases")}


def test_a_run_of_other_inputs_keeps_the_rows_of_earlier_ones(bundle, sites, tmp_path):
    first, second = sites
    output = tmp_path / "out"
    write(first / "flat.nii.gz", np.full((9, 9, 9), 7, np.int16), GRID)
    assert predict("-i", first, "-o", output, "-m", bundle) == 1
    before = read_rows(output / "summary.csv")
    # Reports of somebody else, and one under the name of another case.
    (output / "x_report.json").write_text('{"case": "x", "input": "x.nii", "lesion_count": 1, "outputs": {}}')
    (output / "y_report.json").write_text("[]")
    shutil.copy(output / "first1_report.json", output / "copy_report.json")
    assert predict("-i", second, "-o", output, "-m", bundle) == 0
    after = read_rows(output / "summary.csv")
    assert {name: row["status"] for name, row in after.items()} == {
        "flat": "failed", "first1": "done", "first2": "done", "second1": "done", "second2": "done",
    }  # fmt: skip
    assert {name: after[name] for name in before} == before
    assert on_page(output) == {name: row["status"] for name, row in after.items()}
    # What is in the folder no more is in the table no more.
    (output / "first1_report.json").unlink()
    assert predict("-i", second, "-o", output, "-m", bundle) == 0
    assert set(read_rows(output / "summary.csv")) == set(on_page(output)) == set(after) - {"first1"}


def test_shares_and_a_stopped_run_keep_them_too(bundle, sites, tmp_path, monkeypatch):
    first, second = sites
    output = tmp_path / "out"
    assert predict("-i", first, "-o", output, "-m", bundle) == 0
    before = read_rows(output / "summary.csv")

    def interrupted(*given, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("grcsf_fast.inference.folder.in_lanes", interrupted)
        assert predict("-i", second, "-o", output, "-m", bundle) == 130
    found = read_rows(output / "summary.csv")
    assert {name: found[name] for name in before} == before
    assert {name: found[name]["status"] for name in set(found) - set(before)} == {
        "second1": "missing",
        "second2": "missing",
    }
    for number in (1, 2):
        assert predict("-i", second, "-o", output, "-m", bundle, "--share", f"{number}/2") == 0
    found = read_rows(output / "summary.csv")
    assert {name: found[name] for name in before} == before
    assert {row["status"] for row in found.values()} == {"done"}
    assert len(found) == len(on_page(output)) == 4


@pytest.mark.parametrize("shares", [[()], [("--share", "1/2"), ("--share", "2/2")]])
def test_a_repetition_with_nothing_new_writes_neither_table_nor_page(bundle, sites, tmp_path, monkeypatch, shares):
    scans, output = sites[0], tmp_path / "out"
    write(scans / "flat.nii.gz", np.full((9, 9, 9), 7, np.int16), GRID)

    def repeat(*further):
        for share in shares:
            predict("-i", scans, "-o", output, "-m", bundle, *share, *further)

    repeat()
    written = [*output.glob("*.csv"), output / "index.html"]
    content = [path.read_bytes() for path in written]
    assert float(read_rows(output / "summary.csv")["first1"]["seconds"]) > 0
    for path in output.iterdir():
        os.utime(path, (1e9, 1e9))
    repeat()
    assert [path.read_bytes() for path in written] == content
    assert {path.stat().st_mtime for path in written} == {1e9}
    # A page that is older than the table, as an interrupted run leaves it, is written, the table is not.
    os.utime(output / "index.html", (1e8, 1e8))
    repeat()
    assert (output / "summary.csv").stat().st_mtime == 1e9
    assert (output / "index.html").stat().st_mtime > 1e9


def test_seconds_are_those_of_the_run_that_did_a_case(bundle, sites, tmp_path):
    """Beside a case more; not those of another result, nor of none."""
    scans, output = sites[0], tmp_path / "out"
    assert predict("-i", scans, "-o", output, "-m", bundle) == 0
    before = read_rows(output / "summary.csv")
    write(scans / "more.nii.gz", noise(24, 24, 9), GRID)
    report = json.loads((output / "first2_report.json").read_text())
    (output / "first2_report.json").write_text(json.dumps(report | {"lesion_count": 1 + report["lesion_count"]}))
    assert predict("-i", scans, "-o", output, "-m", bundle) == 0
    after = read_rows(output / "summary.csv")
    assert after["first1"] == before["first1"]
    assert float(after["more"]["seconds"]) > 0
    assert [after["first2"][key] for key in record.TIMES] == [""] * len(record.TIMES)
    (output / "summary.csv").unlink()
    assert predict("-i", scans, "-o", output, "-m", bundle) == 0
    assert read_rows(output / "summary.csv")["first1"] == before["first1"] | dict.fromkeys(record.TIMES, "")
    assert read_failures(output) == {}


def test_inputs_in_the_table_are_those_of_the_reports(bundle, sites, tmp_path, monkeypatch):
    """Whatever folder a run is in, and wherever its inputs went since; so that a repetition writes no table."""
    output = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    write(sites[0] / "flat.nii.gz", np.full((9, 9, 9), 7, np.int16), GRID)
    assert predict("-i", "first/first1.nii.gz", "-o", output, "-m", bundle) == 0
    assert predict("-i", "first", "-o", output, "-m", bundle) == 1
    before = read_rows(output / "summary.csv")
    assert {name: row["input"] for name, row in before.items()} == {
        name: str(sites[0] / f"{name}.nii.gz") for name in ("first1", "first2", "flat")
    }
    assert predict("-i", "second", "-o", output, "-m", bundle) == 0
    content = (output / "summary.csv").read_bytes()
    assert {name: read_rows(output / "summary.csv")[name] for name in before} == before
    shutil.move("second", "moved")
    for source, code in (("first", 1), ("moved", 0)):
        assert predict("-i", source, "-o", output, "-m", bundle) == code
        assert (output / "summary.csv").read_bytes() == content

    def interrupted(*given, **named):
        raise KeyboardInterrupt

    write(tmp_path / "moved" / "more.nii.gz", noise(24, 24, 9), GRID)
    monkeypatch.setattr("grcsf_fast.inference.folder.in_lanes", interrupted)
    assert predict("-i", "moved", "-o", output, "-m", bundle) == 130
    assert read_rows(output / "summary.csv")["more"]["input"] == str(tmp_path / "moved" / "more.nii.gz")


def odd_reports(report):
    """By what is odd; each of them passes for a report of this program's."""
    settings, lesions, texts = report["settings"], [{"volume_ml": 1.0}], [{"volume_ml": "1", "centroid_mm": [1, 1, 1]}]
    named = {"lesion": {"lesion_count": 1, "total_volume_ml": 1.0, "lesions": []}}
    unsettled = {key: value for key, value in settings.items() if key != "mae"}
    return {
        "settings": {"settings": None}, "autoencoder": {"settings": unsettled, "overlay_rows": None},
        "list": {"labels": ["lesion"]}, "none": {"labels": None}, "numbers": {"labels": named},
        "places": {"lesion_count": 1, "lesions": lesions}, "sizes": {"lesion_count": 1, "lesions": texts},
        "table": {"lesions": {}}, "rows": {"overlay_rows": [1]}, "told": {"remarks": 1},
        "hash": {"input_sha256": None, "outputs": {"\ud800": ""}},
    }  # fmt: skip


def test_reports_that_cannot_be_shown_are_left_out_and_left_alone(bundle, sites, tmp_path):
    """One of version 0.1 is shown, and one without remarks."""
    first, second = sites
    output = tmp_path / "out"
    assert predict("-i", first, "-o", output, "-m", bundle) == 0
    report = json.loads((output / "first1_report.json").read_text())
    (output / "first2_report.json").write_text(
        json.dumps(json.loads((output / "first2_report.json").read_text()) | {"remarks": None})
    )
    settings = dict(report["settings"])
    ratios = settings.pop("residual_maps")["mask_ratios"]
    changes = {"settings": settings | {"residual": {"ratios": ratios, "rounds": 1, "seed": 0}}}
    shutil.copy(output / "first1_overlay.png", output / "before_overlay.png")
    of_before = {key: value for key, value in report.items() if key not in ("overlay_rows", "remarks")}
    outputs = {"before_overlay.png": "", "before.nii.gz": ""}
    (output / "before_report.json").write_text(json.dumps(of_before | changes | {"case": "before", "outputs": outputs}))
    for name, changes in odd_reports(report).items():
        (output / f"{name}_report.json").write_text(json.dumps(report | {"case": name} | changes))
    there = {path: path.read_bytes() for path in output.glob("*_report.json")}
    assert predict("-i", second, "-o", output, "-m", bundle) == 0
    shown = ["before", "first1", "first2", "second1", "second2"]
    rows = read_rows(output / "summary.csv")
    assert sorted(rows) == sorted(on_page(output)) == shown
    (picture,) = [one["picture"] for one in block(read_page(output / "index.html"), "cases") if one["name"] == "before"]
    assert picture["below"] == [f"residual map, {100 * max(ratios):.0f} % masked"]
    # Nor does a row from before make one of it.
    with (output / "summary.csv").open("a") as file:
        file.write("settings,settings.nii.gz,done\n")
    (second / "second1.nii.gz").touch()
    assert predict("-i", second / "second1.nii.gz", "-o", output, "-m", bundle, "--overwrite") == 0
    assert on_page(output) == dict.fromkeys(shown, "done") | {"settings": "missing"}
    assert {path: path.read_bytes() for path in there} == there
