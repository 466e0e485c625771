"""What the attention's kernels take AMD's GPUs for; none of them is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from benchmarks.ops import make_inputs
from grcsf_fast.kernels.triton import patches
from grcsf_fast.ops import triton
from grcsf_fast.ops.examples import grouped

# Lanes of a warp, and the dtypes that are not served.
AMD = {
    "gfx90a:sramecc+:xnack-": (64, ()),
    "gfx942": (64, ()),
    "gfx906": (64, ("float32", "bfloat16")),
    "gfx1030": (32, ("float32", "bfloat16")),
    "gfx1100": (32, ("float32",)),
}


@pytest.fixture
def uncached():
    triton.device_problem.cache_clear()
    yield
    triton.device_problem.cache_clear()


@pytest.mark.parametrize("name", AMD)
def test_what_amds_gpus_multiply_and_how_wide_their_warps_are(uncached, monkeypatch, name):
    """CDNA's matrix units take float32 and its warps have 64 lanes; RDNA's take half precision, from the third on."""
    lanes, unserved = AMD[name]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    device, architecture = torch.device("cuda", 0), name.partition(":")[0]
    assert triton.device_problem(device) is None
    assert triton.device_problem(device, "normalize_activate", torch.float32) is None
    for dtype in ("float32", "bfloat16"):
        expected = f"cuda:0 ({architecture}) has no matrix units for {dtype}" if dtype in unserved else None
        assert triton.device_problem(device, "patch_cross_attention", getattr(torch, dtype)) == expected

    monkeypatch.setattr(patches, "_target", lambda: GPUTarget("hip", architecture, lanes))
    given = make_inputs("patch_cross_attention", 1, 32, (16, 16), torch.bfloat16)
    x, _, _, weights = grouped(given)
    launch = patches.Launch(x, weights, 8)
    assert launch.blocks["PRECISION"] == "ieee"
    warps = [launch.options(kernel)["num_warps"] for kernel in ("forward", "patches", "channels")]
    assert launch.options("channels")["PASSES"] == (1 if lanes == 64 else 2)
    assert [one * lanes for one in warps] == ([128, 128, 128] if lanes == 64 else [64, 128, 128])
