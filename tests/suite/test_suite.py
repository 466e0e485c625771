"""Runs of the benchmark suite: files of results, processes, what happens when one dies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, machine, records, run
from benchmarks.contest import (
    too_short,
)  # fmt: skip

ROOT = Path(__file__).parents[2]


def test_names_of_files_name_the_machine(monkeypatch):
    monkeypatch.setattr(machine, "processor", lambda: "Some(R) Thing(TM) CPU @ 2.20GHz")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    assert machine.machine_name("cpu") == "some-thing-cpu-2-20ghz-2-cores"


def part_of(seconds: dict[str, list[float]], **info) -> dict:
    """What a process of the suite writes."""
    return {
        "datetime": "now",
        "benchmarks": [
            {
                "group": "a thing", "name": name, "extra_info": {"too_short": None, **info},
                "stats": {"data": times, "median": times[0], "rounds": len(times), "iterations": 2},
            }
            for name, times in seconds.items()
        ],
    }  # fmt: skip


def test_processes_of_a_run_are_joined():
    first = part_of({"ours": [0.1, 0.3], "wrong here": [0.1], "other": [0.2] * 10}, error=1e-7)
    joined = records.join([first, part_of({"other": [0.4] * 10, "ours": [0.2, 0.5], "wrong there": [1.0]})])
    ours, other = joined["benchmarks"]
    assert (ours["name"], other["name"]) == ("ours", "other")
    assert ours["stats"]["data"] == [0.1, 0.3, 0.2, 0.5]
    assert ours["stats"]["median"] == pytest.approx(0.25)
    assert (ours["stats"]["rounds"], ours["stats"]["iterations"]) == (4, 2)
    assert ours["extra_info"] == {
        "error": 1e-7, "too_short": None, "rounds_by_process": [2, 2],  # 2.2 s
        "absent": {"wrong here": "no time in process 2 of the run"},
    }  # fmt: skip
    assert other["extra_info"]["too_short"] is None
    short = records.join([part_of({"ours": [0.1]})])["benchmarks"][0]
    assert short["extra_info"]["too_short"] == too_short(1, 0.2)


@pytest.mark.parametrize(
    ("failing", "name"), [(None, "found.json"), (1, "found-failed.json"), (2, "found-failed.json")]
)
def test_results_get_their_name_when_they_are_whole(monkeypatch, tmp_path, failing, name):
    started = []

    def run_suite(command, check):
        options = dict(one.removeprefix("--").split("=") for one in command if "=" in one)
        started.append((options["part"], options["compiled"]))
        Path(options["benchmark-json"]).write_text(json.dumps(part_of({"ours": [float(len(started))]})))
        return subprocess.CompletedProcess(command, int(len(started) == failing))

    monkeypatch.setattr(run.subprocess, "run", run_suite)
    status, written = run.suite(tmp_path / "found.json", ["--quick"], 3)
    assert (status, written) == (int(failing is not None), tmp_path / name)
    count = failing or 3
    assert [part for part, _ in started] == ["1/3", "2/3", "3/3"][:count]
    assert len({compiled for _, compiled in started}) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    found = json.loads(written.read_text())
    assert found["benchmarks"][0]["stats"]["data"] == [1.0, 2.0, 3.0][:count]
    assert found["command"] == "python -m benchmarks.run --quick"


def test_no_results_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(run.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 2))
    with pytest.raises(RuntimeError, match=r"expected results in found\.json, got none: exit status 2"):
        run.suite(tmp_path / "found.json", [], 3)
    assert not list(tmp_path.iterdir())


def test_what_was_measured_before_a_process_died_is_kept(monkeypatch, tmp_path):
    def run_suite(command, check):
        (target,) = [one.partition("=")[2] for one in command if one.startswith("--benchmark-json=")]
        if "--part=2/3" in command:
            return subprocess.CompletedProcess(command, -9)
        Path(target).write_text(json.dumps(part_of({"ours": [0.1]})))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", run_suite)
    assert run.suite(tmp_path / "found.json", [], 3) == (-9, tmp_path / "found-failed.json")
    assert len(json.loads((tmp_path / "found-failed.json").read_text())["benchmarks"]) == 1


@pytest.mark.parametrize("more", [["--quick"], ["-k", "op1"]])
def test_a_part_of_the_suite_never_takes_the_name_of_the_whole(monkeypatch, capsys, more):
    monkeypatch.setattr(sys, "argv", ["run", *more])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert "-o: expected a file" in capsys.readouterr().err


def test_without_a_gpu_its_program_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "no GPU" in capsys.readouterr().err


SUITE = """
from benchmarks.contest import Contest, Contestant, Measured
import torch

class Told(Contest):
    def run(self, pace, check):
        assert check
        found = {name: Measured(name == "ours", 1e-6, error=0.0, first_call=0.5, repeats=3) for name in self.names}
        found["ours"].seconds = {"forward": [0.03, 0.01, 0.02]}
        found["reference"].seconds = {"forward": [0.06, 0.05, 0.04]}
        found["absent"].reason = "NotImplementedError: not here"
        return found

def contests(plan):
    return [Told("a thing", "2", "float32", ("forward",), ("ours", "reference", "absent"), dict, "reference", 2)]

def test_thing(compete):
    compete()
"""


def run_pytest(folder: Path, suite: str) -> subprocess.CompletedProcess:
    (folder / "conftest.py").write_text("from benchmarks.conftest import *\n")
    (folder / "test_suite.py").write_text(suite)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", "--quick",
            "--threads", "2", "--benchmark-json", "found.json",
        ],
        cwd=folder, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_a_contest_that_breaks_runs_once_and_fails_all_of_its_tests(tmp_path):
    breaks = 'def run(self, pace, check):\n        open("runs", "a").write("x")\n        raise MemoryError'
    breaking = SUITE.replace("def run(self, pace, check):", breaks)
    assert breaking != SUITE
    done = run_pytest(tmp_path, breaking)
    assert done.returncode == 1
    assert "3 failed" in done.stdout
    assert (tmp_path / "runs").read_text() == "x"


@pytest.mark.slow
def test_replayed_rounds_arrive_in_the_json(tmp_path):
    """In the order they were measured, with what the suite knows beside them and nothing that names the machine."""
    done = run_pytest(tmp_path, SUITE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 1 skipped" in done.stdout
    loaded = records.load(tmp_path / "found.json")
    ((group, found),) = loaded.groups.items()
    assert group == "a thing, 2, float32, forward, 2 threads"
    assert found["ours"].seconds == pytest.approx((0.03, 0.01, 0.02), rel=1e-12)
    assert found["reference"].seconds == pytest.approx((0.06, 0.05, 0.04), rel=1e-12)
    assert found["ours"].info["absent"] == {"absent": "NotImplementedError: not here"}
    assert found["ours"].info["first_call_seconds"] == 0.5
    assert found["ours"].info["too_short"] is not None
    assert loaded.quick
    text = (tmp_path / "found.json").read_text()
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    assert '"node"' not in text
