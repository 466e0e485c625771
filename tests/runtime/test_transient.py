"""Errors of a network's file system that pass."""

import errno
import os

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.data import images
from grcsf_fast.data.volumes import VolumeError, load_volume
from grcsf_fast.runtime import transient
from grcsf_fast.runtime.transient import patiently


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    waited = []
    monkeypatch.setattr(transient.time, "sleep", waited.append)
    return waited


def failing(number, times, wrap=None):
    """A reading that fails so many times, and is counted."""
    calls = []

    def read():
        calls.append(None)
        if len(calls) <= times:
            error = OSError(number, os.strerror(number), "scan.nii.gz")
            if wrap is None:
                raise error
            raise wrap("scan.nii.gz: could not be read") from error
        return "voxels"

    return read, calls


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
@pytest.mark.parametrize("wrap", [None, OSError, VolumeError])
def test_what_may_pass_is_tried_again(pauses, number, wrap):
    read, calls = failing(number, 3, wrap)
    with pytest.warns(UserWarning, match=r"^sub-1: .*scan.nii.gz.*; is tried again in ") as warned:
        assert patiently("sub-1", read) == "voxels"
    assert len(calls) == 4
    assert pauses == [1.0, 5.0, 30.0]
    assert [str(one.message).rsplit(" in ")[1] for one in warned] == ["1 s", "5 s", "30 s"]


def test_what_does_not_pass_is_an_error_in_the_end(pauses):
    read, calls = failing(errno.EIO, 9)
    with pytest.warns(UserWarning, match="tried again"), pytest.raises(OSError, match=r"scan\.nii\.gz") as caught:
        patiently("sub-1", read)
    assert caught.value.errno == errno.EIO
    assert len(calls) == 4
    assert len(pauses) == 3


@pytest.mark.parametrize("part", ["_read_header", "_InPieces"])
def test_a_volume_that_cannot_be_read_for_a_moment(pauses, monkeypatch, tmp_path, part):
    """It was opened, and header or voxels do not come: an error of a volume, made of the system's."""
    nib.save(nib.Nifti1Image(np.arange(64, dtype=np.float32).reshape(4, 4, 4), np.eye(4)), tmp_path / "scan.nii.gz")
    stale, real = [OSError(errno.EIO, os.strerror(errno.EIO))], getattr(images, part)

    def failing_once(given):
        if stale:
            raise stale.pop()
        return real(given)

    monkeypatch.setattr(images, part, failing_once)
    with pytest.warns(UserWarning, match=r"scan\.nii\.gz: .*Input/output error; is tried again in 1 s"):
        assert patiently("sub-1", lambda: load_volume(tmp_path / "scan.nii.gz")).data.max() == 63


@pytest.mark.parametrize(("number", "wrap"), [(errno.ENOENT, None), (errno.EACCES, OSError), (0, VolumeError)])
def test_other_errors_come_at_once(pauses, number, wrap):
    """Also that a file's content is wrong, which libraries say by an OSError without a number too."""
    read, calls = failing(number, 1, wrap)
    with pytest.raises((OSError, VolumeError)):
        patiently("sub-1", read)
    assert len(calls) == 1
    assert not pauses
