"""Coronary calcium: Agatston score, risk category, and the measures of the orCaScore challenge.

Calcifications are groups of voxels above 130 HU that are connected by faces and of one artery. Measures of the
challenge: http://orcascore.isi.uu.nl/evaluation and Wolterink et al., Medical Physics 43, 2361 (2016).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation

from ..errors import ArgumentError
from .metrics import ROUNDING, as_affine, as_voxels, box_around

__all__ = [
    "ABOVE_HU",
    "CATEGORIES",
    "agatston",
    "compare_calcium",
    "intraclass_correlation",
    "risk_category",
    "summarize_calcium",
    "weighted_kappa",
]

ABOVE_HU = 130.0  # at and below it nothing is calcium
WEIGHT_FROM = (200.0, 300.0, 400.0)  # HU of the peak from which a lesion weighs 2, 3 and 4; below 1
SLICE_MM = 3.0  # the distance of slices that the score was defined for
MIN_AREA_MM2 = 1.0
CATEGORIES = ("0", "1-10", "11-100", "101-400", ">400")
CATEGORY_UP_TO = (0.0, 10.0, 100.0, 400.0)


def agatston(lesion: np.ndarray, hu: np.ndarray, affine: np.ndarray) -> float:
    """The Agatston score.

    In each axial slice, every region of lesion of at least 1 mm2 counts with its area in mm2 times a weight by its
    peak: 1 below 200 HU, 2 below 300, 3 below 400, else 4. Slices that are not 3 mm apart count by their distance in
    3 mm. Regions are connected by edges of pixels.

    Args:
        lesion: (X, Y, Z) bool; only voxels above 130 HU count.
        hu: (X, Y, Z) Hounsfield units.
        affine: (4, 4), voxel to mm; the slices are those along the axis closest to the body's.

    Returns:
        The score, 0 where nothing counts.

    Raises:
        ArgumentError: other shapes, or another affine.
        ArgumentTypeError: an image of nibabel for an array.

    Source: Agatston et al., Journal of the American College of Cardiology 15, 827 (1990). The distance of slices is our
    reading of what scanners' software does; voxels count above 130 HU as orCaScore defines calcifications.
    """
    from scipy import ndimage

    lesion, hu, affine = as_voxels(lesion, "lesion"), as_voxels(hu, "hu"), as_affine(affine)
    _check_shapes("lesion and hu", lesion, hu)
    lesion = lesion.astype(bool, copy=False)
    box = box_around(lesion)
    lesion, hu = lesion[box], hu[box]
    axis = _slice_axis(affine)
    sizes = voxel_sizes(affine)
    area = float(np.prod(np.delete(sizes, axis)))
    planes = np.moveaxis(lesion & (hu > ABOVE_HU), axis, 0)
    values = np.moveaxis(hu, axis, 0)
    score = 0.0
    for plane, value in zip(planes, values, strict=True):
        if not plane.any():
            continue
        labels, count = _connected(plane)
        numbers = range(1, count + 1)
        areas = np.bincount(labels.ravel())[1:] * area
        peaks = ndimage.maximum(value, labels, numbers)
        weights = 1 + np.searchsorted(WEIGHT_FROM, peaks, side="right")
        # An area of exactly 1 mm2 must not be lost to rounding.
        score += float((areas * weights)[areas >= MIN_AREA_MM2 * (1 - ROUNDING)].sum())
    # Of a sheared grid, as a tilted gantry makes it, the distance between slices is no edge of a voxel.
    distance = abs(float(np.linalg.det(affine[:3, :3]))) / area
    return score * distance / SLICE_MM


def risk_category(score: float) -> str:
    """The category of an Agatston score: ``"0"``, ``"1-10"``, ``"11-100"``, ``"101-400"`` or ``">400"``.

    Scores are no whole numbers: above 10 and up to 100 is ``"11-100"``. What rounding alone puts above 100 is not.

    Source: Rumberger et al., Mayo Clinic Proceedings 74, 243 (1999).

    Raises:
        ArgumentError: a negative score or none.
    """
    if not score >= 0:
        raise ArgumentError(f"score: expected a number of 0 or more, got {score}")
    return CATEGORIES[int(np.searchsorted(CATEGORY_UP_TO, score * (1 - ROUNDING), side="left"))]


def compare_calcium(
    predicted: np.ndarray,
    truth: np.ndarray,
    hu: np.ndarray,
    affine: np.ndarray,
    arteries: Mapping[int, str] | None = None,
    labelled: bool = False,
) -> dict[str, Any]:
    """Compare predicted calcifications with true ones on one grid.

    A true calcification is found if a predicted voxel lies in it; a predicted one that holds no voxel of a true one is
    false. Voxels up to 130 HU count in neither. The figures of all arteries together ask for no label of a prediction.

    Args:
        predicted: (X, Y, Z) bool, or whole numbers, above 0 in calcifications.
        truth: (X, Y, Z) whole numbers, an artery's label in its calcifications and 0 elsewhere.
        hu: (X, Y, Z) Hounsfield units.
        affine: (4, 4), voxel to mm.
        arteries: names by label; the figures of the truth are then given for each, too.
        labelled: the prediction has the arteries' labels as well, and an artery's figures count its own alone;
            False: those of all voxels that it marks.

    Returns:
        ``agatston_true``, ``agatston_predicted``, ``category_true`` and ``category_predicted``; ``lesions_true``,
        ``lesions_found``, ``lesions_predicted``, ``lesions_false``; ``true_mm3``, ``predicted_mm3`` and ``both_mm3``,
        the volume that both have; and for each artery ``NAME_agatston_true``, ``NAME_lesions_true``,
        ``NAME_lesions_found``, ``NAME_true_mm3`` and ``NAME_both_mm3``; of a labelled prediction also
        ``NAME_agatston_predicted``, ``NAME_lesions_predicted``, ``NAME_lesions_false`` and ``NAME_predicted_mm3``.

    Raises:
        ArgumentError: other shapes.
    """
    for name, other in (("truth", truth), ("hu", hu)):
        _check_shapes(f"predicted and {name}", predicted, other)
    # Outside of the box around both there is nothing to count.
    box = box_around(predicted, truth)
    predicted, truth, hu = predicted[box], truth[box], hu[box]
    dense = hu > ABOVE_HU
    marked, truth = np.asarray(predicted) * dense, np.where(dense, truth, 0)
    predicted = marked > 0
    voxel = abs(float(np.linalg.det(np.asarray(affine, dtype=float)[:3, :3])))
    labels = np.unique(truth[truth > 0]).tolist()
    counts = {label: _lesions(truth == label, predicted) for label in labels}
    predicted_count, true_ones = _lesions(predicted, truth > 0)
    scores = {"true": agatston(truth > 0, hu, affine), "predicted": agatston(predicted, hu, affine)}
    row: dict[str, Any] = {
        "agatston_true": scores["true"],
        "agatston_predicted": scores["predicted"],
        "category_true": risk_category(scores["true"]),
        "category_predicted": risk_category(scores["predicted"]),
        "lesions_true": sum(true for true, _ in counts.values()),
        "lesions_found": sum(found for _, found in counts.values()),
        "lesions_predicted": predicted_count,
        "lesions_false": predicted_count - true_ones,
        "true_mm3": float((truth > 0).sum()) * voxel,
        "predicted_mm3": float(predicted.sum()) * voxel,
        "both_mm3": float(((truth > 0) & predicted).sum()) * voxel,
    }
    for label, name in (arteries or {}).items():
        own, answer = truth == label, marked == label if labelled else predicted
        true, found = _lesions(own, answer)
        row |= {
            f"{name}_agatston_true": agatston(own, hu, affine),
            f"{name}_lesions_true": true,
            f"{name}_lesions_found": found,
            f"{name}_true_mm3": float(own.sum()) * voxel,
            f"{name}_both_mm3": float((own & answer).sum()) * voxel,
        }
        if labelled:
            count, right = _lesions(answer, own)
            row |= {
                f"{name}_agatston_predicted": agatston(answer, hu, affine),
                f"{name}_lesions_predicted": count,
                f"{name}_lesions_false": count - right,
                f"{name}_predicted_mm3": float(answer.sum()) * voxel,
            }
    return row


def summarize_calcium(rows: Sequence[Mapping[str, Any]], arteries: Sequence[str] = ()) -> dict[str, Any]:
    """The measures of the challenge over all patients.

    One without a usable prediction counts in rates and ICC as if nothing was predicted; in ``same_category`` it never
    agrees, and in ``kappa`` it has the category furthest from the true one.

    Args:
        rows: of :func:`compare_calcium`, at least one; ``missing`` or ``failed`` is 1 in those without a usable
            prediction.
        arteries: names in them.

    Returns:
        ``patients``, ``without_prediction``; ``lesions`` and ``volume`` with ``sensitivity``, ``ppv`` and ``f1`` over
        all patients' lesions, or mm3; ``icc_volume`` and ``icc_agatston``; ``categories``, a table of patients, true
        category by predicted one; ``same_category``, the share that agrees; ``kappa``, linearly weighted; and for each
        artery its sensitivities, where all predictions are labelled also ``ppv``, ``volume_ppv``, ``icc_agatston`` and
        the mean scores, ``agatston_true`` and ``agatston_predicted``. NaN where a figure is undefined.
    """

    def total(key: str) -> float:
        return math.fsum(row[key] for row in rows)

    def column(key: str) -> list[Any]:
        return [row[key] for row in rows]

    true, predicted = column("category_true"), column("category_predicted")
    without = [bool(row.get("missing") or row.get("failed")) for row in rows]
    counted = [_furthest(one) if absent else other for one, other, absent in zip(true, predicted, without, strict=True)]
    right = total("lesions_predicted") - total("lesions_false")
    return {
        "patients": len(rows),
        "without_prediction": sum(without),
        "lesions": _rates(total("lesions_found"), total("lesions_true"), right, total("lesions_predicted")),
        "volume": _rates(total("both_mm3"), total("true_mm3"), total("both_mm3"), total("predicted_mm3")),
        "icc_volume": intraclass_correlation(column("true_mm3"), column("predicted_mm3")),
        "icc_agatston": intraclass_correlation(column("agatston_true"), column("agatston_predicted")),
        "categories": {
            one: {
                other: sum(pair == (one, other) for pair in zip(true, predicted, strict=True)) for other in CATEGORIES
            }
            for one in CATEGORIES
        },
        "same_category": sum(one == other for one, other in zip(true, counted, strict=True)) / len(rows),
        "kappa": weighted_kappa(true, counted, CATEGORIES),
        "arteries": {name: _of_artery(rows, name) for name in arteries},
    }


def _of_artery(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    def total(key: str) -> float:
        return math.fsum(row[f"{name}_{key}"] for row in rows)

    found = {
        "lesions": int(total("lesions_true")),
        "sensitivity": _share(total("lesions_found"), total("lesions_true")),
        "volume_sensitivity": _share(total("both_mm3"), total("true_mm3")),
    }
    if any(f"{name}_lesions_predicted" not in row for row in rows):
        return found
    right = total("lesions_predicted") - total("lesions_false")
    true, predicted = ([row[f"{name}_agatston_{kind}"] for row in rows] for kind in ("true", "predicted"))
    return found | {
        "ppv": _share(right, total("lesions_predicted")),
        "volume_ppv": _share(total("both_mm3"), total("predicted_mm3")),
        "agatston_true": total("agatston_true") / len(rows),
        "agatston_predicted": total("agatston_predicted") / len(rows),
        "icc_agatston": intraclass_correlation(true, predicted),
    }


def _furthest(category: str) -> str:
    return CATEGORIES[-1] if CATEGORIES.index(category) < len(CATEGORIES) / 2 else CATEGORIES[0]


def intraclass_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """ICC of two raters of the same patients: two-way, absolute agreement, single measures.

    NaN for fewer than two patients or where all values are equal. Source: McGraw and Wong, Psychological Methods 1, 30
    (1996), ICC(A,1); Shrout and Fleiss call it ICC(2,1).

    Raises:
        ArgumentError: other numbers of values.
    """
    if len(first) != len(second):
        raise ArgumentError(f"second: expected {len(first)} values as of the first, got {len(second)}")
    values = np.array([first, second], dtype=float).T
    patients, raters = values.shape
    if patients < 2 or np.ptp(values) == 0:
        return math.nan
    mean = values.mean()
    by_patient, by_rater = values.mean(1), values.mean(0)
    between_patients = raters * ((by_patient - mean) ** 2).sum() / (patients - 1)
    between_raters = patients * ((by_rater - mean) ** 2).sum() / (raters - 1)
    left = values - by_patient[:, None] - by_rater + mean
    error = (left**2).sum() / ((patients - 1) * (raters - 1))
    spread = between_patients + (raters - 1) * error + raters * (between_raters - error) / patients
    return float((between_patients - error) / spread) if spread else math.nan


def weighted_kappa(first: Sequence[str], second: Sequence[str], categories: Sequence[str]) -> float:
    """Cohen's kappa with weights that fall linearly with the distance of two categories; NaN where chance explains all.

    Source: Cohen, Psychological Bulletin 70, 213 (1968).
    """
    places = np.array(
        [[categories.index(one), categories.index(other)] for one, other in zip(first, second, strict=True)]
    )
    apart = np.abs(places[:, 0] - places[:, 1]).mean()
    by_chance = np.abs(places[:, :1] - places[:, 1]).mean()
    return float(1 - apart / by_chance) if by_chance else math.nan


def _lesions(mask: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """Lesions of a mask, and how many of them hold a voxel of another one."""
    lesions, count = _connected(mask)
    return count, len(set(np.unique(lesions[other]).tolist()) - {0})


def _connected(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Regions connected by edges of pixels or faces of voxels, numbered from 1, and how many they are."""
    from scipy import ndimage

    found: Any = ndimage.label(mask)
    return found[0], int(found[1])


def _rates(found: float, true: float, right: float, predicted: float) -> dict[str, float]:
    sensitivity, ppv = _share(found, true), _share(right, predicted)
    if bool(true) != bool(predicted):
        return {"sensitivity": sensitivity, "ppv": ppv, "f1": 0.0}
    return {"sensitivity": sensitivity, "ppv": ppv, "f1": _share(2 * sensitivity * ppv, sensitivity + ppv, 0.0)}


def _share(part: float, whole: float, of_nothing: float = math.nan) -> float:
    return part / whole if whole else of_nothing


def _slice_axis(affine: np.ndarray) -> int:
    """The file's axis that runs closest to feet and head."""
    return int(np.flatnonzero(io_orientation(affine)[:, 0] == 2)[0])


def _check_shapes(names: str, first: np.ndarray, second: np.ndarray) -> None:
    if np.ndim(first) != 3 or np.shape(first) != np.shape(second):
        shapes = f"{np.shape(first)} and {np.shape(second)}"
        raise ArgumentError(f"{names}: expected arrays (X, Y, Z) of one shape, got {shapes}")
