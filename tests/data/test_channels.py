"""Several channels of a case: the same volume however they come, and what does not belong together is refused."""

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.data.channels import Channels, as_channels, find_images, load_image
from grcsf_fast.data.volumes import VolumeError
from grcsf_fast.errors import ArgumentError
from grcsf_fast.inference.sources import as_source, name_of, read_volume

GRID = np.diag([2.0, 3.0, 4.0, 1.0])
DATA = np.random.default_rng(0).random((2, 5, 6, 7), dtype=np.float32)


def save(path, data, affine=GRID):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def pair(folder, case="a"):
    return [save(folder / f"{case}_{number:04d}.nii.gz", one) for number, one in enumerate(DATA)]


def test_however_they_come_the_volume_is_the_same(tmp_path):
    paths = pair(tmp_path)
    whole = save(tmp_path / "whole.nii.gz", np.moveaxis(DATA, 0, 3))
    sources = {
        "list": paths,
        "first file": paths[0],
        "4-D file": whole,
        "4-D image": nib.load(whole),
        "images": [nib.Nifti1Image(one, GRID) for one in DATA],
        "array": as_source(DATA, GRID, 2),
    }
    for name, source in sources.items():
        volume = read_volume(as_channels(source, 2))
        assert np.array_equal(volume.data, DATA[0]), name
        assert len(volume.others) == 1, name
        assert np.array_equal(volume.others[0], DATA[1]), name
        assert np.array_equal(volume.affine, GRID), name
        assert len(volume.sha256) == 64, name
    image = as_channels(sources["4-D image"], 2)
    assert (name_of(image, "volume"), read_volume(image).name) == ("whole", str(whole))


@pytest.mark.parametrize(
    ("affine", "shape"),
    [(GRID + np.eye(4, k=3), (5, 6, 7)), (GRID, (5, 6, 8)), (GRID @ np.diag([1, 1, -1, 1]), (5, 6, 7))],
)
def test_channels_on_several_grids(tmp_path, affine, shape):
    """Side by side their voxels would be of different places."""
    first, _ = pair(tmp_path)
    second = save(tmp_path / "other.nii.gz", np.random.default_rng(1).random(shape, dtype=np.float32), affine)
    with pytest.raises(VolumeError, match=r"^case: channel 1 \(flair\): .*expected the grid of"):
        load_image(Channels("case", (first, second), ("t1", "flair")))


def test_other_numbers_of_channels(tmp_path):
    paths = pair(tmp_path)
    with pytest.raises(ArgumentError, match=r"^a: expected 3 channels, as the networks take, got 2"):
        as_channels(paths, 3)
    with pytest.raises(ArgumentError, match=r"^a: expected 1 channel, as the networks take, got 2"):
        as_channels(paths, 1)
    for count in (1, 3):
        image = nib.Nifti1Image(np.zeros((5, 6, 7, count), np.float32), GRID)
        with pytest.raises(
            ArgumentError, match=r"^source: expected 2 channels as the fourth axis, got shape \(5, 6, 7"
        ):
            as_channels(image, 2)
        path = save(tmp_path / f"whole{count}.nii.gz", np.zeros((5, 6, 7, count), np.float32))
        with pytest.raises(VolumeError, match=r"whole.*expected"):
            as_channels(path, 2)
        with pytest.raises(ArgumentError, match=r"^source: expected \(2, X, Y, Z\), got shape"):
            as_source(np.zeros((count, 5, 6, 7), np.float32), GRID, 2)
    assert as_channels([paths[0]], 1) == paths[0]


def test_files_of_a_folder_that_do_not_fit(tmp_path):
    for case in ("good", "gap", "surplus", "twice"):
        pair(tmp_path, case)
    (tmp_path / "gap_0001.nii.gz").unlink()
    save(tmp_path / "surplus_0002.nii.gz", DATA[0])
    save(tmp_path / "twice_0001.nii", DATA[0])
    pair(tmp_path, "same")
    save(tmp_path / "same.nii.gz", np.moveaxis(DATA, 0, 3))
    cases, problems = find_images(tmp_path, 2)
    assert set(cases) == {"good"}
    said = {name: str(error) for name, error in problems.items()}
    assert "expected channel 1 in" in said["gap"]
    assert "expected channels 0 to 1, found channel 2 too" in said["surplus"]
    assert "twice_0001.nii and twice_0001.nii.gz are the same channel 1; keep one of them" in said["twice"]
    assert "are the same case; keep one" in said["same"]
    # By itself as in the folder: its channels are not those of the networks.
    for name in ("surplus_0000.nii.gz", "surplus_0002.nii.gz"):
        with pytest.raises(ArgumentError, match=r"^surplus: expected channels 0 to 1, found channel 2 too"):
            find_images(tmp_path / name, 2)
    (tmp_path / "good_0001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"^good: expected channel 1 in .*, found no file"):
        load_image(cases["good"])
