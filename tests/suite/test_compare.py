"""Comparison of two runs of the suite and its report, on made-up times."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare, records, report

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
