"""Several labels against the truth: each is measured as if it were alone, from files that are read once."""

import csv
import json
import warnings
from collections import Counter

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.cli import main
from grcsf_fast.data import masks
from grcsf_fast.data.labels import Labels
from grcsf_fast.datasets.cases_file import CaseList, ListedCase
from grcsf_fast.evaluation.folders import evaluate_cases, evaluate_folders
from grcsf_fast.evaluation.metrics import evaluate_masks

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])  # 0.02 mL a voxel
SHAPE = (16, 14, 12)
CLASSES = Labels(("oedema", "core"), ((1,), (2,)))
REGIONS = Labels(("whole", "core"), ((1, 2), (2,)), exclusive=False)


def save(path, mask, affine=AFFINE):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(mask, affine), path)


def drawn(seed):
    """Boxes of 1 and 2; where the seed is 2, of 1 alone."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, np.uint8)
    for number in (1, 2) if seed != 2 else (1,):
        corner = rng.integers(0, 6, 3)
        mask[tuple(slice(first, first + 5) for first in corner)] = number
    return mask


@pytest.fixture
def folders(tmp_path):
    """Truths a to e; predictions of a to c, one of d on another grid, none of e."""
    for seed, name in enumerate("abcde"):
        save(tmp_path / "truth" / f"{name}.nii.gz", drawn(seed))
        if name != "e":
            found = drawn(seed + 10)
            save(tmp_path / "predicted" / f"{name}.nii.gz", found[:9] if name == "d" else found)
    return tmp_path / "predicted", tmp_path / "truth"


@pytest.fixture
def reads(monkeypatch):
    """How often the voxels of each file were read."""
    counts, read = Counter(), masks.read_voxels

    def counted(opened, *more):
        counts[opened.name] += 1
        return read(opened, *more)

    monkeypatch.setattr(masks, "read_voxels", counted)
    return counts


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_each_label_as_if_it_were_alone(folders, reads, labels):
    results, failures, by_label, _ = evaluate_folders(*folders, labels=labels)
    assert sorted(failures) == ["d", "e"]
    assert set(reads.values()) == {1}
    assert len(reads) == 8  # not the one on another grid, as its header says
    assert list(by_label) == list(labels.names)
    for (label, rows), numbers in zip(by_label.items(), labels.numbers, strict=True):
        for seed, name in enumerate("abcde"):
            true, found = (np.isin(drawn(one), numbers) for one in (seed, seed + 10))
            expected = evaluate_masks(found if name in "abc" else found & False, true, AFFINE)
            expected |= {"missing": int(name == "e"), "failed": int(name == "d")}
            if name in "de":
                expected["dice"] = 0.0
            assert rows[name] == pytest.approx(expected, nan_ok=True), (label, name)
    assert results["a"]["truth_ml"] == pytest.approx((drawn(0) > 0).sum() * 0.02)


def test_masks_of_a_list_overlap_and_count_above_a_limit(folders, reads, tmp_path):
    """A voxel that two masks of a case give other numbers has both labels."""
    predicted, _ = folders
    more = tmp_path / "more"
    for number, size in ((1, 4), (2, 6)):
        mask = np.zeros(SHAPE, np.uint8)
        mask[:size] = number
        save(more / f"{number}.nii.gz", mask)
    image = np.zeros(SHAPE, np.float32)
    image[:] = 100 * np.arange(SHAPE[1])[:, None]
    save(more / "image.nii.gz", image)
    case = ListedCase("a", (more / "image.nii.gz",), (more / "1.nii.gz", more / "2.nii.gz"), "a")
    listing = CaseList("pairs", (case,), above_hu=650.0)
    compared = evaluate_cases(predicted, listing, [case], labels=CLASSES)
    assert compared.failures == {}
    assert set(reads.values()) == {1}
    share = 7 / SHAPE[1]  # of the axis above 650
    true = {label: rows["a"]["truth_ml"] for label, rows in compared.by_label.items()}
    layer = SHAPE[1] * SHAPE[2] * 0.02 * share
    assert true == pytest.approx({"oedema": 4 * layer, "core": 6 * layer})
    assert compared.results["a"]["truth_ml"] == pytest.approx(6 * layer)


def test_the_command_says_each_doubt_once(folders, tmp_path, capfd, recwarn):
    """A soft mask, of which each label would say that it is cut."""
    predicted, truth = folders
    soft = np.zeros(SHAPE, np.float32)
    soft[4:9, 4:9, 4:9] = 1
    soft[9, 4:9, 4:9] = 0.7
    save(predicted / "a.nii.gz", soft)
    out = tmp_path / "scores"
    arguments = ["evaluate", "-p", str(predicted), "-t", str(truth), "-o", str(out), "--classes", "oedema=1,core=2"]
    assert main(arguments) == 1
    said = [str(one.message) for one in recwarn if "is cut at 0.5" in str(one.message)]
    assert len(said) + capfd.readouterr().err.count("is cut at 0.5") == 1
    with (out / "labels.csv").open(newline="") as file:
        rows = {(row["label"], row["case"]): row for row in csv.DictReader(file)}
    assert float(rows["oedema", "a"]["predicted_ml"]) == pytest.approx(6 * 25 * 0.02)
    assert float(rows["core", "a"]["predicted_ml"]) == 0
    assert set(json.loads((out / "summary.json").read_text())["labels"]) == {"oedema", "core"}


def test_numbers_that_no_label_or_no_truth_has(tmp_path):
    """A mistyped number would be a perfect Dice of nothing against nothing."""
    mask = drawn(0)
    mask[0, 0, :3] = 4
    save(tmp_path / "truth" / "a.nii.gz", mask)
    save(tmp_path / "predicted" / "a.nii.gz", drawn(0))
    mistyped = Labels(("oedema", "core", "enhancing"), ((1,), (2,), (3,)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        evaluate_folders(tmp_path / "predicted", tmp_path / "truth", labels=mistyped)
    texts = [str(one.message) for one in said]
    assert len(texts) == 2
    assert "enhancing: expected voxels of its number 3 in some truth, found 1, 2, 4" in texts[0]
    assert "true masks: expected the numbers 1, 2, 3 of the labels, found 4 too" in texts[1]


def test_a_scale_factor_makes_no_other_label(tmp_path):
    """Nor a warning of one that nobody drew."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    for folder in ("predicted", "truth"):
        image = nib.Nifti1Image(mask, AFFINE)
        image.header.set_slope_inter(1 / 255, 0)
        (tmp_path / folder).mkdir()
        image.to_filename(tmp_path / folder / "a.nii.gz")
    with pytest.warns(UserWarning, match="^core: ") as said:
        found = evaluate_folders(tmp_path / "predicted", tmp_path / "truth", labels=CLASSES)
    assert found.by_label["oedema"]["a"]["dice"] == 1
    # Of the label that there is not.
    assert [str(one.message).partition(":")[0] for one in said] == ["core"]
    assert "found 1;" in str(said[0].message)
