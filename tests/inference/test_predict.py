"""Prediction and the command line, on a tiny bundle with random weights: files, grids, errors, exit codes."""

import errno
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from awake import awake
from commands import predict
from heads import noise, tiny_bundle, write

from grcsf_fast import GRCSF, Predictor
from grcsf_fast.cli import main
from grcsf_fast.data import volumes
from grcsf_fast.data.volumes import Preprocessing, VolumeError, load_volume, prepare
from grcsf_fast.inference import case
from grcsf_fast.inference.report import lesion_mask, levels_on_grid
from grcsf_fast.networks.whole_volume import segment
from grcsf_fast.ops import backends
from grcsf_fast.ops.backends import select_backend
from grcsf_fast.pretrained.bundle import Bundle, BundleError, load_bundle, save_bundle
from grcsf_fast.runtime.precision import choose_device


def test_outputs_lie_on_the_grid_of_the_input(bundle_folder, scan, tmp_path):
    assert predict("-i", scan, "-o", tmp_path / "out", "-m", bundle_folder) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "scan.nii.gz", "scan_overlay.png", "scan_report.json", "scan_residual50.nii.gz", "scan_residual75.nii.gz"
    ]  # fmt: skip
    image, mask = nib.load(scan), nib.load(tmp_path / "out" / "scan.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    assert mask.shape == image.shape
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-6)
    assert (int(mask.header["qform_code"]), int(mask.header["sform_code"])) == (1, 2)
    assert set(np.unique(mask.dataobj)) == {0, 1}
    residual = nib.load(tmp_path / "out" / "scan_residual75.nii.gz")
    assert residual.get_data_dtype() == np.float32
    assert residual.shape == image.shape
    assert np.asarray(residual.dataobj).min() < 0 < np.asarray(residual.dataobj).max()
    assert (tmp_path / "out" / "scan_overlay.png").read_bytes().startswith(b"\x89PNG")


def test_report_agrees_with_the_mask(bundle_folder, scan):
    predictor = Predictor.from_pretrained(bundle_folder)
    prediction = predictor(nib.load(scan))
    mask = np.asarray(prediction.mask.dataobj)
    report = prediction.report
    assert report["lesion_count"] == len(report["lesions"]) > 0
    assert report["total_volume_ml"] == pytest.approx(mask.sum() * 0.064, abs=1e-3)
    assert sum(item["volume_ml"] for item in report["lesions"]) == pytest.approx(report["total_volume_ml"], abs=1e-2)
    weights = [item["volume_ml"] for item in report["lesions"]]
    assert weights == sorted(weights, reverse=True)
    middle = np.average([item["centroid_mm"] for item in report["lesions"]], axis=0, weights=weights)
    expected = nib.affines.apply_affine(prediction.mask.affine, np.argwhere(mask).mean(0))
    np.testing.assert_allclose(middle, expected, atol=0.05)
    assert report["settings"]["backend"] == select_backend(torch.zeros(1))
    assert "fallbacks" not in report
    assert report["settings"]["precision"] == predictor.precision
    assert set(prediction.seconds) == {"read", "prepare", "residual_maps", "segmentation", "restore"}
    assert report["versions"]["torch"] == torch.__version__


def test_lesions_need_a_peak():
    probability = np.zeros((8, 8, 8), np.float32)
    probability[1:3, 1:3, 1:3] = 0.6
    probability[5, 5, 5:7] = 0.6
    probability[6, 6, 7] = 0.95  # touches the second by a corner
    every = lesion_mask(probability, 0.5)
    assert np.array_equal(every, probability > 0)
    sure = lesion_mask(probability, 0.5, 0.9)
    assert sure.sum() == 3
    assert not sure[1:3, 1:3, 1:3].any()
    assert not lesion_mask(probability, 0.5, 0.99).any()
    assert np.array_equal(lesion_mask(probability, 0.5, 0.95), sure)
    assert not lesion_mask(np.zeros((2, 2, 2)), 0.5, 0.9).any()


@pytest.mark.parametrize(("threshold", "peak", "level"), [(0.5, 0.75, 1), (0.25, 0.5, 2), (0.5, 0.0, 2)])
def test_a_probability_at_a_threshold_reaches_it(threshold, peak, level):
    probability = np.full((6, 5, 4), 0.5, np.float32)
    image = nib.Nifti1Image(400 * noise(6, 5, 4) - 300, np.eye(4))
    prepared = prepare(load_volume(image), Preprocessing((1.0, 1.0, 1.0), modality="ct", margin=9))
    levels = levels_on_grid(torch.from_numpy(probability), prepared, threshold, peak)
    assert levels.reached.unique().tolist() == [level]
    assert lesion_mask(probability, threshold, peak).all() == (level == 2)
    assert lesion_mask(probability, 0.5).all()
    probability[2, 2, 2] = 0.75
    assert lesion_mask(probability, 0.5, 0.75).all()


def test_the_bundles_peak_is_used(bundle_folder, scan):
    bundle = load_bundle(bundle_folder)
    every = Predictor(bundle)(scan)
    probability = np.asarray(every.probability.dataobj)
    peak = float(np.quantile(probability[np.asarray(every.mask.dataobj) > 0], 0.999))
    fewer = Predictor(replace(bundle, hysteresis_threshold=peak))(scan)
    assert 0 < fewer.report["lesion_count"] < every.report["lesion_count"]
    expected = lesion_mask(probability, bundle.probability_threshold, peak)
    assert np.array_equal(np.asarray(fewer.mask.dataobj) > 0, expected)
    assert fewer.report["settings"]["hysteresis_threshold"] == peak


@pytest.mark.parametrize("dims", [2, 3])
def test_zooms_are_averaged(dims):
    torch.manual_seed(0)
    network = GRCSF(dims, 1, 1, features=(4, 8), patch_size=4, rcu_levels=(), gcu=False).eval()
    volume = torch.randn(12, 10, 8)
    larger = torch.nn.functional.interpolate(
        volume[None, None], size=(18, 15, 8 if dims == 2 else 12), mode="trilinear", align_corners=False
    )[0, 0]
    back = torch.nn.functional.interpolate(
        segment(network, larger, None)[None, None], size=(12, 10, 8), mode="trilinear", align_corners=False
    )[0, 0]
    expected = (segment(network, volume, None) + back) / 2
    torch.testing.assert_close(segment(network, volume, None, tta_scales=(1.0, 1.5)), expected)


@pytest.mark.parametrize("roi_size", [None, (8, 8, 8)])
def test_mirroring_knows_no_side(roi_size):
    """The mirrored volume gives the mirrored probability, which the network alone does not."""
    torch.manual_seed(0)
    dims = 2 if roi_size is None else 3
    network = awake(GRCSF(dims, 1, 1, features=(4, 8), patch_size=4, rcu_levels=(0,), residual_channels=4)).eval()
    volume, maps = torch.randn(12, 9, 8), torch.rand(2, 12, 9, 8)
    one, other = (
        segment(network, image, residual, roi_size=roi_size, tta_flip=True)
        for image, residual in ((volume, maps), (volume.flip(0), maps.flip(1)))
    )
    torch.testing.assert_close(one, other.flip(0))
    plain = segment(network, volume, maps, roi_size=roi_size)
    assert not torch.allclose(
        plain, segment(network, volume.flip(0), maps.flip(1), roi_size=roi_size).flip(0), atol=1e-4
    )
    assert not torch.allclose(one, plain, atol=1e-4)


def test_two_runs_write_the_same_bits(bundle_folder, scan, tmp_path):
    for run in ("a", "b"):
        assert predict("-i", scan, "-o", tmp_path / run, "-m", bundle_folder) == 0
    for name in ("scan.nii.gz", "scan_residual50.nii.gz", "scan_residual75.nii.gz"):
        first, second = ((tmp_path / run / name).read_bytes() for run in ("a", "b"))
        assert first == second


@pytest.mark.parametrize("weights", ["random", pytest.param("demo", marks=pytest.mark.slow)])
def test_batch_size_changes_results_by_rounding_only(bundle_folder, scan, weights):
    """To a thousandth at most, of random and of the shipped weights."""
    bundle = weights if weights == "demo" else bundle_folder
    found = [
        Predictor.from_pretrained(bundle, batch_size=batch_size, precision="float32")(scan).values
        for batch_size in (1, 16)
    ]
    for key, values in found[0].items():
        assert (values - found[1][key]).abs().max() <= 1e-3


def test_folder_run_reports_the_bad_case_and_does_the_others(bundle_folder, scan, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.nii.gz").write_bytes(scan.read_bytes())
    (folder / "cut.nii.gz").write_bytes(scan.read_bytes()[:3000])
    (folder / "notes.txt").write_text("not a case")
    assert predict("-i", folder, "-o", tmp_path / "out", "-m", bundle_folder) == 1
    captured = capsys.readouterr()
    assert "1 of 2 cases failed" in captured.err
    assert "cut.nii.gz" in captured.err
    assert (tmp_path / "out" / "good.nii.gz").is_file()
    assert not list((tmp_path / "out").glob("*cut*"))


def test_an_unforeseen_error_is_reported_with_its_traceback(bundle_folder, scan, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.nii.gz").write_bytes(scan.read_bytes())
    real = case.read_volume

    def read(source):
        if Path(source).name == "a.nii.gz":
            raise ZeroDivisionError("made by the test")
        return real(source)

    monkeypatch.setattr(case, "read_volume", read)
    assert predict("-i", folder, "-o", tmp_path / "out", "-m", bundle_folder) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "made by the test" in error
    assert (tmp_path / "out" / "b.nii.gz").is_file()


def not_nifti(folder: Path) -> Path:
    path = folder / "bad.nii.gz"
    path.write_bytes(b"this is text")
    return path


def truncated(folder: Path) -> Path:
    path = write(folder / "whole.nii.gz", noise(20, 20, 20))
    path.write_bytes(path.read_bytes()[:2000])
    return path


def nan_volume(folder: Path) -> Path:
    data = noise(20, 20, 20)
    data[:4] = np.nan
    return write(folder / "nan.nii", data)


def odd_affine(value: float):
    def make(folder: Path) -> Path:
        path = write(folder / "affine.nii", noise(8, 8, 8))
        raw = bytearray(path.read_bytes())
        # sform rows srow_x, srow_y, srow_z and its code, in the NIfTI-1 header.
        raw[280:328] = np.full(12, value, np.float32).tobytes()
        raw[254:256] = np.int16(1).tobytes()
        path.write_bytes(raw)
        return path

    return make


BAD_INPUTS = {
    "not NIfTI": (not_nifti, "expected a NIfTI volume"),
    "truncated": (truncated, "whole.nii.gz"),
    "4-D": (lambda folder: write(folder / "four.nii", noise(6, 6, 6, 3)), "expected one 3-D volume"),
    "empty": (lambda folder: write(folder / "empty.nii", noise(0, 4, 4)), "empty"),
    "constant": (lambda folder: write(folder / "flat.nii", np.full((9, 9, 9), 7, np.int16)), "constant volume"),
    "NaN": (nan_volume, "NaN or infinite voxels"),
    "zero affine": (odd_affine(0.0), "invertible affine"),
    "non-finite affine": (odd_affine(np.nan), "finite affine"),
    "missing": (lambda folder: folder / "nothing.nii.gz", "nothing.nii.gz"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_input_exits_with_2_and_writes_nothing(kind, bundle_folder, tmp_path, capsys):
    make, expected = BAD_INPUTS[kind]
    path = make(tmp_path)
    assert predict("-i", path, "-o", tmp_path / "out", "-m", bundle_folder) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert path.name in error
    assert not (tmp_path / "out").exists()


def test_a_few_bad_voxels_are_cleaned_with_a_warning(bundle_folder, scan, tmp_path):
    image = nib.load(scan)
    data = np.asarray(image.dataobj).copy()
    data[10, 10, 10] = np.inf
    path = write(tmp_path / "few.nii.gz", data, image.affine)
    with pytest.warns(UserWarning, match=r"few\.nii\.gz: 1 NaN or infinite voxels"):
        assert predict("-i", path, "-o", tmp_path / "out", "-m", bundle_folder) == 0
    assert np.isfinite(np.asarray(nib.load(tmp_path / "out" / "few_residual75.nii.gz").dataobj)).all()


def test_output_that_cannot_be_a_folder(bundle_folder, scan, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert predict("-i", scan, "-o", tmp_path / "file" / "out", "-m", bundle_folder) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_output_folder_of_the_input_is_refused(bundle_folder, scan, tmp_path, capsys):
    copy = tmp_path / "scan.nii.gz"
    copy.write_bytes(scan.read_bytes())
    for source, output in ((copy, tmp_path), (tmp_path, tmp_path / ".")):
        assert predict("-i", source, "-o", output, "-m", bundle_folder) == 2
        assert "another folder" in capsys.readouterr().err
    assert copy.read_bytes() == scan.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_save_does_not_replace_the_input(bundle_folder, scan, tmp_path):
    copy = tmp_path / "scan.nii.gz"
    copy.write_bytes(scan.read_bytes())
    with pytest.raises(ValueError, match="replace the input"):
        Predictor.from_pretrained(bundle_folder)(copy).save(tmp_path)
    assert copy.read_bytes() == scan.read_bytes()


def test_cases_named_like_results_are_refused(bundle_folder, scan, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "a_residual50"):
        (folder / f"{name}.nii.gz").write_bytes(scan.read_bytes())
    assert predict("-i", folder, "-o", tmp_path / "out", "-m", bundle_folder) == 2
    assert "a_residual50" in capsys.readouterr().err


def test_the_backend_of_the_environment_holds(bundle_folder, scan, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRCSF_BACKEND", "abacus")
    assert predict("-i", scan, "-o", tmp_path / "out", "-m", bundle_folder) == 2
    assert "abacus" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*'reference' serves")
def test_what_the_reference_served_instead_is_reported(bundle_folder, scan, tmp_path, capsys, monkeypatch):
    """As on a GPU whose kernels fail the check of their first use."""
    triton = backends.Backend("triton", ("cpu",), (), "for tests", lambda: None)
    monkeypatch.setattr(backends, "_BACKENDS", {"triton": triton, "reference": backends._BACKENDS["reference"]})
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends, "_fell_back", {})
    monkeypatch.setattr(backends.check, "failure", lambda kernel, *_: f"{kernel.op} failed")
    with pytest.warns(UserWarning, match="patch_cross_attention failed; 'reference' serves"):
        assert predict("-m", bundle_folder, "-i", scan, "-o", tmp_path, "--device", "cpu") == 0
    (report,) = tmp_path.glob("*_report.json")
    found = json.loads(report.read_text())
    assert found["settings"]["backend"] == "triton"
    assert found["fallbacks"]["patch_cross_attention"] == "patch_cross_attention failed"
    assert "backend triton (reference for " in capsys.readouterr().out


def test_an_unforeseen_error_has_a_code_of_its_own(bundle_folder, scan, tmp_path, capsys, monkeypatch):
    def call(self, source):
        raise ZeroDivisionError("made by the test")

    monkeypatch.setattr(Predictor, "__call__", call)
    assert predict("-i", scan, "-o", tmp_path / "out", "-m", bundle_folder) == 70
    assert "Traceback" in capsys.readouterr().err


def test_numbers_of_threads(bundle_folder, scan, tmp_path, capsys):
    assert predict("-i", scan, "-o", tmp_path / "out", "-m", bundle_folder, "--threads", "0") == 2
    assert "--threads" in capsys.readouterr().err


def test_full_disk_leaves_nothing(bundle_folder, scan, tmp_path, capsys, monkeypatch):
    real, calls = volumes.save_on_grid, itertools.count()

    def save(path, values, prepared):
        if next(calls) == 1:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, values, prepared)

    monkeypatch.setattr("grcsf_fast.inference.prediction.save_on_grid", save)
    assert predict("-i", scan, "-o", tmp_path / "out", "-m", bundle_folder) == 2
    error = capsys.readouterr().err
    assert "No space left" in error
    assert "scan.nii.gz" in error
    assert not (tmp_path / "out").exists()


def test_bundles_that_cannot_predict(scan, tmp_path, capsys):
    whole = tiny_bundle()
    alone = save_bundle(Bundle(None, whole.mae, whole.preprocessing), tmp_path / "alone")
    assert predict("-i", scan, "-o", tmp_path / "out", "-m", alone) == 2
    assert "autoencoder alone" in capsys.readouterr().err
    whole.network.requires_maps = True
    with pytest.raises(BundleError, match="holds no autoencoder"):
        Predictor(Bundle(whole.network, None, whole.preprocessing))


def test_maps_that_hold_nan_are_refused(bundle_folder, scan, monkeypatch):
    """Also where no network sees it, and the probability is a number everywhere."""
    real = case.reconstruct

    def reconstruct(volume, foreground, *arguments):
        maps = yield from real(volume, foreground, *arguments)
        maps[..., ~foreground.flatten(0, 1).any(0)] = torch.nan
        return maps

    monkeypatch.setattr(case, "reconstruct", reconstruct)
    with pytest.raises(VolumeError, match=r"scan\.nii\.gz: expected finite numbers .*, got a maps that holds NaN"):
        Predictor.from_pretrained(bundle_folder)(scan)


def test_unknown_backend_and_device(bundle_folder, scan, tmp_path, capsys):
    assert predict("-i", scan, "-o", tmp_path / "out", "-m", bundle_folder, "--backend", "abacus") == 2
    assert "abacus" in capsys.readouterr().err
    with pytest.raises(ValueError, match="device"):
        choose_device("abacus")


@pytest.mark.parametrize("command", ["predict", "train-mae", "train", "evaluate", "synthesize", "info"])
def test_help_of_every_command(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"grcsf-fast {command}" in capsys.readouterr().out


def test_the_package_runs_as_a_module():
    listed = subprocess.run(
        [sys.executable, "-m", "grcsf_fast", "info"], capture_output=True, text=True, check=True
    ).stdout
    assert "backend reference: can run" in listed


def test_synthesize_writes_pairs(tmp_path):
    arguments = ["synthesize", "-o", str(tmp_path), "-n", "2", "--seed", "11", "--spacing", "4", "--skull", "no"]
    assert main(arguments) == 0
    images, masks = sorted((tmp_path / "images").iterdir()), sorted((tmp_path / "masks").iterdir())
    assert [path.name for path in images] == [path.name for path in masks]
    assert len(images) == 2
    record = json.loads((tmp_path / "records" / "synthetic_11.json").read_text())
    mask = nib.load(masks[0])
    assert mask.get_data_dtype() == np.uint8
    volume = np.asarray(mask.dataobj).sum() * np.prod(mask.header.get_zooms()) / 1000
    assert volume == pytest.approx(record["lesion_volume_ml"], rel=1e-3)


@pytest.mark.slow
def test_training_from_the_command_line(tmp_path, capsys):
    """The whole way: pairs on disk, autoencoder, network, prediction, evaluation."""
    common = ["--spacing", "4,4,4"]
    assert main(["synthesize", "-o", str(tmp_path), "-n", "4", "--seed", "21", "--spacing", "4", "--skull", "no"]) == 0
    small = ["--steps", "4", "--batch-size", "2", "--crop-size", "32,32", "--warmup-steps", "1", "--cache-size", "2"]
    small += ["--log-every", "2", "--validate-every", "2"]
    mae = ["--embed-dim", "16", "--depth", "1", "--num-heads", "2", "--decoder-dim", "16"]
    images, masks = str(tmp_path / "images"), str(tmp_path / "masks")
    assert main(["train-mae", "-i", images, "-o", str(tmp_path / "mae"), *small, *mae, *common]) == 0
    train = ["train", "-i", images, "-l", masks, "-o", str(tmp_path / "net"), "--mae", str(tmp_path / "mae" / "bundle")]
    assert main([*train, *small, "--features", "4,8,8,8", "--validation", "1"]) == 0
    assert main([*train, *small, "--features", "4,8,8,8", "--validation", "1"]) == 2
    assert "--resume" in capsys.readouterr().err
    bundle = str(tmp_path / "net" / "bundle")
    assert main(["predict", "-i", images, "-o", str(tmp_path / "out"), "-m", bundle]) == 0
    assert main(["evaluate", "-p", str(tmp_path / "out"), "-t", masks, "-o", str(tmp_path / "scores")]) == 0
    assert "cases 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["cases"] == 4


def test_training_needs_what_it_needs(tmp_path, capsys):
    assert main(["train", "-o", str(tmp_path / "a"), "-i", str(tmp_path)]) == 2
    assert "--labels" in capsys.readouterr().err
    assert main(["train", "-o", str(tmp_path / "b")]) == 2
    assert "--mae" in capsys.readouterr().err
