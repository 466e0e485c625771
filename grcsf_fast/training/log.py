"""The record of a training: ``log.csv``, and ``curves.png`` drawn from it."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..data.files import replace_when_done
from ..errors import ArgumentError

__all__ = ["TrainingLog", "check_tensorboard"]


def check_tensorboard() -> Any:
    """The class that writes for TensorBoard.

    Raises:
        ArgumentError: the package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ArgumentError(
            f"--tensorboard: expected the package tensorboard, found none ({error}); in a checkout of grcsf-fast: "
            'pip install ".[tensorboard]"'
        ) from error
    return SummaryWriter


class TrainingLog:
    """A row per line of the log; those after the step ``first`` of an earlier run are dropped.

    Args:
        output: folder of ``log.csv`` and ``curves.png``.
        first: the last step of an earlier run whose rows count.
        tensorboard: write to the folder ``tensorboard`` too.
        check: called before anything is written; raises where this training may write no more.
    """

    COLUMNS: tuple[str, ...] = (
        "step", "loss", "segmentation_loss", "score_loss", "learning_rate", "seconds",
        "validation_dice", "validation_dice_median",
    )  # fmt: skip

    def __init__(
        self, output: Path, first: int, tensorboard: bool = False, check: Callable[[], None] = lambda: None
    ) -> None:
        self.check = check
        self.path = output / "log.csv"
        self.picture = output / "curves.png"
        kept = [row for row in self._read() if int(row["step"]) <= first] if first else []
        with replace_when_done(self.path) as (part,), part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        self.waiting: list[dict[str, Any]] = []  # rows that could not be written yet
        # Of the steps that are done again TensorBoard then shows the new values alone.
        self.events = check_tensorboard()(str(output / "tensorboard"), purge_step=first + 1) if tensorboard else None

    def close(self) -> None:
        with suppress(OSError):  # all that was to be written was flushed
            if self.events is not None:
                self.events.close()

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            # A kill can leave half a row at the end.
            return [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdigit()]

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """A row; what cannot be written, of a full disk say, is with the next one.

        Raises:
            OSError: the row could not be written into ``log.csv``.
        """
        self.waiting.append({"step": step} | {name: f"{value:.6g}" for name, value in row.items()})
        self.check()
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.COLUMNS).writerows(self.waiting)
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, size)  # rows in part
            raise
        written, self.waiting = self.waiting, []
        for waited in written:
            self._write_events(**waited)

    def _write_events(self, step: int, **row: str) -> None:
        """The same for TensorBoard, whose writer, once it has failed, fails for ever."""
        if self.events is None:
            return
        try:
            for name, value in row.items():
                self.events.add_scalar(name, float(value), step)
            self.events.flush()
        except OSError as error:
            warnings.warn(f"tensorboard lacks step {step} and what follows: {error}; log.csv has it all", stacklevel=2)
            self.events = None

    def draw(self) -> None:
        from matplotlib.figure import Figure

        self.check()
        rows = self._read()
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for name in ("loss", "segmentation_loss", "score_loss"):
            points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        if axes.lines:
            axes.legend(loc="upper right")
        points = [(int(row["step"]), float(row["validation_dice"])) for row in rows if row["validation_dice"]]
        if points:
            right = axes.twinx()
            right.plot(*zip(*points, strict=True), "k.-", label="validation Dice")
            right.set(ylabel="validation Dice", ylim=(0, 1))
            right.legend(loc="lower left")
        with replace_when_done(self.picture) as (part,):
            figure.savefig(part, dpi=120)
