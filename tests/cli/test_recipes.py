"""Recipes: packaged and copied ones, what wins, what is refused, and what the bundle says."""

import json
import re
from pathlib import Path

import pytest
from layouts import atlas

from grcsf_fast import GRCSF, MaskedAutoencoder
from grcsf_fast.cli import main
from grcsf_fast.cli.labels import labels_of
from grcsf_fast.cli.options import joined
from grcsf_fast.cli.program import _parser
from grcsf_fast.cli.recipes import FOLDER, RecipeError, parse, read_recipe
from grcsf_fast.cli.training_options import read_settings
from grcsf_fast.cli.training_preprocessing import preprocessing_of
from grcsf_fast.errors import ArgumentError
from grcsf_fast.pretrained.bundle import load_bundle

NAMES = ("atlas-r2", "msd-lung", "orcascore")
TINY = {
    "trainings": {
        **{"spacing": [4, 4, 4], "steps": 2, "batch-size": 2, "crop-size": [16, 16], "crop-size-jitter": 0},
        **{"warmup-steps": 1, "cache-size": 2, "precision": "float32", "patch-size": 4, "augment": "none"},
    },
    "train-mae": {
        **{"embed-dim": 16, "depth": 1, "num-heads": 2, "decoder-dim": 16, "decoder-depth": 1, "decoder-num-heads": 2},
    },
    "train": {"features": [4, 8], "rcu-levels": [0], "loss": "focal", "validation": 1},
}


def options_of(*arguments):
    return parse(_parser(), joined([str(argument) for argument in arguments]))


def write(path, sections, **changes):
    path.write_text(json.dumps({"format": "grcsf-fast recipe", "version": 1} | sections | changes))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_packaged_recipe_fits_the_commands_and_says_why(name):
    for command in ("train-mae", "train", "predict", "evaluate"):
        required = {"predict": ["-i", "a", "-o", "b"], "evaluate": ["-p", "a"]}.get(command, ["-o", "b"])
        options = options_of(command, "--recipe", name, *required)
        assert options.recipe_values
        assert all(getattr(options, key) == value for key, value in options.recipe_values.items())
    text = json.loads((FOLDER / f"{name}.json").read_text())
    for section in ("trainings", "train-mae", "train", "predict", "evaluate"):
        for item in text[section].values():
            assert item["from"] in ("paper", "data set", "ours")
            assert item["why"]


def test_what_the_paper_says_is_in_the_recipes():
    losses = {name: read_recipe(name).sections["train"]["loss"] for name in NAMES}
    assert losses == {"atlas-r2": "dice-focal", "msd-lung": "dice-focal", "orcascore": "focal"}
    for name in NAMES:
        assert options_of("train-mae", "--recipe", name, "-o", "b").mask_ratios == (0.5, 0.75)
    assert options_of("evaluate", "--recipe", "orcascore", "-p", "a").calcium is True
    assert options_of("train", "--recipe", "orcascore", "-o", "b").hu_window == (-160.0, 1000.0)


@pytest.mark.parametrize("name", NAMES)
def test_networks_and_crops_of_the_packaged_recipes_fit_together(name):
    options = {command: options_of(command, "--recipe", name, "-o", "b") for command in ("train-mae", "train")}
    settings = read_settings(options["train-mae"])
    mae_options = options["train-mae"]
    mae = MaskedAutoencoder(
        2, 1, mae_options.patch_size, embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1,
        neighbours=mae_options.neighbours,
    )  # fmt: skip
    for jitter in (-settings.crop_size_jitter, 0, settings.crop_size_jitter):
        assert mae.grid([edge + jitter for edge in settings.crop_size])
    train = options["train"]
    network = GRCSF(2, 1, 1, train.features, train.patch_size, rcu_levels=train.rcu_levels)
    assert network.rcu
    assert read_settings(train).loss == train.loss
    assert preprocessing_of(train, None) == preprocessing_of(mae_options, None)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_patches_are_right(name):
    text = json.loads((FOLDER / f"{name}.json").read_text())
    train = {key: item["value"] for key, item in text["train"].items()}
    size = train["patch-size"] * 2 ** min(train["rcu-levels"]) * text["trainings"]["spacing"]["value"][0]
    assert text["train"]["patch-size"]["why"].startswith(f"of the RCU, {size:g} mm at its first level")


def test_options_given_win_and_others_keep_their_defaults(tmp_path):
    path = write(tmp_path / "mine.json", {"train": {"steps": 7, "gcu": False, "crop-size": [32, 48]}, "predict": {}})
    options = options_of("train", "--recipe", path, "-o", "b", "--steps", 9)
    assert (options.steps, options.gcu, options.crop_size, options.batch_size) == (9, False, (32, 48), 8)
    assert options_of("train", "-o", "b", "--steps", 9, "--gcu", "--recipe", path).gcu is True
    assert options_of("train", "-o", "b").steps == 19000
    # Of labels, which are given in one of two ways, those that are given stand in place of the recipe's other way.
    path = write(tmp_path / "labels.json", {"train": {"regions": "whole=1+2,core=2"}})
    assert labels_of(options_of("train", "--recipe", path, "-o", "b")).names == ("whole", "core")
    options = options_of("train", "--recipe", path, "-o", "b", "--classes", "core=2")
    assert (labels_of(options).names, options.regions) == (("core",), None)
    with pytest.raises(ArgumentError, match="expected --classes or --regions, got both"):
        labels_of(options_of("train", "--recipe", path, "-o", "b", "--classes", "core=2", "--regions", "core=2"))
    path = write(tmp_path / "flags.json", {"predict": {"no-maps": True, "compile": True, "no-page": False}})
    options = options_of("predict", "--recipe", path, "-i", "a", "-o", "b")
    assert (options.maps, options.compile, options.page, options.overlay) == (False, True, True, True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"step": 7}}, r"train: step: expected an option of train: accumulate, augment, .*steps"),
        ({"trainings": {"features": [4]}}, "trainings: features: expected an option of train-mae"),
        ({"train-mae": {"output": "x"}}, "train-mae: output: expected an option"),
        (
            {"train": {"workers": 2}},
            "train: workers: expected an option that a result depends on, found one of a run, which no recipe holds: "
            "leave it out, and give --workers to the command",
        ),
        ({"trainings": {"tensorboard": True}}, "trainings: tensorboard: .*found one of a run, .*give --tensorboard to"),
        ({"train-mae": {"steps": 7.5}}, r"train-mae: steps: expected a whole number.*'7.5'"),
        (
            {"train-mae": {"steps": True}},
            "train-mae: steps: expected a number, a text or a list of numbers, found true",
        ),
        ({"train-mae": {"modality": "pet"}}, "train-mae: modality: expected one of mri, ct, found pet"),
        ({"train-mae": {"crop-size": [4, 4, 4, 4]}}, "crop-size: expected 2 or 3 numbers"),
        ({"train": {"gcu": 1}}, "train: gcu: expected true or false, found 1"),
        ({"train": {"steps": {"vale": 1}}}, 'train: steps: expected "value", "from" and "why", found vale'),
        ({"tarin": {}}, "expected objects named trainings, train-mae, train, predict, evaluate, found tarin"),
        ({"train": 3}, "found train"),
        ({"version": 2}, 'expected a recipe with "format": "grcsf-fast recipe" and "version": 1'),
    ],
)
def test_what_is_wrong_is_named(tmp_path, capsys, sections, message):
    path = write(tmp_path / "mine.json", sections)
    command = "train" if "train" in sections or "tarin" in sections else "train-mae"
    with pytest.raises(RecipeError, match=message):
        options_of(command, "--recipe", path, "-o", tmp_path / "out")
    assert main([command, "--recipe", str(path), "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: ")
    assert said.count("\n") == 1


def test_a_share_of_the_cases_is_of_a_run(tmp_path):
    path = write(tmp_path / "mine.json", {"predict": {"share": "1/2"}})
    with pytest.raises(RecipeError, match=r"predict: share: .*found one of a run, .*give --share to the command"):
        options_of("predict", "--recipe", path, "-i", "a", "-o", "b")


def test_no_recipe_of_that_name(tmp_path, capsys):
    assert main(["train", "--recipe", "atlas", "-o", str(tmp_path / "out")]) == 2
    assert "--recipe: expected atlas-r2, msd-lung, orcascore or a recipe's file" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{")
    assert main(["train", "--recipe", str(tmp_path / "bad.json"), "-o", str(tmp_path / "out")]) == 2
    assert "expected JSON" in capsys.readouterr().err


def test_the_bundle_says_what_was_used(tmp_path, capsys):
    recipe = write(tmp_path / "mine.json", TINY)
    cases = tmp_path / "cases.json"
    assert main(["cases", "atlas-r2", str(atlas(tmp_path)), "-o", str(cases), "--folds", "2"]) == 0
    common = ["--recipe", str(recipe), "--cases", str(cases), "--fold", "0"]
    assert main(["train-mae", *common, "-o", str(tmp_path / "mae"), "--spacing", "5,5,5", "--steps", "3"]) == 0
    card = load_bundle(tmp_path / "mae" / "bundle").card["options"]
    assert (card["recipe"], card["recipe_sha256"]) == (str(recipe), read_recipe(str(recipe)).sha256)
    assert (card["spacing"], card["steps"], card["batch_size"]) == ([5, 5, 5], 3, 2)
    assert "recipe_values" not in card
    capsys.readouterr()
    mae = str(tmp_path / "mae" / "bundle")
    assert main(["train", *common, "--mae", mae, "-o", str(tmp_path / "network")]) == 0
    assert "spacing (5.0, 5.0, 5.0) of the bundle holds; the recipe has (4.0, 4.0, 4.0)" in capsys.readouterr().out
    bundle = load_bundle(tmp_path / "network" / "bundle")
    assert bundle.preprocessing.spacing == (5, 5, 5)
    assert bundle.card["options"]["loss"] == "focal"
    assert bundle.card["options"]["spacing"] == [5, 5, 5]
    assert bundle.card["mae_sha256"] == load_bundle(mae).weights_sha256
    assert "initial_sha256" not in bundle.card
    again = ["train", *common, "--mae", mae, "-o", str(tmp_path / "other"), "--spacing", "3,3,3"]
    assert main(again) == 2
    assert "expected no --spacing beside --mae" in capsys.readouterr().err


def test_the_recipe_of_the_page_is_one(tmp_path):
    page = next(folder for folder in Path(__file__).parents if (folder / "setup.py").exists()) / "docs" / "how-to"
    blocks = re.findall(r"^```json\n(.*?)^```", (page / "cross-validation.md").read_text(), re.DOTALL | re.MULTILINE)
    (whole,) = (block for block in blocks if '"format"' in block)
    (tmp_path / "mine.json").write_text(whole)
    for command in ("train-mae", "train", "predict", "evaluate"):
        required = {"predict": ["-i", "a", "-o", "b"], "evaluate": ["-p", "a"]}.get(command, ["-o", "b"])
        assert options_of(command, "--recipe", tmp_path / "mine.json", *required).recipe_values
