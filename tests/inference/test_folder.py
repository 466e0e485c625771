"""Folder runs: resumed by content, killed at any moment, shared by processes, bad entries among good ones."""

import csv
import json
import os
import random
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import predict
from heads import noise, tiny_bundle, write

from grcsf_fast import Predictor
from grcsf_fast.data.files import find_cases
from grcsf_fast.inference import sources
from grcsf_fast.inference.folder import is_finished
from grcsf_fast.inference.plan import shard
from grcsf_fast.pretrained.bundle import save_bundle
from grcsf_fast.runtime.processes import World
from grcsf_fast.synthesis.subjects import synthesize_subject
from grcsf_fast.synthesis.template import load_template

CASES = 8
KILLS = 20
MOMENTS = Path(__file__).parents[1] / "helpers" / "moments.py"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    made = tiny_bundle()
    return save_bundle(replace(made, probability_threshold=0.5), tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Volumes from one subject at 6 mm."""
    folder = tmp_path_factory.mktemp("many")
    subject = synthesize_subject(load_template(6.0), 5, skull=False)
    data = subject.image.numpy()
    for number in range(CASES):
        noisy = data + noise(*data.shape) * number
        write(folder / f"case {number:02d}.nii.gz", noisy[:, :, number % 4 :].astype(np.float32), subject.affine)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """What a run leaves, the summary's times apart."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "summary.csv"}


def summary(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "summary.csv").open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def undisturbed(bundle, folder, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed")
    assert predict("-i", folder, "-o", output, "-m", bundle) == 0
    assert {row["status"] for row in summary(output).values()} == {"done"}
    assert all(float(row["seconds"]) > 0 for row in summary(output).values())
    found = contents(output)
    assert len(found) == 5 * CASES + 1
    return found


def test_finished_cases_are_left_alone(bundle, folder, undisturbed, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ("-i", folder, "-o", output, "-m", bundle)
    assert predict(*arguments) == 0
    assert contents(output) == undisturbed
    written = {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
    capsys.readouterr()
    assert predict(*arguments) == 0
    assert f"{CASES} cases were finished before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")} == written
    # Damaged, missing and altered files are made again, the others are not.
    (output / "case 01.nii.gz").write_bytes(b"")
    (output / "case 02_residual50.nii.gz").unlink()
    (output / "case 03_report.json").write_text("{")
    assert predict(*arguments) == 0
    assert f"{CASES - 3} cases were finished before" in capsys.readouterr().out
    assert contents(output) == undisturbed
    assert predict(*arguments, "--overwrite") == 0
    assert "finished before" not in capsys.readouterr().out


def test_other_settings_weights_or_inputs_are_other_cases(bundle, folder, tmp_path):
    name, output = "case 00", tmp_path / "out"
    source = tmp_path / "in" / f"{name}.nii.gz"
    source.parent.mkdir()
    source.write_bytes((folder / source.name).read_bytes())
    arguments = ("-i", source.parent, "-o", output, "-m", bundle, "--precision", "float32")
    assert predict(*arguments) == 0
    predictor = Predictor.from_pretrained(bundle, precision="float32")
    report = output / f"{name}_report.json"
    outputs = [f"{name}_residual50.nii.gz", f"{name}_residual75.nii.gz", f"{name}_overlay.png", f"{name}.nii.gz"]
    assert is_finished(report, source, predictor.settings(), outputs)
    assert not is_finished(report, source, predictor.settings(), outputs[2:])
    for other in ({"precision": "bfloat16"}, {"batch_size": 4}, {"importance_threshold": 0.5}):
        settings = Predictor.from_pretrained(bundle, **{"precision": "float32", **other}).settings()
        assert not is_finished(report, source, settings, outputs)
    changed = Predictor(tiny_bundle(gcu=False), precision="float32")
    assert not is_finished(report, source, changed.settings(), outputs)
    source.write_bytes((folder / "case 01.nii.gz").read_bytes())
    assert not is_finished(report, source, predictor.settings(), outputs)


def test_files_that_no_longer_belong_to_a_case_go(bundle, folder, tmp_path):
    """A mask of new settings never lies beside maps of old ones."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.nii.gz").write_bytes((folder / "case 00.nii.gz").read_bytes())
    assert predict("-i", source, "-o", output, "-m", bundle) == 0
    assert predict("-i", source, "-o", output, "-m", bundle, "--no-maps", "--no-overlay") == 0
    assert sorted(path.name for path in output.iterdir()) == ["a.nii.gz", "a_report.json", "index.html", "summary.csv"]


def start(*arguments, **variables) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | variables,
        # A test run in the background of a shell ignores Ctrl-C, and what it starts would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def predict_until(name: str, count: int, when: str, place: str, *arguments) -> tuple[int, str]:
    """Exit status and output of a folder run that gets a signal at that call; see moments.py."""
    running = start(MOMENTS, name, count, when, place, "predict", *arguments)
    text = running.communicate()[0]
    return running.returncode, text


def finals_are_whole(output: Path, undisturbed: dict[str, bytes]) -> int:
    """Every file under a final name is the undisturbed run's, to the bit; how many there are."""
    found = [path for path in output.iterdir() if not path.name.startswith(".")] if output.is_dir() else []
    for path in found:
        if path.name != "summary.csv":
            assert path.read_bytes() == undisturbed[path.name], path.name
    return len(found)


def test_killed_between_two_files_of_a_case(bundle, folder, undisturbed, tmp_path):
    """SIGKILL when the second case has two of its five files: it is made again, the first one is not."""
    output = tmp_path / "out"
    arguments = ("-i", folder, "-o", output, "-m", bundle, "--threads", "1")
    code, text = predict_until("SIGKILL", 8, "before", "pathlib:Path.replace", *arguments)
    assert code == -signal.SIGKILL, text
    assert len(list(output.glob(".partial-*"))) == 3
    assert finals_are_whole(output, undisturbed) == 7
    running = start("-m", "grcsf_fast", "predict", *arguments)
    text = running.communicate()[0]
    assert running.returncode == 0, text
    assert "1 cases were finished before" in text
    assert contents(output) == undisturbed
    assert {row["status"] for row in summary(output).values()} == {"done"}


@pytest.mark.slow
def test_killed_twenty_times(bundle, folder, undisturbed, tmp_path):
    """While files are written, renamed or flushed, inside a batch, before the summary: what is there is whole."""
    output = tmp_path / "out"
    arguments = ("-i", folder, "-o", output, "-m", bundle, "--threads", "2")
    places = (
        "pathlib:Path.replace",
        "os:fsync",
        "grcsf_fast.networks.stream:Stream.step",
        "grcsf_fast.inference.prediction:save_on_grid",
        "grcsf_fast.inference.prediction:sha256",
        "grcsf_fast.inference.overlay:save_overlay",
        "grcsf_fast.inference.record:Record._write_summary",
    )
    chance = random.Random(0)
    kills, partial, grown = 0, 0, []
    while kills < KILLS:
        place = places[kills % len(places)]
        count = 1 if place.endswith("_write_summary") else chance.randint(1, 9)
        code, text = predict_until("SIGKILL", count, chance.choice(("before", "after")), place, *arguments)
        # What is left of a folder may have fewer calls than that.
        assert code in (-signal.SIGKILL, 0), f"{place} {count}: {text}"
        kills += code != 0
        partial += any(path.name.startswith(".partial-") for path in output.iterdir())
        grown.append(finals_are_whole(output, undisturbed))
        if len(list(output.glob("*_report.json"))) == CASES:
            # All done: begin again from nothing, so that every kill falls into work.
            for path in output.iterdir():
                path.unlink()
    assert partial > 0
    assert max(grown) > min(grown)
    assert predict(*arguments) == 0
    assert contents(output) == undisturbed
    assert {row["status"] for row in summary(output).values()} == {"done"}


@pytest.mark.parametrize(("name", "code"), [pytest.param("SIGINT", 130, marks=pytest.mark.slow), ("SIGTERM", 143)])
def test_interrupted_cleanly(bundle, folder, undisturbed, tmp_path, name, code):
    """While the second case's row is written down: those with a report are in the summary, the others are missing."""
    output = tmp_path / "out"
    found, text = predict_until(
        name,
        2,
        "before",
        "grcsf_fast.inference.record:Done.row",
        "-i",
        folder,
        "-o",
        output,
        "-m",
        bundle,
        "--threads",
        "1",
    )
    assert found == code, text
    assert "goes on from there" in text
    assert "Traceback" not in text
    assert not list(output.glob(".partial-*"))
    assert finals_are_whole(output, undisturbed) >= 2 * 5
    rows = summary(output)
    assert len(rows) == CASES
    statuses = {name: "done" if (output / f"{name}_report.json").exists() else "missing" for name in rows}
    assert {name: row["status"] for name, row in rows.items()} == statuses


def torchrun(*arguments) -> subprocess.Popen:
    return start(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--local-addr", "127.0.0.1", *arguments
    )


@pytest.mark.slow
def test_two_processes_give_the_files_of_one(bundle, folder, undisturbed, tmp_path):
    output = tmp_path / "out"
    running = torchrun("-m", "grcsf_fast", "predict", "-i", folder, "-o", output, "-m", bundle)
    text = running.communicate()[0]
    assert running.returncode == 0, text
    assert contents(output) == undisturbed
    rows = summary(output)
    assert {row["status"] for row in rows.values()} == {"done"}
    assert all(row["seconds"] for row in rows.values())


@pytest.mark.slow
def test_a_process_that_dies_loses_no_case_of_others(bundle, folder, undisturbed, tmp_path):
    """SIGKILL of one of two, with its second case in work: the command ends, and run again does what is left."""
    output = tmp_path / "out"
    dying = ("SIGKILL", 2, "before", "grcsf_fast.inference.prediction:Prediction.save", "predict")
    running = torchrun(MOMENTS, *dying, "-i", folder, "-o", output, "-m", bundle)
    text = running.communicate()[0]
    assert running.returncode != 0, text
    assert finals_are_whole(output, undisturbed) >= 5
    assert len(list(output.glob("*_report.json"))) < CASES
    assert predict("-i", folder, "-o", output, "-m", bundle) == 0
    assert contents(output) == undisturbed


def test_shares_are_disjoint_and_even():
    sizes = {f"c{number}": 1000 + 37 * (number * 7 % 11) for number in range(23)}
    for world in (1, 2, 5, 30):
        parts = [shard(sizes, World(rank, world)) for rank in range(world)]
        assert sorted(name for part in parts for name in part) == sorted(sizes)
        loads = [sum(sizes[name] for name in part) for part in parts]
        assert max(loads) - min(loads) <= max(sizes.values())
    assert shard(sizes, World(1, 2)) == shard(dict(reversed(sizes.items())), World(1, 2))


def lying_header(path: Path, name: str) -> Path:
    """A header of 3 GB of voxels in a file of a few hundred bytes."""
    small = write(path / "small.nii", noise(4, 4, 4))
    raw = bytearray(small.read_bytes())
    small.unlink()
    struct.pack_into("<8h", raw, 40, 3, 1024, 1024, 768, 1, 1, 1, 1)
    target = path / name
    if name.endswith(".gz"):
        import gzip

        target.write_bytes(gzip.compress(bytes(raw)))
    else:
        target.write_bytes(bytes(raw))
    return target


def test_bad_entries_among_good_ones(bundle, folder, tmp_path, capsys):
    """Each is named with its reason, and all good ones are done."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    good = (folder / "case 00.nii.gz").read_bytes()
    (source / "läsion größe 1.nii.gz").write_bytes(good)
    (source / "with space.nii.gz").write_bytes(good)
    (source / "link.nii.gz").symlink_to(folder / "case 01.nii.gz")
    (source / "twice.nii.gz").write_bytes(good)
    nib.save(nib.load(folder / "case 00.nii.gz"), source / "twice.nii")
    (source / "loop.nii.gz").symlink_to(source / "loop.nii.gz")
    (source / "nowhere.nii").symlink_to(source / "not there")
    (source / "nothing.nii.gz").write_bytes(b"")
    (source / "text.nii.gz").write_bytes(b"this is text")
    (source / "cut.nii.gz").write_bytes(good[: len(good) // 2])
    write(source / "four.nii", noise(6, 6, 6, 3))
    write(source / "empty.nii", noise(0, 4, 4))
    write(source / "flat.nii", np.full((9, 9, 9), 7, np.int16))
    write(source / "nan.nii", np.full((9, 9, 9), np.nan, np.float32))
    lying_header(source, "lie.nii")
    lying_header(source, "packed lie.nii.gz")
    os.mkfifo(source / "pipe.nii")
    (source / "folder.nii").mkdir()
    (source / "notes.txt").write_text("not a case")
    assert predict("-i", source, "-o", output, "-m", bundle) == 1
    done = {"läsion größe 1", "with space", "link"}
    assert {path.name.removesuffix("_report.json") for path in output.glob("*_report.json")} == done
    failures = json.loads((output / "failures.json").read_text())
    expected = {
        "twice.nii.gz": "twice.nii and twice.nii.gz are the same case",
        "twice.nii": "twice.nii and twice.nii.gz are the same case",
        "loop.nii.gz": "found a link to nothing", "nowhere.nii": "found a link to nothing",
        "pipe.nii": "found no regular file", "nothing": "expected a NIfTI volume", "text": "expected a NIfTI volume",
        "cut": "reading them failed", "four": "expected one 3-D volume", "empty": "empty", "flat": "constant volume",
        "nan": "NaN or infinite", "lie": "voxels of 3221225472 bytes", "packed lie": "no compressed file of",
    }  # fmt: skip
    assert set(failures) == set(expected)
    for name, reason in expected.items():
        assert reason in failures[name]["error"], name
    error = capsys.readouterr().err
    assert f"{len(expected)} of {len(expected) + len(done)} cases failed" in error
    rows = summary(output)
    assert {name for name, row in rows.items() if row["status"] == "done"} == done
    assert all(reason in rows[name]["error"] for name, reason in expected.items())
    # Once they are gone, so is their record.
    for path in source.iterdir():
        if path.name.split(".")[0] not in done and not path.is_dir():
            path.unlink()
    assert predict("-i", source, "-o", output, "-m", bundle) == 0
    assert not (output / "failures.json").exists()


def test_nothing_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none"):
        find_cases(tmp_path)
    assert predict("-i", tmp_path, "-o", tmp_path / "out") == 2


def test_memory_that_cannot_be(folder, tmp_path, capsys):
    assert predict("-i", folder, "-o", tmp_path, "--memory", "0") == 2
    assert "--memory" in capsys.readouterr().err


def test_a_bad_case_among_two_processes(bundle, folder, tmp_path):
    """The first process writes everything and gives the exit code, whichever process had the bad case."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(2):
        (source / f"good{number}.nii.gz").write_bytes((folder / f"case {number:02d}.nii.gz").read_bytes())
    for number in range(3):
        write(source / f"flat{number}.nii", np.full((9, 9, 9), 7, np.int16))
    running = torchrun("-m", "grcsf_fast", "predict", "-i", source, "-o", output, "-m", bundle)
    text = running.communicate()[0]
    assert running.returncode == 1, text
    assert "3 of 5 cases failed" in text
    assert set(json.loads((output / "failures.json").read_text())) == {"flat0", "flat1", "flat2"}
    assert sorted(row["status"] for row in summary(output).values()) == ["done", "done", "failed", "failed", "failed"]


def test_names_that_are_no_utf8(bundle, folder, tmp_path, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    name = os.fsdecode(b"gr\xf6sse.nii.gz")
    (source / name).write_bytes((folder / "case 00.nii.gz").read_bytes())
    assert predict("-i", source, "-o", output, "-m", bundle) == 0
    assert (output / name).is_file()
    assert "gr\\udcf6sse: " in capsys.readouterr().out
    assert b"gr\xf6sse" in (output / "summary.csv").read_bytes()


def test_a_file_that_changes_while_it_is_read(bundle, folder, tmp_path, monkeypatch, capsys):
    """The hash in a report is that of the bytes segmented, or there is no report."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    path = source / "a.nii.gz"
    path.write_bytes((folder / "case 00.nii.gz").read_bytes())
    real = sources.load_image

    def load(given):
        volume = real(given)
        path.write_bytes((folder / "case 01.nii.gz").read_bytes())
        return volume

    monkeypatch.setattr(sources, "load_image", load)
    assert predict("-i", source, "-o", output, "-m", bundle) == 1
    assert "a.nii.gz: expected a file at rest" in capsys.readouterr().err
    assert not (output / "a.nii.gz").exists()


def test_an_interrupted_run_keeps_the_record_of_earlier_failures(bundle, folder, tmp_path, monkeypatch):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "good.nii.gz").write_bytes((folder / "case 00.nii.gz").read_bytes())
    write(source / "flat.nii", np.full((9, 9, 9), 7, np.int16))
    assert predict("-i", source, "-o", output, "-m", bundle) == 1
    record, before = (output / "failures.json").read_bytes(), summary(output)

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("grcsf_fast.inference.folder.in_lanes", interrupted)
    assert predict("-i", source, "-o", output, "-m", bundle) == 130
    assert (output / "failures.json").read_bytes() == record
    # The report of a finished case says so; one that failed is looked at again.
    found = summary(output)
    assert {name: row["status"] for name, row in found.items()} == {"good": "done", "flat": "missing"}
    assert found["good"]["lesion_count"] == before["good"]["lesion_count"] != ""
    # Of one that failed since, the report is from before.
    (source / "good.nii.gz").unlink()
    write(source / "good.nii.gz", np.full((9, 9, 9), 7, np.int16))
    monkeypatch.undo()
    assert predict("-i", source, "-o", output, "-m", bundle) == 1
    monkeypatch.setattr("grcsf_fast.inference.folder.in_lanes", interrupted)
    assert predict("-i", source, "-o", output, "-m", bundle) == 130
    assert {row["status"] for row in summary(output).values()} == {"missing"}


def test_settings_of_the_bundle_are_settings(bundle):
    """Everything of config.json that decides a result, not the weights alone."""
    made = tiny_bundle()
    settings = Predictor(made).settings()
    assert settings == json.loads(json.dumps(settings))
    for changed in (
        {"preprocessing": replace(made.preprocessing, modality="ct")},
        {"residual_maps": replace(made.residual_maps, rounds=2)},
        {"roi_size": (8, 8)},
        {"tta_flip": True},
    ):
        assert Predictor(replace(made, **changed)).settings() != settings
