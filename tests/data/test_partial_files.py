"""What killed processes left of files that they were writing goes; what is being written stays."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

from grcsf_fast.data import files
from grcsf_fast.data.files import remove_partial, replace_when_done
from grcsf_fast.data.names import short_name


def partial(name, process, machine=None):
    return f".partial-{machine or files.this_machine()}-{process}-abcdef-{short_name(name)}"


def test_what_dead_processes_left_goes(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    # Of this process too: an earlier one had its number.
    gone = [partial("a.nii.gz", dead.pid), partial("a.nii.gz", os.getpid())]
    gone += [partial("b", dead.pid)]
    stay = [partial("a.nii.gz", 1), partial("a.nii.gz", dead.pid, "abcdef"), "a.nii.gz"]
    # Not named as ours are.
    stay += [f".partial-{dead.pid}-a.nii.gz", f".partial-{files.this_machine()}-{dead.pid}-abcdef-a.nii.gz"]
    for name in (*gone, *stay):
        (tmp_path / name).write_text("")
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)
    remove_partial(tmp_path / "none")
    # Of another machine, whose processes cannot be asked for.
    two_days_ago = time.time() - 2 * 86400
    os.utime(tmp_path / stay[1], (two_days_ago, two_days_ago))
    remove_partial(tmp_path)
    assert not (tmp_path / stay[1]).exists()


def test_what_may_not_be_removed_stays(tmp_path, monkeypatch):
    """In a folder where everybody removes files of his own alone, say."""
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()

    def unlink(path):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    left = tmp_path / partial("a.nii.gz", dead.pid)
    left.write_text("")
    monkeypatch.setattr(Path, "unlink", unlink)
    remove_partial(tmp_path)
    assert left.exists()
    remove_partial(left)  # which is no folder that can be looked through


def test_what_is_being_written_stays(tmp_path, monkeypatch):
    """Two threads, or a run within a run, write to the same name: each has a file of its own."""
    monkeypatch.chdir(tmp_path)
    with replace_when_done(tmp_path / "a.nii.gz") as (first,):
        first.write_text("first")
        remove_partial(tmp_path)
        remove_partial(".")
        with replace_when_done(tmp_path / "a.nii.gz") as (second,):
            second.write_text("second")
        assert (tmp_path / "a.nii.gz").read_text() == "second"
    assert (tmp_path / "a.nii.gz").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]
