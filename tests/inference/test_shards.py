"""What processes and nodes share: how cases are dealt out, which results are of one run, and who writes the tables."""

import csv
import json
from pathlib import Path

import pytest
from heads import tiny_bundle
from locks import locked

from grcsf_fast import Predictor
from grcsf_fast.data.reports import run_of
from grcsf_fast.inference import record
from grcsf_fast.inference.plan import Plan, shard
from grcsf_fast.inference.record import Failed, Record, note_alone
from grcsf_fast.runtime.processes import World


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_case_goes_to_one_process(size):
    sizes = {f"case{number}": 1000 * (number % 4) for number in range(11)}
    shares = [shard(sizes, World(rank, size)) for rank in range(size)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    for share in shares:
        assert [sizes[name] for name in share] == sorted((sizes[name] for name in share), reverse=True)


def test_a_large_case_counts_as_much_as_the_small_ones_of_another_process():
    sizes = {"large": 10000} | {f"small{number}": 1000 for number in range(10)}
    loads = [sum(sizes[name] for name in shard(sizes, World(rank, 2))) for rank in (0, 1)]
    assert loads == [10000, 10000]


@pytest.fixture(scope="module")
def settings():
    return Predictor(tiny_bundle(), "cpu", precision="float32").settings()


@pytest.mark.parametrize("name", ["precision", "batch_size", "compiled", "device", "backend", "tf32"])
def test_a_setting_in_which_nodes_may_differ(settings, name):
    assert name in settings or name == "tf32"  # which a GPU has alone
    assert run_of(settings) == run_of(settings | {name: "of another node"})


@pytest.mark.parametrize("name", ["weights_sha256", "probability_threshold", "hysteresis_threshold", "tta_flip"])
def test_a_setting_that_makes_another_run(settings, name):
    assert name in settings
    assert run_of(settings) != run_of(settings | {name: "of another run"})


def rows(path):
    with path.open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("size", [1, 2])
def test_a_result_of_other_settings_is_missing_in_an_interrupted_run(tmp_path, size):
    same = {"residual_maps": {}, "mae": None}
    found = {"input": "", "input_sha256": "", "lesion_count": 0, "total_volume_ml": 0.0, "lesions": [], "outputs": {}}
    for name, settings in (("same", same), ("other", same | {"x": 2})):
        (tmp_path / f"{name}_report.json").write_text(json.dumps(found | {"settings": settings}))
    cases = {name: Path(f"{name}.nii") for name in ("same", "other", "none")}
    Record(tmp_path, Plan(cases, {}, [*cases]), False, World(0, size), (), same).close()
    found = {name: (row["status"], row["lesion_count"]) for name, row in rows(tmp_path / "summary.csv").items()}
    assert found == {"same": ("done", "0"), "other": ("missing", ""), "none": ("missing", "")}


def test_a_case_by_itself_waits_for_the_folder(tmp_path, monkeypatch):
    """From reading a table up to its writing no other program changes it."""
    moments = []

    def watched(step):
        def run(*arguments):
            moments.append((step.__name__, locked(tmp_path)))
            return step(*arguments)

        return run

    for name in ("read_rows", "write_rows"):
        monkeypatch.setattr(record, name, watched(getattr(record, name)))
    (tmp_path / "summary.csv").write_text("case,input,status,error\na,a.nii,done,\nb,b.nii,done,\n")
    note_alone(tmp_path, Failed("a", "a.nii", "made by the test", ""), page=False)
    assert moments == [("read_rows", True), ("write_rows", True)]
    assert not locked(tmp_path)
    assert {name: row["error"] for name, row in rows(tmp_path / "summary.csv").items()} == {
        "a": "made by the test",
        "b": "",
    }
