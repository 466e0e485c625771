"""Training of the masked autoencoder and of the network: one loop, checkpoints, exact resume, CSV log and curves."""

from __future__ import annotations

import csv
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import progress
from .bundle import Bundle, ResidualSettings, save_bundle
from .data.datasets import AUGMENTATIONS, Case, CasePool, Source, augmentation, sample_crops
from .data.files import check_writable, replace_when_done, share
from .data.volumes import Preprocessing
from .engine import segment
from .networks.grcsf import GRCSF
from .networks.mae import MaskedAutoencoder
from .predict import multiplies_bfloat16
from .residuals import volume_residual_maps

__all__ = ["TrainError", "TrainSettings", "train_mae", "train_network"]


class TrainError(ValueError):
    """A training that cannot go on; the message says why."""


@dataclass(frozen=True)
class TrainSettings:
    """What a training does; the same settings and seed give the same weights on the same machine and threads.

    Attributes:
        steps: optimiser steps.
        batch_size: crops a step.
        crop: edge lengths in voxels; two: axial slices, three: boxes.
        crop_jitter: each edge of a step's crops is longer or shorter by this, or neither; a network with instance
            norms then learns heads that fill the picture more or less.
        learning_rate: peak of the cosine schedule.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        seed: of weights, crops, augmentation and masks.
        pool_size: cases held in memory.
        refresh: steps after which one case of the pool is replaced; 0: never.
        lesion_share: share of crops that hold lesion.
        score_weight: weight of the score loss against Dice + focal.
        augment: ``"all"``: random flips, affine and intensity changes; ``"flips"``: left and right alone, for
            synthetic subjects, which vary in all else; or ``"none"``.
        autocast: ``"auto"``: bfloat16 where the processor or GPU multiplies it natively; ``"bf16"`` or ``"off"``.
        log_every: steps between log lines.
        validate_every: steps between validations and checkpoints.
    """

    steps: int = 19000
    batch_size: int = 8
    crop: tuple[int, ...] = (96, 112)
    crop_jitter: int = 0
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 200
    seed: int = 0
    pool_size: int = 64
    refresh: int = 20
    lesion_share: float = 0.6
    score_weight: float = 0.2
    augment: str = "all"
    autocast: str = "auto"
    log_every: int = 25
    validate_every: int = 2000

    def __post_init__(self) -> None:
        if self.autocast not in ("auto", "bf16", "off"):
            raise ValueError(f"autocast: expected 'auto', 'bf16' or 'off', got {self.autocast!r}")
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"augment: expected one of {AUGMENTATIONS}, got {self.augment!r}")
        for names, least in (
            (("steps", "batch_size", "pool_size", "log_every", "validate_every"), 1),
            (("warmup", "refresh"), 0),
        ):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if not 0 <= self.lesion_share <= 1:
            raise ValueError(f"lesion_share: expected a number in [0, 1], got {self.lesion_share}")
        if len(self.crop) not in (2, 3) or min(self.crop) < 1:
            raise ValueError(f"crop: expected two or three edge lengths, got {self.crop}")
        if not 0 <= self.crop_jitter < min(self.crop):
            raise ValueError(
                f"crop_jitter: expected 0 to less than an edge of the crop {self.crop}, got {self.crop_jitter}"
            )

    def crop_of_step(self, rng: np.random.Generator) -> list[int]:
        """Edge lengths of one step's crops."""
        return [edge + self.crop_jitter * int(rng.integers(-1, 2)) for edge in self.crop]


def train_mae(
    output: str | Path,
    source: Source,
    mae: MaskedAutoencoder,
    settings: TrainSettings,
    preprocessing: Preprocessing,
    residual: ResidualSettings,
    device: torch.device,
    resume: bool = False,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Train a masked autoencoder on crops of a source and write ``output/bundle``.

    Args:
        output: folder for checkpoint, log, curves and bundle.
        source: of the training cases; lesions in them are not used.
        mae: trained in place.
        settings: see :class:`TrainSettings`; each step draws one of ``residual.ratios``.
        preprocessing: stored in the bundle.
        residual: stored in the bundle.
        device: to train on.
        resume: go on from the checkpoint in ``output``.
        card: what the bundle says of the training.

    Returns:
        The bundle's folder.

    Raises:
        TrainError: a checkpoint that is in the way or of other settings; a gradient that is not finite.
        OSError: ``output`` cannot be written.
    """
    mae.to(device)
    pool = _pool(source, settings, lambda case: case)
    augment = augmentation(mae.spatial_dims, ["image"], settings.augment)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        cases = pool.at(step, progress.bar("preparing cases"))
        batch = sample_crops(cases, settings.batch_size, settings.crop_of_step(rng), 0.0, rng)
        batch = augment({"image": batch["image"]}, int(rng.integers(2**31)))
        image = batch["image"].to(device)
        ratio = residual.ratios[int(rng.integers(len(residual.ratios)))]
        patches = int(np.prod(mae.grid(image.shape[2:])))
        shown = max(1, int(patches * (1 - ratio)))
        visible = torch.from_numpy(rng.random((len(image), patches)).argsort(1)[:, :shown]).to(device)
        with _autocast(settings, device):
            return {"loss": mae.loss(image, visible)}

    describes = {"mae": mae.config, "residual": asdict(residual), "preprocessing": asdict(preprocessing)}
    _fit(Path(output), mae, settings, loss, None, device, resume, describes)
    bundle = Bundle(None, mae, preprocessing, residual, card=card or {})
    return save_bundle(bundle, Path(output) / "bundle")


def train_network(
    output: str | Path,
    source: Source,
    validation: Sequence[Case],
    network: GRCSF,
    mae: MaskedAutoencoder | None,
    settings: TrainSettings,
    preprocessing: Preprocessing,
    residual: ResidualSettings,
    device: torch.device,
    resume: bool = False,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Train the segmentation network with Dice + focal loss and the score loss, and write ``output/bundle``.

    The bundle holds the weights after the last step: the cosine schedule ends at a learning rate of 0, where the last
    weights and the best ones are nearly the same.

    Args:
        output: folder for checkpoint, log, curves and bundle.
        source: of the training cases; each needs a lesion mask.
        validation: cases measured every ``validate_every`` steps; never trained on.
        network: trained in place.
        mae: makes the residual maps; None for a network that needs none.
        settings: see :class:`TrainSettings`.
        preprocessing: stored in the bundle.
        residual: how residual maps are made.
        device: to train on.
        resume: go on from the checkpoint in ``output``.
        card: what the bundle says of the training.

    Returns:
        The bundle's folder.

    Raises:
        TrainError: a checkpoint that is in the way or of other settings; a gradient that is not finite.
        OSError: ``output`` cannot be written.
    """
    from monai.losses import DiceFocalLoss

    if len(settings.crop) != network.spatial_dims:
        raise ValueError(f"crop: expected {network.spatial_dims} edge lengths for this network, got {settings.crop}")
    network.to(device)
    if mae is not None:
        mae.to(device).eval()
    criterion = DiceFocalLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)

    def with_residual(case: Case) -> Case:
        if mae is None or case.residual is not None:
            return case
        maps = volume_residual_maps(case.image.to(device), mae, residual.ratios, residual.rounds, residual.seed)
        return replace(case, residual=maps.cpu())

    pool = _pool(source, settings, with_residual)
    keys = ["image", "lesion"] + (["residual"] if mae is not None else [])
    augment = augmentation(network.spatial_dims, keys, settings.augment)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        cases = pool.at(step, progress.bar("preparing cases"))
        batch = sample_crops(cases, settings.batch_size, settings.crop_of_step(rng), settings.lesion_share, rng)
        batch = augment(batch, int(rng.integers(2**31)))
        lesion = batch["lesion"].to(device)
        maps = batch["residual"].to(device) if "residual" in batch else None
        with _autocast(settings, device):
            logits, seen = network(batch["image"].to(device), maps, return_maps=True)
        segmentation = criterion(logits.float(), lesion)
        parts = {"loss": segmentation, "segmentation_loss": segmentation}
        # Scores of a run that has diverged are no probabilities; the loop says so better than the loss would.
        if seen.scores and torch.isfinite(segmentation):
            parts["score_loss"] = _score_loss(network, seen.scores, lesion)
            parts["loss"] = segmentation + settings.score_weight * parts["score_loss"]
        return parts

    window = settings.crop if network.spatial_dims == 3 else None
    prepared: list[Case] = []

    def validate() -> dict[str, float]:
        if not prepared:
            prepared.extend(with_residual(case) for case in progress.bar("preparing validation")(validation))
        dice = [_dice(network, case, device, window) for case in prepared]
        return {"validation_dice": float(np.mean(dice)), "validation_dice_median": float(np.median(dice))}

    _fit(
        Path(output),
        network,
        settings,
        loss,
        validate if validation else None,
        device,
        resume,
        {
            "network": network.config,
            "residual": asdict(residual),
            "preprocessing": asdict(preprocessing),
            "mae_sha256": _digest(mae) if mae is not None else None,
        },
    )
    bundle = Bundle(network, mae, preprocessing, residual, window=window, card=card or {})
    return save_bundle(bundle, Path(output) / "bundle")


def _pool(source: Source, settings: TrainSettings, finish: Callable[[Case], Case]) -> CasePool:
    """The pool of a training; says so where the settings leave cases of a folder unseen."""
    count = len(source) if hasattr(source, "__len__") else None
    size = settings.pool_size if count is None else min(settings.pool_size, count)
    refresh = 0 if size == count else settings.refresh
    seen = size + (settings.steps // refresh if refresh else 0)
    if count is not None and seen < count:
        print(f"{seen} of {count} cases will be seen; lower --refresh or raise --pool-size or --steps to see all")
    return CasePool(source, size, refresh, finish)


def _digest(module: nn.Module) -> str:
    """Hash of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _score_loss(network: GRCSF, scores: Mapping[int, Tensor], lesion: Tensor) -> Tensor:
    """Binary cross-entropy of each patch's score against whether the patch holds lesion, averaged over the levels."""
    pool = F.max_pool2d if network.spatial_dims == 2 else F.max_pool3d
    losses = []
    for level, score in scores.items():
        step = network.rcu[str(level)].patch_size * 2**level
        target = pool(lesion, step, ceil_mode=True)
        losses.append(F.binary_cross_entropy(score.float(), target))
    return torch.stack(losses).mean()


@torch.no_grad()
def _dice(network: GRCSF, case: Case, device: torch.device, window: tuple[int, ...] | None) -> float:
    was_training = network.training
    network.eval()
    maps = case.residual.float().to(device) if case.residual is not None else None
    probability = segment(network, case.image.to(device), maps, window=window).cpu()
    network.train(was_training)
    predicted = probability >= 0.5
    both = int(predicted.sum()) + int(case.lesion.sum())
    return 2 * int((predicted & case.lesion).sum()) / both if both else 1.0


def _fit(
    output: Path,
    model: nn.Module,
    settings: TrainSettings,
    loss: Callable[[int, np.random.Generator], dict[str, Tensor]],
    validate: Callable[[], dict[str, float]] | None,
    device: torch.device,
    resume: bool,
    describes: Mapping[str, Any],
) -> None:
    """The loop both trainings share. All randomness of a step comes from (seed, step)."""
    check_writable(output)
    checkpoint = output / "checkpoint.safetensors"
    signature = json.dumps({"settings": asdict(settings), **describes}, sort_keys=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    first = 0
    if resume:
        first = _load_checkpoint(checkpoint, model, optimizer, signature, device)
    elif checkpoint.exists():
        raise TrainError(f"{checkpoint}: a training was begun here; go on with --resume or choose another folder")
    log = _Log(output, first)
    model.train()
    began = time.monotonic()
    bar = progress.steps(settings.steps, first, "training")
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        parts = loss(step, np.random.default_rng([settings.seed, step]))
        optimizer.zero_grad()
        parts["loss"].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        if not torch.isfinite(norm):
            raise TrainError(f"step {step}: the gradient is not finite (loss {float(parts['loss'].detach()):g})")
        optimizer.step()
        done = step + 1
        row: dict[str, float] = {}
        if done % settings.log_every == 0 or done == settings.steps:
            row = {name: float(value.detach()) for name, value in parts.items()}
            row["learning_rate"] = optimizer.param_groups[0]["lr"]
            row["seconds"] = time.monotonic() - began
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        pause = done % settings.validate_every == 0 or done == settings.steps
        if pause and validate is not None:
            row |= validate()
        if row:
            log.write(done, row)
        if pause:
            _save_checkpoint(checkpoint, model, optimizer, done, signature)
            log.draw()
        bar.update()
    bar.close()


def _schedule(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine down to 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + float(np.cos(np.pi * share)))


def _save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, signature: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {f"model.{name}": tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor.detach().cpu() for name, tensor in state.items()}
    metadata = {"step": str(step), "signature": signature}
    with replace_when_done(path) as (part,):
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written: {error}") from error
        share(part)


def _load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, signature: str, device: torch.device
) -> int:
    """Restore model and optimiser; returns the number of steps done, 0 where there is no checkpoint yet."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return 0  # stopped before the first checkpoint
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise TrainError(f"{path}: expected a checkpoint, could not read it: {error}") from error
    if metadata.get("signature") != signature or "step" not in metadata:
        raise TrainError(
            f"{path}: expected a checkpoint of these settings {signature}, found one of {metadata.get('signature')}"
        )
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


class _Log:
    """``log.csv``, a row a line of the log, and ``curves.png`` drawn from it."""

    COLUMNS = (
        "step", "loss", "segmentation_loss", "score_loss", "learning_rate", "seconds",
        "validation_dice", "validation_dice_median",
    )  # fmt: skip

    def __init__(self, output: Path, first: int) -> None:
        self.path = output / "log.csv"
        self.picture = output / "curves.png"
        kept = [row for row in self._read() if int(row["step"]) <= first] if first else []
        with replace_when_done(self.path) as (part,), part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            # A kill can leave half a row at the end.
            return [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdigit()]

    def write(self, step: int, row: Mapping[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerow(
                {"step": step} | {name: f"{value:.6g}" for name, value in row.items()}
            )

    def draw(self) -> None:
        from matplotlib.figure import Figure

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


@contextmanager
def _autocast(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    enabled = settings.autocast == "bf16" or (settings.autocast == "auto" and multiplies_bfloat16(device))
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        yield
