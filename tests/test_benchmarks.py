"""The benchmark suite's own arithmetic: contests, replayed rounds, comparison and report, on made-up times."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compare, gpu, machine, records, report, run
from benchmarks.contest import (
    Contest,
    Contestant,
    Pace,
    ProcessorClock,
    largest_error,
    relative_error,
    too_short,
)  # fmt: skip

ROOT = Path(__file__).parents[1]
MACHINE = {
    "cpu": "a processor", "cores": 2, "threads": 2, "device": "cpu", "kernels": "built", "instruction_set": "avx2",
    "versions": {"torch": "2.13.0"}, "copy_bytes_per_second": 1e10, "float32_operations_per_second": 1e11,
    "bfloat16_operations_per_second": 4e11,
}  # fmt: skip
# Seconds of identical code, by group and contestant.
TIMES = {
    "op 1": {"cpp": 0.010, "reference": 0.040, "SDPA": 0.030},
    "op 2": {"cpp": 0.020, "reference": 0.090, "SDPA": 0.015},
}


def contest(log: list[str] | None = None, **calls) -> Contest:
    """Of calls that should give ones; each name is logged when it runs."""

    def entries():
        def build(name):
            def step():
                if log is not None:
                    log.append(name)
                return calls[name]()

            return [step]

        return {name: Contestant(lambda name=name: build(name), exact, 1e-6, ours=name == "ours") for name in calls}

    def exact():
        return [torch.ones(2, dtype=torch.float64)]

    return Contest("a thing", "2", "float32", ("forward",), tuple(calls), entries, "reference", threads=2)


def right():
    return [torch.ones(2)]


def fail_silently():
    raise MemoryError


def refuse():
    raise NotImplementedError("not on this device\nand more")


def test_wrong_and_raising_contestants_get_no_time():
    calls = {"ours": right, "wrong": lambda: [torch.full((2,), 1.1)], "raising": refuse, "silent": fail_silently}
    found = contest(**calls).run(Pace(3, 1e-3, 1e-4, 2))
    assert found["ours"].reason is None
    assert len(found["ours"].seconds["forward"]) >= 2
    assert found["wrong"].seconds == found["raising"].seconds == {}
    assert found["wrong"].reason.startswith("wrong by 5.0e-02")
    assert found["raising"].reason == "NotImplementedError: not on this device"
    assert found["silent"].reason == "MemoryError: "


@pytest.mark.parametrize("error", [largest_error, relative_error])
def test_nan_is_wrong_wherever_it_stands(error):
    whole, broken = torch.ones(2), torch.tensor([1.0, torch.nan])
    exact = [torch.ones(2, dtype=torch.float64)] * 2
    assert error([whole, whole], exact) == 0
    for results in ([whole, broken], [broken, whole]):
        assert not error(results, exact) <= 1


def test_nan_gets_no_time():
    assert contest(ours=lambda: [torch.full((2,), torch.nan)]).run(None)["ours"].reason is not None


def test_without_a_pace_nothing_is_timed():
    log = []
    found = contest(log, ours=right, reference=right).run(None)
    assert log == ["ours", "reference"]
    assert found["ours"].seconds == {}
    assert found["ours"].first_call > 0


def test_rounds_are_interleaved_and_begin_with_another_contestant_each_time():
    log = []
    # Blocks so short that a block is a call; rounds are what ends it.
    found = contest(log, a=right, b=right, c=right).run(Pace(4, 1e9, 1e-9, 4))
    rounds, memory = "".join(log[-15:-3]), "".join(log[-3:])
    assert (rounds, memory) == ("abcbcacababc", "abc")
    assert [len(one.seconds["forward"]) for one in found.values()] == [4, 4, 4]


def test_backward_is_the_last_step_of_a_call():
    def entries():
        return {"ours": Contestant(lambda: [lambda: 1, lambda value: right()], lambda: right(), 1e-6)}

    found = Contest("a", "b", "c", ("backward", "both"), ("ours",), entries, "ours", 2).run(Pace(3, 1e9, 0, 3))
    backward, both = (found["ours"].seconds[passed] for passed in ("backward", "both"))
    assert all(0 < part < whole for part, whole in zip(backward, both, strict=True))


def test_what_is_too_short_says_so():
    assert too_short(9, 0.9) == "fewer than 20 rounds and 1 s: 9 rounds, 0.90 s"
    assert too_short(10, 1.01) is None
    assert too_short(20, 0.02) is None


def test_processes_that_share_a_pace_have_enough_together():
    pace = Pace(rounds=20, seconds=1.0, least=3)
    for processes in (1, 3, 7):
        one = pace.shared(processes)
        assert processes * one.rounds >= 20
        assert processes * one.seconds >= 1 - 1e-9
        assert processes * one.least >= 3
    assert pace.shared(1) == pace


def test_turns_are_enough_short_and_many():
    pace = Pace(rounds=20, seconds=1.0, block=0.02, least=5)
    assert pace.turns({"ours": 0.001, "other": 0.002}, 0.004) == (20, {"ours": 4, "other": 4})
    rounds, repeats = replace(pace, least=2).turns({"ours": 0.01, "other": 2.0}, 0.0)
    assert rounds == 2
    assert repeats["other"] == 1
    assert rounds * repeats["ours"] * 0.01 > 1
    assert replace(pace, least=1).turns({"ours": 3.0}, 0.0) == (1, {"ours": 1})
    assert pace.shared(3).turns({"ours": 0.2, "other": 0.2}, 0.0) == (2, {"ours": 1, "other": 1})


def test_long_calls_are_one_a_turn_and_the_trial_counts():
    log = []
    long = replace(contest(log, a=right, b=right), long=True)
    found = long.run(Pace(4, 1e9, 1e-9, 3), check=False)
    assert log == [*"ab", *"ab", *"abba"]  # first calls, trial, two rounds
    assert [len(one.seconds["forward"]) for one in found.values()] == [3, 3]


def test_another_process_than_the_first_takes_times_alone():
    log = []
    found = contest(log, ours=right, other=refuse).run(Pace(4, 1e9, 1e-9, 4), check=False)
    assert len(found["ours"].seconds["forward"]) == 4
    assert found["ours"].error is found["ours"].peak_bytes is None
    assert found["other"].reason == "NotImplementedError: not on this device"
    assert log.count("ours") == 1 + 1 + 3 + 4  # first call, trial, again since it is short, rounds; none for memory


def test_the_relative_error_of_nothing_is_one():
    exact = [torch.randn(3), torch.randn(4)]
    assert relative_error([torch.zeros(3), torch.zeros(4)], exact) == pytest.approx(1)
    assert relative_error(exact, exact) == 0


def test_memory_that_earlier_calls_left_behind_counts_all_the_same():
    clock = ProcessorClock(cold=True)

    def call():
        return torch.ones(4 * 2**20).sum()

    call()
    grown, _ = clock.peak_growth([call])
    if grown is None:
        pytest.skip("no /proc")
    assert 16 * 2**20 <= grown + 2**18 <= 24 * 2**20


def test_cold_caches_are_outside_the_time():
    assert ProcessorClock(cold=False).flush is None
    clock = ProcessorClock(cold=True)
    assert clock.flush.nbytes >= 2**26
    assert clock.block([lambda: None], 5)[0] < ProcessorClock(cold=False).block([clock.flush.sum], 5)[0] / 10


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


def test_a_contest_that_breaks_runs_once_and_fails_all_of_its_tests(tmp_path):
    breaks = 'def run(self, pace, check):\n        open("runs", "a").write("x")\n        raise MemoryError'
    breaking = SUITE.replace("def run(self, pace, check):", breaks)
    assert breaking != SUITE
    done = run_pytest(tmp_path, breaking)
    assert done.returncode == 1
    assert "3 failed" in done.stdout
    assert (tmp_path / "runs").read_text() == "x"


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


def run_of(seed: int, noise: float = 0.02, factors: dict | None = None, processes: int = 3, **changes) -> records.Run:
    """A run with noise of its own, rounds that are slow for everybody, and contestants slowed down by a factor.

    ``noise`` is of the rounds and, half as much, of each process as a whole.
    """
    generator = np.random.default_rng(seed)
    groups = {}
    for group, times in TIMES.items():
        slow = generator.choice([1.0, 1.5], size=(processes, 7), p=[0.8, 0.2])
        groups[group] = {}
        for name, seconds in times.items():
            factor = (factors or {}).get((group, name), 1.0)
            own = noise * (generator.standard_normal((processes, 7)) + generator.standard_normal((processes, 1)) / 2)
            rounds = seconds * factor * slow * np.exp(own)
            info = {
                "ours": name == "cpp", "reference": "reference", "what": group, "shape": "8xC32x8x8",
                "dtype": "float32", "passed": "forward", "too_short": None, "scaling": None, "detail": {},
                "error": 1e-7, "peak_bytes": 2**20, "first_call_seconds": 0.5, "bytes": 1e8, "operations": 1e9,
                "floor_seconds": 0.009, "absent": {"FlexAttention": "not here"} if name == "cpp" else {},
            }  # fmt: skip
            groups[group][name] = records.Record(group, name, tuple(map(tuple, rounds.tolist())), info)
    return records.Run(
        groups,
        MACHINE | changes,
        {"id": "0123456789abcdef", "dirty": False},
        "2026-01-02T03:04:05",
        "make bench",
        False,
    )


@pytest.mark.parametrize("seed", range(8))
def test_identical_code_is_not_reported(seed):
    found, missing = compare.compare(run_of(2 * seed), run_of(2 * seed + 1))
    assert len(found) == 6
    assert not missing
    assert [one for one in found if one.paired and one.verdict] == []


@pytest.mark.parametrize("seed", range(8))
def test_a_slow_down_of_1_3_is_reported(seed):
    found, _ = compare.compare(run_of(2 * seed), run_of(2 * seed + 1, factors={("op 1", "cpp"): 1.3}))
    assert [(one.group, one.name) for one in found if one.verdict == "slower"] == [("op 1", "cpp")]
    (slower,) = [one for one in found if one.verdict]
    assert slower.relative == pytest.approx(1.3, rel=0.1)


def test_a_slow_machine_slows_both_sides_down():
    """Absolute times say so; relative ones do not."""
    slow = {(group, name): 1.3 for group, names in TIMES.items() for name in names}
    found, _ = compare.compare(run_of(0), run_of(1, factors=slow))
    ours = [one for one in found if one.ours]
    assert all(one.absolute > 1.1 and not one.verdict for one in ours)


def test_without_others_there_is_no_verdict():
    a, b = run_of(0), run_of(1, factors={("op 1", "cpp"): 3.0})
    for one in (a, b):
        del one.groups["op 2"], one.groups["op 1"]["SDPA"], one.groups["op 1"]["reference"]
    ((alone,), _) = compare.compare(a, b)
    assert alone.relative == pytest.approx(3, rel=0.5)
    assert alone.relative > alone.band
    assert (alone.paired, alone.verdict) == (False, "")


def test_groups_of_one_file_are_named():
    a, b = run_of(0), run_of(1)
    del a.groups["op 2"], b.groups["op 1"]["SDPA"]
    found, missing = compare.compare(a, b)
    assert {one.name for one in found} == {"cpp", "reference"}
    assert missing == [
        "only in A: op 1, SDPA", "only in B: op 2, cpp", "only in B: op 2, reference", "only in B: op 2, SDPA"
    ]  # fmt: skip


def test_noise_widens_the_band_and_processes_narrow_it():
    prior = compare.Prior(1e-4, 4.0)

    def band(variance=1e-4, freedom=4, counts=(3, 3), share=1e-3, prior=prior):
        return compare.band_of(variance, freedom, counts, prior, share)

    assert 1 < band() < band(variance=4e-4)
    assert band(freedom=10, counts=(6, 6)) < band()
    assert band() < band(share=1e-4)
    # Processes that say nothing leave what is known beforehand; with no freedom that is Student's distribution.
    assert np.log(band(freedom=0, counts=(1, 1))) == pytest.approx(8.6103 * (2e-4) ** 0.5, rel=1e-4)
    sure = compare.Prior(1e-4, np.inf)
    assert np.log(band(variance=1.0, prior=sure)) == pytest.approx(3.2905 * (2e-4 / 3) ** 0.5, rel=1e-4)


def test_identical_code_stays_inside_as_often_as_promised():
    """Whole comparisons, of which one in twenty may report something, where processes differ in heavy tails."""
    reported, runs = 0, 400
    generator = np.random.default_rng(0)
    prior = compare.Prior(0.03**2, 4.0)
    for seed in range(runs):
        spread = 0.03 * np.sqrt(4 / generator.chisquare(4))
        sides = [run_of(2 * seed + side, 1e-9) for side in range(2)]
        for side in sides:
            del side.groups["op 2"], side.groups["op 1"]["SDPA"]
            record = side.groups["op 1"]["cpp"]
            shifts = np.exp(spread * generator.standard_normal(3))
            moved = tuple(tuple(f * s for s in rounds) for f, rounds in zip(shifts, record.processes, strict=True))
            side.groups["op 1"]["cpp"] = records.Record("op 1", "cpp", moved, record.info)
        found, _ = compare.compare(*sides, (prior, prior))
        reported += any(one.verdict for one in found)
    assert 0 < reported / runs < 0.05


def test_what_rows_have_in_common_is_found():
    generator = np.random.default_rng(0)
    row = compare.compare(run_of(0), run_of(1))[0][0]
    true = 0.04**2 * 6 / generator.chisquare(6, size=4000)
    rows = [replace(row, freedom=4, variance=float(one)) for one in true * generator.chisquare(4, size=4000) / 4]
    prior = compare.prior_of(rows)
    assert prior.variance**0.5 == pytest.approx(0.04, rel=0.05)
    assert prior.freedom == pytest.approx(6, rel=0.2)
    same = [replace(row, freedom=4, variance=float(one)) for one in 1e-4 * np.linspace(0.9, 1.1, 50)]
    assert compare.prior_of(same).freedom == np.inf
    with pytest.raises(ValueError, match="several processes, got 0"):
        compare.prior_of([replace(row, freedom=0)])


def test_the_bad_day_of_another_contestant_does_not_count():
    """Also where it moves the others' median time."""
    a = np.log(np.array([[5.5], [36], [111], [26.5], [25.9]]) * np.ones((1, 4)))
    b = np.log(np.array([[5.5], [26], [152], [26.5], [25.9]]) * np.ones((1, 4)))
    for times in compare.relative_times(0, [1, 2, 3, 4], [[a, a, a], [a, b, a]]):
        assert times == pytest.approx(0, abs=0.03)


def store(path: Path, made: records.Run) -> Path:
    """As pytest-benchmark writes it."""
    benchmarks = [
        {
            "group": one.group, "name": one.name, "stats": {"data": one.seconds, "rounds": len(one.seconds)},
            "extra_info": one.info | {"rounds_by_process": [len(rounds) for rounds in one.processes]},
        }
        for group in made.groups.values()
        for one in group.values()
    ]  # fmt: skip
    data = {
        "benchmarks": benchmarks, "machine_info": made.machine, "commit_info": made.commit, "datetime": made.date,
        "command": made.command, "quick": made.quick,
    }  # fmt: skip
    path.write_text(json.dumps(data))
    return path


def test_the_program_compares_files(tmp_path, capsys):
    a = store(tmp_path / "a.json", run_of(0))
    same = store(tmp_path / "same.json", run_of(1))
    slower = store(tmp_path / "slower.json", run_of(1, factors={("op 2", "cpp"): 1.3}))
    peer = store(tmp_path / "peer.json", run_of(1, factors={("op 2", "SDPA"): 1.3}))
    assert compare.main([str(a), str(same)]) == 0
    assert "0 of ours slower" in capsys.readouterr().out
    assert compare.main([str(a), str(slower)]) == 1
    assert "1 of ours slower" in capsys.readouterr().out
    assert compare.main([str(a), str(peer)]) == 0
    assert "slower" in capsys.readouterr().out


@pytest.mark.parametrize(("key", "value"), [("cpu", "another"), ("threads", 1), ("device", "a GPU"), ("cores", 64)])
def test_other_machines_are_refused_unless_forced(tmp_path, capsys, key, value):
    a, b = store(tmp_path / "a.json", run_of(0)), store(tmp_path / "b.json", run_of(1, **{key: value}))
    assert compare.main([str(a), str(b)]) == 2
    assert f"{key}: {MACHINE[key]!r} and {value!r}" in capsys.readouterr().err
    assert compare.main([str(a), str(b), "--force"]) == 0


def test_another_file_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"benchmarks": [], "machine_info": {}}))
    with pytest.raises(ValueError, match=r"expected a result file of `make bench`.*'command'"):
        records.load(tmp_path / "a.json")


def test_what_cannot_be_compared_ends_with_2(tmp_path, capsys):
    """1 says that something is slower."""
    a = str(store(tmp_path / "a.json", run_of(0)))
    quick = str(store(tmp_path / "quick.json", replace(run_of(1), quick=True)))
    once = str(store(tmp_path / "once.json", run_of(1, processes=1)))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for arguments, message in (
        ([a, str(tmp_path / "none.json")], "none.json"),
        ([a, str(broken)], "Expecting"),
        ([a, quick], "quick: False and True"),
        ([once, once, "--measure"], "several processes, got 0"),
    ):
        assert compare.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_exponents_are_those_of_the_power_law():
    assert report.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_a_page_has_every_row_also_where_a_peer_is_ahead(tmp_path):
    made = run_of(0)
    for number, side in enumerate((64, 128)):
        record = made.groups["op 1"]["cpp"]
        info = record.info | {"scaling": ["image side", side]}
        made.groups[f"scaling {side}"] = {"cpp": records.Record("s", "cpp", ((0.1 * 4**number,) * 5,), info)}
    made.groups["op 2"]["cpp"].info["detail"] = {"shares_ms": {"convolutions": 3.0, "the rest": 1.0}}
    written = report.write(made, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    for group, times in TIMES.items():
        assert f"### {group}" in text
        assert text.count(f"| {group} |") == 1
        assert all(name in text.split(f"### {group}")[1] for name in times)
    rows = text.split("### op 2")[1].splitlines()
    (ahead,) = [row for row in rows if row.startswith("| SDPA |")]
    assert "ahead of ours" in ahead
    assert "SDPA, **ahead of ours**" in next(row for row in text.splitlines() if row.startswith("| op 2 |"))
    assert "| FlexAttention | - |" in text
    assert "| cpp | 100 ms | 400 ms | 2.00 |" in text
    for part in ("a processor", "2 cores", "2 threads", "torch 2.13.0", "0123456789ab", "2026-01-02", "make bench"):
        assert part in text
    pictures = {path.name for path in written[1:]}
    assert pictures == {
        "page-speedups.png", "page-roofline.png", "page-cost-image-side.png", "page-shares.png"
    }  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in written[1:])
    assert all(f"]({name})" in text for name in pictures)
