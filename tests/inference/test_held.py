"""What a run over many volumes holds in memory: of cases that are over nothing, of those at work a bounded number."""

import gc
import importlib
import threading
import weakref
from dataclasses import replace

import pytest
from heads import tiny_bundle
from pairs import write_case

from grcsf_fast import Failure, Predictor
from grcsf_fast.cli import main
from grcsf_fast.data.volumes import Preprocessing, VolumeError
from grcsf_fast.inference import case, lanes
from grcsf_fast.inference.record import Done, Failed
from grcsf_fast.networks.stream import Stage, Stream
from grcsf_fast.pretrained.bundle import save_bundle
from grcsf_fast.runtime import memory

CASES = 7


class Held:
    """The voxels of each case, and what they became, as long as anything refers to them; of cycles nobody frees them.

    Attributes:
        alive: arrays of each case.
        most: cases with an array at the same time.
        before: such cases whenever a further volume was about to be read.
        given: how often memory had been given back by then.
    """

    def __init__(self):
        self.alive, self.most, self.changing = {}, 0, threading.RLock()
        self.before, self.given, self.times = [], [], 0

    def add(self, name, array):
        with self.changing:
            self.alive[name] = self.alive.get(name, 0) + 1
            self.most = max(self.most, len(self.alive))
        weakref.finalize(array, self.gone, name)

    def gone(self, name):
        with self.changing:
            self.alive[name] -= 1
            if not self.alive[name]:
                del self.alive[name]

    def give_back(self):
        with self.changing:
            self.times += 1

    def reads(self):
        with self.changing:
            self.before.append(len(self.alive))
            self.given.append(self.times)


@pytest.fixture
def held(monkeypatch):
    held = Held()
    read, prepare = case.read_volume, case.prepare

    def watched_read(source):
        held.reads()
        volume = read(source)
        held.add(volume.name, volume.data)
        return volume

    def watched_prepare(volume, *settings):
        prepared = prepare(volume, *settings)
        held.add(volume.name, prepared.data)
        return prepared

    monkeypatch.setattr(case, "read_volume", watched_read)
    monkeypatch.setattr(case, "prepare", watched_prepare)
    monkeypatch.setattr(case, "give_memory_back", held.give_back)
    # While these are first imported errors are raised and caught in a cycle, which would hold whoever imports them.
    for package in ("matplotlib.figure", "scipy.ndimage"):
        importlib.import_module(package)
    gc.collect()
    gc.disable()
    yield held
    gc.enable()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    for number in range(CASES):
        write_case(folder, f"case{number:02d}")
    return folder / "images"


@pytest.fixture(scope="module")
def bundle():
    return replace(tiny_bundle(), preprocessing=Preprocessing((2.0, 2.0, 2.0)))


@pytest.fixture
def predictor(bundle):
    return Predictor(bundle, "cpu", precision="float32")


def run(predictor, images, output):
    return list(predictor.predict_folder(images, output, maps=False, overlay=False))


@pytest.mark.parametrize("number", [1, 2])
def test_a_lane_holds_two_volumes_of_a_folder(held, predictor, images, tmp_path, monkeypatch, number):
    """However many there are."""
    monkeypatch.setattr(case, "threads_outside", lambda: number)
    assert [type(one) for one in run(predictor, images, tmp_path / "out")] == [Done] * CASES
    assert number <= held.most <= lanes.CASES_A_LANE * number
    assert max(held.before) < lanes.CASES_A_LANE * number
    assert not held.alive


@pytest.mark.parametrize("failing", [False, True])
def test_memory_is_given_back_before_a_volume_is_read(held, predictor, images, tmp_path, monkeypatch, failing):
    """And after the batches of its maps and of each scale. Nothing is left then of cases that are over, nor of those
    that failed."""

    def fails(*_):
        raise VolumeError("made by the test")

    monkeypatch.setattr(case, "threads_outside", lambda: 1)
    if failing:
        monkeypatch.setattr(case, "lesions_on_grid", fails)
    found = run(predictor, images, tmp_path / "out")
    assert [type(one) for one in found] == [Failed if failing else Done] * CASES
    assert max(held.before) < lanes.CASES_A_LANE
    assert all(later > earlier for earlier, later in zip([0, *held.given], held.given, strict=False))
    assert held.times == 3 * CASES
    assert not held.alive


def test_a_failure_keeps_its_error_and_no_volume(held, predictor, images, monkeypatch):
    """Of a batch that fails, as when memory runs out, and of an error that another one led to."""

    def stream():
        def fails(batch):
            held.add("batch", batch)
            raise ValueError("too large for the test")

        return Stream({"residual_maps": Stage(4, fails)})

    monkeypatch.setattr(predictor, "stream", stream)
    found = list(predictor.predict_many(sorted(images.iterdir())[:3], failures="return", lanes=1))
    assert [type(one) for one in found] == [Failure] * 3
    assert all(type(one.error) is VolumeError and type(one.error.__cause__) is ValueError for one in found)
    assert all("in fails" in one.traceback and "in predict_case" in one.traceback for one in found)
    assert not held.alive


def test_the_page_of_a_folder_is_written_when_no_volume_is_held(held, predictor, images, tmp_path, monkeypatch):
    from grcsf_fast.inference import record

    def watched(output, rows):
        assert not held.alive
        return write(output, rows)

    write = record.write_folder_page
    monkeypatch.setattr(record, "write_folder_page", watched)
    run(predictor, images, tmp_path / "out")
    assert (tmp_path / "out" / "index.html").exists()


def test_commands_give_memory_back_and_the_library_does_not(bundle, images, tmp_path, monkeypatch):
    """It is the process's: a program that uses the library may want to keep what it has freed."""
    trimmed = []

    class Glibc:
        def __init__(self, _):
            pass

        def mallopt(self, *_):
            pass

        def malloc_trim(self, pad):
            trimmed.append(pad)

    monkeypatch.setattr(memory.ctypes, "CDLL", Glibc)
    monkeypatch.setattr(memory._Kept, "freed", False)
    run(Predictor(bundle, "cpu", precision="float32"), images, tmp_path / "library")
    assert not trimmed
    model = save_bundle(bundle, tmp_path / "bundle")
    folders = ["-i", str(images), "-o", str(tmp_path / "command"), "-m", str(model)]
    assert main(["predict", *folders, "--precision", "float32", "--no-overlay", "--no-maps", "--no-page"]) == 0
    assert trimmed == [0] * 3 * CASES  # before a volume is read, after its maps, and after its one scale
    memory.keep_memory(whole_volumes=True)
    memory.give_memory_back()
    assert len(trimmed) == 3 * CASES
