"""Bars appear after two seconds and not before, and never end the work."""

import io
import itertools
import sys
import threading

import pytest

from grcsf_fast.runtime import progress


class Watched(io.StringIO):
    """A terminal that tells when a text appears on it."""

    def __init__(self, text):
        super().__init__()
        self.text, self.seen = text, threading.Event()

    def write(self, text):
        super().write(text)
        if self.text in self.getvalue():
            self.seen.set()


def test_busy_for_long(monkeypatch):
    terminal = Watched("waiting for it")
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.busy("waiting for it"):
        assert terminal.seen.wait(60)


def test_busy_for_a_moment(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 1000.0)
    with progress.busy("waiting for it"):
        pass
    assert capsys.readouterr().err == ""


@pytest.fixture
def seconds(monkeypatch):
    """A clock that goes on by a second whenever a bar looks."""
    clock = itertools.count()
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))


def test_counter_moves(capsys, monkeypatch, seconds):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.counter("slices") as update:
        for done in (4, 8, 10):
            update(done, 10)
    shown = capsys.readouterr().err
    assert "4/10" in shown
    assert "8/10" in shown


def test_nothing_is_shown_where_nothing_is_wanted(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.counter("slices", shown=False) as update, progress.busy("waiting", shown=False):
        update(1, 2)
    assert capsys.readouterr().err == ""


class Gone(io.StringIO):
    def write(self, text=""):
        raise BrokenPipeError

    flush = write


@pytest.mark.parametrize("terminal", [None, Gone()])
def test_a_terminal_that_is_gone_ends_no_work(terminal, monkeypatch, seconds):
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    assert list(progress.bar("items")(range(4))) == [0, 1, 2, 3]
    with progress.counter("slices") as update:
        for done in range(4):
            update(done, 4)
