"""Shares of a folder, each a run of its own, as the jobs of an array: one folder of results, one table of all."""

import csv
import json
import os

import numpy as np
import pytest
from commands import predict
from heads import SPACING, noise, tiny_bundle, write

from grcsf_fast import Predictor
from grcsf_fast.data.failures import read_failures
from grcsf_fast.data.reports import read_report, run_of
from grcsf_fast.errors import ArgumentError
from grcsf_fast.inference import record as records
from grcsf_fast.inference.plan import plan
from grcsf_fast.inference.share import Share, read_rows
from grcsf_fast.runtime.precision import Choice
from grcsf_fast.runtime.processes import World

GRID = np.diag([*SPACING, 1.0])
CASES = [f"case{number}" for number in range(5)]


@pytest.fixture
def scans(tmp_path):
    """Five good cases and a bad one, and a link to nothing."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in CASES:
        write(folder / f"{name}.nii.gz", noise(24, 24, 8), GRID)
    write(folder / "flat.nii.gz", np.full((9, 9, 9), 7, np.int16), GRID)
    (folder / "broken.nii.gz").symlink_to("nothing.nii.gz")
    return folder


def table(path):
    with path.open(newline="") as file:
        return {row["case"]: row["status"] for row in csv.DictReader(file)}


def test_every_case_is_in_one_share_whatever_the_others_are():
    names = [f"sub-{number:04}" for number in range(2000)]
    for of in (1, 7, 50):
        shares = [[name for name in names if Share(number, of).has(name)] for number in range(1, of + 1)]
        assert sorted(name for share in shares for name in share) == names
        assert max(map(len, shares)) < 2 * len(names) / of + 20
    some = names[::3]
    for number in (1, 2, 3):
        share = Share(number, 3)
        whole, part = (plan(dict.fromkeys(all_, "no file"), {}, World(), "", share).names for all_ in (names, some))
        assert set(part) == set(whole) & set(some)


def test_the_last_share_writes_the_table_and_the_page_of_all(bundle, scans, tmp_path, capsys):
    output = tmp_path / "out"
    statuses = dict.fromkeys(CASES, "done") | {"flat": "failed", "broken.nii.gz": "failed"}
    codes = []
    for number in (2, 3, 1):
        assert not (output / "summary.csv").exists()
        assert not (output / "index.html").exists()
        codes.append(predict("-i", scans, "-o", output, "-m", bundle, "--share", f"{number}/3"))
        own = table(output / f"summary.{number}-of-3.csv")
        if number != 1:
            failed = {path.name: path.read_text().count('"error"') for path in output.glob("failures*")}
            assert failed.get(f"failures.{number}-of-3.json", 0) == list(own.values()).count("failed")
            assert "failures.json" not in failed
        assert own == {name: status for name, status in statuses.items() if Share(number, 3).has(name)}
        assert codes[-1] == int("failed" in own.values())
    assert table(output / "summary.csv") == statuses
    page = (output / "index.html").read_text()
    assert all(name in page for name in statuses)
    assert set(read_failures(output)) == {"flat", "broken.nii.gz"}
    assert [path.name for path in output.glob("failures*")] == ["failures.json"]
    # Again, and in another number of shares, whose table is not put together with those from before.
    done = {path: path.read_bytes() for path in output.glob("case*")}
    for number in (1, 2):
        assert predict("-i", scans, "-o", output, "-m", bundle, "--share", f"{number}/2") in (0, 1)
    assert sorted(path.name for path in output.glob("summary.*-of-*.csv")) == [
        "summary.1-of-2.csv",
        "summary.2-of-2.csv",
    ]
    assert table(output / "summary.csv") == statuses
    assert {path: path.read_bytes() for path in output.glob("case*")} == done
    # As a run of all has it.
    assert predict("-i", scans, "-o", tmp_path / "whole", "-m", bundle) == 1
    assert table(tmp_path / "whole" / "summary.csv") == statuses
    for path, content in done.items():
        if not path.name.endswith("_report.json"):  # which has the place of its folder
            assert (tmp_path / "whole" / path.name).read_bytes() == content


@pytest.mark.slow
def test_an_array_that_is_repeated_writes_no_table_of_all_again(bundle, scans, tmp_path, monkeypatch):
    """Every share then finds the tables of all others; the page of thousands takes a while."""
    output, pages = tmp_path / "out", []
    real = records.write_folder_page
    monkeypatch.setattr(records, "write_folder_page", lambda *given: pages.append(given) or real(*given))
    written = [output / "summary.csv", output / "index.html"]

    def repeat(*further):
        """Long after what is there was written; returns how often the page was."""
        for path in output.iterdir():
            os.utime(path, (1e9, 1e9))
        before = len(pages)
        for number in (1, 2, 3):
            predict("-i", scans, "-o", output, "-m", bundle, "--share", f"{number}/3", *further)
        return len(pages) - before

    output.mkdir()
    assert repeat() == 1
    content = [path.read_bytes() for path in written]
    assert repeat() == 0
    assert [path.read_bytes() for path in written] == content
    assert {path.stat().st_mtime for path in written} == {1e9}
    assert repeat("--overwrite") == sum(any(map(Share(number, 3).has, CASES)) for number in (1, 2, 3)) > 1
    written[1].unlink()
    assert repeat("--no-page") == 0
    assert not written[1].exists()
    assert repeat() == 1
    # A case more is a row more, and one that cannot be used any more fails.
    write(scans / "more.nii.gz", noise(24, 24, 8), GRID)
    assert repeat() == 1
    write(scans / "case0.nii.gz", np.full((9, 9, 9), 7, np.int16), GRID)
    assert repeat() == 1
    assert table(written[0])["case0"] == "failed"
    assert repeat() == 0
    # The table of an interrupted run, which the page does not know.
    os.utime(written[1], (1e8, 1e8))
    before = len(pages)
    predict("-i", scans, "-o", output, "-m", bundle, "--share", "1/3")
    assert len(pages) == before + 1


@pytest.mark.parametrize("share", [[], ["--share", "1/2"]])
def test_a_run_that_is_interrupted_before_its_first_case(bundle, scans, tmp_path, monkeypatch, share):
    """Finished cases of these settings stay so in the tables, with their figures."""
    output = tmp_path / "out"
    predict("-i", scans, "-o", output, "-m", bundle, *share)
    name = "summary.1-of-2.csv" if share else "summary.csv"
    before = read_rows(output / name)

    def interrupted(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("grcsf_fast.inference.folder.in_lanes", interrupted)
    assert predict("-i", scans, "-o", output, "-m", bundle, *share) == 130
    after = read_rows(output / name)
    kept = ("status", "input", *records.FIGURES, "remarks")
    done = [case for case in CASES if case in before]
    assert len(done) > 1
    for case in done:
        assert [after[case][key] for key in kept] == [before[case][key] for key in kept]
    # Those of other settings are not results of this run.
    assert predict("-i", scans, "-o", output, "-m", bundle, "--importance-threshold", "0.9", *share) == 130
    assert {read_rows(output / name)[case]["status"] for case in done} == {"missing"}


def test_a_share_forgets_failures_of_its_own_cases_alone(bundle, scans, tmp_path):
    output = tmp_path / "out"
    assert predict("-i", scans, "-o", output, "-m", bundle) == 1
    (scans / "flat.nii.gz").unlink()
    (scans / "broken.nii.gz").unlink()
    for number in (1, 2, 3):
        before = set(read_failures(output))
        assert predict("-i", scans, "-o", output, "-m", bundle, "--share", f"{number}/3") == 0
        assert before - set(read_failures(output)) == {name for name in before if Share(number, 3).has(name)}
    assert not (output / "failures.json").exists()


def test_what_failed_in_other_shares_and_is_done_now(bundle, scans, tmp_path):
    """Of an array that was stopped before all of its shares had a table."""
    output = tmp_path / "out"
    for number in (1, 2):
        predict("-i", scans, "-o", output, "-m", bundle, "--share", f"{number}/3")
    (tmp_path / "out" / "failures.3-of-3.json").write_text(
        json.dumps({"flat": {"input": str(scans / "flat.nii.gz"), "error": "made by the test", "traceback": ""}})
    )
    write(scans / "flat.nii.gz", noise(24, 24, 8), GRID)
    (number,) = (number for number in (1, 2) if Share(number, 2).has("flat"))
    predict("-i", scans, "-o", output, "-m", bundle, "--share", f"{number}/2")
    assert "flat" not in read_failures(output)
    predict("-i", scans, "-o", output, "-m", bundle, "--share", f"{3 - number}/2")
    assert set(read_failures(output)) == {"broken.nii.gz"}
    assert table(output / "summary.csv") == dict.fromkeys([*CASES, "flat"], "done") | {"broken.nii.gz": "failed"}


def test_tables_of_another_array_of_jobs(bundle, scans, tmp_path):
    """Of other weights: they say nothing of this one's cases, and its last share puts all together."""
    output = tmp_path / "out"
    for number in (1, 2, 3):
        predict("-i", scans, "-o", output, "-m", bundle, "--share", f"{number}/3")
    before = (output / "summary.csv").read_bytes()
    for number in (1, 2, 3):
        arguments = ("--importance-threshold", "0.9", "--share", f"{number}/3")
        predict("-i", scans, "-o", output, "-m", bundle, *arguments)
        assert ((output / "summary.csv").read_bytes() == before) == (number < 3)
    assert set(table(output / "summary.csv")) == {*CASES, "flat", "broken.nii.gz"}
    assert "run" not in (output / "summary.csv").read_text().splitlines()[0].split(",")
    settings = read_report(output / "case0_report.json")["settings"]
    assert run_of(settings) == run_of(settings | {"precision": "bfloat16", "device": "cuda", "backend": "triton"})
    assert run_of(settings) != run_of(settings | {"weights_sha256": "0"})


def test_shares_keep_the_precision_that_the_folder_has(bundle, scans, tmp_path, monkeypatch, capsys):
    """On a node that would choose another."""
    output = tmp_path / "out"
    monkeypatch.setattr("grcsf_fast.runtime.precision.multiplies_bfloat16", lambda device: True)
    for chosen, number in (("bfloat16", 1), ("float32", 2)):
        monkeypatch.setattr(
            "grcsf_fast.inference.model.measured_choice",
            lambda subject, run, chosen=chosen: Choice(chosen, "by the test"),
        )
        predict("-i", scans, "-o", output, "-m", bundle, "--share", f"{number}/2")
        expected = "by the test" if number == 1 else f"as in the results in {output}"
        assert f"precision bfloat16: {expected}" in capsys.readouterr().out
    reports = [read_report(path) for path in output.glob("*_report.json")]
    assert {report["settings"]["precision"] for report in reports} == {"bfloat16"}
    assert len(reports) == len(CASES)


def test_a_share_without_cases(bundle, scans, tmp_path):
    number = next(number for number in range(1, 1000) if not any(Share(number, 999).has(name) for name in CASES))
    predictor = Predictor(tiny_bundle(), "cpu", precision="float32")
    assert list(predictor.predict_folder(scans, tmp_path / "out", share=f"{number}/999")) == []
    assert table(tmp_path / "out" / f"summary.{number}-of-999.csv") == {}


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/", "a/b", "-1/3", "1/0"])
def test_what_is_no_share(bundle, scans, tmp_path, capsys, text):
    with pytest.raises(ArgumentError, match="share: expected"):
        Share.parse(text)
    assert predict("-i", scans, "-o", tmp_path / "out", "-m", bundle, f"--share={text}") == 2
    assert "--share: expected" in capsys.readouterr().err


def test_one_volume_has_no_shares(bundle, scans, tmp_path, capsys):
    assert predict("-i", scans / "case0.nii.gz", "-o", tmp_path / "out", "-m", bundle, "--share", "1/3") == 2
    assert "--share: expected a folder or list" in capsys.readouterr().err
