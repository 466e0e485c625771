"""The precision that auto chooses: measured once, kept, shared, and never changed by noise."""

import json

import pytest
import torch
from heads import tiny_bundle

from grcsf_fast import Predictor
from grcsf_fast.runtime import precision
from grcsf_fast.runtime.precision import (
    Choice,
    choose_device,
    choose_precision,
    choose_training_precision,
    measured_choice,
    multiplies_bfloat16,
)

CPU = torch.device("cpu")
SUBJECT = {"kind": "test"}


@pytest.fixture(autouse=True)
def new_process(monkeypatch, tmp_path):
    """As a first run of a user finds it, on a processor that multiplies bfloat16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "_choices", {})
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)


class Speed:
    """A clock and a computation that takes by it what is said, with noise of the first times and of the load."""

    def __init__(self, monkeypatch, float32, bfloat16):
        self.now, self.calls = 0.0, []
        self.seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
        monkeypatch.setattr(precision, "perf_counter", lambda: self.now)

    def __call__(self, dtype):
        self.calls.append(dtype)
        noise = (10, 3, 1, 4)[min(self.calls.count(dtype) - 1, 3)]
        self.now += noise * self.seconds[dtype]


@pytest.mark.parametrize(
    ("float32", "bfloat16", "expected"),
    [(0.010, 0.006, "bfloat16"), (0.010, 0.012, "float32"), (0.0104, 0.010, "float32"), (0.0106, 0.010, "bfloat16")],
)
def test_bfloat16_must_be_clearly_faster(monkeypatch, float32, bfloat16, expected):
    choice = measured_choice(SUBJECT, Speed(monkeypatch, float32, bfloat16))
    assert choice.precision == expected
    assert choice.reason == f"bfloat16 was measured {float32 / bfloat16:.2f} times as fast as float32 here"


def test_both_take_turns_and_long_ones_few(monkeypatch):
    speed = Speed(monkeypatch, 0.001, 0.002)
    measured_choice(SUBJECT, speed)
    assert speed.calls == [torch.float32, torch.bfloat16] * (1 + precision.ROUNDS)
    slow = Speed(monkeypatch, 10.0, 20.0)
    measured_choice(SUBJECT | {"other": 1}, slow)
    assert len(slow.calls) == 4


def test_a_choice_is_measured_once(monkeypatch, tmp_path):
    """In this process, and, by the file in the cache folder, in all that follow."""
    first = measured_choice(SUBJECT, Speed(monkeypatch, 0.02, 0.01))
    again = Speed(monkeypatch, 0.01, 0.02)
    assert measured_choice(SUBJECT, again) == first
    monkeypatch.setattr(precision, "_choices", {})
    assert measured_choice(SUBJECT, again) == first
    assert again.calls == []
    (kept,) = (tmp_path / "cache" / "grcsf-fast" / "precision").iterdir()
    content = json.loads(kept.read_text())
    assert content["precision"] == "bfloat16"
    assert content["subject"] == SUBJECT
    assert content["versions"]["torch"] == torch.__version__
    # Another subject and another processor are other choices.
    assert measured_choice(SUBJECT | {"mae": None}, again).precision == "float32"
    monkeypatch.setattr(precision, "_processor", lambda: {"model": "another", "instructions": []})
    assert measured_choice(SUBJECT, again).precision == "float32"


def test_of_processes_that_measure_at_once_the_first_decides(monkeypatch):
    """Another one keeps its choice while this one measures."""
    speed = Speed(monkeypatch, 0.02, 0.01)

    def run(dtype):
        if not speed.calls:
            other = measured_choice(SUBJECT, Speed(monkeypatch, 0.01, 0.02))
            assert other.precision == "float32"
            monkeypatch.setattr(precision, "_choices", {})
            monkeypatch.setattr(precision, "perf_counter", lambda: speed.now)
        speed(dtype)

    assert measured_choice(SUBJECT, run).precision == "float32"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"precision": "float8", "bfloat16_times_as_fast": 2}', "null"])
def test_a_damaged_file_is_measured_again(monkeypatch, tmp_path, content):
    measured_choice(SUBJECT, Speed(monkeypatch, 0.01, 0.02))
    (kept,) = (tmp_path / "cache" / "grcsf-fast" / "precision").iterdir()
    kept.write_text(content)
    monkeypatch.setattr(precision, "_choices", {})
    assert measured_choice(SUBJECT, Speed(monkeypatch, 0.02, 0.01)).precision == "bfloat16"
    assert json.loads(kept.read_text())["precision"] == "bfloat16"


@pytest.mark.parametrize(("bfloat16", "expected"), [(0.009, "float32"), (0.006, "bfloat16")])
def test_what_cannot_be_kept_must_be_beyond_noise(monkeypatch, tmp_path, bfloat16, expected):
    """A home that cannot be written: each run measures anew, and all of them should choose alike."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    choice = measured_choice(SUBJECT, Speed(monkeypatch, 0.010, bfloat16))
    assert choice.precision == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(precision, "_choices", {})
    assert measured_choice(SUBJECT, Speed(monkeypatch, 0.010, bfloat16)).precision == expected


def test_a_file_system_without_links(monkeypatch):
    def link(*arguments):
        raise PermissionError

    monkeypatch.setattr("os.link", link)
    assert measured_choice(SUBJECT, Speed(monkeypatch, 0.0106, 0.01)).precision == "bfloat16"
    monkeypatch.setattr(precision, "_choices", {})
    assert measured_choice(SUBJECT, Speed(monkeypatch, 0.01, 0.02)).precision == "bfloat16"


def test_one_thread_measures_and_the_others_come_back(monkeypatch):
    torch.set_num_threads(2)
    seen = set()
    measured_choice(SUBJECT, lambda dtype: seen.add(torch.get_num_threads()))
    assert seen == {1}
    assert torch.get_num_threads() == 2


def test_nothing_is_measured_where_nothing_is_to_choose(monkeypatch):
    def measure():
        raise AssertionError

    assert choose_precision("float32", CPU, measure).precision == "float32"
    assert choose_precision("auto", torch.device("cuda"), measure).precision == "bfloat16"
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: False)
    assert choose_precision("auto", CPU, measure).precision == "float32"


@pytest.mark.parametrize(
    ("capability", "instructions", "expected"),
    [("AVX512", ["avx512_bf16"], True), ("AVX512", [], False), ("AVX2", ["avx512_bf16"], False)],
)
def test_instructions_for_bfloat16(monkeypatch, capability, instructions, expected):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr(precision, "_processor", lambda: {"model": "", "instructions": instructions})
    assert multiplies_bfloat16(CPU) == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_predictor_measures_its_own_networks(monkeypatch, name):
    """Both precisions run, through the autoencoder too, and the choice is the predictor's."""
    seen = []

    def measure(subject, run):
        for dtype in (torch.float32, torch.bfloat16):
            run(dtype)
        seen.append(subject)
        return Choice(name, "made by the test")

    monkeypatch.setattr("grcsf_fast.inference.model.measured_choice", measure)
    for bundle in (tiny_bundle(), tiny_bundle(rcu_levels=())):
        predictor = Predictor(bundle, "cpu")
        assert (predictor.precision, predictor.precision_reason) == (name, "made by the test")
        assert predictor.network.dtype == getattr(torch, name)
        assert predictor.settings()["precision"] == name
    assert [subject["mae"] is None for subject in seen] == [False, True]
    assert seen[0]["image"] == (8, 1, 96, 96)
    Predictor(tiny_bundle(), "cpu", precision="float32")
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_training_measures_forwards_and_backwards(monkeypatch, name):
    layer, autocast = torch.nn.Linear(3, 3), []

    def measure(subject, run):
        run(torch.bfloat16)
        run(torch.float32)
        return Choice(name, "made by the test")

    def trial():
        found = layer(torch.ones(1, 3))
        autocast.append(found.dtype)
        return found.float().sum()

    monkeypatch.setattr(precision, "measured_choice", measure)
    assert choose_training_precision("auto", CPU, layer, trial) == Choice(name, "made by the test")
    assert autocast == [torch.bfloat16, torch.float32]
    assert layer.weight.grad is None
    assert choose_training_precision("float32", CPU, layer, trial) == Choice("float32", "as asked for")


@pytest.fixture
def two_gpus(monkeypatch):
    """The second one, which is newer, is the current one of this thread."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 5), (8, 0)][device.index])


def test_the_current_gpu_is_meant_by_its_number(two_gpus):
    """Lanes and their driver are threads of their own, whose current one is the first."""
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)


def test_bfloat16_is_that_of_the_gpu_which_computes(two_gpus):
    assert [multiplies_bfloat16(torch.device("cuda", number)) for number in range(2)] == [False, True]
