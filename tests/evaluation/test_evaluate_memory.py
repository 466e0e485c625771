"""How much memory a comparison takes: figures are those of whole volumes, and files that do not fit are not read."""

import math
import re
import tracemalloc
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from grcsf_fast.cli import main
from grcsf_fast.data import images, masks
from grcsf_fast.datasets.cases_file import CaseList, ListedCase
from grcsf_fast.datasets.lesions import read_lesions
from grcsf_fast.evaluation import folders, metrics
from grcsf_fast.evaluation.calcium import _connected, agatston, compare_calcium
from grcsf_fast.evaluation.calcium_files import evaluate_calcium
from grcsf_fast.evaluation.folders import evaluate_cases, evaluate_folders
from grcsf_fast.evaluation.metrics import evaluate_masks

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])
ANISOTROPIC = np.array([[0, -0.7, 0, 4], [1.3, 0, 0, -9], [0, 0, 4.9, 20], [0, 0, 0, 1.0]])
TILT = np.array([[1.0, 0, 0, 0], [0, 1, 2.887, 0], [0, 0, 5, 0], [0, 0, 0, 1]])
SHAPE = (23, 18, 15)


def of_whole_volumes(predicted, truth, affine, least):
    """Labels, counts and MONAI's distance of the whole grid."""
    from monai.metrics import compute_hausdorff_distance

    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    counted, met = {}, {}
    for name, mask, other in (("predicted", predicted, truth), ("true", truth, predicted)):
        labels, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(labels.ravel())
        counted[name] = {label for label in range(1, len(sizes)) if sizes[label] * voxel_ml >= least * (1 - 1e-9)}
        met[name] = counted[name] & set(labels[other].tolist())
    found, false = len(met["true"]), len(counted["predicted"]) - len(met["predicted"])
    decisions = found + false + len(counted["true"])
    total = int(predicted.sum()) + int(truth.sum())
    distance = math.nan
    if predicted.any() and truth.any():
        pair = [torch.from_numpy(np.pad(mask, 1))[None, None] for mask in (predicted, truth)]
        spacing = nib.affines.voxel_sizes(affine).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            distance = float(compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing))
    return {
        "dice": 2 * int((predicted & truth).sum()) / total if total else 1.0,
        "predicted_ml": float(predicted.sum()) * voxel_ml,
        "truth_ml": float(truth.sum()) * voxel_ml,
        "volume_difference_ml": (float(predicted.sum()) - float(truth.sum())) * voxel_ml,
        "lesions_true": len(counted["true"]),
        "lesions_predicted": len(counted["predicted"]),
        "lesions_found": found,
        "lesions_false": false,
        "lesion_count_difference": len(counted["predicted"]) - len(counted["true"]),
        "lesion_f1": 2 * found / decisions if decisions else math.nan,
        "hausdorff95_mm": distance,
    }


def drawn(rng, share, where=slice(None)):
    mask = np.zeros(SHAPE, bool)
    mask[where] = ndimage.uniform_filter(rng.random(SHAPE), 2)[where] > 1 - share
    return mask


INNER = (slice(4, 12), slice(3, 14), slice(5, 9))
PAIRS = {
    "dense": (0.5, slice(None), 0.5, slice(None)),
    "sparse": (0.2, slice(None), 0.25, slice(None)),
    "inner": (0.5, INNER, 0.4, (slice(6, 20), *INNER[1:])),
    "border": (0.5, (slice(0, 2),), 0.5, (slice(None), slice(-2, None))),
    "all": (1.1, slice(None), 0.4, slice(None)),
    "empty truth": (0.4, INNER, -1, INNER),
    "empty prediction": (-1, INNER, 0.4, INNER),
    "both empty": (-1, INNER, -1, INNER),
}


@pytest.mark.parametrize("piece", [2**20, 50])
@pytest.mark.parametrize("affine", [AFFINE, ANISOTROPIC], ids=["straight", "anisotropic"])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_figures_are_those_of_whole_volumes(monkeypatch, pair, affine, piece):
    monkeypatch.setattr(metrics, "PIECE", piece, raising=False)
    first, where, second, other = PAIRS[pair]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        predicted, truth = drawn(rng, first, where), np.asfortranarray(drawn(rng, second, other))
        for least in (0.0, 0.1):
            found = evaluate_masks(predicted, truth, affine, least)
            expected = of_whole_volumes(predicted, truth, affine, least)
            # Other versions of MONAI than 1.6 have other last digits.
            assert found["hausdorff95_mm"] == pytest.approx(expected.pop("hausdorff95_mm"), rel=1e-6, nan_ok=True)
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_labels_of_lists_are_those_of_whole_volumes(tmp_path):
    """Each label's own box is another."""
    rng = np.random.default_rng(5)
    numbers = [np.where(drawn(rng, 0.4), rng.integers(1, 4, SHAPE), 0).astype(np.int32) for _ in range(2)]
    for name, values in zip(("truth", "predicted"), numbers, strict=True):
        save(tmp_path / name / "a.nii.gz", values)
    labels = folders.Labels(("one", "more"), ((1,), (2, 3)), exclusive=False)
    found = evaluate_folders(tmp_path / "predicted", tmp_path / "truth", labels=labels)
    for name, own in zip(labels.names, labels.numbers, strict=True):
        true, predicted = (np.isin(values, own) for values in numbers)
        expected = of_whole_volumes(predicted, true, AFFINE, 0.1)
        row = found.by_label[name]["a"]
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(("corners", "most"), [(False, 1.5), (True, 9)], ids=["near", "apart"])
@pytest.mark.parametrize("affine", [AFFINE, TILT], ids=["straight", "sheared"])
def test_memory_is_that_of_the_box(corners, most, affine):
    """In bytes of a voxel of the whole grid; 20 before."""
    masks = [np.zeros((120, 130, 140), bool) for _ in range(2)]
    for mask in masks:
        mask[50:60, 50:60, 50:60] = True
        mask[0, 0, 0] = mask[-1, -1, -1] = corners
    evaluate_masks(*masks, affine)  # what is imported for it
    tracemalloc.start()
    try:
        evaluate_masks(*masks, affine)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most * masks[0].size


def test_a_box_that_does_not_fit(monkeypatch):
    mask = np.ones((4, 5, 6), bool)
    monkeypatch.setattr(metrics, "memory_budget", lambda: 4 * 5 * 6)
    with pytest.raises(MemoryError, match=r"the box around both masks takes \S+ GiB to compare, \S+ are free"):
        evaluate_masks(mask, mask, AFFINE)


def save(path, mask, affine=AFFINE):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(mask, affine), path)
    return path


@pytest.fixture
def pairs(tmp_path):
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[3:9, 3:9, 3:9] = 1
    for name in "abc":
        save(tmp_path / "truth" / f"{name}.nii.gz", mask)
        save(tmp_path / "predicted" / f"{name}.nii.gz", mask)
    return tmp_path / "predicted", tmp_path / "truth"


@pytest.fixture
def read(monkeypatch):
    names, real = [], masks.read_voxels

    def noted(opened, *more):
        names.append(opened.name)
        return real(opened, *more)

    monkeypatch.setattr(masks, "read_voxels", noted)
    return names


def test_a_prediction_on_another_grid_is_not_read(pairs, read):
    predicted, truth = pairs
    file = save(predicted / "b.nii.gz", np.zeros((90, 90, 90), np.uint8))
    found = evaluate_folders(predicted, truth)
    assert str(file) not in read
    assert len(read) == 5
    assert found.failures["b"].startswith(f"{file}: expected the grid of {truth / 'b.nii.gz'} (20, 20, 20)")
    assert [row["failed"] for row in found.results.values()] == [0, 1, 0]


def test_doubts_about_a_header_are_said_before_its_grid(pairs):
    predicted, truth = pairs
    image = nib.Nifti1Image(np.zeros((9, 9, 9), np.uint8), np.diag([0.002, 0.002, 0.005, 1.0]))
    image.header.set_xyzt_units("meter")
    nib.save(image, predicted / "b.nii.gz")
    with pytest.warns(UserWarning, match=r"b\.nii\.gz: .*its unit is"):
        evaluate_folders(predicted, truth)


@pytest.mark.parametrize("whose", ["truth", "predicted"])
def test_files_that_memory_has_no_room_for_are_not_read(pairs, read, monkeypatch, whose):
    """Of the truth the case is left out, as of one that cannot be read; a prediction cannot be used."""
    predicted, truth = pairs
    file = (predicted if whose == "predicted" else truth) / "b.nii.gz"
    save(file, np.zeros((20, 20, 20), np.float64))
    monkeypatch.setattr(images, "memory_budget", lambda: 8000 * 8)
    found = evaluate_folders(predicted, truth)
    assert str(file) not in read
    text = r": expected voxels that memory has room for, \S+ GiB, found shape \(20, 20, 20\), which takes \S+ GiB"
    assert re.fullmatch(re.escape(str(file)) + text, found.failures["b"])
    assert list(found.results) == (["a", "c"] if whose == "truth" else ["a", "b", "c"])
    assert whose == "truth" or found.results["b"]["failed"] == 1


def test_all_files_of_a_listed_case_count(tmp_path, monkeypatch):
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    one, other = (save(tmp_path / "masks" / f"{name}.nii.gz", mask) for name in "12")
    image = save(tmp_path / "images" / "a.nii.gz", np.random.default_rng(0).normal(300, 9, mask.shape))
    save(tmp_path / "predicted" / "a.nii.gz", mask)
    case = ListedCase("a", (image,), (one, other), "a")
    listing = CaseList("pairs", (case,), above_hu=130.0)
    read_lesions(case, listing)
    monkeypatch.setattr(images, "memory_budget", lambda: 8000 * 12)
    found = evaluate_cases(tmp_path / "predicted", listing, [case])
    assert found.results == {}
    assert found.failures["a"].startswith(f"{image}: expected voxels that memory has room for")
    assert found.failures["a"].endswith(" with the other files of its case")
    rows, failures = evaluate_calcium(tmp_path / "predicted", listing, [case])
    assert (rows, failures) == ({}, found.failures)


@pytest.mark.parametrize("words", ["", "Unable to allocate 1 GiB"])
def test_a_pair_that_runs_out_of_memory_stops_no_other(pairs, monkeypatch, words):
    """Wherever it does."""
    predicted, truth = pairs
    save(truth / "b.nii.gz", np.ones((20, 20, 20), np.uint8))
    real = folders.evaluate_masks

    def evaluate(predicted, truth, *more):
        if truth.all():
            raise MemoryError(words)
        return real(predicted, truth, *more)

    monkeypatch.setattr(folders, "evaluate_masks", evaluate)
    with pytest.warns(UserWarning, match="100% of the volume"):
        found = evaluate_folders(predicted, truth)
    assert list(found.results) == ["a", "c"]
    after = f": {words}" if words else ""
    assert found.failures == {"b": f"{truth / 'b.nii.gz'}: not enough memory to compare it{after}"}


def test_a_voxel_map_that_runs_out_of_memory_is_one_line(pairs, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "memory_budget", lambda: 0)
    predicted, truth = pairs
    assert main(["evaluate", "-p", str(predicted), "-t", str(truth)]) == 1
    said = capsys.readouterr().err
    assert "3 of 3 cases failed" in said
    assert said.count("not enough memory to compare it: the box around both masks takes") == 3
    assert "Traceback" not in said


def test_calcium_counts_in_the_box_alone():
    """As in the whole volume."""
    rng = np.random.default_rng(3)
    hu = rng.normal(150, 120, SHAPE).astype(np.float32)
    truth, predicted = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, bool)
    truth[INNER] = rng.integers(0, 3, truth[INNER].shape)
    predicted[6:22, 3:10, 4:9] = rng.random((16, 7, 5)) < 0.4
    for affine in (AFFINE, ANISOTROPIC, TILT):
        row = compare_calcium(predicted, truth, hu, affine, {1: "LAD", 2: "LCX", 3: "RCA"})
        assert row["agatston_true"] == agatston(truth > 0, hu, affine)
        assert row["agatston_predicted"] == agatston(predicted, hu, affine)
        for label, name in ((1, "LAD"), (2, "LCX"), (3, "RCA")):
            assert row[f"{name}_agatston_true"] == agatston(truth == label, hu, affine)
            lesions, count = _connected((truth == label) & (hu > 130))
            assert row[f"{name}_lesions_true"] == count
            assert row[f"{name}_lesions_found"] == len(set(lesions[predicted & (hu > 130)].tolist()) - {0})
        assert row["lesions_predicted"] == _connected(predicted & (hu > 130))[1]
    nothing = compare_calcium(predicted & False, truth & 0, hu, AFFINE)
    assert (nothing["agatston_true"], nothing["lesions_true"], nothing["lesions_predicted"]) == (0, 0, 0)
