"""Cases of a list that cannot be done: each fails alone; a list that no file system can serve is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from heads import SPACING, noise, tiny_bundle, write

from grcsf_fast.cli import main
from grcsf_fast.data.failures import read_failures
from grcsf_fast.datasets.cases_file import CasesError, read_cases
from grcsf_fast.inference.share import read_rows
from grcsf_fast.pretrained.bundle import save_bundle

GRID = np.diag([*SPACING, 1.0])
LIST = {
    "format": "grcsf-fast cases", "version": 1, "layout": "pairs", "channels": ["image"], "label_names": {},
    "labels": None, "above_hu": None, "folds": 0, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_bundle(tiny_bundle(), tmp_path_factory.mktemp("bundle") / "tiny")


def case(name, *files, **more):
    images = [{"file": file} for file in files]
    return {"name": name, "images": images, "masks": [], "fold": None, "subject": name, "site": None,
            "lesion_ml": None, **more}  # fmt: skip


def written(folder, *cases):
    path = folder / "list.json"
    path.write_text(json.dumps({**LIST, "cases": cases}))
    return path


def predict(listing, output, bundle, *more):
    return main(["predict", "--cases", str(listing), "-o", str(output), "-m", str(bundle), *more])


def test_each_fails_alone(bundle, tmp_path, capsys):
    write(tmp_path / "good.nii.gz", noise(24, 24, 8), GRID)
    write(tmp_path / "other.nii.gz", noise(24, 24, 8) + 1, GRID)
    (tmp_path / "circle").symlink_to("circle")
    bad = {
        "long": case("long", f"{'x' * 300}.nii.gz"),
        "long_folder": case("long_folder", f"{'x' * 300}/a.nii.gz", masks=[f"{'y' * 300}.nii.gz"]),
        "deep": case("deep", "d/" * 3000 + "a.nii.gz"),
        "circle": case("circle", "circle/a.nii.gz"),
        "several": case("several", "good.nii.gz", "other.nii.gz"),
        "folder": case("folder", ""),
        "no_axis": case("no_axis", images=[{"file": "other.nii.gz", "channel": 10**30}]),
        "below": case("below", images=[{"file": "other.nii.gz", "channel": -1}]),
    }
    listing = written(tmp_path, case("good", "good.nii.gz"), *bad.values())
    assert predict(listing, tmp_path / "out", bundle) == 1
    said = capsys.readouterr().err
    assert f"{len(bad)} of {len(bad) + 1} cases failed" in said
    assert "Traceback" not in said
    assert "several: expected one image" in said or "several: expected an image for each channel" in said
    assert set(read_failures(tmp_path / "out")) == set(bad)
    rows = read_rows(tmp_path / "out" / "summary.csv")
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(bad, "failed") | {"good": "done"}
    assert (tmp_path / "out" / "index.html").exists()


def test_a_file_that_may_not_be_looked_at(bundle, tmp_path, monkeypatch):
    """Tests may run as root, who may look at all."""
    write(tmp_path / "good.nii.gz", noise(24, 24, 8), GRID)
    real = os.stat

    def stat(path, *arguments, **named):
        if "secret" in os.fsdecode(path):
            raise PermissionError(13, "Permission denied", os.fsdecode(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(Path, "stat", lambda self, *, follow_symlinks=True: stat(self, follow_symlinks=follow_symlinks))
    listing = written(tmp_path, case("good", "good.nii.gz"), case("hidden", "secret/a.nii.gz", masks=["secret/m.nii"]))
    assert predict(listing, tmp_path / "out", bundle) == 1
    assert set(read_failures(tmp_path / "out")) == {"hidden"}
    assert (tmp_path / "out" / "good.nii.gz").exists()


def test_a_list_of_nothing_but_such_cases(bundle, tmp_path, capsys):
    listing = written(tmp_path, case("a", "x.nii", "y.nii"), case("b", "z.nii", "y.nii"))
    assert predict(listing, tmp_path / "out", bundle) == 2
    assert "error: a: expected an" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (case("\ud800", "a.nii"), r"case 1: expected a name that a file can have, found '\ud800'"),
        (case("a\0b", "a.nii"), r"case 1: expected a name that a file can have, found 'a\x00b'"),
        (
            case("x" * 249, "a.nii"),
            "case 1: expected a name of at most 248 bytes, as files of results begin with it, found one of 249, xx",
        ),
        (
            case("é" * 125, "a.nii"),
            "case 1: expected a name of at most 248 bytes, as files of results begin with it, found one of 250, é",
        ),
        (
            case("x", "\ud800.nii"),
            r"""case 1 (x): expected under "file" a name that a file can have, found '\ud800.nii'""",
        ),
        (case("x", "a\0.nii"), 'case 1 (x): expected under "file" a name that a file can have'),
        (case("x", "a.nii", masks=["\udfff"]), 'case 1 (x): expected under "masks" a name that a file can have'),
    ],
)
def test_names_that_no_file_can_have(bundle, tmp_path, capsys, one, message):
    listing = written(tmp_path, case("good", "good.nii.gz"), one)
    assert predict(listing, tmp_path / "out", bundle) == 2
    assert f"error: {listing}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["list", "folder"])
def test_names_that_are_too_long_for_results(bundle, tmp_path, form):
    """Each fails alone, before it is read; without what has the longest name some fit."""
    (tmp_path / "in").mkdir()
    names = ["good", "x" * 240, "x" * 248]
    for name in names:
        write(tmp_path / "in" / f"{name}.nii.gz", noise(24, 24, 8) + len(name), GRID)
    source = ["-i", str(tmp_path / "in")]
    if form == "list":
        source = ["--cases", str(written(tmp_path, *(case(name, f"in/{name}.nii.gz") for name in names)))]

    def failed(*options):
        assert main(["predict", *source, "-o", str(tmp_path / "out"), "-m", str(bundle), *options]) == 1
        return {name: one["error"] for name, one in read_failures(tmp_path / "out").items()}

    said = (
        f"{tmp_path}/out: expected a name of at most 236 bytes, as files of results begin with it, found one of "
        f"{{}}, {'x' * 20}..."
    )
    assert failed() == {"x" * size: said.format(size) for size in (240, 248)}
    assert (tmp_path / "out" / "good.nii.gz").exists()
    assert failed("--no-maps") == {"x" * 248: said.format(248)}
    assert (tmp_path / "out" / f"{names[1]}.nii.gz").exists()


@pytest.mark.slow
def test_names_that_the_locale_does_not_have(bundle, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.nii.gz", noise(24, 24, 8), GRID)
    changes = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "grcsf_fast", "predict", "-m", str(bundle), "-o", str(tmp_path / "out")]

    def said(*cases):
        listing = str(written(tmp_path, *cases))
        done = subprocess.run(
            [*command, "--cases", listing], capture_output=True, text=True, env={**os.environ, **changes}, check=False
        )
        return done.returncode, done.stderr

    code, error = said(case("a", "a.nii.gz"), case("é", "b.nii.gz"))
    assert code == 2
    assert r"expected names that files can have in this locale, whose encoding is ascii, found \xe9" in error
    code, error = said(case("a", "a.nii.gz"), case("b", "é.nii.gz"))
    assert code == 1
    assert r"\xe9.nii.gz: expected a NIfTI file, found none" in error
    assert (tmp_path / "out" / "a.nii.gz").exists()


def test_names_that_a_file_can_have(tmp_path):
    names = ["x" * 248, "é" * 124, b"caf\xe9".decode("utf-8", "surrogateescape"), "a\nb", "=1", "-a", " "]
    found = read_cases(written(tmp_path, *(case(name, "a.nii") for name in names)))
    assert [one.name for one in found.cases] == names


def test_channels_are_names(tmp_path):
    listing = tmp_path / "list.json"
    listing.write_text(json.dumps({**LIST, "channels": [1, {}], "cases": [case("a", "a.nii")]}))
    with pytest.raises(CasesError, match=r'the list: expected names under "channels", found \[1, \{\}\]'):
        read_cases(listing)
