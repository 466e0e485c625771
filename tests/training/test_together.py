"""Trainings in several processes: the same curves to rounding, one log, and an end for all if one dies."""

import os
import shutil
import signal
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from cancelled import cancelled
from ports import held_port
from torch.distributed import TCPStore
from trainings import Kept, rows, run, tiny_network, weights

from grcsf_fast import GRCSFLoss
from grcsf_fast.errors import ArgumentError, UnfinishedError
from grcsf_fast.runtime.processes import (
    OtherEndedError,
    World,
    highest,
    one_of_many,
    said_by,
    sum_gradients,
    summed,
)
from grcsf_fast.training import loop

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


def in_two(work, port=None):
    """``work(world)`` in two processes that meet, at the port of a store or one of their own; their exit codes."""
    with held_port() if port is None else nullcontext(port) as place:
        children = [forked(work, rank, place) for rank in range(2)]
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def forked(work, rank, port):
    child = os.fork()
    if child != 0:
        return child
    code = 1
    try:
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(place)
        with one_of_many(torch.device("cpu")) as world:
            work(world)
        code = 0
    except UnfinishedError as error:
        print(error, file=sys.stderr, flush=True)
        code = 3
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def losses(output):
    """All columns of losses that are filled."""
    found = rows(output)
    return [[float(row[name]) for row in found] for name in found[0] if "loss" in name and found[0][name]]


def validations(output):
    """Both columns where they are filled."""
    found = rows(output)
    return [[float(row[name]) for row in found if row[name]] for name in found[0] if "validation" in name]


def assert_close(first, second, tolerance):
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=tolerance, atol=tolerance)


def test_what_processes_say_and_add_up(tmp_path):
    def work(world):
        assert said_by(world, 1, lambda: world.rank) == 1
        assert highest(world, 7 * world.rank) == 7
        own = torch.tensor([1.0, 2.0 + world.rank], requires_grad=True)
        total = summed(world, 3 * own)
        assert total.tolist() == [6.0, 15.0]
        total[1].backward()
        assert own.grad.tolist() == [0.0, 3.0]
        unused = torch.ones(2, requires_grad=True)
        if world.rank == 0:
            unused.grad = torch.full((2,), 5.0)
        sum_gradients(world, [own, torch.ones(1), unused])
        assert own.grad.tolist() == [0.0, 6.0]
        assert unused.grad.tolist() == [5.0, 5.0]

    assert in_two(work) == [0, 0]


@pytest.mark.parametrize("ignoring", [False, True])
def test_the_loss_of_two_halves_is_that_of_the_batch(ignoring):
    """Dice too, whose sums go over the batch: the mean of two halves is another number."""
    network = tiny_network(rcu_levels=())
    torch.manual_seed(3)
    image, mask = torch.randn(4, 1, 16, 16), torch.zeros(4, 1, 16, 16)
    mask[0, :, 3:9, 4:12] = 1
    ignored = torch.zeros(4, 1, 16, 16) if ignoring else None
    if ignored is not None:
        ignored[0, :, :5], ignored[3, :, 2:] = 1, 1
    criterion = GRCSFLoss()

    def loss_of(part):
        return criterion(network(image[part]), mask[part], None if ignored is None else ignored[part])

    whole = loss_of(slice(4))
    whole.backward()
    expected = [one.grad.clone() for one in network.parameters()]
    halves = [loss_of(half) for half in (slice(2), slice(2, 4))]
    assert abs(sum(halves) / 2 - whole) > 0.001

    def work(world):
        network.zero_grad()
        criterion.world = world
        half = slice(2 * world.rank, 2 * world.rank + 2)
        loss = loss_of(half)
        torch.testing.assert_close(loss, whole)
        loss.backward()
        sum_gradients(world, network.parameters())
        for one, gradient in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(one.grad, gradient, rtol=1e-4, atol=1e-6)

    assert in_two(work) == [0, 0]


@pytest.mark.parametrize("kind", [pytest.param("mae", marks=pytest.mark.slow), "network"])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_train_as_one(tmp_path, kind, workers):
    """The curves to rounding, with cases made here or by workers of each process."""
    validation = [Kept()[50], Kept()[51], Kept()[52]]
    alone, both = tmp_path / "alone", tmp_path / "both"
    run(kind, alone, validation=validation, accumulate=2)

    def work(world):
        run(kind, both, validation=validation[world.rank :: 2], accumulate=2, world=world, workers=workers)

    assert in_two(work) == [0, 0]
    for one, two in zip(losses(alone), losses(both), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert [row["step"] for row in rows(both)] == list("123456")
    assert [bool(row["validation_dice"]) for row in rows(both)] == [bool(row["validation_dice"]) for row in rows(alone)]
    for one, two in zip(validations(alone), validations(both), strict=True):
        assert len(one) == 2 * (kind == "network")
        assert two == pytest.approx(one, rel=1e-2)
    # Some have no effect and a gradient of rounding alone, which Adam makes steps of.
    counting = {name: tensor for name, tensor in weights(alone / "bundle").items() if not cancelled(name)}
    assert_close(counting, weights(both / "bundle"), 1e-3)


def test_a_training_goes_on_in_another_number_of_processes(tmp_path):
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    run("mae", alone, steps=3)
    shutil.copytree(alone, moved)
    run("mae", alone, resume=True)
    assert in_two(lambda world: run("mae", moved, resume=True, world=world)) == [0, 0]
    assert [row["step"] for row in rows(moved)] == list("123456")
    for one, two in zip(losses(alone), losses(moved), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert_close(weights(alone / "bundle"), weights(moved / "bundle"), 1e-3)


def test_a_signal_to_one_ends_all_after_the_same_step(tmp_path, monkeypatch, capfd):
    alone = weights(run("mae", tmp_path / "alone"))

    def work(world):
        if world.rank == 1:
            real, calls = loop._Training._update, []

            def signalled(self, *arguments):
                calls.append(1)
                if len(calls) == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                return real(self, *arguments)

            monkeypatch.setattr(loop._Training, "_update", signalled)
        run("mae", tmp_path / "both", world=world)

    assert in_two(work) == [1, 1]
    assert capfd.readouterr().err.count("stopped after step 4 of 6; step 4 is saved") == 2
    assert in_two(lambda world: run("mae", tmp_path / "both", resume=True, world=world)) == [0, 0]
    assert_close(alone, weights(tmp_path / "both" / "bundle"), 1e-3)


def test_a_process_that_dies_ends_the_other(tmp_path, monkeypatch, capfd):
    """What the first one had done is saved."""

    def work(world):
        if world.rank == 1:
            real = loop._Training._gradient

            def dying(self, loss, step):
                if step.number == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(self, loss, step)

            monkeypatch.setattr(loop._Training, "_gradient", dying)
        run("mae", tmp_path, world=world)

    assert in_two(work) == [3, -signal.SIGKILL]
    said = capfd.readouterr().err
    assert "another process ended before its work was done" in said
    assert "stopped after step 4 of 6; step 4 is saved" in said
    assert in_two(lambda world: run("mae", tmp_path, resume=True, world=world)) == [0, 0]
    assert [row["step"] for row in rows(tmp_path)] == list("123456")


@pytest.mark.parametrize(("device", "step"), [("cpu", 5), ("cuda", 3)])
def test_on_gpus_steps_that_another_process_has_not_ended_are_not_saved(device, step):
    """Their sums are still waited for there: to read the weights would have no end."""
    training = object.__new__(loop._Training)
    training.device, training.world, training.settings = torch.device(device), World(0, 2), SimpleNamespace(steps=6)
    training.whole, training.done, training.saved = True, 5, 3
    training.save = lambda: setattr(training, "saved", training.done)
    with pytest.raises(UnfinishedError, match=f"RANK 0 stopped after step 5 of 6; step {step} is saved"):
        training.stopped(OtherEndedError("RANK 1 ended with an error"))


@pytest.fixture
def held_store(monkeypatch):
    """The port of a store that is not in one of the processes, as torchrun has it."""
    with held_port() as port:
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        yield port
        del store


@pytest.mark.parametrize("failing", [{0}, {1}, {0, 1}])
def test_errors_are_named_with_their_processes(tmp_path, monkeypatch, capfd, held_store, failing):
    """By the one that has it and by the other."""

    def work(world):
        real = loop._Training._gradient

        def gradient(self, loss, step):
            if step.number == 2 and world.rank in failing:
                raise ArgumentError(f"this is wrong in {world.rank}\nand more")
            return real(self, loss, step)

        monkeypatch.setattr(loop._Training, "_gradient", gradient)
        run("mae", tmp_path, world=world)

    assert in_two(work, held_store) == [3, 3]
    said = capfd.readouterr().err
    for rank in range(2):
        assert said.count(f"RANK {rank} stopped after step 2 of 6; step 2 is saved") == 1
        assert said.count(f"this is wrong in {rank}\nand more") == (rank in failing)
        other = {1 - rank} & failing and rank not in failing
        assert said.count(f"RANK {1 - rank} ended with an error: this is wrong in {1 - rank}\n") == bool(other)
    assert "gloo" not in said


def test_a_bug_of_a_process_is_named_as_one(capfd, held_store):
    def work(world):
        if world.rank == 1:
            raise KeyError("x")
        highest(world, 0)

    assert in_two(work, held_store) == [3, 1]
    assert "RANK 1 ended with an error: KeyError: 'x'\n" in capfd.readouterr().err


def test_a_folder_of_another_training_ends_all(tmp_path, capfd):
    mark = tmp_path / "running.json"
    mark.write_text('{"host": "node7", "pid": 4, "machine": "another"}')
    assert in_two(lambda world: run("mae", tmp_path, world=world)) == [1, 3]
    assert f"{mark}: expected no training in this folder, found one, process 4 on node7" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["running.json"]


def test_checkpoints_of_several_machines_are_refused(tmp_path, capfd):
    """Each has a folder of its own, and one of them no checkpoint: gradients of different weights would be summed."""
    run("mae", tmp_path / "0", steps=3)

    def work(world):
        run("mae", tmp_path / str(world.rank), resume=True, world=world)

    assert in_two(work) == [1, 1]
    assert capfd.readouterr().err.count("expected the same checkpoint in every process, found those of steps 0, 3") == 2


def test_a_batch_has_equal_shares(tmp_path):
    with pytest.raises(ArgumentError, match=r"^batch_size: expected a multiple of the 3 processes, got 4$"):
        run("mae", tmp_path, world=World(0, 3))
