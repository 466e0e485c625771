"""Checkpoints of a training: weights, optimiser, and what is trained, so that it goes on as the same or not at all.

A training goes on exactly with the same settings, networks and data. Settings that do not change a step may differ;
so may the number of steps, to which the learning rate's schedule is stretched from there on. Our own code, as no
library's checkpoint names what differs or refuses other data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.files import allow_reading, check_writable, replace_when_done
from ..datasets.cases import Chosen
from ..datasets.sources import FileSource
from ..errors import GrcsfError
from ..runtime.precision import Choice
from ..runtime.processes import World, gathered, said_by_first
from ..runtime.progress import bar
from .synthetic import SyntheticSource

__all__ = [
    "CHECKPOINT_NAME",
    "Checkpoint",
    "Restored",
    "TrainError",
    "check_output",
    "describe_data",
    "describe_validation",
    "weights_digest",
]

CHECKPOINT_NAME = "checkpoint.safetensors"
FORMAT_VERSION = "4"
FREE = ("steps", "log_every", "validate_every", "checkpoint_minutes")
MOST_NAMED = 5  # cases in a message


class TrainError(GrcsfError, ValueError):
    """A training that cannot begin or go on; the message says why."""


@dataclass(frozen=True)
class Restored:
    """Where a training stood.

    Attributes:
        step: steps done.
        steps: that were planned.
        precision: bfloat16 or float32, as it was chosen, and why.
    """

    step: int
    steps: int
    precision: Choice


def check_output(output: str | Path, resume: bool) -> Path:
    """See that a training may write to a folder, before anything is read or computed; returns its checkpoint's path.

    Raises:
        TrainError: another training was begun there.
        OSError: the folder cannot be written.
    """
    path = check_writable(output) / CHECKPOINT_NAME
    if path.exists() and not resume:
        raise TrainError(f"{path}: a training was begun here; go on with --resume or choose another folder")
    return path


class Checkpoint:
    """The checkpoint of one training.

    Args:
        path: of the file.
        model: its weights are saved and restored.
        optimizer: of the model.
        settings: all of them; those of ``FREE`` may differ when it is restored.
        describes: what else must be the same, JSON values by name.
        average: of the model's weights; saved and restored too.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Mapping[str, Any],
        describes: Mapping[str, Any],
        average: nn.Module | None = None,
    ) -> None:
        self.path, self.model, self.optimizer = path, model, optimizer
        self.parts = {"model": model} | ({"average": average} if average is not None else {})
        self.steps = settings["steps"]
        fixed = {name: value for name, value in settings.items() if name not in FREE}
        # Through JSON, so that tuples are lists as in the file.
        self.training = json.loads(json.dumps(fixed | dict(describes)))

    def stamp(self) -> tuple[int, ...] | None:
        """Differs once the file was written again; None where there is none."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def save(self, step: int, precision: Choice) -> None:
        """Write it; until that is complete an earlier one stays.

        Raises:
            OSError: it cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {
            f"{part}.{name}": tensor.detach().cpu()
            for part, module in self.parts.items()
            for name, tensor in module.state_dict().items()
        }
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor.detach().cpu() for name, tensor in state.items()}
        metadata = {
            "version": FORMAT_VERSION,
            "step": str(step),
            "steps": str(self.steps),
            "precision": precision.precision,
            "precision_reason": precision.reason,
            "training": json.dumps(self.training, sort_keys=True),
        }
        with replace_when_done(self.path) as (part,):
            try:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
            except SafetensorError as error:
                raise OSError(f"{self.path}: could not be written: {error}") from error
            allow_reading(part)

    def load(self) -> Restored | None:
        """Restore model and optimiser; None where there is no checkpoint yet.

        Raises:
            TrainError: not a checkpoint, of another version, or of another training, whose differences it names.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return None  # stopped before the first one
        try:
            # On the processor: model and optimiser copy what they need. The optimiser's numbers of steps stay there, as
            # in a training that was not resumed; torch reads them in every step, for which a GPU would have to wait.
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                restored = self._checked(metadata)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise TrainError(f"{self.path}: expected a checkpoint, could not read it: {error}") from error
        for part, module in self.parts.items():
            prefix = f"{part}."
            module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        return restored

    def _checked(self, metadata: Mapping[str, str]) -> Restored:
        if metadata.get("version") != FORMAT_VERSION:
            found = "one of an earlier version" if "signature" in metadata else "none in this file"
            raise TrainError(
                f"{self.path}: expected a checkpoint of format {FORMAT_VERSION}, found {found}; "
                "begin again in another folder"
            )
        try:
            # Those of before do not say why.
            precision = Choice(metadata["precision"], metadata.get("precision_reason", "as in the checkpoint"))
            restored = Restored(int(metadata["step"]), int(metadata["steps"]), precision)
            # Those of before do not say what is validated on, and go on with anything.
            saved = {"validation": self.training.get("validation"), **json.loads(metadata["training"])}
        except (KeyError, ValueError) as error:
            raise TrainError(f"{self.path}: expected a checkpoint, its description is damaged: {error!r}") from error
        found = differences(saved, self.training)
        if self.steps < restored.step:
            found.insert(0, f"steps: the checkpoint has done {restored.step}, now {self.steps}")
        if found:
            free = ", ".join(f"--{name.replace('_', '-')}" for name in (*FREE, "workers"))
            raise TrainError(
                f"{self.path}: expected to go on with the same training; only {free} and --threads may differ"
                + "".join(f"\n  {text}" for text in found)
            )
        return restored


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two trainings differ in, a line each: ``learning_rate: the checkpoint has 0.003, now 0.001``."""
    found = []
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) == now.get(name):
            continue
        before, after = saved.get(name), now.get(name)
        if not isinstance(before, dict) or not isinstance(after, dict):
            found.append(f"{name}: the checkpoint has {_shown(saved, name)}, now {_shown(now, name)}")
        elif name == "cases":
            found += _case_differences(before, after)
        else:
            found += [f"{name} {line}" for line in differences(before, after)]
    return found


def _shown(values: Mapping[str, Any], name: str) -> str:
    text = json.dumps(values[name]) if values.get(name) is not None else "none"
    return text if len(text) <= 80 else text[:77] + "..."


def _case_differences(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    kinds = {
        "unknown to the checkpoint": now.keys() - saved.keys(),
        "of the checkpoint that are missing now": saved.keys() - now.keys(),
        "with other content than for the checkpoint": {
            name for name in saved if now.get(name, saved[name]) != saved[name]
        },
    }
    lines = []
    for text, names in kinds.items():
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            lines.append(f"cases {text}: {', '.join(sorted(names)[:MOST_NAMED])}{more}")
    return lines


def describe_data(source: Any, progress: Callable[[list[str]], Iterable[str]] = lambda names: names) -> dict[str, Any]:
    """What the cases of a training are: of files the content of each file, of synthetic subjects how they are drawn.

    Args:
        source: of the cases; of other classes than the two of this package the class alone is known.
        progress: wraps the list of names whose files are read.
    """
    if isinstance(source, FileSource):
        return {"cases": {name: source.content(name) for name in progress(list(source.names))}}
    if isinstance(source, SyntheticSource):
        drawn = {name: value for name, value in vars(source).items() if name != "preprocessing"}
        return {"synthetic": drawn}
    return {"source": type(source).__name__}


def describe_validation(cases: Sequence[Any], world: World) -> dict[str, Any]:
    """What the cases of a validation are, of all processes together; of cases in memory nothing is known.

    Args:
        cases: this process's.
        world: processes that train together.
    """
    if not isinstance(cases, Chosen):
        return {}
    numbers = sorted(number for own in gathered(world, list(cases.numbers)) for number in own)
    source = cases.source
    if isinstance(source, FileSource):
        source = source.part([source.names[number] for number in numbers])
    return said_by_first(world, lambda: describe_data(source, bar("reading validation cases for resume")))


def weights_digest(module: nn.Module) -> str:
    """Hash of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
