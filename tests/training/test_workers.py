"""Cases made by worker processes: the same trainings with any number of them, and clear ends."""

import errno
import os
import pickle
import signal
import sys
import time
import warnings

import pytest
import torch
from pairs import write_case
from trainings import PREPROCESSING, RESIDUAL, assert_same, kill_at, rows, run, tiny_mae, weights

from grcsf_fast.data.volumes import Preprocessing, VolumeError
from grcsf_fast.datasets.cases import Case
from grcsf_fast.datasets.pairs import FolderSource
from grcsf_fast.errors import Interrupted, UnfinishedError
from grcsf_fast.runtime import transient
from grcsf_fast.runtime.processes import World
from grcsf_fast.training import workers
from grcsf_fast.training.cases import WithMaps
from grcsf_fast.training.synthetic import SyntheticSource
from grcsf_fast.training.workers import CaseMakers, WorkerError, default_workers


class Numbers:
    """Case k is filled with k; a number may end the worker or fail."""

    def __init__(self, act=None, at=-1):
        self.act, self.at = act, at

    def __getitem__(self, index):
        if index == self.at:
            self.act()
        return Case(str(os.getpid()), torch.full((4, 4, 4), float(index)), torch.ones(4, 4, 4) > 0)


def made(source, last, workers, finish=lambda case: case):
    makers = CaseMakers(source, finish, last, workers)
    try:
        return [makers[index] for index in range(last + 1)]
    finally:
        makers.close()


def wait_for(state):
    """Until it is so; ten minutes are for a test that hangs, not for slow machines."""
    end = time.monotonic() + 600
    while not state():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid):
    """No such process, or one that ended and that nobody asked about yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_cases_come_in_order_from_other_processes(count):
    cases = made(Numbers(), 6, count)
    assert [case.image[0, 0, 0].item() for case in cases] == list(range(7))
    assert all(case.lesion.dtype == torch.bool and case.healthy is None for case in cases)
    makers = {int(case.name) for case in cases}
    assert len(makers) == max(1, count)
    assert (os.getpid() in makers) == (count == 0)


@pytest.mark.parametrize("kind", [pytest.param("mae", marks=pytest.mark.slow), "network"])
def test_any_number_of_workers_gives_the_same_training(tmp_path, monkeypatch, kind):
    """None, one and two at once, and two after one that was killed in the fifth of six steps."""
    alone = weights(run(kind, tmp_path / "0"))
    for count in (1, 2):
        assert_same(alone, weights(run(kind, tmp_path / str(count), workers=count)))
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(kind, tmp_path / "killed", workers=1)
    assert_same(alone, weights(run(kind, tmp_path / "killed", workers=2, resume=True)))


def test_sums_of_several_threads_are_those_of_a_worker():
    source = SyntheticSource(PREPROCESSING, 7)
    finish = WithMaps(tiny_mae().eval(), RESIDUAL.__dict__, torch.device("cpu"))
    torch.set_num_threads(2)
    (here,) = made(source, 0, 0, finish)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    (there,) = made(source, 0, 1, finish)
    assert torch.equal(here.image, there.image)
    assert torch.equal(here.residual_maps.half(), there.residual_maps)


@pytest.mark.slow
def test_a_worker_that_is_killed():
    source = Numbers(lambda: os.kill(os.getpid(), signal.SIGKILL), at=3)
    with pytest.raises(WorkerError, match=r"^number 3 of Numbers: the worker process .* by signal 9 \(SIGKILL\)"):
        made(source, 6, 2)


def test_a_worker_that_is_killed_names_the_file_and_leaves_what_was_done(tmp_path):
    (tmp_path / "data").mkdir()
    for number, name in enumerate("abcd"):
        write_case(tmp_path / "data", name, corner=(8 + number, 9, 7))
    preprocessing = Preprocessing(spacing=(2.0, 2.0, 2.0))

    log = tmp_path / "out" / "log.csv"

    class Fatal(FolderSource):
        def __getitem__(self, index):
            if index % len(self.names) == 2:
                # What a worker has made and not sent yet would end with it.
                wait_for(lambda: log.exists() and len(rows(log.parent)) == 2)
                os._exit(3)
            return super().__getitem__(index)

    source = Fatal(tmp_path / "data" / "images", tmp_path / "data" / "masks", preprocessing)
    changes = {"preprocessing": preprocessing, "crop_size": (8, 8), "cache_size": 1, "replace_every": 1}
    with pytest.raises(UnfinishedError, match=r"^c: the worker process .* with exit code 3;(.|\n)*step 2 is saved"):
        run("mae", tmp_path / "out", source=source, workers=1, **changes)


@pytest.mark.parametrize("count", [0, 1])
def test_an_error_in_a_worker_is_that_of_the_case(count):
    def fail():
        raise VolumeError("bad.nii: made by the test")

    with pytest.raises(VolumeError, match=r"^bad\.nii: made by the test$"):
        made(Numbers(fail, at=1), 3, count)


@pytest.mark.parametrize("count", [0, 2])
def test_an_error_that_passes_ends_nothing(tmp_path, monkeypatch, capfd, count):
    monkeypatch.setattr(transient, "PAUSES", (0.0,))
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: print(message, file=sys.stderr, flush=True))
    stale = tmp_path / "stale"
    stale.touch()

    def fail():
        if stale.exists():
            stale.unlink()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "scan.nii.gz")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cases = made(Numbers(fail, at=1), 3, count)
    assert [case.image[0, 0, 0].item() for case in cases] == [0, 1, 2, 3]
    (said,) = (line for line in capfd.readouterr().err.splitlines() if "tried again" in line)
    assert said.startswith("number 1 of Numbers: ")
    assert said.endswith("'scan.nii.gz'; is tried again in 0 s")


def test_a_bug_in_a_worker_keeps_its_class_and_says_where():
    class OddError(Exception):
        """Of a class that cannot be found again."""

    def fail(error):
        raise error

    with pytest.raises(ZeroDivisionError) as caught:
        made(Numbers(lambda: fail(ZeroDivisionError("oh")), at=1), 3, 1)
    assert "while making case number 1 of Numbers" in caught.value.__notes__[0]
    assert "in fail" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"^OddError: what"):
        made(Numbers(lambda: fail(OddError("what")), at=1), 3, 1)


def test_workers_end_with_the_training(tmp_path, monkeypatch):
    """After its last step, after a signal that came to all of them, and in the middle of a case."""
    begun = []
    real = workers._Team.__init__

    def noted(team, *arguments):
        real(team, *arguments)
        begun.extend(process.pid for process in team.processes)

    monkeypatch.setattr(workers._Team, "__init__", noted)
    run("mae", tmp_path / "whole", workers=2)
    assert len(begun) == 2
    wait_for(lambda: all(gone(pid) for pid in begun))

    def signalled():
        for pid in (*begun[2:], os.getpid()):
            os.kill(pid, signal.SIGTERM)

    calls = []
    sample = workers.CaseMakers.__getitem__

    def counted(self, index):
        calls.append(index)
        if index == 4:  # wanted from step 4 on
            signalled()
        return sample(self, index)

    monkeypatch.setattr(workers.CaseMakers, "__getitem__", counted)
    with pytest.raises(Interrupted, match="step 5 is saved"):
        run("mae", tmp_path / "signalled", workers=2)
    assert len(begun) == 4
    wait_for(lambda: all(gone(pid) for pid in begun))


def test_a_worker_in_the_middle_of_a_case_is_not_waited_for():
    makers = CaseMakers(Numbers(lambda: time.sleep(3600), at=1), lambda case: case, 3, 1)
    pid = int(makers[0].name)
    makers.close()
    wait_for(lambda: gone(pid))


def test_workers_of_a_training_that_is_killed_end():
    """Nobody is left to tell them."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        makers = CaseMakers(Numbers(), lambda case: case, 10**6, 2)
        os.write(writing, b" ".join(makers[index].name.encode() for index in range(4)) + b"\n")
        os.close(writing)
        signal.pause()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        pids = {int(pid) for pid in pipe.readline().split()}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(pids) == 2
    wait_for(lambda: all(gone(pid) for pid in pids))


def test_what_workers_need_can_be_sent_to_them():
    """Where processes are not forked."""
    team = workers._Team.__new__(workers._Team)
    team.make = workers._Making(SyntheticSource(PREPROCESSING, 0), WithMaps(tiny_mae(), {}, torch.device("cpu")))
    team.loaded = iter(())
    assert set(vars(pickle.loads(pickle.dumps(team)))) == {"make"}


@pytest.mark.parametrize(
    ("cores", "device", "size", "expected"),
    [(1, "cpu", 1, 0), (2, "cpu", 1, 1), (16, "cpu", 1, 4), (16, "cuda", 1, 8), (16, "cuda", 4, 3), (2, "cpu", 2, 0)],
)
def test_default_workers(monkeypatch, cores, device, size, expected):
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers(torch.device(device), World(0, size)) == expected
    # Of eight processes these many are on this machine.
    for beside in ("", "0", "many"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
        assert default_workers(torch.device(device), World(0, size)) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
    assert default_workers(torch.device(device), World(0, 8)) == expected
