"""Train the network of the packaged weights; ``make weights``, in one process beside those that draw the subjects.

Subjects come from two generators by turns: of four one is the frozen one's, whose lesions are plainer, and three are
the package's, one of them with the contrast of T2, FLAIR or PD, where lesions are bright. The training starts from the
packaged weights where they fit, whose card has the history of all trainings; ``--from-scratch`` starts from nothing.
Each training of that history has a seed of its own, so that it sees subjects that none before it saw. What is stopped
goes on with the same command.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import synthesizer_2025
from grcsf_fast.cli.training_cases import SLICES_A_SUBJECT
from grcsf_fast.errors import Interrupted
from grcsf_fast.networks.grcsf import GRCSF
from grcsf_fast.pretrained.bundle import Bundle, load_bundle
from grcsf_fast.runtime.processes import World
from grcsf_fast.runtime.progress import bar
from grcsf_fast.runtime.versions import versions
from grcsf_fast.synthesis.contrast import SEQUENCES
from grcsf_fast.synthesis.subjects import Subject, synthesize_subject
from grcsf_fast.synthesis.template import Template
from grcsf_fast.training.network import train_network
from grcsf_fast.training.settings import TrainingRun, TrainSettings
from grcsf_fast.training.synthetic import (
    SEEDS_A_RUN,
    TRAINING_SEEDS,
    VALIDATION_SEEDS,
    SyntheticSource,
    drawing_spacings,
)
from grcsf_fast.training.workers import default_workers

FEATURES = (16, 32, 64, 128, 128)
CROWDED = 0.25
# Of the subjects of four seeds in turn: "frozen" by that synthesizer, or the contrast that the package's draws; None
# stands for one sequence after the other that is no T1.
TURNS = ("frozen", "random", None, "random")


class TwoGenerators(SyntheticSource):
    """Subjects of the package's synthesizer and of the frozen one, see ``TURNS``."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.turns = TURNS  # of the data that a checkpoint describes

    def draw(self, template: Template, seed: int, total_ml: float | None, count: int | None) -> Subject:
        turn = self.turns[seed % len(self.turns)]
        if turn != "frozen":
            others = SEQUENCES[1:]
            contrast = turn or others[seed // len(self.turns) % len(others)]
            return synthesize_subject(template, seed, self.lesions, self.skull, contrast, total_ml, count)
        drawn = synthesizer_2025.synthesize_subject(
            template, seed, self.lesions, self.skull, total_ml=total_ml, count=count
        )
        # Which does not know the head without its lesions.
        return Subject(drawn.image, drawn.lesion, drawn.brain, drawn.image, drawn.affine, drawn.record)


def started_from(weights: dict[str, Tensor], network: GRCSF) -> list[str]:
    """Copy the weights that fit; returns the names of what the network keeps of its own.

    A first convolution that sees more slices takes over the kernel of the middle one and is 0 for the others.
    """
    own = network.state_dict()
    first = "encoder.0.0.weight"
    given = {name: values.float() for name, values in weights.items() if name in own}
    if given[first].shape != own[first].shape:
        middle = torch.zeros_like(own[first])
        channels = given[first].shape[1]
        start = (own[first].shape[1] - channels) // 2
        middle[:, start : start + channels] = given[first]
        given[first] = middle
    network.load_state_dict(own | given)
    return [name for name in own if name not in given]


def train(packaged: Bundle, output: Path, steps: int, from_scratch: bool) -> Path:
    """Train and write a bundle; returns its folder."""
    history = [] if from_scratch else packaged.card["history"]
    settings = TrainSettings(
        steps=steps, crop_size_jitter=16, learning_rate=3e-3 if from_scratch else 1.5e-3, warmup_steps=500,
        seed=len(history), replace_every=20, augment="flips",
    )  # fmt: skip
    device = torch.device("cpu")
    residual = replace(packaged.residual_maps, signed=True)
    torch.manual_seed(settings.seed)
    network = GRCSF(
        2, 1, 1, FEATURES, 4, rcu_levels=(1, 2), mask_ratios=residual.mask_ratios, neighbours=1, requires_maps=True
    )
    start = "nothing"
    if not from_scratch:
        fresh = started_from(packaged.network.state_dict(), network)
        start = packaged.weights_sha256
        print(f"starts from the packaged weights, but for {', '.join(fresh) or 'none'}")
    finer = drawing_spacings(packaged.preprocessing.spacing[0])
    first_seed = TRAINING_SEEDS + SEEDS_A_RUN * settings.seed
    source = TwoGenerators(packaged.preprocessing, first_seed, slices=SLICES_A_SUBJECT, drawn_at=finer, crowded=CROWDED)
    validating = SyntheticSource(packaged.preprocessing, VALIDATION_SEEDS, spread=6, drawn_at=finer[:1])
    validation = [validating[index] for index in bar("drawing validation cases")(range(6))]
    card = {
        "trained_on": "synthetic subjects with lesions, two generators",
        "command": "python -m benchmarks.weights",
        "started_from": start,
        "history": [*history, f"{steps} steps of `python -m benchmarks.weights --steps {steps}`, seed {settings.seed}"],
        "settings": asdict(settings),
        "versions": versions(),
        "notice": "Research software; not a medical device and not for clinical use.",
    }
    where = TrainingRun(
        output, settings, packaged.preprocessing, residual, device, resume=True, card=card,
        initial_sha256=None if from_scratch else start, workers=default_workers(device, World()),
    )  # fmt: skip
    return train_network(network, packaged.mae, source, validation, where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for checkpoint, log and bundle")
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--from-scratch", action="store_true", help="do not start from the packaged weights")
    options = parser.parse_args()
    try:
        print(train(load_bundle("demo"), options.output, options.steps, options.from_scratch))
    except Interrupted as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
