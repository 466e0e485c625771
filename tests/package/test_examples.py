"""The examples, run as their first lines say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from grcsf_fast import GRCSF

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(*command: object, **environment: object) -> str:
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
def test_monai_training(tmp_path, dims):
    command = (EXAMPLES / "monai_training.py", "-o", tmp_path / "network", "--epochs", 2, "--dims", dims)
    out = run(sys.executable, *command)
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("epoch")]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    network = GRCSF.from_pretrained(tmp_path / "network")
    size = (1, 1, 50, 40, 30)[: 2 + dims]
    assert network(torch.zeros(size)).shape == size
    assert not network.requires_maps


def test_predict_folder(tmp_path):
    (tmp_path / "scans").mkdir()
    data = np.random.default_rng(0).normal(100, 10, (24, 24, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.diag([4, 4, 4, 1])), tmp_path / "scans" / "good.nii.gz")
    (tmp_path / "scans" / "bad.nii.gz").write_bytes(b"no volume")
    out = run(sys.executable, EXAMPLES / "predict_folder.py", tmp_path / "scans", tmp_path / "results")
    assert "bad: " in out
    assert "good: " in out
    assert (tmp_path / "results" / "good.nii.gz").is_file()


def tiny_dataset(folder: Path) -> None:
    """Five cases as nnU-Net wants them: noise, brighter in a lesion."""
    rng = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for number in range(5):
        mask = np.zeros((32, 32, 16), np.uint8)
        mask[8 : 14 + number, 10:18, 4:9] = 1
        image = (rng.normal(size=mask.shape) + 3 * mask).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / f"case{number}_0000.nii.gz")
        nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / "labelsTr" / f"case{number}.nii.gz")
    settings = {
        "channel_names": {"0": "noise"}, "labels": {"background": 0, "lesion": 1}, "numTraining": 5,
        "file_ending": ".nii.gz",
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(settings))


TWO_STEPS = """
import torch
from nnunetv2.run.run_training import get_trainer_from_args
torch.set_num_threads(1)
trainer = get_trainer_from_args("1", "{configuration}", 0, "nnUNetTrainerGRCSF", device=torch.device("cpu"))
trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
trainer.run_training()
trainer.perform_actual_validation()
print("network", type(trainer.network).__name__, trainer.network.spatial_dims)
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the data set planned and preprocessed, and the environment that says so."""
    if importlib.util.find_spec("nnunetv2") is None:
        pytest.skip("nnunetv2 is missing; `make examples` has it")
    folder = tmp_path_factory.mktemp("nnunet")
    environment = {f"nnUNet_{name}": folder / name for name in ("raw", "preprocessed", "results")}
    environment |= {"nnUNet_extTrainer": EXAMPLES, "nnUNet_n_proc_DA": 1, "nnUNet_def_n_proc": 1}
    tiny_dataset(folder / "raw" / "Dataset001_Tiny")
    plan = "from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints as entry"
    plan += "; entry.plan_and_preprocess_entry()"
    run(sys.executable, "-c", plan, "-d", 1, "-c", "2d", "3d_fullres", "-np", 1, 1, "-npfp", 1, **environment)
    return folder, environment | {"nnUNet_n_proc_DA": 0}


@pytest.mark.parametrize(("configuration", "dims"), [("2d", 2), ("3d_fullres", 3)])
def test_nnunet_trainer(prepared, configuration, dims):
    """Two steps, an epoch's validation, checkpoints, and the inference of nnU-Net."""
    folder, environment = prepared
    out = run(sys.executable, "-c", TWO_STEPS.format(configuration=configuration), **environment)
    assert f"network ScoredGRCSF {dims}" in out
    (written,) = folder.glob(f"results/Dataset001_Tiny/nnUNetTrainerGRCSF__*__{configuration}/fold_0")
    assert (written / "checkpoint_final.pth").is_file()
    assert list(written.glob("validation/*.nii.gz"))
