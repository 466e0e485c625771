"""Whatever happens in a lane, the run ends and says it."""

import errno
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from heads import tiny_bundle
from pairs import write_case

from grcsf_fast import BackendUnavailableError, Failure, Prediction, Predictor
from grcsf_fast.data.volumes import Prepared, Preprocessing, VolumeError
from grcsf_fast.errors import UnfinishedError
from grcsf_fast.inference import case
from grcsf_fast.inference.lanes import Job, Room, RoomError, run_lanes
from grcsf_fast.networks.stream import Images, Stage, Stream
from grcsf_fast.runtime import memory


@pytest.fixture(scope="module")
def predictor():
    bundle = replace(tiny_bundle(), preprocessing=Preprocessing((2.0, 2.0, 2.0)))
    return Predictor(bundle, "cpu", precision="float32")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lanes")
    for name in "abcde":
        write_case(folder, name)
    return sorted((folder / "images").iterdir())


@pytest.fixture(autouse=True)
def threads_come_back():
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    for thread in threading.enumerate():
        if thread.name.startswith("lane"):
            thread.join()  # all of them end


def raising(function, error):
    """The function, but for an argument that is about the file b.nii.gz."""

    def call(*arguments, **named):
        for one in arguments:
            about = one.volume if isinstance(one, Prepared) else one
            if Path(str(getattr(about, "name", ""))).name in ("b", "b.nii.gz"):
                raise error
        return function(*arguments, **named)

    return call


def same(one):
    return one


def in_lanes(predictor, paths, before=same, after=same, lanes=2):
    def work(path):
        before(path)
        prediction = yield from case.predict_case(predictor, path)
        return after(prediction)

    return case.in_lanes(predictor, (Job(path, work(path)) for path in paths), True, lanes, None)


@pytest.mark.parametrize(
    ("error", "foreseen"),
    [
        (VolumeError("b: made by the test"), True),
        (UserWarning("b: made by the test"), True),  # as under -W error
        (OSError("b: made by the test"), True),
        (ZeroDivisionError("b: made by the test"), False),
        (MemoryError("b: made by the test"), True),
        (RuntimeError("can't allocate memory: b: made by the test"), True),
    ],
)
@pytest.mark.parametrize("place", ["before", "as_channels", "read_volume", "prepare", "levels_on_grid", "after"])
def test_an_error_of_one_volume_is_its_failure(predictor, paths, monkeypatch, place, error, foreseen):
    """Wherever it comes: before, in or after the networks."""
    named = {}
    if place in ("before", "after"):
        named = {place: raising(same, error)}
    else:
        monkeypatch.setattr(case, place, raising(getattr(case, place), error))
    found = list(in_lanes(predictor, paths, **named))
    assert [type(one) for one in found] == [Prediction, Failure, Prediction, Prediction, Prediction]
    failure = found[1]
    assert failure.source == paths[1]
    assert failure.foreseen == foreseen
    if foreseen:
        assert failure.message.endswith("b: made by the test")
        assert "Traceback" not in failure.message
    else:
        assert f"{type(error).__name__}: b: made by the test" in failure.message


class Stopped(BaseException):
    """Neither an Exception nor an interruption by the user."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Stopped])
def test_what_is_no_error_of_a_volume_ends_the_run(predictor, paths, error):
    with pytest.raises(error):
        list(in_lanes(predictor, paths, after=raising(same, error)))


def test_a_case_fails_alone_where_torch_has_no_error_of_a_lost_gpu(predictor, paths, monkeypatch):
    """As before 2.8."""
    monkeypatch.delattr(torch, "AcceleratorError", raising=False)
    found = list(in_lanes(predictor, paths, after=raising(same, RuntimeError("made by the test"))))
    assert [type(one) for one in found] == [Prediction, Failure, Prediction, Prediction, Prediction]


@pytest.mark.parametrize("error", [ModuleNotFoundError, BackendUnavailableError])
def test_what_is_true_of_every_volume_ends_the_run(predictor, paths, error):
    with pytest.raises(error, match="made by the test"):
        list(in_lanes(predictor, paths, after=raising(same, error("made by the test"))))


@pytest.mark.parametrize(
    ("error", "number"),
    [(OSError, errno.ENOSPC), (OSError, errno.EDQUOT), (OSError, errno.EROFS), (torch.AcceleratorError, None)],
)
def test_what_every_other_case_would_fail_for_ends_the_run(predictor, paths, error, number):
    """A disk that is full, a quota that is used up, a disk that cannot be written any more, and a lost GPU."""
    full = error("made by the test")
    full.errno = number
    done = []

    def after(prediction):
        done.append(prediction.name)
        return raising(same, full)(prediction.prepared.volume)

    with pytest.raises(UnfinishedError, match=r"b.nii.gz: made by the test; every other case would fail alike"):
        list(in_lanes(predictor, paths, after=after, lanes=1))
    assert len(done) < len(paths)


def test_what_follows_the_networks_is_done_in_the_lane(predictor, paths):
    found = list(in_lanes(predictor, paths, after=lambda prediction: threading.current_thread().name))
    assert all(name.startswith("lane-") for name in found)


def test_a_case_may_end_before_it_asks_for_anything(predictor, paths, tmp_path):
    def work():
        return "left out"
        yield

    cases = [Job(None, work()), Job(paths[0], case.predict_case(predictor, paths[0]))]
    found = list(case.in_lanes(predictor, cases, True, 2, None))
    assert found[0] == "left out"
    assert found[1].name == "a"


class Stages:
    """Cases that ask for room and images; and how much room is in use."""

    def __init__(self):
        self.used, self.most, self.closed = 0, 0, 0
        self.changing = threading.Lock()

    def stream(self):
        return Stream({"doubling": Stage(4, lambda images: 2 * images)})

    def work(self, number, amount):
        yield Room(amount)
        with self.changing:
            self.used += amount
            self.most = max(self.most, self.used)
        try:
            order = yield Images("doubling", [torch.full((number % 5 + 1, 2), number)])
        finally:
            with self.changing:
                self.used -= amount
                self.closed += 1
        return int(order.outputs[0].sum())

    def cases(self, amounts):
        return [Job(number, self.work(number, amount)) for number, amount in enumerate(amounts)]

    def results(self, amounts, lanes=3, memory=100, ordered=True):
        settings = {"ordered": ordered, "lanes": lanes, "memory": memory, "one_thread_each": True}
        return run_lanes(self.cases(amounts), self.stream, **settings)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("ordered", [True, False])
def test_room_is_bounded(lanes, ordered):
    """Cases that need more than there is fail alone; of the others never more are at work than there is room for."""
    stages = Stages()
    found = list(stages.results([40, 100, 101, 1, 60] * 8, lanes, ordered=ordered))
    assert stages.most <= 100
    assert stages.used == 0
    failures = [one for one in found if isinstance(one, Failure)]
    assert [type(one.error) for one in failures] == [RoomError] * 8
    assert sorted(one.source for one in failures) == list(range(2, 40, 5))
    expected = [4 * (number % 5 + 1) * number for number in range(40) if number % 5 != 2]
    sums = [one for one in found if not isinstance(one, Failure)]
    assert sums == expected if ordered else sorted(sums) == sorted(expected)


def test_cases_under_way_are_closed():
    """With what they have open, when nobody wants further results."""
    stages = Stages()
    results = stages.results([10] * 40, ordered=False)
    next(results)
    results.close()
    assert stages.used == 0
    assert 1 <= stages.closed <= 9


def test_a_lane_that_waits_for_room_ends_when_the_run_does():
    """One lane has all the room and fails for good, while the others wait."""
    stages = Stages()

    def stream():
        def fails(images):
            raise KeyboardInterrupt

        return Stream({"doubling": Stage(4, fails)})

    with pytest.raises(KeyboardInterrupt):
        list(run_lanes(stages.cases([100] * 9), stream, ordered=True, lanes=3, memory=100, one_thread_each=False))
    assert stages.used == 0


def test_closed_early(predictor, paths):
    results = predictor.predict_many(paths, lanes=2)
    assert next(results).name == "a"
    assert torch.get_num_threads() == 1
    results.close()


def test_never_begun(predictor, paths):
    threads = torch.get_num_threads()
    results = predictor.predict_many(paths, lanes=2)
    assert torch.get_num_threads() == threads
    assert not any(thread.name.startswith("lane-") for thread in threading.enumerate())
    results.close()


def test_a_source_that_fails(predictor, paths):
    def sources():
        yield paths[0]
        raise LookupError("made by the test")

    with pytest.raises(LookupError, match="made by the test"):
        list(predictor.predict_many(sources(), lanes=2))


def test_lanes_that_cannot_be_started(predictor, paths, monkeypatch):
    """A limit on threads: the error is the system's, and the lanes that run already end."""
    start = threading.Thread.start

    def limited(thread):
        if thread.name == "lane-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        list(predictor.predict_many(paths, lanes=3))


@pytest.mark.parametrize("value", ["", "many", "0", "-1"])
def test_a_number_of_processes_that_is_none(predictor, paths, monkeypatch, value):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert len(list(predictor.predict_many(paths[:2], lanes=1))) == 2
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert memory.memory_budget() == 700
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.memory_budget() == 175
