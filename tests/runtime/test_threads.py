"""One thread of torch's for a while, in several threads at once."""

from __future__ import annotations

import threading

import pytest
import torch

from grcsf_fast.runtime.threads import one_thread, threads_outside


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
