"""The loop of a training: steps, validation, checkpoints by number and by time, and an orderly stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.cases import Source
from ..errors import GrcsfError, Interrupted, UnfinishedError
from ..runtime import progress
from ..runtime.precision import choose_training_precision
from ..runtime.signals import Stop
from .checkpoint import Checkpoint, TrainError, check_output, describe_data
from .log import TrainingLog
from .settings import TrainingRun, TrainSettings

__all__ = ["Step", "fit"]

Watched = Callable[[str, Iterable[Any]], Iterator[Any]]


@dataclass(frozen=True)
class Step:
    """What a step may use beside the cases.

    Attributes:
        number: steps done before.
        rng: all that is random in it comes from here.
        autocast: makes the context of the forward pass.
        watched: wraps a loop that may take long, so that a signal ends it between two items; its title is shown.
    """

    number: int
    rng: np.random.Generator
    autocast: Callable[[], torch.autocast]
    watched: Watched


def fit(
    run: TrainingRun,
    model: nn.Module,
    source: Source,
    loss: Callable[[Step], dict[str, Tensor]],
    validate: Callable[[Watched], dict[str, float]] | None,
    trial: Callable[[], Tensor],
    describes: Mapping[str, Any],
) -> None:
    """The loop both trainings share. All randomness of a step comes from (seed, step).

    Args:
        run: where, and by what settings.
        model: trained in place.
        source: of its cases, whose content the checkpoint describes.
        loss: of a step: ``"loss"``, and other parts for the log.
        validate: figures for the log; its argument is :attr:`Step.watched`. None: no validation.
        trial: a loss of fixed input, to measure speed with.
        describes: what must be the same beside the settings to resume, JSON values by name.

    Raises:
        TrainError, UnfinishedError, Interrupted, OSError: see :func:`grcsf_fast.training.network.train_network`.
    """
    settings, device = run.settings, run.device
    path = check_output(run.output, run.resume)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    data = describe_data(source, progress.bar("reading cases for resume"))
    checkpoint = Checkpoint(path, model, optimizer, asdict(settings), {**describes, **data})
    restored = checkpoint.load(device) if run.resume else None
    first = restored.step if restored else 0
    if restored and restored.steps != settings.steps:
        print(
            f"--steps {settings.steps}, begun with {restored.steps}: from step {first} on the learning rate follows "
            f"the schedule of {settings.steps} steps"
        )
    precision = restored.precision if restored else choose_training_precision(settings.precision, device, model, trial)
    training = _Training(checkpoint, optimizer, settings, device, precision, first)
    log = TrainingLog(run.output, first)
    model.train()
    with Stop() as stop, progress.steps(settings.steps, first, "training") as bar:
        try:
            training.run(loss, validate, log, stop, bar)
        except BaseException as error:
            training.stopped(error)
            raise


class _Training:
    """A training between its first step and its last.

    Attributes:
        done: steps done.
        saved: of them those in the checkpoint.
        whole: False while the weights change: there is nothing to save then.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        optimizer: torch.optim.Optimizer,
        settings: TrainSettings,
        device: torch.device,
        precision: str,
        first: int,
    ) -> None:
        self.checkpoint, self.optimizer, self.settings = checkpoint, optimizer, settings
        self.device, self.precision = device, precision
        self.done = self.saved = first
        self.whole = True

    def run(
        self,
        loss: Callable[[Step], dict[str, Tensor]],
        validate: Callable[[Watched], dict[str, float]] | None,
        log: TrainingLog,
        stop: Stop,
        bar: Any,
    ) -> None:
        """All steps that are left; see :func:`fit`."""
        settings = self.settings

        def watched(title: str, items: Iterable[Any]) -> Iterator[Any]:
            for item in progress.bar(title)(items):
                stop.check()
                yield item

        began = last = monotonic()
        for number in range(self.done, settings.steps):
            stop.check()
            rate = self._set_learning_rate(number)
            with stop.abortable():
                parts = loss(Step(number, np.random.default_rng([settings.seed, number]), self._autocast, watched))
            self._update(number, parts["loss"])
            row: dict[str, float] = {}
            if self.done % settings.log_every == 0 or self.done == settings.steps:
                row = {name: float(value.detach()) for name, value in parts.items()}
                row |= {"learning_rate": rate, "seconds": monotonic() - began}
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            pause = self.done % settings.validate_every == 0 or self.done == settings.steps
            try:
                if pause and validate is not None:
                    with stop.abortable():
                        row |= validate(watched)
            finally:
                if row:
                    log.write(self.done, row)
            if pause or monotonic() >= last + 60 * settings.checkpoint_minutes:
                self.save()
                last = monotonic()
            if pause:
                log.draw()
            bar.update()

    def _set_learning_rate(self, number: int) -> float:
        rate = self.settings.learning_rate * _schedule(number, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _update(self, number: int, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.checkpoint.model.parameters(), 5.0)
        if not torch.isfinite(norm):
            raise TrainError(f"step {number}: the gradient is not finite (loss {float(loss.detach()):g})")
        self.whole = False
        self.optimizer.step()
        self.done, self.whole = number + 1, True

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def save(self) -> None:
        """Write the checkpoint."""
        self.checkpoint.save(self.done, self.precision)
        self.saved = self.done

    def stopped(self, error: BaseException) -> None:
        """Save what is done and raise the error again with a word on how to go on.

        Raises:
            Interrupted: for a KeyboardInterrupt.
            UnfinishedError: for errors that the user can change, once a step is done.
        """
        diverged = isinstance(error, TrainError)
        # Of a training that has diverged the last checkpoint is the better one.
        if self.whole and self.done > self.saved and not diverged:
            try:
                self.save()
            except OSError as further:
                error.add_note(f"the steps since the last checkpoint could not be saved: {further}")
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        state = f"stopped after step {self.done} of {self.settings.steps}; {self._what_is_saved()}{notes}"
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(state, getattr(error, "number", Interrupted().number)) from error
        if isinstance(error, GrcsfError | OSError):
            if self.done:
                raise UnfinishedError(f"{error}\n{state}") from error
        else:
            error.add_note(state)

    def _what_is_saved(self) -> str:
        if not self.saved:
            return "nothing is saved"
        return f"step {self.saved} is saved, and the same command with --resume goes on from there"


def _schedule(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine down to 0; a function of the step alone, where torch's schedulers carry a state."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    passed = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1 + float(np.cos(np.pi * passed)))
