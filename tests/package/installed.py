"""The installed package in an empty environment: one forward and one prediction (``make wheel-test``)."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

import grcsf_fast


def main() -> None:
    package = Path(grcsf_fast.__file__)
    assert package.is_relative_to(sys.prefix), f"expected the package of {sys.prefix}, found {package}"
    assert grcsf_fast.backend_info()["cpp"]["available"], grcsf_fast.backend_info()["cpp"]["reason"]
    network = grcsf_fast.GRCSF(2, 1, 1, features=(8, 16, 32), rcu_levels=(0,), mask_ratios=(0.5,)).eval()
    logits = network(torch.zeros(1, 1, 50, 61), torch.zeros(1, 1, 50, 61))
    assert logits.shape == (1, 1, 50, 61)
    with tempfile.TemporaryDirectory() as folder:
        x, y, z = np.ogrid[-20:20, -24:24, -18:18]
        head = 100.0 * ((x / 17) ** 2 + (y / 20) ** 2 + (z / 16) ** 2 <= 1)
        nib.save(nib.Nifti1Image(head.astype(np.float32), np.diag([4.0, 4, 4, 1])), f"{folder}/scan.nii.gz")
        subprocess.run(["grcsf-fast", "predict", "-i", f"{folder}/scan.nii.gz", "-o", f"{folder}/results"], check=True)
        report = json.loads(Path(folder, "results", "scan_report.json").read_text())
        assert nib.load(f"{folder}/results/scan.nii.gz").shape == head.shape
        assert report["versions"]["grcsf-fast"] == grcsf_fast.__version__
    print(f"grcsf-fast {grcsf_fast.__version__}, installed: a forward and a prediction")


if __name__ == "__main__":
    main()
