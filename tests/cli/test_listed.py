"""Commands on a list of cases: what a fold is for each, and what is refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundles import tiny_bundle
from commands import TINY_MAE, run
from layouts import atlas, atlas_session, decathlon, head, nnunet, orcascore, write

from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.datasets.cases_file import read_cases, select, write_cases
from grcsf_fast.datasets.sources import ListedSource
from grcsf_fast.datasets.survey import Survey
from grcsf_fast.pretrained.bundle import load_bundle, save_bundle
from grcsf_fast.training import loop

SMALL = [
    *("--steps", "2", "--batch-size", "2", "--crop-size", "16,16", "--crop-size-jitter", "0", "--warmup-steps", "1"),
    *("--cache-size", "2", "--log-every", "1", "--validate-every", "2", "--precision", "float32", "--augment", "none"),
]
TINY_NETWORK = ["--features", "4,8,8,8", "--rcu-levels", ""]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    made = replace(tiny_bundle(), preprocessing=Preprocessing((2.0, 2.0, 2.0)))
    return save_bundle(made, tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    """ATLAS in small: 13 cases in 3 folds, two without fold."""
    folder = tmp_path_factory.mktemp("atlas")
    assert run("cases", "atlas-r2", atlas(folder), "-o", folder / "cases.json", "--folds", 3) == 0
    return folder / "cases.json"


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decathlon")
    assert run("cases", "decathlon", decathlon(folder), "-o", folder / "all.json", "--folds", 2) == 0
    assert run("cases", "decathlon", folder / "Task01_BrainTumour", "-o", folder / "one.json", "--channel", 1) == 0
    return folder


def names(cases, fold):
    return sorted(case.name for case in select(read_cases(cases), fold))


def data_of(monkeypatch):
    """What a training trains on: the names of all its cases."""
    seen = []

    def described(source, *others):
        seen.append(sorted(source.names))
        return {}

    monkeypatch.setattr(loop, "describe_data", described)
    return seen


@pytest.mark.parametrize("fold", [0, 2])
def test_a_training_holds_a_fold_out(cases, tmp_path, monkeypatch, capsys, fold):
    seen = data_of(monkeypatch)
    output = tmp_path / "network"
    assert run("train", "--cases", cases, "--fold", fold, "-o", output, *SMALL, *TINY_NETWORK) == 0
    held = names(cases, fold)
    others = sorted(set(names(cases, None)) - set(held) - set(names(cases, "test")))
    assert seen == [others]
    said = capsys.readouterr().out
    assert f"13 cases, 11 with lesion, 11 on the networks' grid; fold {fold} holds {len(held)} of them out" in said
    with (output / "log.csv").open(newline="") as file:
        assert any(row["validation_dice"] for row in csv.DictReader(file))
    assert load_bundle(output / "bundle").card["options"]["fold"] == fold
    assert load_bundle(output / "bundle").card["trained_on"] == "cases of a list"


def test_what_has_seen_a_fold_is_no_start_for_a_training_without_it(cases, tmp_path, capsys):
    """By the card of its bundle, which knows the list wherever it lies; and a prediction of the fold is warned of."""
    output = tmp_path / "network"
    train = ["train", "--cases", cases, *SMALL, *TINY_NETWORK]
    assert run(*train, "--fold", 0, "-o", output) == 0
    first = output / "bundle"
    moved = tmp_path / "moved.json"
    listing = read_cases(cases)
    write_cases(moved, listing)
    capsys.readouterr()
    for again in (cases, moved):
        assert run("train", "--cases", again, *SMALL, "--initial", first, "--fold", 1, "-o", tmp_path / "other") == 2
        said = capsys.readouterr().err
        assert f"--initial: expected a bundle whose training held out fold 1 of {again} as well, got one" in said
        assert "that held out fold 0 of it" in said
    assert run("train", "--cases", cases, *SMALL, "--initial", first, "--fold", 0, "-o", tmp_path / "same") == 0
    # Of other folds of the same cases it says nothing.
    write_cases(moved, replace(listing, cases=tuple(replace(case, fold=case.fold and 1) for case in listing.cases)))
    assert run("train", "--cases", moved, *SMALL, "--initial", first, "--fold", 1, "-o", tmp_path / "moved") == 0
    everything = tmp_path / "everything"
    assert run(*train, "-o", everything) == 0
    capsys.readouterr()
    predict = ["predict", "--cases", cases, "--no-maps", "--no-overlay", "--no-page", "-o", tmp_path / "out"]
    assert run(*predict, "-m", first, "--fold", 0) == 0
    for bundle, held_out, fold in ((first, "fold 0", 1), (everything / "bundle", "none", 0)):
        said = rf"its training held out {held_out} of .*cases\.json and has seen fold {fold}"
        with pytest.warns(UserWarning, match=said):
            assert run(*predict, "-m", bundle, "--fold", fold, "--overwrite") == 0


def test_a_fold_of_an_autoencoder(cases, tmp_path, capsys):
    output = tmp_path / "mae"
    assert run("train-mae", "--cases", cases, "--fold", 0, "-o", output, *SMALL, *TINY_MAE) == 0
    capsys.readouterr()
    more = ["--cases", cases, "--fold", 2, *SMALL, "-o", tmp_path / "more"]
    assert run("train-mae", *more, "--initial", output / "bundle") == 2
    assert "--initial: expected a bundle whose training held out fold 2" in capsys.readouterr().err
    assert run("train", *more, "--mae", output / "bundle") == 2
    assert "--mae: expected a bundle whose training held out fold 2" in capsys.readouterr().err


def test_a_training_without_fold_takes_all_with_masks(cases, tmp_path, monkeypatch):
    seen = data_of(monkeypatch)
    assert run("train", "--cases", cases, "-o", tmp_path / "network", *SMALL, *TINY_NETWORK) == 0
    assert seen == [sorted(set(names(cases, None)) - set(names(cases, "test")))]


def test_cases_of_a_fold_that_are_measured_are_drawn(cases, tmp_path, monkeypatch):
    """By the seed, not the first ones."""
    monkeypatch.setattr(
        "grcsf_fast.training.network.train_network",
        lambda *given: measured.append([one.name for one in given[3]]) or "x",
    )
    measured, held = [], names(cases, 0)
    for seed in (0, 1, 2, 2):
        given = ("--fold", 0, "--validation", 2, "--seed", seed, "-o", tmp_path / f"{len(measured)}")
        assert run("train", "--cases", cases, *given, *SMALL, *TINY_NETWORK) == 0
    assert all(one == sorted(one) and len(one) == 2 and set(one) < set(held) for one in measured)
    assert len(set(map(tuple, measured))) > 1
    assert measured[2] == measured[3]


def test_a_recipe_may_know_how_many_are_measured(cases, tmp_path, monkeypatch):
    """Where no fold is held out, that of a recipe has no meaning, and one given by hand is refused."""
    seen = data_of(monkeypatch)
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps({"format": "grcsf-fast recipe", "version": 1, "train": {"validation": 3}}))
    train = ("train", "--cases", cases, "--recipe", recipe, *SMALL, *TINY_NETWORK)
    assert run(*train, "-o", tmp_path / "network") == 0
    assert seen == [sorted(set(names(cases, None)) - set(names(cases, "test")))]
    assert run(*train, "-o", tmp_path / "other", "--validation", 2) == 2


def test_a_ct_that_is_taken_for_mri_is_said(tmp_path, monkeypatch):
    """Once, by the name in the list; other warnings are errors here."""
    for module in ("autoencoder.train_mae", "network.train_network"):
        monkeypatch.setattr(f"grcsf_fast.training.{module}", lambda *given: "x")
    monkeypatch.setattr(ListedSource, "survey", lambda self, progress: Survey(1, 1, 1, []))
    single, double = tmp_path / "single.json", tmp_path / "double.json"
    assert run("cases", "orcascore", orcascore(tmp_path), "-o", single, "--folds", 2) == 0
    root = nnunet(tmp_path, channel_names={"0": "PET", "1": "ct"})
    assert run("cases", "nnunet", root, "-o", double, "--folds", 2) == 0
    mae, network = (
        (command, *SMALL, *sizes, "-o", tmp_path / "out", "--cases")
        for command, sizes in (("train-mae", TINY_MAE), ("train", TINY_NETWORK))
    )
    both = (double, "--channels", "PET,ct")
    alike = (tmp_path / "alike.json", "--channels", "CT_0,CT_1")
    root = nnunet(tmp_path / "alike", channel_names={"0": "CT", "1": "CT"})
    assert run("cases", "nnunet", root, "-o", alike[0], "--folds", 2) == 0
    one, two = ((*command, single) for command in (mae, network))
    for command, wanted in ((one, "ct"), (two, "ct"), ((*mae, *both), "mri,ct"), ((*mae, *alike), "ct")):
        with pytest.warns(UserWarning, match=f"CT, which is taken for MRI; is --modality {wanted} missing") as said:
            assert run(*command) == 0
        assert len(said) == 1
    for command in (
        (*mae, single, "--modality", "ct"),
        (*mae, single, "--modality", "mri"),
        (*mae, double, *both[1:2], "PET"),
    ):
        assert run(*command) == 0


def test_the_autoencoder_sees_no_case_of_the_fold(cases, tmp_path, monkeypatch):
    seen = data_of(monkeypatch)
    for arguments in (["--fold", 1], []):
        assert run("train-mae", "--cases", cases, *arguments, "-o", tmp_path / f"{len(seen)}", *SMALL, *TINY_MAE) == 0
    everything = set(names(cases, None))
    assert seen == [sorted(everything - set(names(cases, 1)) - set(names(cases, "test"))), sorted(everything)]


def test_no_training_takes_a_test_set(tmp_path, monkeypatch, capsys):
    """With masks, so that only the list says that it is one; they are for the evaluation."""
    root, cases = nnunet(tmp_path), tmp_path / "cases.json"
    write(root / "labelsTs" / "prostate_05.nii.gz", head(5, (8, 9, 7))[1])
    assert run("cases", "nnunet", root, "-o", cases, "--channel", 0, "--folds", 2) == 0
    assert "0 without a mask and in no fold, 1 of a test set and in no fold" in capsys.readouterr().out
    seen = data_of(monkeypatch)
    assert run("train", "--cases", cases, "-o", tmp_path / "network", *SMALL, *TINY_NETWORK) == 0
    assert run("train-mae", "--cases", cases, "-o", tmp_path / "mae", *SMALL, *TINY_MAE) == 0
    assert seen == [[f"prostate_0{number}" for number in range(5)]] * 2
    masks = ("-p", root / "labelsTs", "-o", tmp_path / "scores")
    assert run("evaluate", "--cases", cases, "--fold", "test", *masks) == 0
    with (tmp_path / "scores" / "cases.csv").open(newline="") as file:
        assert [(row["case"], float(row["dice"])) for row in csv.DictReader(file)] == [("prostate_05", 1.0)]


def test_another_choice_of_labels_is_another_training(several, tmp_path, capsys):
    for labels, extra in (("1,2", []), ("1,2", ["--resume"]), ("3", ["--resume"])):
        listing = tmp_path / "cases.json"
        root = several / "Task01_BrainTumour"
        assert run("cases", "decathlon", root, "-o", listing, "--channel", 0, "--labels", labels) == 0
        code = run("train", "--cases", listing, "-o", tmp_path / "network", *SMALL, *TINY_NETWORK, *extra)
        assert code == (2 if labels == "3" else 0)
    assert "cases with other content than for the checkpoint: BRATS_001" in capsys.readouterr().err


def test_a_training_goes_on_with_the_cases_of_its_validation(cases, tmp_path, capsys):
    """Of its best weights it is known how they did on these, and not on others."""
    train = ("train", *SMALL, *TINY_NETWORK, "-o", tmp_path / "network", "--fold", 1)
    assert run(*train, "--cases", cases, "--validation", 2) == 0
    listing = read_cases(cases)
    held = select(listing, 1)
    masked_alike = tuple(replace(case, masks=held[0].masks) if case in held else case for case in listing.cases)
    write_cases(tmp_path / "other.json", replace(listing, cases=masked_alike))
    again = ("--resume", "--steps", 3)
    capsys.readouterr()
    assert run(*train, "--cases", cases, *again) == 2
    said = capsys.readouterr().err
    assert "\n  validation cases unknown to the checkpoint: sub-" in said
    assert said.count("sub-") == len(held) - 2
    assert run(*train, "--cases", tmp_path / "other.json", "--validation", 2, *again) == 2
    assert "validation cases with other content than for the checkpoint: sub-" in capsys.readouterr().err
    assert run(*train, "--cases", cases, "--validation", 2, *again) == 0


def test_predict_and_evaluate_work_on_a_fold(cases, bundle, tmp_path, capsys):
    output = tmp_path / "predicted"
    predict = ["predict", "--cases", cases, "-m", bundle, "-o", output, "--no-maps", "--no-overlay"]
    assert run(*predict, "--fold", 1) == 0
    own = names(cases, 1)
    assert sorted(path.name for path in output.glob("*.nii.gz")) == [f"{name}.nii.gz" for name in own]
    report = json.loads((output / f"{own[0]}_report.json").read_text())
    assert report["case"] == own[0]
    image = read_cases(cases).cases[0].images[0]
    assert Path(report["input"]).parent.parts[-5:-3] == image.parent.parts[-5:-3]
    capsys.readouterr()
    assert run(*predict, "--fold", 1) == 0
    assert f"{len(own)} cases were finished before" in capsys.readouterr().out
    assert run("evaluate", "-p", output, "--cases", cases, "--fold", 1, "-o", tmp_path / "scores") == 0
    with (tmp_path / "scores" / "cases.csv").open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == own
    truth = {case.name: case.lesion_ml for case in read_cases(cases).cases}
    assert {name: float(row["truth_ml"]) for name, row in rows.items()} == pytest.approx(
        {name: truth[name] for name in own}
    )
    capsys.readouterr()
    assert run("evaluate", "-p", output, "--cases", cases) == 1
    said = capsys.readouterr()
    assert f"{13 - len(own)} of 13 cases failed" in said.err
    other = names(cases, 0)[0]
    assert f"{other}: {output}: expected a prediction of the name of {other}, found none" in said.err
    assert run(*predict, "--fold", "test") == 0
    assert all((output / f"{name}.nii.gz").is_file() for name in names(cases, "test"))
    assert run("evaluate", "-p", output, "--cases", cases, "--fold", 1) == 0
    assert "2 predictions without a truth were not compared" in capsys.readouterr().err
    assert run("evaluate", "-p", output, "--cases", cases, "--fold", "test") == 2
    assert "expected cases with masks to compare with, found none" in capsys.readouterr().err


def test_joined_masks_are_the_truth(tmp_path):
    folder = atlas_session(tmp_path / "data", 1, 1)
    atlas_session(tmp_path / "data", 1, 2)
    mask = next(folder.glob("*mask.nii.gz"))
    other = head(0, (14, 15, 10), 2)[1]
    write(folder / mask.name.replace("label-L", "label-R"), other)
    assert run("cases", "atlas-r2", tmp_path / "data", "-o", tmp_path / "cases.json", "--folds", 2) == 0
    joined = np.asarray(nib.load(mask).dataobj) | other
    for name, data in (("sub-r001s001_ses-1", joined), ("sub-r001s002_ses-1", joined)):
        write(tmp_path / "predicted" / f"{name}.nii.gz", data)
    arguments = ("-p", tmp_path / "predicted", "--cases", tmp_path / "cases.json", "-o", tmp_path / "scores")
    assert run("evaluate", *arguments) == 0
    with (tmp_path / "scores" / "cases.csv").open(newline="") as file:
        dice = {row["case"]: float(row["dice"]) for row in csv.DictReader(file)}
    assert dice == pytest.approx({"sub-r001s001_ses-1": 1.0, "sub-r001s002_ses-1": 2 * 64 / (64 + 72)})


def test_calcium_from_the_data_set_to_the_scores(tmp_path, capsys):
    """The voxels of 130 HU that the reference marks too are lesion neither in training nor in the truth."""
    listing = tmp_path / "cases.json"
    assert run("cases", "orcascore", orcascore(tmp_path), "-o", listing, "--folds", 2) == 0
    assert "lesion: 1 LAD, 2 LCX, 3 RCA\n" in capsys.readouterr().out
    ct = ["--modality", "ct", "--hu-window", "-160,1000", "--spacing", "2,2,3"]
    train = ["train", "--cases", listing, "--fold", 0, "-o", tmp_path / "network", *SMALL, *TINY_NETWORK, *ct]
    assert run(*train) == 0
    assert "6 cases, 6 with lesion, 6 on the networks' grid; fold 0 holds 3 of them out" in capsys.readouterr().out
    output = tmp_path / "predicted"
    predict = ["predict", "--cases", listing, "--fold", 0, "-m", tmp_path / "network" / "bundle", "-o", output]
    assert run(*predict, "--no-overlay") == 0
    assert run("evaluate", "-p", output, "--cases", listing, "--fold", 0, "-o", tmp_path / "scores") == 0
    with (tmp_path / "scores" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["truth_ml"]) for row in rows] == pytest.approx([9 * 0.012] * 3)
    image = next(tmp_path.glob("**/Images/TRV1P1CTI.mhd"))
    assert run("predict", "-i", image, "-m", tmp_path / "network" / "bundle", "-o", tmp_path / "one") == 0
    assert (tmp_path / "one" / "TRV1P1CTI.nii.gz").is_file()


def test_a_channel_of_files_is_predicted(several, bundle, tmp_path, capsys):
    output = tmp_path / "predicted"
    predict = ["predict", "-m", bundle, "-o", output, "--no-maps", "--no-overlay"]
    assert run(*predict, "--cases", several / "one.json", "--fold", 0) == 0
    (name, *_) = names(several / "one.json", 0)
    image = nib.load(several / "Task01_BrainTumour" / "imagesTr" / f"{name}.nii.gz")
    mask = nib.load(output / f"{name}.nii.gz")
    assert mask.shape == image.shape[:3]
    assert np.array_equal(mask.affine, image.affine)
    report = json.loads((output / f"{name}_report.json").read_text())
    assert (report["input"], report["input_channel"]) == (image.get_filename(), 1)
    capsys.readouterr()
    other = json.loads((several / "one.json").read_text())
    for case in other["cases"]:
        case["images"][0] = {
            "file": str(several / case["images"][0]["file"]),
            "channel": 2 if case["name"] == name else 1,
        }
    (tmp_path / "other.json").write_text(json.dumps(other))
    # Of the same name, and not the same input.
    assert run(*predict, "--cases", tmp_path / "other.json", "--fold", 0) == 1
    done, said = capsys.readouterr()
    assert f"{len(names(several / 'one.json', 0)) - 1} cases were finished before" in done
    assert f"{name}.nii.gz: expected no result of another input under its name" in said
    assert run(*predict, "--cases", tmp_path / "other.json", "--fold", 0, "--overwrite") == 0
    assert json.loads((output / f"{name}_report.json").read_text())["input_channel"] == 2


@pytest.mark.parametrize("command", ["train", "train-mae", "predict"])
def test_several_images_are_refused(several, bundle, tmp_path, capsys, command):
    options = {"predict": ["-m", bundle], "train": [*SMALL, *TINY_NETWORK], "train-mae": [*SMALL, *TINY_MAE]}[command]
    assert run(command, "--cases", several / "all.json", "-o", tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert "BRATS_001: expected one image, as the networks take one channel, found 4 in the list (FLAIR, " in said
    assert not (tmp_path / "out" / "bundle").exists()


def test_what_does_not_go_together(cases, tmp_path, capsys):
    for arguments, message in (
        (["predict", "-o", "x"], "expected --input or --cases, got neither"),
        (["predict", "-o", "x", "-i", "y", "--fold", "1"], "--fold: expected --cases with the list that has this fold"),
        (["predict", "-o", "x", "-i", "y", "--cases", cases], "--cases: expected no --input beside it, got both"),
        (
            ["predict", "-o", "x", "--cases", cases, "--fold", "9"],
            "--fold: expected a fold of the list, 0, 1, 2, test, got 9",
        ),
        (["predict", "-o", "x", "--cases", cases, "--fold", "a"], "argument --fold: expected a whole number"),
        (["evaluate", "-p", "x"], "expected --truth or --cases, got neither"),
        (["evaluate", "-p", "x", "-t", "y", "--cases", cases], "--cases: expected no --truth beside it"),
        (["train", "-o", "x", "-i", "y", "--cases", cases], "--cases: expected no --images beside it"),
        (["train", "-o", "x", "--fold", "1"], "--fold: expected --cases"),
        (["train", "-o", "x", "--cases", cases, "--fold", "test"], "argument --fold: expected a whole number"),
        (["train-mae", "-o", "x", "--fold", "1"], "--fold: expected --cases"),
        (
            ["train", "-o", "x", "--cases", cases, "--validation", "3"],
            "--validation: expected --fold with what is held",
        ),
        (["train", "-o", "x", "--cases", tmp_path / "none.json"], "expected a list that `grcsf-fast cases` wrote"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
    with_mask = read_cases(cases).cases[0]
    (mask,) = with_mask.masks
    moved = json.loads(cases.read_text())
    moved["cases"] = [{**moved["cases"][0], "images": [{"file": str(with_mask.images[0])}]}]
    moved["cases"][0]["masks"] = [str(tmp_path / "truth" / mask.name)]
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    assert run("predict", "--cases", tmp_path / "moved.json", "-o", tmp_path / "truth") == 2
    assert "expected another folder than the input's" in capsys.readouterr().err
    folder = with_mask.images[0].parent
    assert run("predict", "--cases", cases, "-o", folder) == 2
    assert "expected another folder than the input's" in capsys.readouterr().err
