"""Pairs of folders: what is refused when, and the survey before a training."""

import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from pairs import AFFINE, SHAPE, write_case

from grcsf_fast.cli import main
from grcsf_fast.data.labels import Labels
from grcsf_fast.data.volumes import Preprocessing, VolumeError
from grcsf_fast.datasets.cases_file import CaseList, ListedCase
from grcsf_fast.datasets.pairs import FolderSource
from grcsf_fast.datasets.sources import ListedSource
from grcsf_fast.datasets.survey import Survey
from grcsf_fast.errors import ArgumentError
from grcsf_fast.training import network


@pytest.fixture
def folder(tmp_path):
    write_case(tmp_path, "b", "_0000")
    write_case(tmp_path, "a", corner=(9, 12, 10))
    return tmp_path


def test_folder_of_pairs(folder):
    source = FolderSource(folder / "images", folder / "masks", Preprocessing())
    assert len(source) == 2
    assert source.names == ["a", "b"]
    for index in range(2):
        case = source[index]
        assert case.name == source.names[index]
        assert case.image.dtype == torch.float32
        assert case.lesion.dtype == torch.bool
        assert case.lesion.shape == case.image.shape
        assert int(case.lesion.sum()) == 64
        assert float(case.image[case.lesion].mean()) < float(case.image[~case.lesion & (case.image > 0)].mean()) - 1
        assert case.residual_maps is None
    assert source[2].name == "a"
    assert torch.equal(source[3].image, source[1].image)


def test_folder_of_images_alone(folder):
    source = FolderSource(str(folder / "images"), None, Preprocessing())
    assert source[0].lesion is None
    assert source[0].image.ndim == 3


def test_folder_with_chosen_names(folder):
    source = FolderSource(folder / "images", folder / "masks", Preprocessing(), names=["b"])
    assert len(source) == 1
    assert source[0].name == source[1].name == "b"


def test_missing_masks_are_named(folder):
    write_case(folder, "c")
    (folder / "masks" / "a.nii.gz").unlink()
    (folder / "masks" / "c.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="masks: expected a mask for every image, found none for a, c"):
        FolderSource(folder / "images", folder / "masks", Preprocessing())


def test_masks_without_an_image_do_no_harm(folder):
    (folder / "images" / "a.nii.gz").unlink()
    assert FolderSource(folder / "images", folder / "masks", Preprocessing()).names == ["b"]


@pytest.mark.parametrize(
    "mask",
    [
        nib.Nifti1Image(np.zeros((24, 26, 21), np.uint8), AFFINE),
        nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.diag([2, 2, 2, 1.0])),
    ],
)
def test_mask_of_another_grid(folder, mask):
    nib.save(mask, folder / "masks" / "b.nii.gz")
    source = FolderSource(folder / "images", folder / "masks", Preprocessing())
    assert source[0].name == "a"
    with pytest.raises(VolumeError) as caught:
        source[1]
    assert str(caught.value).startswith(f"{folder / 'masks' / 'b.nii.gz'}: expected the grid of ")
    assert str(folder / "images" / "b_0000.nii.gz") in str(caught.value)
    assert str(mask.shape) in str(caught.value)


def test_images_are_not_their_own_masks(folder):
    """The same folder, links into it, and copies of the files."""
    images = folder / "images"
    with pytest.raises(ValueError, match="found the images themselves as masks of a, b"):
        FolderSource(images, images, Preprocessing())
    (folder / "links").symlink_to(images)
    with pytest.raises(ValueError, match="found the images themselves"):
        FolderSource(images, folder / "links", Preprocessing())
    mask = folder / "masks" / "b.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(nib.load(mask).dataobj), AFFINE), images / "b_0000.nii.gz")
    for name in ("a", "b"):
        shutil.copy(next(images.glob(f"{name}*")), folder / "masks" / f"{name}.nii.gz")
    source = FolderSource(images, folder / "masks", Preprocessing())
    for index in range(2):
        with pytest.raises(
            VolumeError, match=r"masks/.\.nii\.gz: expected a mask, found the voxels of the image .* itself"
        ):
            source[index]


def test_images_given_as_labels_end_with_2(folder, capsys):
    images = str(folder / "images")
    assert main(["train", "-i", images, "-l", images, "-o", str(folder / "out"), "--rcu-levels", ""]) == 2
    assert "found the images themselves as masks of a, b" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("region", [slice(None), slice(0, 13)])
def test_masks_of_most_of_the_volume_are_refused(folder, region):
    data = np.zeros(SHAPE, np.uint8)
    data[region] = 1
    nib.save(nib.Nifti1Image(data, AFFINE), folder / "masks" / "a.nii.gz")
    with pytest.raises(
        VolumeError, match=rf"a\.nii\.gz: expected a lesion mask, found {data.mean():.0%} of the volume"
    ):
        FolderSource(folder / "images", folder / "masks", Preprocessing())[0]


def test_affines_of_a_pair_may_differ_by_a_tenth_of_a_voxel(folder):
    path = folder / "masks" / "b.nii.gz"
    data = np.asarray(nib.load(path).dataobj)
    source = FolderSource(folder / "images", folder / "masks", Preprocessing())
    expected = source[1].lesion
    for shift in (0.19, 0.21):
        moved = AFFINE.copy()
        moved[1, 3] += shift
        nib.save(nib.Nifti1Image(data, moved), path)
        if shift < 0.2:
            assert torch.equal(source[1].lesion, expected)
    with pytest.raises(VolumeError, match=r"corners up to 0\.21 mm from that grid's, where 0\.2 mm are allowed"):
        source[1]


def write_mask(folder, name, voxels):
    mask = np.zeros(SHAPE, np.uint8)
    for voxel in voxels:
        mask[voxel] = 1
    nib.save(nib.Nifti1Image(mask, AFFINE), folder / "masks" / f"{name}.nii.gz")


def test_survey_counts_lesions_before_and_after_resampling(folder):
    """One voxel of 2 mm is an eighth of one of 4 mm; a cube of 2 of them is one."""
    write_case(folder, "c")
    write_case(folder, "d")
    write_mask(folder, "b", [(8, 9, 7)])
    write_mask(folder, "c", [])
    write_mask(folder, "d", [np.s_[8:10, 8:10, 8:10]])
    shown = []
    source = FolderSource(folder / "images", folder / "masks", Preprocessing(spacing=(4.0, 4.0, 4.0)))
    survey = source.survey(lambda names: shown.extend(names) or names)
    assert survey == Survey(cases=4, with_lesion=3, kept_lesion=2, vanished=["b"])
    assert survey.text() == ("4 cases, 3 with lesion, 2 on the networks' grid; too small for it or outside the head: b")
    assert shown == source.names == ["a", "b", "c", "d"]
    assert int(source[3].lesion.sum()) == 1
    assert FolderSource(folder / "images", folder / "masks", Preprocessing(), ["a", "d"]).survey() == Survey(
        2, 2, 2, []
    )
    assert FolderSource(folder / "images", None, Preprocessing()).survey() == Survey(4, 0, 0, [])


@pytest.mark.parametrize(
    ("voxels", "found"), [([], "2 cases, 0 with lesion, 0 on"), ([(8, 9, 7)], "2 cases, 2 with lesion, 0 on")]
)
def test_survey_refuses_cases_without_any_lesion(folder, voxels, found):
    for name in ("a", "b"):
        write_mask(folder, name, voxels)
    source = FolderSource(folder / "images", folder / "masks", Preprocessing(spacing=(4.0, 4.0, 4.0)))
    with pytest.raises(VolumeError, match=f"grid of 4 x 4 x 4 mm, no case holds lesion: {found}"):
        source.survey()


def test_survey_names_every_case_that_cannot_be_used(folder):
    for index in range(12):
        write_case(folder, f"c{index:02d}")
    images, masks = folder / "images", folder / "masks"
    bad = {}
    for name, path in (("a", masks / "a.nii.gz"), ("b", images / "b_0000.nii.gz"), ("c00", images / "c00.nii.gz")):
        bad[name] = path
        path.write_bytes(path.read_bytes()[:-20])
    nib.save(nib.Nifti1Image(np.zeros((24, 26, 21), np.uint8), AFFINE), masks / "c01.nii.gz")
    nib.save(nib.Nifti1Image(np.full(SHAPE, np.nan, np.float32), AFFINE), masks / "c02.nii.gz")
    nib.save(nib.Nifti1Image(np.full(SHAPE, 7, np.uint8), AFFINE), images / "c03.nii.gz")
    (images / "c04.nii.gz").write_text("text")
    shutil.copy(images / "c05.nii.gz", masks / "c05.nii.gz")
    bad |= {"c01": masks / "c01.nii.gz", "c02": masks / "c02.nii.gz", "c03": images / "c03.nii.gz"}
    bad |= {"c04": images / "c04.nii.gz", "c05": masks / "c05.nii.gz"}
    source = FolderSource(images, masks, Preprocessing())
    with pytest.raises(VolumeError) as caught:
        source.survey()
    first, *lines = str(caught.value).splitlines()
    assert first == "8 of 14 cases cannot be used:"
    assert [line.strip().split(": ")[0] for line in lines] == [str(bad[name]) for name in sorted(bad)]
    for index in range(6, 12):
        (images / f"c{index:02d}.nii.gz").write_text("text")
    with pytest.raises(VolumeError) as caught:
        source.survey()
    lines = str(caught.value).splitlines()
    assert lines[0] == "14 of 14 cases cannot be used:"
    assert len(lines) == 12
    assert lines[-1].strip() == "and 4 more"


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_survey_compares_labels_with_the_numbers_of_masks(folder, listed, kind):
    """Of a: 1, 2 and 5; of b: 1 alone, by a voxel that is none of 4 mm."""
    mask = np.zeros(SHAPE, kind)
    mask[8:12, 9:13, 7:11], mask[8:12, 9:13, 11:13], mask[8:12, 15:17, 7:11] = 1, 2, 5
    nib.save(nib.Nifti1Image(mask, AFFINE), folder / "masks" / "a.nii.gz")
    write_mask(folder, "b", [(8, 9, 7)])

    def survey(numbers, exclusive=True):
        labels = numbers and Labels(("rim", "core"), numbers, exclusive)
        preprocessing = Preprocessing(spacing=(4.0, 4.0, 4.0))
        if not listed:
            return FolderSource(folder / "images", folder / "masks", preprocessing, labels=labels).survey()
        files = [
            (name, next((folder / "images").glob(f"{name}*")), folder / "masks" / f"{name}.nii.gz") for name in "ab"
        ]
        cases = tuple(ListedCase(name, (image,), (mask,), name) for name, image, mask in files)
        return ListedSource(CaseList("pairs", cases), cases, preprocessing, labels=labels).survey()

    found = survey(((1,), (2,)))
    assert found == Survey(2, 2, 1, ["b"], (5,))
    assert found.text().endswith("head: b; of no label, and so background, are the numbers 5 of masks")
    assert survey(((1, 5, 7), (2,)), False).unknown == ()
    with pytest.raises(
        ArgumentError, match=r"labels: expected core=3 in some mask on the grid of 4 x 4 x 4 mm, found 1, 2, 5$"
    ):
        survey(((1,), (3,)))
    if listed:
        assert survey(None) == Survey(2, 2, 1, ["b"])


def test_a_label_that_no_mask_holds_stops_a_training(folder, capsys):
    arguments = ["train", "-i", folder / "images", "-l", folder / "masks", "-o", folder / "out", "--rcu-levels", ""]
    assert main([str(one) for one in [*arguments, "--classes", "rim=1,core=4"]]) == 2
    assert "error: labels: expected core=4 in some mask" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_two_images_of_one_case_are_refused(folder):
    """``a`` and ``a_0000`` would otherwise hide one another."""
    write_case(folder, "a", "_0000")
    with pytest.raises(ValueError, match="same case"):
        FolderSource(folder / "images", folder / "masks", Preprocessing())


def test_unknown_name_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="nobody"):
        FolderSource(folder / "images", folder / "masks", Preprocessing(), names=["a", "nobody"])


def test_defaults_of_torch_change_nothing(folder):
    source = FolderSource(folder / "images", folder / "masks", Preprocessing(spacing=(3.0, 3.0, 3.0)))
    expected = source[0]
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found, survey = source[0], source.survey()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for ours, theirs in ((found.image, expected.image), (found.lesion, expected.lesion)):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert torch.equal(ours, theirs)
    assert survey == source.survey()


def test_a_training_holds_subjects_out_whole(tmp_path, monkeypatch):
    """Two sessions each of three subjects: one session asked for, both of its subject held out."""
    for subject in "123":
        for session in "12":
            write_case(tmp_path, f"sub-{subject}_ses-{session}")
    seen = []
    monkeypatch.setattr(network, "train_network", lambda *arguments: seen.append(arguments) or tmp_path)
    for seed in range(3):
        arguments = ["train", "-i", tmp_path / "images", "-l", tmp_path / "masks", "-o", tmp_path / f"out{seed}"]
        arguments += ["--rcu-levels", "", "--features", "4,8", "--crop-size", "16,16", "--crop-size-jitter", "0"]
        assert main([str(one) for one in [*arguments, "--validation", 1, "--seed", seed]]) == 0
        _, _, source, validation, _ = seen.pop()
        held = [case.name for case in validation]
        assert len({name[:5] for name in held}) == 1
        assert sorted(held + source.names) == sorted(path.name[:-7] for path in (tmp_path / "masks").iterdir())
        assert len(held) == 2
