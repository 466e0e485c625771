"""What else a training may do: averages, several batches per step, best weights, TensorBoard, compiled networks."""

import builtins
import sys
import types
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from trainings import Kept, assert_same, kill_at, patch_crops, rows, run, tiny_mae, tiny_network, weights

from grcsf_fast import GRCSFLoss
from grcsf_fast.cli import main
from grcsf_fast.errors import ArgumentError, UnfinishedError
from grcsf_fast.pretrained.bundle import load_bundle
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
        [one.detach().clone() for one in self.model.parameters()]
    ))  # fmt: skip
    last = weights(run("network", tmp_path / "last"))
    averaged = weights(run("network", tmp_path / "averaged", ema=0.2))
    assert_same(last, dict(zip(last, taken[-1], strict=True)))
    assert any(not torch.equal(last[name], averaged[name]) for name in last)
    # (1 + n) / (10 + n) is 0.1 in the first step, and more than 0.2 from the third one on.
    first = next(iter(last))
    expected = taken[0][0] * 0  # of the weights before the first step a share of 0.1 * 0.18 * 0.2^4 is left: 3e-5
    share = 1.0
    for number in reversed(range(6)):
        decay = min(0.2, (1 + number) / (10 + number))
        expected, share = expected + share * (1 - decay) * taken[number][0], share * decay
    torch.testing.assert_close(averaged[first], expected, rtol=1e-3, atol=1e-4)
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run("network", tmp_path / "killed", ema=0.2)
    assert_same(averaged, weights(run("network", tmp_path / "killed", ema=0.2, resume=True)))
    said = load_bundle(tmp_path / "averaged" / "bundle").card["weights"]
    assert said == {"kind": "moving average with decay 0.2", "chosen": "the last step", "step": 6}


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


@pytest.mark.parametrize("crop", [(16, 16), (16, 16, 8)])
def test_channels_last_is_a_layout(tmp_path, crop):
    changes = {"crop_size": crop, "steps": 2, "batch_size": 2}
    for name, last in (("a", False), ("b", True)):
        run("network", tmp_path / name, network=tiny_network(len(crop), rcu_levels=()), channels_last=last, **changes)
    one, two = ([float(row["loss"]) for row in rows(tmp_path / name)] for name in "ab")
    assert two == pytest.approx(one, rel=1e-4)


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

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    run("mae", tmp_path, steps=2, tensorboard=True)
    names = ["loss", "learning_rate", "seconds"]
    assert written == [
        (str(tmp_path / "tensorboard"), 1),
        *[(name, step) for step in (1, 2) for name in names],
        "closed",
    ]


def test_tensorboard_without_its_package(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *arguments, **named):
        if name == "torch.utils.tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["train-mae", "-o", str(tmp_path / "out"), "--tensorboard"]) == 2
    assert "error: --tensorboard: expected the package tensorboard" in capsys.readouterr().err
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


@pytest.mark.parametrize("kind", ["mae", "network"])
def test_no_step_reads_a_value(monkeypatch, kind):
    """On a device without values, where to ask for one is an error: on a GPU the processor waits for nothing."""
    if kind == "mae":
        model = tiny_mae().to("meta")
        loss = model.loss(torch.zeros(2, 1, 16, 16, device="meta"), torch.zeros(2, 5, dtype=torch.int64, device="meta"))
    else:
        model = tiny_network().to("meta").train()
        image, maps = torch.zeros(2, 1, 16, 16, device="meta"), torch.zeros(2, 2, 16, 16, device="meta")
        criterion = GRCSFLoss(patch_size=4)
        monkeypatch.setattr(torch, "autocast", lambda *arguments, **named: nullcontext())  # knows no such device
        parts = criterion.parts(model(image, maps, return_maps=True), image)
        assert set(parts) == {"loss", "segmentation_loss", "score_loss"}
        loss = parts["loss"]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    with pytest.raises(RuntimeError):
        float(norm)


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
    saved.save(1, "float32")
    resumed, optimizer = checkpoint("meta")
    assert resumed.load().step == 1
    for state in optimizer.state.values():
        assert (state["step"].device.type, state["step"].item()) == ("cpu", 1)
        assert state["exp_avg"].device.type == "meta"
