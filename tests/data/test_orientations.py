"""Masks that are stored with other axes than their images: every voxel stays where it is in the patient."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.cli import main
from grcsf_fast.data.masks import Mask, as_stored, check_grid, load_masks, load_numbers, read_masks
from grcsf_fast.data.volumes import Preprocessing, VolumeError
from grcsf_fast.datasets.cases_file import CaseList, ListedCase
from grcsf_fast.datasets.lesions import load_lesion
from grcsf_fast.datasets.pairs import FolderSource
from grcsf_fast.datasets.sources import ListedSource

SHAPE = (20, 18, 13)  # all different, as are the voxels' edges
STRAIGHT = np.diag([-1.0, 1.5, 4.0, 1.0])
STRAIGHT[:3, 3] = [9, -14, -20]
ALL = [np.stack([axes, turns], 1) for axes in permutations(range(3)) for turns in product((1, -1), repeat=3)]


def oblique(*angles):
    turned = np.eye(4)
    turned[:3, :3] = nib.eulerangles.euler2mat(*angles)
    return turned @ STRAIGHT


AFFINES = [STRAIGHT, oblique(0.3, -0.2, 0.15), oblique(0.78, 0.7, -0.76)]


def numbers(affine=STRAIGHT):
    """Of no symmetry: 1 to the left of the patient, 2 in another corner."""
    values = np.zeros(SHAPE, np.uint8)
    values[2:5, 3:10, 4:6] = 1
    values[15, 12:14, 7:11] = 2
    values[0, 0, 0] = 3
    return nib.Nifti1Image(values, affine)


def in_mm(voxels, affine):
    """Where the voxels of each number lie, in order."""
    found = {}
    for number in (1, 2, 3):
        places = nib.affines.apply_affine(affine, np.argwhere(voxels == number)).round(3) + 0.0
        found[number] = sorted(map(tuple, places.tolist()))
    return found


@pytest.mark.parametrize("affine", AFFINES, ids=["straight", "oblique", "in between"])
def test_all_48_orientations_are_one_mask(tmp_path, affine):
    image = numbers(affine)
    expected = in_mm(np.asarray(image.dataobj), affine)
    for number, turns in enumerate(ALL):
        other = image.as_reoriented(turns)
        mask = Mask(np.asarray(other.dataobj), other.affine, "m", (1,))
        found = as_stored(mask, SHAPE, affine)
        assert (found is mask) == (number == 0)
        assert np.array_equal(found.voxels, np.asarray(image.dataobj))
        assert in_mm(found.voxels, found.affine) == expected
        check_grid(found, "i", SHAPE, affine)
        if number:
            with pytest.raises(VolumeError, match="; only its axes have another order or direction: nibabel's as_reo"):
                check_grid(mask, "i", SHAPE, affine)


def test_files_of_one_case_are_turned_to_the_first(tmp_path):
    whole = numbers()
    values = np.asarray(whole.dataobj)
    parts = [nib.Nifti1Image(np.where(values == number, values, 0), STRAIGHT) for number in (1, 2, 3)]
    paths = [tmp_path / f"{number}.nii.gz" for number in range(3)]
    for path, part, turns in zip(paths, parts, (ALL[0], ALL[13], ALL[30]), strict=True):
        nib.save(part.as_reoriented(turns), path)
    assert np.array_equal(load_numbers(paths, None, "", range(1, 4)).voxels, values)
    assert np.array_equal(load_masks(paths).voxels, values > 0)
    grid = Mask(values, STRAIGHT, "grid", ())
    for path, number in zip(paths, (1, 2, 3), strict=True):
        assert np.array_equal(read_masks([path], grid).marked([number]).voxels, values == number)


@pytest.mark.parametrize("change", ["moved", "mirrored", "cut", "scaled"])
def test_another_place_is_still_refused(tmp_path, change):
    """Also the voxels of a mirrored copy that are stored at the same numbers: only the affine tells the sides apart."""
    other = numbers().as_reoriented(ALL[13])
    affine, values = other.affine.copy(), np.asarray(other.dataobj)
    if change == "moved":
        affine[0, 3] += 0.2
    elif change == "mirrored":
        affine[0] *= -1
    elif change == "scaled":
        affine[:3, 0] *= 1.1
    else:
        values = values[:-1]
    mask = Mask(values, affine, "m", (1,))
    assert as_stored(mask, SHAPE, STRAIGHT) is mask
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "m.nii")
    with pytest.raises(VolumeError, match=r"expected the grid of g \(20, 18, 13\), found .* mm are allowed$"):
        read_masks([tmp_path / "m.nii"], Mask(np.zeros(SHAPE, bool), STRAIGHT, "g", ()))


@pytest.fixture
def folder(tmp_path):
    """Two cases with masks as ``as_closest_canonical`` and another program would store them, and as they are."""
    for name in ("images", "second", "plain", "turned"):
        (tmp_path / name).mkdir()
    for number, (name, turns) in enumerate({"a": ALL[3], "b": ALL[29]}.items()):
        rng = np.random.default_rng(number)
        for kind in ("images", "second"):
            head = np.zeros(SHAPE, np.float32)
            head[1:19, 1:17, 1:12] = rng.uniform(90, 110, (18, 16, 11))
            nib.save(nib.Nifti1Image(head, STRAIGHT), tmp_path / kind / f"{name}.nii.gz")
        nib.save(numbers(), tmp_path / "plain" / f"{name}.nii.gz")
        nib.save(numbers().as_reoriented(turns), tmp_path / "turned" / f"{name}.nii.gz")
    return tmp_path


@pytest.mark.filterwarnings("ignore:.* are merged into one lesion mask")
def test_trainings_see_the_same_lesions(folder):
    preprocessing = Preprocessing(spacing=(1.0, 1.5, 4.0))
    plain, turned = (FolderSource(folder / "images", folder / kind, preprocessing) for kind in ("plain", "turned"))
    for name in range(2):
        assert plain[name].lesion.sum() > 40
        assert (plain[name].lesion == turned[name].lesion).all()

    def listed(kind, channels):
        images = tuple(folder / one / "a.nii.gz" for one in ("images", "second"))
        case = ListedCase("a", images, (folder / kind / "a.nii.gz",), "a")
        listing = CaseList("pairs", (case,), ("first", "second"), above_hu=95.0 if channels == ("first",) else None)
        assert load_lesion(case, listing).voxels.sum() > 20
        return ListedSource(listing, [case], preprocessing, channels=channels)[0].lesion

    for channels in (("first",), ("second",), ("second", "first")):
        assert (listed("plain", channels) == listed("turned", channels)).all()


def test_evaluations_are_the_same(folder, capsys):
    printed = []
    for kind in ("plain", "turned"):
        run = [
            "evaluate",
            "-p",
            folder / kind,
            "-t",
            folder / "plain",
            "--classes",
            "one=1,two=2,three=3",
            "--min-lesion-ml",
            "0",
        ]
        assert main([str(argument) for argument in run]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "dice: mean 1.0000" in printed[0]
