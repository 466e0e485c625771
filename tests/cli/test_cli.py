"""The command line: what is refused in one line, exit codes, signals, pipes that close, threads."""

import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundles import saved_before
from commands import TINY_MAE, run
from heads import tiny_bundle
from pairs import write_case

from grcsf_fast import Predictor
from grcsf_fast.cli import info, main, predict, program
from grcsf_fast.cli.options import joined
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.datasets.pairs import FolderSource
from grcsf_fast.networks.grcsf import GRCSF
from grcsf_fast.networks.mae import MaskedAutoencoder
from grcsf_fast.pretrained.bundle import Bundle, BundleError, save_bundle
from grcsf_fast.training import autoencoder, network, sampling

SMALL = [
    *("--steps", "6", "--batch-size", "2", "--crop-size", "16,16", "--crop-size-jitter", "0", "--warmup-steps", "1"),
    *("--cache-size", "2", "--log-every", "1", "--precision", "float32", "--augment", "none"),
]
TINY_NETWORK = ["--features", "4,8,8,8", "--rcu-levels", "", "--validation", "1"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pairs of 24 x 26 x 22 voxels."""
    for number, name in enumerate("abc"):
        write_case(tmp_path, name, corner=(8 + number, 9, 7))
    return tmp_path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    made = replace(tiny_bundle(), preprocessing=Preprocessing((2.0, 2.0, 2.0)))
    return save_bundle(made, tmp_path_factory.mktemp("bundle") / "tiny")


def train_pairs(folder, output, *more) -> int:
    pairs = ("-i", folder / "images", "-l", folder / "masks")
    return run("train", *pairs, "-o", output, *SMALL, *TINY_NETWORK, *more)


def train_images(folder, output, *more) -> int:
    return run("train-mae", "-i", folder / "images", "-o", output, *SMALL, *TINY_MAE, *more)


def parsed(*arguments):
    return program._parser().parse_args(joined(arguments))


@pytest.mark.parametrize("form", [["--hu-window", "-160,240"], ["--hu-window=-160,240"]])
def test_lists_that_begin_with_a_minus(form):
    """As the help shows them."""
    assert parsed("train", "-o", "x", "--modality", "ct", *form).hu_window == (-160.0, 240.0)


def test_lists():
    options = parsed("train-mae", "-o", "x", "--spacing", "1,2.5,3", "--crop-size", "8,8,8", "--mask-ratios", "0.9")
    assert (options.spacing, options.crop_size, options.mask_ratios) == ((1.0, 2.5, 3.0), (8, 8, 8), (0.9,))
    options = parsed("train", "-o", "x", "--rcu-levels", "", "--features", "4,8", "--hu-window", "-.5,1e2")
    assert (options.rcu_levels, options.features, options.hu_window) == ((), (4, 8), (-0.5, 100.0))


USAGE = [
    ("train --hu-window 1", "--hu-window: expected 2 numbers separated by commas, got '1'"),
    ("train --hu-window -160", "--hu-window: expected 2 numbers separated by commas, got '-160'"),
    ("train --hu-window -160,240,5", "--hu-window: expected 2 numbers"),
    ("train --hu-window -inf,240", "--hu-window: expected a number, got '-inf'"),
    ("train --modality ct --hu-window 240,-160", "hu_window: expected"),
    ("train --spacing 2,2", "--spacing: expected 3 numbers separated by commas, got '2,2'"),
    ("train --spacing 2", "--spacing: expected 3 numbers"),
    ("train --spacing 2,2,", "--spacing: expected a number above 0, got ''"),
    ("train --spacing 2,2,0", "--spacing: expected a number above 0, got '0'"),
    ("train --spacing -1,2,2", "--spacing: expected a number above 0, got '-1'"),
    ("train --spacing 2,2,nan", "--spacing: expected a number above 0, got 'nan'"),
    ("train --spacing 2;2;2", "--spacing: expected 3 numbers"),
    ("train --spacing 2,2,x", "--spacing: expected a number above 0, got 'x'"),
    ("train --crop-size 5", "--crop-size: expected 2 or 3 numbers"),
    ("train --crop-size 5,5,5,5", "--crop-size: expected 2 or 3 numbers"),
    ("train --crop-size 5,0", "--crop-size: expected a whole number from 1 up to 2147483647, got '0'"),
    ("train --crop-size 5.5,6", "--crop-size: expected a whole number"),
    ("train --features ,", "--features: expected a whole number"),
    ("train --features 0,4", "--features: expected a whole number"),
    ("train --rcu-levels -1", "--rcu-levels: expected a whole number"),
    ("train-mae --mask-ratios ", "--mask-ratios: expected one or more numbers"),
    ("train-mae --mask-ratios 0", "--mask-ratios: expected a number above 0 below 1, got '0'"),
    ("train-mae --mask-ratios 1.5", "--mask-ratios: expected a number above 0 below 1"),
    ("train-mae --mask-ratios nan", "--mask-ratios: expected a number above 0 below 1"),
    (
        "train-mae --mask-ratios 0.5,0.501",
        "--mask-ratios: expected ratios that differ by at least one percentage point",
    ),
    ("train-mae --rounds 0", "--rounds: expected a whole number from 1"),
    ("train-mae --num-heads 7", "embed_dim: expected a multiple of its 7 heads"),
    ("train-mae --steps 0", "steps: expected 1 or more, got 0"),
    ("train-mae --steps many", "--steps: expected a whole number"),
    ("train-mae --steps 99999999999", "--steps: expected a whole number"),
    ("train-mae --batch-size 0", "--batch-size: expected 1 or more, got 0"),
    ("train-mae --seed -1", "--seed: expected 0 to 49, got -1"),
    ("train-mae --learning-rate nan", "--learning-rate: expected a number, got 'nan'"),
    ("train-mae --learning-rate -1e-3", "--learning-rate: expected a number above 0, got -0.001"),
    ("train-mae --checkpoint-minutes 0", "--checkpoint-minutes: expected a number above 0, got 0.0"),
    ("train-mae --weight-decay inf", "--weight-decay: expected a number, got 'inf'"),
    ("train-mae --spacing 1,2,2", "synthetic subjects are isotropic"),
    ("train-mae --device cuda", "'cuda' was asked for, and torch finds no CUDA device"),
    ("train-mae --device tpu", "device: expected 'auto', 'cpu', 'cuda[:N]' or another device of torch's, got 'tpu'"),
    ("train-mae --threads 0", "--threads: expected a whole number from 1 up to 1024, got '0'"),
    ("train-mae --threads 2.5", "--threads: expected a whole number"),
    ("train-mae --initial nowhere", "nowhere: expected a bundle's folder or one of ['demo'], found neither"),
    ("predict -i {scan} --batch-size 0", "--batch-size: expected a whole number from 1"),
    ("predict -i {scan} --memory nan", "--memory: expected a number above 0, got 'nan'"),
    ("predict -i {scan} --memory -2", "--memory: expected a number above 0, got '-2'"),
    ("predict -i {scan} --importance-threshold 1.5", "--importance-threshold: expected a number from 0 up to 1"),
    ("predict -i {scan} --device cuda", "torch finds no CUDA device"),
    ("predict -i {scan} --device cpu:3", "device: expected 'cpu', of which torch has one alone"),
    ("predict -i {scan} --backend abacus", "abacus"),
    ("predict -i {scan} --precision float16", "which has no fast float16"),
    ("predict -i {scan} -m {scan}", "expected a bundle's folder or one of ['demo'], found a file"),
    ("predict -i {scan} -m none", "none: expected a bundle's folder"),
    ("predict -i {scan}.gz", "expected a NIfTI file or a folder of them, found nothing"),
    ("synthesize -n 0", "--number: expected a whole number from 1"),
    ("synthesize --seed -1", "--seed: expected a whole number from 0"),
    ("synthesize --spacing inf", "--spacing: expected a number above 0, got 'inf'"),
    ("abacus", "invalid choice"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU to be asked for")
@pytest.mark.parametrize(("command", "message"), USAGE, ids=[command for command, _ in USAGE])
def test_bad_input_is_one_line_and_2(tmp_path, capsys, command, message):
    """Nothing is written."""
    scan = tmp_path / "scan.nii"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9), np.float32), np.eye(4)), scan)
    words = [word.format(scan=scan) for word in command.split(" ")]
    output = [] if words[0] == "abacus" else ["-o", str(tmp_path / "out")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([words[0], *output, *words[1:]]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["predict", "train", "train-mae", "synthesize", "evaluate"])
def test_a_file_as_output_is_refused_before_any_work(folder, bundle, capsys, command):
    inputs = {
        "predict": ["-i", folder / "images", "-m", bundle],
        "train": ["-i", folder / "images", "-l", folder / "masks", *TINY_NETWORK],
        "train-mae": ["-i", folder / "images"],
        "synthesize": [],
        "evaluate": ["-p", folder / "masks", "-t", folder / "masks"],
    }
    assert run(command, *inputs[command], "-o", folder / "mask.nii.gz") == 2
    said = capsys.readouterr()
    assert "mask.nii.gz: expected a folder" in said.err
    assert said.out == ""


@pytest.mark.parametrize("name", ["images", "masks"])
def test_a_training_does_not_write_among_its_data(folder, capsys, name):
    assert train_pairs(folder, folder / name) == 2
    assert f"--output: expected another folder than that of --{ {'masks': 'labels'}.get(name, name) }" in (
        capsys.readouterr().err
    )
    assert sorted(path.name for path in (folder / name).iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_bad_files_stop_a_training_before_its_first_step(folder, capsys):
    """All of them are named, those of validation too, with the code that means that nothing was done."""
    for name in ("a", "b", "c"):
        (folder / "masks" / f"{name}.nii.gz").write_bytes(b"no mask")
    assert train_pairs(folder, folder / "out") == 2
    error = capsys.readouterr().err
    assert "3 of 3 cases cannot be used" in error
    assert all(f"{name}.nii.gz" in error for name in "abc")
    (folder / "images" / "b.nii.gz").write_bytes(b"no image")
    assert train_images(folder, folder / "out") == 2
    assert "1 of 3 cases cannot be used" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_channels_are_no_cases_of_their_own(folder, bundle, capsys):
    (folder / "images" / "a.nii.gz").rename(folder / "images" / "a_0000.nii.gz")
    (folder / "images" / "a_0001.nii.gz").write_bytes((folder / "images" / "b.nii.gz").read_bytes())
    assert run("predict", "-i", folder / "images", "-o", folder / "out", "-m", bundle) == 1
    said = capsys.readouterr()
    assert "2 of 4 cases failed" in said.err
    assert "a_0000.nii.gz and a_0001.nii.gz are channels of one case" in said.err
    assert sorted(path.name for path in (folder / "out").glob("*_report.json")) == ["b_report.json", "c_report.json"]
    for begin in (train_pairs, train_images):
        assert begin(folder, folder / "net") == 2
        assert "a_0000.nii.gz and a_0001.nii.gz are channels of one case" in capsys.readouterr().err


def several(kind: str) -> Bundle:
    bundle = tiny_bundle(rcu_levels=())
    network = GRCSF(2, features=(4, 8, 8), rcu_levels=(), **{"in_channels": 1, "out_channels": 1} | {kind: 2})
    return Bundle(network, None, bundle.preprocessing)


@pytest.mark.parametrize("kind", ["in_channels", "out_channels"])
def test_networks_of_several_channels_are_refused(folder, capsys, kind):
    with pytest.raises(BundleError, match=f"bundle: expected {kind} 1 of its network, found 2"):
        Predictor(several(kind))
    saved = saved_before(several(kind), folder / "several")
    assert run("predict", "-i", folder / "images", "-o", folder / "out", "-m", saved) == 2
    assert f"expected {kind} 1 of its network, found 2" in capsys.readouterr().err
    assert train_pairs(folder, folder / "out", "--initial", saved) == 2
    assert f"{saved}: expected {kind} 1 of its network, found 2" in capsys.readouterr().err


def test_an_autoencoder_of_several_channels_is_refused(folder, capsys):
    mae = MaskedAutoencoder(2, 3, 8, embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1)
    saved = saved_before(Bundle(None, mae, tiny_bundle().preprocessing), folder / "several")
    assert train_images(folder, folder / "out", "--initial", saved) == 2
    assert f"{saved}: expected in_channels 1 of its mae, found 3" in capsys.readouterr().err


@pytest.mark.parametrize("begin", [train_pairs, pytest.param(train_images, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), pytest.param("SIGHUP", 129, marks=pytest.mark.slow)]
)
def test_a_signal_in_a_training(folder, monkeypatch, capsys, begin, name, code):
    """The exit code, and how to go on; then what went on is what an undisturbed training gives."""
    before = signal.signal(signal.Signals[name], signal.default_int_handler)
    try:
        sample, steps = sampling.sample_crops, []

        def interrupted(*arguments):
            steps.append(1)
            if len(steps) == 2:
                os.kill(os.getpid(), signal.Signals[name])
            return sample(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(autoencoder, "sample_crops", interrupted)
            patch.setattr(network, "sample_crops", interrupted)
            assert begin(folder, folder / "out") == code
    finally:
        signal.signal(signal.Signals[name], before)
    said = capsys.readouterr().err
    assert "stopped after step 2 of 6; step 2 is saved, and the same command with --resume goes on from there" in said
    assert "Traceback" not in said
    assert begin(folder, folder / "out", "--resume") == 0
    assert begin(folder, folder / "undisturbed") == 0
    first, second = ((folder / name / "bundle" / "model.safetensors").read_bytes() for name in ("out", "undisturbed"))
    assert first == second


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_before_the_first_step(folder, monkeypatch, capsys, name):
    """While the cases are read for the first time."""
    real = FolderSource.survey

    def killed(*arguments):
        os.kill(os.getpid(), signal.Signals[name])
        return real(*arguments)

    monkeypatch.setattr(FolderSource, "survey", killed)
    before = signal.signal(signal.Signals[name], signal.default_int_handler)
    try:
        assert train_images(folder, folder / "out") == 128 + signal.Signals[name]
        assert signal.getsignal(signal.Signals[name]) is signal.default_int_handler
    finally:
        signal.signal(signal.Signals[name], before)
    assert "interrupted; the same command with --resume goes on" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_ctrl_c_while_weights_are_read(folder, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "load_bundle", interrupted)
    assert run("predict", "-i", folder / "images", "-o", folder / "out") == 130
    said = capsys.readouterr().err
    assert said == "interrupted; what is written is whole, the same command goes on from there\n"


def test_a_failure_after_the_first_step_is_not_called_bad_input(folder, monkeypatch, capsys):
    sample, steps = sampling.sample_crops, []

    def full(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise OSError(28, "No space left on device")
        return sample(*arguments)

    monkeypatch.setattr(autoencoder, "sample_crops", full)
    assert train_images(folder, folder / "out") == 1
    said = capsys.readouterr().err
    assert "error: [Errno 28] No space left on device\n  stopped after step 2 of 6; step 2 is saved" in said


def test_resume_names_what_differs(folder, capsys):
    assert train_images(folder, folder / "out", "--steps", "2") == 0
    assert train_images(folder, folder / "out", "--steps", "3", "--resume", "--learning-rate", "0.5") == 2
    assert "\n  learning_rate: the checkpoint has 0.001, now 0.5\n" in capsys.readouterr().err
    assert train_images(folder, folder / "out", "--steps", "2") == 2
    assert "go on with --resume or choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError(), ValueError("of a library"), KeyError("x"), AssertionError()])
def test_a_bug_has_its_traceback_and_a_code_of_its_own(monkeypatch, capsys, error):
    def wrong():
        raise error

    monkeypatch.setattr(info, "backend_info", wrong)
    assert main(["info"]) == 70
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert "in wrong" in said
    assert "this is a bug of grcsf-fast" in said


def test_exit_codes_are_in_the_help(capsys):
    assert main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "70 a bug of this program; 129, 130, 141, 143 ended by SIGHUP, Ctrl-C, a closed pipe, SIGTERM" in said
    assert main(["train", "--help"]) == 0
    assert "--checkpoint-minutes" in capsys.readouterr().out


def test_a_closed_pipe():
    """``grcsf-fast info | true``: no traceback, and no complaint at Python's end."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "grcsf_fast", "info"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


def test_no_output_at_all(folder, bundle, monkeypatch):
    """``>&-``: Python has no sys.stdout then."""
    monkeypatch.setattr(sys, "stdout", None)
    assert run("predict", "-i", folder / "images", "-o", folder / "out", "-m", bundle) == 0
    assert len(list((folder / "out").glob("*_report.json"))) == 3
    assert run("predict", "-i", folder / "images" / "a.nii.gz", "-o", folder / "one", "-m", bundle) == 0


def test_a_folder_run_in_another_thread(folder, bundle):
    found = []
    arguments = ("predict", "-i", folder / "images", "-o", folder / "out", "-m", bundle)
    thread = threading.Thread(target=lambda: found.append(run(*arguments)))
    thread.start()
    thread.join()
    assert found == [0]
    assert len(list((folder / "out").glob("*_report.json"))) == 3


@pytest.mark.parametrize(
    "environment", [{"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "8"}]
)
def test_one_volume_needs_no_other_process(folder, bundle, monkeypatch, environment):
    """Whatever a scheduler left in the environment."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run("predict", "-i", folder / "images" / "a.nii.gz", "-o", folder / "out", "-m", bundle) == 0
    assert (folder / "out" / "a.nii.gz").is_file()


def test_of_several_processes_the_first_does_the_one_volume(folder, bundle, monkeypatch, capsys):
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = ("predict", "-i", folder / "images" / "a.nii.gz", "-o", folder / "out", "-m", bundle)
    assert run(*arguments) == 0
    assert "process 1 of 2: one volume is work for process 0 alone" in capsys.readouterr().err
    assert not (folder / "out").exists()
    monkeypatch.setenv("RANK", "0")
    assert run(*arguments) == 0
    assert (folder / "out" / "a.nii.gz").is_file()


def precisions(output: Path) -> set[str]:
    from grcsf_fast.data.reports import read_report

    return {read_report(path)["settings"]["precision"] for path in output.glob("*_report.json")}


def test_a_folder_of_results_keeps_its_precision(folder, bundle, monkeypatch, capsys):
    """A measurement that comes out otherwise later neither mixes precisions nor does finished cases again."""
    from grcsf_fast.runtime.precision import Choice

    choice = ["bfloat16"]
    monkeypatch.setattr("grcsf_fast.runtime.precision.multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(
        "grcsf_fast.inference.model.measured_choice", lambda subject, run: Choice(choice[0], "by the test")
    )
    late = folder / "late.nii.gz"
    (folder / "images" / "c.nii.gz").rename(late)
    arguments = ("predict", "-i", folder / "images", "-o", folder / "out", "-m", bundle)
    assert run(*arguments) == 0
    assert "precision bfloat16: by the test" in capsys.readouterr().out
    late.rename(folder / "images" / "c.nii.gz")
    choice[0] = "float32"
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert f"precision bfloat16: as in the results in {folder / 'out'}" in said
    assert "2 cases were finished before" in said
    assert precisions(folder / "out") == {"bfloat16"}
    # Other settings and other folders are new decisions, and so is doing all again.
    assert run(*arguments[:4], folder / "other", *arguments[5:]) == 0
    assert precisions(folder / "other") == {"float32"}
    assert run(*arguments, "--overwrite") == 0
    assert precisions(folder / "out") == {"float32"}


def test_a_warning_is_one_line(tmp_path):
    """In a process of its own: pytest keeps warnings to itself."""
    for folder in ("truth", "predicted"):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(np.ones((9, 9, 9), np.uint8), np.eye(4)), tmp_path / folder / "a.nii.gz")
    arguments = ("-p", str(tmp_path / "predicted"), "-t", str(tmp_path / "truth"))
    command = [sys.executable, "-m", "grcsf_fast", "evaluate", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "marked as lesion" in line]
    assert len(lines) == 2
    assert all(re.fullmatch(r"warning: .*a\.nii\.gz: 100% of the volume are marked as lesion", line) for line in lines)
    assert "warnings.warn" not in done.stderr
