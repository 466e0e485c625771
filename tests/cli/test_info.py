"""What ``info`` says of the precision that ``auto`` takes."""

import builtins

import pytest

from grcsf_fast import Predictor
from grcsf_fast.cli import main
from grcsf_fast.runtime import precision
from grcsf_fast.runtime.precision import Choice


def said(capsys) -> list[str]:
    assert main(["info", "--device", "cpu"]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("precision")]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """As on a processor that multiplies bfloat16, nothing kept; counts the measurements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(precision, "_choices", {})
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)
    found = []

    def speed(run):
        found.append(run)
        return 1.5

    monkeypatch.setattr(precision, "_speed_of_bfloat16", speed)
    return found


def test_the_precision_and_why(measured, monkeypatch, capsys):
    """It is the one that predict takes, measured once and then read from where it is kept."""
    line = "precision auto: bfloat16; bfloat16 was measured 1.50 times as fast as float32 here, by bundle demo"
    assert said(capsys) == [line]
    monkeypatch.setattr(precision, "_choices", {})
    assert said(capsys) == [line]
    assert Predictor("demo", "cpu").precision == "bfloat16"
    assert len(measured) == 1


def test_no_network_is_loaded_where_there_is_nothing_to_measure(monkeypatch, capsys):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr("grcsf_fast.cli.info.Predictor", lambda *arguments: pytest.fail("loaded"))
    assert said(capsys) == ["precision auto: float32; no instructions for bfloat16 here"]


def test_what_keeps_it_from_being_measured(measured, monkeypatch, capsys):
    """A package that is missing, or a backend that cannot run: info still says the rest."""
    imported = builtins.__import__

    def missing(name, *others):
        if name.startswith("safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *others)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", missing)
        (line,) = said(capsys)
        assert line.startswith("precision auto: not measured; No module named 'safetensors")
    monkeypatch.setenv("GRCSF_BACKEND", "abacus")
    (line,) = said(capsys)
    assert line.startswith("precision auto: not measured; environment variable GRCSF_BACKEND: expected")
    monkeypatch.delenv("GRCSF_BACKEND")
    monkeypatch.setattr("grcsf_fast.inference.model.measured_choice", lambda *_: Choice("float32", "by the test"))
    assert said(capsys) == ["precision auto: float32; by the test, by bundle demo"]
