"""The program's commands, as a test types them."""

from __future__ import annotations

from grcsf_fast.cli import main

# Sizes of ``train-mae``.
TINY_MAE = ["--embed-dim", "16", "--depth", "1", "--num-heads", "2", "--decoder-dim", "16", "--decoder-num-heads", "2"]


def run(*arguments: object) -> int:
    """The exit code."""
    return main([str(argument) for argument in arguments])


def predict(*arguments: object) -> int:
    """The exit code."""
    return run("predict", *arguments)
