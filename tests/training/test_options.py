"""What else a training may do: averages, several batches per step, best weights, TensorBoard, compiled networks."""

import builtins
import errno
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trainings
from trainings import Kept, assert_same, kill_at, patch_crops, rows, run, tiny_network, training_run, weights

from grcsf_fast.cli import main
from grcsf_fast.errors import ArgumentError, UnfinishedError
from grcsf_fast.pretrained.bundle import load_bundle
from grcsf_fast.runtime.precision import Choice
from grcsf_fast.training import compiling, loop
from grcsf_fast.training.checkpoint import Checkpoint
from grcsf_fast.training.settings import TrainSettings

VALIDATION = [50, 51]


def validation():
    return [Kept()[number] for number in VALIDATION]


def test_the_average_of_the_weights(tmp_path, monkeypatch):
    """What is averaged trains as ever; the bundle says which weights it holds; the average goes on with --resume."""
    taken = []
    real = loop._Training._take_average
    monkeypatch.setattr(loop._Training, "_take_average", lambda self, number: real(self, number) or taken.append(
        {name: one.detach().clone() for name, one in self.model.named_parameters()}
    ))  # fmt: skip
    last = weights(run("network", tmp_path / "last"))
    # (1 + n) / (10 + n) is 0.1 in the first step, more than 0.2 from the third one on, and 0.4 in the last.
    for ema in (0.9, 0.2):
        taken.clear()
        averaged = weights(run("network", tmp_path / f"{ema}", ema=ema))
        assert_same(last, taken[-1])
        expected = {name: one.detach().double() for name, one in tiny_network().named_parameters()}
        for number, new in enumerate(taken):
            decay = min(ema, (1 + number) / (10 + number))
            expected = {name: decay * old + (1 - decay) * new[name] for name, old in expected.items()}
        for name, tensor in expected.items():
            torch.testing.assert_close(averaged[name].double(), tensor, rtol=1e-6, atol=1e-7)
        assert any(not torch.equal(last[name], averaged[name]) for name in last)
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run("network", tmp_path / "killed", ema=0.2)
    assert_same(averaged, weights(run("network", tmp_path / "killed", ema=0.2, resume=True)))
    said = load_bundle(tmp_path / "0.2" / "bundle").card["weights"]
    assert said == {"kind": "moving average with decay 0.2", "chosen": "the last step", "step": 6}


def begun(model, output, **changes):
    """A training of the model before its first step."""
    checkpoint = SimpleNamespace(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    trained = loop.Trained(model, Choice("float32", "as asked for"))
    return loop._Training(checkpoint, None, training_run(output, **changes), trained, 0, None)


def test_the_gradient_of_several_batches_is_their_mean(tmp_path):
    """As is each part of the loss; nothing is left of the step before."""
    model, batches = torch.nn.Linear(3, 2), torch.randn(6, 4, 3)
    left = iter(batches)

    def loss_of(batch):
        return model(batch).square().mean()

    def loss(step):
        value = loss_of(next(left))
        return {"loss": value, "other": 2 * value}

    training = begun(model, tmp_path, accumulate=3)
    for own in (batches[:3], batches[3:]):
        parts = training._gradient(loss, None)
        mean = torch.stack([loss_of(batch) for batch in own]).mean()
        expected = torch.autograd.grad(mean, list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        torch.testing.assert_close(parts, {"loss": mean, "other": 2 * mean})


@pytest.mark.parametrize(("norm", "clipped"), [(1e6, 5.0), (5.5, 5.0), (4.5, 4.5)])
def test_a_huge_gradient_is_clipped(tmp_path, norm, clipped):
    """All of it to a norm of 5, before the optimiser sees it."""
    model = torch.nn.Linear(3, 2)
    training = begun(model, tmp_path)
    whole = F.normalize(torch.randn(8), dim=0)
    for parameter, part in zip(model.parameters(), whole.split([6, 2]), strict=True):
        parameter.grad = norm * part.view_as(parameter)
    training._update(0, torch.zeros(()))
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(found, clipped * whole)
    seen = torch.cat([state["exp_avg"].flatten() for state in training.optimizer.state.values()])
    torch.testing.assert_close(seen, 0.1 * clipped * whole)


@pytest.mark.parametrize("kind", ["mae", "network"])
def test_several_batches_per_step(tmp_path, monkeypatch, kind):
    """Each with crops of its own, and all of them drawn from (seed, step)."""
    drawn = []

    def noted(sample, *arguments):
        batch = sample(*arguments)
        drawn.append(batch["image"])
        return batch

    with monkeypatch.context() as patch:
        patch_crops(patch, lambda sample: partial(noted, sample))
        first = weights(run(kind, tmp_path / "a", accumulate=3, steps=4))
        assert len(drawn) == 12
        assert not torch.equal(drawn[0], drawn[1])
    with monkeypatch.context() as patch:
        kill_at(patch, 10)  # calls, the second batch of the fourth step
        with pytest.raises(KeyboardInterrupt):
            run(kind, tmp_path / "b", accumulate=3, steps=4)
    assert_same(first, weights(run(kind, tmp_path / "b", accumulate=3, steps=4, resume=True)))


def test_the_best_weights_are_kept_beside_the_last(tmp_path, monkeypatch):
    """Of three validations the second is the best one, also where the training is resumed after it."""
    figures = iter([0.2, 0.3, 0.25, 0.25])
    monkeypatch.setattr("grcsf_fast.training.network._dice", lambda *arguments: next(figures))
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run("network", tmp_path, validation=validation()[:1], validate_every=2)
    run("network", tmp_path, validation=validation()[:1], validate_every=2, resume=True)
    best = load_bundle(tmp_path / "best")
    assert best.card["weights"] == {
        "kind": "of the optimiser",
        "chosen": "the highest mean Dice of a validation so far",
        "step": 4,
        "validation_dice": 0.3,
    }
    last = weights(tmp_path / "bundle")
    assert any(not torch.equal(last[name], tensor) for name, tensor in best.network.state_dict().items())
    run("network", tmp_path / "other", steps=1)
    assert not (tmp_path / "other" / "best").exists()


def test_a_best_that_cannot_be_kept_ends_no_training(tmp_path, monkeypatch):
    """Somebody's notes lie beside it; the next better one is kept, in a training that went on too."""
    figures = iter([0.2, 0.3, 0.25, 0.25])
    monkeypatch.setattr("grcsf_fast.training.network._dice", lambda *arguments: next(figures))
    given = {"validation": validation()[:1], "validate_every": 2}

    def kept():
        return load_bundle(tmp_path / "best").card["weights"]["step"]

    run("network", tmp_path, steps=2, **given)
    (tmp_path / "best" / "notes.txt").write_text("mine")
    with pytest.warns(match=r"the best weights so far, of step 4, are not kept: .*found notes.txt in it"):
        run("network", tmp_path, steps=4, resume=True, **given)
    assert kept() == 2
    assert (tmp_path / "best" / "notes.txt").read_text() == "mine"
    (tmp_path / "best" / "notes.txt").unlink()
    run("network", tmp_path, resume=True, **given)
    assert kept() == 6


@pytest.mark.parametrize("crop", [(16, 16), (16, 16, 8)])
def test_channels_last_is_a_layout(tmp_path, crop):
    changes = {"crop_size": crop, "steps": 2, "batch_size": 2}
    for name, last in (("a", False), ("b", True)):
        run("network", tmp_path / name, network=tiny_network(len(crop), rcu_levels=()), channels_last=last, **changes)
    one, two = ([float(row["loss"]) for row in rows(tmp_path / name)] for name in "ab")
    assert two == pytest.approx(one, rel=1e-4)


def test_a_resumed_training_has_its_channels_last(tmp_path, monkeypatch):
    """Moments that lay otherwise than their weights would go to other weights."""
    settings = {"network": tiny_network(rcu_levels=()), "channels_last": True}
    whole = weights(run("network", tmp_path / "whole", **settings))
    settings["network"] = tiny_network(rcu_levels=())
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run("network", tmp_path / "killed", **settings)
    settings["network"] = tiny_network(rcu_levels=())
    resumed = weights(run("network", tmp_path / "killed", resume=True, **settings))
    for name, one in whole.items():
        torch.testing.assert_close(resumed[name], one, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mae", "network"])
def test_compiled_trainings_are_the_same_to_rounding(tmp_path, monkeypatch, kind):
    """Traced here, and not translated, which would take minutes."""
    used = []
    real = torch.compile

    def traced(function, dynamic):
        used.append(function)
        return real(function, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(compiling.torch, "compile", traced)
    run(kind, tmp_path / "plain", steps=2)
    assert not used
    run(kind, tmp_path / "compiled", steps=2, compile=True)
    assert len(used) == 1
    one, two = ([float(row["loss"]) for row in rows(tmp_path / name)] for name in ("plain", "compiled"))
    assert two == pytest.approx(one, rel=1e-4)


def test_crops_of_any_number_of_sizes_are_compiled(monkeypatch):
    """Beyond torch's own limit it would go back to the network as it is."""

    def limits():
        return torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit

    before = limits()
    monkeypatch.setattr(compiling.torch, "compile", lambda function, dynamic: function)
    assert compiling.compiled(limits, TrainSettings(compile=True))() == (10**6, 10**6)
    assert limits() == before


@pytest.mark.parametrize("kind", ["mae", "network"])
def test_augmentation_knows_the_spacing(tmp_path, monkeypatch, kind):
    asked = []
    for module in ("autoencoder", "network"):
        monkeypatch.setattr(
            f"grcsf_fast.training.{module}.augmentation", lambda *given: asked.append(given) or unchanged
        )

    def unchanged(batch, seed, first):
        return batch

    run(kind, tmp_path, steps=1)
    assert asked == [(2, "all", (8.0, 8.0, 8.0))]


def test_validation_cases_have_small_maps(tmp_path, monkeypatch):
    """As those of the pool."""
    seen = []
    monkeypatch.setattr(
        "grcsf_fast.training.network._dice", lambda weights, case, *others: seen.append(case.residual_maps.dtype) or 0.5
    )
    run("network", tmp_path, validation=validation(), steps=1)
    assert seen == [torch.float16] * 2


def test_tensorboard(tmp_path, monkeypatch):
    """With the class that the package would bring."""
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    run("mae", tmp_path, steps=2, tensorboard=True)
    names = ["loss", "learning_rate", "seconds"]
    assert written == [
        (str(tmp_path / "tensorboard"), 1),
        *[(name, step) for step in (1, 2) for name in names],
        "closed",
    ]


def test_a_tensorboard_that_fails_ends_nothing(tmp_path, monkeypatch):
    """As on a full disk: its writer, which has a thread, then fails in all it is asked for, also with room again."""
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            pass

        def add_scalar(self, name, value, step):
            if step > 1:
                self.close()
            written.append((name, step))

        def flush(self):
            pass

        def close(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    with pytest.warns(UserWarning, match="No space left") as warned:
        bundle = run("mae", tmp_path, steps=4, tensorboard=True)
    (said,) = warned
    assert str(said.message).startswith("tensorboard lacks step 2 and what follows: ")
    assert (bundle / "config.json").is_file()
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]
    assert {step for _, step in written} == {1}


def test_tensorboard_reads_what_was_written(tmp_path):
    """With the package itself; steps that are done again count once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("mae", tmp_path, steps=2, tensorboard=True)
    run("mae", tmp_path, steps=3, tensorboard=True, resume=True)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    logged = {int(row["step"]): float(row["loss"]) for row in rows(tmp_path)}
    assert {event.step: event.value for event in found} == pytest.approx(logged, rel=1e-5)
    assert [event.step for event in found] == [1, 2, 3]


def test_tensorboard_without_its_package(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *arguments, **named):
        if name == "torch.utils.tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["train-mae", "-o", str(tmp_path / "out"), "--tensorboard"]) == 2
    said = capsys.readouterr().err
    assert "error: --tensorboard: expected the package tensorboard" in said
    assert 'in a checkout of grcsf-fast: pip install ".[tensorboard]"' in said
    assert not (tmp_path / "out").exists()


def test_where_gradients_are_looked_at_later_no_checkpoint_holds_what_diverged(tmp_path, monkeypatch):
    """As on a GPU, whose gradient of step 4 is asked for after step 6 and before anything is saved."""
    real = loop._Training._check_finite
    asked = []

    def later(self):
        if sys._getframe(1).f_code.co_name != "_update":
            asked.append(self.done)
            real(self)

    monkeypatch.setattr(loop._Training, "_check_finite", later)
    calls = []

    def poisoned(sample, *arguments):
        batch = sample(*arguments)
        calls.append(1)
        if len(calls) == 5:
            batch["image"][:] = float("nan")
        return batch

    patch_crops(monkeypatch, lambda sample: partial(poisoned, sample))
    with pytest.raises(UnfinishedError, match=r"step 4: the gradient is not finite \(loss nan\)\n.*step 3 is saved"):
        run("mae", tmp_path, log_every=6, checkpoint_minutes=1e6)
    assert len(calls) == 6
    assert asked == [3, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "accumulate: expected 1 or more, got 0"),
        ({"ema": 1.0}, r"ema: expected a number of 0 or more and below 1, got 1\.0"),
        ({"ema": -0.5}, r"ema: expected a number of 0 or more and below 1, got -0\.5"),
    ],
)
def test_settings_errors(changes, message):
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        TrainSettings(**changes)


class WithMaps(Kept):
    """Residual maps are there already: none can be brought back from a device without values."""

    def __getitem__(self, index):
        case = super().__getitem__(index)
        return replace(case, residual_maps=torch.zeros(2, *case.image.shape))


@pytest.mark.parametrize("kind", ["mae", "network"])
def test_no_step_reads_a_value(tmp_path, monkeypatch, kind):
    """On a device without values, where to ask for one is an error: on a GPU the processor waits for nothing.

    Up to the log of the last step, which asks whether all gradients were finite.
    """

    class AskedError(Exception):
        pass

    def asked(self):
        raise AskedError(self.done)

    monkeypatch.setattr(loop._Training, "_check_finite", asked)
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **named: nullcontext())  # knows no such device
    monkeypatch.setattr("grcsf_fast.training.network.weights_digest", lambda module: "")  # before the first step
    monkeypatch.setattr(trainings, "CPU", torch.device("meta"))
    changes = {"steps": 3, "log_every": 9, "validate_every": 9, "accumulate": 2, "ema": 0.5}
    with pytest.raises(AskedError, match=r"^3$"):
        run(kind, tmp_path, source=WithMaps(), **changes)


def test_a_resumed_optimizer_keeps_its_numbers_of_steps_on_the_processor(tmp_path):
    """It reads them in every step. The device "meta" stands for a GPU."""

    def checkpoint(device):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2, device=device).parameters())
        return Checkpoint(tmp_path / "checkpoint.safetensors", model, optimizer, {"steps": 2}, {}), optimizer

    saved, optimizer = checkpoint("cpu")
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved.save(1, Choice("float32", "as asked for"))
    resumed, optimizer = checkpoint("meta")
    assert resumed.load().step == 1
    for state in optimizer.state.values():
        assert (state["step"].device.type, state["step"].item()) == ("cpu", 1)
        assert state["exp_avg"].device.type == "meta"
