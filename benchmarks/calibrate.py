"""Choose what a bundle decides by, on synthetic subjects; ``python -m benchmarks.calibrate BUNDLE``.

The subjects have seeds that neither training, validation during it, nor the held-out measurement uses. Chosen are the
importance below which the RCU skips patches, and two thresholds of the probability, the outline's and the least peak of
a lesion. Each importance has the thresholds that suit it. Of all that mark little enough in healthy heads it is what
has the largest mean Dice plus half the pooled lesion-wise F1.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from grcsf_fast.evaluation.metrics import evaluate_masks
from grcsf_fast.evaluation.summary import summarize
from grcsf_fast.inference.report import lesion_mask
from grcsf_fast.networks.grcsf import GRCSF
from grcsf_fast.networks.residual_maps import volume_residual_maps
from grcsf_fast.networks.whole_volume import segment
from grcsf_fast.pretrained.bundle import Bundle, load_bundle, save_bundle
from grcsf_fast.training.synthetic import CALIBRATION_SEEDS, SyntheticSource, drawing_spacings

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
PEAKS = (0.0, 0.9, 0.98, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999, 0.99995)
HEALTHY_SEEDS = CALIBRATION_SEEDS + 1000
HEALTHY = 12  # heads
# In healthy heads, on average.
MOST_FALSE_ML = 0.3

IMPORTANCES = (0.5, 0.2, 0.05)  # the first of equally good ones is chosen, which skips most


class Subject(NamedTuple):
    """Image (X, Y, Z), residual maps (M, X, Y, Z) and the true mask, on the networks' grid."""

    image: Tensor
    maps: Tensor
    truth: np.ndarray


def subjects(bundle: Bundle, number: int = 24, lesions: bool = True) -> list[Subject]:
    """With lesions, or healthy ones of other seeds."""
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


Quality = tuple[float, float]
"""mL in healthy heads, negative, as far as it is more than is allowed; then mean Dice and half the F1."""


def calibrate(bundle: Bundle, cases: Sequence[Subject], healthy: Sequence[Subject]) -> Bundle:
    """The bundle with the best importance and pair of thresholds; prints the figures of all that was tried."""
    best, chosen = (-np.inf, -np.inf), bundle
    for importance in IMPORTANCES:
        print(f"importance {importance}")
        tried = replace(bundle, network=_skipping(bundle.network, importance))
        tried, quality = with_thresholds(tried, cases, _probabilities(tried, cases), _probabilities(tried, healthy))
        if quality > best:
            best, chosen = quality, tried
    print(f"chosen: importance {chosen.network.importance_threshold}")
    return chosen


def _skipping(network: GRCSF, importance: float) -> GRCSF:
    """A copy that skips patches below this importance."""
    copied = GRCSF(**network.config | {"importance_threshold": importance})
    copied.load_state_dict(network.state_dict())
    return copied.eval()


def with_thresholds(
    bundle: Bundle, cases: Sequence[Subject], probabilities: Sequence[np.ndarray], of_healthy: Sequence[np.ndarray]
) -> tuple[Bundle, Quality]:
    """The bundle with the best pair of thresholds, and how good it is.

    Where no pair marks little enough in healthy heads, it is the pair that marks least.

    Args:
        bundle: to be changed.
        cases: with lesions.
        probabilities: (X, Y, Z) each, of the cases.
        of_healthy: the same of heads without lesion.
    """
    best, chosen = (-np.inf, -np.inf), bundle
    for threshold, peak in itertools.product(THRESHOLDS, PEAKS):
        tried = replace(bundle, probability_threshold=threshold, hysteresis_threshold=peak)
        dice, f1 = _scores(tried, cases, probabilities)
        false_ml = _false_ml(tried, of_healthy)
        print(
            f"threshold {threshold}, peak {peak}: mean Dice {dice:.3f}, pooled lesion F1 {f1:.3f}, "
            f"{false_ml:.2f} mL in healthy heads"
        )
        quality = (-max(false_ml, MOST_FALSE_ML), dice + f1 / 2)
        if quality > best:
            best, chosen = quality, tried
    print(
        f"best: threshold {chosen.probability_threshold}, peak {chosen.hysteresis_threshold}; "
        f"{-best[0]:.2f} mL at most in healthy heads, {MOST_FALSE_ML} wanted"
    )
    return chosen, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder; gets what is chosen")
    options = parser.parse_args()
    bundle = load_bundle(options.bundle)
    card = options.bundle / "README.md"
    text = card.read_text() if card.exists() else None
    calibrated = calibrate(bundle, subjects(bundle), subjects(bundle, HEALTHY, lesions=False))
    save_bundle(calibrated, options.bundle, dtype=torch.float16)
    if text is not None:
        card.write_text(text)


if __name__ == "__main__":
    main()
