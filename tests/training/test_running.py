"""One training in a folder at a time, by the mark of the running one; and disks that are full for a while."""

import csv
import json
import os
import platform
import re
import shutil
import sys
import time

import pytest
from trainings import Kept, assert_same, at_call, rows, run, weights

from grcsf_fast.errors import UnfinishedError
from grcsf_fast.training import autoencoder, checkpoint, log, network
from grcsf_fast.training import loop as training_loop
from grcsf_fast.training import running as running_module
from grcsf_fast.training.checkpoint import TrainError
from grcsf_fast.training.running import running

FULL = OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return weights(run("mae", tmp_path_factory.mktemp("undisturbed")))


def mark_of(folder, **changes):
    """One of another machine, unless changed."""
    folder.mkdir(exist_ok=True)
    said = {"host": "node7", "pid": 4, "started": "1", "machine": "another", "checkpoint_minutes": 10.0}
    (folder / "running.json").write_text(json.dumps(said | changes))
    return folder / "running.json"


def made_minutes_ago(path, minutes):
    os.utime(path, (time.time() - 60 * minutes,) * 2)


def refused(path, who):
    text = f"{path}: expected no training in this folder, found one, {who}: wait for its end, or delete this file if"
    return pytest.raises(TrainError, match=f"^{re.escape(text)}")


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_is_refused_and_changes_nothing(tmp_path, monkeypatch, undisturbed, resume):
    mark = tmp_path / "running.json"
    said = []

    def second():
        said.append(json.loads(mark.read_text()))
        with refused(mark, f"process {os.getpid()} on {platform.node()}"):
            run("mae", tmp_path, resume=resume)
        said.append(json.loads(mark.read_text()))

    at_call(monkeypatch, autoencoder, "sample_crops", 2, second)
    assert_same(undisturbed, weights(run("mae", tmp_path)))
    assert [row["step"] for row in rows(tmp_path)] == list("123456")
    assert said[0] == said[1]
    assert (said[0]["host"], said[0]["pid"]) == (platform.node(), os.getpid())
    assert not mark.exists()


@pytest.mark.parametrize("error", [OSError("made by the test"), ZeroDivisionError(), KeyboardInterrupt()])
def test_the_mark_goes_whatever_the_end_is(tmp_path, monkeypatch, error):
    def fail():
        assert (tmp_path / "running.json").exists()
        raise error

    at_call(monkeypatch, autoencoder, "sample_crops", 2, fail)
    with pytest.raises((UnfinishedError, ZeroDivisionError, KeyboardInterrupt)):
        run("mae", tmp_path)
    assert not (tmp_path / "running.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize("reaped", [True, False])
def test_the_mark_of_a_process_that_has_ended_is_taken_over(tmp_path, undisturbed, reaped):
    if not reaped and sys.platform != "linux":
        pytest.skip("nobody can tell there")
    child = os.fork()
    if child == 0:
        with running(tmp_path, 10.0):
            os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | (0 if reaped else os.WNOWAIT))
    assert json.loads((tmp_path / "running.json").read_text())["pid"] == child
    assert_same(undisturbed, weights(run("mae", tmp_path)))
    assert not (tmp_path / "running.json").exists()
    if not reaped:
        os.waitpid(child, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="nobody can tell there")
def test_the_number_of_a_process_is_given_again(tmp_path):
    with running(tmp_path, 10.0):
        own = json.loads((tmp_path / "running.json").read_text())
    mark_of(tmp_path, **own | {"started": "1"})
    run("mae", tmp_path, steps=1)
    assert not (tmp_path / "running.json").exists()


def test_the_mark_of_another_machine(tmp_path):
    """By the minutes between the checkpoints of that training, not of this one."""
    mark = mark_of(tmp_path)
    with refused(mark, "process 4 on node7"):
        run("mae", tmp_path, steps=1)
    made_minutes_ago(mark, 29)
    with refused(mark, "process 4 on node7"):
        run("mae", tmp_path, steps=1, checkpoint_minutes=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["running.json"]
    made_minutes_ago(mark, 31)
    run("mae", tmp_path, steps=1, checkpoint_minutes=20.0)
    assert not mark.exists()


@pytest.mark.parametrize("text", ["", '{"host": "node7", "pi', "[]", '{"pid": 1e9}', '{"pid": -1}'])
def test_a_mark_that_says_nothing(tmp_path, text):
    """Such as one that is being written."""
    mark = tmp_path / "running.json"
    mark.write_text(text)
    with refused(mark, "an unknown process"):
        run("mae", tmp_path, steps=1, checkpoint_minutes=1.0)
    made_minutes_ago(mark, 4)
    run("mae", tmp_path, steps=1, checkpoint_minutes=1.0)
    assert not mark.exists()


@pytest.mark.parametrize("taken", [False, True])
def test_a_training_that_lost_its_mark_writes_no_checkpoint(tmp_path, monkeypatch, taken):
    mark, saved = tmp_path / "running.json", tmp_path / "checkpoint.safetensors"
    before = []

    def lose():
        before.append(saved.read_bytes())
        mark.unlink()
        if taken:
            mark_of(tmp_path)

    at_call(monkeypatch, autoencoder, "sample_crops", 5, lose)
    with pytest.raises(UnfinishedError) as caught:
        run("mae", tmp_path)
    assert isinstance(caught.value.__cause__, TrainError)
    own = f"process {os.getpid()} on {platform.node()}"
    whose = "that of process 4 on node7" if taken else "none"
    assert str(caught.value) == (
        f"{mark}: expected the mark of this training, {own}, found {whose}: another training may write to this "
        "folder\nstopped after step 5 of 6; what came after step 3 is not saved"
    )
    assert [saved.read_bytes()] == before
    assert not (tmp_path / "bundle").exists()
    assert mark.exists() == taken


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("step", [5, 6])
def test_a_training_that_lost_its_mark_writes_nothing_more(tmp_path, monkeypatch, taken, step):
    """No row, picture, weights or checkpoint, whether the mark goes in a step or in its validation."""
    mark, before, figures = tmp_path / "running.json", [], iter([0.1, 0.2, 0.3])

    def lose():
        mark.unlink()
        if taken:
            mark_of(tmp_path)
        before.append(contents(tmp_path))

    def dice(*arguments):
        figure = next(figures)
        if figure == 0.2 and step == 6:
            lose()
        return figure

    monkeypatch.setattr(network, "_dice", dice)
    if step == 5:
        at_call(monkeypatch, network, "sample_crops", 5, lose)
    with pytest.raises(
        UnfinishedError, match=f"expected the mark of this training.*\nstopped after step {step} of 6; "
    ):
        run("network", tmp_path, validation=[Kept()[50]])
    assert [contents(tmp_path)] == before
    assert [row["step"] for row in rows(tmp_path)] == [str(number) for number in range(1, step)]


def test_a_row_waits_while_nobody_can_tell_whose_the_mark_is(tmp_path, monkeypatch, undisturbed):
    def unreadable():
        raise FULL

    at_call(monkeypatch, running_module, "_read", 4, unreadable)  # after those of three cases
    with pytest.warns(UserWarning, match=r"^log.csv lacks step 1, until the next row: .*No space left"):
        trained = run("mae", tmp_path)
    assert_same(undisturbed, weights(trained))
    assert [row["step"] for row in rows(tmp_path)] == [str(step) for step in range(1, 7)]


def test_checkpoints_renew_the_mark(tmp_path, monkeypatch):
    mark, seen = tmp_path / "running.json", []
    at_call(monkeypatch, autoencoder, "sample_crops", 3, lambda: made_minutes_ago(mark, 100))
    at_call(monkeypatch, training_loop.TrainingLog, "draw", 1, lambda: seen.append(time.time() - mark.stat().st_mtime))
    run("mae", tmp_path)
    assert seen[0] < 60 * 50


def test_cases_that_take_long_renew_the_mark(tmp_path):
    mark, seen = tmp_path / "running.json", []

    class Slow(Kept):
        def __getitem__(self, index):
            seen.append(time.time() - mark.stat().st_mtime)
            made_minutes_ago(mark, 100)
            return super().__getitem__(index)

    run("mae", tmp_path, source=Slow(), steps=1)
    assert len(seen) == 3
    assert max(seen) < 60 * 50


@pytest.mark.parametrize("resume", [False, True])
def test_a_checkpoint_that_another_training_wrote_meanwhile(tmp_path, monkeypatch, resume):
    """It ended between this one's look at the checkpoint and its mark."""
    run("mae", tmp_path / "other")
    mine = tmp_path / "mine"
    if resume:
        run("mae", mine, steps=3)
    other = tmp_path / "other" / "checkpoint.safetensors"

    def ends():
        mine.mkdir(exist_ok=True)
        shutil.copy(other, mine)

    at_call(monkeypatch, training_loop, "running", 1, ends)
    with pytest.raises(TrainError, match="another training has written this checkpoint since this one began; the same"):
        run("mae", mine, resume=resume)
    assert (mine / "checkpoint.safetensors").read_bytes() == other.read_bytes()
    assert not (mine / "running.json").exists()
    assert (mine / "log.csv").exists() == resume


@pytest.fixture
def minutes(monkeypatch):
    """A clock by which a step takes a minute, and a disk that is full at the chosen trials to write; those made."""
    clock, trials = [0], []

    def full(*chosen):
        real, sample = checkpoint.allow_reading, autoencoder.sample_crops

        def write(part):
            trials.append(clock[0])
            if len(trials) in chosen:
                raise FULL
            real(part)

        def minute(*arguments):
            clock[0] += 1
            return sample(*arguments)

        monkeypatch.setattr(checkpoint, "allow_reading", write)
        monkeypatch.setattr(autoencoder, "sample_crops", minute)
        monkeypatch.setattr(training_loop, "monotonic", lambda: 60.0 * clock[0])
        return trials

    return full


def test_a_checkpoint_is_tried_again(tmp_path, minutes):
    """After the third and the fourth step, and again in a minute each; a validation's time comes at the sixth."""
    written = minutes(1, 2, 4, 5)
    with pytest.warns(UserWarning, match="is not saved") as warned:
        run("mae", tmp_path, steps=9, validate_every=6, checkpoint_minutes=3.0)
    assert written == [3, 4, 5, 6, 7, 8, 9]
    assert [str(one.message) for one in warned] == [
        f"step {step} is not saved, which is tried again in a minute: {FULL}" for step in (3, 4, 6, 7)
    ]
    assert [row["step"] for row in rows(tmp_path)] == [str(step) for step in range(1, 10)]


def test_the_third_failure_in_a_row_ends_the_training(tmp_path, minutes):
    trials = minutes(1, 2, 3, 4)
    with pytest.warns(UserWarning, match="is not saved"), pytest.raises(UnfinishedError) as caught:
        run("mae", tmp_path, steps=9, validate_every=9, checkpoint_minutes=3.0)
    assert trials == [3, 4, 5, 5]  # and once more at the end
    assert f"{FULL}\n" in str(caught.value)
    assert "stopped after step 5 of 9; nothing is saved" in str(caught.value)
    assert f"could not be saved: {FULL}" in str(caught.value)


def test_the_last_checkpoint_has_to_be_written(tmp_path, minutes):
    minutes(1, 2)
    with pytest.raises(UnfinishedError, match="stopped after step 2 of 2; nothing is saved"):
        run("mae", tmp_path, steps=2)


def test_rows_that_cannot_be_written_follow_with_the_next(tmp_path, monkeypatch, undisturbed):
    """Nor does the half of one remain."""

    class Full(csv.DictWriter):
        def writerows(self, rows):
            if [row["step"] for row in rows] == [1]:
                self.writer.writerow(["1", "half"])
                raise FULL
            super().writerows(rows)

    monkeypatch.setattr(log.csv, "DictWriter", Full)
    with pytest.warns(UserWarning, match=r"^log.csv lacks step 1, until the next row: .*No space left"):
        trained = run("mae", tmp_path)
    assert_same(undisturbed, weights(trained))
    assert [row["step"] for row in rows(tmp_path)] == [str(step) for step in range(1, 7)]


def test_curves_that_cannot_be_drawn_end_nothing(tmp_path, monkeypatch, undisturbed):
    def full():
        raise FULL

    at_call(monkeypatch, log.TrainingLog, "draw", 1, full)
    with pytest.warns(UserWarning, match=r"^curves.png of step 3 is not drawn: .*No space left"):
        trained = run("mae", tmp_path)
    assert_same(undisturbed, weights(trained))
