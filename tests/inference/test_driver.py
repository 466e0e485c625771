"""One thread that computes for all lanes, on the CPU: only where a GPU is does the library take it by itself."""

import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from heads import tiny_bundle
from pairs import write_case

from grcsf_fast import Failure, Predictor
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.inference.driver import driving
from grcsf_fast.inference.lanes import Job, run_lanes
from grcsf_fast.networks.stream import Images, Stage, Stream


@pytest.fixture(scope="module")
def predictor():
    return Predictor(replace(tiny_bundle(), preprocessing=Preprocessing((2.0, 2.0, 2.0))), "cpu", precision="float32")


@pytest.fixture
def driven(predictor, monkeypatch):
    """Its lanes share a driver, as beside any device but the CPU; volumes and networks stay on the CPU."""
    monkeypatch.setattr(predictor, "device", torch.device("mps"))
    return predictor


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    for name in "abcde":
        write_case(folder, name)
    return sorted((folder / "images").iterdir())


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("lane"):
            thread.join()


def works(wanted):
    """Cases that want as many numbers doubled, and say by which thread it was done."""

    def work(number, count):
        order = yield Images("doubling", [torch.full((count, 2), number)])
        assert order.outputs[0].shape == (count, 2)
        return int(order.outputs[0].sum())

    return [Job(number, work(number, count)) for number, count in enumerate(wanted)]


def results(wanted, run, lanes=3, **settings):
    with driving(lambda: Stream({"doubling": Stage(4, run)}), **({"context": threading.Lock} | settings)) as seat:
        yield from run_lanes(works(wanted), seat, ordered=True, lanes=lanes, memory=1, one_thread_each=True)


@pytest.mark.parametrize("lanes", [1, 3])
def test_one_thread_computes_for_all(lanes):
    threads, sizes = set(), set()

    def run(images):
        threads.add(threading.current_thread().name)
        sizes.add(len(images))
        return 2 * images

    wanted = [1, 5, 2, 9, 4] * 4
    assert list(results(wanted, run, lanes)) == [4 * number * count for number, count in enumerate(wanted)]
    assert threads == {"lanes-driver"}
    assert sizes == {4}


def test_a_batch_that_fails_is_its_cases_failure():
    def run(images):
        if (images == 3).any():
            raise RuntimeError("out of memory, says the test")
        return 2 * images

    found = list(results([4] * 9, run, lanes=1))
    assert [number for number, one in enumerate(found) if isinstance(one, Failure)] == [3]


@pytest.mark.parametrize("place", ["stream", "context", "run"])
def test_whatever_ends_the_driver_ends_the_run(place):
    class Stopped(BaseException):
        pass

    def fails(*_):
        raise Stopped

    with (
        pytest.raises(Stopped),
        driving(
            fails if place == "stream" else lambda: Stream({"doubling": Stage(4, fails)}),
            fails if place == "context" else threading.Lock,
        ) as seat,
    ):
        list(run_lanes(works([4] * 9), seat, ordered=True, lanes=3, memory=1, one_thread_each=True))


def test_results_that_nobody_wants_any_more():
    found = results([4] * 40, lambda images: 2 * images)
    next(found)
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "lanes-driver"]


def test_nobody_keeps_images_that_are_computed():
    """Nor results, while the driver waits for more."""
    alive = []

    def work():
        images = torch.ones(4, 2)
        alive.append(weakref.ref(images))
        order = yield Images("doubling", [images])
        del images
        alive.append(weakref.ref(order.outputs[0]))
        del order
        return next(started)

    started = iter("ab")
    with driving(lambda: Stream({"doubling": Stage(4, lambda images: 2 * images)}), threading.Lock) as seat:
        run = run_lanes([Job(None, work())], seat, ordered=True, lanes=1, memory=1, one_thread_each=True)
        assert list(run) == ["a"]
        assert [one() for one in alive] == [None, None]


def test_volumes_are_those_of_a_call(driven, paths):
    alone = [driven(path) for path in paths]
    for lanes in (1, 3):
        for one, other in zip(alone, driven.predict_many(paths, lanes=lanes), strict=True):
            assert np.array_equal(one.mask.dataobj, other.mask.dataobj)
            assert one.report == other.report
            for name, values in one.values.items():
                assert torch.equal(values, other.values[name])


def test_a_folder_with_a_bad_file(driven, paths, tmp_path):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no volume")
    found = list(driven.predict_many([paths[0], bad, paths[1]], failures="return"))
    assert [isinstance(one, Failure) for one in found] == [False, True, False]
