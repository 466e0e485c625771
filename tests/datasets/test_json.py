"""Files of JSON as others write them: UTF-8 whatever the locale, marked or not; what cannot be read is named."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grcsf_fast.data.files import sha256
from grcsf_fast.data.images import OneChannel
from grcsf_fast.data.reports import read_json, read_report
from grcsf_fast.datasets.cases_file import CasesError, read_cases
from grcsf_fast.datasets.dataset_json import read_json as read_object
from grcsf_fast.datasets.folders import LayoutError
from grcsf_fast.inference.sources import source_sha256

ONE = {
    "format": "grcsf-fast cases", "version": 1, "layout": "pairs", "channels": ["image"], "labels": None,
    "label_names": {"1": "lésion"}, "above_hu": None, "folds": 0, "seed": 0,
    "cases": [{"name": "é", "images": [{"file": "é.nii"}], "masks": [], "fold": None, "subject": "é", "site": None,
               "lesion_ml": None}],
}  # fmt: skip
BAD = {
    "deep": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "expected whole numbers of at most some thousand digits"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), "expected UTF-8, found the byte 0xe9 at 7"),
    "utf-16": ("{}".encode("utf-16"), "expected UTF-8, found the byte 0xff at 0"),
    "cut": (b'{"a"', "Expecting ':' delimiter"),
    "empty": (b"", "Expecting value"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8_with_or_without_a_mark(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ONE, ensure_ascii=False), encoding=encoding)
    assert read_json(path) == ONE
    assert read_cases(path).cases[0].name == "é"
    assert read_object(path, "of a data set") == ONE
    path.write_text(json.dumps({"outputs": {"é": ""}}, ensure_ascii=False), encoding=encoding)
    assert read_report(path) == {"outputs": {"é": ""}}


def test_whatever_the_locale(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ONE, ensure_ascii=False), encoding="utf-8")
    program = (
        f"from grcsf_fast.datasets.cases_file import read_cases; print(ascii(read_cases({str(path)!r}).label_names))"
    )
    changes = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **changes}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "{1: 'l\\xe9sion'}\n", done.stderr


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read(tmp_path, kind):
    content, message = BAD[kind]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path)
    assert str(path) not in str(caught.value)
    with pytest.raises(CasesError) as caught:
        read_cases(path)
    assert str(caught.value).startswith(f"{path}: expected JSON, could not read it: ")
    with pytest.raises(LayoutError) as caught:
        read_object(path, "of a data set")
    assert str(caught.value).startswith(f"{path}: expected JSON of a data set, could not read it: ")
    assert message in str(caught.value)
    assert read_report(path) == {}


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file whose reading fails")
def test_a_file_that_fails_while_it_is_read_is_named(tmp_path):
    """The memory of a process has nothing at its beginning: EIO, in which Python names no file."""
    path = tmp_path / "scan.nii"
    path.symlink_to("/proc/self/mem")
    for source in (path, str(path), OneChannel(path, 0)):
        with pytest.raises(OSError, match=r"\[Errno 5\] .*scan\.nii") as caught:
            source_sha256(source)
        assert caught.value.errno == 5
    (tmp_path / "whole").write_bytes(b"x")
    assert sha256(tmp_path / "whole") == hashlib.sha256(b"x").hexdigest()
    with pytest.raises(FileNotFoundError, match="nothing"):
        sha256(Path(tmp_path / "nothing"))
