"""``make accuracy``: every variant sees the same and starts the same, runs are resumed, intervals are right."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.accuracy import __main__ as program
from benchmarks.accuracy import runs, tables, times, train, work
from benchmarks.accuracy.cases import BESIDE, MORE, TESTS, Size, case_path, evenly, load_cases, maps_path, shown
from benchmarks.accuracy.picture import draw
from benchmarks.accuracy.variants import PEERS, SETTINGS, VARIANTS
from grcsf_fast.datasets.cases import Case

TINY = Size(steps=1, train=2, test=1, more=1, batch_size=2, crop=(64, 64))
MAE = "1a2b3c4d"
# Networks of millions of parameters, built as their narrow namesakes are.
WIDE = {name for name in VARIANTS if "published" in name or "48" in name}
OURS = sorted(name for name, variant in VARIANTS.items() if variant.group != PEERS)


def cases(count: int = 2) -> list[Case]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        image = torch.randn(40, 36, 4, generator=generator)
        lesion = torch.zeros(40, 36, 4, dtype=torch.bool)
        lesion[10:20, 8:16, number % 4] = True
        maps = torch.randn(2, 40, 36, 4, generator=generator).half()
        found.append(Case(f"made_up_{number}", image, lesion, maps))
    return found


@pytest.fixture
def folder(tmp_path):
    """With the subjects of TINY."""
    for name, count in TINY.subjects().items():
        for index, case in enumerate(cases(count)):
            path, maps_at = case_path(tmp_path, name, index), maps_path(tmp_path, name, index, MAE)
            for one in (path, maps_at):
                one.parent.mkdir(exist_ok=True)
            save_file({"image": case.image, "lesion": case.lesion, "beside": beside(case)}, path)
            if name != MORE:
                save_file({"residual_maps": case.residual_maps}, maps_at)
    return tmp_path


def beside(case: Case) -> torch.Tensor:
    return case.image.expand(BESIDE, *case.image.shape).half().contiguous()


def as_shown(kind: str) -> list[Case]:
    return [shown(case, beside(case), kind, number) for number, case in enumerate(cases())]


def test_every_variant_sees_the_same_crops():
    size = Size(steps=3, batch_size=4, crop=(32, 32))
    kinds = ("none", "residual", "oracle", "beside", "beside, residual")
    seen = {kind: list(train.batches(as_shown(kind), 5, size)) for kind in kinds}
    channels = [batches[0].get("residual_maps", torch.empty(1, 0)).shape[1] for batches in seen.values()]
    assert channels == [0, 2, 2, BESIDE, BESIDE + 2]
    for other in kinds[1:]:
        for one, two in zip(seen["none"], seen[other], strict=True):
            assert torch.equal(one["image"], two["image"])
            assert torch.equal(one["lesion"], two["lesion"])
    assert not torch.equal(seen["none"][0]["image"], seen["none"][1]["image"])
    assert not torch.equal(seen["none"][0]["image"], next(train.batches(cases(), 6, size))["image"])


@pytest.mark.parametrize("name", OURS)
def test_ours_start_as_the_backbone(name):
    image, maps = torch.randn(2, 1, 32, 32), torch.randn(2, 2, 32, 32)
    if "beside" in VARIANTS[name].shown:
        maps = torch.cat([torch.randn(2, BESIDE, 32, 32), maps], 1)
    backbone, network = (train.built(VARIANTS[one], 7) for one in ("backbone", name))
    own = network.state_dict()
    different = {key for key, value in backbone.state_dict().items() if not torch.equal(own[key], value)}
    assert different == ({"encoder.0.0.weight"} if network.in_channels > 1 else set())
    if name == "GCU, scale":  # which multiplies from the start
        return
    with torch.no_grad():
        torch.testing.assert_close(network(image, maps), backbone(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - WIDE))
def test_a_variant_trains_and_is_tested(folder, name):
    result = train.run("many labels", name, 0, folder, TINY, MAE)
    assert result["subjects"] == 2 + VARIANTS[name].more
    assert result["mae"] == (MAE if VARIANTS[name].residual else None)
    assert {test: len(values) for test, values in result["dice"].items()} == dict.fromkeys(TESTS, 1)
    assert all(0 <= value <= 1 for values in result["dice"].values() for value in values)


@pytest.mark.parametrize("name", OURS)
def test_no_weight_is_idle(name):
    """What a form of a unit does not use is not counted among its parameters."""
    network, variant = train.built(VARIANTS[name], 0), VARIANTS[name]
    train.train(network, variant, as_shown(variant.shown), 0, Size(steps=3, batch_size=2, crop=(32, 32)))
    idle = {key for key, one in network.named_parameters() if one.requires_grad and one.grad is None}
    assert idle == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WIDE))
def test_a_published_network_gives_logits(name):
    network = train.built(VARIANTS[name], 0)
    logits, maps = network(torch.randn(2, 1, 50, 70), None, return_maps=True)
    assert logits.shape == (2, 1, 50, 70)
    assert not maps.patch_scores


def test_the_registry_holds_together():
    for name, variant in VARIANTS.items():
        assert set(variant.controls) <= set(VARIANTS) - {name}
        assert all(variant.settings() == VARIANTS[control].settings() or len(variant.settings()) == 1
                   for control in variant.controls)  # fmt: skip
    paths = {runs.run_path(program.Path(), run, MAE) for run in runs.wanted()}
    assert len(paths) == len(runs.wanted())


def test_few_labels_are_spread_over_all():
    assert evenly(range(32), 8) == list(range(2, 32, 4))
    assert evenly(range(32), 32) == list(range(32))
    assert evenly(range(4), 4) == list(range(4))


def test_the_oracle_knows_the_lesion_and_the_same_noise():
    one, two = (as_shown("oracle")[0] for _ in range(2))
    assert torch.equal(one.residual_maps, two.residual_maps)
    assert one.residual_maps.shape == (2, 40, 36, 4)
    inside = one.residual_maps[0].float()[one.lesion].mean() - one.residual_maps[0].float()[~one.lesion].mean()
    assert 0.4 < inside < 0.8


def result(variant: str, seed: int, dice: list[float], setting: str = "many labels") -> dict:
    return {
        "setting": setting, "variant": variant, "seed": seed, "steps": 400, "subjects": 32, "parameters": 400_000,
        "mae": None, "machine": "a machine", "versions": {"torch": "1"}, "dice": {"synthetic": dice},
    }  # fmt: skip


@pytest.fixture
def bundle(monkeypatch):
    """Stands for the demo's, whose hash names what is made with its maps."""

    class Demo:
        weights_sha256 = MAE * 8

    monkeypatch.setattr(program, "load_bundle", lambda name: Demo())


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys, bundle):
    called = []

    def in_processes(work, arguments, jobs):
        called.append((work.func, arguments, jobs))
        return {}

    monkeypatch.setattr(program, "in_processes", in_processes)
    arguments = ["accuracy", "--output", str(tmp_path), "--variants", "backbone", "GCU", "--seeds", "2"]
    arguments += ["--settings", "many labels"]
    monkeypatch.setattr("sys.argv", [*arguments, "--list"])
    assert program.main() == 0
    said = capsys.readouterr().out
    assert "4 of 4 runs are missing" in said
    assert said.count("many labels, ") == 4
    assert not called
    (folder,) = {program.Path(line.split(":")[0]) for line in said.splitlines() if line.startswith(str(tmp_path))}

    every = {"dice": {test: [0.5, 0.6] for test in TESTS}}
    runs.store(folder, runs.Run("many labels", "GCU", 1), MAE, result("GCU", 1, []) | every)
    runs.store(folder, runs.Run("many labels", "GCU", 0), MAE, result("GCU", 0, []) | {"dice": {}})  # not on every set
    monkeypatch.setattr("sys.argv", arguments)
    assert program.main() == 0
    (drawing, subjects, _), (making, made, jobs) = called
    assert (drawing, making, jobs) == (work.draw_one, work.make_one, 1)
    assert len(subjects) == sum(Size().subjects().values())
    assert [one for _, one in made] == [
        ("many labels", "backbone", 0), ("many labels", "GCU", 0), ("many labels", "backbone", 1)
    ]  # fmt: skip


def test_a_run_is_kept_with_the_machine_that_made_it(folder):
    one = runs.Run("many labels", "RCU", 0)
    work.make_one(folder, one, TINY, MAE, "cpu")
    assert runs.is_done(folder, one, MAE)
    assert not runs.is_done(folder, one, "another_")
    (found,) = runs.load_runs(folder, MAE)
    assert (found["variant"], found["seed"], found["mae"], found["subjects"]) == ("RCU", 0, MAE, 2)
    assert found["machine"]
    assert "torch" in found["versions"]


def test_another_autoencoder_makes_other_runs(tmp_path, folder):
    """Of those that are given its maps; the others stay."""
    for variant in ("RCU", "backbone"):
        mae = MAE if VARIANTS[variant].residual else None
        runs.store(tmp_path, runs.Run("many labels", variant, 0), MAE, result(variant, 0, [0.5]) | {"mae": mae})
    assert [one["variant"] for one in runs.load_runs(tmp_path, MAE)] == ["backbone", "RCU"]
    assert [one["variant"] for one in runs.load_runs(tmp_path, "another_")] == ["backbone"]
    load_cases(folder, "train", 2, "beside", "another_")
    with pytest.raises(FileNotFoundError, match="maps_another_"):
        load_cases(folder, "train", 2, "residual", "another_")


def quarter(numerator: int, denominator: int) -> None:
    assert numerator / denominator == 0.25


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_call_that_fails_loses_itself_alone():
    assert runs.in_processes(quarter, [(1, 4), (1, 0), (2, 8), (1, 2)], 2) == {
        1: "ZeroDivisionError: division by zero", 3: "AssertionError: ",
    }  # fmt: skip


@pytest.mark.slow
def test_a_killed_process_is_noticed():
    assert list(runs.in_processes(kill_itself, [()], 1)) == [0]


def test_every_variant_has_its_turn_to_be_timed(folder, monkeypatch):
    monkeypatch.setattr(times, "REPEATS", 1)
    monkeypatch.setattr(times, "maps_of", lambda image, kept, bundle: kept)
    drawn = cases()[0]
    monkeypatch.setitem(times.SUBJECTS, TESTS[0], lambda preprocessing, index, count: drawn)
    bundle = SimpleNamespace(weights_sha256=MAE * 8, preprocessing=None)
    found = times.measure(["backbone", "RCU"], folder, TINY, bundle)
    assert found.keys() == {"backbone", "RCU", times.MAPS}
    assert all(seconds >= 0 for one in found.values() for seconds in one.values())
    assert found["backbone"].keys() == {"a step", "a volume"}
    assert times.measure(["backbone"], folder, TINY, bundle).keys() == {"backbone"}


def test_a_difference_of_known_numbers():
    rng = np.random.default_rng(3)
    by_subject = rng.normal(0.05, 0.1, 48)
    control = rng.uniform(size=(8, 48))
    by_seed = np.array([0.03, -0.03] * 4)
    of = control + by_subject + by_seed[:, None]
    found = tables.difference(of, control)
    assert found.mean == pytest.approx(by_subject.mean())
    assert found.by_seed == pytest.approx(by_subject.mean() + by_seed)
    # Of the mean; a bootstrap of so many subjects and of these seeds is close to a normal distribution.
    error = (by_subject.var() / 48 + by_seed.var() / 8) ** 0.5
    assert (found.low, found.high) == pytest.approx(
        (found.mean - 1.96 * error, found.mean + 1.96 * error), abs=0.1 * error
    )
    same = tables.difference(control, control)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_tables_and_picture_come_from_results_alone(tmp_path):
    dice = {"backbone": [0.2, 0.4, 0.3], "GCU": [0.3, 0.5, 0.4], "RCU": [0.1, 0.9, 0.2]}
    results = tables.Results(
        [result(name, seed, values) for name, values in dice.items() for seed in range(2)]
        + [result("GCU", 2, [0.9, 0.9, 0.9])]
        + [result("DynUNet", 0, [0.2, 0.2, 0.2], "few labels")],
        {name: {"a step": 0.2, "a volume": 0.1} for name in dice} | {times.MAPS: {"a volume": 0.3}},
    )
    text = tables.page(results)
    assert "| GCU | backbone | +0.100 | +0.100 to +0.100 | ahead | +0.100, +0.100 |" in text  # seeds of both
    assert "| backbone | the U-shaped network without units | 2 | 0.300 (0.300) | 0.000 | 0.40 | 0.20 | 0.10 |" in text
    assert "| RCU | attention to residual maps | 2 | 0.400 (0.200) | 0.000 | 0.40 | 0.20 | 0.40 |" in text
    assert "| DynUNet | nnU-Net's network, of our widths | 1 | 0.200 (0.200) |  | 0.40 |  |  |" in text  # not timed
    assert "| RCU | RCU, blank maps |" not in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {setting.capitalize()}, test subjects: synthetic" for setting in SETTINGS
    ]
    draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
