"""That importing the package leaves PyTorch as it was, and says nothing."""

import subprocess
import sys

import pytest

STATE = """
import random, sys, warnings
import numpy as np
import torch
def state():
    return {
        "generator": torch.get_rng_state().tolist(), "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()), "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()), "gradients": torch.is_grad_enabled(),
        "matmul": torch.get_float32_matmul_precision(), "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(), "filters": list(warnings.filters),
        "path": list(sys.path), "autocast": torch.is_autocast_enabled("cpu"),
    }
"""


@pytest.mark.parametrize("default", ["", "torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')"])
def test_import_changes_nothing(default):
    code = f"""{STATE}
{default}
before, modules = state(), set(sys.modules)
import grcsf_fast
after = state()
assert before == after, [name for name in before if before[name] != after[name]]
late = {{"monai", "matplotlib", "triton", "safetensors", "tqdm", "scipy.ndimage", "scipy.spatial", "torch._dynamo"}}
late &= set(sys.modules) - modules
assert not late, late
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
