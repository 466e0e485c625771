"""Torch's threads for a while: one, in several threads at once, and works side by side."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

from grcsf_fast.runtime import threads
from grcsf_fast.runtime.threads import one_thread, side_by_side, threads_outside


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_blocks_within_each_other():
    with one_thread():
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == of_a_new_thread() == 1
        assert threads_outside() == 2
    assert torch.get_num_threads() == of_a_new_thread() == threads_outside() == 2


def test_blocks_that_overlap_in_two_threads():
    """Each thread has its number back at the end of its own block, a new one when all have ended."""
    opened, both, closed = threading.Event(), threading.Event(), threading.Event()
    found = []

    def first():
        found.append(torch.get_num_threads())
        with one_thread():
            opened.set()
            both.wait()
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads())
        closed.set()

    thread = threading.Thread(target=first)
    thread.start()
    opened.wait()
    with one_thread():
        both.set()
        closed.wait()
        assert torch.get_num_threads() == of_a_new_thread() == 1
        assert threads_outside() == 2
    thread.join()
    assert found == [2, 1, 2]
    assert torch.get_num_threads() == of_a_new_thread() == 2


@pytest.mark.parametrize("ends_last", [False, True])
def test_each_thread_has_its_own_number_back(ends_last):
    """And one that starts when all have ended that of the first."""
    opened, go_on = threading.Event(), threading.Event()
    found = []

    def other():
        torch.set_num_threads(3)  # before it has computed anything
        found.append(threads_outside())
        with one_thread():
            found.extend([torch.get_num_threads(), threads_outside()])
            opened.set()
            go_on.wait(60)
        found.extend([torch.get_num_threads(), threads_outside()])

    thread = threading.Thread(target=other)
    with one_thread():
        thread.start()
        opened.wait(60)
        if not ends_last:
            go_on.set()
            thread.join()
            assert of_a_new_thread() == 1
        assert (torch.get_num_threads(), threads_outside()) == (1, 2)
    if ends_last:
        assert (torch.get_num_threads(), of_a_new_thread()) == (2, 1)
        go_on.set()
        thread.join()
    assert found == [3, 1, 3, 3, 3]
    assert torch.get_num_threads() == of_a_new_thread() == threads_outside() == 2


def test_a_thread_that_starts_within_a_block():
    """It has 1 of its own, before and after a block, and knows the number outside."""
    found = []

    def started():
        found.append((torch.get_num_threads(), threads_outside()))
        with one_thread():
            found.append((torch.get_num_threads(), threads_outside()))
        found.append((torch.get_num_threads(), threads_outside()))

    with one_thread():
        thread = threading.Thread(target=started)
        thread.start()
        thread.join()
        assert of_a_new_thread() == 1
    assert found == [(1, 2)] * 3


def test_a_block_that_another_thread_ends():
    """As a generator's, which may be collected anywhere: that thread keeps its number."""
    block, found = one_thread(), []

    def opens():
        block.__enter__()

    def ends():
        torch.set_num_threads(3)
        block.__exit__(None, None, None)
        found.append(torch.get_num_threads())

    for work in (opens, ends):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [3]
    assert torch.get_num_threads() == of_a_new_thread() == threads_outside() == 2


FORKED = """
import os, signal, sys, threading, torch
from grcsf_fast.runtime import threads

torch.set_num_threads(2)
held, over = threading.Event(), threading.Event()

def hold():
    with threads._blocks.lock:
        held.set()
        over.wait()

thread = threading.Thread(target=hold)
with threads.one_thread():
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # ends it where it waits for the lock
        with threads.one_thread():
            within = torch.get_num_threads(), threads.threads_outside()
    else:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        over.set()
        thread.join()
if child == 0:
    os._exit(0 if (*within, torch.get_num_threads()) == (1, 2, 2) else 1)
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_forked_within_a_block_while_another_thread_holds_the_lock():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_blocks_of_threads_that_a_forked_process_lacks(monkeypatch):
    """They are not open there; one that is collected there changes nothing."""
    monkeypatch.setattr(threads, "_blocks", threads._Blocks())
    block = one_thread()
    thread = threading.Thread(target=block.__enter__)
    thread.start()
    thread.join()
    assert of_a_new_thread() == 1
    threads._begin_anew()
    block.__exit__(None, None, None)
    assert not threads._blocks.open.total()
    with one_thread():
        assert threads_outside() == 2
    assert torch.get_num_threads() == of_a_new_thread() == 2


@pytest.mark.parametrize("number", [1, 2, 3])
def test_works_side_by_side(number):
    """As many at a time as torch has threads, each with one of them; in the caller's own where there is one."""
    torch.set_num_threads(number)
    seen, barrier = [], threading.Barrier(min(number, 2))

    def work():
        barrier.wait(60)  # until as many are here
        seen.append((threading.get_ident(), torch.get_num_threads()))

    side_by_side([work] * 4)
    assert [threads for _, threads in seen] == [1] * 4
    assert (threading.get_ident() in {thread for thread, _ in seen}) == (number == 1)
    assert torch.get_num_threads() == number


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_of_one_of_the_works(number):
    torch.set_num_threads(number)
    done = []

    def fails():
        raise OSError("made by the test")

    with pytest.raises(OSError, match="made by the test"):
        side_by_side([partial(done.append, 1), fails])
    assert done == [1]
    assert torch.get_num_threads() == number
