"""``warm_up`` and ``info --warm-up``, as far as they can be seen without a GPU; with one, test_on_a_gpu.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from heads import tiny_bundle

from grcsf_fast import BackendUnavailableError, Predictor, warm_up
from grcsf_fast.cli import main
from grcsf_fast.data.volumes import load_volume, prepare
from grcsf_fast.inference import warm_up as warming
from grcsf_fast.ops import triton

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(triton.problem() is None, reason="there is a GPU here")


def run(*arguments: str, **variables: str) -> list:
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])}
    if "TRITON_INTERPRET" not in variables:
        environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "tests/ops/warmed_up.py", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_is_compiled_and_what_is_found_on_disk_is_counted(tmp_path):
    pytest.importorskip("triton")
    assert run("compiled", TRITON_CACHE_DIR=str(tmp_path)) == [1, 0, 0, 1]


@pytest.mark.slow
def test_everything_that_a_prediction_launches_is_launched():
    """In its batches and precision, the kernels of all four ops; the first norm is in float32.

    The autoencoder, which has norms too, sees each slice as often as there are maskings: at first twice.
    """
    pytest.importorskip("triton")
    counts, *launched = run("interpreted", TRITON_INTERPRET="1")
    assert counts == [0, 0, True]
    assert launched == [
        ["gcu", "_forward_kernel", 3, "torch.bfloat16"],
        ["norm", "_normalize_kernel", 3, "torch.bfloat16"],
        ["norm", "_normalize_kernel", 3, "torch.float32"],
        ["norm", "_normalize_kernel", 6, "torch.bfloat16"],
        ["norm", "_statistics_kernel", 3, "torch.bfloat16"],
        ["norm", "_statistics_kernel", 3, "torch.float32"],
        ["norm", "_statistics_kernel", 6, "torch.bfloat16"],
        ["pooling", "_forward_kernel", 3, "torch.bfloat16"],
        ["rcu", "_forward_kernel", 3, "torch.bfloat16"],
    ]


@without_gpu
def test_a_processor_has_nothing_to_warm_up(capsys):
    predictor = Predictor(tiny_bundle(), "cpu", precision="float32")
    with pytest.raises(BackendUnavailableError, match="warm_up: expected a GPU with Triton's kernels, got none: "):
        warm_up(predictor)
    assert main(["info", "--warm-up", "-m", "no-such-bundle"]) == 2
    assert capsys.readouterr().err == (
        f"error: --warm-up: expected a GPU with Triton's kernels, got none: {triton.problem()}\n"
    )


def test_another_backend_has_nothing_to_warm_up(monkeypatch):
    monkeypatch.setattr(triton, "problem", lambda: None)
    predictor = Predictor(tiny_bundle(), "cpu", "reference", precision="float32")
    with pytest.raises(BackendUnavailableError, match="on 'cpu' the backend is 'reference'"):
        warm_up(predictor)


@pytest.mark.parametrize(("option", "name"), [("-m", "model"), ("-i", "input")])
def test_what_is_to_be_warmed_up_needs_the_option(option, name, capsys):
    assert main(["info", option, "demo"]) == 2
    assert capsys.readouterr().err == f"error: expected --warm-up beside --{name}, got it alone\n"


@pytest.mark.parametrize("modality", ["mri", "ct"])
def test_the_noise_counts_as_a_head(modality):
    bundle = tiny_bundle()
    preprocessing = bundle.preprocessing.__class__(bundle.preprocessing.spacing, modality)
    predictor = Predictor(
        bundle.__class__(bundle.network, bundle.mae, preprocessing), "cpu", "reference", precision="float32"
    )
    prepared = prepare(load_volume(warming._head(predictor)), preprocessing)
    assert min(prepared.data.shape) > 25
    assert prepared.foreground.float().mean() > 0.3
