"""The overlay: which slices it shows and which way round."""

import gc
import weakref

import nibabel as nib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from grcsf_fast.data.volumes import Preprocessing, load_volume, prepare
from grcsf_fast.inference.overlay import COLUMNS, ShownMap, _choose_slices, save_overlay


def head(shape=(40, 50, 60)) -> np.ndarray:
    volume = np.zeros(shape, np.float32)
    volume[5:-5, 5:-5, 5:-5] = 100
    return volume


def test_every_lesion_is_shown_before_more_of_the_largest():
    lesions = np.zeros((40, 50, 60), bool)
    lesions[10:30, 10:30, 20:50] = True
    lesions[12:14, 40:42, 8:10] = True
    shown = _choose_slices(head(), 60, lesions, 1.0)
    assert len(shown) == COLUMNS
    assert shown == sorted(set(shown))
    assert {8, 9} & set(shown)
    assert sum(20 <= z < 50 for z in shown) >= 4


def test_without_lesions_slices_of_the_head_are_shown():
    shown = _choose_slices(head()[::2, ::2, ::2], 60, np.zeros((40, 50, 60), bool), 1.0)
    assert len(shown) == COLUMNS
    assert all(5 <= z < 55 for z in shown)


def turned(data, affine, axes) -> nib.Nifti1Image:
    """A volume in RAS with other axes."""
    image = nib.Nifti1Image(data, affine)
    return image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    )


def watched(monkeypatch, name) -> list[tuple]:
    """The arguments of every call of a method of matplotlib's axes from here on."""
    calls, real = [], getattr(Axes, name)

    def method(self, *arguments, **settings):
        calls.append((arguments, settings))
        return real(self, *arguments, **settings)

    monkeypatch.setattr(Axes, name, method)
    return calls


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPS", "SAR"])
def test_right_is_on_the_left_and_front_is_up(axes, tmp_path, monkeypatch):
    data = head()
    data[30, 40, 28:33] = 1000  # in RAS: right and in front
    image = turned(data, np.diag([2.0, 2.0, 2.0, 1.0]), axes)
    lesion = nib.Nifti1Image((np.asarray(image.dataobj) > 500).astype(np.uint8), image.affine)
    shown, outlines = watched(monkeypatch, "imshow"), watched(monkeypatch, "add_collection")
    prepared = prepare(load_volume(image), Preprocessing(modality="ct", hu_window=(0.0, 1000.0)))
    save_overlay(tmp_path / "overlay.png", prepared, lesion, [ShownMap("residual75", prepared.data + 1, True)])
    expected = []
    for (plane,), settings in shown:
        # Of the image, and of its map.
        if plane.max() > (500 if settings["cmap"] == "gray" else 1):
            row, column = np.unravel_index(plane.argmax(), plane.shape)
            assert row < plane.shape[0] / 2
            assert column < plane.shape[1] / 2
            left, right, bottom, top = settings["extent"]
            x, y = (column + 0.5) / plane.shape[1], (row + 0.5) / plane.shape[0]
            expected.append((round(left + x * (right - left), 3), round(top + y * (bottom - top), 3)))
    lines = [line for (collection,), _ in outlines for line in collection.get_segments()]
    assert len(lines) >= 2
    # The voxel is the lesion: it lies in the middle of each outline.
    assert sorted(tuple(((line.min(0) + line.max(0)) / 2).round(3)) for line in lines) == sorted(expected)
    assert imread(tmp_path / "overlay.png").shape[2] == 4


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "IRP"])
def test_the_places_of_the_slices_are_those_shown(axes, tmp_path, monkeypatch):
    data = head() + np.arange(60, dtype=np.float32)  # so that a slice is known by its values
    image = turned(data, nib.affines.from_matvec(np.diag([2.0, 2.0, 3.0]), [-40, -70, -25]), axes)
    prepared = prepare(load_volume(image), Preprocessing((2.0, 2.0, 3.0)))
    shown, texts = watched(monkeypatch, "imshow"), watched(monkeypatch, "text")
    save_overlay(tmp_path / "overlay.png", prepared, nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine))
    slices = [plane[0, 0] for (plane,), _ in shown]
    said = [arguments[2] for arguments, _ in texts if arguments[2].startswith("z = ")]
    assert len(set(said)) == COLUMNS
    assert said == [f"z = {3 * z - 25:.0f} mm" for z in slices]


@pytest.mark.parametrize(("shape", "height"), [((1, 30, 30), 922), ((2, 600, 30), 922), ((600, 2, 30), 154)])
def test_a_volume_of_one_column_is_drawn(tmp_path, shape, height):
    """And a tile never becomes more than three times as high as wide, or twice as wide as high."""
    data = np.random.default_rng(0).random(shape, dtype=np.float32)
    prepared = prepare(load_volume(nib.Nifti1Image(data, np.eye(4))), Preprocessing((1.0, 1.0, 1.0)))
    mask = nib.Nifti1Image((data > 0.5).astype(np.uint8), np.eye(4))
    save_overlay(tmp_path / "thin.png", prepared, mask)
    assert (tmp_path / "thin.png").stat().st_size > 1000
    drawn = imread(tmp_path / "thin.png")
    assert drawn.shape[:2] == (pytest.approx(height, abs=2), 1440)
    assert drawn[:, :, :3].std() > 0.03


def test_what_was_drawn_does_not_stay(tmp_path, monkeypatch):
    """Not until Python looks for circles either: over a folder that would be many pictures."""
    drawn = []
    real = Axes.imshow

    def imshow(self, plane, **settings):
        image = real(self, plane, **settings)
        drawn.append(weakref.ref(image.get_array()))
        return image

    monkeypatch.setattr(Axes, "imshow", imshow)
    settings = Preprocessing((1.0, 1.0, 1.0), modality="ct", hu_window=(0.0, 1000.0))
    prepared = prepare(load_volume(nib.Nifti1Image(head() - 1000 * (head() == 0), np.eye(4))), settings)
    mask = nib.Nifti1Image((head() > 50).astype(np.uint8), np.eye(4))
    gc.disable()
    try:
        maps = [ShownMap(name, prepared.data) for name in ("residual75", "patch_score", "gcu_residual")]
        save_overlay(tmp_path / "overlay.png", prepared, mask, maps)
        assert len(drawn) == 4 * COLUMNS
        assert not any(one() is not None for one in drawn)
    finally:
        gc.enable()
