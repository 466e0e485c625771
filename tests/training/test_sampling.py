"""Training cases, the rolling pool, crops and augmentation."""

from dataclasses import replace

import monai.transforms
import numpy as np
import pytest
import torch
from trainings import training_run

from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.datasets.cases import Case
from grcsf_fast.training import sampling
from grcsf_fast.training.augmentation import augmentation
from grcsf_fast.training.cases import case_cache
from grcsf_fast.training.sampling import CaseCache, sample_crops
from grcsf_fast.training.synthetic import SyntheticSource, drawing_spacings


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


@pytest.mark.parametrize("budget", [4 * 320, 4 * 320 - 1])
def test_a_pool_that_memory_may_not_hold_is_warned_of(monkeypatch, budget):
    """When the first case is there, by its bytes; maps are held in half precision."""
    monkeypatch.setattr(sampling, "memory_budget", lambda: budget)
    case = Case("a", torch.zeros(4, 4, 4), torch.zeros(4, 4, 4) > 0, residual_maps=torch.zeros(2, 4, 4, 4))
    assert sampling.bytes_of(sampling.small(case)) == 64 * 4 + 64 + 2 * 64 * 2 == 576
    small = replace(case, residual_maps=None)
    assert sampling.bytes_of(small) == 320
    pool = CaseCache([small] * 9, 4, 1)
    if budget == 4 * 320:
        pool.at(0)
    else:
        with pytest.warns(UserWarning, match=r"^4 cases like the first need 0\.0 GiB .*; --cache-size 3 would do"):
            pool.at(0)
    pool.at(1)  # said once


def test_synthetic_source_is_isotropic():
    with pytest.raises(ValueError, match=r"spacing: synthetic subjects are isotropic, got \(8\.0, 8\.0, 6\.0\)"):
        SyntheticSource(Preprocessing(spacing=(8.0, 8.0, 6.0)), 0)


@pytest.mark.slow
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


@pytest.mark.parametrize(("size", "replace_every"), [(1, 1), (4, 1), (4, 3), (5, 0)])
def test_the_pool_depends_on_the_step_alone(size, replace_every):
    walking = CaseCache(Numbers(), size, replace_every)
    for step in range(20):
        walked = [case.name for case in walking.at(step)]
        jumped = [case.name for case in CaseCache(Numbers(), size, replace_every).at(step)]
        first = step // replace_every if replace_every else 0
        assert walked == jumped == [str(index) for index in range(first, first + size)]
    assert walking.source.asked == sorted(set(walking.source.asked))
    # Backwards too.
    assert [case.name for case in walking.at(0)] == [str(index) for index in range(size)]


def test_the_pool_finishes_each_case_once_and_keeps_residuals_small():
    finished = []

    def finish(case):
        finished.append(case.name)
        return replace(case, residual_maps=torch.rand(2, 4, 4, 4))

    seen = []
    pool = CaseCache(Numbers(), 3, 2, finish)
    for step in range(6):
        cases = pool.at(step, lambda missing: seen.append(list(missing)) or missing)
        assert all(case.residual_maps.dtype == torch.float16 for case in cases)
    assert finished == ["0", "1", "2", "3", "4"]
    assert seen == [[0, 1, 2], [], [3], [], [4], []]


@pytest.mark.parametrize(("steps", "seen"), [(4, 4), (5, 5)])
def test_cases_that_a_training_leaves_unseen_are_said(tmp_path, capsys, steps, seen):
    """Of five three are in memory; the fifth comes after the fourth step, for the fifth."""
    source = type("Five", (Numbers,), {"__len__": lambda self: 5})()
    pool = case_cache(source, training_run(tmp_path, cache_size=3, replace_every=2, steps=steps))
    for step in range(steps):
        pool.at(step)
    assert len(source.asked) == seen
    assert capsys.readouterr().out.partition(";")[0] == ("4 of 5 cases will be seen" if seen < 5 else "")


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
    assert batch["residual_maps"].shape == (7, 2, *crop)
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
    assert torch.equal(batch["residual_maps"][:, :1], batch["image"] + 0.25)
    assert torch.equal(batch["residual_maps"][:, 1:], -batch["image"])
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
    assert torch.equal(batch["image"], batch["residual_maps"])
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


@pytest.mark.parametrize("crop", [(8, 8), (8, 8, 8)])
def test_cases_without_lesion_leave_the_share_as_it_is(crop):
    """Crops that shall hold lesion come from the cases that do; those drawn from such a case stay what they were."""
    full = lesion_case(residual=False)
    empty = replace(full, lesion=torch.zeros(20, 22, 18, dtype=torch.bool), image=full.image + 100)
    # Of a slice that no lesion is in.
    elsewhere = replace(full, slices=(2,)) if len(crop) == 2 else empty
    for others in ([empty, empty, full], [elsewhere, full, empty]):
        batch = sample_crops(others, 40, crop, 1.0, np.random.default_rng(0))
        assert batch["lesion"].flatten(1).any(1).all()
    drawn = [np.random.default_rng(seed).integers(2) for seed in np.random.default_rng(0).integers(2**63, size=40)]
    mixed, alike = (
        sample_crops(cases, 40, crop, 0.5, np.random.default_rng(0)) for cases in ([full, empty], [full] * 2)
    )
    for index, case in enumerate(drawn):
        if case == 0:
            assert torch.equal(mixed["image"][index], alike["image"][index])
    assert any((mixed["image"] > 50).flatten(1).all(1))  # those that need hold none


@pytest.mark.parametrize("crop", [(8, 8), (8, 8, 8)])
def test_each_mask_of_the_pool_is_looked_through_once(monkeypatch, crop):
    """And the crops are the same as those of cases that nobody has looked through."""
    looks, real = [], sampling._lesion_slices
    monkeypatch.setattr(sampling, "_lesion_slices", lambda lesion: looks.append(1) or real(lesion))
    full = lesion_case()
    empty = replace(full, lesion=torch.zeros_like(full.lesion), image=full.image + 100)
    several = replace(full, lesion=torch.where(full.lesion, 3, 0).to(torch.uint8), slices=(2, 10))
    source = [empty, full, several]
    pool = CaseCache(source, 2, 1)
    for step in range(2):
        cases = pool.at(step)
        assert len(looks) == 2 + step
        batch = sample_crops(cases, 12, crop, 0.8, np.random.default_rng(step))
        assert len(looks) == 2 + step
        plain = [replace(case, residual_maps=case.residual_maps.half()) for case in source[step : step + 2]]
        expected = sample_crops(plain, 12, crop, 0.8, np.random.default_rng(step))
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        del looks[2 + step :]


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
    batch = {"image": blob, "lesion": blob, "residual_maps": torch.cat([blob, 2 * blob], 1)}
    out = augmentation(dims)(batch, 7)
    assert {key: value.shape for key, value in out.items()} == {key: value.shape for key, value in batch.items()}
    assert set(out["lesion"].unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(out["residual_maps"][:, 1], 2 * out["residual_maps"][:, 0])
    moved = 0
    for index in range(len(blob)):
        lesion = out["lesion"][index, 0] > 0.5
        residual = out["residual_maps"][index, 0] > 0.5
        image = out["image"][index, 0]
        image = image > (image[lesion].median() + image[~lesion].median()) / 2
        for other in (residual, image):
            dice = 2 * (lesion & other).sum() / (lesion.sum() + other.sum())
            assert dice > 0.85, (index, dice)
        moved += not torch.equal(lesion, blob[index, 0] > 0.5)
    assert moved > len(blob) / 2


def test_intensities_change_in_the_image_alone():
    blob = pattern(2)
    keys = ["image", "lesion", "residual_maps"]
    out = augmentation(2)(dict.fromkeys(keys, blob), 3)
    assert out["residual_maps"].min() >= -1e-6
    assert out["residual_maps"].max() <= 1 + 1e-6
    assert (out["image"].amax((1, 2, 3)) - out["image"].amin((1, 2, 3)) - 1).abs().max() > 0.05


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("twin", [False, True])
def test_all_mirrors_left_and_right_alone(monkeypatch, dims, twin):
    """What else changes never happens here; beside a healthy twin intensities do not change in any case."""
    intensities = ["AdjustContrastd", "ScaleIntensityd", "ShiftIntensityd", "GaussianNoised"]
    for name in ("Affined", *([] if twin else intensities)):
        real = getattr(monai.transforms, f"Rand{name}")

        def never(keys, prob, real=real, **named):
            return real(keys, prob=0.0, **named)

        monkeypatch.setattr(monai.transforms, f"Rand{name}", never)
    keys = ("image", "healthy") if twin else ("image", "lesion", "residual_maps")
    batch = {key: torch.randn(16, 1 + (key == "residual_maps"), *(6, 8, 5)[:dims]) for key in keys}
    out = augmentation(dims)(batch, 3)
    mirrored = [torch.equal(out["image"][index], batch["image"][index].flip(1)) for index in range(16)]
    assert 0 < sum(mirrored) < 16
    for key, values in batch.items():
        for one, other, turned in zip(out[key], values, mirrored, strict=True):
            assert torch.equal(one, other.flip(1) if turned else other)


@pytest.mark.parametrize("dims", [2, 3])
def test_augmentation_depends_on_the_seed_alone(dims):
    batch = {"image": torch.randn(4, 1, *[12] * dims), "lesion": (torch.rand(4, 1, *[12] * dims) > 0.5).float()}
    kept = {key: value.clone() for key, value in batch.items()}
    augment = augmentation(dims)
    first = augment(batch, 5)
    other = augment(batch, 6)
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    torch.manual_seed(1)
    again = augment(batch, 5)
    fresh = augmentation(dims)(batch, 5)
    for key in batch:
        assert torch.equal(first[key], again[key])
        assert torch.equal(first[key], fresh[key])
        assert torch.equal(batch[key], kept[key]), "the batch itself must stay as it was"
    assert not torch.equal(first["image"], other["image"])


def test_flips_change_nothing_else():
    batch = {"image": torch.randn(16, 1, 6, 8), "lesion": (torch.rand(16, 1, 6, 8) > 0.5).float()}
    out = augmentation(2, "flips")(batch, 3)
    flipped = 0
    for index in range(16):
        turned = torch.equal(out["image"][index], batch["image"][index].flip(1))
        for key, values in batch.items():
            assert torch.equal(out[key][index], values[index].flip(1) if turned else values[index])
        flipped += turned
    assert 0 < flipped < 16


def test_affine_moves_and_neither_mirrors_nor_shades():
    blob = torch.zeros(16, 1, 24, 24)
    blob[:, :, 4:9, 8:16] = 1.0
    out = augmentation(2, "affine")({"image": blob, "lesion": blob}, 3)
    moved = [not torch.equal(out["image"][index], blob[index]) for index in range(16)]
    assert 0 < sum(moved) < 16
    # Half of them would lie on the other side with flips.
    assert (out["lesion"][:, :, :12].sum((1, 2, 3)) > out["lesion"][:, :, 12:].sum((1, 2, 3))).all()
    assert float(out["image"].min()) >= 0
    assert float(out["image"].amax((1, 2, 3)).min()) > 0.95


@pytest.mark.parametrize(
    ("spacing", "still"), [((1, 1, 3), 2), ((3, 1, 1), 0), ((1, 1.6, 1), 1), ((1, 1.2, 1.5), None)]
)
def test_boxes_turn_in_planes_of_like_spacings_alone(spacing, still):
    """What differs along the axis of another spacing alone still does."""
    for axis in range(3):
        ramp = torch.linspace(0, 1, 12).view([-1 if other == axis else 1 for other in range(3)]).expand(12, 12, 12)
        out = augmentation(3, "affine", spacing)({"image": ramp.expand(8, 1, 12, 12, 12)}, 3)["image"]
        others = [2 + other for other in range(3) if other != axis]
        assert (float((out.amax(others) - out.amin(others)).max()) < 1e-4) == (axis == still)


def test_slices_turn_where_their_pixels_are_about_square():
    ramp = torch.linspace(0, 1, 12)[:, None].expand(8, 1, 12, 12)
    for spacing, turned in (((1, 1, 3), True), ((1, 2, 1), False)):
        out = augmentation(2, "affine", spacing)({"image": ramp}, 3)["image"]
        assert (float((out.amax(3) - out.amin(3)).max()) > 1e-4) == turned


def test_no_augmentation_changes_nothing():
    batch = {"image": torch.randn(2, 1, 6, 8)}
    assert torch.equal(augmentation(2, "none")(batch, 3)["image"], batch["image"])


def test_augmentation_returns_plain_tensors():
    """MONAI's MetaTensor would follow every operation of the network with its bookkeeping."""
    batch = {"image": torch.randn(2, 1, 12, 12), "lesion": torch.zeros(2, 1, 12, 12)}
    out = augmentation(2)(batch, 0)
    assert {type(value) for value in out.values()} == {torch.Tensor}
    assert {value.dtype for value in out.values()} == {torch.float32}


@pytest.mark.parametrize("what", ["synthetic", "crops", "flat", "boxes"])
def test_defaults_of_torch_change_nothing(what):
    def made():
        if what == "synthetic":
            case = SyntheticSource(Preprocessing(spacing=(8.0, 8.0, 8.0)), 40, slices=6)[0]
            return case.image, case.lesion
        if what == "crops":
            return tuple(sample_crops([held], 4, (24, 8), 0.5, np.random.default_rng(0)).values())
        dims = 2 if what == "flat" else 3
        return tuple(augmentation(dims)(batches[dims], 3).values())

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


@pytest.mark.parametrize("kind", ["all", "flips", "none"])
def test_a_part_of_a_batch_is_that_part_of_the_whole(kind):
    """Processes that share a batch each cut and change their own crops alone."""
    cases = [lesion_case(seed=seed) for seed in range(3)]
    whole, parts, after = [], [], set()
    for own, found in ((slice(None), whole), (slice(0, 2), parts), (slice(2, 6), parts)):
        rng = np.random.default_rng(5)
        batch = sample_crops(cases, 6, (8, 10), 0.5, rng, None, own)
        after.add(int(rng.integers(10**9)))
        found.append(augmentation(2, kind)(batch, 11, own.start or 0))
    for name, values in whole[0].items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values)
    assert len(after) == 1
