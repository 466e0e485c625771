"""Choose what a bundle decides by, on synthetic subjects, and print it: ``python -m benchmarks.calibrate BUNDLE``.

The subjects have seeds that neither training, validation during it, nor the held-out measurement uses. First the
importance below which the RCU skips patches: the largest that costs less than 0.001 of the mean Dice by the thresholds
that the bundle has. Then, as the network will run, two thresholds of the probability, the outline's and the least peak
of a lesion: of the pairs that mark little enough in healthy heads the one with the largest mean Dice plus half the
pooled lesion-wise F1.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from grcsf_fast.errors import ArgumentError
from grcsf_fast.evaluation.metrics import evaluate_masks
from grcsf_fast.evaluation.summary import summarize
from grcsf_fast.inference.report import lesion_mask
from grcsf_fast.networks.grcsf import GRCSF
from grcsf_fast.networks.residual_maps import volume_residual_maps
from grcsf_fast.networks.whole_volume import segment
from grcsf_fast.pretrained.bundle import Bundle, load_bundle, save_bundle
from grcsf_fast.training.synthetic import CALIBRATION_SEEDS, SyntheticSource, drawing_spacings

THRESHOLDS = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
PEAKS = (0.0, 0.9, 0.98, 0.995, 0.998, 0.999, 0.9995, 0.9999)
# Fewer leave the choice to chance.
CASES, HEALTHY = 72, 36
HEALTHY_SEEDS = CALIBRATION_SEEDS + 1000
# In healthy heads, on average.
MOST_FALSE_ML = 0.3

IMPORTANCES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
MOST_LOSS = 0.001


class Subject(NamedTuple):
    """Image (X, Y, Z), residual maps (M, X, Y, Z) and the true mask, on the networks' grid."""

    image: Tensor
    maps: Tensor
    truth: np.ndarray


def subjects(bundle: Bundle, number: int = CASES, lesions: bool = True) -> list[Subject]:
    """With lesions, or healthy ones of other seeds.

    Raises:
        ArgumentError: a bundle that cuts at Hounsfield units, which synthetic heads do not have.
    """
    if bundle.above_hu is not None:
        raise ArgumentError(
            f"bundle: expected one without above_hu, as synthetic heads have no Hounsfield units, got "
            f"{bundle.above_hu:g}; docs/how-to/train-your-own.md has thresholds chosen on scans of your own"
        )
    finest = drawing_spacings(bundle.preprocessing.spacing[0])[:1]
    first = CALIBRATION_SEEDS if lesions else HEALTHY_SEEDS
    source = SyntheticSource(bundle.preprocessing, first, lesions, spread=number if lesions else None, drawn_at=finest)
    found = []
    for index in tqdm(range(number), desc="calibration subjects" if lesions else "healthy heads"):
        case = source[index]
        maps = volume_residual_maps(case.image, bundle.mae, **asdict(bundle.residual_maps))
        found.append(Subject(case.image, maps, case.lesion.numpy()))
    return found


def _probabilities(bundle: Bundle, cases: Sequence[Subject]) -> list[np.ndarray]:
    return [
        segment(
            bundle.network,
            case.image,
            case.maps,
            roi_size=bundle.roi_size,
            tta_flip=bundle.tta_flip,
            tta_scales=bundle.tta_scales,
        ).numpy()
        for case in tqdm(cases, desc="segmenting")
    ]


def _scores(bundle: Bundle, cases: Sequence[Subject], probabilities: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean Dice and pooled lesion-wise F1."""
    affine = np.diag([*bundle.preprocessing.spacing, 1.0])
    summary = summarize(
        {
            str(index): evaluate_masks(
                lesion_mask(probability, bundle.probability_threshold, bundle.hysteresis_threshold),
                case.truth,
                affine,
                distances=False,
            )
            for index, (case, probability) in enumerate(zip(cases, probabilities, strict=True))
        }
    )
    return summary["dice"]["mean"], summary["pooled_lesion_f1"]


def _false_ml(bundle: Bundle, probabilities: Sequence[np.ndarray]) -> float:
    """Marked in heads without lesion, on average."""
    voxels = [
        lesion_mask(probability, bundle.probability_threshold, bundle.hysteresis_threshold).sum()
        for probability in probabilities
    ]
    return float(np.mean(voxels)) * float(np.prod(bundle.preprocessing.spacing)) / 1000


def calibrate(bundle: Bundle, cases: Sequence[Subject], healthy: Sequence[Subject]) -> Bundle:
    """The bundle with the best pair of thresholds; prints the figures of every pair."""
    return with_thresholds(bundle, cases, _probabilities(bundle, cases), _probabilities(bundle, healthy))


def with_thresholds(
    bundle: Bundle, cases: Sequence[Subject], probabilities: Sequence[np.ndarray], of_healthy: Sequence[np.ndarray]
) -> Bundle:
    """The same, by probabilities (X, Y, Z) of the cases and of healthy heads.

    Where no pair marks little enough in healthy heads, it is the pair that marks least.
    """
    best, chosen = (-np.inf, -np.inf), bundle
    for threshold, peak in itertools.product(THRESHOLDS, PEAKS):
        tried = replace(bundle, probability_threshold=threshold, hysteresis_threshold=peak)
        dice, f1 = _scores(tried, cases, probabilities)
        false_ml = _false_ml(tried, of_healthy)
        print(
            f"threshold {threshold:.2f}, peak {peak:.4f}: mean Dice {dice:.3f}, pooled lesion F1 {f1:.3f}, "
            f"{false_ml:.2f} mL in healthy heads"
        )
        quality = (-max(false_ml, MOST_FALSE_ML), dice + f1 / 2)
        if quality > best:
            best, chosen = quality, tried
    print(
        f"chosen: threshold {chosen.probability_threshold}, peak {chosen.hysteresis_threshold}; "
        f"{-best[0]:.2f} mL at most in healthy heads, {MOST_FALSE_ML} wanted"
    )
    return chosen


def calibrate_importance(bundle: Bundle, cases: Sequence[Subject]) -> Bundle:
    """The bundle whose network skips patches below the largest importance that costs almost nothing.

    Measured on one view, where a skipped patch weighs more than in the average of several.
    """
    network = copy.deepcopy(bundle.network)
    scores: list[Tensor] = []
    for unit in network.rcu.values():
        unit.register_forward_hook(lambda module, inputs, output: scores.append(output[1].flatten()))
    tried = replace(bundle, network=network, tta_flip=False, tta_scales=(1.0,))
    network.importance_threshold = 0.0
    whole, _ = _scores(tried, cases, _probabilities(tried, cases))
    every = torch.cat(scores)
    print(f"importance 0: mean Dice {whole:.4f}")
    chosen = 0.0
    for importance in IMPORTANCES:
        network.importance_threshold = importance
        dice, _ = _scores(tried, cases, _probabilities(tried, cases))
        skipped = (every < importance).float().mean()
        print(f"importance {importance}: mean Dice {dice:.4f}, {skipped:.1%} of patches skipped")
        if whole - dice < MOST_LOSS:
            chosen = importance
            break
    print(f"chosen: importance {chosen}")
    final = GRCSF(**bundle.network.config | {"importance_threshold": chosen})
    final.load_state_dict(bundle.network.state_dict())
    return replace(bundle, network=final.eval())


def calibrated(bundle: Bundle) -> Bundle:
    """The bundle with its importance and both thresholds chosen; prints the figures of all that was tried."""
    cases, healthy = subjects(bundle), subjects(bundle, HEALTHY, lesions=False)
    return calibrate(calibrate_importance(bundle, cases), cases, healthy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="name or folder; stays as it is")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="where the calibrated one goes")
    options = parser.parse_args()
    chosen = calibrated(load_bundle(options.bundle))
    if options.output is not None:
        print(save_bundle(chosen, options.output))


if __name__ == "__main__":
    main()
