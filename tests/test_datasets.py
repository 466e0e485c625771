"""Training cases, the rolling pool, crops and augmentation."""

import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from grcsf_fast.data.datasets import (
    Case,
    CasePool,
    FolderSource,
    SyntheticSource,
    augmentation,
    drawing_spacings,
    load_mask,
    sample_crops,
)
from grcsf_fast.data.volumes import Preprocessing, VolumeError

SHAPE = (24, 26, 22)
AFFINE = np.array([[-2, 0, 0, 20], [0, 2, 0, -30], [0, 0, 2, 5], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Volumes this small lose more to waiting threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_case(root, name, suffix="", corner=(8, 9, 7)):
    """A head with a dark cube of 4 voxels at ``corner``, and its mask."""
    rng = np.random.default_rng(len(name))
    image = np.zeros(SHAPE, np.float32)
    image[3:21, 3:23, 3:19] = rng.uniform(90, 110, (18, 20, 16))
    mask = np.zeros(SHAPE, np.uint8)
    mask[tuple(slice(first, first + 4) for first in corner)] = 1
    image[mask > 0] = 50
    for folder, data, file in (("images", image, f"{name}{suffix}"), ("masks", mask, name)):
        (root / folder).mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(data, AFFINE), root / folder / f"{file}.nii.gz")


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
        assert case.residual is None
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


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_load_mask_takes_any_type_and_constants(tmp_path, dtype):
    path = tmp_path / "m.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((*SHAPE, 1), dtype), AFFINE), path)
    mask = load_mask(path)
    assert mask.shape == SHAPE
    assert not np.asarray(mask.dataobj).any()
    np.testing.assert_allclose(mask.affine, AFFINE)


def test_load_mask_errors(tmp_path):
    path = tmp_path / "m.nii.gz"
    path.write_bytes(b"garbage")
    with pytest.raises(VolumeError, match=re.escape(f"{path}: expected a NIfTI mask, could not read it")):
        load_mask(path)
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5, 2), np.uint8), AFFINE), path)
    with pytest.raises(VolumeError, match=re.escape(f"{path}: expected one 3-D mask, found shape (3, 4, 5, 2)")):
        load_mask(path)
    nib.save(nib.Nifti1Image(np.full((3, 4, 5), np.nan, np.float32), AFFINE), path)
    with pytest.raises(VolumeError, match=re.escape(f"{path}: expected a mask of finite values")):
        load_mask(path)
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE), path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(VolumeError, match=re.escape(f"{path}: expected a NIfTI mask, could not read it")):
        load_mask(path)


def test_synthetic_source():
    source = SyntheticSource(Preprocessing(spacing=(8.0, 8.0, 8.0)), first_seed=40)
    first, again = source[2], source[2]
    assert first.name == "synthetic_42"
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.lesion, again.lesion)
    assert first.lesion.shape == first.image.shape
    assert not torch.equal(first.image, source[3].image[: first.image.shape[0]])
    shifted = SyntheticSource(Preprocessing(spacing=(8.0, 8.0, 8.0)), first_seed=42)[0]
    assert torch.equal(shifted.image, first.image)
    healthy = SyntheticSource(Preprocessing(spacing=(8.0, 8.0, 8.0)), first_seed=40, lesions=False)[2]
    assert not healthy.lesion.any()


def test_synthetic_source_is_isotropic():
    with pytest.raises(ValueError, match=r"spacing: synthetic subjects are isotropic, got \(8\.0, 8\.0, 6\.0\)"):
        SyntheticSource(Preprocessing(spacing=(8.0, 8.0, 6.0)), 0)


def test_subjects_drawn_at_other_spacings_land_on_the_same_grid():
    preprocessing = Preprocessing(spacing=(8.0, 8.0, 8.0))
    source = SyntheticSource(preprocessing, first_seed=40, drawn_at=(4.0, 6.0, 8.0))
    cases = [source[index] for index in range(9)]
    shapes = np.array([case.image.shape for case in cases])
    assert (shapes.max(0) / shapes.min(0) < 2).all()
    assert torch.equal(cases[3].image, source[3].image)
    # All three spacings are used: each subject equals the one drawn at one of them alone.
    fixed = {spacing: SyntheticSource(preprocessing, 40, drawn_at=(spacing,)) for spacing in (4.0, 6.0, 8.0)}
    used = {
        spacing
        for index, case in enumerate(cases)
        for spacing, other in fixed.items()
        if other[index].image.shape == case.image.shape and torch.equal(other[index].image, case.image)
    }
    assert used == {4.0, 6.0, 8.0}


def test_a_share_of_the_subjects_is_crowded():
    preprocessing = Preprocessing(spacing=(8.0, 8.0, 8.0))
    plain, half = (SyntheticSource(preprocessing, 0, crowded=share) for share in (0.0, 0.5))
    others = [not torch.equal(plain[index].lesion, half[index].lesion) for index in range(16)]
    assert 3 <= sum(others) <= 13
    # The others are the very same subjects.
    assert torch.equal(plain[others.index(False)].image, half[others.index(False)].image)


@pytest.mark.parametrize(
    ("spacing", "expected"), [(2.0, (1.0, 1.5, 2.0)), (1.5, (1.125, 1.5)), (1.0, (1.0,)), (0.5, (0.5,))]
)
def test_drawing_spacings(spacing, expected):
    assert drawing_spacings(spacing) == expected


class Numbers:
    """Case k is filled with k; counts what it is asked for."""

    def __init__(self):
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return Case(str(index), torch.full((4, 4, 4), float(index)), None)


@pytest.mark.parametrize(("size", "refresh"), [(1, 1), (4, 1), (4, 3), (5, 0)])
def test_the_pool_depends_on_the_step_alone(size, refresh):
    walking = CasePool(Numbers(), size, refresh)
    for step in range(20):
        walked = [case.name for case in walking.at(step)]
        jumped = [case.name for case in CasePool(Numbers(), size, refresh).at(step)]
        first = step // refresh if refresh else 0
        assert walked == jumped == [str(index) for index in range(first, first + size)]
    assert walking.source.asked == sorted(set(walking.source.asked))
    # Backwards too.
    assert [case.name for case in walking.at(0)] == [str(index) for index in range(size)]


def test_the_pool_finishes_each_case_once_and_keeps_residuals_small():
    finished = []

    def finish(case):
        finished.append(case.name)
        return replace(case, residual=torch.rand(2, 4, 4, 4))

    seen = []
    pool = CasePool(Numbers(), 3, 2, finish)
    for step in range(6):
        cases = pool.at(step, lambda missing: seen.append(list(missing)) or missing)
        assert all(case.residual.dtype == torch.float16 for case in cases)
    assert finished == ["0", "1", "2", "3", "4"]
    assert seen == [[0, 1, 2], [], [3], [], [4], []]


def lesion_case(shape=(20, 22, 18), seed=0, residual=True):
    generator = torch.Generator().manual_seed(seed)
    lesion = torch.zeros(shape, dtype=torch.bool)
    lesion[1:3, 18:21, 9:11] = True
    maps = torch.rand(2, *shape, generator=generator) if residual else None
    return Case(str(seed), torch.randn(shape, generator=generator), lesion, maps)


@pytest.mark.parametrize("crop", [(8, 10), (8, 10, 6)])
def test_crops(crop):
    cases = [lesion_case(seed=0), lesion_case((15, 16, 17), 1)]
    cases[1] = replace(cases[1], lesion=torch.zeros(15, 16, 17, dtype=torch.bool))
    batch = sample_crops(cases, 7, crop, 0.5, np.random.default_rng(3))
    assert batch["image"].shape == (7, 1, *crop)
    assert batch["lesion"].shape == (7, 1, *crop)
    assert batch["residual"].shape == (7, 2, *crop)
    assert {values.dtype for values in batch.values()} == {torch.float32}
    again = sample_crops(cases, 7, crop, 0.5, np.random.default_rng(3))
    other = sample_crops(cases, 7, crop, 0.5, np.random.default_rng(4))
    for name, values in batch.items():
        assert torch.equal(values, again[name])
    assert not torch.equal(batch["image"], other["image"])


@pytest.mark.parametrize("crop", [(8, 10), (8, 10, 6)])
def test_crops_of_image_lesion_and_residual_come_from_one_place(crop):
    """Each entry is a known function of the position."""
    shape = (20, 22, 18)
    place = torch.arange(20 * 22 * 18, dtype=torch.float32).view(shape)
    case = Case("a", place, place % 3 == 0, torch.stack([place + 0.25, -place]))
    batch = sample_crops([case], 16, crop, 0.5, np.random.default_rng(0))
    assert torch.equal(batch["lesion"], (batch["image"] % 3 == 0).float())
    assert torch.equal(batch["residual"][:, :1], batch["image"] + 0.25)
    assert torch.equal(batch["residual"][:, 1:], -batch["image"])
    steps = batch["image"].diff(dim=2), batch["image"].diff(dim=3)
    assert (steps[0] == 22 * 18).all()
    assert (steps[1] == 18).all()
    assert len(batch["image"].flatten(1)[:, 0].unique()) > 8


def test_crops_of_cases_without_truth_or_maps():
    case = Case("a", torch.randn(20, 22, 18), None)
    assert set(sample_crops([case], 2, (8, 8), 1.0, np.random.default_rng(0))) == {"image"}


@pytest.mark.parametrize(
    ("crop", "shape"), [((16, 12), (9, 30, 8)), ((16, 12, 11), (9, 7, 30)), ((9, 9, 9), (4, 4, 4))]
)
def test_small_volumes_are_padded_with_their_edge(crop, shape):
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    case = Case("a", image, torch.zeros(shape, dtype=torch.bool), image[None])
    batch = sample_crops([case], 5, crop, 0.0, np.random.default_rng(0))
    for name, values in batch.items():
        assert values.shape == (5, 1, *crop), name
    before = (crop[0] - shape[0]) // 2
    inner = batch["image"][:, :, before : before + shape[0]]
    assert torch.equal(batch["image"][:, :, :before], inner[:, :, :1].expand_as(batch["image"][:, :, :before]))
    after = batch["image"][:, :, before + shape[0] :]
    assert torch.equal(after, inner[:, :, -1:].expand_as(after))
    assert torch.equal(batch["image"], batch["residual"])
    assert torch.isin(batch["image"], image).all()


@pytest.mark.parametrize("crop", [(8, 8), (7, 9), (8, 8, 8), (5, 6, 7)])
def test_crops_around_lesions(crop):
    """With a share of 1 every crop holds lesion, one at the border of the volume included; with 0 few do."""
    case = lesion_case(residual=False)
    batch = sample_crops([case], 60, crop, 1.0, np.random.default_rng(0))
    assert batch["lesion"].flatten(1).any(1).float().mean() == 1
    batch = sample_crops([case], 60, crop, 0.0, np.random.default_rng(0))
    assert batch["lesion"].flatten(1).any(1).float().mean() < 0.5


def test_crops_of_a_case_without_lesion_lie_anywhere():
    case = replace(lesion_case(), lesion=torch.zeros(20, 22, 18, dtype=torch.bool))
    batch = sample_crops([case], 5, (8, 8), 1.0, np.random.default_rng(0))
    assert not batch["lesion"].any()


def pattern(dims, count=12):
    """A blob off the middle, different along every axis and direction, so that no flip hides."""
    size = 32 if dims == 2 else 20
    axes = torch.meshgrid(*[torch.linspace(-1, 1, size)] * dims, indexing="ij")
    middle = (0.3, -0.25, 0.2)[:dims]
    width = (0.5, 0.35, 0.4)[:dims]
    square = sum(((axis - m) / w) ** 2 for axis, m, w in zip(axes, middle, width, strict=True))
    return (square < 1).float().expand(count, 1, *[size] * dims).clone()


@pytest.mark.parametrize("dims", [2, 3])
def test_augmentation_moves_everything_together(dims):
    """The lesion by nearest neighbour, the others linearly: they agree but for the edge."""
    blob = pattern(dims)
    batch = {"image": blob, "lesion": blob, "residual": torch.cat([blob, 2 * blob], 1)}
    out = augmentation(dims, ["image", "lesion", "residual"])(batch, 7)
    assert {key: value.shape for key, value in out.items()} == {key: value.shape for key, value in batch.items()}
    assert set(out["lesion"].unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(out["residual"][:, 1], 2 * out["residual"][:, 0])
    moved = 0
    for index in range(len(blob)):
        lesion = out["lesion"][index, 0] > 0.5
        residual = out["residual"][index, 0] > 0.5
        image = out["image"][index, 0]
        image = image > (image[lesion].median() + image[~lesion].median()) / 2
        for other in (residual, image):
            dice = 2 * (lesion & other).sum() / (lesion.sum() + other.sum())
            assert dice > 0.85, (index, dice)
        moved += not torch.equal(lesion, blob[index, 0] > 0.5)
    assert moved > len(blob) / 2


def test_intensities_change_in_the_image_alone():
    blob = pattern(2)
    out = augmentation(2, ["image", "lesion", "residual"])({"image": blob, "lesion": blob, "residual": blob}, 3)
    assert out["residual"].min() >= -1e-6
    assert out["residual"].max() <= 1 + 1e-6
    assert (out["image"].amax((1, 2, 3)) - out["image"].amin((1, 2, 3)) - 1).abs().max() > 0.05


@pytest.mark.parametrize("dims", [2, 3])
def test_augmentation_depends_on_the_seed_alone(dims):
    batch = {"image": torch.randn(4, 1, *[12] * dims), "lesion": (torch.rand(4, 1, *[12] * dims) > 0.5).float()}
    kept = {key: value.clone() for key, value in batch.items()}
    augment = augmentation(dims, ["image", "lesion"])
    first = augment(batch, 5)
    other = augment(batch, 6)
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    torch.manual_seed(1)
    again = augment(batch, 5)
    fresh = augmentation(dims, ["image", "lesion"])(batch, 5)
    for key in batch:
        assert torch.equal(first[key], again[key])
        assert torch.equal(first[key], fresh[key])
        assert torch.equal(batch[key], kept[key]), "the batch itself must stay as it was"
    assert not torch.equal(first["image"], other["image"])


def test_flips_change_nothing_else():
    batch = {"image": torch.randn(16, 1, 6, 8), "lesion": (torch.rand(16, 1, 6, 8) > 0.5).float()}
    out = augmentation(2, ["image", "lesion"], "flips")(batch, 3)
    flipped = 0
    for index in range(16):
        turned = torch.equal(out["image"][index], batch["image"][index].flip(1))
        for key, values in batch.items():
            assert torch.equal(out[key][index], values[index].flip(1) if turned else values[index])
        flipped += turned
    assert 0 < flipped < 16


def test_no_augmentation_changes_nothing():
    batch = {"image": torch.randn(2, 1, 6, 8)}
    assert torch.equal(augmentation(2, ["image"], "none")(batch, 3)["image"], batch["image"])


def test_augmentation_returns_plain_tensors():
    """MONAI's MetaTensor would follow every operation of the network with its bookkeeping."""
    batch = {"image": torch.randn(2, 1, 12, 12), "lesion": torch.zeros(2, 1, 12, 12)}
    out = augmentation(2, ["image", "lesion"])(batch, 0)
    assert {type(value) for value in out.values()} == {torch.Tensor}
    assert {value.dtype for value in out.values()} == {torch.float32}


def test_two_images_of_one_case_are_refused(folder):
    """``a`` and ``a_0000`` would otherwise hide one another."""
    write_case(folder, "a", "_0000")
    with pytest.raises(ValueError, match="same case"):
        FolderSource(folder / "images", folder / "masks", Preprocessing())


def test_unknown_name_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="nobody"):
        FolderSource(folder / "images", folder / "masks", Preprocessing(), names=["a", "nobody"])
