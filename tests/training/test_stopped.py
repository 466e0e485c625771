"""Trainings that are stopped, fail or go on differently: nothing is lost, and nothing changes in silence."""

import json
import os
import re
import signal
import threading

import pytest
import torch
from pairs import write_case
from safetensors.torch import save_file
from trainings import (
    PREPROCESSING,
    SETTINGS,
    Kept,
    assert_same,
    at_call,
    rows,
    run,
    tiny_mae,
    tiny_network,
    training_run,
    weights,
)

from grcsf_fast.cli import program
from grcsf_fast.data.volumes import Preprocessing, VolumeError
from grcsf_fast.datasets.pairs import FolderSource
from grcsf_fast.errors import Interrupted, UnfinishedError
from grcsf_fast.training import autoencoder, checkpoint, network, sampling
from grcsf_fast.training import loop as training_loop
from grcsf_fast.training.autoencoder import train_mae
from grcsf_fast.training.checkpoint import TrainError
from grcsf_fast.training.settings import TrainSettings
from grcsf_fast.training.synthetic import SyntheticSource

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
MODULES = {"mae": autoencoder, "network": network}


@pytest.fixture(autouse=True)
def no_signal_gets_through():
    """One that a training does not handle fails the test, where it would end the test run."""

    def unhandled(number, frame):
        raise AssertionError(f"signal {number} was not handled")

    before = {name: signal.signal(signal.Signals[name], unhandled) for name in SIGNALS}
    yield
    for name, handler in before.items():
        assert signal.signal(signal.Signals[name], handler) is unhandled


def send(name):
    os.kill(os.getpid(), signal.Signals[name])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """kind -> weights of six steps at once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {kind: weights(run(kind, folder / kind)) for kind in ("mae", "network")}


@pytest.mark.parametrize("kind", [pytest.param("mae", marks=pytest.mark.slow), "network"])
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_saves_after_the_running_step(tmp_path, monkeypatch, undisturbed, kind, name):
    """In the fifth of six steps, with a checkpoint after the third."""
    with monkeypatch.context() as patch:
        at_call(patch, MODULES[kind], "sample_crops", 5, lambda: send(name))
        with pytest.raises(Interrupted) as caught:
            run(kind, tmp_path)
    assert caught.value.number == signal.Signals[name]
    assert str(caught.value) == (
        "stopped after step 5 of 6; step 5 is saved, and the same command with --resume goes on from there"
    )
    assert [row["step"] for row in rows(tmp_path)] == list("12345")
    assert not (tmp_path / "bundle").exists()
    taken = []
    at_call(monkeypatch, MODULES[kind], "sample_crops", 1, lambda: taken.append(5))
    assert_same(undisturbed[kind], weights(run(kind, tmp_path, resume=True)))
    assert taken == [5]
    assert [row["step"] for row in rows(tmp_path)] == list("123456")


def test_a_second_signal_gives_up_the_running_step(tmp_path, monkeypatch, undisturbed):
    def twice():
        send("SIGINT")
        send("SIGINT")

    with monkeypatch.context() as patch:
        at_call(patch, autoencoder, "sample_crops", 5, twice)
        with pytest.raises(Interrupted, match="stopped after step 4 of 6; step 4 is saved"):
            run("mae", tmp_path)
    assert_same(undisturbed["mae"], weights(run("mae", tmp_path, resume=True)))


def test_signals_while_saving_leave_a_whole_checkpoint(tmp_path, monkeypatch, undisturbed):
    """Three of them, with the file written and not yet renamed."""

    def thrice():
        for name in ("SIGTERM", "SIGTERM", "SIGINT"):
            send(name)

    with monkeypatch.context() as patch:
        at_call(patch, checkpoint, "allow_reading", 1, thrice)
        with pytest.raises(Interrupted, match="stopped after step 3 of 6; step 3 is saved") as caught:
            run("mae", tmp_path)
    assert caught.value.number == signal.SIGTERM
    assert not list(tmp_path.glob(".partial-*"))
    assert_same(undisturbed["mae"], weights(run("mae", tmp_path, resume=True)))


def test_a_signal_before_the_first_step(tmp_path, monkeypatch):
    """While cases are prepared, which may take minutes: the next one is not begun."""

    class Slow(Kept):
        read = ()

        def __getitem__(self, index):
            self.read = (*self.read, index)
            if len(self.read) == 2:
                send("SIGTERM")
            return super().__getitem__(index)

    source = Slow()
    with pytest.raises(Interrupted, match=r"^stopped after step 0 of 6; nothing is saved$"):
        run("mae", tmp_path, source=source)
    assert source.read == (0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv"]


def test_a_signal_as_the_log_is_opened(tmp_path, monkeypatch):
    """Nothing of the training stays that would be in the way of the next one."""
    at_call(monkeypatch, training_loop, "TrainingLog", 1, lambda: send("SIGTERM"))
    with pytest.raises(Interrupted, match=r"^stopped after step 0 of 6; nothing is saved$"):
        run("mae", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv"]


def test_a_signal_in_a_validation(tmp_path, monkeypatch):
    plain = weights(run("network", tmp_path / "plain"))
    validation = [Kept()[50], Kept()[51], Kept()[52]]
    seen = []
    with monkeypatch.context() as patch:
        at_call(patch, network, "_dice", 2, lambda: (seen.append(1), send("SIGINT")))
        with pytest.raises(Interrupted, match="stopped after step 3 of 6; step 3 is saved"):
            run("network", tmp_path / "stopped", validation=validation)
    assert seen == [1]
    assert rows(tmp_path / "stopped")[-1]["step"] == "3"
    assert_same(plain, weights(run("network", tmp_path / "stopped", validation=validation, resume=True)))


def test_signals_that_are_ignored_stay_so(tmp_path, monkeypatch):
    """As nohup and a shell's background jobs have them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_call(monkeypatch, autoencoder, "sample_crops", 1, lambda: send("SIGHUP"))
        run("mae", tmp_path, steps=2)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "bundle").is_dir()


def test_a_training_in_another_thread(tmp_path, undisturbed):
    """Python allows no handlers there."""
    found = []
    thread = threading.Thread(target=lambda: found.append(weights(run("mae", tmp_path))))
    thread.start()
    thread.join()
    assert_same(undisturbed["mae"], found[0])


def test_checkpoints_by_time(tmp_path, monkeypatch):
    """A step takes a minute by this clock: with 2.5 minutes at most a checkpoint every third step, and the last."""
    minutes, saved = [0], []
    monkeypatch.setattr(training_loop, "monotonic", lambda: 60.0 * minutes[0])
    sample, save = sampling.sample_crops, checkpoint.Checkpoint.save

    def minute(*arguments):
        minutes[0] += 1
        return sample(*arguments)

    def noted(self, step, precision):
        saved.append(step)
        save(self, step, precision)

    monkeypatch.setattr(autoencoder, "sample_crops", minute)
    monkeypatch.setattr(checkpoint.Checkpoint, "save", noted)
    run("mae", tmp_path / "a", steps=8, validate_every=100, checkpoint_minutes=2.5)
    assert saved == [3, 6, 8]
    saved.clear()
    run("mae", tmp_path / "b", steps=8, validate_every=100)
    assert saved == [8]
    saved.clear()
    # Those of a validation count.
    run("mae", tmp_path / "c", steps=8, validate_every=4, checkpoint_minutes=2.5)
    assert saved == [3, 4, 7, 8]


class Failing(Kept):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def __getitem__(self, index):
        if index == 4 and self.error:  # wanted from step 4 on
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("error", [VolumeError("bad.nii: made by the test"), OSError(28, "No space left on device")])
def test_an_error_on_the_way_saves_what_was_done(tmp_path, undisturbed, error):
    with pytest.raises(UnfinishedError) as caught:
        run("mae", tmp_path, source=Failing(error))
    assert str(caught.value) == (
        f"{error}\nstopped after step 4 of 6; step 4 is saved, and the same command with --resume goes on from there"
    )
    assert_same(undisturbed["mae"], weights(run("mae", tmp_path, source=Failing(None), resume=True)))


def test_an_error_at_once_is_bad_input(tmp_path):
    class Bad(Kept):
        def __getitem__(self, index):
            raise VolumeError("bad.nii: made by the test")

    with pytest.raises(VolumeError, match=r"^bad\.nii: made by the test$"):
        run("mae", tmp_path, source=Bad())


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")]
)
def test_want_of_memory_on_the_way_is_no_bad_input(tmp_path, capsys, error):
    """Exit code 1, and what is saved is said."""
    with pytest.raises(UnfinishedError, match=r"^not enough memory.*\nstopped after step 4 of 6; step 4 is") as caught:
        run("mae", tmp_path, source=Failing(error))
    assert program._failed(caught.value) == 1
    assert "step 4 is saved, and the same command with --resume goes on" in capsys.readouterr().err
    assert program._failed(error) == 2
    assert "not enough memory, try a smaller --batch-size" in capsys.readouterr().err


def test_a_bug_on_the_way_keeps_its_class_and_says_what_is_saved(tmp_path):
    with pytest.raises(ZeroDivisionError) as caught:
        run("mae", tmp_path, source=Failing(ZeroDivisionError()))
    assert "step 4 is saved" in caught.value.__notes__[0]


def test_a_training_that_diverges_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    real = sampling.sample_crops

    def poisoned(*arguments):
        batch = real(*arguments)
        if len(rows(tmp_path)) == 4:
            batch["image"][:] = float("nan")
        return batch

    monkeypatch.setattr(autoencoder, "sample_crops", poisoned)
    with pytest.raises(UnfinishedError, match=r"step 4: the gradient is not .*\n.*step 3 is saved.*so begin anew with"):
        run("mae", tmp_path)


@pytest.mark.parametrize("changes", [{"log_every": 2}, {"validate_every": 2}, {"checkpoint_minutes": 1.0}])
def test_settings_that_change_no_step_may_change(tmp_path, monkeypatch, undisturbed, changes):
    with monkeypatch.context() as patch:
        at_call(patch, autoencoder, "sample_crops", 5, lambda: send("SIGTERM"))
        with pytest.raises(Interrupted):
            run("mae", tmp_path)
    assert_same(undisturbed["mae"], weights(run("mae", tmp_path, resume=True, **changes)))


def test_resume_with_more_steps(tmp_path, capsys):
    """The schedule of the larger number holds from there on, and a line says so."""
    run("mae", tmp_path, log_every=1)
    assert "--steps" not in capsys.readouterr().out
    run("mae", tmp_path, resume=True, steps=10)
    assert (
        "--steps 10, begun with 6: from step 6 on the learning rate follows the schedule of 10 steps"
        in capsys.readouterr().out
    )
    settings = TrainSettings(**SETTINGS | {"steps": 10})
    expected = [settings.learning_rate * training_loop._schedule(step, settings) for step in range(6, 10)]
    assert [float(row["learning_rate"]) for row in rows(tmp_path)[6:]] == pytest.approx(expected, rel=1e-5)
    assert [row["step"] for row in rows(tmp_path)] == [str(step) for step in range(1, 11)]


def test_resume_with_fewer_steps_than_done(tmp_path):
    run("mae", tmp_path)
    with pytest.raises(TrainError, match="steps: the checkpoint has done 6, now 5"):
        run("mae", tmp_path, resume=True, steps=5)


def lines(error):
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_differences_are_named_one_by_one(tmp_path):
    run("mae", tmp_path, steps=1)
    with pytest.raises(TrainError) as caught:
        run("mae", tmp_path, resume=True, steps=2, learning_rate=1e-3, crop_size=(20, 20), seed=3)
    assert str(caught.value).startswith(
        f"{tmp_path / 'checkpoint.safetensors'}: expected to go on with the same training; only --steps, --log-every, "
        "--validate-every, --checkpoint-minutes, --workers and --threads may differ"
    )
    assert lines(caught) == [
        "crop_size: the checkpoint has [16, 16], now [20, 20]",
        "learning_rate: the checkpoint has 0.003, now 0.001",
        "seed: the checkpoint has 0, now 3",
    ]


def test_other_networks_and_preprocessing_are_named(tmp_path):
    run("network", tmp_path / "network", steps=1)
    with pytest.raises(TrainError) as caught:
        run("network", tmp_path / "network", resume=True, steps=1, network=tiny_network(features=(4, 6)))
    assert lines(caught) == ["network features: the checkpoint has [4, 8], now [4, 6]"]
    with pytest.raises(TrainError, match="mae: the checkpoint has none, now"):
        run("mae", tmp_path / "network", resume=True, steps=1)

    run("mae", tmp_path / "mae", steps=1)
    other = Preprocessing(spacing=(8.0, 8.0, 8.0), percentiles=(2.0, 98.0))
    with pytest.raises(TrainError) as caught:
        run("mae", tmp_path / "mae", resume=True, steps=1, preprocessing=other)
    assert lines(caught) == ["preprocessing percentiles: the checkpoint has [0.5, 99.5], now [2.0, 98.0]"]


def test_weights_to_begin_with_are_named(tmp_path):
    run("mae", tmp_path, steps=1, initial_sha256="abc")
    run("mae", tmp_path, steps=1, resume=True, initial_sha256="abc")
    with pytest.raises(TrainError, match='initial_sha256: the checkpoint has "abc", now none'):
        run("mae", tmp_path, steps=1, resume=True)


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "data").mkdir()
    for number, name in enumerate("abc"):
        write_case(tmp_path / "data", name, corner=(8 + number, 9, 7))
    return tmp_path / "data"


def test_other_data_are_named(tmp_path, folders):
    """Another content, one more, one less; the same files under another path are the same data."""
    preprocessing = Preprocessing(spacing=(2.0, 2.0, 2.0))
    changes = {"preprocessing": preprocessing, "steps": 1, "crop_size": (8, 8), "cache_size": 2}

    def go(where, resume):
        source = FolderSource(where / "images", where / "masks", preprocessing)
        return train_mae(tiny_mae(), source, training_run(tmp_path / "out", resume, **changes))

    go(folders, resume=False)
    moved = folders.rename(tmp_path / "moved")
    go(moved, resume=True)
    write_case(moved, "b", corner=(11, 12, 9))
    write_case(moved, "d")
    for kind in ("images", "masks"):
        next((moved / kind).glob("c*")).unlink()
    with pytest.raises(TrainError) as caught:
        go(moved, resume=True)
    assert lines(caught) == [
        "cases unknown to the checkpoint: d",
        "cases of the checkpoint that are missing now: c",
        "cases with other content than for the checkpoint: b",
    ]


def test_other_masks_are_other_data(folders):
    def data():
        return checkpoint.describe_data(FolderSource(folders / "images", folders / "masks", Preprocessing()))

    before = data()
    assert data() == before
    mask, other = (next((folders / "masks").glob(f"{name}*")) for name in "ab")
    mask.write_bytes(other.read_bytes())
    assert {name for name in "abc" if data()["cases"][name] != before["cases"][name]} == {"a"}


def test_other_synthetic_subjects_are_named():
    one, two = (SyntheticSource(PREPROCESSING, seed, slices=slices) for seed, slices in ((0, None), (10, 8)))
    found = checkpoint.differences(*(json.loads(json.dumps(checkpoint.describe_data(source))) for source in (one, two)))
    assert found == [
        "synthetic first_seed: the checkpoint has 0, now 10",
        "synthetic slices: the checkpoint has none, now 8",
    ]


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_file({"model.x": torch.zeros(1)}, path, {"step": "3", "signature": "{}"})
    with pytest.raises(
        TrainError,
        match=re.escape(f"{path}: expected a checkpoint of format 4, found one of an earlier version; begin again"),
    ):
        run("mae", tmp_path, resume=True)
