"""Cross-validation of several labels, and evaluations by a recipe that was changed: nothing is trained again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run
from heads import tiny_bundle
from layouts import head, write

from grcsf_fast.cli import predict, train, train_mae
from grcsf_fast.pretrained.bundle import save_bundle

CLASSES = "rim=1,core=2"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A list of four cases in two folds, and trainings that are done at once; predicted is the truth."""
    for name in "abcd":
        image, mask = head(ord(name), (8, 9, 7))
        mask[8:10] *= 2
        write(tmp_path / "images" / f"{name}.nii.gz", image)
        write(tmp_path / "masks" / f"{name}.nii.gz", mask)
    cases = ("cases", "pairs", tmp_path / "images", tmp_path / "masks", "-o", tmp_path / "cases.json", "--folds", 2)
    assert run(*cases) == 0
    monkeypatch.setattr(train_mae, "run", lambda options: save_bundle(tiny_bundle(), Path(options.output) / "bundle"))
    monkeypatch.setattr(train, "run", lambda options: save_bundle(tiny_bundle(), Path(options.output) / "bundle"))
    monkeypatch.setattr(predict, "run", lambda options: shutil.copytree(tmp_path / "masks", options.output))
    return tmp_path


def command(folder, **sections) -> list:
    """With a recipe of these sections."""
    recipe = {"format": "grcsf-fast recipe", "version": 1, "trainings": {"spacing": [2, 2, 2]}} | sections
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return ["crossval", "--recipe", folder / "recipe.json", "--cases", folder / "cases.json", "-o", folder / "out"]


def not_again(monkeypatch) -> None:
    """From here on a training fails."""

    def fails(options):
        raise AssertionError(options.command)

    for module in (train_mae, train):
        monkeypatch.setattr(module, "run", fails)
    monkeypatch.setattr(predict, "run", lambda options: 0)


def headings(folder) -> list[str]:
    return [line for line in (folder / "out" / "table.md").read_text().splitlines() if line.endswith(":")]


@pytest.mark.parametrize("sections", [{"train": {"classes": CLASSES}}, {"train": {"regions": "whole=1+2,core=2"}}])
def test_the_labels_of_training_are_evaluated(folder, capsys, sections):
    assert run(*command(folder, **sections)) == 0
    first = "rim" if "classes" in sections["train"] else "whole"
    assert headings(folder) == ["All labels together:", f"{first}:", "core:"]
    table = json.loads((folder / "out" / "table.json").read_text())
    assert table["folds"]["0"]["mean_dice_of_labels"] == {first: 1, "core": 1}
    capsys.readouterr()
    assert run(*command(folder, **sections)) == 0
    assert "fold 0: done before\nfold 1: done before\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sections", "held", "got"),
    [
        ({"train": {"classes": CLASSES}, "evaluate": {"classes": "rim=2,core=1"}}, CLASSES, "rim=2,core=1"),
        ({"train": {"classes": CLASSES}, "evaluate": {"regions": "whole=1+3,core=2"}}, CLASSES, "whole=1+3,core=2"),
        ({"evaluate": {"classes": CLASSES}}, "one kind of lesion", CLASSES),
    ],
)
def test_other_labels_are_refused_before_anything_is_trained(folder, monkeypatch, capsys, sections, held, got):
    not_again(monkeypatch)
    assert run(*command(folder, **sections)) == 2
    said = f"evaluate: expected the labels of train, {held}, or none, which means these, got {got}\n"
    assert capsys.readouterr().err.endswith(said)
    assert not (folder / "out").exists() or not any((folder / "out").iterdir())


def test_classes_may_be_joined_for_the_evaluation(folder):
    sections = {"train": {"classes": CLASSES}, "evaluate": {"regions": "whole=1+2,core=2"}}
    assert run(*command(folder, **sections)) == 0
    assert headings(folder) == ["All labels together:", "whole:", "core:"]


@pytest.mark.parametrize(("content", "found"), [("[]", "found other content"), ("{", "Expecting property name")])
def test_a_record_of_something_else_is_refused(folder, capsys, content, found):
    (folder / "out").mkdir()
    (folder / "out" / "crossval.json").write_text(content)
    assert run(*command(folder)) == 2
    said = capsys.readouterr().err
    assert "crossval.json: expected the record of a cross-validation" in said
    assert found in said


@pytest.mark.filterwarnings("ignore:.* are merged into one lesion mask")
def test_another_evaluation_trains_nothing(folder, monkeypatch, capsys):
    assert run(*command(folder)) == 0
    not_again(monkeypatch)
    summary = folder / "out" / "fold0" / "scores" / "summary.json"
    before = summary.read_bytes()
    changed = command(folder, evaluate={"min-lesion-ml": 5})
    # By one fold: the other's scores are of another evaluation, and in no table with these.
    assert run(*changed, "--fold", 0) == 0
    said = capsys.readouterr().out
    assert "fold 0: train done before\nfold 0: predict\nfold 0: evaluate\n" in said
    assert "NOT IN THIS TABLE: 2 cases; folds without scores: 1 (evaluated by another recipe).\n" in said
    assert summary.read_bytes() != before
    assert json.loads((folder / "out" / "recipe.json").read_text())["evaluate"] == {"min-lesion-ml": 5}
    assert run(*changed) == 0
    said = capsys.readouterr().out
    assert "fold 0: done before\nfold 1: train-mae done before\n" in said
    assert "NOT IN" not in said
    # And back.
    assert run(*command(folder)) == 0
    assert summary.read_bytes() == before
    for section, values in {"trainings": {"spacing": [3, 3, 3]}, "train": {"steps": 3}, "predict": {}}.items():
        refused = run(*command(folder, **{section: values}))
        assert refused == (0 if section == "predict" else 2)
    said = "expected the same recipe (but for its section evaluate) and list of cases as this cross-validation was"
    assert said in capsys.readouterr().err


def test_scores_of_earlier_versions_are_those_of_the_copied_recipe(folder, monkeypatch, capsys):
    """Which had no tables of labels, if the recipe did not repeat them."""
    labels = {"train": {"classes": CLASSES}}
    assert run(*command(folder, **labels)) == 0
    for fold in (0, 1):
        (folder / "out" / f"fold{fold}" / "evaluation.json").unlink()
    not_again(monkeypatch)
    capsys.readouterr()
    assert run(*command(folder, **labels)) == 0
    assert "fold 0: evaluate\n" in capsys.readouterr().out
    for fold in (0, 1):
        (folder / "out" / f"fold{fold}" / "evaluation.json").unlink()
    both = labels | {"evaluate": {"classes": CLASSES}}
    assert run(*command(folder, **both), "--fold", 0) == 0
    assert "fold 0: evaluate\n" in capsys.readouterr().out
    noted = json.loads((folder / "out" / "fold1" / "evaluation.json").read_text())
    assert noted["classes"] is None
    assert np.isclose(noted["min_lesion_ml"], 0.1)
