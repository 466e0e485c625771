"""What a survey remembers: cases that are as they were are not read again, and all others are."""

import json
import os
import time

import nibabel as nib
import numpy as np
import pytest
from pairs import AFFINE, SHAPE, write_case

from grcsf_fast.cli import main
from grcsf_fast.data.labels import Labels
from grcsf_fast.data.volumes import Preprocessing, VolumeError
from grcsf_fast.datasets import sources, survey
from grcsf_fast.datasets.cases_file import CaseList, ListedCase
from grcsf_fast.datasets.pairs import FolderSource
from grcsf_fast.datasets.sources import ListedSource
from grcsf_fast.datasets.survey import Survey
from grcsf_fast.training.checkpoint import describe_data

PREPROCESSING = Preprocessing(spacing=(4.0, 4.0, 4.0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three cases, whose times count although they were written a moment ago."""
    (tmp_path / "data").mkdir()
    for name in "abc":
        write_case(tmp_path / "data", name)
    monkeypatch.setattr(survey, "SETTLED_NS", -(10**18))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


@pytest.fixture
def read(monkeypatch):
    """Names of the cases that are read from now on, in the order of their names."""
    names, finding = [], sources.FileSource._finding

    def noted(self, name):
        names.append(name)
        return finding(self, name)

    monkeypatch.setattr(sources.FileSource, "_finding", noted)
    return names


def source(folder, preprocessing=PREPROCESSING, **others):
    return FolderSource(folder / "images", folder / "masks", preprocessing, **others)


def kept(folder):
    return list((folder.parent / "cache" / "grcsf-fast" / "cases").glob("*.json"))


def test_what_is_as_it_was_is_not_read_again(folder, read):
    first = source(folder).survey()
    assert first == Survey(3, 3, 3, [], remembered=0)
    assert sorted(read) == ["a", "b", "c"]
    read.clear()
    again = source(folder).survey()
    assert read == []
    assert again == Survey(3, 3, 3, [], remembered=3)
    assert again.text() == "3 cases, 3 with lesion, 3 on the networks' grid; 3 were read before and are unchanged"
    assert again.text(masked=False) == "3 cases; 3 were read before and are unchanged"


def test_what_has_changed_is_read_again(folder, read):
    source(folder).survey()
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE), folder / "masks" / "b.nii.gz")
    write_case(folder, "d")
    read.clear()
    assert source(folder).survey() == Survey(4, 3, 3, [], remembered=2)
    assert sorted(read) == ["b", "d"]


def test_other_voxels_of_the_same_size_and_time_are_read_again(folder, read):
    """As ``cp --preserve`` leaves them; the time of the change itself cannot be set back."""
    path = folder / "images" / "a.nii"
    (folder / "images" / "a.nii.gz").unlink()
    data = np.random.default_rng(0).normal(100, 10, SHAPE).astype(np.float32)
    nib.save(nib.Nifti1Image(data, AFFINE), path)
    source(folder).survey()
    before = path.stat()
    changed = time.time_ns()
    nib.save(nib.Nifti1Image(data + 1, AFFINE), path)
    while path.stat().st_ctime_ns <= changed:  # a clock's tick later
        nib.save(nib.Nifti1Image(data + 1, AFFINE), path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    read.clear()
    assert source(folder).survey().remembered == 2
    assert read == ["a"]


def test_files_of_a_moment_ago_are_not_remembered(folder, read, monkeypatch):
    """They may be changed once more within the same tick of a file system's clock."""
    monkeypatch.setattr(survey, "SETTLED_NS", 10**18)
    for _ in range(2):
        assert source(folder).survey().remembered == 0
    assert len(read) == 6
    assert kept(folder) == []


def test_another_reading_has_another_memory(folder, read):
    """Another grid, labels, a list's idea of lesion, or images alone."""
    source(folder).survey()
    cases = tuple(
        ListedCase(name, (folder / "images" / f"{name}.nii.gz",), (folder / "masks" / f"{name}.nii.gz",), name)
        for name in "abc"
    )
    others = [
        source(folder, Preprocessing(spacing=(3.0, 3.0, 3.0))),
        source(folder, Preprocessing(spacing=(4.0, 4.0, 4.0), margin=3)),
        source(folder, labels=Labels(("one", "any"), ((1,), (1, 2)), exclusive=False)),
        FolderSource(folder / "images", None, PREPROCESSING),
        ListedSource(CaseList("pairs", cases), cases, PREPROCESSING),
        ListedSource(CaseList("pairs", cases, labels=(1,)), cases, PREPROCESSING),
    ]
    for other in others:
        read.clear()
        assert other.survey().remembered == 0
        assert sorted(read) == ["a", "b", "c"]
    read.clear()
    assert [other.survey().remembered for other in [source(folder), *others]] == [3] * 7
    assert read == []


def test_unknown_numbers_and_lost_lesions_are_remembered(folder):
    mask = np.zeros(SHAPE, np.uint8)
    mask[8, 9, 7], mask[12:16, 12:16, 8:12] = 1, 5
    nib.save(nib.Nifti1Image(mask, AFFINE), folder / "masks" / "a.nii.gz")
    labels = Labels(("one", "any"), ((1,), (1, 2)), exclusive=False)
    first, again = (source(folder, labels=labels).survey() for _ in range(2))
    assert (first.unknown, first.vanished) == (again.unknown, again.vanished) == ((5,), ["a"])
    assert (first.remembered, again.remembered) == (0, 3)


def test_bad_cases_are_read_every_time_and_the_good_ones_once(folder, read):
    path = folder / "images" / "b.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    for others in (["a", "c"], []):
        read.clear()
        with pytest.raises(VolumeError, match=r"1 of 3 cases cannot be used:\n.*b\.nii\.gz"):
            source(folder).survey()
        assert sorted(read) == sorted([*others, "b"])


@pytest.mark.parametrize("text", ["", "[1]", '{"x": 1}', '{"x": {"content": "y"}}'])
def test_a_damaged_memory_is_none(folder, read, text):
    source(folder).survey()
    (path,) = kept(folder)
    path.write_text(text)
    assert source(folder).survey().remembered == 0
    assert source(folder).survey().remembered == 3
    assert len(read) == 6


def test_without_a_place_nothing_is_remembered(folder, read, monkeypatch):
    (folder.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "file"))
    for _ in range(2):
        assert source(folder).survey().remembered == 0
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(survey, "cache_folder", lambda kind: (_ for _ in ()).throw(RuntimeError("no home")))
    assert source(folder).survey().remembered == 0
    assert len(read) == 9


def test_two_surveys_at_once_keep_what_both_found(folder, monkeypatch):
    """The second one reads and writes while the first one is at work."""
    first, second = source(folder).part(["a", "b"]), source(folder).part(["c"])

    def second_too(names):
        yield from names
        second.survey()

    first.survey(second_too)
    assert source(folder).survey().remembered == 3


def test_the_memory_is_written_between_and_no_larger_than_it_may_be(folder, monkeypatch):
    monkeypatch.setattr(survey, "SAVE_AFTER", 1)
    monkeypatch.setattr(survey, "MOST_REMEMBERED", 2)
    written = []

    def shown(names):
        for name in names:
            yield name
            written.append([len(json.loads(path.read_text())) for path in kept(folder)])

    source(folder).survey(shown)
    assert written == [[1], [2], [2]]
    assert source(folder).survey().remembered == 2


def test_a_checkpoint_knows_the_data_by_what_the_survey_read(folder, monkeypatch):
    """By the bytes of the files, as without a survey, which no part of the source reads again."""
    expected = describe_data(source(folder))
    surveyed, remembering = source(folder), source(folder)
    surveyed.survey()
    remembering.survey()
    monkeypatch.setattr(sources, "volume_sha256", None)
    assert describe_data(surveyed) == describe_data(remembering) == expected
    part = remembering.part(["c", "a"])
    assert describe_data(part) == {"cases": {name: expected["cases"][name] for name in ("c", "a")}}
    assert (part.names, remembering.names, part[0].name) == (["c", "a"], ["a", "b", "c"], "c")


def test_the_image_that_says_what_is_lesion_counts_too(folder, read):
    """Where another channel than the one with Hounsfield units is trained on."""
    hounsfield = np.random.default_rng(0).integers(-20, 20, SHAPE).astype(np.int16)
    for name in "abc":
        nib.save(nib.Nifti1Image(hounsfield + 300, AFFINE), folder / f"{name}_ct.nii.gz")
    cases = tuple(
        ListedCase(
            name,
            (folder / f"{name}_ct.nii.gz", folder / "images" / f"{name}.nii.gz"),
            (folder / "masks" / f"{name}.nii.gz",),
            name,
        )
        for name in "abc"
    )
    listing = CaseList("pairs", cases, channels=("ct", "mr"), above_hu=130)

    def listed():
        return ListedSource(listing, cases, PREPROCESSING, channels=("mr",))

    assert listed().survey() == Survey(3, 3, 3, [])
    before = listed().content("b")
    nib.save(nib.Nifti1Image(hounsfield, AFFINE), folder / "b_ct.nii.gz")
    read.clear()
    assert listed().survey() == Survey(3, 2, 2, [], remembered=2)
    assert read == ["b"]
    assert listed().content("b") != before


def test_a_training_that_goes_on_reads_no_case_to_check_it(folder, read, capsys):
    arguments = [
        *("train", "-i", folder / "images", "-l", folder / "masks", "-o", folder / "out", "--validation", "1"),
        *("--batch-size", "2", "--crop-size", "16,16", "--crop-size-jitter", "0", "--augment", "none"),
        *("--features", "4,8,8,8", "--rcu-levels", "", "--precision", "float32", "--workers", "0", "--steps"),
    ]
    assert main([str(one) for one in [*arguments, 1]]) == 0
    assert "3 cases, 3 with lesion, 3 on the networks' grid\n" in capsys.readouterr().out
    read.clear()
    assert main([str(one) for one in [*arguments, 2, "--resume"]]) == 0
    assert read == []
    assert "3 on the networks' grid; 3 were read before and are unchanged\n" in capsys.readouterr().out
