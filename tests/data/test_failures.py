"""The record of failures, where several programs write to one folder."""

import errno
import json
import os

import pytest
from locks import locked

from grcsf_fast.data import failures
from grcsf_fast.data.failures import change_failures, note_failures, read_failures

fcntl = pytest.importorskip("fcntl")


def failure_of(name):
    return {name: {"input": "", "error": "made by the test", "traceback": ""}}


def test_programs_that_share_a_folder_change_the_record_one_after_the_other(tmp_path, monkeypatch):
    """From what a change reads up to what it writes the folder is locked, and no longer."""
    moments = []

    def watched(name, step):
        def run(*arguments):
            moments.append((name, locked(tmp_path)))
            return step(*arguments)

        return run

    for name in ("_read", "_write"):
        monkeypatch.setattr(failures, name, watched(name, getattr(failures, name)))
    for name in ("a", "b"):
        change_failures(tmp_path, failure_of(name))
    assert moments == [("_read", True), ("_write", True)] * 2
    note_failures(tmp_path, "1", failure_of("c"))
    assert moments[4:] == [("_read", True), ("_write", True)]
    assert not locked(tmp_path)
    assert set(read_failures(tmp_path)) == {"a", "b", "c"}


def test_a_folder_that_somebody_holds_for_long_is_not_waited_for_forever(tmp_path, monkeypatch):
    """As by `flock results grcsf-fast predict ...`."""
    monkeypatch.setattr(failures, "SECONDS_OF_A_CHANGE", 0.2)
    held = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        change_failures(tmp_path, failure_of("a"))
        assert locked(tmp_path)
    finally:
        os.close(held)
    assert set(read_failures(tmp_path)) == {"a"}


def test_a_part_that_another_program_has_just_put_together(tmp_path, monkeypatch):
    change_failures(tmp_path, failure_of("a"))
    parts = failures._parts
    monkeypatch.setattr(failures, "_parts", lambda folder: [*parts(folder), tmp_path / "failures.1.json"])
    assert set(read_failures(tmp_path)) == {"a"}


def test_a_folder_on_nfs_is_locked_by_a_file_in_it(tmp_path, monkeypatch):
    """There a lock wants an opening to write with, which a folder has none of."""
    real, moments = fcntl.flock, []

    def of_files_alone(held, operation):
        if not fcntl.fcntl(held, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(errno.EBADF, "made by the test")
        real(held, operation)

    def watched(contents):
        with pytest.raises(BlockingIOError), (tmp_path / failures.LOCK_NAME).open("r+") as other:
            real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        moments.append(contents)
        return found(contents)

    found = failures._failures_in
    monkeypatch.setattr(fcntl, "flock", of_files_alone)
    with monkeypatch.context() as context:
        context.setattr(failures, "_failures_in", watched)
        change_failures(tmp_path, failure_of("a"))
    assert len(moments) == 1
    with (tmp_path / failures.LOCK_NAME).open("r+") as other:
        real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert set(read_failures(tmp_path)) == {"a"}


def test_a_folder_that_cannot_be_locked_has_a_record_all_the_same(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.EBADF, "made by the test")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    change_failures(tmp_path, failure_of("a"))
    assert set(read_failures(tmp_path)) == {"a"}


@pytest.mark.parametrize("add", [failure_of("a"), {}])
def test_a_part_that_another_machine_writes_meanwhile_stays(tmp_path, monkeypatch, add):
    """Where locks do not hold: between what a change reads and what it takes away."""
    note_failures(tmp_path, "1-of-2", failure_of("b"))
    note_failures(tmp_path, "2-of-2", failure_of("c"))
    real = failures._failures_in

    def late(contents):
        found = real(contents)
        (tmp_path / "failures.2-of-2.json").write_text(json.dumps(failure_of("c") | failure_of("late")))
        return found

    with monkeypatch.context() as context:
        context.setattr(failures, "_failures_in", late)
        change_failures(tmp_path, add, lambda name, one: True)
    assert not (tmp_path / "failures.1-of-2.json").exists()
    assert set(read_failures(tmp_path)) == {*add, "c", "late"}
    change_failures(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["failures.json"]
