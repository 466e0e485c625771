"""Bars appear after two seconds and not before, and never end the work."""

import io
import itertools
import re
import sys
import threading

import pytest

from grcsf_fast.runtime import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Watched(Terminal):
    """Tells when a text appears on it."""

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


def test_counter_moves(monkeypatch, seconds):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.counter("slices") as update:
        for done in (4, 8, 10):
            update(done, 10)
    shown = sys.stderr.getvalue()
    assert "4/10" in shown
    assert "8/10" in shown
    assert "\r" in shown


def test_nothing_is_shown_where_nothing_is_wanted(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.counter("slices", shown=False) as update, progress.busy("waiting", shown=False):
        update(1, 2)
    assert capsys.readouterr().err == ""


class Gone(io.StringIO):
    def write(self, text=""):
        raise BrokenPipeError

    flush = write


class GoneTerminal(Gone, Terminal):
    pass


@pytest.mark.parametrize("terminal", [None, Gone(), GoneTerminal()])
def test_a_terminal_that_is_gone_ends_no_work(terminal, monkeypatch, seconds):
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    assert list(progress.bar("items")(range(4))) == [0, 1, 2, 3]
    with progress.counter("slices") as update:
        for done in range(4):
            update(done, 4)


def job(monkeypatch):
    """A job's log, and what takes a step of its work, which lasts 20 s."""
    log, clock = io.StringIO(), [0]
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "monotonic", lambda: clock[0])

    def step():
        clock[0] += 20

    return log, step


def test_a_line_a_minute_in_a_file(monkeypatch, seconds):
    """Each bar its own, inside of another one too; one that stays says at the end how far it came."""
    log, step = job(monkeypatch)
    with progress.steps(7, 0, "training") as outer:
        for _ in range(7):
            step()
            outer.update()
        for _ in progress.bar("validation")(range(4)):
            step()
    lines = log.getvalue().splitlines(keepends=True)
    assert [re.sub(r":.*?(\d/\d).*\n", r" \1", line) for line in lines] == [
        "training 3/7", "training 6/7", "validation 3/4", "training 7/7",
    ]  # fmt: skip
    assert all(line.endswith("\n") for line in lines)
    assert not set("\r\x1b") & set(log.getvalue())


def test_less_than_a_minute_leaves_no_line_in_a_file(monkeypatch, seconds):
    log, step = job(monkeypatch)
    for _ in progress.bar("cases")(range(2)):
        step()
    with progress.counter("slices") as update:
        for done in range(3):
            update(done, 3)
            step()
    assert log.getvalue() == ""


def test_busy_for_minutes_in_a_file(monkeypatch):
    """Looks every half second, of which one in 120 is written."""
    looks, enough = itertools.count(), threading.Event()

    def half_seconds():
        if (number := next(looks)) == 400:
            enough.set()
        return number / 2

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "TICK", 0.0)
    monkeypatch.setattr(progress, "monotonic", half_seconds)
    with progress.busy("waiting for it"):
        assert enough.wait(60)
    lines = sys.stderr.getvalue().splitlines(keepends=True)
    assert 2 <= len(lines) <= next(looks) / 120
    assert all(line.startswith("waiting for it ") and line.endswith("\n") for line in lines)
