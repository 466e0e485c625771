"""Cases compared side by side: as many threads as cores, all in the order of the cases, within the memory there is."""

import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.datasets.cases_file import CaseList, ListedCase
from grcsf_fast.evaluation import calcium_files, folders
from grcsf_fast.evaluation.calcium_files import evaluate_calcium
from grcsf_fast.evaluation.folders import evaluate_folders
from grcsf_fast.runtime import threads
from grcsf_fast.runtime.threads import in_order

LONG = 600.0  # seconds, for a test that hangs; states are waited for
NAMES = [f"case{number}" for number in range(6)]


@pytest.fixture
def soft(tmp_path):
    """Pairs of which each file says that it is soft, and each prediction has another size."""
    for number, name in enumerate(NAMES):
        for folder in ("truth", "predicted"):
            mask = np.zeros((20, 20, 20), np.float32)
            mask[2:9, 2:9, 2 : 9 + number * (folder == "predicted")] = 1
            mask[9, 2:9, 2:9] = 0.7
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(mask, np.diag([2.0, 2.0, 5.0, 1.0])), tmp_path / folder / f"{name}.nii.gz")
    return tmp_path / "predicted", tmp_path / "truth"


def heard(soft, **named):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = evaluate_folders(*soft, **named)
    return found, [(str(one.message), one.category, one.filename, one.lineno) for one in said]


def test_results_and_warnings_are_those_of_one_after_the_other(soft, monkeypatch):
    (soft[0] / "case2.nii.gz").write_bytes(b"text")
    (soft[1] / "case4.nii.gz").write_bytes(b"text")
    monkeypatch.setattr(folders, "usable_cores", lambda: 1)
    expected, said = heard(soft)
    assert len(said) == 9
    assert list(expected.failures) == ["case2", "case4"]
    real, calls, compared, second_done = folders.evaluate_masks, itertools.count(), set(), threading.Event()

    def overtaken(*given):
        """The first call ends after the second."""
        compared.add(threading.current_thread())
        call = next(calls)
        assert call or second_done.wait(LONG)
        result = real(*given)
        if call == 1:
            second_done.set()
        return result

    monkeypatch.setattr(folders, "usable_cores", lambda: 4)
    monkeypatch.setattr(folders, "evaluate_masks", overtaken)
    seen = []

    def progress(names):
        for name in names:
            yield name
            seen.append(name)

    found, again = heard(soft, progress=progress)
    assert repr(found) == repr(expected)  # some figures are NaN
    assert [*found.results] == [*expected.results]
    assert [*found.failures] == [*expected.failures]
    assert again == said
    assert seen == NAMES
    assert len(compared) > 1
    assert threading.current_thread() not in compared


def test_warnings_may_be_errors(soft, monkeypatch):
    monkeypatch.setattr(folders, "usable_cores", lambda: 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate_folders(*soft)
    assert list(found.failures) == NAMES
    assert all("is cut at 0.5" in text for text in found.failures.values())


def test_warnings_go_their_way_again_afterwards(soft, monkeypatch):
    monkeypatch.setattr(folders, "usable_cores", lambda: 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = warnings.showwarning, warnings.filters[:]
        evaluate_folders(*soft)
        assert (warnings.showwarning, warnings.filters) == before


@pytest.fixture
def over(monkeypatch):
    """Set when nothing more can begin."""
    event = threading.Event()

    class Watched(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(False, cancel_futures=cancel_futures)
            event.set()
            super().shutdown(wait)

    monkeypatch.setattr(threads, "ThreadPoolExecutor", Watched)
    return event


def test_a_signal_ends_it_soon(soft, monkeypatch, over):
    """With the first case done there are two others under way, and no further one begins."""
    began = []
    real = folders.evaluate_masks

    def until_over(*given):
        began.append(given)
        of_case_0 = np.array_equal(*given[:2])
        assert of_case_0 or over.wait(LONG)
        return real(*given)

    monkeypatch.setattr(folders, "usable_cores", lambda: 2)
    monkeypatch.setattr(folders, "evaluate_masks", until_over)

    def progress(names):
        yield names[0]
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.warns(UserWarning, match=r"is cut at 0\.5"), pytest.raises(KeyboardInterrupt):
        evaluate_folders(*soft, progress=progress)
    assert len(began) <= 3
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(("amount", "most"), [(30, 3), (60, 1), (500, 1), (0, 4)])
def test_no_more_at_once_than_memory_has_room_for(monkeypatch, amount, most):
    monkeypatch.setattr(threads, "memory_budget", lambda: 100)
    lock, now, highest, together = threading.Lock(), [0], [0], threading.Barrier(most)

    def work(item):
        with lock:
            now[0] += 1
            highest[0] = max(highest[0], now[0])
        together.wait(LONG)
        with lock:
            now[0] -= 1
        return -item

    assert list(in_order(work, range(12), 4, lambda item: amount)) == [-item for item in range(12)]
    assert highest[0] == most


def test_whoever_waits_for_memory_does_not_begin_after_the_end(monkeypatch, over):
    monkeypatch.setattr(threads, "memory_budget", lambda: 100)
    began = []

    def work(item):
        began.append(item)
        # One that began before the first item ends at once, as that waits for its room.
        assert item == 0 or 0 not in began or over.wait(LONG)
        return item

    with closing(in_order(work, range(8), 4, lambda item: 100)) as results:
        assert next(results) == 0
    assert len(began) - began.index(0) <= 2


def test_an_error_comes_where_its_item_would():
    failed = threading.Event()

    def work(item):
        warnings.warn(f"of {item}", stacklevel=1)
        if item == 2:
            failed.set()
        assert item or failed.wait(LONG)
        return 6 / (item - 2)

    found = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with closing(in_order(work, range(6), 3)) as results, pytest.raises(ZeroDivisionError):
            found.extend(results)
    assert [str(one.message) for one in said] == ["of 0", "of 1", "of 2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with closing(in_order(work, range(6), 3)) as results:
            assert [next(results), next(results)] == [-3, -6]


def test_calcium_side_by_side(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    cases = []
    for folder in ("images", "masks", "predicted"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate(NAMES):
        image = rng.normal(200, 80, (12, 11, 9)).astype(np.float32)
        mask = np.zeros(image.shape, np.uint8)
        mask[2:6, 2:6, 2 : 4 + number] = 1
        files = [tmp_path / folder / f"{name}.nii.gz" for folder in ("images", "masks", "predicted")]
        for path, values in zip(files, (image, mask, np.roll(mask, 1, 0)), strict=True):
            nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0])), path)
        cases.append(ListedCase(name, (files[0],), (files[1],), name))
    (tmp_path / "images" / "case1.nii.gz").unlink()
    (tmp_path / "predicted" / "case2.nii.gz").unlink()
    nib.save(nib.Nifti1Image(np.zeros((30, 30, 30)), np.eye(4)), tmp_path / "predicted" / "case3.nii.gz")
    listing = CaseList("pairs", tuple(cases), above_hu=130.0)
    used, first = set(), []
    real = calcium_files.compare_calcium

    def compare(*given):
        used.add(threading.current_thread())
        if first:  # as many calls as there are cores wait for each other
            first.pop().wait(LONG)
        return real(*given)

    monkeypatch.setattr(calcium_files, "compare_calcium", compare)
    found = {}
    for cores in (1, 3):
        monkeypatch.setattr(calcium_files, "usable_cores", lambda cores=cores: cores)
        used.clear()
        first.extend([threading.Barrier(cores)] * cores)
        rows, failures = found[cores] = evaluate_calcium(tmp_path / "predicted", listing, cases)
        assert len(used) == cores
        assert list(rows) == [name for name in NAMES if name != "case1"]
        assert list(failures) == ["case1"]
        assert {name: (row["missing"], row["failed"]) for name, row in rows.items() if name in ("case2", "case3")} == {
            "case2": (1, 0), "case3": (0, 1)
        }  # fmt: skip
    assert found[1] == found[3]
