"""Whatever happens in a lane, the run ends and says it."""

import threading
from dataclasses import replace

import pytest
import torch
from test_folder_source import write_case
from test_predict import tiny_bundle

from grcsf_fast import Failure, Prediction, Predictor
from grcsf_fast.data.volumes import Preprocessing, VolumeError
from grcsf_fast.inference import lanes


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


def raising(function, error, where):
    """The function, but for arguments among which there is a path of that name."""

    def call(*arguments, **named):
        if any(getattr(one, "name", "") == where for one in arguments):
            raise error
        return function(*arguments, **named)

    return call


@pytest.mark.parametrize(
    ("error", "foreseen"),
    [
        (VolumeError("b: made by the test"), True),
        (UserWarning("b: made by the test"), True),  # as under -W error
        (OSError("b: made by the test"), True),
        (ZeroDivisionError("b: made by the test"), False),
        (MemoryError("b: made by the test"), False),
    ],
)
@pytest.mark.parametrize("place", ["bytes_needed", "prepared", "prediction", "finish", "skip"])
def test_an_error_of_one_volume_is_its_failure(predictor, paths, monkeypatch, place, error, foreseen):
    """Wherever it comes: before, in or after the networks."""
    named = {}
    if place == "bytes_needed":
        monkeypatch.setattr(lanes, place, raising(lanes.bytes_needed, error, "b.nii.gz"))
    elif place == "prepared":
        monkeypatch.setattr(predictor, place, raising(predictor.prepared, error, "b.nii.gz"))
    elif place == "prediction":
        real = predictor.prediction

        def prediction(prepared, *others):
            if prepared.volume.name.endswith("b.nii.gz"):
                raise error
            return real(prepared, *others)

        monkeypatch.setattr(predictor, place, prediction)
    else:

        def act(one):
            if getattr(one, "name", "") in ("b", "b.nii.gz"):
                raise error
            return one if place == "finish" else None

        named = {place: act}
    found = list(predictor.predict_many(paths, failures="return", lanes=2, **named))
    assert [type(one) for one in found] == [Prediction, Failure, Prediction, Prediction, Prediction]
    failure = found[1]
    assert failure.source == paths[1]
    assert failure.foreseen == foreseen
    if foreseen:
        assert failure.message == "b: made by the test"
    else:
        assert f"{type(error).__name__}: b: made by the test" in failure.message


class Stopped(BaseException):
    """Neither an Exception nor an interruption by the user."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Stopped])
def test_what_is_no_error_of_a_volume_ends_the_run(predictor, paths, error):
    def finish(prediction):
        if prediction.name == "b":
            raise error
        return prediction

    with pytest.raises(error):
        list(predictor.predict_many(paths, failures="return", lanes=2, finish=finish))


def test_closed_early(predictor, paths):
    results = predictor.predict_many(paths, lanes=2)
    assert next(results).name == "a"
    assert torch.get_num_threads() == 1
    results.close()


def test_never_begun(predictor, paths):
    predictor.predict_many(paths, lanes=2).close()


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
