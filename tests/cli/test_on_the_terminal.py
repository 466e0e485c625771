"""What is printed: names cannot move the cursor or forge lines, and an output that is full is said to be so."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from heads import SPACING, noise, tiny_bundle, write

from grcsf_fast.cli import main, predict, program
from grcsf_fast.cli.shared import in_lines, printable, report_failures
from grcsf_fast.errors import ArgumentError, UnfinishedError
from grcsf_fast.pretrained.bundle import save_bundle

GRID = np.diag([*SPACING, 1.0])
EVIL = "\x1b]0;owned\x07\x1b[2Jx\r\n0 of 9 cases failed:\n  ok\u2028\u202egnp\u2066\x9b\x7f"
SHOWN = r"\x1b]0;owned\x07\x1b[2Jx\r\n0 of 9 cases failed:\n  ok\u2028\u202egnp\u2066\x9b\x7f"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_bundle(tiny_bundle(), tmp_path_factory.mktemp("bundle") / "tiny")


def harmless(text: str) -> bool:
    return not any(character in text for character in set(EVIL) - set("x09abcdefghijklmnopqrstuvwyz :[];J2\n"))


def test_controls_are_shown():
    assert printable(EVIL) == SHOWN
    assert printable("é \u05e9\u05dc\u05d5\u05dd \u0645\u06cc\u200c\u062e \U0001f9e0 \\n") == (
        "é \u05e9\u05dc\u05d5\u05dd \u0645\u06cc\u200c\u062e \U0001f9e0 \\n"
    )
    assert printable("\t") == r"\t"
    assert in_lines("a\nb\x1b\n") == "a\n  b\\x1b"


@pytest.mark.parametrize(("ml", "text"), [(0.0, "0.00"), (12.3456, "12.35"), (0.005, "0.01"), (1e-6, "1e-06")])
def test_a_volume_is_not_said_to_be_none(ml, text):
    report = {"case": "a", "lesion_count": 1, "total_volume_ml": ml, "settings": {"backend": "cpu", "precision": "p"}}
    assert predict._described(report) == f"a: 1 lesions, {text} mL, backend cpu, p"


def test_failures_are_a_line_each(capsys):
    traceback = "/a/b.nii: unexpected error\nTraceback (most recent call last):\n  File \x1b\nZeroDivisionError: x\n"
    assert report_failures({EVIL: f"{EVIL}: expected a head", "b": traceback}, 3) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["2 of 3 cases failed:", f"  {SHOWN}: {SHOWN}: expected a head"]
    assert lines[2:4] == ["  b: /a/b.nii: unexpected error", "  Traceback (most recent call last):"]
    assert lines[4:] == ["    File \\x1b", "  ZeroDivisionError: x"]


def test_errors_are_in_one_line(capsys, monkeypatch):
    def run(error):
        def fail(options):
            raise error

        monkeypatch.setattr(predict, "run", fail)
        code = main(["predict", "-i", "a", "-o", "b"])
        return code, capsys.readouterr().err

    assert run(ArgumentError(f"{EVIL}: expected")) == (2, "error: " + SHOWN.replace(r"\n  ", "\n  ") + ": expected\n")
    assert run(ArgumentError("a\nerror: b")) == (2, "error: a\\nerror: b\n")
    assert run(OSError("a\x1b\n")) == (2, "error: a\\x1b\\n\n")
    assert run(UnfinishedError("a\x1b\nstopped")) == (1, "error: a\\x1b\n  stopped\n")
    assert run(KeyboardInterrupt("a\x1b\nerror: b")) == (130, "a\\x1b\n  error: b\n")
    assert run(MemoryError("a\x1b\nb")) == (2, "error: not enough memory, try a smaller --batch-size: a\\x1b\n  b\n")
    code, said = run(ZeroDivisionError("a\x1b\nforged"))
    assert code == 70
    assert "\n  ZeroDivisionError: a\\x1b\n  forged\nerror: this is a bug" in said


def test_arguments_that_are_refused_are_in_one_line(capsys):
    assert main(["info", EVIL]) == 2
    said = capsys.readouterr().err
    assert said.startswith("grcsf-fast: error: unrecognized arguments: " + SHOWN)
    assert said.count("\n") == 1


def test_warnings_are_in_one_line(capsys, monkeypatch):
    def warn(options):
        warnings.warn_explicit(f"{EVIL}: odd", UserWarning, program.__file__, 1)
        warnings.warn_explicit("a\x1b\nforged", UserWarning, "/other.py", 1)
        return 0

    monkeypatch.setattr(predict, "run", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *given: sys.stderr.write(warnings.formatwarning(*given[:4]))
        assert main(["predict", "-i", "a", "-o", "b"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {SHOWN}: odd\n")
    assert said.endswith("/other.py:1: UserWarning: a\\x1b\n  forged\n")


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_such_names(bundle, tmp_path, capfd):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("good", "\x1b[2Jx\n0 of 9 cases failed:\n  z", "\u202egnp"):
        write(scans / f"{name}.nii.gz", noise(24, 24, 8), GRID)
        write(scans / f"{name}_flat.nii.gz", np.full((9, 9, 9), 7, np.int16), GRID)
    folder = ("-i", str(scans), "-o", str(tmp_path / "out"), "-m", str(bundle))
    assert main(["predict", *folder]) == 1
    assert main(["predict", "-i", str(scans / "\u202egnp_flat.nii.gz"), *folder[2:]]) == 2
    out, err = capfd.readouterr()
    for text in (out, err):
        assert not {"\x1b", "\u202e"} & set(text)
        assert "\n0 of 9" not in text
    assert "\n" + r"\x1b[2Jx\n0 of 9 cases failed:\n  z: " in "\n" + out
    assert r"  \u202egnp_flat: " in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output(bundle, tmp_path, unbuffered):
    """Where Python keeps the text back, and where it does not."""
    write(tmp_path / "scan.nii.gz", noise(24, 24, 8), GRID)
    command = [sys.executable, "-m", "grcsf_fast", "predict", "-m", str(bundle), "-i", str(tmp_path / "scan.nii.gz")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "-o", str(tmp_path / "out"), "--precision", "float32"],
            stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.endswith(
        "error: standard output could not be written: No space left on device; what is written is whole, the same "
        "command goes on from there\n"
    )
    assert "Exception ignored" not in done.stderr
    assert (tmp_path / "out" / "scan_report.json").exists()
