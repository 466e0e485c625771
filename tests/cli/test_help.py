"""What the help says can be typed."""

import argparse
import re

import pytest

from grcsf_fast.cli import main, shared


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
