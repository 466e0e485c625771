"""What is made of a profile, and both runs of the timeline where there is no GPU."""

import sys
from dataclasses import replace

import pytest
import torch
from heads import tiny_bundle
from pairs import write_case

from benchmarks import gpu_timeline
from grcsf_fast import Predictor
from grcsf_fast.data.volumes import Preprocessing


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([], 0.0),
        ([(0, 2e6), (5e6, 6e6)], 3.0),
        ([(5e6, 6e6), (0, 2e6), (1e6, 3e6), (1e6, 1.5e6)], 4.0),  # streams side by side, in any order
        ([(0, 1e6), (1e6, 2e6), (0, 2e6)], 2.0),
    ],
)
def test_busy_while_anything_runs(spans, seconds):
    assert gpu_timeline.busy_seconds(spans) == pytest.approx(seconds)


def test_a_graph_is_one_launch():
    names = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync", "aten::conv2d", "volta_gemm"]
    assert gpu_timeline.launches(names) == 3


@pytest.mark.slow
def test_both_runs(tmp_path):
    for name in "ab":
        write_case(tmp_path, name)
    bundle = replace(tiny_bundle(), preprocessing=Preprocessing((4.0, 4.0, 4.0)))
    predictor = Predictor(bundle, "cpu", precision="float32")
    found = gpu_timeline.measure(predictor, tmp_path / "images", tmp_path / "work")
    assert found["volumes"] == 2
    assert found["files"].keys() == found["memory"].keys() == {"seconds"}
    assert len(list((tmp_path / "work/measured").glob("*_report.json"))) == 2
    (tmp_path / "images/bad.nii.gz").write_bytes(b"no volume")
    with pytest.raises(RuntimeError, match=r"bad\.nii\.gz"):
        gpu_timeline.measure(predictor, tmp_path / "images", tmp_path / "again")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_timeline", "-o", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit, match="2"):
        gpu_timeline.main()
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
