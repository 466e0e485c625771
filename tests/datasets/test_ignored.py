"""Voxels that nobody annotated, the label ``ignore`` of nnU-Net: from the list to training and evaluation."""

from __future__ import annotations

import json
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import run
from layouts import head, nnunet, write
from pairs import AFFINE, SHAPE

from grcsf_fast import GRCSFLoss
from grcsf_fast.data.labels import Labels
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.datasets.cases import Case
from grcsf_fast.datasets.cases_file import CaseList, CasesError, ListedCase, read_cases
from grcsf_fast.datasets.sources import ListedSource
from grcsf_fast.evaluation.calcium_files import evaluate_calcium
from grcsf_fast.evaluation.folders import evaluate_cases
from grcsf_fast.training.augmentation import augmentation
from grcsf_fast.training.sampling import CaseCache, sample_crops

PREPROCESSING = Preprocessing(spacing=(2.0, 2.0, 2.0))
LABELS = {"background": 0, "lesion": 1, "ignore": 2}
HALF = slice(11, None)  # of the first axis, which nobody looked at


@pytest.fixture
def listing(tmp_path):
    """Of cases whose lesion reaches into the half that nobody looked at."""
    root = nnunet(tmp_path, labels=LABELS)
    for path in sorted((root / "labelsTr").iterdir()):
        mask = np.asarray(nib.load(path).dataobj).copy()
        mask[mask > 0] = 1
        mask[HALF] = 2
        write(path, mask)
    assert run("cases", "nnunet", root, "-o", tmp_path / "cases.json", "--folds", 2) == 0
    return tmp_path / "cases.json"


def test_a_data_set_without_another_label_is_refused(tmp_path, capsys):
    root = nnunet(tmp_path, labels={"background": 0, "ignore": 2})
    assert run("cases", "nnunet", root, "-o", tmp_path / "cases.json") == 2
    assert "dataset.json: expected a label of lesion beside ignore, found none" in capsys.readouterr().err
    assert not (tmp_path / "cases.json").exists()


def test_the_list_says_so(listing):
    text = json.loads(listing.read_text())
    assert (text["labels"], text["ignored"]) == ([1], [2])
    assert read_cases(listing).ignored == (2,)
    for labels, ignored in ((None, [2]), ([1, 2], [2])):
        listing.write_text(json.dumps(text | {"labels": labels, "ignored": ignored}))
        with pytest.raises(CasesError, match='expected under "labels" the values that are lesion, none of those under'):
            read_cases(listing)
    listing.write_text(json.dumps(text | {"ignored": []}))
    assert read_cases(listing).ignored == ()
    listing.write_text(json.dumps(text | {"ignore": [2]}))
    with pytest.raises(CasesError, match=r"expected the keys .*, ignored, .*, found .ignore. too"):
        read_cases(listing)
    listing.write_text(json.dumps(text | {"ignored": 2}))
    with pytest.raises(CasesError, match='expected whole numbers above 0 or null under "ignored", found 2'):
        read_cases(listing)


@pytest.fixture
def own(tmp_path):
    """Folders of own data: 1 and 3 are lesion, 2 is where nobody looked."""
    for number in range(4):
        image, mask = head(number, (8, 9, 7))
        mask[8, 9, 7] = 3
        mask[HALF] = 2
        write(tmp_path / "images" / f"sub-{number}.nii.gz", image)
        write(tmp_path / "masks" / f"sub-{number}.nii.gz", mask)
    return tmp_path / "images", tmp_path / "masks"


@pytest.mark.parametrize(
    ("labels", "counted", "lesion", "background"), [((), [1, 3], "1, 3", ""), (("--labels", 3), [3], "3", "1")]
)
def test_own_data_says_which_values_they_are(own, tmp_path, capsys, labels, counted, lesion, background):
    command = ("cases", "pairs", *own, "-o", tmp_path / "own.json", "--folds", 2, "--ignored", 2, *labels)
    assert run(*command) == 0
    said = capsys.readouterr().out
    assert f"lesion: {lesion}\n" in said
    assert "not annotated: 2\n" in said
    assert (f"background by --labels: {background}\n" in said) == bool(background)
    assert ("background" in said) == bool(background)
    found = read_cases(tmp_path / "own.json")
    assert (list(found.labels or ()), found.ignored) == (counted, (2,))
    for case in found.cases:
        values = np.asarray(nib.load(case.masks[0]).dataobj)
        voxel = abs(np.linalg.det(AFFINE[:3, :3])) / 1000
        assert case.lesion_ml == pytest.approx(np.isin(values, counted).sum() * voxel, abs=1e-3)


def test_labels_of_the_data_set_that_are_ignored_too(own, tmp_path, capsys):
    root = nnunet(tmp_path, labels=LABELS)
    assert run("cases", "nnunet", root, "-o", tmp_path / "own.json", "--folds", 2) == 0
    said = capsys.readouterr().out
    assert "not annotated: 2 ignore\n" in said
    assert "lesion: 1 lesion\n" in said
    root = nnunet(tmp_path / "both", labels={"background": 0, "PZ": 1, "TZ": 2})
    assert run("cases", "nnunet", root, "-o", tmp_path / "own.json", "--folds", 2, "--ignored", 2) == 0
    assert "lesion: 1 PZ\nnot annotated: 2 TZ\n" in capsys.readouterr().out
    assert run("cases", "pairs", *own, "-o", tmp_path / "own.json", "--folds", 2) == 0
    assert "annotated" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--ignored", "2", "--labels", "1,2"), "--labels: expected values of lesions, got 2, which stands for voxels"),
        (("--ignored", "4"), "--ignored: expected values of the masks, which are 1, 2, 3, got 4"),
        (
            ("--ignored", "1,2,3"),
            "--ignored: expected a value to be left that is lesion, of the masks' 1, 2, 3, got 1,2,3",
        ),
    ],
)
def test_values_that_cannot_be_ignored(own, tmp_path, capsys, given, said):
    assert run("cases", "pairs", *own, "-o", tmp_path / "own.json", "--folds", 2, *given) == 2
    assert said in capsys.readouterr().err


def test_scans_have_no_voxels_to_ignore(own, tmp_path, capsys):
    assert run("cases", "scans", own[0], "*.nii.gz", "-o", tmp_path / "own.json", "--ignored", 2) == 2
    assert "--ignored: expected masks to choose values of, but no case has one" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [None, Labels(("lesion",), ((1,),))])
def test_cases_know_them(listing, labels):
    found = read_cases(listing)
    cases = [case for case in found.cases if case.masks]
    source = ListedSource(found, cases, PREPROCESSING, channels=("T2",), labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source.survey().unknown == ()
    case = source[0]
    assert case.ignored is not None
    assert case.ignored.shape == case.lesion.shape
    assert case.ignored.any()
    assert case.lesion.any()
    assert not (case.ignored & (case.lesion > 0)).any()


def test_another_choice_of_them_is_another_training(listing):
    found = read_cases(listing)
    text = json.loads(listing.read_text())
    del text["ignored"]
    listing.write_text(json.dumps(text))
    cases = [case for case in found.cases if case.masks]
    one, other = (ListedSource(of, cases, PREPROCESSING, channels=("T2",)) for of in (found, read_cases(listing)))
    assert one.content(cases[0].name) != other.content(cases[0].name)


@pytest.mark.parametrize("crop", [(8, 8), (8, 8, 8)])
@pytest.mark.parametrize("held", [False, True], ids=["as it is", "in a pool"])
def test_crops_lie_around_what_somebody_annotated(crop, held):
    """Here a single voxel; what is ignored is cut out and turned with the rest."""
    ignored = torch.ones(24, 20, 16, dtype=torch.bool)
    ignored[17, 5, 9] = False
    case = Case("a", torch.randn(24, 20, 16), torch.zeros(24, 20, 16, dtype=torch.bool), ignored=ignored)
    cases = CaseCache([case], 1, 0).at(0) if held else [case]
    batch = sample_crops(cases, 5, crop, 0.5, np.random.default_rng(0))
    assert batch["ignored"].shape == batch["lesion"].shape == (5, 1, *crop)
    assert (batch["ignored"] == 0).flatten(1).sum(1).tolist() == [1] * 5
    turned = augmentation(len(crop), "all")(batch, 3)["ignored"]
    assert set(turned.unique().tolist()) <= {0.0, 1.0}


def test_a_training_gives_them_to_its_loss(listing, tmp_path, monkeypatch):
    seen, parts = [], GRCSFLoss.parts

    def noted(self, output, mask, ignored=None):
        seen.append(ignored)
        return parts(self, output, mask, ignored)

    monkeypatch.setattr(GRCSFLoss, "parts", noted)
    command = ["train", "--cases", listing, "--fold", 0, "--channels", "T2", "-o", tmp_path / "net", "--steps", 2]
    command += ["--batch-size", 2, "--crop-size", "16,16", "--crop-size-jitter", 0, "--warmup-steps", 1, "--workers", 0]
    command += ["--features", "4,8,8", "--rcu-levels", "", "--spacing", "2,2,2", "--precision", "float32"]
    assert run(*command, "--cache-size", 2, "--validate-every", 1, "--log-every", 1) == 0
    assert len(seen) == 2
    assert all(one is not None and one.any() and not one.all() for one in seen)


def test_evaluation_leaves_them_out(listing, tmp_path):
    """What is predicted there is neither right nor wrong."""
    found = read_cases(listing)
    cases = [case for case in found.cases if case.masks]
    for number, case in enumerate(cases):
        truth = np.asarray(nib.load(case.masks[0]).dataobj)
        mask = (truth == 1).astype(np.uint8)
        mask[HALF] = number % 2
        write(tmp_path / "predicted" / f"{case.name}.nii.gz", mask)
    results = evaluate_cases(tmp_path / "predicted", found, cases).results
    voxel = abs(np.linalg.det(AFFINE[:3, :3])) / 1000
    for row, case in zip(results.values(), cases, strict=True):
        true = int((np.asarray(nib.load(case.masks[0]).dataobj) == 1).sum())
        assert 0 < true < np.prod(SHAPE) / 2
        assert row["dice"] == 1
        assert row["truth_ml"] == row["predicted_ml"] == pytest.approx(true * voxel)
        assert row["lesions_false"] == 0


def test_calcium_leaves_them_out(tmp_path):
    hu, truth = np.zeros(SHAPE, np.int16), np.zeros(SHAPE, np.uint8)
    hu[4:8, 4:8, 4], hu[HALF, 4:8, 4] = 300, 300
    truth[4:8, 4:8, 4], truth[HALF] = 1, 2
    image, mask = write(tmp_path / "a_ct.nii.gz", hu), write(tmp_path / "a.nii.gz", truth)
    write(tmp_path / "predicted" / "a.nii.gz", (hu > 130).astype(np.uint8))
    case = ListedCase("a", (image,), (mask,), "a")
    found = CaseList("nnunet", (case,), ("CT",), {1: "LAD"}, labels=(1,), ignored=(2,))
    rows, failures = evaluate_calcium(tmp_path / "predicted", found, [case])
    assert failures == {}
    assert rows["a"]["agatston_predicted"] == rows["a"]["agatston_true"] > 0
    assert (rows["a"]["lesions_predicted"], rows["a"]["lesions_false"]) == (1, 0)


def test_calcium_leaves_them_out_of_another_mask_too(tmp_path):
    """What one mask of a case marks and another one ignores counts in no truth, as in the comparison of masks."""
    hu, marked, unknown = np.zeros(SHAPE, np.int16), np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    hu[4:8, 4:8, 4], hu[HALF, 4:8, 4] = 300, 300
    marked[hu > 130], unknown[HALF] = 1, 2
    masks = (write(tmp_path / "first.nii.gz", marked), write(tmp_path / "second.nii.gz", unknown))
    case = ListedCase("a", (write(tmp_path / "a_ct.nii.gz", hu),), masks, "a")
    write(tmp_path / "predicted" / "a.nii.gz", marked)
    found = CaseList("nnunet", (case,), ("CT",), {1: "LAD"}, labels=(1,), ignored=(2,))
    rows, _ = evaluate_calcium(tmp_path / "predicted", found, [case])
    assert rows["a"]["agatston_predicted"] == rows["a"]["agatston_true"] > 0
    assert (rows["a"]["lesions_true"], rows["a"]["lesions_found"]) == (1, 1)
    assert evaluate_cases(tmp_path / "predicted", found, [case]).results["a"]["dice"] == 1
