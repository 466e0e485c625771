"""Bars appear after two seconds and not before."""

import time

import pytest

from grcsf_fast import progress


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, False), (0.9, True)])
def test_busy(seconds, shown, capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.1)
    with progress.busy("waiting for it"):
        time.sleep(seconds)
    assert ("waiting for it" in capsys.readouterr().err) == shown


def test_counter_moves(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.counter("slices") as update:
        for done in (4, 8, 10):
            time.sleep(0.3)
            update(done, 10)
    shown = capsys.readouterr().err
    assert "4/10" in shown
    assert "8/10" in shown


def test_nothing_is_shown_where_nothing_is_wanted(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.counter("slices", shown=False) as update, progress.busy("waiting", shown=False):
        update(1, 2)
    assert capsys.readouterr().err == ""
