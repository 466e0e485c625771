"""What the environment says of other processes, and how long they are waited for."""

import datetime
import os
import subprocess
import sys

import pytest
import torch
from ports import held_port

from grcsf_fast.cli import main
from grcsf_fast.errors import ArgumentError, UnfinishedError
from grcsf_fast.runtime import processes
from grcsf_fast.runtime.processes import World, described_world, one_of_many

PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World()),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "LOCAL_RANK": "1"}, World()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World()),
        ({"WORLD_SIZE": "1"}, World()),
        ({"RANK": "", "WORLD_SIZE": ""}, World()),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", **PLACE}, World(2, 4, 0)),
        ({"RANK": "2", "WORLD_SIZE": "4", **PLACE}, World(2, 4, 2)),
    ],
)
def test_worlds(environment, world):
    assert described_world(environment) == world


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 and WORLD_SIZE=2, but MASTER_ADDR and MASTER_PORT, where"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "RANK=1 and WORLD_SIZE=2, but MASTER_PORT, where"),
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but RANK is not set"),
        ({"RANK": "one", "WORLD_SIZE": "2", **PLACE}, "expected a RANK from 0 to below WORLD_SIZE, found RANK=one"),
        ({"RANK": "2", "WORLD_SIZE": "2", **PLACE}, "expected a RANK from 0 to below WORLD_SIZE, found RANK=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **PLACE}, "found RANK=-1"),
        ({"RANK": "0", "WORLD_SIZE": "0", **PLACE}, "found RANK=0 and WORLD_SIZE=0"),
    ],
)
def test_environments_that_cannot_be(environment, message):
    with pytest.raises(ArgumentError) as caught:
        described_world(environment)
    assert message in str(caught.value)
    assert "start the processes with torchrun, or unset these variables" in str(caught.value)


def test_a_folder_run_names_the_variables(tmp_path, monkeypatch, capsys):
    """At once, and without a word from PyTorch."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.nii").write_bytes(b"")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["predict", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: environment: RANK=1 and WORLD_SIZE=2, but MASTER_ADDR and MASTER_PORT")
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_do_not_come_are_waited_for_some_minutes(monkeypatch, rank):
    """Here for a second, as the first process, which waits for the others, and as one that looks for the first."""
    assert datetime.timedelta(minutes=1) <= processes.MEETING_TIME <= datetime.timedelta(minutes=10)
    monkeypatch.setattr(processes, "MEETING_TIME", datetime.timedelta(seconds=1))
    with held_port() as port:
        environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ArgumentError) as caught, one_of_many():
            pass
    said = f"RANK={rank}, WORLD_SIZE=2, MASTER_ADDR=127.0.0.1, MASTER_PORT={port}"
    assert f"the processes that {said} describe did not meet" in str(caught.value)


PAIR = """
import os, signal, sys
from grcsf_fast.errors import UnfinishedError
from grcsf_fast.runtime.processes import gathered, one_of_many, said_by_first
try:
    with one_of_many() as world:
        assert said_by_first(world, lambda: ("first", world.rank)) == ("first", 0)
        assert gathered(world, world.rank * 10) == [0, 10]
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
except UnfinishedError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.parametrize("dying", [0, 1])
def test_without_torchrun_no_store_is_asked_for_errors(monkeypatch, dying):
    """The first process holds it: C++ prints a stack in who looks there while that one ends."""
    program = PAIR.replace("world.rank == 1", f"world.rank == {dying}").replace(
        "\ntry:",
        "\nfrom grcsf_fast.runtime import processes"
        "\nprocesses._Errors = lambda *_: sys.exit('the store was taken for errors')"
        "\ntry:",
    )
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with held_port() as port:
        place = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        running = [
            subprocess.Popen(
                [sys.executable, "-c", program], env=place | {"RANK": str(rank)}, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        running[dying].communicate()
        text, errors = running[1 - dying].communicate()
    assert (running[1 - dying].returncode, errors) == (1, "")
    assert text.startswith("another process ended before its work was done")


def test_an_error_while_waiting_is_passed_on():
    def fail():
        raise RuntimeError("Connection closed by peer\nand more")

    with pytest.raises(UnfinishedError, match=r"Connection closed by peer\)"):
        processes._together(fail)


@pytest.fixture
def one_of_two(monkeypatch):
    """This process as the second one of two, whose other never comes; the names of what was called."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **PLACE}.items():
        monkeypatch.setenv(name, value)
    called = []
    monkeypatch.setattr(processes, "_left", False)
    monkeypatch.setattr(processes, "_meet", lambda world, backend: called.append(backend))
    monkeypatch.setattr(processes, "highest", lambda world, number: called.append("met"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(str(device)))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: called.append("destroyed"))
    return called


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_on_gpus_a_process_with_an_error_waits_for_no_other(monkeypatch, one_of_two, error):
    """NCCL ends its group when all processes do, and the others wait for this one: nobody would see the error."""
    with pytest.raises(error), one_of_many(torch.device("cuda", 1)):
        raise error
    assert one_of_two == ["cuda:1", "cpu:gloo,cuda:nccl"]
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    assert main(["--help"]) == 0
    assert codes == [0]  # nor does the end of Python


def test_without_an_error_or_on_the_processor_the_group_is_ended(monkeypatch, one_of_two):
    with one_of_many(torch.device("cuda", 1)):
        pass
    with pytest.raises(ValueError), one_of_many(torch.device("cpu")):
        raise ValueError
    assert one_of_two == ["cuda:1", "cpu:gloo,cuda:nccl", "met", "destroyed", "gloo", "destroyed"]
    monkeypatch.setattr(os, "_exit", None)
    assert main(["--help"]) == 0


def test_two_processes_on_one_gpu_are_named(monkeypatch):
    """For which no other process has ended."""

    def refused(values):
        raise RuntimeError(
            "NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL "
            "version 2.28.9\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device ac000"
        )

    monkeypatch.setattr(torch.distributed, "all_reduce", refused)
    with pytest.raises(ArgumentError, match=r"^device: expected a GPU for each process, .* rank 1 and rank 0 both on"):
        processes.summed(World(1, 2), torch.ones(1))


@pytest.mark.parametrize("command", ["synthesize", "evaluate"])
def test_commands_of_one_process_refuse_to_be_several(command, tmp_path, monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **PLACE}.items():
        monkeypatch.setenv(name, value)
    more = ["-p", str(tmp_path), "-t", str(tmp_path)] if command == "evaluate" else []
    assert main([command, "-o", str(tmp_path / "out"), *more]) == 2
    assert f"{command} works in one process, and this is number 1 of 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
