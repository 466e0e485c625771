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


@pytest.mark.slow
def test_no_module_needs_what_windows_lacks():
    """Nor macOS: modules, functions and signals of POSIX and of Linux are gone once PyTorch and MONAI are there."""
    code = """
import os, pkgutil, signal, sys
import torch, numpy, nibabel, monai
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in {"fcntl", "grp", "pwd", "resource", "termios", "tty", "triton"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty", "triton"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Block())
for name in "fork getuid geteuid getpgid killpg register_at_fork sched_getaffinity setsid sysconf uname wait4".split():
    delattr(os, name)
for name in "SIGHUP SIGKILL SIGPIPE SIGCHLD SIGUSR1 SIGALRM".split():
    delattr(signal, name)
import grcsf_fast
for module in pkgutil.walk_packages(grcsf_fast.__path__, "grcsf_fast."):
    if not module.name.startswith(("grcsf_fast.kernels", "grcsf_fast.__main__")):
        __import__(module.name)
from grcsf_fast.cli import main
from grcsf_fast.runtime.memory import keep_memory, give_memory_back
from grcsf_fast.runtime.signals import Stop, terminable
keep_memory(), give_memory_back()
with terminable(), Stop() as stop:
    stop.check()
assert main(["info"]) == 0
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "backend triton: cannot run: triton cannot be imported" in result.stdout


def test_commands_run_in_python():
    """By an import of their own, which that of the package does not pay for."""
    code = """
import sys
import grcsf_fast
assert "grcsf_fast.cli" not in sys.modules
from grcsf_fast.cli import main
assert main(["synthesize", "--help"]) == 0
assert main(["evaluate", "-p", "nowhere", "-t", "nowhere"]) == 2
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: grcsf-fast synthesize" in result.stdout
    assert "error: " in result.stderr
