"""Cross-validation by recipes: three data sets from their folders to the table, and what stops, fails and goes on."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from commands import run
from layouts import atlas
from lookalikes import LAYOUTS, tiny_recipe
from safetensors import safe_open
from safetensors.torch import save_file

from grcsf_fast.cli import predict, train, train_mae
from grcsf_fast.data.files import sha256
from grcsf_fast.datasets.cases_file import read_cases, select
from grcsf_fast.pretrained.bundle import load_bundle

TITLES = ["lesion", "cases", "missed", "invented", "lesions missed"]
FIGURES = ["Dice", "lesion-wise F1", "HD95 (mm)", "volume difference (mL)"]


def tables(lines):
    """The cells of all tables in Markdown, a list of rows for each."""
    found, inside = [], False
    for line in lines:
        if line.startswith("| "):
            if not inside:
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        inside = line.startswith("| ")
    return found


def scores(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:validation. none of the 1 cases has lesion")  # of calcium: one fold's is healthy
@pytest.mark.parametrize(("recipe", "layout", "make"), LAYOUTS)
def test_from_the_data_set_to_the_table(tmp_path, capsys, recipe, layout, make):
    cases, output = tmp_path / "cases.json", tmp_path / "out"
    assert run("cases", layout, make(tmp_path), "-o", cases, "--folds", 2) == 0
    mine = tiny_recipe(recipe, tmp_path)
    capsys.readouterr()
    assert run("crossval", "--recipe", mine, "--cases", cases, "-o", output, "--device", "cpu") == 0
    printed = capsys.readouterr().out.splitlines()
    written = (output / "table.md").read_text().splitlines()
    assert [line for line in written if line not in printed] == []
    table, *calcium = tables(written)
    assert table[0] == TITLES + FIGURES
    assert [row[0].split(",")[0] for row in table[2:]] == ["all", "none", "small", "large"]
    by_fold = [row for fold in (0, 1) for row in scores(output / f"fold{fold}" / "scores" / "cases.csv")]
    assert sum(int(row["lesions_found"]) for row in by_fold) > 0
    counts = [int(row[1]) for row in table[2:]]
    assert counts[0] == sum(counts[1:]) == 8
    assert "(" in table[2][5]
    rows = json.loads((output / "table.json").read_text())
    assert (rows["not_compared"], rows["failed_folds"]) == ([], {})
    folds = Counter(str(case.fold) for case in read_cases(cases).cases if case.fold is not None)
    assert {fold: found["cases"] for fold, found in rows["folds"].items()} == folds
    assert sorted(folds) == ["0", "1"]
    assert len(scores(output / "table.csv")) == 4 * 4
    truth = {case.name: case.lesion_ml for case in read_cases(cases).cases if case.fold is not None}
    limit = rows["small_up_to_ml"]
    by_size = [
        sum(test(volume) for volume in truth.values())
        for test in (lambda ml: ml == 0, lambda ml: 0 < ml <= limit, lambda ml: ml > limit)
    ]
    assert counts[1:] == by_size

    options = load_bundle(output / "fold1" / "network" / "bundle").card["options"]
    assert (options["fold"], options["recipe"]) == (1, str(mine))
    assert options["loss"] == ("focal" if recipe == "orcascore" else "dice-focal")
    if recipe == "orcascore":
        by, arteries, categories = calcium
        assert (by[0], [row[0] for row in by[2:]]) == (
            ["calcium by", "sensitivity", "PPV", "F1"],
            ["lesions", "volume"],
        )
        assert [row[0] for row in arteries[2:]] == ["LAD", "LCX", "RCA"]
        assert [int(row[1]) for row in arteries[2:]] == [13, 13, 13]
        assert sum(int(cell) for row in categories[2:] for cell in row[1:]) == 8
        assert any(line.startswith("8 patients: ICC of volumes ") for line in written)
        by_case = {row["case"]: row for fold in (0, 1) for row in scores(output / f"fold{fold}/scores/calcium.csv")}
        # 4 pixels in each of three arteries, with a weight of 2 at 250 HU; slices of 5 mm count by 5 / 3.
        assert float(by_case["TRV1P1"]["agatston_true"]) == pytest.approx(3 * 4 * 3.046876**2 * 2 * 5 / 3)
        assert (by_case["TRV4P2"]["agatston_true"], by_case["TRV4P2"]["category_true"]) == ("0.0", "0")
    else:
        assert calcium == []

    # The same by the single commands.
    bundle, again = output / "fold0" / "network" / "bundle", tmp_path / "again"
    chosen = ("--recipe", mine, "--cases", cases, "--fold", 0)
    assert run("predict", *chosen, "-m", bundle, "-o", again) == 0
    assert run("evaluate", *chosen, "-p", again, "-o", tmp_path / "scores") == 0
    assert scores(tmp_path / "scores" / "cases.csv") == scores(output / "fold0" / "scores" / "cases.csv")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """13 cases in two folds, and a recipe that takes a second."""
    folder = tmp_path_factory.mktemp("atlas")
    assert run("cases", "atlas-r2", atlas(folder), "-o", folder / "cases.json", "--folds", 2) == 0
    changes = {"steps": 2, "features": [4, 8], "rcu-levels": [0], "cache-size": 2}
    recipe = tiny_recipe(
        "atlas-r2", folder, trainings={"spacing": [3, 3, 3], "crop-size": [16, 16]}, train=changes,
        predict={"precision": "float32"},
    )  # fmt: skip
    return ["crossval", "--recipe", recipe, "--cases", folder / "cases.json", "--device", "cpu", "-o"], folder


def fails_in(monkeypatch, module, fold, error):
    """Let a command fail in one fold."""
    real = module.run

    def broken(options):
        if options.fold == fold:
            raise error
        return real(options)

    monkeypatch.setattr(module, "run", broken)


def test_an_interrupted_run_goes_on_where_it_was(small, tmp_path, monkeypatch, capsys):
    command, _ = small
    with monkeypatch.context() as context:
        fails_in(context, train, 1, KeyboardInterrupt())
        assert run(*command, tmp_path) == 130
    assert (
        "interrupted in fold 1; what is written is whole, the same command goes on from there"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "table.md").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    weights = sha256(tmp_path / "fold1" / "mae" / "bundle" / "model.safetensors")
    assert run(*command, tmp_path) == 0
    said = capsys.readouterr().out
    assert "fold 0: done before\nfold 1: train-mae done before\nfold 1: train\n" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sha256(tmp_path / "fold1" / "mae" / "bundle" / "model.safetensors") == weights
    table = (tmp_path / "table.json").read_bytes()
    assert run(*command, tmp_path) == 0
    assert "fold 0: done before\nfold 1: done before\n" in capsys.readouterr().out
    assert (tmp_path / "table.json").read_bytes() == table


def test_a_fold_that_fails_does_not_stop_the_others(small, tmp_path, monkeypatch, capsys):
    command, folder = small
    with monkeypatch.context() as context:
        fails_in(context, predict, 0, OSError("no space left"))
        assert run(*command, tmp_path) == 1
    said = capsys.readouterr()
    assert "fold 0 failed: no space left" in said.err
    listing = read_cases(folder / "cases.json")
    own, other = len(select(listing, 0)), len(select(listing, 1))
    assert f"NOT IN THIS TABLE: {own} cases; folds without scores: 0 (no space left)." in said.out
    assert tables(said.out.splitlines())[-1][2][:2] == ["all", str(other)]
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["failed_folds"] == {"0": "no space left"}
    assert sorted(found["not_compared"]) == sorted(case.name for case in select(listing, 0))
    assert run(*command, tmp_path) == 0
    said = capsys.readouterr().out
    assert "fold 0: train done before\nfold 0: predict\n" in said
    assert "NOT IN THIS TABLE" not in said
    assert tables(said.splitlines())[-1][2][:2] == ["all", str(own + other)]


@pytest.mark.parametrize("name", ["recipe", "cases"])
def test_a_file_that_changes_meanwhile_fails_its_folds(small, tmp_path, monkeypatch, capsys, name):
    command, folder = small
    files = {"recipe": folder / "changing-recipe.json", "cases": folder / "changing-cases.json"}
    shutil.copy(command[2], files["recipe"])
    shutil.copy(command[4], files["cases"])

    def changed(options):
        files[name].write_text(files[name].read_text() + "\n")

    monkeypatch.setattr(train_mae, "run", changed)
    command = ["crossval", "--recipe", files["recipe"], "--cases", files["cases"], *command[5:], tmp_path / "out"]
    assert run(*command) == 1
    said = capsys.readouterr()
    expected = f"{files[name]}: expected the file as it was read at the start, found it changed since this cross-valid"
    assert f"fold 0 failed: {expected}" in said.err
    assert f"fold 1 failed: {expected}" in said.err
    assert "fold 0: train\n" not in said.out


def test_a_bug_in_a_fold_shows_its_traceback(small, tmp_path, monkeypatch, capsys):
    command, _ = small
    fails_in(monkeypatch, predict, 0, ZeroDivisionError("of ours"))
    assert run(*command, tmp_path, "--fold", 0) == 1
    said = capsys.readouterr()
    assert "Traceback" in said.err
    assert "folds without scores: 0 (of ours), 1 (not run)" in said.out
    assert not (tmp_path / "table.json").exists()


@pytest.mark.filterwarnings("ignore:.*expected the masks that their reports name by their hashes")
def test_a_prediction_that_cannot_be_used_counts_and_is_made_again(small, tmp_path, monkeypatch, capsys):
    command, folder = small
    name = next(case.name for case in select(read_cases(folder / "cases.json"), 0) if case.lesion_ml)
    real = predict.run

    def cut(options):
        code = real(options)
        (tmp_path / "fold0" / "predicted" / f"{name}.nii.gz").write_bytes(b"")
        return code

    with monkeypatch.context() as context:
        context.setattr(predict, "run", cut)
        assert run(*command, tmp_path, "--fold", 0) == 1
    said = capsys.readouterr()
    assert f"fold 0 failed: cases that could not be predicted or compared: {name}: " in said.err
    row = json.loads((tmp_path / "table.json").read_text())["rows"][0]
    assert row["without_prediction"] == 1
    assert row["dice"]["n"] == row["cases"] == len(select(read_cases(folder / "cases.json"), 0))
    assert run(*command, tmp_path, "--fold", 0) == 0
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["without_prediction"] == 0


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        pytest.param(lambda path: path.unlink(), marks=pytest.mark.slow),
    ],
)
def test_a_bundle_that_a_crash_damaged_is_written_anew(small, tmp_path, capsys, name, damage):
    """From the checkpoint after the last step, as it was."""
    command, _ = small
    assert run(*command, tmp_path, "--fold", 0) == 0
    fold = tmp_path / "fold0"
    bundles = [fold / training / "bundle" / "model.safetensors" for training in ("mae", "network")]
    known, table = [sha256(path) for path in bundles], (tmp_path / "table.csv").read_bytes()
    shutil.rmtree(fold / "scores")
    for path in bundles:
        damage(path.with_name(name))
    capsys.readouterr()
    assert run(*command, tmp_path, "--fold", 0) == 0
    said = capsys.readouterr().out
    assert f"{name}" in said
    assert said.count("; the checkpoint's is written in its place, and it is kept as bundle-damaged\n") == 2
    assert "fold 0: train-mae\n" in said
    assert "fold 0: train\n" in said
    assert [sha256(path) for path in bundles] == known
    assert (tmp_path / "table.csv").read_bytes() == table
    assert all((path.parents[1] / "bundle-damaged").is_dir() for path in bundles)
    # A second time, too; and not without the checkpoint: to train for days anew is the user's to say.
    shutil.rmtree(fold / "scores")
    damage(bundles[1].with_name(name))
    assert run(*command, tmp_path, "--fold", 0) == 0
    shutil.rmtree(fold / "scores")
    damage(bundles[1].with_name(name))
    (fold / "network" / "checkpoint.safetensors").unlink()
    capsys.readouterr()
    assert run(*command, tmp_path, "--fold", 0) == 1
    assert f"fold 0 failed: {bundles[1].parent}" in capsys.readouterr().err
    assert bundles[1].parent.is_dir()


def test_how_it_runs_is_passed_on_and_no_matter_of_the_recipe(small, tmp_path, monkeypatch, capsys):
    command, _ = small
    seen = []

    def watch(module):
        def run(options):
            seen.append((module.__name__.split(".")[-1], vars(options)))
            if module is predict:
                raise OSError("seen enough")
            (Path(options.output) / "bundle").mkdir(parents=True)

        monkeypatch.setattr(module, "run", run)

    for module in (train_mae, train, predict):
        watch(module)
    given = ("--workers", 0, "--tensorboard", "--memory", 1.5, "--threads", 3)
    assert run(*command, tmp_path / "out", "--fold", 0, *given) == 1
    assert [name for name, _ in seen] == ["train_mae", "train", "predict"]
    for name, options in seen:
        training = name != "predict"
        assert (options.get("workers"), options.get("tensorboard")) == ((0, True) if training else (None, None))
        assert options.get("memory") == (None if training else 1.5)
        assert options["threads"] == 3
    shutil.rmtree(tmp_path / "out")
    seen.clear()
    assert run(*command, tmp_path / "out", "--fold", 0) == 1
    assert [(options.get("workers"), options.get("memory")) for _, options in seen] == [(None, None)] * 3
    assert [options.get("tensorboard") for _, options in seen] == [False, False, None]


def test_a_folder_of_a_recipe_that_said_how_to_run_goes_on_without(small, tmp_path, capsys):
    """As recipes of earlier versions could, which are refused now."""
    command, folder = small
    assert run(*command, tmp_path / "out") == 0
    old = json.loads((folder / "atlas-r2.json").read_text())
    old["trainings"]["workers"] = 1
    copy, record = tmp_path / "out" / "recipe.json", tmp_path / "out" / "crossval.json"
    copy.write_text(json.dumps(old))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"recipe": sha256(copy)}))
    capsys.readouterr()
    refused = [*command[:2], copy, *command[3:], tmp_path / "out"]
    assert run(*refused) == 2
    assert "recipe.json: trainings: workers: expected an option that a result depends on, " in capsys.readouterr().err
    assert run(*command, tmp_path / "out", "--workers", 1) == 0
    assert "fold 0: done before\nfold 1: done before\n" in capsys.readouterr().out
    # Other values are another cross-validation, and so is a copy that is not the recipe it was begun with.
    old["train"]["steps"] = 3
    copy.write_text(json.dumps(old))
    assert run(*command, tmp_path / "out") == 2
    record.write_text(json.dumps(json.loads(record.read_text()) | {"recipe": sha256(copy)}))
    assert run(*command, tmp_path / "out") == 2
    assert "begun with, found other recipe; choose another folder" in capsys.readouterr().err


def test_folds_of_several_precisions_are_said(small, tmp_path, capsys):
    """As of an array on nodes of several kinds."""
    command, folder = small
    assert run(*command, tmp_path) == 0
    table = tmp_path / "table.md"
    precision = {"train-mae": "float32", "train": "float32", "predict": "float32"}
    assert [fold["precision"] for fold in json.loads((tmp_path / "table.json").read_text())["folds"].values()] == [
        precision,
        precision,
    ]
    assert "FOLDS DIFFER" not in table.read_text()
    path = tmp_path / "fold1" / "network" / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, metadata | {"precision": "bfloat16"})
    (tmp_path / "fold1" / "mae" / "checkpoint.safetensors").unlink()  # of which nothing is known any more
    name = select(read_cases(folder / "cases.json"), 1)[0].name
    report = tmp_path / "fold1" / "predicted" / f"{name}_report.json"
    text = json.loads(report.read_text())
    report.write_text(json.dumps(text | {"settings": text["settings"] | {"precision": "bfloat16"}}))
    capsys.readouterr()
    assert run(*command, tmp_path) == 0
    said = [
        "FOLDS DIFFER in the precision of train: bfloat16 in fold 1; float32 in fold 0.",
        "FOLDS DIFFER in the precision of predict: bfloat16 and float32 in fold 1; float32 in fold 0.",
    ]
    assert table.read_text().splitlines()[-2:] == said
    assert "\n".join(said) in capsys.readouterr().out
    found = json.loads((tmp_path / "table.json").read_text())["folds"]["1"]["precision"]
    assert found == {"train": "bfloat16", "predict": "bfloat16 and float32"}


def test_what_cannot_be_begun(small, tmp_path, capsys):
    command, folder = small
    out = tmp_path / "out"

    def refused(*arguments):
        assert run(*arguments) == 2
        return capsys.readouterr().err

    assert "--fold: expected a fold of the list, 0, 1, test, got 7" in refused(*command, out, "--fold", 7)
    wrong = tiny_recipe("atlas-r2", tmp_path, evaluate={"min-lesion-ml": "much"})
    changed = [*command[:2], wrong, *command[3:]]
    assert "evaluate: min-lesion-ml: " in refused(*changed, out)
    assert not out.exists()
    listing = json.loads((folder / "cases.json").read_text())
    names = folder / "names.json"
    names.write_text(json.dumps(listing | {"label_names": {"1": "core", "2": "oedema"}}))
    labelled = tiny_recipe("atlas-r2", tmp_path, train={"classes": "core=2,oedema=1"})
    said = refused(*command[:2], labelled, command[3], names, *command[5:], out)  # before anything is trained
    assert "--classes: expected" in said
    assert not out.exists()
    one = folder / "one.json"
    one.write_text(json.dumps(listing | {"cases": [case for case in listing["cases"] if case["fold"] != 1]}))
    assert "expected a list with at least two folds, found 1" in refused(*command[:4], one, *command[5:], out)
    out.mkdir()
    record = {"format": "grcsf-fast crossval", "version": 1, "recipe": "other", "cases": sha256(folder / "cases.json")}
    (out / "crossval.json").write_text(json.dumps(record))
    assert "begun with, found other recipe; choose another folder" in refused(*command, out)
