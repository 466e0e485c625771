"""Torch's threads for a while: one, in several threads at once, and works side by side."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

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
