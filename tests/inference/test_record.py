"""What a folder of results says of its cases: what failed, and where each result comes from."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import predict
from heads import SPACING, noise, tiny_bundle, write

from grcsf_fast import GRCSF, MaskedAutoencoder, Predictor
from grcsf_fast.data.failures import read_failures
from grcsf_fast.data.reports import read_report
from grcsf_fast.errors import ArgumentError
from grcsf_fast.inference import record as records
from grcsf_fast.inference.plan import Plan
from grcsf_fast.inference.record import Failed
from grcsf_fast.networks.stream import Images, Stage, Stream
from grcsf_fast.runtime.processes import World

GRID = np.diag([*SPACING, 1.0])


@pytest.fixture
def sites(tmp_path):
    """Two folders with a good case and a bad one each."""
    for number, site in enumerate(("first", "second")):
        (tmp_path / site).mkdir()
        write(tmp_path / site / f"good{number}.nii.gz", noise(24, 24, 8), GRID)
        write(tmp_path / site / f"flat{number}.nii.gz", np.full((9, 9, 9), 7, np.int16), GRID)
    return tmp_path / "first", tmp_path / "second"


def test_a_run_of_other_cases_keeps_what_failed(bundle, sites, tmp_path):
    """So that a comparison of all takes no mask from before for good."""
    output = tmp_path / "out"
    for site in sites:
        assert predict("-i", site, "-o", output, "-m", bundle) == 1
    assert set(read_failures(output)) == {"flat0", "flat1"}
    write(sites[0] / "flat0.nii.gz", noise(24, 24, 8), GRID)
    assert predict("-i", sites[0], "-o", output, "-m", bundle) == 0
    assert set(read_failures(output)) == {"flat1"}
    # A file that is there no more cannot be done, which a run of its own folder finds out: another one's may be of
    # another machine.
    (sites[1] / "flat1.nii.gz").unlink()
    assert predict("-i", sites[0], "-o", output, "-m", bundle) == 0
    assert set(read_failures(output)) == {"flat1"}
    assert predict("-i", sites[1], "-o", output, "-m", bundle) == 0
    assert not (output / "failures.json").exists()


def test_a_file_that_fails_by_itself(bundle, sites, tmp_path, capsys):
    output, path = tmp_path / "out", sites[0] / "good0.nii.gz"
    flat = (path.parent / "flat0.nii.gz").read_bytes()
    good = path.read_bytes()
    path.write_bytes(flat)
    assert predict("-i", path, "-o", output, "-m", bundle) == 2
    assert not output.exists()
    path.write_bytes(good)
    assert predict("-i", path, "-o", output, "-m", bundle) == 0
    path.write_bytes(flat)
    assert predict("-i", path, "-o", output, "-m", bundle) == 2
    assert read_failures(output)["good0"]["input"] == str(path)
    # Of another file the result that is there says nothing.
    other = shutil.copytree(sites[0], tmp_path / "other") / "good0.nii.gz"
    path.write_bytes(good)
    assert predict("-i", path, "-o", output, "-m", bundle) == 0
    assert read_failures(output) == {}
    assert predict("-i", other, "-o", output, "-m", bundle) == 2
    assert read_failures(output) == {}
    capsys.readouterr()
    assert predict("-i", path, "-o", output, "-m", bundle, "--memory", "1e-6") == 2
    assert "good0.nii.gz: expected to need at most 1.0 KiB of memory" in capsys.readouterr().err


def test_something_else_of_the_records_name(bundle, sites, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "failures.json").write_text("[]")
    assert predict("-i", sites[0], "-o", output, "-m", bundle) == 2
    assert "failures.json: expected the failures that predict notes" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["failures.json"]


def test_a_record_that_cannot_be_written(bundle, sites, tmp_path, capsys, monkeypatch):
    """The others are, and what was done counts."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "change_failures", full)
    monkeypatch.setattr(records, "SECONDS_A_RECORD", -1.0)
    output = tmp_path / "out"
    with pytest.warns(match="failures could not be noted yet"):
        assert predict("-i", sites[0], "-o", output, "-m", bundle) == 1
    assert "what became of the cases could not be written" in capsys.readouterr().err
    assert (output / "summary.csv").exists()
    assert (output / "index.html").exists()


def test_a_full_disk_ends_the_run(bundle, sites, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("grcsf_fast.inference.prediction.save_mask", full)
    assert predict("-i", sites[0], "-o", tmp_path / "out", "-m", bundle) == 1
    assert "good0.nii.gz: could not be written: No space left on device; every other" in capsys.readouterr().err


SETTINGS = {"residual_maps": {}, "mae": None}


def record(output, rank):
    todo = Plan({"a": Path("a.nii"), "b": Path("b.nii")}, {}, ["ab"[rank]])
    made = records.Record(output, todo, False, World(rank, 2), (), SETTINGS)
    made.noted(Failed("ab"[rank], f"{'ab'[rank]}.nii", "made by the test", ""))
    return made


def test_processes_of_an_interrupted_run(tmp_path):
    """Each leaves what it knows, and the next run takes it over."""
    (tmp_path / "c_report.json").write_text("{}")
    for rank in (1, 0):
        record(tmp_path, rank).close()
    assert set(read_failures(tmp_path)) == {"a", "b"}
    other = records.Record(tmp_path, Plan({"b": Path("b.nii")}, {}, ["b"]), False, World(0, 2), (), SETTINGS)
    found = {"input": "b.nii", "input_sha256": "", "lesion_count": 0, "total_volume_ml": 0.0, "lesions": []}
    (tmp_path / "b_report.json").write_text(json.dumps(found | {"outputs": {}, "settings": SETTINGS}))
    other.close()
    assert "b,b.nii,done" in (tmp_path / "summary.csv").read_text()
    assert sorted(path.name for path in tmp_path.glob("failures*")) == ["failures.json"]


def test_relative_paths_are_not_the_same_place(bundle, sites, tmp_path, monkeypatch, capsys):
    for site, values in zip(sites, (8, 9), strict=True):
        (site / "scans").mkdir()
        write(site / "scans" / "case.nii.gz", noise(24, 24, values), GRID)
    output = tmp_path / "out"
    monkeypatch.chdir(sites[0])
    assert predict("-i", "scans", "-o", output, "-m", bundle) == 0
    assert read_report(output / "case_report.json")["input"] == str(sites[0] / "scans" / "case.nii.gz")
    monkeypatch.chdir(sites[1])
    assert predict("-i", "scans", "-o", output, "-m", bundle) == 1
    assert "expected no result of another input under its name" in capsys.readouterr().err
    # As reports of version 0.1 have it.
    report = read_report(output / "case_report.json")
    (output / "case_report.json").write_text(json.dumps(report | {"input": "scans/case.nii.gz"}))
    assert predict("-i", "scans", "-o", output, "-m", bundle) == 1


def test_another_channel_is_another_input(bundle, tmp_path):
    data = np.stack([noise(24, 24, 8), noise(24, 24, 8) + 1], axis=3)
    nib.save(nib.Nifti1Image(data.astype(np.float32), GRID), tmp_path / "case.nii.gz")
    from grcsf_fast.data.images import OneChannel

    first, second = (Predictor(bundle)(OneChannel(tmp_path / "case.nii.gz", channel)) for channel in (0, 1))
    first.save(tmp_path / "out")
    first.save(tmp_path / "out")
    with pytest.raises(ArgumentError, match="expected no result of another input under its name"):
        second.save(tmp_path / "out")


def test_channels_in_another_place_are_finished(tmp_path):
    network = GRCSF(2, 2, 1, features=(4, 8, 8), patch_size=4, rcu_levels=(0, 1), residual_channels=4)
    mae = MaskedAutoencoder(2, 2, 8, embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1)
    predictor = Predictor(replace(tiny_bundle(), network=network, mae=mae, channels=("t1", "flair")))
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for channel in (0, 1):
        write(source / f"case_{channel:04d}.nii.gz", noise(24, 24, 8) + channel, GRID)
    assert [type(one).__name__ for one in predictor.predict_folder(source, output)] == ["Done"]
    moved = shutil.move(source, tmp_path / "moved")
    assert [type(one).__name__ for one in predictor.predict_folder(moved, output)] == ["Finished"]
    # The same files the other way round are other channels.
    paths = [Path(moved) / f"case_{channel:04d}.nii.gz" for channel in (0, 1)]
    os.rename(paths[0], paths[0].with_suffix(".aside"))
    os.rename(paths[1], paths[0])
    os.rename(paths[0].with_suffix(".aside"), paths[1])
    (found,) = predictor.predict_folder(moved, output)
    assert isinstance(found, Failed)
    assert "expected no result of another input under its name" in found.error


def test_no_memory_for_what_a_volume_is_put_together_in():
    """The others of the batch's stream go on."""

    class Large(torch.Tensor):
        def new_empty(self, *shape, **named):
            raise MemoryError("made by the test")

    def run(images):
        return images.as_subclass(Large) if images.shape[-1] == 3 else images

    stream = Stream({"stage": Stage(2, run)})
    lost = stream.submit(Images("stage", [torch.zeros(4, 1, 3)]))
    good = stream.submit(Images("stage", [torch.ones(4, 1, 2)]))
    stream.run()
    assert isinstance(lost.error, MemoryError)
    assert good.error is None
    assert torch.equal(good.outputs[0], torch.ones(4, 1, 2))
