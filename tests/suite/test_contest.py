"""Contests of the benchmark suite, on made-up calls."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.contest import (
    Contest,
    Contestant,
    Pace,
    ProcessorClock,
    largest_error,
    relative_error,
    too_short,
)  # fmt: skip


def contest(log: list[str] | None = None, **calls) -> Contest:
    """Of calls that should give ones; each name is logged when it runs."""

    def entries():
        def build(name):
            def step():
                if log is not None:
                    log.append(name)
                return calls[name]()

            return [step]

        return {name: Contestant(lambda name=name: build(name), exact, 1e-6, ours=name == "ours") for name in calls}

    def exact():
        return [torch.ones(2, dtype=torch.float64)]

    return Contest("a thing", "2", "float32", ("forward",), tuple(calls), entries, "reference", threads=2)


def right():
    return [torch.ones(2)]


def fail_silently():
    raise MemoryError


def refuse():
    raise NotImplementedError("not on this device\nand more")


def test_wrong_and_raising_contestants_get_no_time():
    calls = {"ours": right, "wrong": lambda: [torch.full((2,), 1.1)], "raising": refuse, "silent": fail_silently}
    found = contest(**calls).run(Pace(3, 1e-3, 1e-4, 2))
    assert found["ours"].reason is None
    assert len(found["ours"].seconds["forward"]) >= 2
    assert found["wrong"].seconds == found["raising"].seconds == {}
    assert found["wrong"].reason.startswith("wrong by 5.0e-02")
    assert found["raising"].reason == "NotImplementedError: not on this device"
    assert found["silent"].reason == "MemoryError: "


@pytest.mark.parametrize("error", [largest_error, relative_error])
def test_nan_is_wrong_wherever_it_stands(error):
    whole, broken = torch.ones(2), torch.tensor([1.0, torch.nan])
    exact = [torch.ones(2, dtype=torch.float64)] * 2
    assert error([whole, whole], exact) == 0
    for results in ([whole, broken], [broken, whole]):
        assert not error(results, exact) <= 1


def test_nan_gets_no_time():
    assert contest(ours=lambda: [torch.full((2,), torch.nan)]).run(None)["ours"].reason is not None


def test_without_a_pace_nothing_is_timed():
    log = []
    found = contest(log, ours=right, reference=right).run(None)
    assert log == ["ours", "reference"]
    assert found["ours"].seconds == {}
    assert found["ours"].first_call > 0


def test_rounds_are_interleaved_and_begin_with_another_contestant_each_time():
    log = []
    # Blocks so short that a block is a call; rounds are what ends it.
    found = contest(log, a=right, b=right, c=right).run(Pace(4, 1e9, 1e-9, 4))
    rounds, memory = "".join(log[-15:-3]), "".join(log[-3:])
    assert (rounds, memory) == ("abcbcacababc", "abc")
    assert [len(one.seconds["forward"]) for one in found.values()] == [4, 4, 4]


def test_backward_is_the_last_step_of_a_call():
    def entries():
        return {"ours": Contestant(lambda: [lambda: 1, lambda value: right()], lambda: right(), 1e-6)}

    found = Contest("a", "b", "c", ("backward", "both"), ("ours",), entries, "ours", 2).run(Pace(3, 1e9, 0, 3))
    backward, both = (found["ours"].seconds[passed] for passed in ("backward", "both"))
    assert all(0 < part < whole for part, whole in zip(backward, both, strict=True))


def test_what_is_too_short_says_so():
    assert too_short(9, 0.9) == "fewer than 20 rounds and 1 s: 9 rounds, 0.90 s"
    assert too_short(10, 1.01) is None
    assert too_short(20, 0.02) is None


def test_processes_that_share_a_pace_have_enough_together():
    pace = Pace(rounds=20, seconds=1.0, least=3)
    for processes in (1, 3, 7):
        one = pace.shared(processes)
        assert processes * one.rounds >= 20
        assert processes * one.seconds >= 1 - 1e-9
        assert processes * one.least >= 3
    assert pace.shared(1) == pace


def test_turns_are_enough_short_and_many():
    pace = Pace(rounds=20, seconds=1.0, block=0.02, least=5)
    assert pace.turns({"ours": 0.001, "other": 0.002}, 0.004) == (20, {"ours": 4, "other": 4})
    rounds, repeats = replace(pace, least=2).turns({"ours": 0.01, "other": 2.0}, 0.0)
    assert rounds == 2
    assert repeats["other"] == 1
    assert rounds * repeats["ours"] * 0.01 > 1
    assert replace(pace, least=1).turns({"ours": 3.0}, 0.0) == (1, {"ours": 1})
    assert pace.shared(3).turns({"ours": 0.2, "other": 0.2}, 0.0) == (2, {"ours": 1, "other": 1})


def test_long_calls_are_one_a_turn_and_the_trial_counts():
    log = []
    long = replace(contest(log, a=right, b=right), long=True)
    found = long.run(Pace(4, 1e9, 1e-9, 3), check=False)
    assert log == [*"ab", *"ab", *"abba"]  # first calls, trial, two rounds
    assert [len(one.seconds["forward"]) for one in found.values()] == [3, 3]


def test_another_process_than_the_first_takes_times_alone():
    log = []
    found = contest(log, ours=right, other=refuse).run(Pace(4, 1e9, 1e-9, 4), check=False)
    assert len(found["ours"].seconds["forward"]) == 4
    assert found["ours"].error is found["ours"].peak_bytes is None
    assert found["other"].reason == "NotImplementedError: not on this device"
    assert log.count("ours") == 1 + 1 + 3 + 4  # first call, trial, again since it is short, rounds; none for memory


def test_the_relative_error_of_nothing_is_one():
    exact = [torch.randn(3), torch.randn(4)]
    assert relative_error([torch.zeros(3), torch.zeros(4)], exact) == pytest.approx(1)
    assert relative_error(exact, exact) == 0


@pytest.mark.parametrize("size", [24, 64])
def test_memory_that_earlier_calls_left_behind_counts_all_the_same(size):
    """Of so many MiB glibc keeps the fewer when they are freed, from the second call on; the more go back at once."""
    clock = ProcessorClock(cold=True)

    def call():
        return torch.ones(size * 2**18).sum()

    call()
    call()
    grown, _ = clock.peak_growth([call])
    if grown is None:
        pytest.skip("no /proc")
    # What else the process does, and what the system counts late, is far less than these 4.
    assert (size - 4) * 2**20 <= grown <= (size + 4) * 2**20


def test_cold_caches_are_outside_the_time(monkeypatch):
    """By a clock that moves with what is done alone: clearing the caches takes 100 s, two steps 1 s and 2 s."""
    assert ProcessorClock(cold=False).flush is None
    clock = ProcessorClock(cold=True)
    assert clock.flush.nbytes >= 2**26
    done, took = [], {"clear": 100.0, "first": 1.0, "second": 2.0}
    monkeypatch.setattr("benchmarks.contest.time.perf_counter", lambda: sum(took[one] for one in done))
    monkeypatch.setattr(clock, "flush", SimpleNamespace(sum=lambda: done.append("clear")))
    steps = [lambda: done.append("first"), lambda value: done.append("second")]
    assert clock.block(steps, 5) == [1.0, 2.0]
    assert done == ["clear", "first", "second"] * 5
