"""The record of failures, where several programs write to one folder."""

import errno
import os

import pytest

from grcsf_fast.data import failures
from grcsf_fast.data.failures import change_failures, read_failures

fcntl = pytest.importorskip("fcntl")


def failure_of(name):
    return {name: {"input": "", "error": "made by the test", "traceback": ""}}


def locked(folder):
    own = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(own)
    return False


def test_programs_that_share_a_folder_change_the_record_one_after_the_other(tmp_path, monkeypatch):
    """From what a change reads up to what it writes the folder is locked, and no longer."""
    moments = []

    def watched(name, step):
        def run(*arguments):
            moments.append((name, locked(tmp_path)))
            return step(*arguments)

        return run

    for name in ("read_failures", "note_failures"):
        monkeypatch.setattr(failures, name, watched(name, getattr(failures, name)))
    for name in ("a", "b"):
        change_failures(tmp_path, failure_of(name))
    assert moments == [("read_failures", True), ("note_failures", True)] * 2
    assert not locked(tmp_path)
    assert set(read_failures(tmp_path)) == {"a", "b"}


def test_a_folder_that_cannot_be_locked_has_a_record_all_the_same(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.EBADF, "made by the test")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    change_failures(tmp_path, failure_of("a"))
    assert set(read_failures(tmp_path)) == {"a"}
