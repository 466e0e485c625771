"""Choose a bundle's two thresholds on synthetic subjects: the outline's, and the least peak of a lesion.

The subjects have seeds that neither training, validation during it, nor the held-out measurement uses. The choice
is the pair with the largest mean Dice plus half the pooled lesion-wise F1.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from grcsf_fast.bundle import Bundle
from grcsf_fast.data.datasets import CALIBRATION_SEEDS, SyntheticSource, drawing_spacings
from grcsf_fast.engine import segment
from grcsf_fast.evaluate import evaluate_masks, summarize
from grcsf_fast.predict import lesion_mask
from grcsf_fast.residuals import volume_residual_maps

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
PEAKS = (0.0, 0.8, 0.9, 0.95, 0.98, 0.99)


def calibrate(bundle: Bundle, number: int = 24) -> Bundle:
    """The bundle with the best pair of thresholds; prints the figures of every pair."""
    spacing = bundle.preprocessing.spacing
    finest = drawing_spacings(spacing[0])[:1]
    source = SyntheticSource(bundle.preprocessing, CALIBRATION_SEEDS, spread=number, drawn_at=finest)
    affine = np.diag([*spacing, 1.0])
    settings = bundle.residual
    probabilities, truths = [], []
    for index in tqdm(range(number), desc="calibration subjects"):
        case = source[index]
        maps = volume_residual_maps(case.image, bundle.mae, settings.ratios, settings.rounds, settings.seed)
        probability = segment(
            bundle.network, case.image, maps, window=bundle.window, mirror=bundle.mirror, zooms=bundle.zooms
        )
        probabilities.append(probability.numpy())
        truths.append(case.lesion.numpy())
    best, chosen = -1.0, bundle
    for threshold, peak in itertools.product(THRESHOLDS, PEAKS):
        results = {
            str(index): evaluate_masks(lesion_mask(probability, threshold, peak), truth, affine)
            for index, (probability, truth) in enumerate(zip(probabilities, truths, strict=True))
        }
        summary = summarize(results)
        dice, f1 = summary["dice"]["mean"], summary["pooled_lesion_f1"]
        print(f"threshold {threshold:.2f}, peak {peak:.2f}: mean Dice {dice:.3f}, pooled lesion F1 {f1:.3f}")
        if dice + f1 / 2 > best:
            best, chosen = dice + f1 / 2, replace(bundle, probability_threshold=threshold, lesion_peak=peak)
    print(f"chosen: threshold {chosen.probability_threshold}, peak {chosen.lesion_peak}")
    return chosen
