"""The loop of a training: steps, validation, checkpoints by number and by time, and an orderly stop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..data.files import remove_partial
from ..datasets.cases import CaseSource
from ..errors import GrcsfError, Interrupted, UnfinishedError
from ..networks.grcsf import GRCSF
from ..runtime import progress
from ..runtime.memory import is_out_of_memory
from ..runtime.precision import Choice, choose_training_precision
from ..runtime.processes import OtherEndedError, gathered, highest, said_by_first, sum_gradients
from ..runtime.signals import Stop
from .bundles import best_dice
from .checkpoint import Checkpoint, TrainError, check_output, describe_data
from .log import TrainingLog
from .running import Mark, MarkLostError, running
from .settings import TrainingRun, TrainSettings

__all__ = ["Step", "Trained", "Validate", "Watched", "fit"]

Watched = Callable[[str, Iterable[Any]], Iterator[Any]]
Network = TypeVar("Network", bound=nn.Module)
# Figures for the log of weights, which of several are the module's.
Validate = Callable[[Watched, Network], dict[str, float]]

MOST_FAILURES = 3  # to write a checkpoint, one after the other, of which the last one ends a training
AGAIN_SECONDS = 60.0  # after one that failed


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


@dataclass(frozen=True)
class Trained(Generic[Network]):
    """What a training has made so far.

    Attributes:
        weights: the module whose weights count: the one that is trained, or a copy with their moving average.
        precision: of the forward passes, and why.
    """

    weights: Network
    precision: Choice


def fit(
    run: TrainingRun,
    model: Network,
    source: CaseSource,
    loss: Callable[[Step], dict[str, Tensor]],
    validate: Validate[Network] | None,
    trial: Callable[[], Tensor],
    describes: Mapping[str, Any],
    keep_best: Callable[[Trained[Network], int, float], None] | None = None,
) -> Trained[Network]:
    """The loop both trainings share. All randomness of a step comes from (seed, step).

    Args:
        run: where, and by what settings.
        model: trained in place.
        source: of its cases, whose content the checkpoint describes.
        loss: of a batch: ``"loss"``, and other parts for the log; those of all processes together, with the gradient of
            this one's share.
        validate: figures for the log, of the weights of a module; its first argument is :attr:`Step.watched`. None: no
            validation.
        trial: a loss of fixed input, to measure speed with.
        describes: what must be the same beside the settings to resume, JSON values by name.
        keep_best: given what is trained, step and figure wherever ``"validation_dice"`` is higher than before.

    Returns:
        What was trained; its module is ``model``, or a copy with the moving average.

    Raises:
        TrainError, UnfinishedError, Interrupted, OSError: see :func:`grcsf_fast.training.network.train_network`.
    """
    settings, device, world = run.settings, run.device, run.world
    first_process = world.rank == 0
    path = check_output(run.output, run.resume)
    # On a processor one pass over all numbers of a step, where the usual form has a dozen. It knows no strides: moments
    # and gradients that lie otherwise than their weights would go to other ones.
    fused = device.type == "cpu" and all(one.is_contiguous() for one in model.parameters())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused or None
    )
    if world.size > 1:  # random numbers may differ between processors
        model.load_state_dict(said_by_first(world, lambda: {n: value.cpu() for n, value in model.state_dict().items()}))
    average = copy.deepcopy(model).requires_grad_(False) if settings.ema else None
    data = said_by_first(world, lambda: describe_data(source, progress.bar("reading cases for resume")))
    checkpoint = Checkpoint(path, model, optimizer, asdict(settings), {**describes, **data}, average)
    before = checkpoint.stamp() if run.resume else None
    restored = checkpoint.load() if run.resume else None
    first = restored.step if restored else 0
    if len(steps := set(gathered(world, first))) > 1:
        raise TrainError(
            f"{path}: expected the same checkpoint in every process, found those of steps "
            f"{', '.join(map(str, sorted(steps)))}: --output has to be one folder that all machines share"
        )
    if restored and restored.steps != settings.steps and first_process:
        print(
            f"--steps {settings.steps}, begun with {restored.steps}: from step {first} on the learning rate follows "
            f"the schedule of {settings.steps} steps"
        )
    precision = (
        restored.precision
        if restored
        else said_by_first(world, lambda: choose_training_precision(settings.precision, device, model, trial))
    )
    if settings.precision == "auto" and first_process:
        print(f"precision {precision.precision}: {precision.reason}")
    best = best_dice(run.output) if first else -1.0
    trained = Trained(model if average is None else average, precision)
    training = _Training(checkpoint, average, run, trained, first, keep_best, best)
    model.train()
    # Before the log of an earlier run is cut, and before anything else is written.
    highest(world, 0)
    with (
        Stop() as stop,
        running(run.output, settings.checkpoint_minutes) if first_process else nullcontext() as mark,
    ):
        if mark is not None and checkpoint.stamp() != before:
            raise TrainError(
                f"{path}: another training has written this checkpoint since this one began; the same command with "
                "--resume goes on from there"
            )
        training.mark = mark
        if mark is not None:
            remove_partial(run.output)
        log = TrainingLog(run.output, first, run.tensorboard, mark.renew) if mark is not None else None
        with (
            closing(log) if log is not None else nullcontext(),
            progress.steps(settings.steps, first, "training", first_process) as bar,
        ):
            try:
                training.run(loss, validate, log, stop, bar)
            except BaseException as error:
                training.stopped(error)
                raise
    return trained


class _Training(Generic[Network]):
    """A training between its first step and its last.

    Attributes:
        done: steps done.
        saved: of them those in the checkpoint.
        whole: False while the weights change: there is nothing to save then.
        best: the highest validation Dice of weights that were kept; below 0 where there are none.
        mark: of this training in its folder, renewed before anything is written there; None in all processes but the
            first.
        trained: what counts of it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        average: nn.Module | None,
        run: TrainingRun,
        trained: Trained[Network],
        first: int,
        keep_best: Callable[[Trained[Network], int, float], None] | None,
        best: float = -1.0,
    ) -> None:
        self.checkpoint, self.average, self.trained = checkpoint, average, trained
        self.keep_best, self.best = keep_best, best
        self.settings, self.device, self.world = run.settings, run.device, run.world
        self.model, self.optimizer = checkpoint.model, checkpoint.optimizer
        self.done = self.saved = first
        self.whole = True
        self.mark: Mark | None = None
        self.failures = 0  # to write a checkpoint, since one was written
        # On the device, so that nobody waits for it: the first step whose gradient was not finite, and its loss.
        self.bad_step = torch.full((), -1.0, dtype=torch.float32, device=self.device)
        self.bad_loss = torch.zeros((), dtype=torch.float32, device=self.device)

    def run(
        self,
        loss: Callable[[Step], dict[str, Tensor]],
        validate: Validate[Network] | None,
        log: TrainingLog | None,
        stop: Stop,
        bar: Any,
    ) -> None:
        """All steps that are left; see :func:`fit`. The first process has a log."""
        settings = self.settings

        def watched(title: str, items: Iterable[Any]) -> Iterator[Any]:
            for item in progress.bar(title, log is not None)(items):
                stop.check()
                if self.mark is not None:
                    self.mark.still_there()
                yield item

        began = monotonic()
        due = began + 60 * settings.checkpoint_minutes
        for number in range(self.done, settings.steps):
            with stop.abortable():
                if asked := highest(self.world, stop.number or 0):
                    raise Interrupted(number=asked)
                rate = self._set_learning_rate(number)
                step = Step(number, np.random.default_rng([settings.seed, number]), self._autocast, watched)
                parts = self._gradient(loss, step)
            self._update(number, parts["loss"])
            row: dict[str, float] = {}
            if self.done % settings.log_every == 0 or self.done == settings.steps:
                self._check_finite()
                row = {name: float(value) for name, value in parts.items()}
                row |= {"learning_rate": rate, "seconds": monotonic() - began}
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            pause = self.done % settings.validate_every == 0 or self.done == settings.steps
            try:
                if pause and validate is not None:
                    self._check_finite()
                    with stop.abortable():
                        row |= validate(watched, self.trained.weights)
            finally:
                if row and log is not None:
                    try:
                        log.write(self.done, row)
                    # Nor is a full disk, which the checkpoint may find with room again.
                    except OSError as error:
                        warnings.warn(f"log.csv lacks step {self.done}, until the next row: {error}", stacklevel=2)
            if log is not None and self.keep_best is not None and row.get("validation_dice", -1.0) > self.best:
                try:
                    self._check_mark()
                    self.keep_best(self.trained, self.done, row["validation_dice"])
                    self.best = row["validation_dice"]
                except MarkLostError:
                    raise
                # Such as somebody's file in its folder: no reason to end a training.
                except (GrcsfError, OSError) as error:
                    warnings.warn(f"the best weights so far, of step {self.done}, are not kept: {error}", stacklevel=2)
            if pause or monotonic() >= due:
                saved = self._save_on_the_way()
                seconds = 60 * settings.checkpoint_minutes
                due = monotonic() + (seconds if saved else min(seconds, AGAIN_SECONDS))
            if pause and log is not None:
                try:
                    log.draw()
                except OSError as error:
                    warnings.warn(f"curves.png of step {self.done} is not drawn: {error}", stacklevel=2)
            bar.update()

    def _set_learning_rate(self, number: int) -> float:
        rate = self.settings.learning_rate * _schedule(number, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _gradient(self, loss: Callable[[Step], dict[str, Tensor]], step: Step) -> dict[str, Tensor]:
        """Of all batches of a step, in the parameters; returns the parts of the loss, averaged."""
        self.optimizer.zero_grad()
        total: dict[str, Tensor] = {}
        count = self.settings.accumulate
        for _ in range(count):
            parts = loss(step)
            (parts["loss"] / count if count > 1 else parts["loss"]).backward()
            for name, value in parts.items():
                total[name] = total.get(name, 0) + value.detach() / count
        return total

    def _update(self, number: int, loss: Tensor) -> None:
        sum_gradients(self.world, self.model.parameters())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        bad = ~torch.isfinite(norm) & (self.bad_step < 0)
        self.bad_step = torch.where(bad, number, self.bad_step)
        self.bad_loss = torch.where(bad, loss.float(), self.bad_loss)
        if self.device.type == "cpu":  # where it is known already
            self._check_finite()
        self.whole = False
        self.optimizer.step()
        if self.average is not None:
            self._take_average(number)
        self.done, self.whole = number + 1, True

    def _check_finite(self) -> None:
        number = int(self.bad_step)
        if number >= 0:
            raise TrainError(f"step {number}: the gradient is not finite (loss {float(self.bad_loss):g})")

    @torch.no_grad()
    def _take_average(self, number: int) -> None:
        """Nearer to the weights at first, of which the first ones are random."""
        decay = min(self.settings.ema, (1 + number) / (10 + number))
        assert self.average is not None
        for own, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
            own.lerp_(new, 1 - decay)
        for own, new in zip(self.average.buffers(), self.model.buffers(), strict=True):
            own.copy_(new)
        # Training with maps sets it, which a copy made before does not see.
        for own, new in zip(self.average.modules(), self.model.modules(), strict=True):
            if isinstance(own, GRCSF) and isinstance(new, GRCSF):
                own.requires_maps = new.requires_maps

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.trained.precision.precision == "bfloat16")

    def _check_mark(self) -> None:
        if self.mark is not None:
            self.mark.renew()

    def save(self) -> None:
        """Write the checkpoint, in the first process.

        Raises:
            TrainError: the weights are those of a training that has diverged, or the folder is another training's.
            OSError: it cannot be written.
        """
        self._check_finite()
        if self.world.rank == 0:
            self._check_mark()
            self.checkpoint.save(self.done, self.trained.precision)
        self.saved = self.done

    def _save_on_the_way(self) -> bool:
        """Whether it could be written; a disk that is full for a while ends no training of days.

        Raises:
            TrainError: see :meth:`save`.
            OSError: it could not, for the third time, or after the last step.
        """
        try:
            self.save()
        except OSError as error:
            self.failures += 1
            if self.failures >= MOST_FAILURES or self.done == self.settings.steps:
                raise
            warnings.warn(f"step {self.done} is not saved, which is tried again in a minute: {error}", stacklevel=2)
            return False
        self.failures = 0
        return True

    def stopped(self, error: BaseException) -> None:
        """Save what is done and raise the error again with a word on how to go on.

        Raises:
            Interrupted: for a KeyboardInterrupt.
            UnfinishedError: for errors that the user can change, want of memory too, once a step is done.
        """
        lost = isinstance(error, MarkLostError)
        diverged = isinstance(error, TrainError) and not lost
        # On GPUs the sums of a step that another process has not ended would be waited for without end.
        alone = isinstance(error, OtherEndedError) and self.device.type == "cuda"
        # Of a training that has diverged the last checkpoint is the better one.
        if self.whole and self.done > self.saved and not diverged and not lost and not alone:
            try:
                self.save()
            except (OSError, TrainError) as further:
                error.add_note(f"the steps since the last checkpoint could not be saved: {further}")
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        state = f"RANK {self.world.rank} " if self.world.size > 1 else ""
        state += f"stopped after step {self.done} of {self.settings.steps}; "
        state += f"what came after step {self.saved} is not saved" if lost else f"{self._what_is_saved()}{notes}"
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(state, getattr(error, "number", Interrupted().number)) from error
        if diverged:
            state += "; with the same options the same would happen again, so begin anew with others, such as a "
            state += "smaller --learning-rate or --precision float32"
        if isinstance(error, GrcsfError | OSError) or is_out_of_memory(error):
            if self.done:
                reason = "not enough memory, a smaller batch needs less: " if is_out_of_memory(error) else ""
                raise UnfinishedError(f"{reason}{error}\n{state}") from error
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
