"""What the help says can be typed."""

import argparse
import re

import pytest

from grcsf_fast.cli import main, program, shared


def helps(command: str) -> dict[str, str]:
    """What a command's help says of each option, by its long name."""
    (commands,) = (one for one in program._parser()._actions if isinstance(one, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    return {one.option_strings[-1]: " ".join((one.help or "").split()) for one in actions if one.option_strings}


@pytest.mark.parametrize("command", ["train", "train-mae"])
def test_defaults_are_shown_as_they_are_written(command, capsys):
    assert main([command, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"default: [(\[]", said)
    assert "(default: 96,112)" in said


def test_a_default_of_several_values_is_shown_as_one_argument():
    parser = argparse.ArgumentParser(formatter_class=shared._WithDefaults)
    parser.add_argument("--edges", default=(3, 4), help="of a box")
    assert "of a box (default: 3,4)" in parser.format_help()


@pytest.mark.parametrize("command", ["train", "train-mae"])
def test_each_option_says_something_of_its_own(command):
    said = helps(command)
    assert len(set(said.values())) == len(said)
    assert min(len(text.split()) for text in said.values()) > 1


def test_options_of_the_transformer_say_what_they_are():
    said = helps("train-mae")
    for part, flags in (
        ("encoder", ("--embed-dim", "--depth", "--num-heads")),
        ("decoder", ("--decoder-dim", "--decoder-depth", "--decoder-num-heads")),
    ):
        assert all(part in said[flag] for flag in flags)
    assert "voxels" in said["--patch-size"]
    assert "multiple of --num-heads" in said["--embed-dim"]
    assert "multiple of --decoder-num-heads" in said["--decoder-dim"]


def test_validations_are_those_of_train_alone():
    assert "of train between validations" in helps("train-mae")["--validate-every"]


def test_channels_come_from_bundles_that_the_command_takes():
    assert "those of --mae or --initial" in helps("train")["--channels"]
    assert "--mae" not in helps("train-mae")["--channels"]
    assert "those of --initial" in helps("train-mae")["--channels"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train", "its cases are held out for validation"),
        ("train-mae", "its cases are left out"),
        ("predict", "the cases to segment"),
        ("evaluate", "the cases whose masks are the truth"),
    ],
)
def test_the_fold_is_a_number_and_does_something(command, expected):
    assert helps(command)["--fold"].startswith(f"number of a fold of the list, from 0: {expected}")
