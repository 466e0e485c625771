"""Measure a bundle on held-out synthetic subjects, drawn at 1 mm: ``make held-out``.

Three kinds of subjects (``--subjects``): ``old`` are those of the frozen synthesizer, so that figures of all releases
compare; ``new`` those of the package's synthesizer, and with them healthy heads, on which whatever is marked is false;
``validation`` those of a generator that shares nothing with the one that drew the training's. Each subject has a seed
that no training and no validation saw. The lesion volumes are evenly spaced quantiles of the synthesizer's
distribution, so that few subjects stand for all of it. The volume goes through NIfTI files and the same prediction as
a user's. Printed: Dice, lesion-wise F1, distances, and how well single voxels are told apart (AUROC and average
precision over the voxels of the brain) by the residual maps alone, smoothed too, and, beside it, by plain darkness,
which is a strong rule for lesions that are dark. Of the new subjects also how much their lesions change the image, and
figures of those whose lesions stand out, of those with the contrast of T1, and of the others. What limits Dice: that of
the truth itself brought to the networks' grid and back, the share of the marked voxels that are lesion, and that of the
lesion's voxels that are marked, by how much each of them is changed; ``--contrast`` draws what lesions change that many
times as strong, in the same heads. Everything is measured on synthetic lesions and says nothing of patients.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from benchmarks import synthesizer_2025, validation_generator
from benchmarks.accuracy.tables import difference
from grcsf_fast import Predictor
from grcsf_fast.data.files import replace_when_done
from grcsf_fast.data.volumes import Prepared, prepare_mask, restore
from grcsf_fast.evaluation.metrics import evaluate_masks
from grcsf_fast.evaluation.summary import summarize
from grcsf_fast.pretrained.bundle import Bundle
from grcsf_fast.runtime.versions import versions
from grcsf_fast.synthesis.subjects import lesion_volume_quantile, synthesize_subject
from grcsf_fast.synthesis.template import Template, load_template
from grcsf_fast.training.synthetic import HELD_OUT_SEEDS

LARGE_ML = 5.0
CONTRASTS = {"t1": 1.0, "other_contrasts": 0.0}  # by what their rows say
# Mean change of the image by the lesion, in standard deviations of the healthy brain.
PLAIN_CHANGE = 1.0
# Bounds of the change of single voxels, in the same unit.
CHANGES = (0.0, 0.5, 1.0, 2.0, math.inf)
# SD in mm of the Gaussians by which what tells voxels apart is smoothed, beside as it is.
SMOOTHINGS = (2.0, 4.0)
SMOOTHED = ("residual_mean_darker", "darkness")
# Of the healthy heads: no other subject of the new synthesizer has them.
HEALTHY_SEEDS = HELD_OUT_SEEDS + 1000


def decided_by(bundle: Bundle) -> dict[str, Any]:
    """What turns the network's outputs into masks, beside its weights."""
    return {
        "importance_threshold": bundle.network.importance_threshold,
        "probability_threshold": bundle.probability_threshold,
        "hysteresis_threshold": bundle.hysteresis_threshold,
        "tta_flip": bundle.tta_flip,
        "tta_scales": list(bundle.tta_scales),
    }


class Drawn(NamedTuple):
    """A held-out subject: (X, Y, Z) image, truth and brain, the affine, and, where known, the head without lesion and
    the sequence whose contrast it has."""

    image: np.ndarray
    lesion: np.ndarray
    brain: np.ndarray
    affine: np.ndarray
    healthy: np.ndarray | None = None
    sequence: str | None = None


def draw(kind: str, template: Template, seed: int, total_ml: float) -> Drawn:
    """A subject of the old, the new or the validation's generator."""
    if kind == "validation":
        subject = validation_generator.draw_subject(template, seed, total_ml)
        return Drawn(subject.image, subject.lesion, subject.brain, subject.affine)
    if kind == "old":
        subject = synthesizer_2025.synthesize_subject(template, seed, total_ml=total_ml)
        return Drawn(subject.image.numpy(), subject.lesion.numpy(), subject.brain.numpy(), subject.affine)
    subject = synthesize_subject(template, seed, total_ml=total_ml)
    arrays = (part.numpy() for part in (subject.image, subject.lesion, subject.brain))
    return Drawn(*arrays, subject.affine, subject.healthy.numpy(), subject.record["sequence"])


def enhanced(subject: Drawn, times: float) -> Drawn:
    """The subject with all that its lesions change, around them too, so many times as strong."""
    assert subject.healthy is not None
    return subject._replace(image=subject.healthy + times * (subject.image - subject.healthy))


def of_the_grid(truth: np.ndarray, prepared: Prepared) -> float:
    """Dice of a (X, Y, Z) bool mask after it was brought to the networks' grid and back: no binary mask there has more
    to give, but probabilities may have."""
    back = restore(prepare_mask(truth, prepared).float(), prepared) >= 0.5
    return 2 * float((back & truth).sum()) / float(back.sum() + truth.sum())


def told_apart(values: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """Area under the ROC curve, the chance that a lesion voxel has the higher value, and average precision.

    Ties count half in the first; in the second voxels of one value are taken together.
    """
    kinds, inverse = np.unique(-values, return_inverse=True)  # from the highest value down
    found = np.bincount(inverse, positive, len(kinds))
    others = np.bincount(inverse, ~positive, len(kinds))
    above = np.cumsum(found)
    area = float((others * (above - found / 2)).sum() / (found.sum() * others.sum()))
    return area, float((found * above / (above + np.cumsum(others))).sum() / found.sum())


def smoothed(values: np.ndarray, brain: np.ndarray, mm: float, affine: np.ndarray) -> np.ndarray:
    """(X, Y, Z) values in the brain after a Gaussian of so many mm (its SD), by the brain's voxels alone."""
    sigma = mm / nib.affines.voxel_sizes(affine)
    box = ndimage.find_objects(brain.astype(np.uint8))[0]
    inside = brain[box]
    sums, weights = (
        ndimage.gaussian_filter(np.where(inside, one, 0).astype(np.float32), sigma, mode="constant")[inside]
        for one in (values[box], 1)
    )
    return sums / weights


def predict(predictor: Predictor, image: np.ndarray, affine: np.ndarray, folder: Path) -> Any:
    """The prediction of a volume that goes through a file."""
    path = folder / "subject.nii.gz"
    nib.save(nib.Nifti1Image(image, affine), path)
    prediction = predictor(path)
    path.unlink()
    return prediction


def measure(predictor: Predictor, subject: Drawn, folder: Path) -> dict[str, float]:
    """Figures of one held-out subject."""
    prediction = predict(predictor, subject.image, subject.affine, folder)
    truth, brain = subject.lesion, subject.brain
    mask = np.asarray(prediction.mask.dataobj) > 0
    row = evaluate_masks(mask, truth, subject.affine)
    row["seconds"] = sum(prediction.seconds.values())
    row["dice_of_grid"] = of_the_grid(truth, prediction.prepared)
    row["precision"] = _share(truth[mask])
    if subject.sequence is not None:
        row["t1"] = float(subject.sequence == "t1")
    if subject.healthy is not None:
        change = np.abs(subject.image - subject.healthy)[truth] / subject.healthy[brain].std()
        row["change_by_lesion"] = float(change.mean())
        for low, high in itertools.pairwise(CHANGES):
            row[f"recall_{low:g}_to_{high:g}_sd"] = _share(mask[truth][(low <= change) & (change < high)])
    maps = {ratio: np.asarray(image.dataobj) for ratio, image in prediction.residual_maps.items()}
    told = {f"residual{round(100 * ratio)}": np.abs(values) for ratio, values in maps.items()}
    if maps:
        mean = np.mean(list(maps.values()), 0)
        told["residual_mean"] = np.abs(mean)
        if predictor.bundle.residual_maps.signed:  # a lesion may be darker or brighter than the healthy head
            told["residual_mean_darker"] = -mean
    told["darkness"] = -subject.image
    for name, values in told.items():
        for mm in (0.0, *SMOOTHINGS) if name in SMOOTHED else (0.0,):
            seen = smoothed(values, brain, mm, subject.affine) if mm else values[brain]
            kind = f"{name}_smoothed_{mm:g}mm" if mm else name
            row[f"auroc_{kind}"], row[f"average_precision_{kind}"] = told_apart(seen, truth[brain])
    return row


def _share(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def falsely_marked(predictor: Predictor, number: int, spacing: float, folder: Path) -> dict[str, Any]:
    """mL marked in healthy heads, ``number`` synthetic ones and the template itself."""
    template = load_template(spacing)
    subjects = (synthesize_subject(template, HEALTHY_SEEDS + index, lesions=False) for index in range(number))
    marked = [
        _marked_ml(predictor, subject.image, subject.affine, folder)
        for subject in tqdm(subjects, total=number, desc="healthy heads")
    ]
    return {
        "mean_ml": float(np.mean(marked)),
        "template_ml": _marked_ml(predictor, template.t1, template.affine, folder),
        "cases_ml": {str(HEALTHY_SEEDS + index): volume for index, volume in enumerate(marked)},
    }


def _marked_ml(predictor: Predictor, image: torch.Tensor, affine: np.ndarray, folder: Path) -> float:
    mask = predict(predictor, image.numpy(), affine, folder).mask
    voxels = float((np.asarray(mask.dataobj) > 0).sum())
    return voxels * float(np.prod(nib.affines.voxel_sizes(affine))) / 1000


def less(results: dict[str, dict[str, float]], earlier: dict[str, Any]) -> dict[str, Any]:
    """Mean Dice less that of an earlier report on the same subjects, with a 95 % interval (bootstrap over subjects).

    Also over the half of the subjects whose lesions changed the image less there, and over the other half; and over
    those with the contrast of T1 and the others.

    Raises:
        ValueError: the report is of other subjects.
    """
    before = earlier["cases"]
    if results.keys() != before.keys():
        raise ValueError(f"expected a report on the subjects {list(results)}, found {list(before)}")
    found = {"weights_sha256": earlier["weights_sha256"], "dice_difference": _paired(results, before, list(results))}
    if all("change_by_lesion" in row for row in before.values()):
        seeds = sorted(before, key=lambda seed: before[seed]["change_by_lesion"])
        middle = len(seeds) // 2
        for name, half in (("less", seeds[:middle]), ("more", seeds[middle:])):
            found[f"dice_difference_of_the_half_changed_{name}"] = _paired(results, before, half)
    for name, seeds in by_contrast(results).items():
        found[f"dice_difference_of_{name}"] = _paired(results, before, seeds)
    return found


def by_contrast(results: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """The subjects with the contrast of T1, as the packaged weights are meant for, and the others; empty where that is
    not known."""
    groups = {name: [seed for seed in results if results[seed].get("t1") == value] for name, value in CONTRASTS.items()}
    return {name: seeds for name, seeds in groups.items() if seeds}


def _paired(now: dict[str, Any], then: dict[str, Any], seeds: list[str]) -> dict[str, float]:
    found = difference(*(np.array([[cases[seed]["dice"] for seed in seeds]]) for cases in (now, then)))
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo", help="bundle (default: demo)")
    parser.add_argument(
        "--subjects", choices=("old", "new", "validation"), default="old", help="who draws them (default: old)"
    )
    parser.add_argument("-n", "--number", type=int, default=24, help="subjects (default: 24)")
    parser.add_argument("--healthy", type=int, default=12, help="healthy heads beside the new subjects (default: 12)")
    parser.add_argument(
        "--contrast", type=float, default=1.0, metavar="TIMES", help="of the new subjects' lesions (default: 1)"
    )
    parser.add_argument("--spacing", type=float, default=1.0, help="subjects are drawn at, in mm (default: 1)")
    parser.add_argument("--against", type=Path, metavar="JSON", help="an earlier report on the same subjects")
    parser.add_argument("-o", "--output", type=Path, help="JSON report (default: print only)")
    options = parser.parse_args()
    if options.contrast != 1 and options.subjects != "new":
        parser.error("--contrast: of the new subjects alone the head without lesion is known")
    earlier = json.loads(options.against.read_text()) if options.against is not None else None
    predictor = Predictor.from_pretrained(options.model)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index in tqdm(range(options.number), desc="held-out subjects"):
            seed = HELD_OUT_SEEDS + index
            total_ml = lesion_volume_quantile((index + 0.5) / options.number)
            subject = draw(options.subjects, load_template(options.spacing), seed, total_ml)
            if options.contrast != 1:
                subject = enhanced(subject, options.contrast)
            results[str(seed)] = measure(predictor, subject, Path(folder))
        healthy = None
        if options.subjects == "new" and options.healthy:
            healthy = falsely_marked(predictor, options.healthy, options.spacing, Path(folder))
    large = {seed: row for seed, row in results.items() if row["truth_ml"] >= LARGE_ML}
    summaries = {"all cases": summarize(results), f"{LARGE_ML:g} mL or more": summarize(large)}
    if options.subjects == "new":
        plain = {seed for seed, row in results.items() if row["change_by_lesion"] >= PLAIN_CHANGE}
        for title, chosen in (("", plain), ("less than ", results.keys() - plain)):
            rows = {seed: row for seed, row in results.items() if seed in chosen}
            summaries[f"changed by {title}{PLAIN_CHANGE:g} SD{'' if title else ' or more'}"] = summarize(rows)
        for name, seeds in by_contrast(results).items():
            summaries[name.replace("_", " ")] = summarize({seed: results[seed] for seed in seeds})
    about = {
        "model": Path(options.model).name,
        "weights_sha256": predictor.bundle.weights_sha256,
        "decided_by": decided_by(predictor.bundle),
        "subjects": options.subjects,
        "contrast": options.contrast,
        "spacing_mm": options.spacing,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": versions(),
    }
    print(json.dumps(about, indent=2))
    for title, summary in summaries.items():
        print(f"{title}: {summary['cases']} cases")
        for name, value in summary.items():
            if isinstance(value, dict):
                print(f"  {name:26s} mean {value['mean']:8.3f}  sd {value['sd']:8.3f}  median {value['median']:8.3f}")
        print(f"  {'pooled_lesion_f1':26s} {summary.get('pooled_lesion_f1', float('nan')):13.3f}")
    if healthy is not None:
        print(f"falsely marked: {healthy['mean_ml']:.3f} mL on average in {options.healthy} healthy synthetic heads, "
              f"{healthy['template_ml']:.3f} mL in the template")  # fmt: skip
    compared = {}
    if earlier is not None:
        compared = {"against": less(results, earlier)}
        for name, found in compared["against"].items():
            if name.startswith("dice_difference"):
                print(f"{name}, less that of {options.against.name}: {found['mean']:+.3f} "
                      f"({found['low']:+.3f} to {found['high']:+.3f}), paired")  # fmt: skip
    if options.output is not None:
        with replace_when_done(options.output) as (part,):
            report = about | {"summaries": summaries, **compared, "cases": results}
            if healthy is not None:
                report["healthy"] = healthy
            # JSON knows no NaN: figures that a case does not have become null.
            part.write_text(json.dumps(_finite(report), indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
