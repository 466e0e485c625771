"""Trainings killed at moments by chance and resumed: the weights of one that was left alone. No clock decides."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import moments
import pytest
import torch
from trainings import Kept, assert_same, rows, run, weights

from grcsf_fast.errors import Interrupted
from grcsf_fast.pretrained.bundle import load_bundle
from grcsf_fast.training import loop

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")

STEPS = 6
# Calls of each in such a training, at the least; those of a step before its validation, and others.
STEPPING = {
    "grcsf_fast.training.{kind}:sample_crops": 6,
    "grcsf_fast.training.loop:_Training._gradient": 6,
    "grcsf_fast.training.loop:_Training._update": 6,
    "torch.optim:AdamW.step": 6,
}
PLACES = STEPPING | {
    "grcsf_fast.training.log:TrainingLog.write": 6,
    "grcsf_fast.training.log:TrainingLog.draw": 2,
    "grcsf_fast.training.checkpoint:Checkpoint.save": 2,
    "grcsf_fast.training.checkpoint:allow_reading": 2,
    "safetensors.torch:save_file": 3,
    "pathlib:Path.replace": 5,
    "pathlib:Path.rename": 1,
}
MODULES = {"mae": "autoencoder", "network": "network"}


def chosen(seed, count):
    """(kind, place, number of the call, before or after it), as many as asked for."""
    draw = random.Random(seed)
    found, left = [], []
    for number in range(count):
        left = left or draw.sample(list(PLACES.items()), len(PLACES))
        kind, (place, calls) = ("mae", "network")[number % 2], left.pop()
        found.append((kind, place.format(kind=MODULES[kind]), draw.randint(1, calls), draw.choice(["before", "after"])))
    return found


def settings(kind):
    return {"validation": [Kept()[50]]} if kind == "network" else {}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """kind -> its folder after six steps at once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for kind in MODULES:
        run(kind, folder / kind, **settings(kind))
    return folder


def disturbed(number, count, when, place, kind, output, workers):
    """Train in another process, which gets a signal at a moment; its exit code, and in which step, 0 before all."""
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            begun, begin = [0], loop._Training._set_learning_rate
            loop._Training._set_learning_rate = lambda self, step: begun.append(step + 1) or begin(self, step)
            moments.arm(number, count, when, place, lambda: os.write(say, bytes(begun[-1:])))
            run(kind, output, workers=workers, **settings(kind))
            code = 0
        except Interrupted as interrupted:
            code = 128 + interrupted.number
        finally:
            os._exit(code)
    os.close(say)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (step,) = os.read(said, 1)
    os.close(said)
    return code, step


def assert_as_undisturbed(undisturbed, output, kind, validated=True):
    """``validated``: where a signal came in the step of a validation, that one is left out."""
    dropped = {"seconds": ""} | ({} if validated else {"validation_dice": "", "validation_dice_median": ""})
    assert_same(weights(undisturbed / kind / "bundle"), weights(output / "bundle"))
    assert [row["step"] for row in rows(output)] == [str(step) for step in range(1, STEPS + 1)]
    for one, other in zip(rows(undisturbed / kind), rows(output), strict=True):
        assert one | dropped == other | dropped
    if kind == "network" and validated:
        first, second = (load_bundle(folder / "best") for folder in (undisturbed / kind, output))
        assert first.card == second.card
        assert_same(first.network.state_dict(), second.network.state_dict())


def killed_and_resumed(undisturbed, tmp_path, moment, name, workers):
    kind, place, count, when = moment
    number = signal.Signals[name]
    code, step = disturbed(number, count, when, place, kind, tmp_path, workers)
    stepping = place in {one.format(kind=MODULES[kind]) for one in STEPPING}
    in_validation = name == "SIGTERM" and kind == "network" and stepping and step in (3, STEPS)
    if name == "SIGKILL":
        assert code == -number
    elif step < STEPS or in_validation:
        assert code == 128 + number
    else:
        # In the last step there is nothing left to stop, and after it the training knows nothing of it any more.
        assert code == 0 if stepping else code in (0, -number)
    run(kind, tmp_path, resume=True, workers=workers, **settings(kind))
    assert_as_undisturbed(undisturbed, tmp_path, kind, validated=not in_validation)


@pytest.mark.parametrize(
    "moment",
    [pytest.param(one, id=str(one), marks=[pytest.mark.slow] * (at > 2)) for at, one in enumerate(chosen(20, 10))],
)
def test_killed(undisturbed, tmp_path, moment):
    killed_and_resumed(undisturbed, tmp_path, moment, "SIGKILL", 0)


@pytest.mark.parametrize("moment", chosen(21, 2), ids=str)
def test_terminated(undisturbed, tmp_path, moment):
    killed_and_resumed(undisturbed, tmp_path, moment, "SIGTERM", 0)


@pytest.mark.slow
@pytest.mark.parametrize("moment", chosen(22, 24), ids=str)
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_ended_beside_workers(undisturbed, tmp_path, moment, name):
    killed_and_resumed(undisturbed, tmp_path, moment, name, 2)


SMALL = [
    "--spacing", "8,8,8", "--crop-size", "16,16", "--crop-size-jitter", "0", "--steps", "6", "--batch-size", "2",
    "--cache-size", "2", "--replace-every", "2", "--warmup-steps", "0", "--validate-every", "3", "--log-every", "1",
    "--precision", "float32", "--patch-size", "4", "--embed-dim", "16", "--num-heads", "2", "--depth", "1",
    "--decoder-dim", "16", "--decoder-num-heads", "2", "--decoder-depth", "1", "--threads", "1", "--device", "cpu",
]  # fmt: skip


def command(*before):
    return subprocess.run([sys.executable, *before], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_the_command_says_how_it_ended_and_goes_on(tmp_path, name):
    train = ["train-mae", *SMALL, "--workers", "2", "-o"]
    done = command("-m", "grcsf_fast", *train, str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    place = "grcsf_fast.training.loop:_Training._update"
    ended = command(moments.__file__, name, "5", "before", place, *train, str(tmp_path / "ended"))
    assert ended.returncode == (-signal.SIGKILL if name == "SIGKILL" else 143), ended.stderr
    if name == "SIGTERM":
        assert "stopped after step 5 of 6; step 5 is saved" in ended.stderr
    done = command("-m", "grcsf_fast", *train, str(tmp_path / "ended"), "--resume")
    assert done.returncode == 0, done.stderr
    assert_same(weights(tmp_path / "whole" / "bundle"), weights(tmp_path / "ended" / "bundle"))


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    """Two processes as one, one of them killed, both resumed; a file of each name and a line of each kind."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    train = ["train-mae", *SMALL, "-o"]
    done = command("-m", "grcsf_fast", *train, str(tmp_path / "alone"))
    assert done.returncode == 0, done.stderr
    done = command(*torchrun, "-m", "grcsf_fast", *train, str(tmp_path / "both"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    curves = [[float(row["loss"]) for row in rows(tmp_path / name)] for name in ("alone", "both")]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    place = "grcsf_fast.training.loop:_Training._gradient"
    died = command(*torchrun, moments.__file__, "SIGKILL", "5", "before", place, *train, str(tmp_path / "died"))
    assert died.returncode == 1
    assert not (tmp_path / "died" / "bundle").exists()
    done = command(*torchrun, "-m", "grcsf_fast", *train, str(tmp_path / "died"), "--resume")
    assert done.returncode == 0, done.stderr
    assert [float(row["loss"]) for row in rows(tmp_path / "died")] == pytest.approx(curves[0], rel=1e-4)
    assert not list(Path(tmp_path).glob("*/.partial-*bundle"))
    for name in ("both", "died"):
        one, other = weights(tmp_path / "alone" / "bundle"), weights(tmp_path / name / "bundle")
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-2, atol=1e-3)
