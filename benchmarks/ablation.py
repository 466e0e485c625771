"""What each unit adds, trained with the same budget, data and seeds: ``make ablation``.

All variants see the same prepared synthetic subjects and, for one seed, the same crops in the same order; only the
network differs, and what it shares with the backbone starts with the same weights. The small setting (stripped heads in
the template's own contrast, narrow network, few steps) serves to compare variants, not to reach the shipped model's
figures. Runs that are already in the output folder are not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from grcsf_fast.data.files import replace_when_done
from grcsf_fast.datasets.cases import Case
from grcsf_fast.networks.gcu import GlobalCompensationUnit
from grcsf_fast.networks.grcsf import GRCSF
from grcsf_fast.networks.residual_maps import volume_residual_maps
from grcsf_fast.networks.unet import conv
from grcsf_fast.networks.whole_volume import segment
from grcsf_fast.pretrained.bundle import Bundle, load_bundle
from grcsf_fast.runtime.versions import versions
from grcsf_fast.training.network import train_network
from grcsf_fast.training.settings import TrainingRun, TrainSettings
from grcsf_fast.training.synthetic import ABLATION_SEEDS, ABLATION_TEST_SEEDS, SyntheticSource

FEATURES = (12, 24, 48, 96)


class MapsAsChannels(GRCSF):
    """The backbone with the residual maps as further channels of its input."""

    def forward(self, image: Tensor, residual_maps: Tensor, return_maps: bool = False):
        return super().forward(torch.cat([image, residual_maps], 1), None, return_maps)


class DetachedCompensation(GlobalCompensationUnit):
    """``F * (1 + RM)`` without gradients through RM."""

    def combine(self, features: Tensor, compensated: Tensor, residual: Tensor) -> Tensor:
        residual = residual.detach()
        return features * (1 + residual)


class LearnedStrength(GlobalCompensationUnit):
    """``F * (1 + g RM)`` with a learned g a channel that starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.strength = nn.Parameter(torch.zeros(channels))

    def combine(self, features: Tensor, compensated: Tensor, residual: Tensor) -> Tensor:
        return features * (1 + self.strength[:, None, None] * residual)


class ExtraChannel(GlobalCompensationUnit):
    """The skip unchanged, with RM as one further channel."""

    def combine(self, features: Tensor, compensated: Tensor, residual: Tensor) -> Tensor:
        return torch.cat([features, residual], 1)


class ScaleAndChannel(GlobalCompensationUnit):
    """``F * (1 + RM)``, and RM as one further channel of the skip."""

    def combine(self, features: Tensor, compensated: Tensor, residual: Tensor) -> Tensor:
        return torch.cat([compensated, residual], 1)


def build(gcu: type[GlobalCompensationUnit] | None, rcu: bool, downsample: str = "max") -> GRCSF:
    """A small 2-D network with some of the units."""
    network = GRCSF(
        2, 1, 1, FEATURES, patch_size=4, rcu_levels=(1, 2) if rcu else (), gcu=gcu is not None, downsample=downsample
    )
    if gcu not in (None, GlobalCompensationUnit):
        network.gcu = nn.ModuleList(gcu(channels) for channels in FEATURES[:-1])
        if gcu in (ExtraChannel, ScaleAndChannel):
            for level, channels in enumerate(FEATURES[:-1]):
                network.decoder[level][0] = conv(2, 2 * channels + 1, channels)
    return network


GCU = GlobalCompensationUnit
# The question of the paper: what do the units add?
UNITS: dict[str, Callable[[], GRCSF]] = {
    "backbone": lambda: build(None, False),
    "maps as channels": lambda: MapsAsChannels(2, 3, 1, FEATURES, rcu_levels=(), gcu=False),
    "gcu": lambda: build(GCU, False),
    "rcu": lambda: build(None, True),
    "gcu + rcu": lambda: build(GCU, True),
}
# The GCU's open details: what makes the coarse features, and what RM does to the skip.
GCU_FORMS: dict[str, Callable[[], GRCSF]] = {
    "gcu, learned strength": lambda: build(LearnedStrength, False),
    "gcu, extra channel": lambda: build(ExtraChannel, False),
    "gcu, scale and channel": lambda: build(ScaleAndChannel, False),
    "gcu, detached": lambda: build(DetachedCompensation, False),
    "backbone, conv": lambda: build(None, False, "conv"),
    "gcu, conv": lambda: build(GCU, False, "conv"),
    "backbone, avg": lambda: build(None, False, "avg"),
    "gcu, avg": lambda: build(GCU, False, "avg"),
}
# Both suites hold the backbone and the plain GCU, so that each table has its own baseline.
GCU_FORMS |= {name: UNITS[name] for name in ("backbone", "gcu")}
SUITES = {"units": UNITS, "gcu": GCU_FORMS}


def prepared_cases(path: Path, bundle: Bundle, first_seed: int, count: int, with_maps: bool) -> list[Case]:
    """Subjects, with their residual maps where a variant needs them, kept in a file between runs."""
    if not path.is_file():
        source = SyntheticSource(bundle.preprocessing, first_seed, skull=False, contrast="template", spread=count)
        tensors = {}
        for index in tqdm(range(count), desc=path.stem):
            case = source[index]
            tensors |= {f"{index}.image": case.image, f"{index}.lesion": case.lesion}
            if with_maps:
                settings = bundle.residual_maps
                tensors[f"{index}.residual_maps"] = volume_residual_maps(
                    case.image, bundle.mae, settings.mask_ratios, settings.rounds, settings.seed
                ).half()
        with replace_when_done(path) as (part,):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    tensors = load_file(path)
    return [
        Case(f"{path.stem}_{index}", *(tensors.get(f"{index}.{part}") for part in ("image", "lesion", "residual_maps")))
        for index in range(count)
    ]


@torch.no_grad()
def test_dice(network: GRCSF, cases: list[Case]) -> list[float]:
    """Dice of each case on the network's grid."""
    network.eval()
    values = []
    for case in cases:
        maps = None if case.residual_maps is None else case.residual_maps.float()
        predicted = segment(network, case.image, maps) >= 0.5
        total = int(predicted.sum()) + int(case.lesion.sum())
        values.append(2 * int((predicted & case.lesion).sum()) / total if total else 1.0)
    return values


@torch.no_grad()
def start_as(network: nn.Module, backbone: nn.Module) -> None:
    """Give a variant the backbone's first weights wherever the two share them.

    Another start moves the mean Dice by as much as a unit does: without this a unit's further random numbers would
    deal the whole network other weights.
    """
    own = network.state_dict()
    shared = {name: value for name, value in backbone.state_dict().items() if own[name].shape == value.shape}
    network.load_state_dict(own | shared)


def run(name: str, make: Callable[[], GRCSF], seed: int, steps: int, bundle: Bundle, cases: dict[str, list[Case]]):
    """Train one variant; returns the test Dice of each case and the seconds a step took."""
    torch.manual_seed(seed)
    network = make()
    torch.manual_seed(seed)
    start_as(network, build(None, False, network.config["downsample"]))
    maps = cases["train"][0].residual_maps is not None
    settings = TrainSettings(
        steps=steps,
        batch_size=4,
        crop_size=(80, 96),
        warmup_steps=steps // 20,
        seed=seed,
        cache_size=len(cases["train"]),
        replace_every=0,
        augment="none",
        validate_every=steps,
        log_every=steps,
    )
    mae = bundle.mae if maps else None
    with tempfile.TemporaryDirectory() as folder:
        where = TrainingRun(Path(folder), settings, bundle.preprocessing, bundle.residual_maps, torch.device("cpu"))
        train_network(network, mae, cases["train"], [], where)
        seconds = float((Path(folder) / "log.csv").read_text().splitlines()[-1].split(",")[5]) / steps
    return {
        "variant": name, "seed": seed, "steps": steps, "seconds_a_step": seconds,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "dice": test_dice(network, cases["test"]), "versions": versions(), "mae_sha256": bundle.weights_sha256,
    }  # fmt: skip


def table(folder: Path) -> str:
    """The figures of every finished run; differences to the backbone with the same downsampling, seed by seed."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("run_*.json"))]
    means: dict[str, dict[int, float]] = {}
    medians: dict[str, dict[int, float]] = {}
    for item in runs:
        means.setdefault(item["variant"], {})[item["seed"]] = float(np.mean(item["dice"]))
        medians.setdefault(item["variant"], {})[item["seed"]] = float(np.median(item["dice"]))
    lines = ["| variant | seeds | mean Dice (SD over seeds) | median Dice | difference to its backbone, seed by seed |"]
    lines.append("|---|---|---|---|---|")
    for name in UNITS | GCU_FORMS:
        if name not in means:
            continue
        own = next((f"backbone, {kind}" for kind in ("avg", "conv") if kind in name), "backbone")
        values = list(means[name].values())
        shared = sorted(set(means[name]) & set(means.get(own, {})))
        differences = ", ".join(f"{means[name][seed] - means[own][seed]:+.3f}" for seed in shared)
        spread = f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else ""
        lines.append(
            f"| {name} | {len(values)} | {np.mean(values):.3f}{spread} | "
            f"{np.mean(list(medians[name].values())):.3f} | {differences if own != name else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mae", default="demo", help="bundle with the autoencoder (default: demo)")
    parser.add_argument("--suite", choices=sorted(SUITES), default="units", help="variants to train (default: units)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=600, help="of each run (default: 600)")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/ablation"), help="default: runs/ablation")
    parser.add_argument("--report", type=Path, help="Markdown file for the table (default: print only)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    bundle = load_bundle(options.mae)
    # Cases and runs of another autoencoder, suite or number of steps are not mixed in.
    folder = options.output / f"{options.suite}_{options.steps}_{bundle.weights_sha256[:8]}"
    # The forms of the GCU are compared without RCU and need no residual maps.
    with_maps = options.suite != "gcu"
    cases = {
        name: prepared_cases(folder / f"{name}.safetensors", bundle, first_seed, count, with_maps)
        for name, first_seed, count in (("train", ABLATION_SEEDS, 40), ("test", ABLATION_TEST_SEEDS, 16))
    }
    for seed in options.seeds:
        for name, make in SUITES[options.suite].items():
            path = folder / f"run_{name.replace(' ', '_').replace(',', '')}_{seed}.json"
            if path.is_file():
                continue
            result = run(name, make, seed, options.steps, bundle, cases)
            print(f"{name}, seed {seed}: mean Dice {np.mean(result['dice']):.3f}", flush=True)
            with replace_when_done(path) as (part,):
                part.write_text(json.dumps(result) + "\n")
    text = table(folder)
    print(text)
    if options.report is not None:
        about = ", ".join(f"{name} {version}" for name, version in versions().items())
        maps = f"maps of the bundle {bundle.weights_sha256[:8]}" if with_maps else "no residual maps"
        settings = f"Suite `{options.suite}`, {options.steps} steps a run, {maps}; {about}."
        with replace_when_done(options.report) as (part,):
            part.write_text(f"{settings}\n\n{text}\n")


if __name__ == "__main__":
    main()
