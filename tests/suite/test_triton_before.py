"""The kernels of an older commit beside the present ones: both are found and called alike; nothing is compiled here."""

import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import triton_before
from benchmarks.triton_before import BEFORE, Call, Kernels, calls, kernels_of
from grcsf_fast.kernels.triton import gcu, rcu, rcu_backward

ROOT = Path(__file__).parents[2]
KNOWN = subprocess.run(["git", "cat-file", "-e", BEFORE], cwd=ROOT, capture_output=True, check=False).returncode == 0
LABELS = ["op 1, forward", "op 1, backward", "op 2, forward", "op 2, backward"]
NUMBERS = {
    "instructions": 100, "registers": 32, "stack": 8, "spills": 2, "shared": 2048, "warps": 4,
}  # fmt: skip


@pytest.mark.skipif(not KNOWN, reason="not in a repository with its history")
def test_kernels_of_a_commit(tmp_path):
    before = kernels_of(BEFORE, tmp_path)
    assert Path(before.gcu.__file__).is_relative_to(tmp_path)
    assert before.rcu_backward is before.rcu
    assert before.gcu is not gcu
    assert [label for label, _ in calls(before, 16, (16, 16), torch.float32)] == LABELS


def test_calls_of_the_present_kernels(monkeypatch):
    """With arguments that fit."""
    seen = []
    for module, name in ((gcu, "forward"), (gcu, "backward"), (rcu, "forward"), (rcu_backward, "backward")):

        def noted(*arguments, module=module, name=name):
            seen.append((module.__name__.rpartition(".")[2], name, len(arguments)))

        assert "scales" in gcu.forward.__code__.co_varnames
        made = dict(calls(Kernels(gcu, rcu, rcu_backward), 16, (16, 16), torch.float32))
        monkeypatch.setattr(module, name, noted)
        made[LABELS[len(seen)]]()
        monkeypatch.undo()
    assert seen == [
        ("gcu", "forward", 2),
        ("gcu", "backward", 4),
        ("rcu", "forward", 6),
        ("rcu_backward", "backward", 9),
    ]


def test_an_unknown_commit(tmp_path):
    with pytest.raises(ValueError, match="commit: expected one with kernels/triton, got 'nothing'"):
        kernels_of("nothing", tmp_path)


def test_the_page():
    pair = [
        Call("a call", "before", [("forward", NUMBERS), ("join", NUMBERS)], 2.5, 3),
        Call("a call", "now", [("forward", NUMBERS | {"instructions": 70, "spills": 0})], 1.0, 0),
    ]
    text = triton_before.page(pair, {"before": {"a call": 5}, "now": {"a call": 2}}, "abc", "the command")
    assert "| a call | 2 / 1 | 3 / 0 | 200 / 70 | 4 / 0 | 2.5 / 1.0 |" in text
    assert "| a call | before | join | 100 | 32 | 8 | 2 | 2 | 4 | 1.00 |" in text
    assert "| a call | 5 / 2 |" in text
    assert "before: commit abc." in text
