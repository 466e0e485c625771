"""Training cases, the rolling pool, crops and augmentation."""

import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from grcsf_fast.cli import main
from grcsf_fast.data.datasets import (
    Case,
    CasePool,
    FolderSource,
    Survey,
    SyntheticSource,
    augmentation,
    drawing_spacings,
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


@pytest.mark.parametrize("what", ["folder", "synthetic", "crops", "flat", "boxes"])
def test_defaults_of_torch_change_nothing(folder, what):
    def made():
        if what == "folder":
            case = FolderSource(folder / "images", folder / "masks", Preprocessing(spacing=(3.0, 3.0, 3.0)))[0]
            return case.image, case.lesion
        if what == "synthetic":
            case = SyntheticSource(Preprocessing(spacing=(8.0, 8.0, 8.0)), 40, slices=6)[0]
            return case.image, case.lesion
        if what == "crops":
            return tuple(sample_crops([held], 4, (24, 8), 0.5, np.random.default_rng(0)).values())
        dims = 2 if what == "flat" else 3
        return tuple(augmentation(dims, ["image", "lesion"])(batches[dims], 3).values())

    held = lesion_case()
    batches = {dims: {"image": pattern(dims, 4), "lesion": pattern(dims, 4)} for dims in (2, 3)}
    expected = made()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = made()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert torch.equal(ours, theirs)


def test_two_images_of_one_case_are_refused(folder):
    """``a`` and ``a_0000`` would otherwise hide one another."""
    write_case(folder, "a", "_0000")
    with pytest.raises(ValueError, match="same case"):
        FolderSource(folder / "images", folder / "masks", Preprocessing())


def test_unknown_name_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="nobody"):
        FolderSource(folder / "images", folder / "masks", Preprocessing(), names=["a", "nobody"])
